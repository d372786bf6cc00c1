"""The runs of one search: what there is to run next, and what became of it.

One source hands out everything: trials while the study asks for them; the controls, which depend on nothing,
where a worker would else stand idle; and, when the last trial is over, the best configurations with fresh
seeds. What is finished is a row, and is never run again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkpoint import location
from bench.choices import OBJECTIVES
from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.director import WAIT, Task, Wait
from bench.place import Place
from bench.rows import Row, RowFile, control_uid, result_of
from bench.runs import FIRST_CONFIRM_SEED, Planned, Recorder, Running, Runs
from bench.space import Space
from bench.spaces import idle_settings
from bench.storage import StorageAwayError
from bench.study import Study
from bench.summary import summarize

#: The rules that every confirmed configuration stands beside.
CONTROLS = ("backprop", "feedback")


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A search of which nothing can be refused any more, as far as one can know before it begins."""

    config: StudyConfig
    space: Space
    place: Place

    @property
    def folder(self) -> Path:
        return self.place.options.results / self.config.name


def confirm_seeds(config: StudyConfig) -> list[int]:
    """Fresh ones: not the seed that the search itself trained with."""
    seeds = range(FIRST_CONFIRM_SEED, FIRST_CONFIRM_SEED + config.confirm_seeds + 1)
    return [s for s in seeds if s != config.seed][: config.confirm_seeds]


def trial_config(
    config: StudyConfig, changes: Mapping[str, Any], *, rule: str | None = None, seed: int | None = None
) -> TrialConfig:
    """One run of the study: its recipe, and these changes (of which ``rule`` may be one).

    A setting of the recipe that says what B sees, or what moves it, is left out where it has no effect on the rule.
    """
    values = {
        **config.recipe,
        "rule": rule or config.rule,
        "arch": config.arch,
        "dataset": config.dataset,
        "epochs": config.epochs,
        "seed": config.seed if seed is None else seed,
        **changes,
    }
    idle = idle_settings(values["rule"])
    values = {name: value for name, value in values.items() if name not in idle}
    if schedules := values.get("coefficient_schedules"):
        own = values.get("coefficients", {})
        values["coefficient_schedules"] = {name: each for name, each in schedules.items() if name in own}
    return TrialConfig.from_dict(values)


class Campaign(Runs):
    """The source of all runs of one search (an `director.Source`), and the keeper of its rows."""

    def __init__(self, ready: Ready, study: Study, tracker: Recorder, *, rows: RowFile, controls: RowFile) -> None:
        files = {"search": rows, "confirm": rows, "control": controls}
        super().__init__(ready.config.name, ready.place, tracker, files)  # type: ignore[arg-type]
        self.config, self._space, self._study = ready.config, ready.space, study
        self._objective = OBJECTIVES[ready.config.objective].metrics
        self._confirms: tuple[tuple[int, ...], dict[str, Planned]] | None = None

    # --- what there is to run

    @functools.cached_property
    def controls(self) -> dict[str, Planned]:
        """The rules that stand beside the confirmed, by uid: run once for a recipe, which studies share.

        No control's B learns. Where only its updates are noisy, there is nothing to be noisy: they train without noise.
        """
        quiet = {name: getattr(TrialConfig, name) for name in ("update_noise", "update_noise_on")}
        changes = quiet if self.config.recipe.get("update_noise_on") == "feedback" else {}
        tasks = {}
        for rule in CONTROLS:
            for seed in confirm_seeds(self.config) if rule != self.config.rule else ():
                config = trial_config(self.config, changes, rule=rule, seed=seed)
                uid = control_uid(config, self._place.key)
                tasks[uid] = Planned(config=config, kind="control", options={"read_test": True})
        return tasks

    def confirm_tasks(self) -> dict[str, Planned]:
        """By uid: the study's best, with fresh seeds."""
        best = self._study.best(self.config.confirm_top)
        numbers = tuple(each.number for each in best)
        if self._confirms is None or self._confirms[0] != numbers:  # asked ten times a second, and the same for long
            tasks = {}
            for each in best:
                for seed in confirm_seeds(self.config):
                    config = trial_config(self.config, self._space.changes(each.params), seed=seed)
                    uid = f"{self.config.name}-confirm-{config.digest()}"
                    tasks[uid] = Planned(config=config, kind="confirm", options={"read_test": True})
            self._confirms = numbers, tasks
        return self._confirms[1]

    @property
    def searching(self) -> bool:
        counts = self._study.counts()
        return bool(counts.running or counts.remaining)

    @property
    def complete(self) -> bool:
        """Nothing is left to run."""
        return not (self.searching or any(self._open(self.controls)) or any(self._open(self.confirm_tasks())))

    # --- director.Source

    def next(self) -> Task | Wait | None:
        try:
            while proposal := self._study.ask():
                config = trial_config(self.config, self._space.changes(proposal.params))
                if proposal.uid in self._done:  # killed between the row and the tell
                    self._study.tell(proposal.uid, self._known(proposal.uid, config))
                    continue
                return self._task(proposal.uid, Planned(config=config, kind="search"))
        except StorageAwayError:
            return WAIT
        if any(self._open(self.controls)):  # another search may have run some meanwhile, and be writing just now
            self._done |= RowFile(self._row_files["control"].path, say=lambda _: None).by_uid()
        for uid, plan in self._open(self.controls):
            return self._task(uid, plan)
        if self.searching:
            return WAIT
        for uid, plan in self._open(self.confirm_tasks()):
            return self._task(uid, plan)
        return WAIT if self.awaits_controls() else None

    def _known(self, uid: str, config: TrialConfig) -> TrialResult:
        """The trial's result, from its row; UserError if that is of another trial: the study was put back, or lost."""
        result = result_of(self._done[uid])
        if result.config != config:
            raise UserError(
                f"study {self.config.name!r}: the row {uid} is of other coefficients than the study's; restore the "
                "journal.log (or the storage) that belongs to rows.jsonl, or begin again under another --name."
            )
        return result

    def awaits_controls(self) -> bool:
        """Whether another search of the same programme has a control of ours under way."""
        following = map(self._next_attempt, self.controls)
        return any(uid is not None and uid not in self._running and self.elsewhere(uid) for uid in following)

    def _task(self, uid: str, plan: Planned) -> Task:
        return super()._task(uid, plan.with_options(checkpoint=location(self._checkpoint(uid))))

    def reported(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        super().reported(uid, epoch, metrics)
        if self._running[uid].plan.kind != "search":
            return False
        return self._study.report(uid, epoch, metrics[self._objective[0]])

    def _filed(self, uid: str, run: Running, result: TrialResult) -> None:
        if run.plan.kind == "search":
            self._study.tell(uid, result)

    # --- what is known

    def control_rows(self) -> list[Row]:
        return self._rows_of(self.controls)

    def confirm_rows(self) -> list[Row]:
        return self._rows_of(self.confirm_tasks())

    def search_rows(self) -> list[Row]:
        return [r for r in self._done.values() if r["kind"] == "search"]

    def summary(self) -> dict[str, Any]:
        return summarize(self.config, self.search_rows(), self.confirm_rows(), self.control_rows())

    def record_known(self) -> None:
        """Tell MLflow what an earlier start, or another study's controls, left as rows."""
        self.record([*self.search_rows(), *self.confirm_rows(), *self.control_rows()])

    def outlook(self) -> str:
        """What there is to do, in one line."""
        config = self.config
        lanes = 1 + len(config.recipe["noise_levels"]) if config.recipe.get("noise_site") == "update" else 1
        each = f", {lanes} networks each" if lanes > 1 else ""
        return f"{config.trials} trials of {config.epochs} epochs{each}"

    def render(self) -> str:
        """The live display: a line for the whole, and one for each run under way."""
        counts = self._study.counts()
        parts = [f"{counts.finished + counts.stopped + counts.diverged + counts.failed}/{self._study.budget} trials"]
        parts += [
            f"{n} {what}"
            for n, what in ((counts.stopped, "stopped"), (counts.diverged, "diverged"), (counts.failed, "failed"))
            if n
        ]
        controls, confirms = self.controls, {} if self.searching else self.confirm_tasks()
        parts.append(f"controls {self._settled(controls)}/{len(controls)}")
        if confirms:
            parts.append(f"confirmed {self._settled(confirms)}/{len(confirms)}")
        if len(self._objective) == 1 and (best := self._study.best(1)):
            what = "best area" if self._objective == ("val_area",) else "best"
            parts.append(f"{what} {best[0].value:.2%} (trial {best[0].number})")
        parts.append(self._time(self._left(counts.remaining + counts.running, controls, confirms)))
        return "\n".join([f"{self.config.name}: " + " · ".join(parts), *self._lines()])

    def _left(self, trials: int, controls: Mapping[str, Planned], confirms: Mapping[str, Planned]) -> int:
        """Runs to come. How many there are to confirm is known when the last trial is over: at most this many."""
        most = min(self.config.confirm_top, self._study.budget) * len(confirm_seeds(self.config))
        fresh = most if self.searching else len(confirms) - self._settled(confirms)
        return trials + len(controls) - self._settled(controls) + fresh
