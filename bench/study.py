"""The study: what to try next, when to stop it, and how it went. Optuna's record of it is the only one.

Everything that is decided here is a function of the seed and of that record, so a search that was killed
goes on as if it had not been: a proposal comes from a sampler made afresh for its trial's number, a stop
from the values reported so far, and a trial that a dead driver left running is handed out again as it
stands: same number, uid, parameters and reported values. Each change is one line of the journal, or one
transaction, so that there is nothing half done to repair.

The record is a journal in the study's folder, for one driver, or on a server, for several (`bench.drivers`): only
one of them asks at a time. While the server does not answer, what runs goes on: what is to be written is kept, and
written when it answers; and nothing new is handed out.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
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
from bench.drivers import Alone, Drivers, Together, patiently
from bench.front import spread
from bench.proposals import Conditions, Distributions, Proposal, Ranked, budget, check_warm, is_diverged, propose
from bench.storage import Line, StorageAwayError, hang_up, kept
from bench.stores import shown

optuna.logging.set_verbosity(optuna.logging.WARNING)

Say = Callable[[str], None]

#: What may change between one start of a study and the next.
MAY_CHANGE = ("trials", "confirm_top", "confirm_seeds")

#: Seconds for which what other drivers did need not be seen, where nothing is decided by it.
_RECENT = 1.0


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
    """One search. Kept in ``folder/journal.log``, one process at a time may have it open; in a storage, several."""

    def __init__(
        self,
        folder: Path,
        config: StudyConfig,
        distributions: Distributions,
        conditions: Conditions,
        chance: float,
        storage: BaseStorage,
        drivers: Drivers,
        line: Line,
        say: Say,
    ) -> None:
        """Use `Study.open`."""
        self.folder, self.config = folder, config
        self._distributions, self._conditions = dict(distributions), dict(conditions)
        self._chance, self._storage, self._drivers, self._line, self._say = chance, storage, drivers, line, say
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
        self._known: list[FrozenTrial] = []
        self._unfinished: set[int] = set()
        self._read()
        self._left = {t.number for t in self._free()}  # interrupted before this start, and said so

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
        with its switch. ``url``: of an Optuna storage, for several drivers; else it is a journal in the
        folder. A UserError if another process has the study open (that cannot be joined), if it was begun
        with other settings or is kept elsewhere, if its journal is damaged or its storage does not answer, or
        if its warm trials lie outside the space.
        """
        conditions = conditions or {}
        check_choices(config)
        assert not conditions or SAMPLERS[config.sampler].conditional, f"{config.sampler} cannot see conditions"
        check_warm(config, distributions, conditions)
        drivers: Drivers = Alone(folder) if url is None else Together(folder)
        try:
            with patiently(drivers), kept(folder, config.name, url, say) as (storage, identity):
                line = Line(f"the storage at {shown(url or str(folder))}", say)
                study = cls(folder, config, distributions, conditions, chance, storage, drivers, line, say)
                study._check_settings(identity)
        except BaseException:
            drivers.close()
            raise
        if drivers.others:
            say(f"{config.name}: joins {drivers.others} other driver{'s' if drivers.others > 1 else ''}.")
        if study._left:
            say(f"{config.name}: {len(study._left)} interrupted trials go on.")
        return study

    @property
    def drivers(self) -> Drivers:
        """Who else carries it out."""
        return self._drivers

    def gate(self) -> AbstractContextManager[None]:
        """Within, no other driver asks; `bench.drivers.LaterError` if that cannot be had now."""
        return self._drivers.gate()

    def close(self) -> None:
        """Let others open it."""
        hang_up(self._storage)
        self._drivers.close()

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

        `bench.drivers.LaterError` if that cannot be known now.
        """
        with self._drivers.gate(), self._line.trying():
            self._pay()
            trials = self._read()
            if left := self._free():
                self._take(left[0])
                return Proposal(uid=self._uid(left[0].number), number=left[0].number, params=dict(left[0].params))
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
            self._add(trial, number)
            self._drivers.own.add(uid)
            self._read_at = 0.0
            return Proposal(uid=uid, number=number, params=params)

    def _free(self) -> list[FrozenTrial]:
        """The running trials that no living driver has."""
        taken = self._drivers.own | self._drivers.taken
        running = [self._known[number] for number in sorted(self._unfinished)]
        return [t for t in running if t.state == TrialState.RUNNING and self._uid(t.number) not in taken]

    def _take(self, trial: FrozenTrial) -> None:
        uid = self._uid(trial.number)
        self._drivers.own.add(uid)
        if trial.number not in self._left:
            self._say(f"{uid}: the driver that had it is gone; it goes on here.")

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

    def _write(self, writing: Callable[[], object], again: Callable[[], object] | None = None) -> object:
        """Its answer; None while the storage is away: then it is owed, and done ``again``, though it may be done."""
        try:
            with self._line.trying():
                self._pay()
                return writing()
        except StorageAwayError:
            self._owed.append(again or writing)
            return None
        finally:
            self._read_at = 0.0

    def _pay(self) -> None:
        while self._owed:
            self._owed[0]()
            self._owed.popleft()

    def _should_stop(self, trial: FrozenTrial, epoch: int) -> bool:
        if not self._pruner.prune(self._study, trial):  # asked in any case: it keeps its rungs' records
            return False
        others = sum(epoch in t.intermediate_values for t in self._read()) - 1
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
        trial_id, number = self._trial_id(uid), self._number(uid)
        if again and self._storage.get_trial(trial_id).state.is_finished():  # told before, but for the answer
            self._drivers.own.discard(uid)
            return
        self._storage.set_trial_user_attr(trial_id, "status", result.status)
        if result.reason is not None:
            self._storage.set_trial_user_attr(trial_id, "reason", result.reason)
        if values is not None:
            self._study.tell(number, values)
        else:
            self._study.tell(number, state=TrialState.PRUNED if result.status == "stopped" else TrialState.FAIL)
        self._drivers.own.discard(uid)

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

    def _read(self) -> list[FrozenTrial]:
        """All trials. Where nobody else writes, only those are read again that were not over: a search of n trials
        would else read n² of them."""
        if self._known and not self._drivers.shared:
            for number in self._unfinished:
                self._known[number] = self._read_one(number)
            self._unfinished = {n for n in self._unfinished if not self._known[n].state.is_finished()}
        else:
            self._known = self._study.get_trials(deepcopy=False)
            self._unfinished = {t.number for t in self._known if not t.state.is_finished()}
        self._read_at = time.monotonic()
        return self._known

    def _read_one(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._trial_id(self._uid(number)))

    def _add(self, trial: FrozenTrial, number: int) -> None:
        self._study.add_trial(trial)
        self._known.append(self._read_one(number))  # nobody else asks now, so that it is the next
        self._unfinished.add(number)

    def _trials(self) -> list[FrozenTrial]:
        """As last known, while the storage is away or where it was asked just now."""
        if self._drivers.shared and time.monotonic() - self._read_at < _RECENT:
            return self._known
        try:
            with self._line.trying():
                return self._read()
        except StorageAwayError:
            return self._known

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
