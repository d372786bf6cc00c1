"""The searches that a larger plan stands on: found where they exist, planned where they do not, of equal budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.campaign import Ready
from bench.choices import SAMPLERS
from bench.config import StudyConfig, UserError, study_name
from bench.files import read_yaml
from bench.learning.rules import ANY
from bench.place import Options, Place, recipe_for
from bench.reading import read_rows
from bench.search import check
from bench.searched import Searched, read_searched
from bench.space import Space
from bench.space_files import load_space
from bench.spaces import DEFAULT, REFERENCE, canonical_space, space_changes, space_of

#: What makes the searches of one plan comparable, beside the recipe; the ones that may grow in a study begun before.
BUDGET = ("trials", "epochs", "seed", "sampler", "scheduler", "confirm_seeds")
MAY_GROW = ("trials", "confirm_seeds")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A search that a plan needs: a rule (or `ANY`) on a network, in a search space."""

    rule: str
    arch: str
    dataset: str
    space: str = DEFAULT

    @classmethod
    def of(cls, rule: str, arch: str, dataset: str, space: str) -> Wanted:
        """Of the spaces that are the same for a rule (`canonical_space`) it is one search for all."""
        return cls(rule=rule, arch=arch, dataset=dataset, space=canonical_space(rule, space))

    @property
    def name(self) -> str:
        return study_name(self.rule, self.arch, self.dataset, space=self.space)


def find_wanted(results: Path, wanted: Wanted) -> StudyConfig | None:
    """The search that was begun for this; None if there is none.

    One of `REFERENCE` may have the name that it had when that space was the only one, without its own.
    """
    found = find_study(results, wanted.name)
    if found is None and wanted.space == REFERENCE:
        older = find_study(results, study_name(wanted.rule, wanted.arch, wanted.dataset))
        if older is not None and space_of({"rule": older.rule, **older.recipe}) == REFERENCE:
            return older
    return found


def read_searches(results: Path, wanted: Iterable[Wanted]) -> dict[Wanted, Searched]:
    """Those that were begun and have a row; UserError where none has."""
    controls = read_rows(results / "controls" / "rows.jsonl")
    begun = {w: config for w in dict.fromkeys(wanted) if (config := find_wanted(results, w))}
    found = {w: each for w, config in begun.items() if (each := read_searched(results, config, controls))}
    if not found:
        raise UserError(f"{results}: none of this plan's searches is there; its rows must lie beside it.")
    return found


def renamed(values: Mapping[str, Any], **names: str) -> Mapping[str, Any]:
    """The settings that an older plan kept, with the keys of today; what is no mapping is for `Strict` to refuse."""
    return {names.get(k, k): v for k, v in values.items()} if isinstance(values, Mapping) else values


def find_study(results: Path, name: str) -> StudyConfig | None:
    """The search that was begun under this name; None if there is none."""
    path = results / name / "study.yaml"
    if not path.exists():
        return None
    config = read_yaml(path).get("config")
    if not isinstance(config, Mapping):
        raise UserError(f"{path} is damaged: it has no config. Mend it, or use another --results.")
    return StudyConfig.from_dict(config)


def plan(
    wanted: Sequence[Wanted],
    *,
    given: Mapping[str, Any],
    changes: Mapping[str, Any],
    options: Options,
    begun: Mapping[str, Any] | None = None,
) -> dict[Wanted, Ready]:
    """Everything that these searches need, tried out; each stands once, in the order given.

    ``given``: of `BUDGET`, what the user said; else what the searches found have, else the defaults of StudyConfig.
    ``changes``: to the training recipe. ``begun``: the recipe of other searches of the plan, if none of these is found
    (`bench.place.recipe_for`). UserError where a search was begun with another budget or recipe: what is
    compared must have had the same.
    """
    known = {w: found for w in dict.fromkeys(wanted) if (found := find_wanted(options.results, w))}
    budget = {name: _settle(name, given, known.values()) for name in BUDGET}
    begun = next((config.recipe for config in known.values()), begun)
    places: dict[str, Place] = {}
    ready = {}
    for w in dict.fromkeys(wanted):
        space = load_space(w.rule, w.arch, space=w.space)
        space.check_changes(changes, w.space)
        all_changes = space_changes(space, w.rule, changes)
        config = _config(w, budget, recipe_for(w.dataset, w.arch, all_changes, options, begun=begun), space)
        if w in known:
            config = _same(known[w], config, options)
        space = Space.from_dict(config.space)
        ready[w] = check(config, space, options, places.get(w.arch))
        places.setdefault(w.arch, ready[w].place)
        if w in known:
            _check_place(ready[w])
    return ready


def _check_place(ready: Ready) -> None:
    """UserError for a search that was begun on other data, or another kind of device: its rows are another thing."""
    before = read_yaml(ready.folder / "study.yaml").get("runs_on")
    if before != ready.place.key:
        raise UserError(
            f"study {ready.config.name!r} in {ready.place.options.results} was begun on {before!r} (device, digest of "
            f"the data), and this is {ready.place.key!r}; use the same, or another --results."
        )


def _settle(name: str, given: Mapping[str, Any], known: Any) -> Any:
    if given.get(name) is not None:
        return given[name]
    # the budget of a search over all subsets is that of many; of one with nothing to search, no matter
    found = [getattr(config, name) for config in known if config.rule != ANY and _is_searched(config)]
    if name in MAY_GROW:
        return max(found, default=getattr(StudyConfig, name))
    return found[0] if found else getattr(StudyConfig, name)


def _is_searched(config: StudyConfig) -> bool:
    return bool(Space.from_dict(config.space).searched)


def _config(wanted: Wanted, budget: Mapping[str, Any], recipe: Mapping[str, Any], space: Space) -> StudyConfig:
    sampler = budget["sampler"]
    if wanted.rule == ANY and sampler in SAMPLERS and not SAMPLERS[sampler].conditional:
        sampler = "tpe"
    return StudyConfig.from_dict(
        {
            **budget,
            "name": wanted.name,
            "rule": wanted.rule,
            "arch": wanted.arch,
            "dataset": wanted.dataset,
            "sampler": sampler,
            "recipe": recipe,
            "space": space.to_dict(),
        }
    )


def _same(known: StudyConfig, config: StudyConfig, options: Options) -> StudyConfig:
    """The search that was begun, if it has the plan's budget and recipe; its own space."""
    where = f"study {known.name!r} in {options.results}"
    if (known.rule, known.arch, known.dataset) != (config.rule, config.arch, config.dataset):
        raise UserError(f"{where} is of {known.rule} on {known.arch}, {known.dataset}; use another --results.")
    if known.objective != "accuracy" or known.warm:
        how = f"its objective is {known.objective}" if known.objective != "accuracy" else "it had a warm start"
        raise UserError(f"{where} cannot be compared here ({how}); use another --results.")
    searched = _is_searched(known)
    for name in BUDGET if searched else ("epochs", "seed"):
        was, now = getattr(known, name), getattr(config, name)
        if was != now and not (name in MAY_GROW and (name == "confirm_seeds" or was < now)):
            option = f"--{name.replace('_', '-')} {was}"
            remedy = "Use" if known.rule == ANY else f"Use {option} for all, or use"
            raise UserError(
                f"{where} has {name} = {was}, and this plan {now}: budgets must be equal. {remedy} another --results."
            )
    if known.recipe != config.recipe:
        names = sorted({*known.recipe, *config.recipe})
        differ = [n for n in names if known.recipe.get(n) != config.recipe.get(n)]
        said = ", ".join(
            f"{n} {known.recipe.get(n, 'not set')}, here {config.recipe.get(n, 'not set')}" for n in differ
        )
        raise UserError(
            f"{where} was trained with another recipe ({said}): give the same --set, or use another --results."
        )
    return known.replace(trials=config.trials if searched else known.trials, confirm_seeds=config.confirm_seeds)
