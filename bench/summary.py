"""From rows to what a search found: the confirmed configurations beside their controls, with n, spread and interval."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.cells import NOTHING, difference, spread
from bench.choices import OBJECTIVES
from bench.config import StudyConfig, TrialConfig
from bench.front import pareto_front
from bench.provenance import code_of
from bench.rows import Row
from bench.space import UPDATE_FIELDS
from bench.spaces import DEFAULT, space_of
from bench.statistics import estimate, versus

#: How B is updated, and what is not worth a word in a table.
UPDATES = {name: getattr(TrialConfig, name) for name in UPDATE_FIELDS if name != "lr"}

#: What of a run is estimated over seeds, and what of it is compared with the reference.
ESTIMATED = (
    *("val_acc", "val_area", "test_acc", "test_top5", "test_area"),
    *("angle", "floor_angle", "dx_angle", "train_seconds"),
)
COMPARED = ("val_acc", "test_acc", "test_area")

#: What a search for robustness measures, as its recipe says.
NOISE = ("noise_site", "noise_levels", "noise_draws")

#: The control that every rule is compared with.
REFERENCE = "backprop"


def by_configuration(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows grouped by their configuration but for the seed, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = repr(sorted((k, repr(v)) for k, v in row["config"].items() if k != "seed"))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def same_setting(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs have one rule, and the same coefficients and update of B, on whatever network.

    On one network they also have the same learning rate of W, which may have been searched; each network has its own.
    """
    ours, theirs = row["config"], other["config"]
    lr = ("lr",) if ours.get("arch") == theirs.get("arch") else ()
    return all(ours.get(name) == theirs.get(name) for name in ("rule", "coefficients", *UPDATES, *lr))


def updates_of(config: Mapping[str, Any], *, tuned: bool = False) -> dict[str, float]:
    """How B is updated, where that is unusual, and the learning rate of W if that was ``tuned``."""
    found = {name: config[name] for name, usual in UPDATES.items() if config.get(name, usual) != usual}
    return {**found, "lr": config["lr"]} if tuned else found


def lr_is_searched(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the trials of one search differ in the learning rate of W."""
    return len({row["config"]["lr"] for row in rows}) > 1


def best_trial(rows: Iterable[Mapping[str, Any]]) -> Row | None:
    """The search's best: of its finished trials that of the highest validation accuracy; of equals, the earlier."""
    finished = [row for row in rows if row["kind"] == "search" and row["status"] == "finished"]
    ranked = sorted(finished, key=lambda row: (-row["metrics"]["val_acc"], row["uid"]))
    return dict(ranked[0]) if ranked else None


def entry(rows: Sequence[Row], reference: Sequence[Row]) -> dict[str, Any]:
    """One configuration over its seeds: estimates of each metric, and its paired difference to the reference.

    A diverged run counts at chance (its row says so); a failed one has no accuracy, is left out of the
    means, and is counted.
    """
    config = rows[0]["config"]
    measured = [row for row in rows if row["status"] != "failed"]
    found: dict[str, Any] = {
        "config": {name: value for name, value in config.items() if name != "seed"},
        "rule": config["rule"],
        "coefficients": config["coefficients"],
        "seeds": [row["config"]["seed"] for row in measured],
        "diverged": sum(row["status"] == "diverged" for row in rows),
        "failed": sum(row["status"] == "failed" for row in rows),
    }
    for name in ESTIMATED:
        values = [row["metrics"][name] for row in measured if name in row["metrics"]]
        found[name] = estimate(values).to_dict() if values else None
    for name in COMPARED:
        found[f"{name}_versus_{REFERENCE}"] = versus(by_seed(measured, name), by_seed(reference, name))
    return found


def summarize(
    config: StudyConfig, searched: Sequence[Row], confirmed: Sequence[Row], controls: Sequence[Row]
) -> dict[str, Any]:
    """What `bench search` prints and records. The best confirmed configuration, by validation mean, is the first.

    With two objectives ``front`` says of each whether it is on the Pareto front of the confirmed means (validation);
    the order is by accuracy. ``budget``: trials, those to come too. ``complete``: all of them, and the best confirmed.
    ``code``: as `codes` has it.
    """
    reference = [row for row in (*controls, *confirmed) if row["config"]["rule"] == REFERENCE]
    tuned = "lr" in config.space or lr_is_searched(searched)
    entries = [
        {**entry(rows, reference), "updates": updates_of(rows[0]["config"], tuned=tuned)}
        for rows in by_configuration(confirmed)
    ]
    objectives = OBJECTIVES[config.objective].metrics
    entries.sort(key=lambda e: -(e[objectives[0]] or {"mean": -1.0})["mean"])
    if len(objectives) > 1:
        _mark_front(entries, objectives)
    status = [row["status"] for row in searched]
    budget = max(config.trials if config.space else 1, len(searched))
    return {
        "study": config.name,
        "rule": config.rule,
        "arch": config.arch,
        "dataset": config.dataset,
        "trials": {name: status.count(name) for name in ("finished", "stopped", "diverged", "failed")},
        "budget": budget,
        "complete": len(searched) >= budget and _is_confirmed(config, searched, confirmed),
        "epochs": config.epochs,
        "objective": config.objective,
        "noise": {name: config.recipe[name] for name in NOISE if name in config.recipe},
        **{f"search_best_{name}": _best(searched, name) for name in dict.fromkeys(("val_acc", *objectives))},
        "confirmed": entries,
        "controls": [entry(rows, reference) for rows in by_configuration(controls)],
        "code": codes((*searched, *confirmed, *controls)),
    }


def codes(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What these runs were made with (`bench.provenance.code_of`), and how many with each; the most first."""
    counts = Counter(json.dumps(code_of(row["provenance"]), sort_keys=True) for row in rows)
    return [{**json.loads(code), "runs": n} for code, n in sorted(counts.items(), key=lambda c: (-c[1], c[0]))]


def _is_confirmed(config: StudyConfig, searched: Sequence[Row], confirmed: Sequence[Row]) -> bool:
    """Whether the best trial, if any finished, has all of its fresh seeds."""
    best = best_trial(searched)
    ended = [row for row in confirmed if row["status"] != "failed" and best is not None and same_setting(row, best)]
    return best is None or len({row["config"]["seed"] for row in ended}) >= config.confirm_seeds


def space_words(config: Mapping[str, Any]) -> str:
    """The kind of search space that a run is of, where it is not the default one."""
    space = space_of(config)
    return "" if space == DEFAULT else space


def budget_words(summary: Mapping[str, Any]) -> str:
    """Trials × epochs; of a search under way also how many trials it has by now."""
    ran = sum(summary["trials"].values())
    so_far = "" if ran >= summary["budget"] else f"{ran} of "
    return f"{so_far}{summary['budget']} trials × {summary['epochs']} epochs"


def _best(searched: Iterable[Row], name: str) -> float | None:
    """The highest that a trial reached which had its full budget."""
    return max((row["metrics"][name] for row in searched if row["status"] == "finished"), default=None)


def _mark_front(entries: Sequence[dict[str, Any]], objectives: Sequence[str]) -> None:
    measured = [e for e in entries if all(e[name] for name in objectives)]
    front = pareto_front([(e[objectives[0]]["mean"], e[objectives[1]]["mean"]) for e in measured])
    for place, e in enumerate(measured):
        e["front"] = place in front


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The study's own numbers, for its parent run in MLflow."""
    found = {f"trials_{name}": float(count) for name, count in summary["trials"].items()}
    for name in ("search_best_val_acc", "search_best_val_area"):
        if summary.get(name) is not None:
            found[name] = summary[name]
    if summary["objective"] == "both":
        found["front_size"] = float(sum(e.get("front", False) for e in summary["confirmed"]))
    if summary["confirmed"]:
        best = summary["confirmed"][0]
        for name in ("val_acc", "val_area", "test_acc", "test_area", "angle", "floor_angle", "dx_angle"):
            if best[name]:
                found[name] = best[name]["mean"]
                found[f"{name}_n"] = float(best[name]["n"])
                if best[name]["sd"] is not None:
                    found[f"{name}_sd"] = best[name]["sd"]
        for name in ("test_acc", "test_area"):
            if best[f"{name}_versus_{REFERENCE}"]:
                found[f"{name}_versus_{REFERENCE}"] = best[f"{name}_versus_{REFERENCE}"]["mean"]
    return found


COLUMNS = (
    *("rule", "coefficients", "val %", "test %", "n"),
    *("angle °", "dx angle °", "seconds", f"test − {REFERENCE}, points [95 %]"),
)
#: What the floor of an angle is (`bench.evaluators.alignment.floor_alignment`).
FLOOR = "the angle at which B settles, whatever the coefficients and rates"
#: Further columns of a search for robustness: areas, in % of accuracy.
AREA_COLUMNS = ("val area", "test area", f"test area − {REFERENCE}, points [95 %]")


def columns(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The headings of `table_rows`."""
    floor = bool(floor_words(summary))
    front = ("front",) if summary["objective"] == "both" else ()
    areas = AREA_COLUMNS + front if summary["objective"] != "accuracy" else ()
    return (*(f"{name} (floor)" if floor and name == "angle °" else name for name in COLUMNS), *areas)


def floor_words(summary: Mapping[str, Any]) -> str:
    """What a floor is, where a configuration has one."""
    found = any(e["floor_angle"] for e in (*summary["confirmed"], *summary["controls"]))
    return f"floor: {FLOOR}" if found else ""


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table: the confirmed configurations, then the controls."""
    entries = (*summary["confirmed"], *summary["controls"])
    cells = [_cells(e) for e in entries]
    if summary["objective"] != "accuracy":
        cells = [(*row, *_area_cells(e)) for row, e in zip(cells, entries, strict=True)]
    if summary["objective"] == "both":
        cells = [(*row, "●" if e.get("front") else "") for row, e in zip(cells, entries, strict=True)]
    return cells


def _cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    coefficients = [f"{name} {value:.2e}" for name, value in found["coefficients"].items()]
    updates = found.get("updates", updates_of(found["config"]))
    coefficients += [f"{name} {value:.2g}" for name, value in updates.items()]
    lost = [f"{found[name]} {name}" for name in ("diverged", "failed") if found[name]]
    return (
        found["rule"],
        ", ".join(coefficients) or NOTHING,
        spread(found["val_acc"], 100),
        spread(found["test_acc"], 100),
        ", ".join([str(len(found["seeds"])), *lost]),
        spread(found["angle"], 1) + (f" ({found['floor_angle']['mean']:.2f})" if found["floor_angle"] else ""),
        spread(found["dx_angle"], 1),
        spread(found["train_seconds"], 1),
        _versus_cell(found, "test_acc"),
    )


def _area_cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    return spread(found["val_area"], 100), spread(found["test_area"], 100), _versus_cell(found, "test_area")


def _versus_cell(found: Mapping[str, Any], name: str) -> str:
    return (
        NOTHING if found["rule"] == REFERENCE else difference(found[f"{name}_versus_{REFERENCE}"], len(found["seeds"]))
    )


def by_seed(rows: Iterable[Row], metric: str) -> dict[int, float]:
    """One metric of the runs that have it, by seed."""
    return {row["config"]["seed"]: row["metrics"][metric] for row in rows if metric in row["metrics"]}
