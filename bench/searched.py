"""What a search left, as the studies that stand on searches read it: its trials, its confirmed best, its controls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.campaign import CONTROLS, confirm_seeds, trial_config
from bench.config import StudyConfig
from bench.reading import data_of, read_rows
from bench.rows import Data, Row, control_uid
from bench.space import Space
from bench.summary import best_trial, same_setting


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search left, or has by now."""

    config: StudyConfig
    data: Data
    searched: Sequence[Row] = ()
    confirmed: Sequence[Row] = ()
    controls: Sequence[Row] = ()
    complete: bool = False


def read_searched(
    results: Path, config: StudyConfig, controls: Iterable[Row], data: Data | None = None
) -> Searched | None:
    """What the rows of a search say by now, whoever ran them; None without any, where they must tell the ``data``.

    ``controls``: all rows of controls in these results, of which the search has its own.
    """
    folder = results / config.name
    rows = read_rows(folder / "rows.jsonl")
    if data is None and not rows:
        return None
    data = data or data_of(rows, folder)
    return Searched(
        config=config,
        data=data,
        searched=[row for row in rows if row["kind"] == "search"],
        confirmed=confirmed_rows(config, rows),
        controls=_controls_of(config, data.key, controls),
        complete=_is_complete(config, rows),
    )


def _controls_of(config: StudyConfig, key: str, controls: Iterable[Row]) -> list[Row]:
    """The controls that belong to a search, by the names under which `bench.campaign.Campaign` files them."""
    plain = [trial_config(config, {}, rule=rule, seed=s) for rule in CONTROLS for s in confirm_seeds(config)]
    names = {control_uid(each, key) for each in plain}
    return [row for row in controls if row["uid"].partition(".")[0] in names and row["status"] != "failed"]


def _is_complete(config: StudyConfig, rows: Sequence[Row]) -> bool:
    """Whether these rows are all that the search is to leave: its trials, and its best with every fresh seed."""
    trials = config.trials if Space.from_dict(config.space).searched else 1
    searched = len([row for row in rows if row["kind"] == "search"])
    if searched < trials or best_trial(rows) is None:
        return searched >= trials
    ours = [row for row in confirmed_rows(config, rows) if row["status"] != "failed"]
    return {row["config"]["seed"] for row in ours} >= set(confirm_seeds(config))


def confirmed_rows(config: StudyConfig, rows: Sequence[Row]) -> list[Row]:
    """The confirmed runs of the search's best trial: one for each fresh seed, of several attempts the last.

    Of what a smaller budget had as its best, and of further configurations that the search confirmed, none: the best of
    several confirmed ones would be one choice more than the other searches have.
    """
    best = best_trial(rows)
    found: dict[int, Row] = {}
    for row in rows:
        seed = row["config"]["seed"]
        if row["kind"] == "confirm" and best is not None and same_setting(row, best) and seed in confirm_seeds(config):
            found[seed] = row
    return [found[seed] for seed in sorted(found)]
