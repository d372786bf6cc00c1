"""The page of a search: what was confirmed, how it was found, over which coefficients, and how B came to W."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.cells import difference, spread_of
from bench.choices import OBJECTIVES
from bench.matrix_words import any_lines
from bench.pages.coefficients import coefficient_parts
from bench.pages.confirmed import Configuration, alignment_parts, configurations, confirmed_parts
from bench.pages.parts import Page, Section
from bench.pages.trials import Search, learning_curves, optimisation_history, trials_of
from bench.rows import Row
from bench.summary import REFERENCE, budget_words, space_words, table_rows


def search_page(
    summary: Mapping[str, Any], searched: Sequence[Row], confirmed: Sequence[Row], controls: Sequence[Row]
) -> Page:
    """The page of one search, from `bench.summary.summarize` and the rows that it was made of."""
    search = Search(rule=summary["rule"], trials=trials_of(searched), epochs=summary["epochs"], about=_about(summary))
    metrics = OBJECTIVES[summary["objective"]].metrics
    known = configurations(summary, confirmed, controls)
    test = test_words([*confirmed, *controls])
    histories = [optimisation_history(search, metric) for metric in metrics]
    parts = [part for metric in metrics for part in coefficient_parts(search, metric)]
    return Page(
        title=summary["study"],
        kind="search",
        facts=_facts(summary, [*searched, *confirmed, *controls], test),
        lines=_lines(summary, known),
        sections=(
            Section(title="Confirmed", parts=confirmed_parts(summary, search.about, known, test)),
            Section(title="Search", parts=(learning_curves(search, confirmed), *histories)),
            Section(title="Coefficients", lines=_unsearched(search), parts=parts),
            Section(title="Angle between W and B", parts=alignment_parts(search.about, known)),
        ),
    )


# --- words ---------------------------------------------------------------------------------------------------------


def _about(summary: Mapping[str, Any]) -> str:
    return f"{summary['dataset']}, {summary['arch']}, {budget_words(summary)}"


def test_words(rows: Sequence[Row]) -> str:
    """How the runs with fresh seeds used the test set."""
    read = sum(bool(row["test_read"]) for row in rows)
    if not read:
        return "test was not read"
    ended = sum(row["status"] != "failed" for row in rows)
    some = "" if read == ended else f" ({read} of {ended} read it)"
    return f"test was read once per confirmed run and control{some}; nothing was chosen by it"


def _lines(summary: Mapping[str, Any], known: Sequence[Configuration]) -> list[str]:
    """What it comes to."""
    if not summary["confirmed"]:
        finished = summary["trials"]["finished"]
        yet = "" if summary["complete"] else " yet"
        why = f"no trial finished{yet}" if not finished else f"no configuration was trained with fresh seeds{yet}"
        return [f"Nothing is confirmed: {why}.", *any_lines(summary.get("matrix"))]
    best, cells = known[0], table_rows(summary)[0]
    chosen = (
        f"; the best by validation of {len(summary['confirmed'])} confirmed" if len(summary["confirmed"]) > 1 else ""
    )
    said = [
        f"{best.rule}: test accuracy {spread_of(best.found['test_acc'])}, in % ± standard deviation over seeds{chosen}."
    ]
    versus = best.found[f"test_acc_versus_{REFERENCE}"]
    if versus is not None and best.rule != REFERENCE:
        n = versus["n"]
        over = f"over {n} common seeds, 95 % interval" if n > 1 else "of one common seed, and so without an interval"
        said.append(f"{best.rule} − {REFERENCE} on test: {difference(versus, n)} (points, {over}).")
    elif best.rule != REFERENCE:
        said.append(f"Not compared with {REFERENCE}: no run of it has a seed of {best.rule}.")
    said.append(f"Best coefficients: {cells[1]}.")
    if summary["objective"] == "both":
        front = sum(bool(found.get("front")) for found in summary["confirmed"])
        said.append(f"{front} of {len(summary['confirmed'])} confirmed are on the front of accuracy and robustness.")
    return [*said, *any_lines(summary.get("matrix"))]


def _facts(summary: Mapping[str, Any], rows: Sequence[Row], test: str) -> dict[str, str]:
    """What stands at the top; of provenance whatever differs between runs stands side by side."""
    seeds = sorted({len(found["seeds"]) for found in summary["confirmed"]})
    many = len(summary["confirmed"])
    configured = f"{many} configuration{'s' if many > 1 else ''}"
    plural = "" if seeds == [1] else "s"
    confirmed = f"{configured} × {'–'.join(map(str, seeds))} seed{plural}" if seeds else "none"
    noise = {name: summary["noise"][name] for name in summary["noise"]}
    return {
        "data set": summary["dataset"],
        "examples": _distinct(rows, _examples),
        "network": summary["arch"],
        "rule": summary["rule"],
        "maximised": OBJECTIVES[summary["objective"]].summary,
        **(
            {"noise": ", ".join(f"{name.removeprefix('noise_')} {value}" for name, value in noise.items())}
            if noise
            else {}
        ),
        **(
            {"search space": space}
            if (space := ", ".join(sorted({space_words(row["config"]) for row in rows} - {""})))
            else {}
        ),
        "budget": budget_words(summary),
        "complete": "yes" if summary["complete"] else "no: the same command goes on",
        "trials": ", ".join(f"{n} {status}" for status, n in summary["trials"].items()),
        "confirmed": confirmed,
        "test set": test,
        "device": _distinct(rows, lambda found: str(found.get("device_name") or found.get("device") or "")),
        "versions": _distinct(rows, _versions),
        "git revision": _distinct(rows, lambda found: str(found.get("git_revision") or "")[:10]),
    }


def _distinct(rows: Iterable[Row], words: Callable[[Mapping[str, Any]], str]) -> str:
    """What the runs' provenance says, each once."""
    said = dict.fromkeys(words(row["provenance"]) for row in rows)
    return "; ".join(text for text in said if text) or "unknown"


def _examples(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} {split}" for split, n in found.get("examples", {}).items())


def _versions(found: Mapping[str, Any]) -> str:
    kept = ("bench", "torch", "optuna", "python")
    return ", ".join(f"{name} {found['versions'][name]}" for name in kept if name in found.get("versions", {}))


def _unsearched(search: Search) -> list[str]:
    """The coefficients that all trials have the same."""
    fixed = {
        name: value
        for trial in search.trials[:1]
        for name, value in trial.row["config"]["coefficients"].items()
        if name not in search.params
    }
    return [f"The same in all trials: {', '.join(f'{n} {v:.3g}' for n, v in fixed.items())}."] if fixed else []
