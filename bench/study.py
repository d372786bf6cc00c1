"""The study: what to try next, when to stop it, and how it went. An Optuna journal is the one record.

Everything that is decided here is a function of the seed and of that journal, so a search that was killed
goes on as if it had not been: a proposal comes from a sampler made afresh for its trial's number, a stop
from the values reported so far, and a trial that a dead driver left running is handed out again as it
stands: same number, uid, parameters and reported values. Each change is one line of the journal, so that
there is nothing half done to repair.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from bench.choices import OBJECTIVES, PATIENCE, SAMPLERS, SCHEDULERS, check_choices
from bench.config import StudyConfig, TrialResult, UserError
from bench.front import spread
from bench.journal import claim, mend
from bench.proposals import Conditions, Distributions, budget, check_warm, is_diverged, propose

optuna.logging.set_verbosity(optuna.logging.WARNING)

Say = Callable[[str], None]

#: What may change between one start of a study and the next.
MAY_CHANGE = ("trials", "confirm_top", "confirm_seeds")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A trial to run."""

    uid: str
    number: int
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ranked(Proposal):
    """A trial that had its full budget, and what it reached in the study's objectives."""

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """In the first of them."""
        return self.values[0]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Trials by what became of them; ``remaining``: those of the budget that are not begun yet."""

    finished: int
    stopped: int
    diverged: int
    failed: int
    running: int
    remaining: int


class Study:
    """One search, kept in ``folder/journal.log``; one process at a time may have it open."""

    def __init__(
        self,
        folder: Path,
        config: StudyConfig,
        distributions: Distributions,
        conditions: Conditions,
        chance: float,
        storage: JournalStorage,
    ) -> None:
        """Use `Study.open`."""
        self.folder, self.config = folder, config
        self._distributions, self._conditions = dict(distributions), dict(conditions)
        self._chance, self._storage = chance, storage
        self._metrics = OBJECTIVES[config.objective].metrics
        self._pruner = SCHEDULERS[config.scheduler].make(config.epochs)
        if config.name not in {
            known.study_name for known in storage.get_all_studies()
        }:  # else it writes a line in vain
            directions = ["maximize"] * len(self._metrics)
            optuna.create_study(storage=storage, study_name=config.name, directions=directions, load_if_exists=True)
        self._study = optuna.load_study(
            storage=storage,
            study_name=config.name,
            sampler=RandomSampler(seed=0),  # never asked: see bench.proposals
            pruner=self._pruner,
        )
        self._id = storage.get_study_id_from_name(config.name)
        self._left = [t.number for t in self._trials() if t.state == TrialState.RUNNING]
        self._lock = -1

    @classmethod
    def open(
        cls,
        folder: Path,
        config: StudyConfig,
        distributions: Distributions,
        *,
        say: Say,
        chance: float,
        conditions: Conditions | None = None,
    ) -> Self:
        """Begin a study in ``folder``, or go on with the one there.

        ``distributions``: Optuna's, by parameter. ``chance``: the accuracy of guessing, which a diverged
        trial counts as in every objective. ``conditions``: the parameters that only some trials have, each
        with its switch. A UserError if another process has the study open, if it was begun with other
        settings, if its journal is damaged, or if its warm trials lie outside the space.
        """
        conditions = conditions or {}
        check_choices(config)
        assert not conditions or SAMPLERS[config.sampler].conditional, f"{config.sampler} cannot see conditions"
        check_warm(config, distributions, conditions)
        lock = claim(folder)
        try:
            journal = folder / "journal.log"
            mend(journal, say)
            with _undamaged(journal):
                storage = JournalStorage(JournalFileBackend(str(journal)))
                _check_journal(storage, journal)
                _check_name(storage, config.name, folder)
                study = cls(folder, config, distributions, conditions, chance, storage)
                study._check_settings()
        except BaseException:
            os.close(lock)
            raise
        study._lock = lock
        if study._left:
            say(f"{config.name}: {len(study._left)} interrupted trials go on.")
        return study

    def close(self) -> None:
        """Let others open it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def budget(self) -> int:
        """How many trials there are to be; where there is nothing to choose, one says all."""
        return budget(self.config, self._distributions)

    def ask(self) -> Proposal | None:
        """A trial to run: first those that a dead driver left, then new ones; None when all are given out."""
        if self._left:
            left = self._trials()[self._left.pop(0)]
            return Proposal(uid=self._uid(left.number), number=left.number, params=dict(left.params))
        trials = self._trials()
        number = len(trials)
        if number >= self.budget:
            return None
        params, state = propose(self.config, self._distributions, self._conditions, trials, chance=self._chance)
        uid = self._uid(number)
        trial = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            user_attrs={"uid": uid},
            system_attrs=state,
        )
        self._study.add_trial(trial)
        return Proposal(uid=uid, number=number, params=params)

    def report(self, uid: str, epoch: int, value: float) -> bool:
        """Note the objective's metric after an epoch; True: stop the trial here.

        An epoch that was reported before (by a worker that went on from its checkpoint) is not noted again.
        With two objectives nothing is stopped (Optuna's pruners compare one value), and so nothing is
        noted: the answer is False.
        """
        if not math.isfinite(value):
            raise ValueError(f"{uid} reported {value} at epoch {epoch}; a diverged trial ends, and reports nothing.")
        if len(self._metrics) > 1:
            return False
        trial_id = self._trial_id(uid)
        trial = self._storage.get_trial(trial_id)
        if epoch >= trial.user_attrs.get("stop_at", math.inf):
            return True
        if epoch not in trial.intermediate_values:
            self._storage.set_trial_intermediate_value(trial_id, epoch, value)
            trial = self._storage.get_trial(trial_id)
        if trial.last_step != epoch or not self._should_stop(trial, epoch):
            return False
        self._storage.set_trial_user_attr(trial_id, "stop_at", epoch)
        return True

    def _should_stop(self, trial: FrozenTrial, epoch: int) -> bool:
        verdict = self._pruner.prune(self._study, trial)  # asked in any case: it keeps its rungs' records
        others = sum(epoch in t.intermediate_values for t in self._trials()) - 1
        return bool(verdict) and others >= PATIENCE and epoch < self.config.epochs

    def tell(self, uid: str, result: TrialResult) -> None:
        """Note what became of a trial.

        finished: complete, with the objective's metrics (ValueError, and nothing noted, if one is missing or
        not finite). stopped: pruned. diverged: complete, at chance, so that the sampler learns to keep away.
        failed (a bug): neither, but its place in the budget is used up.
        """
        trial_id, number = self._trial_id(uid), self._number(uid)
        values = self._values(uid, result)
        self._storage.set_trial_user_attr(trial_id, "status", result.status)
        if result.reason is not None:
            self._storage.set_trial_user_attr(trial_id, "reason", result.reason)
        if values is not None:
            self._study.tell(number, values)
        else:
            self._study.tell(number, state=TrialState.PRUNED if result.status == "stopped" else TrialState.FAIL)

    def _values(self, uid: str, result: TrialResult) -> list[float] | None:
        """What the trial is worth in each objective; None if it had no full budget."""
        if result.status == "diverged":
            return [self._chance] * len(self._metrics)
        if result.status != "finished":
            return None
        missing = [name for name in self._metrics if not math.isfinite(result.metrics.get(name, math.nan))]
        if missing:
            need = f"which the objective {self.config.objective!r} is about"
            raise ValueError(f"{uid} finished without a finite {' and '.join(missing)}, {need}.")
        return [result.metrics[name] for name in self._metrics]

    def counts(self) -> Counts:
        """Trials by what became of them."""
        trials = self._trials()
        states = [t.state for t in trials]
        diverged = sum(is_diverged(t) for t in trials)
        return Counts(
            finished=states.count(TrialState.COMPLETE) - diverged,
            stopped=states.count(TrialState.PRUNED),
            diverged=diverged,
            failed=states.count(TrialState.FAIL),
            running=states.count(TrialState.RUNNING),
            remaining=max(0, self.budget - len(trials)),
        )

    def best(self, n: int) -> list[Ranked]:
        """The n best of the trials that had their full budget, best first; of equals, the earlier one.

        With two objectives: n of their Pareto front, chosen by `bench.front.spread`, and in its order.
        """
        whole = [t for t in self._trials() if t.state == TrialState.COMPLETE and not is_diverged(t)]
        if len(self._metrics) > 1:
            points = [(t.values[0], t.values[1]) for t in whole]
            ranked = [whole[i] for i in spread(points, n, (self._chance, self._chance))]
        else:
            ranked = sorted(whole, key=lambda t: (-t.value, t.number))[:n]
        return [
            Ranked(uid=self._uid(t.number), number=t.number, params=dict(t.params), values=tuple(t.values))
            for t in ranked
        ]

    def _check_settings(self) -> None:
        """Keep the settings with the study; a UserError if it was begun with others."""
        now = {key: value for key, value in self.config.to_dict().items() if key not in MAY_CHANGE}
        now["distributions"] = {name: distribution_to_json(d) for name, d in self._distributions.items()}
        now["conditions"] = self._conditions
        before = self._study.user_attrs.get("settings")
        if before is None and len(self._study.directions) == len(self._metrics):
            self._study.set_user_attr("settings", now)
            return
        if before is None:  # killed after its first line, a journal says only how many objectives there are
            several = len(self._study.directions) > 1
            before = {"objective": " or ".join(o.name for o in OBJECTIVES.values() if (len(o.metrics) > 1) == several)}
        else:  # an older release did not know every setting
            before = {**_of_an_older_release(), **before}
        if changed := [f"{k} was {v}, is now {now.get(k)}" for k, v in before.items() if now.get(k) != v]:
            begun = f"study {self.config.name!r} was begun with other settings ({'; '.join(changed)})"
            raise UserError(f"{begun}; use those to go on with it, or another --name.")

    def _trials(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        return trials

    def _uid(self, number: int) -> str:
        return f"{self.config.name}-{number:04d}"

    def _number(self, uid: str) -> int:
        number = int(uid.rpartition("-")[2])
        assert uid == self._uid(number), f"{uid} is no trial of {self.config.name}"
        return number

    def _trial_id(self, uid: str) -> int:
        trial_id: int = self._storage.get_trial_id_from_study_id_trial_number(self._id, self._number(uid))
        return trial_id


def _of_an_older_release() -> dict[str, Any]:
    """What a setting was before it was one."""
    usual = StudyConfig(name="", rule="", arch="", dataset="").to_dict()
    return {**{key: value for key, value in usual.items() if key not in MAY_CHANGE}, "conditions": {}}


@contextlib.contextmanager
def _undamaged(journal: Path) -> Iterator[None]:
    """A UserError for whatever Optuna raises, or asserts, where a line of the journal is none of its own."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{journal} is damaged ({what}); restore it, or begin again under another --name.") from error


def _check_journal(storage: JournalStorage, journal: Path) -> None:
    """ValueError for a journal that no search of ours has written; nothing is appended to it then.

    It begins with its study, no trial comes before its settings, and each is the next one of its space.
    """
    studies = storage.get_all_studies()
    if not studies and journal.stat().st_size:
        raise ValueError("it has no study")
    for study in studies:
        trials = storage.get_all_trials(study._study_id, deepcopy=False)
        kept = study.user_attrs.get("settings", {}).get("distributions", {})
        space = {name: json_to_distribution(text) for name, text in kept.items()}
        for number, trial in enumerate(trials):
            uid = f"{study.study_name}-{number:04d}"
            _check_trial(trial, number, uid, {name: space[name] for name in trial.params})


def _check_trial(trial: FrozenTrial, number: int, uid: str, space: Distributions) -> None:
    inside = all(d._contains(d.to_internal_repr(trial.params[name])) for name, d in space.items())
    values = [*trial.intermediate_values.values(), *(trial.values or ())]
    if (trial.number, trial.user_attrs["uid"], trial.distributions) != (number, uid, space) or not inside:
        raise ValueError(f"trial {number} is none of its own")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"trial {number} has a value that is not finite")


def _check_name(storage: JournalStorage, name: str, folder: Path) -> None:
    names = [study.study_name for study in storage.get_all_studies()]
    if names and name not in names:
        raise UserError(
            f"{folder} holds the study {names[0]!r}, not {name!r}; use --name {names[0]}, or another folder."
        )
