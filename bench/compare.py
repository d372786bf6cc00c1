"""Searches side by side: the best confirmed of each, their controls, and what is not equal between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.config import UserError, digest
from bench.reading import SearchRows, config_of, place_of, search_summary
from bench.recipes import RECIPE_FIELDS
from bench.rows import Row
from bench.space import Space
from bench.spaces import TELLING, idle_settings, moved_by_primitives, space_of
from bench.statistics import versus
from bench.summary import REFERENCE, UPDATES, by_configuration, by_seed, entry, lr_is_searched

VERSUS_REFERENCE, VERSUS_FIRST = f"test_acc_versus_{REFERENCE}", "test_acc_versus_first"


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A study in the comparison. ``best``: its summary's entry; ``runs``: what of that was measured."""

    label: str
    rows: SearchRows
    summary: Mapping[str, Any]
    best: Mapping[str, Any] | None
    runs: Sequence[Row]

    @property
    def own(self) -> list[Row]:
        return [*self.rows.confirmed, *self.rows.searched]

    @property
    def place(self) -> str | None:
        return next(filter(None, map(place_of, self.own)), None)

    @property
    def tunes(self) -> bool:
        """Whether there was anything to search: if not, one trial is all that there can be."""
        if self.rows.config is None:
            return len(self.rows.searched) > 1
        return bool(Space.from_dict(self.rows.config.space).searched)

    @property
    def planned(self) -> int | None:
        """Its budget of trials, if it is known."""
        config = self.rows.config
        return None if config is None else config.trials if self.tunes else 1


@dataclass(frozen=True, kw_only=True)
class _Control:
    """A control's runs and those of the reference beside it, by seed; ``beside``: the studies that share them."""

    beside: list[str] = field(default_factory=list)
    runs: dict[int, Row] = field(default_factory=dict)
    reference: dict[int, Row] = field(default_factory=dict)


# --- the comparison --------------------------------------------------------------------------------------


def compare(studies: Sequence[SearchRows]) -> dict[str, Any]:
    """What `bench compare` prints, JSON-ready: a line per study, one per control of each recipe, and notes.

    ``test_acc_versus_first``: paired by seed, against the best of the first study; only where both have the same data.
    Notes say what is missing and why, and what is not equal. UserError without a study.
    """
    if not studies:
        raise UserError("there is nothing to compare; name a study.")
    sides = [_side(rows, label) for rows, label in zip(studies, _labels(studies), strict=True)]
    controls, doubts = _controls(sides)
    lines = [_study_line(side, sides[0]) for side in sides]
    beside = [_control_line(control, sides[0]) for control in controls]
    return {
        "first": sides[0].label,
        "studies": lines,
        "controls": beside,
        "notes": [*_trials(sides), *_missing(lines, beside), *_said_of_each(sides), *_unequal(sides), *doubts],
    }


def _labels(studies: Sequence[SearchRows]) -> list[str]:
    """Names; where several have one, where they lie, too."""
    names = [rows.name for rows in studies]
    return [r.name if names.count(r.name) == 1 or r.folder is None else f"{r.name} in {r.folder}" for r in studies]


def _side(rows: SearchRows, label: str) -> _Side:
    summary = search_summary(rows)
    best = summary["confirmed"][0] if summary["confirmed"] else None
    runs = [r for r in rows.confirmed if best is not None and _without_seed(r) == best["config"]]
    return _Side(label=label, rows=rows, summary=summary, best=best, runs=[r for r in runs if r["status"] != "failed"])


def _without_seed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row["config"].items() if name != "seed"}


def _study_line(side: _Side, first: _Side) -> dict[str, Any]:
    against, why_not = (None, None) if side is first else _against(first, side.runs)
    reasons = [] if side.runs else [_why_nothing(side)]
    if (
        side.runs
        and side.rows.searched
        and side.best
        and side.best["rule"] != REFERENCE
        and side.best[VERSUS_REFERENCE] is None
    ):
        reasons.append(f"no run of {REFERENCE} under its recipe has a seed in common with it")
    config = config_of(side.rows)
    return {
        "kind": "study",
        "study": side.label,
        "beside": [],
        "rule": side.best["rule"] if side.best else config.rule,
        "arch": config.arch,
        "dataset": config.dataset,
        "trials": len(side.rows.searched) or None,
        "epochs": config.epochs,
        **_numbers(side.best, side.runs),
        VERSUS_FIRST: against,
        "searched": side.summary["trials"],
        "reasons": [*reasons, *filter(None, [why_not])],
    }


def _control_line(control: _Control, first: _Side) -> dict[str, Any]:
    rows = [control.runs[seed] for seed in sorted(control.runs)]
    runs = [row for row in rows if row["status"] != "failed"]
    against, why_not = _against(first, runs)
    config = rows[0]["config"]
    return {
        "kind": "control",
        "study": None,
        "beside": control.beside,
        **{name: config[name] for name in ("rule", "arch", "dataset")},
        "trials": None,
        "epochs": config["epochs"],
        **_numbers(entry(rows, list(control.reference.values())), runs),
        VERSUS_FIRST: against,
        "searched": None,
        "reasons": [why_not] if why_not else [] if runs else ["all of its runs failed"],
    }


def _numbers(found: Mapping[str, Any] | None, runs: Sequence[Row]) -> dict[str, Any]:
    """The part of a line that runs tell."""
    config = found["config"] if found else {}
    kept = runs[0]["provenance"] if runs else {}
    return {
        "coefficients": config.get("coefficients", {}),
        "updates": {name: config[name] for name in UPDATES if config} | (found or {}).get("updates", {}),
        "space": space_of(config) if config and moved_by_primitives(config["rule"]) else None,
        "seeds": found["seeds"] if found else [],
        **{name: found[name] if found else 0 for name in ("diverged", "failed")},
        **{name: found[name] if found else None for name in ("val_acc", "test_acc", VERSUS_REFERENCE)},
        "device": kept.get("device"),
        "dataset_digest": kept.get("dataset_digest"),
        "test_examples": kept.get("examples", {}).get("test"),
    }


def _against(first: _Side, runs: Sequence[Row]) -> tuple[dict[str, Any] | None, str | None]:
    """The difference to the first study; or None, and why there is none."""
    if not runs:
        return None, None  # the line says why
    missing = f"no difference to {first.label}: "
    if not first.runs:
        return None, f"{missing}nothing of it was measured"
    if None in (ours := _data(runs[0])) or ours != _data(first.runs[0]):
        return None, f"{missing}it was measured on other data"
    found = versus(by_seed(runs, "test_acc"), by_seed(first.runs, "test_acc"))
    return found, None if found else f"{missing}they have no seed in common"


def _data(row: Mapping[str, Any]) -> tuple[str, str | None]:
    """Data set and digest. Where images lie in the file system does not matter."""
    return str(row["config"]["dataset"]).partition(":")[0], row["provenance"].get("dataset_digest")


def _controls(sides: Iterable[_Side]) -> tuple[list[_Control], list[str]]:
    """The controls of all studies, once for each recipe, data and device; and doubts about them."""
    found: dict[tuple[str, str | None], _Control] = {}
    doubts = []
    for side in sides:
        reference = [row for row in (*side.rows.controls, *side.rows.confirmed) if row["config"]["rule"] == REFERENCE]
        for rows in by_configuration(side.rows.controls):
            control = found.setdefault((digest(_without_seed(rows[0])), side.place), _Control())
            control.beside.append(side.label)
            for row in rows:
                known = control.runs.setdefault(row["config"]["seed"], row)
                if known["metrics"].get("test_acc") != row["metrics"].get("test_acc"):
                    doubts.append(
                        f"{row['config']['rule']} with seed {row['config']['seed']} was run twice, with other results: "
                        f"its line has the first, and {side.label} is compared with the second"
                    )
            for row in reference:
                control.reference.setdefault(row["config"]["seed"], row)
    return list(found.values()), doubts


# --- what must be said beside it -------------------------------------------------------------------------


def _why_nothing(side: _Side) -> str:
    if side.best:
        return f"all of its {side.best['failed']} confirmed runs failed"
    run, planned = len(side.rows.searched), side.planned
    if planned is not None and run < planned:
        return f"nothing is confirmed yet; {run} of {planned} trials are known"
    if not side.summary["trials"]["finished"]:
        return "nothing could be confirmed: no trial finished"
    return "nothing of it was confirmed (yet, or because --confirm-seeds is 0)"


def title_of(line: Mapping[str, Any]) -> str:
    """A line's name in a sentence."""
    return str(line["study"] or f"{line['rule']}, control of {', '.join(line['beside'])}")


def _missing(studies: Iterable[Mapping[str, Any]], controls: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why there is a dash; of a control only where that is not said of the studies beside it."""
    said = {(line["study"], reason): f"{line['study']}: {reason}" for line in studies for reason in line["reasons"]}
    more = [
        f"{title_of(line)}: {reason}"
        for line in controls
        for reason in line["reasons"]
        if not all((study, reason) in said for study in line["beside"])
    ]
    return [*said.values(), *more]


def _trials(sides: Sequence[_Side]) -> list[str]:
    """What became of all trials; nothing of configurations that were not searched."""
    counts = {
        side.label: ", ".join(f"{n} {name}" for name, n in side.summary["trials"].items() if n) or "none"
        for side in sides
        if side.rows.searched or side.rows.config
    }
    said = "; ".join(f"{words} ({label})" for label, words in counts.items())
    return [f"trials: {said}"] if said else []


def _said_of_each(sides: Iterable[_Side]) -> list[str]:
    notes = []
    for side in sides:
        run, planned, several = len(side.rows.searched), side.planned, len(side.summary["confirmed"])
        if side.best and planned is not None and run < planned:
            notes.append(f"{side.label}: {run} of {planned} trials are known")
        if several > 1:
            notes.append(f"{side.label}: the best of {several} confirmed configurations")
        if (objective := config_of(side.rows).objective) != "accuracy":
            how = "robustness" if objective == "robustness" else "accuracy and robustness"
            notes.append(f"{side.label}: searched for {how}")
    return notes


def _unequal(sides: Sequence[_Side]) -> list[str]:
    """What differs between the studies, a note each."""
    notes = []
    for what, value, remark in _ASPECTS:
        if said := _differing({side.label: value(side) for side in sides}):
            notes.append(f"{what} differ: {said}{remark}")
    recipes = {name: _differing({s.label: _setting(s, name) for s in sides}) for name in _COMPARED}
    if differing := [f"{name} {said}" for name, said in recipes.items() if said]:
        notes.append(f"recipes differ: {'; '.join(differing)}")
    return notes


def _differing(values: Mapping[str, str | None]) -> str:
    """Each value, and whose it is; nothing where all that have one (not None) have the same."""
    whose: dict[str, list[str]] = {}
    for label, value in values.items():
        if value is not None:
            whose.setdefault(value, []).append(label)
    return ", ".join(f"{value} ({', '.join(labels)})" for value, labels in whose.items()) if len(whose) > 1 else ""


def _setting(side: _Side, name: str) -> str | None:
    """A field of its recipe that has an effect on its rule."""
    if not side.own or name in idle_settings(side.own[0]["config"]["rule"]):
        return None
    if name == "lr" and lr_is_searched(side.rows.searched):
        return "searched"
    value = side.own[0]["config"][name]
    return "none" if value is None else str(value)


def _kept(side: _Side, read: Callable[[Mapping[str, Any]], Any]) -> str | None:
    """What the provenance of its confirmed runs (else of its trials) says."""
    rows = [row for row in side.runs or side.own if place_of(row)]
    known = {str(value) for row in rows if (value := read(row["provenance"])) is not None}
    return " and ".join(sorted(known)) or None


def _space(side: _Side) -> str | None:
    """Only where it has an effect."""
    config = side.best["config"] if side.best else {}
    return space_of(config) if config and moved_by_primitives(config["rule"]) else None


def _chosen(side: _Side, name: str) -> str | None:
    """A setting of its search, if that is known and there was anything to search."""
    return str(getattr(side.rows.config, name)) if side.rows.config and side.tunes else None


def _start(side: _Side) -> str | None:
    warm = _chosen(side, "warm_from")
    return "cold" if warm == "None" else warm


#: What of a recipe is compared field by field: the rest tells the search space, or is the rule's own.
_COMPARED = tuple(name for name in RECIPE_FIELDS if name not in (*TELLING, *UPDATES))
_BUDGET = ": this is a comparison across unequal budgets"
#: What may be unequal: its name, what a study has, what to say of it.
_ASPECTS: tuple[tuple[str, Callable[[_Side], str | None], str], ...] = (
    ("numbers of trials", lambda s: str(len(s.rows.searched)) if s.tunes else None, _BUDGET),
    ("numbers of epochs", lambda s: str(config_of(s.rows).epochs), _BUDGET),
    ("samplers", lambda s: _chosen(s, "sampler"), ""),
    ("schedulers", lambda s: _chosen(s, "scheduler"), ""),
    ("starts (cold, or from a search)", _start, ""),
    ("networks", lambda s: config_of(s.rows).arch, ""),
    ("data sets", lambda s: _kept(s, lambda kept: f"{config_of(s.rows).dataset} {kept['dataset_digest']}"), ""),
    ("numbers of test examples", lambda s: _kept(s, lambda kept: kept.get("examples", {}).get("test")), ""),
    ("search spaces", _space, ": equal coefficients then mean unlike things"),
    ("devices", lambda s: _kept(s, lambda kept: kept.get("device_name") or kept["device"]), ""),
    ("releases of bench", lambda s: _kept(s, lambda kept: kept.get("versions", {}).get("bench")), ""),
)
