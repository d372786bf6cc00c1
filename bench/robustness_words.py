"""What `bench.robustness_summary` found, in words: tables of a site, and one sentence per comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Under every table of this module.
CAPTION = "± is the half-width of the 95 % interval over seeds; a run that diverged counts at chance."


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
    rows = [("0", *(_spread(found["clean"], 100, 2) for found in site["rules"]))]
    for i, level in enumerate(site["levels"]):
        rows.append((f"{level:g}", *(_curve_cell(found["curve"][i]) for found in site["rules"])))
    return rows


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per site and rule but the reference. Each claims what its own 95 % interval allows, and no more."""
    return [
        _sentence(site, found)
        for site in summary["sites"]
        for found in site["rules"]
        if found["rule"] != site["reference"]
    ]


def _cells(site: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        found["rule"],
        _spread(found["clean"], 100, 2),
        _spread(found["area"], 100, 2),
        _spread(found["relative_area"], 1, 3),
        _half(found["half_level"], site["levels"]),
        ", ".join([str(len(found["seeds"]) - found["incomplete"]), *_lost(found)]),
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


def _spread(value: Mapping[str, Any] | None, scale: float, digits: int) -> str:
    if value is None:
        return "–"
    half = "" if value["high"] is None else f" ± {(value['high'] - value['mean']) * scale:.{digits}f}"
    return f"{value['mean'] * scale:.{digits}f}{half}"


def _half(value: Mapping[str, Any] | None, levels: Sequence[float]) -> str:
    if value is None:
        return "–"
    last = levels[-1]
    if value["mean"] is not None:
        interval = "" if value["low"] is None else f" [{value['low']:.3g}, {value['high']:.3g}]"
        return f"{value['mean']:.3g}{interval}"
    middle = f"> {last:g}" if value["median"] is None else f"{value['median']:.3g}"
    beyond = f" ({value['beyond']} of {value['n']} beyond {last:g})" if 0 < value["beyond"] < value["n"] else ""
    return f"median {middle}{beyond}" if value["beyond"] < value["n"] else middle


def _difference(found: Mapping[str, Any]) -> str:
    versus = found["relative_area_versus"]
    if versus is None:
        return "–"
    pairs = "" if versus["n"] == len(found["seeds"]) else f" (n {versus['n']})"
    return f"{_interval(versus)} {found['verdict']}{pairs}"


def _interval(value: Mapping[str, Any]) -> str:
    interval = "" if value["low"] is None else f" [{value['low']:+.3f}, {value['high']:+.3f}]"
    return f"{value['mean']:+.3f}{interval}"


def _curve_cell(level: Mapping[str, Any]) -> str:
    lost = [f"{level[name]} {name}" for name in ("diverged", "failed") if level[name]]
    return ", ".join([_spread(level["acc"], 100, 2), *lost])


def _sentence(site: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    start = f"{site['site']}: {found['rule']} is"
    versus = found["relative_area_versus"]
    lost = f" ({', '.join(_lost(found))})" if _lost(found) else ""
    if versus is None:
        return f"{start} not compared with {site['reference']}: {_why_not(site, found)}{lost}."
    said = {"not distinguishable": f"not distinguishable from {site['reference']} at this n"}
    verdict = said.get(found["verdict"], f"{found['verdict']} than {site['reference']}")
    return f"{start} {verdict} (relative area {_interval(versus)}, n = {versus['n']}){_clean(site, found)}{lost}."


def _clean(site: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Where it started from, and warnings: that it had less to lose, that it kept less although it lost less."""
    reference = next(other for other in site["rules"] if other["rule"] == site["reference"])
    versus = found["clean_versus"]
    ours, theirs = (100 * each["clean"]["mean"] for each in (found, reference))
    start = f", from a clean accuracy of {ours:.1f} % against {theirs:.1f} %"
    if versus["verdict"] == "not distinguishable":
        return start
    start += f"; its clean accuracy is {_points(versus)}"
    against = {"more robust": "worse", "less robust": "better"}.get(found["verdict"])
    if found["area_versus"]["verdict"] == against:
        start += f", and its mean accuracy under noise is {_points(found['area_versus'])}"
    return start


def _points(versus: Mapping[str, Any]) -> str:
    side = "lower" if versus["mean"] < 0 else "higher"
    return f"{side} by {abs(versus['mean']) * 100:.1f} points"


def _why_not(site: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    reference = next((other for other in site["rules"] if other["rule"] == site["reference"]), None)
    if reference is None:
        return f"{site['reference']} was not measured here"
    if len(site["levels"]) < 2:
        return "one level alone has no area"
    for side in (found, reference):
        if side["area"] is None:
            return f"no seed of {side['rule']} has an accuracy at every level"
        if side["relative_area"] is None:
            return f"{side['rule']} is at chance without noise, and has nothing to lose"
    return "they have no seed in common"
