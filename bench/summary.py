"""From rows to what a search found: the confirmed configurations beside their controls, with n, spread and interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.config import StudyConfig, TrialConfig
from bench.rows import Row
from bench.statistics import Estimate, estimate, paired_difference, verdict

#: How B is updated, and what is not worth a word in a table.
UPDATES = {
    name: getattr(TrialConfig, name) for name in ("feedback_lr_factor", "feedback_every", "feedback_warmup_epochs")
}

#: The control that every rule is compared with.
REFERENCE = "backprop"


def by_configuration(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows grouped by their configuration but for the seed, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = repr(sorted((k, repr(v)) for k, v in row["config"].items() if k != "seed"))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


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
    for name in ("val_acc", "test_acc", "test_top5", "angle", "dx_angle", "train_seconds"):
        values = [row["metrics"][name] for row in measured if name in row["metrics"]]
        found[name] = estimate(values).to_dict() if values else None
    for name in ("val_acc", "test_acc"):
        found[f"{name}_versus_{REFERENCE}"] = _versus(_by_seed(measured, name), _by_seed(reference, name))
    return found


def summarize(
    config: StudyConfig, searched: Sequence[Row], confirmed: Sequence[Row], controls: Sequence[Row]
) -> dict[str, Any]:
    """What `bench search` prints and records. The best confirmed configuration, by validation mean, is the first."""
    reference = [row for row in (*controls, *confirmed) if row["config"]["rule"] == REFERENCE]
    entries = [entry(rows, reference) for rows in by_configuration(confirmed)]
    entries.sort(key=lambda e: -(e["val_acc"] or {"mean": -1.0})["mean"])
    status = [row["status"] for row in searched]
    return {
        "study": config.name,
        "rule": config.rule,
        "arch": config.arch,
        "dataset": config.dataset,
        "trials": {name: status.count(name) for name in ("finished", "stopped", "diverged", "failed")},
        "epochs": config.epochs,
        "search_best_val_acc": max(
            (r["metrics"]["val_acc"] for r in searched if r["status"] == "finished"), default=None
        ),
        "confirmed": entries,
        "controls": [entry(rows, reference) for rows in by_configuration(controls)],
    }


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The study's own numbers, for its parent run in MLflow."""
    found = {f"trials_{name}": float(count) for name, count in summary["trials"].items()}
    if summary["search_best_val_acc"] is not None:
        found["search_best_val_acc"] = summary["search_best_val_acc"]
    if summary["confirmed"]:
        best = summary["confirmed"][0]
        for name in ("val_acc", "test_acc", "angle"):
            if best[name]:
                found[name] = best[name]["mean"]
                found[f"{name}_n"] = float(best[name]["n"])
                if best[name]["sd"] is not None:
                    found[f"{name}_sd"] = best[name]["sd"]
        if best[f"test_acc_versus_{REFERENCE}"]:
            found[f"test_acc_versus_{REFERENCE}"] = best[f"test_acc_versus_{REFERENCE}"]["mean"]
    return found


COLUMNS = ("rule", "coefficients", "val %", "test %", "n", "angle °", "seconds", f"test − {REFERENCE}, points [95 %]")


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table with `COLUMNS`: the confirmed configurations, then the controls."""
    return [_cells(e) for e in (*summary["confirmed"], *summary["controls"])]


def _cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    coefficients = [f"{name} {value:.2e}" for name, value in found["coefficients"].items()]
    updates = {name: found["config"][name] for name in UPDATES if found["config"][name] != UPDATES[name]}
    coefficients += [f"{name} {value:.2g}" for name, value in updates.items()]
    lost = [f"{found[name]} {name}" for name in ("diverged", "failed") if found[name]]
    versus = found[f"test_acc_versus_{REFERENCE}"]
    return (
        found["rule"],
        ", ".join(coefficients) or "–",
        _spread(found["val_acc"], 100),
        _spread(found["test_acc"], 100),
        ", ".join([str(len(found["seeds"])), *lost]),
        _spread(found["angle"], 1),
        _spread(found["train_seconds"], 1),
        "–" if versus is None or found["rule"] == REFERENCE else _difference(versus, len(found["seeds"])),
    )


def _spread(value: Mapping[str, Any] | None, scale: float) -> str:
    if value is None:
        return "–"
    sd = "" if value["sd"] is None else f" ± {value['sd'] * scale:.2f}"
    return f"{value['mean'] * scale:.2f}{sd}"


def _difference(value: Mapping[str, Any], n: int) -> str:
    interval = "" if value["low"] is None else f" [{value['low'] * 100:+.2f}, {value['high'] * 100:+.2f}]"
    pairs = "" if value["n"] == n else f" (n {value['n']})"
    return f"{value['mean'] * 100:+.2f}{interval} {value['verdict']}{pairs}"


def _by_seed(rows: Iterable[Row], metric: str) -> dict[int, float]:
    return {row["config"]["seed"]: row["metrics"][metric] for row in rows if metric in row["metrics"]}


def _versus(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, Any] | None:
    difference: Estimate | None = paired_difference(ours, theirs)
    return None if difference is None else {**difference.to_dict(), "verdict": verdict(difference)}
