"""What `bench.robustness_summary` found, in words: tables of a site, and one sentence per comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.cells import NOTHING, interval, margin, pairs

#: To be said under the tables of this module.
CAPTION = "± is the half-width of the 95 % interval"
#: What stands in the place of a curve where there is none by design.
NO_NOISE = "no noise"
#: Under two verdicts or more.
SEVERAL = (
    "each verdict is one 95 % interval by itself: of 20 comparisons without a difference, one would say otherwise."
)


def title(curve: str, summary: Mapping[str, Any]) -> str:
    """The heading of a table or a figure."""
    return f"{curve}: {summary['arch']}, {summary['dataset']} ({summary['epochs']} epochs)"


def note(summary: Mapping[str, Any], site: Mapping[str, Any]) -> str:
    """What the numbers of this site are from, and what their ± is."""
    return f"{origin(summary, site)}; {CAPTION}" if len(summary["seeds"]) > 1 else origin(summary, site)


def origin(summary: Mapping[str, Any], site: Mapping[str, Any]) -> str:
    """What the numbers of this site are from."""
    n, counts = len(summary["seeds"]), site["counts"]
    over = f"mean over {n} seeds" if n > 1 else "one seed, and so without an interval"
    attacked = " without the attack and at 0 under it" if site["floor"] < site["chance"] else ""
    lost = f"{counts['diverged']} of {counts['runs']} runs diverged and count at chance{attacked}"
    failed = f"; {counts['failed']} failed, and have no accuracy" if counts["failed"] else ""
    return (
        f"{over}; accuracy on {site['tested']} test examples; nothing was chosen by it; "
        f"{lost}{failed}{'' if summary['complete'] else '; not all is measured yet'}"
    )


def table_columns(site: Mapping[str, Any]) -> tuple[str, ...]:
    """The headings of `table_rows`."""
    difference = f"relative area − {site['reference']} [95 %]"
    return ("rule", "clean %", "area %", "relative area", f"{site['symbol']}½", "n", difference)


def table_rows(site: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per rule of this site; n counts the whole curves, and what is missing from it is named."""
    return [_cells(site, found) for found in site["rules"]]


def curve_columns(site: Mapping[str, Any]) -> tuple[str, ...]:
    """The headings of `curve_rows`."""
    return (site["symbol"], *(found["rule"] for found in site["rules"]))


def curve_rows(site: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per level, the clean one first: accuracy in %, and how many runs are diverged or missing."""
    rows = [("0", *(margin(found["clean"], 100, 2) for found in site["rules"]))]
    for i, level in enumerate(site["levels"]):
        cells = (NO_NOISE if found["unaffected"] else _curve_cell(found["curve"][i]) for found in site["rules"])
        rows.append((f"{level:g}", *cells))
    return rows


def draws_line(site: Mapping[str, Any]) -> str | None:
    """Under the table of curves: over how many draws of the noise an accuracy is a mean; None where it is of one."""
    levels = [level for found in site["rules"] for level in found["curve"] if level["draws"]]
    draws = sorted({level["draws"] for level in levels})
    if not draws or draws[-1] == 1:
        return None
    number = f"{draws[0]}" if len(draws) == 1 else f"{draws[0]} to {draws[-1]}"
    said = f"averaged over {number} draws a network"
    errors = [level["draw_se"] for level in levels if level["draw_se"] is not None]
    if not errors:
        return said
    return f"{said}; their standard error is at most {100 * max(errors):.2f} points (root mean square over seeds)"


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per site and rule but the reference, and warnings of masked gradients.

    Each claims what its own 95 % interval allows, and no more; the last line says so where there are several.
    """
    lines = [line for site in summary["sites"] for line in _lines(site)]
    said = [
        found["verdict"] or found["versus_true"]
        for site in summary["sites"]
        for found in site["rules"]
        if found["rule"] != site["reference"]
    ]
    return [*lines, SEVERAL] if sum(map(bool, said)) > 1 else lines


def _lines(site: Mapping[str, Any]) -> list[str]:
    reference = _reference(site)
    others = [found for found in site["rules"] if found is not reference]
    if others and reference and reference["unaffected"]:
        return [_spared(site, reference)]
    weaker = [found for found in site["rules"] if (found["versus_pgd"] or {}).get("verdict") == "worse"]
    return [*(_sentence(site, found) for found in others), *(_masked(site, found) for found in weaker)]


def _reference(site: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((found for found in site["rules"] if found["rule"] == site["reference"]), None)


def _cells(site: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    whole = len(found["seeds"]) - found["incomplete"]
    survivors = f" ({whole - found['at_chance']} of {whole} learned)" if found["at_chance"] else ""
    relative = margin(found["relative_area"], 1, 3)
    return (
        found["rule"],
        margin(found["clean"], 100, 2),
        NO_NOISE if found["unaffected"] else margin(found["area"], 100, 2),
        f"{relative}{survivors}" if found["relative_area"] else relative,
        _half(found["half_level"], site["levels"]),
        ", ".join([str(whole), *_lost(found)]),
        _difference(found),
    )


def _lost(found: Mapping[str, Any]) -> list[str]:
    counts = {
        "diverged": found["diverged"],
        "failed": found["failed"],
        "incomplete": found["incomplete"] - found["failed"],
        "at chance": found["at_chance"],
    }
    return [f"{count} {name}" for name, count in counts.items() if count]


def _half(value: Mapping[str, Any] | None, levels: Sequence[float]) -> str:
    if value is None:
        return NOTHING
    last = levels[-1]
    if value["mean"] is not None:
        ends = "" if value["low"] is None else f" [{value['low']:.3g}, {value['high']:.3g}]"
        return f"{value['mean']:.3g}{ends}"
    middle = f"> {value['median_above']:.3g}" if value["median"] is None else f"{value['median']:.3g}"
    beyond = f" ({value['beyond']} of {value['n']} beyond {last:g})" if 0 < value["beyond"] < value["n"] else ""
    return f"median {middle}{beyond}" if value["beyond"] < value["n"] else f"> {last:g}"


def _difference(found: Mapping[str, Any]) -> str:
    versus = found["relative_area_versus"]
    if versus is None:
        return NOTHING
    return f"{interval(versus, 1, 3)} {found['verdict']}{pairs(versus, len(found['seeds']))}"


def _curve_cell(level: Mapping[str, Any]) -> str:
    lost = [f"{level[name]} {name}" for name in ("diverged", "failed") if level[name]]
    return ", ".join([margin(level["acc"], 100, 2), *lost])


def _sentence(site: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if site["true_site"]:
        return _masking(site, found)
    if found["unaffected"]:
        return _spared(site, found)
    start = f"{site['site']}: {found['rule']} is"
    versus, lost = found["relative_area_versus"], _losses(found)
    if versus is None:
        return f"{start} not compared with {site['reference']}: {_why_not(site, found)}{lost}."
    said = {"not distinguishable": f"not distinguishable from {site['reference']} at this n"}
    verdict = said.get(found["verdict"], f"{found['verdict']} than {site['reference']}")
    return f"{start} {verdict} (relative area {interval(versus, 1, 3)}, n = {versus['n']}){_clean(site, found)}{lost}."


def _losses(found: Mapping[str, Any]) -> str:
    return f" ({', '.join(_lost(found))})" if _lost(found) else ""


def _spared(site: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    return f"{site['site']}: {found['rule']} has no noise here: not compared."


def _masking(site: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """An attack by another gradient than the network's own says how far that one misleads the attacker, no more."""
    versus, lost = found["versus_true"], _losses(found)
    if versus is None:
        return f"{site['site']}: {found['rule']} has no verdict: this gradient is not the network's own{lost}."
    if versus["mean"] == 0 == (versus["sd"] or 0):  # a rule whose B is W
        return f"{site['site']}: accuracy of {found['rule']} is the same as under the true gradient{lost}."
    attack, meaning = {
        "better": ("this weaker attack", "that much is masking, not robustness"),
        "worse": ("this attack", "the true gradient is masked, and not the strongest attack here"),
        "not distinguishable": ("this attack", "not distinguishable at this n"),
    }[versus["verdict"]]
    return (
        f"{site['site']}: accuracy of {found['rule']} under {attack} is {_points_interval(versus)} "
        f"than under the true gradient (area; n = {versus['n']}): {meaning}{lost}."
    )


def _masked(site: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    versus = found["versus_pgd"]
    return (
        f"{site['site']}: accuracy of {found['rule']} is {_points_interval(versus)} than under pgd "
        f"(area; n = {versus['n']}): square, which needs no gradient, does more than pgd: pgd is masked there."
    )


def _clean(site: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Where it started from, and warnings: that it had less to lose, that it kept less although it lost less."""
    compared, area = found["compared"], found["area_versus"]
    ours, theirs = (100 * compared[side]["mean"] for side in ("clean", "reference_clean"))
    said = f", from a clean accuracy of {ours:.1f} % against {theirs:.1f} %"
    warnings = []
    if compared["clean_versus"]["verdict"] != "not distinguishable":
        warnings.append(f"its clean accuracy is {_points(compared['clean_versus'])}")
    against = {"more robust": -1, "less robust": 1}.get(found["verdict"], 0)
    if against * area["mean"] > 0:
        noise = "under attack" if site["floor"] < site["chance"] else "under noise"
        sure = ", not distinguishably" if area["verdict"] == "not distinguishable" else ""
        warnings.append(f"its mean accuracy {noise} is {_points(area)}{sure}")
    return f"{said}; {', and '.join(warnings)}" if warnings else said


def _points(versus: Mapping[str, Any]) -> str:
    side = "lower" if versus["mean"] < 0 else "higher"
    return f"{side} by {abs(versus['mean']) * 100:.1f} points"


def _points_interval(versus: Mapping[str, Any]) -> str:
    if versus["low"] is None:
        return _points(versus)
    ends = sorted(100 * versus[end] * (-1 if versus["mean"] < 0 else 1) for end in ("low", "high"))
    return f"{_points(versus)} [{ends[0]:.1f}, {ends[1]:.1f}]"


def _why_not(site: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    reference = _reference(site)
    if reference is None:
        return f"{site['reference']} was not measured here"
    if len(site["levels"]) < 2:
        return "one level alone has no area"
    sides = (found, reference)
    for side in sides:
        if side["area"] is None:
            return f"no seed of {side['rule']} has an accuracy at every level"
    if nothing := [side for side in sides if side["at_chance"]]:
        return " and ".join(_survivors(side) for side in nothing)
    return "they have no seed in common"


def _survivors(found: Mapping[str, Any]) -> str:
    """A mean over those that learned is not one of the rule: which they are was decided by the outcome."""
    whole, relative = len(found["seeds"]) - found["incomplete"], found["relative_area"]
    rest = f" (relative area {margin(relative, 1, 3)} over the {relative['n']} that learned)" if relative else ""
    return f"{found['at_chance']} of {whole} networks of {found['rule']} learned nothing{rest}"
