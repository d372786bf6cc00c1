"""From rows to what carried over: the coefficients found on one architecture, on another.

Regret, rank correlation and lost share are those of the design, section 5. Every interval of an accuracy is over
seeds, for the architectures that were measured: it says nothing of others. Each verdict is one 95 % interval by itself.
Backprop has no coefficients to carry over, and so no row: it stands beside each pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.curves import above_chance
from bench.rows import Row
from bench.statistics import estimate, mean_by_seed, rank_correlation, share, verdict, versus
from bench.summary import by_seed

#: What a regret is taken of. The first chose, the second was read once.
ACCURACIES = ("val_acc", "test_acc")

#: The part of the configurations, best at home first, of which the lost share is.
TOP = 1 / 4

#: What a pair's regret says of the accuracy of the run that was moved.
MOVED = {"better": "lower", "worse": "higher", "not distinguishable": "not distinguishable"}
#: What the difference of two mean regrets says of the first one.
REGRETS = {"better": "higher", "worse": "lower", "not distinguishable": "not distinguishable"}

#: A share of nothing.
_NO_SHARE = {"share": None, "count": 0, "of": 0, "low": None, "high": None}

Regrets = dict[str, dict[int, float]]


@dataclass(frozen=True, kw_only=True)
class Carried:
    """One configuration of the source's study, there and on the target: search seed, validation only.

    ``home``: its row with the full budget. ``away`` is None as long as it was not run. A failed row has no accuracy.
    ValueError for a run that was stopped early, and if the two have different coefficients.
    """

    home: Row
    away: Row | None

    def __post_init__(self) -> None:
        away = self.home if self.away is None else self.away
        if "stopped" in (self.home["status"], away["status"]):
            raise ValueError(f"run {self.home['uid']} or {away['uid']} had less than its full budget")
        if self.home["config"]["coefficients"] != away["config"]["coefficients"]:
            raise ValueError(f"runs {self.home['uid']} and {away['uid']} have different coefficients")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What was run to carry one rule from ``source`` to ``target``; the confirmed runs have the same fresh seeds.

    ``carried``: the source's best, and K more. ``native``: the target's own best, there. ``moved``: the source's best,
    on the target. ``home``: the source's best, there. ``back``: the target's best, on the source. ``reference``:
    backprop on the target. ``chance``, ``examples``: of the target's validation split. Any of them may be empty.
    ``same``: both searches chose one configuration, so that the regret is 0 whatever was run.
    """

    rule: str
    source: str
    target: str
    space: str
    carried: Sequence[Carried]
    native: Sequence[Row]
    moved: Sequence[Row]
    home: Sequence[Row]
    back: Sequence[Row]
    reference: Sequence[Row]
    chance: float
    examples: int
    same: bool = False


def summarize_transfer(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Every pair, and every rule over its pairs: JSON-ready. Accuracies and regrets are shares in [0, 1].

    ``archs``: all of them, in order of appearance. ``pairs``: see `_pair`. ``rules``: see `_rule`, ranked by mean test
    regret, the least first, those without one last. ValueError for a pair that stands twice.
    """
    keys = [(pair.rule, pair.space, pair.source, pair.target) for pair in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError("a pair stands twice")
    regrets = {key: _by_seed_regrets(pair.native, pair.moved) for key, pair in zip(keys, pairs, strict=True)}
    entries = [_pair(pair, regrets[key]) for key, pair in zip(keys, pairs, strict=True)]
    groups = dict.fromkeys((pair.rule, pair.space) for pair in pairs)
    ranked = sorted((_rule(*group, entries, regrets) for group in groups), key=_place)
    for place, found in enumerate(ranked, 1):
        found["place"] = place if found["regret"]["test_acc"] else None
    for ours, theirs in pairwise(ranked):
        ours["versus_next"] = _versus_next(ours, theirs, regrets)
    return {
        "archs": list(dict.fromkeys(arch for pair in pairs for arch in (pair.source, pair.target))),
        "pairs": entries,
        "rules": ranked,
    }


def portability(summary: Mapping[str, Any], rule: str, space: str) -> dict[str, Any]:
    """One rule's matrix: ``archs``; ``native`` {arch: test accuracy}; ``regret`` {source: {target: test regret}}.

    Each is an estimate, or None where there is none; a pair that was not given is missing. ``same``: the pairs (from,
    to) in which both searches chose one configuration.
    """
    mine = [pair for pair in summary["pairs"] if (pair["rule"], pair["space"]) == (rule, space)]
    archs = [arch for arch in summary["archs"] if any(arch in (pair["source"], pair["target"]) for pair in mine)]
    native: dict[str, Any] = dict.fromkeys(archs)
    for pair in mine:
        native[pair["source"]] = native[pair["source"]] or pair["home"]["test_acc"]
        native[pair["target"]] = native[pair["target"]] or pair["native"]["test_acc"]
    regret: dict[str, dict[str, Any]] = {arch: {} for arch in archs}
    for pair in mine:
        regret[pair["source"]][pair["target"]] = pair["regret"]["test_acc"]
    same = [(pair["source"], pair["target"]) for pair in mine if pair["same"]]
    return {"archs": archs, "native": native, "regret": regret, "same": same}


def _pair(pair: Pair, regrets: Regrets) -> dict[str, Any]:
    """One pair.

    ``regret``, ``back_regret`` {val_acc, test_acc}: native − moved on the target and home − back on the source, paired
    by seed: mean, sd, n, low, high, and the ``verdict`` on the accuracy of the moved run (`MOVED`); or None.
    ``reason``: why there is no test regret. ``native``, ``moved``, ``home``, ``back``, ``reference``: see `_confirmed`.
    ``rank``: see `_rank`. ``lost``: see `_lost`. ``same``: as in `Pair`.
    """
    found: dict[str, Any] = {
        "rule": pair.rule,
        "space": pair.space,
        "source": pair.source,
        "target": pair.target,
        "same": pair.same,
        "regret": {name: _said(values, MOVED) for name, values in regrets.items()},
        "back_regret": {name: _said(values, MOVED) for name, values in _by_seed_regrets(pair.home, pair.back).items()},
    }
    found["reason"] = None if found["regret"]["test_acc"] else _reason(pair)
    for name in ("native", "moved", "home", "back", "reference"):
        found[name] = _confirmed(getattr(pair, name))
    return {**found, "rank": _rank(pair.carried), "lost": _lost(pair)}


def _by_seed_regrets(native: Iterable[Row], moved: Iterable[Row]) -> Regrets:
    ours, theirs = _measured(native), _measured(moved)
    found: Regrets = {}
    for name in ACCURACIES:
        best, carried = by_seed(ours, name), by_seed(theirs, name)
        found[name] = {seed: best[seed] - carried[seed] for seed in sorted(set(best) & set(carried))}
    return found


def _measured(rows: Iterable[Row]) -> list[Row]:
    """Those with an accuracy: a diverged run has that of guessing, a failed one none."""
    return [row for row in rows if row["status"] != "failed"]


def _said(values: Mapping[int, float], words: Mapping[str, str]) -> dict[str, Any] | None:
    """Differences by seed, as an estimate with a verdict in these words."""
    if not values:
        return None
    found = estimate([values[seed] for seed in sorted(values)])
    return {**found.to_dict(), "verdict": words[verdict(found)]}


def _reason(pair: Pair) -> str:
    if not pair.moved and not any(run.home["status"] == "finished" for run in pair.carried):
        return f"no trial finished on {pair.source}"
    if not pair.native:
        return f"no trial finished and was confirmed on {pair.target}"
    if not pair.moved:
        return f"the best of {pair.source} was not run on {pair.target}"
    for name, rows in (("native", pair.native), ("moved", pair.moved)):
        if not _measured(rows):
            return f"every {name} run on {pair.target} failed"
    return "native and moved runs have no seed in common"


def _confirmed(rows: Sequence[Row]) -> dict[str, Any]:
    """``val_acc`` and ``test_acc`` over seeds (None without any), the seeds measured, how many diverged and failed."""
    measured = _measured(rows)
    found: dict[str, Any] = {}
    for name in ACCURACIES:
        values = list(by_seed(measured, name).values())
        found[name] = estimate(values).to_dict() if values else None
    return {
        **found,
        "seeds": sorted(row["config"]["seed"] for row in measured),
        "diverged": sum(row["status"] == "diverged" for row in rows),
        "failed": sum(row["status"] == "failed" for row in rows),
    }


def _compared(carried: Iterable[Carried]) -> list[tuple[Row, Row]]:
    """Home and away of those that have an accuracy on both."""
    both = [(run.home, run.away) for run in carried if run.away is not None]
    return [(home, away) for home, away in both if "failed" not in (home["status"], away["status"])]


def _gaps(carried: Sequence[Carried]) -> dict[str, int]:
    """How many configurations have no pair of accuracies: a run ``failed``, or is still ``missing``."""
    missing = sum(run.away is None for run in carried)
    return {"failed": len(carried) - missing - len(_compared(carried)), "missing": missing}


def _rank(carried: Sequence[Carried]) -> dict[str, Any]:
    """Spearman's rho of the validation accuracies at home and away: ``rho``, ``n``, ``low``, ``high``.

    A diverged run stands at chance. ``diverged``: how many of the n did so away; ``diverged_home``: at home.
    ``points``: [home, away] of each.
    """
    both = _compared(carried)
    homes, aways = [home for home, _ in both], [away for _, away in both]
    return {
        **rank_correlation(_val_acc(homes), _val_acc(aways)).to_dict(),
        "diverged": sum(row["status"] == "diverged" for row in aways),
        "diverged_home": sum(row["status"] == "diverged" for row in homes),
        "points": [list(pair) for pair in zip(_val_acc(homes), _val_acc(aways), strict=True)],
        **_gaps(carried),
    }


def _val_acc(rows: Iterable[Row]) -> list[float]:
    return [row["metrics"]["val_acc"] for row in rows]


def _lost(pair: Pair) -> dict[str, Any]:
    """Of the top quarter at home: ``count`` of ``of`` diverged away, or fell to chance there; share, low and high.

    ``top``: ceil(n / 4) of the n with an accuracy at home, the best; of equal ones the first given. Those that have
    none away (``failed``, ``missing``) are not in ``of``, nor those at chance at home, which had ``nothing_to_lose``.
    """
    ranked = sorted(
        (run for run in pair.carried if run.home["status"] != "failed"), key=lambda run: -run.home["metrics"]["val_acc"]
    )
    top = ranked[: math.ceil(len(ranked) * TOP)]
    both, bound = _compared(top), above_chance(pair.chance, pair.examples)
    learned = [away for home, away in both if home["metrics"]["val_acc"] > bound]
    count = sum(away["status"] == "diverged" or away["metrics"]["val_acc"] <= bound for away in learned)
    return {
        **(share(count, len(learned)).to_dict() if learned else _NO_SHARE),
        "top": len(top),
        **_gaps(top),
        "nothing_to_lose": len(both) - len(learned),
    }


def _rule(rule: str, space: str, entries: Sequence[dict[str, Any]], regrets: Mapping[Any, Regrets]) -> dict[str, Any]:
    """One rule over its pairs.

    ``pairs``: how many were given. ``regret`` {val_acc, test_acc}: the mean over the ``pairs`` that have one, taken at
    every seed that all of these have, then estimated over seeds; or None. ``worst``: the pair with the greatest mean
    test regret, {source, target, regret, n}. ``rho``: {mean, pairs} over the pairs that have one. ``lost``: {share,
    count, of, pairs}, summed over pairs; the same configurations went to several targets, so that there is no interval.
    ``versus_next``: mean test regret − that of the next rule, see `_versus_next`. ``place``: from 1.
    """
    mine = [e for e in entries if (e["rule"], e["space"]) == (rule, space)]
    own = [r for key, r in regrets.items() if key[:2] == (rule, space)]
    worst = max((e for e in mine if e["regret"]["test_acc"]), key=_test_regret, default=None)
    rhos = [e["rank"]["rho"] for e in mine if e["rank"]["rho"] is not None]
    count, of = (sum(e["lost"][name] for e in mine) for name in ("count", "of"))
    return {
        "rule": rule,
        "space": space,
        "place": None,
        "pairs": len(mine),
        "regret": {name: _mean_regret([r[name] for r in own if r[name]]) for name in ACCURACIES},
        "worst": worst and {"source": worst["source"], "target": worst["target"], **worst["regret"]["test_acc"]},
        "rho": {"mean": math.fsum(rhos) / len(rhos) if rhos else None, "pairs": len(rhos)},
        "lost": {
            "share": count / of if of else None,
            "count": count,
            "of": of,
            "pairs": sum(e["lost"]["of"] > 0 for e in mine),
        },
        "versus_next": None,
    }


def _test_regret(found: Mapping[str, Any]) -> float:
    return float(found["regret"]["test_acc"]["mean"])


def _mean_regret(several: Sequence[Mapping[int, float]]) -> dict[str, Any] | None:
    found = _said(mean_by_seed(several), MOVED)
    return found and {**found, "pairs": len(several)}


def _place(found: Mapping[str, Any]) -> tuple[bool, float, str, str]:
    known = found["regret"]["test_acc"] is not None
    return not known, _test_regret(found) if known else 0.0, found["rule"], found["space"]


def _versus_next(ours: Mapping[str, Any], theirs: Mapping[str, Any], regrets: Mapping[Any, Regrets]) -> Any:
    """The difference of two rules' mean test regrets over the ``pairs`` that both have, paired by seed; or None."""
    sides = [
        {key[2:]: r["test_acc"] for key, r in regrets.items() if key[:2] == (e["rule"], e["space"]) and r["test_acc"]}
        for e in (ours, theirs)
    ]
    common = [key for key in sides[0] if key in sides[1]]
    found = versus(*(mean_by_seed([side[key] for key in common]) for side in sides))
    return found and {**found, "pairs": len(common), "verdict": REGRETS[found["verdict"]]}


# --- its numbers in MLflow


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """Regrets, rank correlations and lost shares, by pair."""
    found = {}
    for pair in summary["pairs"]:
        where = f"{pair['rule']} {pair['space']}/{pair['source']} to {pair['target']}"
        for metric, regret in pair["regret"].items():
            if regret:
                found[f"{where}/regret_{metric}"] = regret["mean"]
        if pair["rank"]["rho"] is not None:
            found[f"{where}/rank_correlation"] = pair["rank"]["rho"]
        if pair["lost"]["of"]:
            found[f"{where}/lost_share"] = pair["lost"]["share"]
    return found
