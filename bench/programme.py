"""Several searches, and what follows from them, as one source of runs: no worker is idle while any has a run to give.

A search is opened when its turn comes and closed when it is over, so that few are open at a time. What is finished is
rows, and is never run again; a search that another process has is left to it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.campaign import Campaign, Ready
from bench.config import Strict, TrialResult, UserError
from bench.director import WAIT, Task, Wait
from bench.files import read_yaml, write_atomic, write_yaml
from bench.journal import BusyError, check_kind, claim
from bench.kinds import KINDS
from bench.pages.render import PAGE, write
from bench.place import Place
from bench.runs import Outcome, Runs
from bench.search import Open, opened
from bench.searched import Searched
from bench.tracking import Tracker

Say = Callable[[str], None]


class Follower(Runs):
    """Runs that depend on what searches found."""

    def learned(self, found: Searched) -> None:
        """A search is over."""
        raise NotImplementedError


@dataclass
class _Member:
    ready: Ready
    stack: ExitStack = field(default_factory=ExitStack)
    open: Open | None = None
    over: bool = False


class Programme:
    """An `director.Source` made of searches in their order; ``then`` is told of each that is over, and runs after them.

    A context: what is open when it is left is closed (by an exception: as failed). ``busy``: the searches that other
    processes have.
    """

    def __init__(self, name: str, searches: Sequence[Ready], *, say: Say, then: Follower | None = None) -> None:
        self.name, self._say, self._then = name, say, then
        self._members = [_Member(ready) for ready in searches]
        self._owner: dict[str, Runs] = {}
        self.found: dict[str, Searched] = {}
        self.busy: list[str] = []
        if then is not None:
            then.elsewhere = self._runs_beside(then)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as all_of_them:
            for member in self._members:
                all_of_them.push(member.stack.__exit__)

    # --- director.Source

    def next(self) -> Task | Wait | None:
        waiting = False
        for member in self._members:
            if member.over or (campaign := self._campaign(member)) is None:
                continue
            task = campaign.next()
            if isinstance(task, Task):
                self._owner[task.uid] = campaign
                return task
            if task is WAIT or campaign.running:
                waiting = True
            else:
                self._close(member, "done")
        task = None if self._then is None else self._then.next()
        if isinstance(task, Task) and self._then is not None:
            self._owner[task.uid] = self._then
            return task
        return WAIT if waiting or task is WAIT else None

    def started(self, uid: str) -> None:
        self._owner[uid].started(uid)

    def reported(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        return self._owner[uid].reported(uid, epoch, metrics)

    def completed(self, uid: str, result: TrialResult) -> None:
        self._owner.pop(uid).completed(uid, result)

    # --- its searches

    @property
    def complete(self) -> bool:
        """Nothing is left to run. The searches that turn out to be over are closed by this, up to one that is not."""
        for member in self._members:
            if member.over or (campaign := self._campaign(member)) is None:
                continue
            if not campaign.complete:
                return False
            self._close(member, "known")
        return self._then is None or self._then.complete

    def end(self, outcome: Outcome) -> None:
        """Close what is still open, and look at what was not reached."""
        for member in self._members:
            if member.open is not None and not member.over:
                self._close(member, outcome)

    def _campaign(self, member: _Member) -> Campaign | None:
        """The member's source of runs, opened when it is first asked for; None if another process has it."""
        if member.open is None:
            try:
                member.open = member.stack.enter_context(opened(member.ready, say=self._say))
            except BusyError as error:
                self._say(f"{self.name}: left out, for now: {error}")
                self.busy.append(member.ready.config.name)
                member.over = True
                return None
            member.open.campaign.elsewhere = self._runs_beside(member.open.campaign)
        return member.open.campaign

    def _runs_beside(self, source: Runs) -> Callable[[str], bool]:
        return lambda uid: self._owner.get(uid, source) is not source

    def _close(self, member: _Member, outcome: Outcome) -> None:
        assert member.open is not None
        campaign = member.open.campaign
        member.open.finish(outcome)
        found = Searched(
            config=member.ready.config,
            data=member.ready.place.data,
            searched=campaign.search_rows(),
            confirmed=campaign.confirm_rows(),
            controls=campaign.control_rows(),
            complete=campaign.complete and not campaign.running and not campaign.awaits_controls(),
        )
        self.found[member.ready.config.name] = found
        member.over = True
        member.stack.close()
        if self._then is not None and found.complete:
            self._then.learned(found)

    # --- what is said of them

    def outlook(self) -> str:
        """What there is to do, in one line."""
        config = self._members[0].ready.config
        left = sum(not member.over for member in self._members)
        known = f", of which {len(self._members) - left} are known" if left < len(self._members) else ""
        return f"{len(self._members)} searches of {config.trials} trials of {config.epochs} epochs{known}"

    def render(self) -> str:
        """The live display: a line for the whole, then the searches that are under way."""
        over = sum(member.over for member in self._members)
        lines = [f"{self.name}: {over}/{len(self._members)} searches"]
        lines += [m.open.campaign.render() for m in self._members if m.open is not None and not m.over]
        if self._then is not None and self._then.running:
            lines.append(self._then.render())
        return "\n".join(lines)


@contextmanager
def recorded(of: str, config: Strict, name: str, place: Place, *, say: Say) -> Iterator[Tracker]:
    """A plan's own folder, claimed for this process, and its run in MLflow. ``of``: its kind, of `bench.kinds.KINDS`.

    UserError where the folder is of something else, was begun with other data or another kind of device, or with a plan
    that this one does not cover.
    """
    folder, kind = place.options.results / name, KINDS[of]
    with claim(folder):
        check_kind(folder, kind.manifest)
        path = folder / kind.manifest
        before = read_yaml(path) if path.exists() else {}
        if before and before.get("runs_on") != place.key:
            raise UserError(
                f"{name!r} was begun on {before.get('runs_on')!r} (device, digest of the data), and this is "
                f"{place.key!r}; use the same, or another --name."
            )
        check_covers(name, before.get("config", {}), config)
        identity = str(before.get("id") or uuid.uuid4().hex)
        kept: dict[str, Any] = {"id": identity, "runs_on": place.key, "config": config.to_dict()}
        write_yaml(path, kept)
        results = place.options.results
        with Tracker.open(uri=place.uri, artifacts=place.artifacts, results=results, say=say) as tracker:
            tracker.study(name, config=kept["config"], tags=kind.run_tags(kept), identity=identity)
            tracker.dataset(*place.dataset)
            yield tracker


def check_covers(name: str, before: Mapping[str, Any], config: Strict) -> None:
    """A plan may grow: lists by further entries, numbers upwards. UserError for any other change."""
    for key, now in config.to_dict().items():
        was = before.get(key, now)
        if isinstance(now, list):
            covers = isinstance(was, list) and set(was) <= set(now)
        else:
            covers = was == now or (isinstance(now, int) and isinstance(was, int) and was <= now)
        if not covers:
            raise UserError(
                f"{name!r} was begun with {key} = {was}, which {now} does not cover: one folder is one plan, which may "
                "grow; name those, too, or give this another --name."
            )


def check_own_name(name: str, searches: Iterable[Ready]) -> None:
    """UserError for a plan that has the name of one of its own searches: one folder cannot be both."""
    if name in {ready.config.name for ready in searches}:
        raise UserError(f"--name {name}: that is one of its own searches; give the whole another --name.")


def conclude(
    of: str, tracker: Tracker, folder: Path, summary: Mapping[str, Any], *, end: Outcome, files: Sequence[Path] = ()
) -> dict[str, Any]:
    """Keep the summary, its page and these ``files`` beside the plan and in MLflow; the summary with where it is."""
    kind = KINDS[of]
    if end != "interrupted":  # then the user waits for the end
        write(kind.load("page")(summary), folder / PAGE)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    for name, curve in kind.load("curves")(summary).items() if kind.curves else ():
        tracker.curve(name, curve)
    if numbers := kind.load("headline")(summary):
        tracker.headline(numbers)
    own = [folder / name for name in (kind.manifest, "rows.jsonl", "summary.json", PAGE)]
    tracker.artifacts([path for path in (*own, *files) if path.exists()])
    tracker.close("KILLED" if end == "interrupted" else "FINISHED")
    return {**summary, "folder": str(folder), "mlflow": tracker.link()}
