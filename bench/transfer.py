"""`bench transfer`: do coefficients that were searched on one network serve another?

The searches of source and target are found, or run (`bench.plans`, `bench.programme`). What is this plan's own: the
source's best configuration and more of its configurations, spread over the search space, run on the target as they
are; the source's best there with fresh seeds, beside the target's own best; and, as a control, the target's best moved
back to the source. What comes of it is said in `bench.transfer_summary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from bench import headlines
from bench.campaign import Ready, confirm_seeds, trial_config
from bench.checkpoint import location
from bench.config import Strict, TrialConfig, check_range, digest
from bench.director import WAIT, Task, Wait
from bench.pages.transfer import transfer_page
from bench.place import Options, Place
from bench.plans import Wanted, plan, renamed
from bench.programme import Follower, Programme, Say, Searched, check_own_name, conclude, recorded
from bench.rows import Row, RowFile
from bench.runs import Outcome, Planned, Recorder, carry_out
from bench.space import UPDATE_FIELDS, Range, Space
from bench.spaces import DEFAULT
from bench.summary import REFERENCE, best_trial, same_setting
from bench.transfer_summary import Carried, Pair, summarize_transfer

BOOK = "transfer.yaml"


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
        self._settle()
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


class Transfer(Follower):
    """The runs of one transfer beside its searches, and the keeper of its rows."""

    def __init__(self, prepared: Prepared, tracker: Recorder, rows: RowFile) -> None:
        super().__init__(prepared.config.name, prepared.place, tracker, {"transfer": rows})
        self._config, self._routes, self._searches = prepared.config, prepared.routes, prepared.searches
        self._found: dict[Wanted, Searched] = {}
        self._plans: dict[str, Planned] = {}
        self._had: dict[str, Row] = {}  # what the searches have run already, by the name that it would have here

    def learned(self, found: Searched) -> None:
        wanted = next(w for w, ready in self._searches.items() if ready.config.name == found.ready.config.name)
        self._found[wanted] = found
        for known in (*found.confirmed, *found.controls):
            self._tracker.record(known["uid"], known["kind"], known)
        for row in (*found.searched, *found.confirmed):
            if row["status"] in ("finished", "diverged"):
                config = TrialConfig.from_dict(row["config"])
                self._had[self._uid(config, read_test=row["test_read"])] = row
        self._plans = {}
        for route in self._routes:
            if {route.source, route.target} <= set(self._found):
                self._plans |= self._of(route)

    # --- what there is to run

    @property
    def complete(self) -> bool:
        """Nothing is left to run, as far as the searches are known."""
        return not any(self._open(self._plans))

    def next(self) -> Task | Wait | None:
        for uid, planned in self._open(self._plans):
            return self._task(uid, planned.with_options(checkpoint=location(self._checkpoint(uid))))
        return WAIT if self._running else None

    def _of(self, route: Route) -> dict[str, Planned]:
        """The runs of a route, but for those that its searches had."""
        found: dict[str, Planned] = {}
        for row in self._carried(route.source):
            if row["status"] == "stopped":  # on the source it had no full budget yet
                found |= self._planned(self._moved(row, route.source, route.source))
            found |= self._planned(self._moved(row, route.source, route.target))
        for home, away in ((route.source, route.target), (route.target, route.source)):
            if (best := self._best(home)) is not None:
                for seed in confirm_seeds(self._searches[away].config):
                    found |= self._planned(self._moved(best, home, away, seed), read_test=True)
        return found

    def _moved(self, row: Row, home: Wanted, to: Wanted, seed: int | None = None) -> TrialConfig:
        """What the search at home chose for a row, as it is, on another network with that one's recipe."""
        known = row["config"]
        chosen = [name for name in UPDATE_FIELDS if name in self._searches[home].space.params]
        changes = {name: known[name] for name in ("coefficients", *chosen)}
        return trial_config(self._searches[to].config, changes, rule=known["rule"], seed=seed)

    def _uid(self, config: TrialConfig, *, read_test: bool) -> str:
        return f"{self.name}-{digest([config.identity(), read_test, self._place.key])}"

    def _planned(self, config: TrialConfig, *, read_test: bool = False) -> dict[str, Planned]:
        uid = self._uid(config, read_test=read_test)
        if uid in self._had:
            return {}
        return {uid: Planned(config=config, kind="transfer", options={"read_test": True} if read_test else {})}

    def _run_of(self, config: TrialConfig, *, read_test: bool = False) -> Row | None:
        uid = self._uid(config, read_test=read_test)
        return self._had.get(uid) or self._row_of(uid)

    def _carried(self, source: Wanted) -> list[Row]:
        """The source's best and more of its configurations, spread over its space; none if nothing finished there."""
        best = self._best(source)
        if best is None:
            return []
        searched = sorted(self._found[source].searched, key=lambda row: row["uid"])  # not as they came to an end
        rows = [row for row in searched if row["status"] != "failed"]
        first = next((i for i, row in enumerate(rows) if same_setting(row, best)), 0)
        points = [position(self._searches[source].space, row["config"]) for row in rows]
        return [rows[i] for i in spread_out(points, first, self._config.configs + 1)]

    def _best(self, wanted: Wanted) -> Row | None:
        """The best trial of a search, which is what it confirmed."""
        return best_trial(self._found[wanted].searched) if wanted in self._found else None

    # --- what is known

    def record_known(self) -> None:
        """Tell MLflow what an earlier start left as rows."""
        for known in self._done.values():
            self._tracker.record(known["uid"], known["kind"], known)

    def summary(self, *, over: bool) -> dict[str, Any]:
        """What `bench.transfer_summary` makes of it; ``over``: whether all searches are."""
        runs = [row["status"] for row in self._rows_of(self._plans)]
        budget = next(iter(self._searches.values())).config
        return {
            "study": self.name,
            "dataset": self._config.dataset,
            "trials": budget.trials,
            "epochs": budget.epochs,
            "configs": self._config.configs,
            "complete": over and self.complete and not self._running,
            "runs": {status: runs.count(status) for status in ("finished", "diverged", "failed")},
            **summarize_transfer([self._pair(r) for r in self._routes if {r.source, r.target} <= set(self._found)]),
        }

    def _pair(self, route: Route) -> Pair:
        source, target = self._found[route.source], self._found[route.target]
        place = target.ready.place
        ours, theirs = self._best(route.source), self._best(route.target)
        return Pair(
            rule=route.source.rule,
            space=route.source.space,
            source=route.source.arch,
            target=route.target.arch,
            carried=list(self._carried_rows(route)),
            native=_of_best(target),
            moved=self._confirmed_elsewhere(route.source, route.target),
            home=_of_best(source),
            back=self._confirmed_elsewhere(route.target, route.source),
            reference=[row for row in target.controls if row["config"]["rule"] == REFERENCE],
            chance=place.chance,
            examples=place.examples["val"],
            same=bool(ours and theirs and same_setting(ours, theirs)),
        )

    def _carried_rows(self, route: Route) -> Iterator[Carried]:
        for row in self._carried(route.source):
            home = self._run_of(self._moved(row, route.source, route.source)) if row["status"] == "stopped" else row
            if home is not None:
                yield Carried(home=home, away=self._run_of(self._moved(row, route.source, route.target)))

    def _confirmed_elsewhere(self, home: Wanted, away: Wanted) -> list[Row]:
        best = self._best(home)
        seeds = confirm_seeds(self._searches[away].config) if best is not None else []
        rows = [self._run_of(self._moved(best, home, away, seed), read_test=True) for seed in seeds if best is not None]
        return [row for row in rows if row is not None]

    def render(self) -> str:
        """The live display: a line for the whole, and one for each run under way."""
        done, whole = self._settled(self._plans), len(self._plans)
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
    tags = {"bench.rules": ",".join(config.rules), "bench.source": config.source}
    with recorded(config, config.name, BOOK, place, tags=tags, say=say) as tracker:
        source = Transfer(prepared, tracker, RowFile(folder / "rows.jsonl", say=say))
        source.record_known()
        source.sweep()
        with Programme(config.name, list(prepared.searches.values()), say=say, then=source) as programme:
            outcome = carry_out(programme, place, folder / "ray.log", trial=trial, say=say, watch=watch)
            programme.end(outcome)
            ended = [found for found in programme.found.values() if found.complete]
            over = len(ended) == len(prepared.searches)
            summary = {**source.summary(over=over), "busy": programme.busy}
        return outcome, conclude(
            tracker, folder, BOOK, summary, headline=headlines.transfer(summary), page=transfer_page, end=outcome
        )
