"""From the rows of a measurement of robustness to the points of its curves, and to its summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.config import TrialConfig
from bench.evaluators.adversarial import ATTACKS
from bench.learning.rules import parse_rule
from bench.noise import SITES
from bench.reading import data_of, read_config, read_rows
from bench.robustness_plan import REFERENCE, RobustnessConfig
from bench.robustness_summary import THROUGH_B, Point, summarize
from bench.rows import Data, Row, last_attempts

#: What became of a training after which there is no network: it stands for all of its evaluations.
ENDS = ("diverged", "failed")


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of all that was measured under this name, whatever the last command asked for."""
    config = RobustnessConfig.from_dict(read_config(folder / "robustness.yaml"))
    for values in config.rules.values():
        TrialConfig.from_dict(values)
    rows = last_attempts(read_rows(folder / "rows.jsonl"))
    return summarize_robustness(config, rows, data_of(rows, folder))


def summarize_robustness(config: RobustnessConfig, rows: Sequence[Row], data: Data) -> dict[str, Any]:
    """The curves and verdicts of `bench.robustness_summary`, and what they are of.

    ``rows``: one for each run, of several attempts the last. ``other_levels``: how many of them are at levels that the
    last command did not ask for, and so in no number here.
    """
    first, seeds = rows[0]["config"] if rows else next(iter(config.rules.values())), _seeds(rows)
    points = points_of(config, rows)
    curves = _attack_curves(config, rows)
    still = {"update": [rule for rule in config.rules if config.unaffected(rule)]}
    tested, symbols = data.examples["test"], dict.fromkeys(curves, "ε")
    noise, hits = [p for p in points if p.site not in curves], [p for p in points if p.site in curves]
    found = summarize(noise, chance=data.chance, tested=tested, reference=REFERENCE, unaffected=still)
    attacked = min(config.attacked, tested)
    under = summarize(hits, chance=data.chance, tested=attacked, floor=0.0, reference=REFERENCE, symbols=symbols)
    here = [row for row in rows if _asked_for(config, row)]
    status = [row["status"] for row in here]
    return {
        "study": config.name,
        "arch": first["arch"],
        "dataset": first["dataset"],
        "epochs": first["epochs"],
        "seeds": seeds,
        "complete": _is_whole(config, rows),
        "runs": {name: status.count(name) for name in ("finished", "diverged", "failed")},
        "other_levels": len(rows) - len(here),
        "coefficients": {rule: values.get("coefficients", {}) for rule, values in config.rules.items()},
        **found,
        "sites": [{**site, "unit": unit_of(site["site"])} for site in (*found["sites"], *under["sites"])],
    }


def unit_of(curve: str) -> str:
    """What the levels of this curve are in."""
    site = curve.removesuffix(THROUGH_B)
    return SITES[site].unit if site in SITES else ATTACKS[site].unit


def points_of(config: RobustnessConfig, rows: Sequence[Row]) -> list[Point]:
    """One point for each curve, rule, seed and level that these rows know; of the plan's sites, for the plan's levels.

    Trainings with noise in their updates are points of the curve ``update``, and those without are its level 0.
    Evaluations are points of their site's curve, or of the one through B. A network that diverged, or failed, stands at
    each level of every curve.
    """
    rows = [row for row in rows if _asked_for(config, row)]
    return [*_update_points(config, rows), *_probe_points(config, rows)]


def _is_whole(config: RobustnessConfig, rows: Sequence[Row]) -> bool:
    """Whether these rows are all that was asked for: every rule, seed, curve and level, and no failure among them."""
    given = any("file" in row["evaluation"] for row in rows)
    seeds = _seeds(rows) if given else range(config.first_seed, config.first_seed + config.seeds)
    gradients = _gradients(config, rows)
    wanted = {
        (curve, rule, seed, level)
        for site, levels in config.levels.items()
        for curve in _curves_of(site, gradients)
        for rule in config.rules
        for seed in seeds
        for level in (0.0, *(() if site == "update" and config.unaffected(rule) else levels))
    }
    points = points_of(config, rows)
    return len(seeds) >= config.seeds and wanted <= {
        (p.site, p.rule, p.seed, p.level) for p in points if p.status != "failed"
    }


def _asked_for(config: RobustnessConfig, row: Mapping[str, Any]) -> bool:
    """Not at a level that the last command's grid does not have: a curve is of one grid."""
    done = row["evaluation"] or {"site": "update", "level": row["config"].get("update_noise", 0.0)}
    levels = config.levels.get(done["site"])
    return not done["level"] or levels is None or done["level"] in levels


def _seeds(rows: Iterable[Row]) -> list[int]:
    return sorted({row["config"]["seed"] for row in rows})


def _update_points(config: RobustnessConfig, rows: Iterable[Row]) -> Iterator[Point]:
    trainings = [row for row in rows if not row["evaluation"]]
    if "update" in config.levels or any(row["config"].get("update_noise") for row in trainings):
        yield from (_point("update", row, row["config"].get("update_noise", 0.0)) for row in trainings)


def _probe_points(config: RobustnessConfig, rows: Sequence[Row]) -> Iterator[Point]:
    levels, gradients = _levels(config, rows), _gradients(config, rows)
    gone = [row for row in rows if not row["evaluation"] and not row["config"].get("update_noise")]
    gone = [row for row in gone if row["status"] in ENDS]
    dead = {(row["config"]["rule"], row["config"]["seed"]) for row in gone}
    for row in rows:
        if row["evaluation"] and (row["config"]["rule"], row["config"]["seed"]) not in dead:
            for curve in _curves(row, gradients):
                yield _point(curve, row, row["evaluation"]["level"])
    for row in gone:
        for site, found in levels.items():
            for curve in _curves_of(site, gradients):
                yield from (_point(curve, row, level) for level in (0.0, *found))


def _levels(config: RobustnessConfig, rows: Iterable[Row]) -> dict[str, list[float]]:
    """The levels above 0 of every site that evaluations are of: the plan's, and those of earlier commands."""
    found = {site: set(levels) for site, levels in config.levels.items() if site != "update"}
    for row in rows:
        if row["evaluation"]:
            found.setdefault(row["evaluation"]["site"], set()).add(row["evaluation"]["level"])
    return {site: sorted(levels - {0.0}) for site, levels in found.items()}


def _gradients(config: RobustnessConfig, rows: Iterable[Row]) -> tuple[str, ...]:
    """By which the attacks went that can go by either."""
    known = (row["evaluation"] for row in rows if row["evaluation"] and row["evaluation"]["site"] in ATTACKS)
    by = {e["gradient"] for e in known if ATTACKS[e["site"]].uses_gradient}
    return tuple(name for name in ("true", "feedback") if name in (*config.gradients, *by))


def _curves_of(site: str, gradients: Sequence[str]) -> tuple[str, ...]:
    """The curves of a site, or of an attack by these gradients."""
    if site not in ATTACKS or not ATTACKS[site].uses_gradient:
        return (site,)
    return tuple({"true": site, "feedback": f"{site}{THROUGH_B}"}[name] for name in gradients)


def _curves(row: Mapping[str, Any], gradients: Sequence[str]) -> tuple[str, ...]:
    """The curves that an evaluation is a point of: where B is W, one attack is a point of both."""
    site = row["evaluation"]["site"]
    if site not in ATTACKS or not ATTACKS[site].uses_gradient:
        return (site,)
    same = parse_rule(row["config"]["rule"]).feedback == "weight"
    return _curves_of(site, gradients if same else (row["evaluation"]["gradient"],))


def _attack_curves(config: RobustnessConfig, rows: Sequence[Row]) -> set[str]:
    gradients = _gradients(config, rows)
    return {curve for site in _levels(config, rows) if site in ATTACKS for curve in _curves_of(site, gradients)}


def _point(curve: str, row: Mapping[str, Any], level: float) -> Point:
    metrics = row["metrics"]
    return Point(
        site=curve,
        rule=row["config"]["rule"],
        seed=row["config"]["seed"],
        level=level,
        accuracy=metrics.get("test_acc"),
        status=row["status"],
        se=metrics.get("test_acc_se"),
        draws=int(metrics.get("draws", 1)),
    )
