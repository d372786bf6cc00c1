"""What lies in a results folder, read from its rows alone: nothing is run, written or recorded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.config import StudyConfig, TrialConfig, UserError, unknown
from bench.files import read_yaml
from bench.kinds import KINDS
from bench.learning.rules import ANY
from bench.recipes import RECIPE_FIELDS
from bench.rows import Data, Row, RowFile, control_uid, last_attempts
from bench.space import UPDATE_FIELDS
from bench.spaces import SETTINGS
from bench.summary import NOISE, REFERENCE, UPDATES, by_configuration, lr_is_searched, summarize

#: The defaults of a run: what an older row, which lacks a newer field, was trained with.
USUAL = TrialConfig(rule=REFERENCE).to_dict()
#: What of a configuration is the rule's and the run's own; the rest it shares with its controls.
_OWN = ("rule", "seed", "coefficients", *UPDATES, *SETTINGS)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A study. ``folder``: where its book and rows lie; the file of its rows itself, if that is all there is of it."""

    name: str
    folder: Path
    kind: str


@dataclass(frozen=True, kw_only=True)
class SearchRows:
    """The rows of a search, the last attempt at each run; every configuration has all fields.

    ``config``: None without a study.yaml (see `config_of`). ``searched``: in the order of the trials. ``confirmed``: by
    seed; also those of an earlier best, before the budget grew. ``controls``: those that stand beside it.
    """

    name: str
    config: StudyConfig | None
    searched: Sequence[Row]
    confirmed: Sequence[Row]
    controls: Sequence[Row]
    folder: Path | None = None


# --- what there is ---------------------------------------------------------------------------------------


def find(results: Path) -> list[Found]:
    """All studies in this folder, by name."""
    try:
        folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read {results}: {error.strerror}; permit it, or name another --results.") from error
    return [found for folder in folders if (found := _of_folder(folder)) is not None]


def pick(results: Path, names: Sequence[str]) -> list[Found]:
    """The studies of these names, in this order, each once.

    A name may also be the path of a study's folder, or of a file of rows (.jsonl): all studies in it. UserError for
    what is not there.
    """
    known = {found.name: found for found in find(results)}
    picked = [found for name in names for found in ([known[name]] if name in known else _at(name, results, known))]
    each: dict[tuple[str, Path], Found] = {}
    for found in picked:
        each.setdefault((found.name, found.folder.resolve()), found)
    return list(each.values())


def _at(name: str, results: Path, known: Mapping[str, Found]) -> list[Found]:
    """What a path leads to."""
    path = Path(name)
    folder = path.parent if path.name == "rows.jsonl" else path
    if (found := _of_folder(folder)) is not None and path.exists():
        return [found]
    if path.suffix == ".jsonl":
        return _of_file(path)
    if path.is_dir() and os.sep in name:
        manifests = ", ".join(kind.manifest for kind in KINDS.values())
        raise UserError(f"{name} holds no study; name a folder that has one of {manifests}.")
    if not known:
        raise UserError(f"there is no study in {results}; name another --results, or the path of a study.")
    raise unknown("study", name, known)


def _of_folder(folder: Path) -> Found | None:
    """The study in this folder, whose name is the folder's."""
    try:
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; permit it, or move it elsewhere.") from error
    return next(
        (
            Found(name=folder.resolve().name, folder=folder, kind=name)
            for name, kind in KINDS.items()
            if kind.manifest in held
        ),
        None,
    )


def _of_file(path: Path) -> list[Found]:
    """The studies whose rows are in this file, in their order."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; name one of rows, or a study.")
    known = {of: name for name, kind in KINDS.items() for of in kind.rows}
    kinds: dict[str, str] = {}
    for row in read_rows(path):
        if row["kind"] in known:
            kinds.setdefault(row["study"], known[row["kind"]])
    if not kinds:
        raise UserError(f"{path} holds no rows of a study; name a file that has its trials.")
    return [Found(name=name, folder=path, kind=kind) for name, kind in kinds.items()]


# --- what each kind reads --------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The rows of this file; a last line that is being written just now is not one yet."""
    return RowFile(path, say=lambda _: None).read()


def read_config(manifest: Path) -> Mapping[str, Any]:
    """The settings that a study's manifest keeps; UserError where it has none."""
    config = read_yaml(manifest).get("config")
    if not isinstance(config, Mapping):
        raise UserError(f"{manifest} is damaged: it has no config. Run its command again, or restore it.")
    return config


def data_of(rows: Iterable[Row], folder: Path) -> Data:
    """What these rows were measured on, as far as they say; UserError if none was trained."""
    for row in rows:
        kept, key = row["provenance"], place_of(row)
        if key is not None and "examples" in kept:
            classes = _classes(row["config"]["dataset"], kept, folder)
            return Data(key=key, examples=kept["examples"], chance=1 / classes)
    raise UserError(f"{folder}: no run got as far as its data, so there is nothing to show; run its command again.")


def _classes(dataset: str, kept: Mapping[str, Any], folder: Path) -> int:
    """How many classes the data have; older rows do not keep it."""
    from bench.datasets import DATASETS  # it imports torch, which takes seconds, and newer rows need none

    known = kept.get("classes") or (DATASETS[dataset].classes if dataset in DATASETS else None)
    if known is None:
        raise UserError(f"{folder}: its rows do not say how many classes {dataset} has; run its command again.")
    return int(known)


# --- a search --------------------------------------------------------------------------------------------


def read_search(found: Found, controls: Sequence[Row] | None = None) -> SearchRows:
    """The rows of a search and of its controls. ``controls``: what `read_controls` gave, if it was read before.

    UserError for a study of another kind, and for damaged files.
    """
    if found.kind != "search":
        what = KINDS[found.kind].what
        raise UserError(f"{found.name} is {what}, not a search; bench report {found.name} makes its page.")
    config, runs_on = _book(found)
    own = last_attempts(
        row for row in read_rows(_file_of(found)) if found.folder.is_dir() or row["study"] == found.name
    )
    own = [_whole(row) for row in own]
    searched = sorted((r for r in own if r["kind"] == "search"), key=lambda r: (len(r["uid"]), r["uid"]))
    confirmed = sorted((r for r in own if r["kind"] == "confirm"), key=lambda r: r["config"]["seed"])
    place = runs_on or next(filter(None, map(place_of, (*confirmed, *searched))), None)
    beside = read_controls(found) if controls is None else controls
    return SearchRows(
        name=found.name,
        config=config,
        searched=searched,
        confirmed=confirmed,
        controls=_belonging(config, [*confirmed, *searched], place, beside),
        folder=found.folder,
    )


def read_controls(found: Found) -> list[Row]:
    """All controls that lie where this study's do, the last attempt at each."""
    beside = found.folder.parent
    path = beside / "controls" / "rows.jsonl" if found.folder.is_dir() else beside / "controls.jsonl"
    return [_whole(row) for row in last_attempts(read_rows(path)) if row["kind"] == "control"]


def place_of(row: Mapping[str, Any]) -> str | None:
    """Device type and digest of the data, as `bench.place.Place.key`; None for a run that did not come that far."""
    kept = row["provenance"]
    if not {"device", "dataset_digest"} <= set(kept):
        return None
    return f"{kept['device'].partition(':')[0]} {kept['dataset_digest']}"


def _file_of(found: Found) -> Path:
    return found.folder / "rows.jsonl" if found.folder.is_dir() else found.folder


def _book(found: Found) -> tuple[StudyConfig | None, str | None]:
    """The settings of a search, and what it runs on; None where they are not there."""
    path = found.folder / "study.yaml"
    if not path.is_file():
        return None, None
    runs_on = read_yaml(path).get("runs_on")
    return StudyConfig.from_dict(read_config(path)), None if runs_on is None else str(runs_on)


def _whole(row: Row) -> Row:
    return {**row, "config": {**USUAL, **row["config"]}}


# --- its controls ----------------------------------------------------------------------------------------


def _belonging(config: StudyConfig | None, own: Sequence[Row], place: str | None, controls: Iterable[Row]) -> list[Row]:
    """Those of the study's recipe, data and device, at its seeds; `bench.campaign` says what it runs as controls."""
    if not own or place is None:
        return []
    rule, recipe = _rule(config, own), _control_recipe(config, own)
    fit = [r for r in controls if r["config"]["rule"] != rule and recipe.items() <= _recipe(r).items()]
    fit = [row for row in fit if _ran_at(row, place)]
    seeds = _seeds(config, own, fit)
    wanted = [row for row in fit if seeds is None or row["config"]["seed"] in seeds]
    return sorted(wanted, key=lambda r: (r["config"]["rule"] != REFERENCE, r["config"]["rule"], r["config"]["seed"]))


def _seeds(config: StudyConfig | None, own: Sequence[Row], controls: Sequence[Row]) -> set[int] | None:
    """Those of the confirmed runs, and of those to come, if that is known; None: all."""
    confirmed = {row["config"]["seed"] for row in own if row["kind"] == "confirm"}
    if config is None:
        return confirmed or None
    fresh = sorted({row["config"]["seed"] for row in controls} - confirmed - {config.seed})
    return confirmed | set(fresh[: max(0, config.confirm_seeds - len(confirmed))])


def _recipe(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row["config"].items() if name not in _OWN}


def _control_recipe(config: StudyConfig | None, own: Sequence[Row]) -> dict[str, Any]:
    """What a search's controls are trained with: no B of theirs learns, so that noise on its updates alone is none.

    Where W's learning rate was searched, theirs is the recipe's; rows alone do not tell it.
    """
    recipe = _recipe(own[0])
    quiet = ("update_noise", "update_noise_on") if recipe["update_noise_on"] == "feedback" else ()
    if config is not None and "lr" in config.space:
        recipe["lr"] = config.recipe.get("lr", USUAL["lr"])
    elif lr_is_searched(own):
        del recipe["lr"]
    return {**recipe, **{name: USUAL[name] for name in quiet}}


def _ran_at(row: Row, place: str) -> bool:
    """Whether a control ran on this device and data; of one that failed only its name tells."""
    known = place_of(row)
    if known is not None:
        return known == place
    config = TrialConfig.from_dict(row["config"])
    return str(row["uid"]).partition(".")[0] == control_uid(config, place)


# --- its summary -----------------------------------------------------------------------------------------


def search_summary(rows: SearchRows) -> dict[str, Any]:
    """`bench.summary.summarize` of these rows: the numbers that `bench search --json` printed when it had them."""
    return summarize(config_of(rows), rows.searched, rows.confirmed, rows.controls)


def config_of(rows: SearchRows) -> StudyConfig:
    """The study's own, or what its rows tell of it.

    Rows do not tell the sampler, the scheduler, the search space and a warm start: these are StudyConfig's defaults. A
    search for robustness alone is taken for one of both objectives. UserError where there is neither book nor row.
    """
    if rows.config is not None:
        return rows.config
    own = [*rows.searched, *rows.confirmed]
    if not own:
        raise UserError(f"there are no rows of {rows.name}; name a file that has its trials.")
    first = {**USUAL, **own[0]["config"]}
    varied = {name for name in UPDATE_FIELDS if len({row["config"].get(name) for row in own}) > 1}
    fields = [name for name in dict.fromkeys((*RECIPE_FIELDS, *NOISE, *SETTINGS)) if name not in varied]
    return StudyConfig(
        name=rows.name,
        rule=_rule(None, own),
        arch=first["arch"],
        dataset=first["dataset"],
        trials=max(1, len(rows.searched)),
        epochs=first["epochs"],
        seed=first["seed"] if rows.searched else StudyConfig.seed,
        confirm_top=max(1, len(by_configuration(rows.confirmed))),
        confirm_seeds=len({row["config"]["seed"] for row in rows.confirmed}),
        objective="accuracy" if first["noise_site"] is None else "both",
        recipe={name: first[name] for name in fields if first[name] != USUAL[name]},
    )


def _rule(config: StudyConfig | None, own: Sequence[Row]) -> str:
    """What is searched; several rules in one search are a search over all subsets."""
    rules = {row["config"]["rule"] for row in own}
    return config.rule if config is not None else rules.pop() if len(rules) == 1 else ANY
