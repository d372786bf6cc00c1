"""`bench transfer`: do coefficients that were searched on one network serve another?

The searches of source and target are found, or run (`bench.plans`, `bench.programme`). What is this plan's own: the
source's best configuration and more of its configurations, spread over the search space, run on the target as they
are; the source's best there with fresh seeds, beside the target's own best; and, as a control, the target's best moved
back to the source. What comes of it is said in `bench.transfer_summary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.campaign import Ready, confirm_seeds, trial_config
from bench.checkpoint import location
from bench.config import Strict, TrialConfig, check_range, digest
from bench.director import WAIT, Task, Wait
from bench.kinds import KINDS
from bench.place import Options, Place
from bench.plans import Wanted, plan, read_searches, renamed
from bench.programme import Follower, Programme, Say, check_own_name, conclude, recorded
from bench.reading import read_config, read_rows
from bench.rows import Row, RowFile, attempts
from bench.runs import Outcome, Planned, Recorder, carry_out
from bench.searched import Searched
from bench.space import UPDATE_FIELDS, Range, Space
from bench.spaces import DEFAULT
from bench.summary import REFERENCE, best_trial, same_setting
from bench.transfer_summary import Carried, Pair, summarize_transfer


@dataclass(frozen=True, kw_only=True)
class TransferConfig(Strict):
    """What is carried over, and where to. ``configs``: how many configurations beside the best."""

    name: str
    rules: tuple[str, ...]
    source: str
    targets: tuple[str, ...]
    dataset: str
    spaces: tuple[str, ...] = (DEFAULT,)
    configs: int = 4
    both: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("transfer", "configs", self.configs, 0, 1000)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """An older plan names its spaces ``scalings``."""
        return super().from_dict(renamed(values, scalings="spaces"))


@dataclass(frozen=True, kw_only=True)
class Route:
    """One rule, from one network to another."""

    source: Wanted
    target: Wanted


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A transfer of which nothing can be refused any more, as far as one can know before it begins."""

    config: TransferConfig
    routes: tuple[Route, ...]
    searches: Mapping[Wanted, Ready]

    @property
    def place(self) -> Place:
        """Of its first search."""
        return next(iter(self.searches.values())).place


def prepare_transfer(
    config: TransferConfig,
    *,
    given: Mapping[str, Any],
    changes: Mapping[str, Any],
    options: Options,
) -> Prepared:
    """Find the searches, or plan them; ``given`` and ``changes`` as in `bench.plans.plan`, with its errors."""
    routes = routes_of(config)
    searches = plan(searches_of(routes), given=given, changes=changes, options=options)
    check_own_name(config.name, searches.values())
    return Prepared(config=config, routes=routes, searches=searches)


def routes_of(config: TransferConfig) -> tuple[Route, ...]:
    """Every way that something is carried, each once."""
    pairs = [(config.source, target) for target in config.targets]
    pairs += [(target, source) for source, target in pairs] if config.both else []
    routes = {
        Route(
            source=Wanted.of(rule, source, config.dataset, space),
            target=Wanted.of(rule, target, config.dataset, space),
        ): None
        for rule in config.rules
        for space in config.spaces
        for source, target in pairs
    }
    return tuple(routes)


def searches_of(routes: Sequence[Route]) -> list[Wanted]:
    """The searches at both ends of each."""
    return [w for route in routes for w in (route.source, route.target)]


class Plan:
    """The runs of a transfer beside its searches, as far as those are complete; what is known of them, as pairs.

    ``searches``: all that there are, in their order; ``runs``: by uid, but for those that the searches had.
    """

    def __init__(self, config: TransferConfig, searches: Mapping[Wanted, Searched]) -> None:
        self._config, self._key = config, next(iter(searches.values())).data.key
        self._found = {w: found for w, found in searches.items() if found.complete}
        self._routes = [r for r in routes_of(config) if {r.source, r.target} <= self._found.keys()]
        self._had: dict[str, Row] = {}  # what the searches have run already, by the name that it would have here
        for found in self._found.values():
            for row in (*found.searched, *found.confirmed):
                if row["status"] in ("finished", "diverged"):
                    trial = TrialConfig.from_dict(row["config"])
                    self._had[self._uid(trial, read_test=row["test_read"])] = row
        self.runs: dict[str, Planned] = {}
        for route in self._routes:
            self.runs |= self._of(route)

    # --- what there is to run

    def _of(self, route: Route) -> dict[str, Planned]:
        """The runs of a route, but for those that its searches had."""
        found: dict[str, Planned] = {}
        for row in self._carried(route.source):
            if row["status"] == "stopped":  # on the source it had no full budget yet
                found |= self._planned(self._moved(row, route.source, route.source))
            found |= self._planned(self._moved(row, route.source, route.target))
        for home, away in ((route.source, route.target), (route.target, route.source)):
            for config in self._best_moved(home, away):
                found |= self._planned(config, read_test=True)
        return found

    def _moved(self, row: Row, home: Wanted, to: Wanted, seed: int | None = None) -> TrialConfig:
        """What the search at home chose for a row, as it is, on another network with that one's recipe."""
        known, params = row["config"], Space.from_dict(self._found[home].config.space).params
        changes = {name: known[name] for name in ("coefficients", *(n for n in UPDATE_FIELDS if n in params))}
        return trial_config(self._found[to].config, changes, rule=known["rule"], seed=seed)

    def _best_moved(self, home: Wanted, away: Wanted) -> list[TrialConfig]:
        """The best of home elsewhere, with the fresh seeds there."""
        best = best_trial(self._found[home].searched)
        seeds = confirm_seeds(self._found[away].config)
        return [] if best is None else [self._moved(best, home, away, seed) for seed in seeds]

    def _uid(self, config: TrialConfig, *, read_test: bool) -> str:
        return f"{self._config.name}-{digest([config.identity(), read_test, self._key])}"

    def _planned(self, config: TrialConfig, *, read_test: bool = False) -> dict[str, Planned]:
        uid = self._uid(config, read_test=read_test)
        if uid in self._had:
            return {}
        return {uid: Planned(config=config, kind="transfer", options={"read_test": True} if read_test else {})}

    def _carried(self, source: Wanted) -> list[Row]:
        """The source's best and more of its configurations, spread over its space; none if nothing finished there."""
        found = self._found[source]
        best = best_trial(found.searched)
        if best is None:
            return []
        searched = sorted(found.searched, key=lambda row: row["uid"])  # not as they came to an end
        rows = [row for row in searched if row["status"] != "failed"]
        first = next((i for i, row in enumerate(rows) if same_setting(row, best)), 0)
        space = Space.from_dict(found.config.space)
        points = [position(space, row["config"]) for row in rows]
        return [rows[i] for i in spread_out(points, first, self._config.configs + 1)]

    # --- what is known

    def pairs(self, known: Mapping[str, Row]) -> list[Pair]:
        """Each route with its runs. ``known``: the last row of each of this plan's runs, by the uid of the first."""
        return [self._pair(route, {**known, **self._had}) for route in self._routes]

    def _pair(self, route: Route, known: Mapping[str, Row]) -> Pair:
        def confirmed(home: Wanted, away: Wanted) -> list[Row]:
            uids = [self._uid(config, read_test=True) for config in self._best_moved(home, away)]
            return [known[uid] for uid in uids if uid in known]

        source, target = self._found[route.source], self._found[route.target]
        ours, theirs = best_trial(source.searched), best_trial(target.searched)
        return Pair(
            rule=route.source.rule,
            space=route.source.space,
            source=route.source.arch,
            target=route.target.arch,
            carried=list(self._carried_rows(route, known)),
            native=_of_best(target),
            moved=confirmed(route.source, route.target),
            home=_of_best(source),
            back=confirmed(route.target, route.source),
            reference=[row for row in target.controls if row["config"]["rule"] == REFERENCE],
            chance=target.data.chance,
            examples=target.data.examples["val"],
            same=bool(ours and theirs and same_setting(ours, theirs)),
        )

    def _carried_rows(self, route: Route, known: Mapping[str, Row]) -> Iterator[Carried]:
        for row in self._carried(route.source):
            there, away = (
                known.get(self._uid(self._moved(row, route.source, to), read_test=False))
                for to in (route.source, route.target)
            )
            home = there if row["status"] == "stopped" else row
            if home is not None:
                yield Carried(home=home, away=away)


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of what lies in this folder and in those of its searches."""
    config = TransferConfig.from_dict(read_config(folder / KINDS["transfer"].manifest))
    searches = read_searches(folder.parent, searches_of(routes_of(config)))
    return summarize(config, searches, read_rows(folder / "rows.jsonl"))


def summarize(config: TransferConfig, searches: Mapping[Wanted, Searched], rows: Iterable[Row]) -> dict[str, Any]:
    """What `bench.transfer_summary` makes of the searches that are complete, and of the transfer's own rows.

    ``missing``: the names of the searches that are not there, if any.
    """
    plan, filed = Plan(config, searches), {row["uid"]: row for row in rows}
    tried = {uid: attempts(uid, filed)[:-1] for uid in (*plan.runs, *filed)}
    known = {uid: filed[names[-1]] for uid, names in tried.items() if names}
    runs = [known[uid]["status"] for uid in plan.runs if uid in known]
    budget = next(iter(searches.values())).config
    wanted = set(searches_of(routes_of(config)))
    missing = sorted({w.name for w in wanted} - {w.name for w in searches})
    return {
        "study": config.name,
        "dataset": config.dataset,
        "trials": budget.trials,
        "epochs": budget.epochs,
        "configs": config.configs,
        "complete": wanted <= {w for w, found in searches.items() if found.complete}
        and len(runs) == len(plan.runs)
        and "failed" not in runs,
        "runs": {status: runs.count(status) for status in ("finished", "diverged", "failed")},
        **summarize_transfer(plan.pairs(known)),
        **({"missing": missing} if missing else {}),
    }


class Transfer(Follower):
    """The runs of one transfer beside its searches, and the keeper of its rows."""

    def __init__(self, prepared: Prepared, tracker: Recorder, rows: RowFile) -> None:
        super().__init__(prepared.config.name, prepared.place, tracker, {"transfer": rows})
        self._config = prepared.config
        self._searches = {w: Searched(config=r.config, data=r.place.data) for w, r in prepared.searches.items()}
        self._runs: dict[str, Planned] = {}

    def learned(self, found: Searched) -> None:
        self.record([*found.confirmed, *found.controls])
        wanted = next(w for w, search in self._searches.items() if search.config.name == found.config.name)
        self._searches[wanted] = found
        self._runs = Plan(self._config, self._searches).runs

    @property
    def complete(self) -> bool:
        """Nothing is left to run, as far as the searches are known."""
        return not any(self._open(self._runs))

    def next(self) -> Task | Wait | None:
        for uid, planned in self._open(self._runs):
            return self._task(uid, planned.with_options(checkpoint=location(self._checkpoint(uid))))
        return WAIT if self._running else None

    def record_known(self) -> None:
        """Tell MLflow what an earlier start left as rows."""
        self.record(self._done.values())

    def summary(self) -> dict[str, Any]:
        """What is known by now."""
        return summarize(self._config, self._searches, self._done.values())

    def render(self) -> str:
        """The live display: a line for the whole, and one for each run under way."""
        done, whole = self._settled(self._runs), len(self._runs)
        line = f"carried over: {done}/{whole} runs · {self._time(whole - done)}"
        return "\n".join([line, *self._lines()])


def _of_best(found: Searched) -> list[Row]:
    """The confirmed rows of the best trial."""
    best = best_trial(found.searched)
    return [] if best is None else [row for row in found.confirmed if same_setting(row, best)]


def position(space: Space, config: Mapping[str, Any]) -> tuple[float, ...]:
    """Where a configuration lies in its space: each searched parameter in [0, 1], by its own scale."""
    values = {**config["coefficients"], **{name: config.get(name) for name in UPDATE_FIELDS}}
    found = []
    for name in space.searched:
        parameter, value = space.params[name], float(values[name])
        if not isinstance(parameter, Range):
            options = parameter.values()
            found.append(options.index(value) / max(1, len(options) - 1))
            continue
        low, high = parameter.min, parameter.max
        if parameter.scale == "log":
            low, high, value = math.log(low), math.log(high), math.log(value)
        found.append((value - low) / (high - low))
    return tuple(found)


def spread_out(points: Sequence[Sequence[float]], first: int, count: int) -> list[int]:
    """Indices of ``count`` points, ``first`` among them: each next one is the farthest from those before (Gonzalez
    1985, doi 10.1016/0304-3975(85)90224-5); of equals, the earlier. All of them, if there are not so many."""
    chosen = [first]
    while len(chosen) < min(count, len(points)):
        rest = [i for i in range(len(points)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(math.dist(points[i], points[c]) for c in chosen), -i)))
    return chosen


def transfer(
    prepared: Prepared,
    *,
    say: Say,
    watch: Callable[[Programme], Callable[[], None]] | None = None,
    trial: str = "bench.trial:run_trial",
) -> tuple[Outcome, dict[str, Any]]:
    """Run the transfer to its end, or go on with it; the summary of what is known by then."""
    config, place = prepared.config, prepared.place
    folder = place.options.results / config.name
    with recorded("transfer", config, config.name, place, say=say) as tracker:
        source = Transfer(prepared, tracker, RowFile(folder / "rows.jsonl", say=say))
        source.record_known()
        source.sweep()
        with Programme(config.name, list(prepared.searches.values()), say=say, then=source) as programme:
            outcome = carry_out(programme, place, folder / "ray.log", trial=trial, say=say, watch=watch)
            programme.end(outcome)
            summary = {**source.summary(), "busy": programme.busy}
        return outcome, conclude("transfer", tracker, folder, summary, end=outcome)
