"""`bench search`: Ray runs the trials, the study proposes, the best is confirmed beside its controls."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.campaign import Campaign, Ready, trial_config
from bench.choices import OBJECTIVES, check_choices
from bench.config import StudyConfig, UserError
from bench.files import read_yaml, write_atomic, write_yaml
from bench.front import spread
from bench.journal import check_kind
from bench.kinds import KINDS
from bench.learning.rules import parse_rule
from bench.pages.render import PAGE, write
from bench.pages.search import search_page
from bench.place import Options, Place, survey
from bench.provenance import code_of, provenance
from bench.rows import RowFile
from bench.runs import Outcome, carry_out
from bench.space import Space
from bench.study import Study
from bench.summary import headline
from bench.tracking import Tracker
from bench.training import resolve_coefficients


def check(config: StudyConfig, space: Space, options: Options, place: Place | None = None) -> Ready:
    """Everything that a search needs, tried out; UserError for what cannot work, before anything is written.

    ``place``: that of another search with the same network, data and recipe, which is then not tried out again.
    """
    check_choices(config)
    lowest = trial_config(config, space.changes(space.corners()[0]))
    resolve_coefficients(lowest, parse_rule(lowest.rule))
    return Ready(config=config, space=space, place=survey(options, lowest) if place is None else place)


class Open:
    """A search under way, and its run in MLflow. Made by `opened`."""

    def __init__(self, folder: Path, campaign: Campaign, tracker: Tracker) -> None:
        self.campaign, self._folder, self._tracker = campaign, folder, tracker

    def finish(self, outcome: Outcome) -> dict[str, Any]:
        """Write and record what is known by now; the summary of it."""
        folder, tracker = self._folder, self._tracker
        self.campaign.sweep(at_the_end=True)
        summary = self.campaign.summary()
        _write_best(folder, self.campaign, summary)
        if summary["objective"] == "both":
            _write_front(folder, summary)
        tracker.headline(headline(summary))
        if outcome != "interrupted":  # then the user waits for the end
            rows = (self.campaign.search_rows(), self.campaign.confirm_rows(), self.campaign.control_rows())
            write(search_page(summary, *rows), folder / PAGE)
        files = ("study.yaml", "rows.jsonl", "journal.log", "storage.yaml", "best.yaml", "front.json", PAGE)
        tracker.artifacts([folder / name for name in files if (folder / name).exists()])
        tracker.close("KILLED" if outcome == "interrupted" else "FINISHED")
        return {**summary, "folder": str(folder), "mlflow": tracker.link()}


@contextmanager
def opened(ready: Ready, *, say: Callable[[str], None]) -> Iterator[Open]:
    """Begin a search, or go on with the one in its folder; nothing is run yet."""
    config, place, folder = ready.config, ready.place, ready.folder
    with Study.open(
        folder,
        config,
        ready.space.distributions(),
        say=say,
        chance=place.chance,
        conditions=ready.space.conditions(),
        url=place.options.storage,
    ) as study:
        book = _write_config(ready, say)
        results = place.options.results
        with Tracker.open(uri=place.uri, artifacts=place.artifacts, results=results, say=say) as tracker:
            rows = RowFile(folder / "rows.jsonl", say=say)
            controls = RowFile(place.options.results / "controls" / "rows.jsonl", say=say)
            campaign = Campaign(ready, study, tracker, rows=rows, controls=controls)
            tags = KINDS["search"].run_tags(book)
            tracker.study(config.name, config=config.to_dict(), tags=tags, identity=book["id"])
            tracker.dataset(*place.dataset)
            campaign.record_known()
            campaign.sweep()
            yield Open(folder, campaign, tracker)


def search(
    ready: Ready,
    *,
    say: Callable[[str], None],
    watch: Callable[[Campaign], Callable[[], None]] | None = None,
    trial: str = "bench.trial:run_trial",
) -> tuple[Outcome, dict[str, Any]]:
    """Run the search to its end, or go on with it; the summary of what is known by then.

    "known": everything had been run before. ``watch`` gets the campaign and returns what is called about
    ten times a second. ``trial``: as in `bench.engine.run`.
    """
    with opened(ready, say=say) as it:
        outcome = carry_out(it.campaign, ready.place, ready.folder / "ray.log", trial=trial, say=say, watch=watch)
        return outcome, it.finish(outcome)


def _write_config(ready: Ready, say: Callable[[str], None]) -> dict[str, Any]:
    """Keep the resolved configuration with the study; with the id by which MLflow tells it from others of its name.

    ``code``: all that it was carried out with, in order. UserError for a smaller budget than before, for other data or
    another kind of device.
    """
    config, path = ready.config, ready.folder / "study.yaml"
    check_kind(ready.folder, "study.yaml")
    before = read_yaml(path) if path.exists() else {}
    known = before.get("config", {})
    if before and not (isinstance(known, dict) and isinstance(known.get("trials"), int)):
        raise UserError(f"{path} is damaged: it has no config with its trials. Mend it, or use another --name.")
    if before and known["trials"] > config.trials:
        raise UserError(
            f"study {config.name!r} has a budget of {known['trials']} trials; --trials may grow, not shrink."
        )
    if before and before.get("runs_on") != ready.place.key:
        raise UserError(
            f"study {config.name!r} was begun on {before.get('runs_on')!r} (device, digest of the data), and this is "
            f"{ready.place.key!r}; use the same, or another --name."
        )
    identity = str(before.get("id") or uuid.uuid4().hex)
    code = _code(before, config.name, say)
    book = {"id": identity, "runs_on": ready.place.key, "code": code, "config": config.to_dict()}
    write_yaml(path, book)
    return book


def _code(before: Mapping[str, Any], name: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The code of all starts, the last one this one's; a change is said."""
    known, now = list(before.get("code") or ()), code_of(provenance("cpu"))
    if known and (changed := [f"{k} was {known[-1].get(k)}, is {v}" for k, v in now.items() if known[-1].get(k) != v]):
        say(f"{name}: goes on with other code ({'; '.join(changed)}); each row says which it was made with.")
    return known if known[-1:] == [now] else [*known, now]


def _write_best(folder: Path, campaign: Campaign, summary: Mapping[str, Any]) -> None:
    """The best confirmed configuration (before any is: the search's best), as `bench train --config` takes it.

    Of two objectives: the best compromise, with the largest product of what both are above chance.
    """
    metrics = OBJECTIVES[campaign.config.objective].metrics
    found = [(e["config"], [e[m]["mean"] for m in metrics]) for e in summary["confirmed"] if all(e[m] for m in metrics)]
    if not found:
        finished = [r for r in campaign.search_rows() if r["status"] == "finished"]
        found = [(r["config"], [r["metrics"][m] for m in metrics]) for r in finished]
    if not found:
        return
    if len(metrics) == 1:
        best, _ = max(found, key=lambda f: f[1][0])
    else:
        chance = campaign.chance
        best = found[spread([(values[0], values[1]) for _, values in found], 1, (chance, chance))[0]][0]
    write_yaml(folder / "best.yaml", {**best, "seed": campaign.config.seed})


def _write_front(folder: Path, summary: Mapping[str, Any]) -> None:
    """The confirmed configurations of the two objectives, with their estimates; ``front``: not dominated by another."""
    entries = [{"front": found.get("front", False), **found} for found in summary["confirmed"]]
    write_atomic(folder / "front.json", json.dumps({"noise": summary["noise"], "confirmed": entries}, indent=1) + "\n")
