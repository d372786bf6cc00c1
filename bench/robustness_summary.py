"""From accuracies at levels of noise (or of an attack) to what can be said: curves, areas, paired verdicts.

Every estimate is over seeds, so its interval covers the draws of the noise too. Rules are compared with one reference,
paired by seed, on the relative area (`bench.curves`). Each verdict is one 95 % interval by itself: of twenty
comparisons without any difference, one is expected to say otherwise.

There is no verdict where networks learned nothing (the rest would be survivors), none on an attack through B (a wrong
gradient fails, which is not robustness), and none on a rule that has no noise at the site.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from bench.config import Site, UserError
from bench.curves import area, half_level, relative_area
from bench.statistics import estimate, versus

#: What the paired difference of relative areas says.
VERDICTS = {"better": "more robust", "worse": "less robust", "not distinguishable": "not distinguishable"}

#: The symbol of a level, where the caller names no other.
SYMBOL = "σ"

#: How the name of a curve ends whose attack went by the gradient through B; before it stands the attack.
THROUGH_B = " through B"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One network at one level; level 0 is its clean accuracy, which every site needs.

    ``accuracy`` is a share in [0, 1], a mean over ``draws`` of the noise with the standard error ``se``. A run that
    diverged counts at chance at level 0 and at the floor above it, whatever it says; one without an accuracy failed.
    ValueError for values that cannot be.
    """

    site: str
    rule: str
    seed: int
    level: float
    accuracy: float | None
    status: str = "finished"
    se: float | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:
            raise ValueError(f"accuracy {self.accuracy} is not a share in [0, 1]")
        if not 0 <= self.level < math.inf:
            raise ValueError(f"level {self.level} is not 0 or above")


@dataclass(frozen=True, kw_only=True)
class _Curves:
    """The curves of one rule at one site. A seed is whole if it has an accuracy at 0 and at every level of the site.

    An ``unaffected`` rule has no noise there: clean accuracies alone, no levels and no curve.
    """

    points: tuple[Point, ...]
    levels: tuple[float, ...]
    chance: float
    floor: float
    tested: int
    unaffected: bool = False

    def at(self, level: float) -> dict[int, float]:
        """Accuracies by seed."""
        found = {p.seed: self._accuracy(p) for p in self.points if p.level == level}
        return {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}

    def _accuracy(self, point: Point) -> float | None:
        if point.status == "diverged":
            return self.floor if point.level else self.chance
        return None if point.status == "failed" else point.accuracy

    @cached_property
    def whole(self) -> dict[int, tuple[float, ...]]:
        """Clean accuracy and accuracies at the levels, by seed. One level alone has no area, and makes no curve."""
        if len(self.levels) < 2:
            return {}
        columns = [self.at(level) for level in (0.0, *self.levels)]
        seeds = set.intersection(*map(set, columns))
        return {seed: tuple(column[seed] for column in columns) for seed in sorted(seeds)}

    @cached_property
    def areas(self) -> dict[int, float]:
        return {seed: area(self.levels, accuracies) for seed, (_, *accuracies) in self.whole.items()}

    @cached_property
    def relative(self) -> dict[int, float]:
        """Relative areas of the seeds that were above chance without noise."""
        found = {
            seed: relative_area(self.areas[seed], clean, self.chance, self.tested, floor=self.floor)
            for seed, (clean, *_) in self.whole.items()
        }
        return {seed: value for seed, value in found.items() if value is not None}

    @cached_property
    def halves(self) -> dict[int, float]:
        """Half levels of the same seeds; math.inf where a curve does not fall that low."""
        found = {
            seed: half_level(self.levels, accuracies, clean, self.chance, self.tested, floor=self.floor)
            for seed, (clean, *accuracies) in self.whole.items()
        }
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def at_chance(self) -> int:
        """How many whole curves are of networks that had learned nothing."""
        return len(self.whole) - len(self.relative)

    @property
    def incomplete(self) -> int:
        return len({p.seed for p in self.points} - set(self.at(0.0) if self.unaffected else self.whole))

    def of(self, status: str) -> list[Point]:
        """The points with this status."""
        return [p for p in self.points if status == ("failed" if self._accuracy(p) is None else p.status)]

    def seeds(self, status: str) -> int:
        """How many seeds have a point with this status."""
        return len({p.seed for p in self.of(status)})


def summarize(
    points: Iterable[Point],
    *,
    chance: float,
    tested: int,
    floor: float | None = None,
    reference: str = "backprop",
    symbols: Mapping[str, str] | None = None,
    unaffected: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Any]:
    """Every site, every rule: JSON-ready, the same for any order of the points. See `_entry` for a rule's keys.

    ``chance``, ``tested`` and ``floor`` as in `bench.curves`; ``symbols`` gives a site another symbol than σ, e.g. ε.
    ``unaffected``: by site, the rules whose training has no noise there; of these, points above level 0 are left out.
    The levels of a site are all that any of its points has, so give a run that failed as a point without an accuracy.
    A site's ``counts`` are of its own points; ``true_site`` is the attack of which it is the curve through B, or None.
    UserError for a point that stands twice.
    """
    points, spared = list(points), unaffected or {}
    _refuse_repeats(points)
    points = [p for p in points if not (p.level and p.rule in spared.get(p.site, ()))]
    floor = chance if floor is None else floor
    found = {
        site: _curves([p for p in points if p.site == site], chance, floor, tested, reference, spared.get(site, ()))
        for site in sorted({p.site for p in points}, key=_place)
    }
    sites = [
        {
            "site": site,
            "symbol": (symbols or {}).get(site, SYMBOL),
            "reference": reference,
            "chance": chance,
            "floor": floor,
            "tested": tested,
            **_site(site, found, reference),
        }
        for site in found
    ]
    return {"reference": reference, "chance": chance, "tested": tested, "sites": sites}


def _curves(
    points: list[Point], chance: float, floor: float, tested: int, reference: str, spared: Collection[str]
) -> dict[str, _Curves]:
    """The curves of one site by rule, the reference's first."""
    levels = tuple(sorted({p.level for p in points} - {0.0}))
    return {
        rule: _Curves(
            points=tuple(p for p in points if p.rule == rule),
            levels=() if rule in spared else levels,
            chance=chance,
            floor=floor,
            tested=tested,
            unaffected=rule in spared,
        )
        for rule in sorted({p.rule for p in points}, key=lambda r: (r != reference, r))
    }


def _site(site: str, found: Mapping[str, Mapping[str, _Curves]], reference: str) -> dict[str, Any]:
    mine, true_site = found[site], site.removesuffix(THROUGH_B) if site.endswith(THROUGH_B) else None
    nothing = _Curves(points=(), levels=(), chance=0.0, floor=0.0, tested=1)
    theirs = nothing if true_site else mine.get(reference, nothing)
    true, pgd = found.get(true_site or "", {}), found.get("pgd", {}) if site == "square" else {}
    entries = [
        {
            **_entry(rule, curves, nothing if rule == reference else theirs),
            "versus_true": _areas_versus(curves, true.get(rule, nothing)),
            "versus_pgd": _areas_versus(curves, pgd.get(rule, nothing)),
        }
        for rule, curves in mine.items()
    ]
    counts = {
        "runs": sum(len(curves.points) for curves in mine.values()),
        "diverged": sum(len(curves.of("diverged")) for curves in mine.values()),
        "failed": sum(len(curves.of("failed")) for curves in mine.values()),
    }
    levels = max((curves.levels for curves in mine.values()), key=len)
    return {"true_site": true_site, "levels": list(levels), "counts": counts, "rules": entries}


def _areas_versus(ours: _Curves, theirs: _Curves) -> dict[str, Any] | None:
    """Areas of one rule under two attacks, paired by network; those of other levels are not comparable."""
    return versus(ours.areas, theirs.areas) if ours.levels == theirs.levels else None


def _place(site: str) -> tuple[int, str]:
    """Noise in the order of the design, then the rest (attacks) by name."""
    known = typing.get_args(Site)
    return (known.index(site) if site in known else len(known), site)


def _refuse_repeats(points: Iterable[Point]) -> None:
    seen: set[tuple[str, str, int, float]] = set()
    for p in points:
        key = (p.site, p.rule, p.seed, p.level)
        if key in seen:
            raise UserError(
                f"robustness: rule {p.rule}, seed {p.seed} stands twice at {p.site} {p.level:g}; keep one of the two."
            )
        seen.add(key)


def _entry(rule: str, curves: _Curves, reference: _Curves) -> dict[str, Any]:
    """One rule at one site. ``*versus``: ours − the reference's, paired by seed; None where there is no pair.

    ``clean`` and ``curve`` are over all seeds measured at that level. The areas are over the seeds whose curve is
    whole; ``incomplete`` counts the others (``failed``: those of them that a failed run left so). ``relative_area``
    and ``half_level`` leave out the whole curves that were at chance without noise, ``at_chance``; where there are
    any, on either side, there is no ``relative_area_versus`` and no ``verdict``. ``compared``: clean accuracies of the
    very seeds that the verdict is on. ``diverged`` counts seeds with a diverged run, which stand at chance in the
    clean mean and at the floor in every other.

    ``versus_true`` and ``versus_pgd`` (added by `_site`): the area of an attack through B − that by the true gradient,
    and of square − pgd, of the same rule; positive where the former attack is the weaker one.
    """
    whole = not curves.at_chance and not reference.at_chance
    difference = versus(curves.relative, reference.relative) if whole else None
    return {
        "rule": rule,
        "unaffected": curves.unaffected,
        "seeds": sorted({p.seed for p in curves.points}),
        "diverged": curves.seeds("diverged"),
        "failed": curves.seeds("failed"),
        "incomplete": curves.incomplete,
        "at_chance": curves.at_chance,
        "clean": _estimate(curves.at(0.0)),
        "clean_versus": versus(curves.at(0.0), reference.at(0.0)),
        "curve": [_level(level, curves, reference) for level in curves.levels],
        "area": _estimate(curves.areas),
        "area_versus": versus(curves.areas, reference.areas),
        "relative_area": _estimate(curves.relative),
        "relative_area_versus": difference,
        "compared": difference and _compared(curves, reference),
        "half_level": _half(curves),
        "verdict": difference and VERDICTS[difference["verdict"]],
    }


def _compared(curves: _Curves, reference: _Curves) -> dict[str, Any]:
    """The pairs behind a verdict, without noise."""
    seeds = sorted(set(curves.relative) & set(reference.relative))
    ours, theirs = ({seed: side.whole[seed][0] for seed in seeds} for side in (curves, reference))
    return {
        "seeds": seeds,
        "clean": _estimate(ours),
        "reference_clean": _estimate(theirs),
        "clean_versus": versus(ours, theirs),
    }


def _level(level: float, curves: _Curves, reference: _Curves) -> dict[str, Any]:
    """One level: ``draw_se``, root mean square over seeds, is the part of the spread that more draws would remove.

    It, and ``draws``, are of the networks that were evaluated: those that diverged were not.
    """
    accuracies = curves.at(level)
    here = [p for p in curves.points if p.level == level]
    drawn = [p for p in here if p.seed in accuracies and p.status != "diverged"]
    errors = [p.se for p in drawn if p.se is not None]
    return {
        "level": level,
        "n": len(accuracies),
        "acc": _estimate(accuracies),
        "draws": min((p.draws for p in drawn), default=None),
        "draw_se": math.sqrt(math.fsum(se**2 for se in errors) / len(errors)) if errors else None,
        "diverged": sum(p.status == "diverged" for p in here),
        "failed": len(here) - len(accuracies),
        "versus": versus(accuracies, reference.at(level)),
    }


def _half(curves: _Curves) -> dict[str, Any] | None:
    """Half levels over seeds. ``mean``, ``low``, ``high``: geometric mean and its 95 % t interval, taken in log2.

    Only where every seed has one: those that lie ``beyond`` the grid are known to be greater than its last level, no
    more, and those at chance have none. Then there is a ``median`` only; where it is not known either, it is None and
    greater than ``median_above``: the last level, or, of an even number of which half lie beyond, the geometric mean
    of it and the greatest half level that is known.
    """
    if not curves.halves:
        return None
    logs = [math.log2(value) for value in curves.halves.values()]
    beyond, middle = logs.count(math.inf), median(logs)
    bound = median(min(log, math.log2(curves.levels[-1])) for log in logs) if middle == math.inf else None
    found = None if beyond or len(logs) < len(curves.whole) else estimate(logs)
    return {
        "scale": "log",
        "mean": found and 2**found.mean,
        "low": None if found is None or found.low is None else 2**found.low,
        "high": None if found is None or found.high is None else 2**found.high,
        "median": None if middle == math.inf else 2**middle,
        "median_above": None if bound is None else 2**bound,
        "n": len(logs),
        "beyond": beyond,
    }


def _estimate(values: Mapping[int, float]) -> dict[str, Any] | None:
    return estimate([values[seed] for seed in sorted(values)]).to_dict() if values else None


# --- its numbers in MLflow


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """A measurement's own; none before it is complete: the area under a part of a grid is another number."""
    found: dict[str, float] = {}
    if not summary["complete"]:
        return found
    for site in summary["sites"]:
        for rule in site["rules"]:
            # a relative area of some of the networks, or by a gradient that is none, is no headline
            partial = rule["at_chance"] or site["true_site"]
            for name in ("clean", "area", *(() if partial else ("relative_area",))):
                if rule[name] is not None:
                    found[f"{site['site']}/{rule['rule']}/{name}"] = rule[name]["mean"]
    return found


def curves(summary: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """A measurement's curves of test accuracy, by their names in MLflow and the level."""
    found = {}
    for site in summary["sites"]:
        for rule in site["rules"]:
            levels = [{"level": 0.0, "acc": rule["clean"]}, *rule["curve"]]
            curve = {point["level"]: point["acc"]["mean"] for point in levels if point["acc"]}
            found[f"{site['site']}/{rule['rule']}/test_acc"] = curve
    return found
