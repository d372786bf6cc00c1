"""The study: what to try next, when to stop it, and how it went. Optuna's record of it is the only one.

Everything that is decided here is a function of the seed and of that record, so a search that was killed
goes on as if it had not been: a proposal comes from a sampler made afresh for its trial's number, a stop
from the values reported so far, and a trial that a dead driver left running is handed out again as it
stands: same number, uid, parameters and reported values. Each change is one line of the journal, or one
transaction, so that there is nothing half done to repair.

The record is a journal in the study's folder, or a database on a server; one process writes it, which has the folder
claimed. While the server does not answer, what runs goes on: what is to be written is kept, and written when it
answers; and nothing new is handed out.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.distributions import distribution_to_json
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from bench.choices import OBJECTIVES, PATIENCE, SAMPLERS, SCHEDULERS, check_choices
from bench.config import StudyConfig, TrialResult, UserError
from bench.front import spread
from bench.journal import claim
from bench.proposals import Conditions, Distributions, Proposal, Ranked, budget, check_warm, is_diverged, propose
from bench.storage import Line, StorageAwayError, hang_up, kept
from bench.stores import shown

optuna.logging.set_verbosity(optuna.logging.WARNING)

Say = Callable[[str], None]

#: What may change between one start of a study and the next.
MAY_CHANGE = ("trials", "confirm_top", "confirm_seeds")


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
    """One search, which one process at a time may have open."""

    def __init__(
        self,
        folder: Path,
        config: StudyConfig,
        distributions: Distributions,
        conditions: Conditions,
        chance: float,
        storage: BaseStorage,
        line: Line,
    ) -> None:
        """Use `Study.open`."""
        self.folder, self.config = folder, config
        self._distributions, self._conditions = dict(distributions), dict(conditions)
        self._chance, self._storage, self._line = chance, storage, line
        self._lock = ExitStack()
        self._owed: deque[Callable[[], object]] = deque()
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
        self._known: list[FrozenTrial] = self._study.get_trials(deepcopy=False)  # nobody else writes
        self._held: set[int] = set()  # the running trials that this process has

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
        url: str | None = None,
    ) -> Self:
        """Begin a study in ``folder``, or go on with the one there.

        ``distributions``: Optuna's, by parameter. ``chance``: the accuracy of guessing, which a diverged
        trial counts as in every objective. ``conditions``: the parameters that only some trials have, each
        with its switch. ``url``: of an Optuna storage; else it is a journal in the folder. A UserError if
        another process has the study open, if it was begun with other settings or is kept elsewhere, if its
        journal is damaged or its storage does not answer, or if its warm trials lie outside the space.
        """
        conditions = conditions or {}
        check_choices(config)
        assert not conditions or SAMPLERS[config.sampler].conditional, f"{config.sampler} cannot see conditions"
        check_warm(config, distributions, conditions)
        with ExitStack() as lock:
            lock.enter_context(claim(folder))
            with kept(folder, config.name, url, say) as (storage, identity):
                line = Line(f"the storage at {shown(url or str(folder))}", say)
                study = cls(folder, config, distributions, conditions, chance, storage, line)
                study._check_settings(identity)
            study._lock = lock.pop_all()
        if interrupted := study.counts().running:
            say(f"{config.name}: {interrupted} interrupted trials go on.")
        return study

    def close(self) -> None:
        """Let others open it."""
        hang_up(self._storage)
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def budget(self) -> int:
        """How many trials there are to be; where there is nothing to choose, one says all."""
        return budget(self.config, self._distributions)

    def ask(self) -> Proposal | None:
        """A trial to run: first those that a dead driver left, then new ones; None when all are given out.

        `bench.storage.StorageAwayError` if that cannot be known now.
        """
        with self._line.trying():
            self._pay()
            # with a trial that was added before, if the storage has written it without an answer
            self._known = trials = self._study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == TrialState.RUNNING and trial.number not in self._held:
                    self._held.add(trial.number)
                    return Proposal(uid=self._uid(trial.number), number=trial.number, params=dict(trial.params))
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
            self._refresh(number)
            self._held.add(number)
            return Proposal(uid=uid, number=number, params=params)

    def _refresh(self, number: int) -> FrozenTrial:
        """Read a trial that was written."""
        trial = self._storage.get_trial(self._trial_id(number))
        self._known[number : number + 1] = [trial]
        return trial

    def report(self, uid: str, epoch: int, value: float) -> bool:
        """Note the objective's metric after an epoch; True: stop the trial here.

        An epoch that was reported before (by a worker that went on from its checkpoint) is not noted again.
        With two objectives nothing is stopped (Optuna's pruners compare one value), and so nothing is
        noted: the answer is False. So it is while the storage does not answer.
        """
        if not math.isfinite(value):
            raise ValueError(f"{uid} reported {value} at epoch {epoch}; a diverged trial ends, and reports nothing.")
        if len(self._metrics) > 1:
            return False
        return bool(self._write(functools.partial(self._note, uid, epoch, value)))

    def _note(self, uid: str, epoch: int, value: float) -> bool:
        number = self._number(uid)
        trial_id, trial = self._trial_id(number), self._refresh(number)
        if epoch >= trial.user_attrs.get("stop_at", math.inf):
            return True
        if epoch not in trial.intermediate_values:
            self._storage.set_trial_intermediate_value(trial_id, epoch, value)
            trial = self._refresh(number)
        if trial.last_step != epoch or not self._should_stop(trial, epoch):
            return False
        self._storage.set_trial_user_attr(trial_id, "stop_at", epoch)
        return True

    def _write(self, writing: Callable[[], object], again: Callable[[], object] | None = None) -> object:
        """Its answer; None while the storage is away: then it is owed, and done ``again``, though it may be done."""
        try:
            with self._line.trying():
                self._pay()
                return writing()
        except StorageAwayError:
            self._owed.append(again or writing)
            return None

    def _pay(self) -> None:
        while self._owed:
            self._owed[0]()
            self._owed.popleft()

    def _should_stop(self, trial: FrozenTrial, epoch: int) -> bool:
        if not self._pruner.prune(self._study, trial):  # asked in any case: it keeps its rungs' records
            return False
        others = sum(epoch in t.intermediate_values for t in self._known) - 1
        return others >= PATIENCE and epoch < self.config.epochs

    def tell(self, uid: str, result: TrialResult) -> None:
        """Note what became of a trial.

        finished: complete, with the objective's metrics (ValueError, and nothing noted, if one is missing or
        not finite). stopped: pruned. diverged: complete, at chance, so that the sampler learns to keep away.
        failed (a bug): neither, but its place in the budget is used up.
        """
        values = self._values(uid, result)
        tell = functools.partial(self._told, uid, result, values)
        self._write(tell, again=functools.partial(tell, again=True))

    def _told(self, uid: str, result: TrialResult, values: list[float] | None, *, again: bool = False) -> None:
        number = self._number(uid)
        if again and self._refresh(number).state.is_finished():  # told before, but for the answer
            return
        trial_id = self._trial_id(number)
        self._storage.set_trial_user_attr(trial_id, "status", result.status)
        if result.reason is not None:
            self._storage.set_trial_user_attr(trial_id, "reason", result.reason)
        if values is not None:
            self._study.tell(number, values)
        else:
            self._study.tell(number, state=TrialState.PRUNED if result.status == "stopped" else TrialState.FAIL)
        self._refresh(number)

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
        states = [t.state for t in self._known]
        diverged = sum(is_diverged(t) for t in self._known)
        return Counts(
            finished=states.count(TrialState.COMPLETE) - diverged,
            stopped=states.count(TrialState.PRUNED),
            diverged=diverged,
            failed=states.count(TrialState.FAIL),
            running=states.count(TrialState.RUNNING),
            remaining=max(0, self.budget - len(states)),
        )

    def best(self, n: int) -> list[Ranked]:
        """The n best of the trials that had their full budget, best first; of equals, the earlier one.

        With two objectives: n of their Pareto front, chosen by `bench.front.spread`, and in its order.
        """
        whole = [t for t in self._known if t.state == TrialState.COMPLETE and not is_diverged(t)]
        if len(self._metrics) > 1:
            points = [(t.values[0], t.values[1]) for t in whole]
            ranked = [whole[i] for i in spread(points, n, (self._chance, self._chance))]
        else:
            ranked = sorted(whole, key=lambda t: (-t.value, t.number))[:n]
        return [
            Ranked(uid=self._uid(t.number), number=t.number, params=dict(t.params), values=tuple(t.values))
            for t in ranked
        ]

    def _check_settings(self, identity: str | None) -> None:
        """Keep the settings (and on a server the identity) with the study; a UserError if it was begun with others."""
        if identity is not None and "identity" not in self._study.user_attrs:
            self._study.set_user_attr("identity", identity)
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

    def _uid(self, number: int) -> str:
        return f"{self.config.name}-{number:04d}"

    def _number(self, uid: str) -> int:
        number = int(uid.rpartition("-")[2])
        assert uid == self._uid(number), f"{uid} is no trial of {self.config.name}"
        return number

    def _trial_id(self, number: int) -> int:
        trial_id: int = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        return trial_id


def _of_an_older_release() -> dict[str, Any]:
    """What a setting was before it was one."""
    usual = StudyConfig(name="", rule="", arch="", dataset="").to_dict()
    return {**{key: value for key, value in usual.items() if key not in MAY_CHANGE}, "conditions": {}}
