"""The kinds of studies: how each is told from the others, and who reads, draws and counts it.

To add one: a row here, and its own files. What a row names as ``module:function`` is imported when it is asked for,
because most of it needs torch, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Config = Mapping[str, Any]


def _itself(config: Config) -> Config:
    return config


def _first(configs: Mapping[str, Config]) -> Config:
    return next(iter(configs.values()))


@dataclass(frozen=True, kw_only=True)
class StudyKind:
    """A kind of study.

    Attributes:
        manifest: the file in a study's folder that keeps its configuration.
        what: in words, with its article; ``plural``: the heading of its table in the index of pages.
        read: gives the summary of what lies in a folder; of a search, what `bench.reading.read_search` gives.
        page: makes the page of a summary.
        line: the line of a summary in the index of pages: the fields of `bench.pages.index.Entry` that are its own.
        headline: the numbers of a summary for MLflow, by name.
        curves: its curves for MLflow, by name and level; empty: there are none.
        tags: the settings that are tags of its run in MLflow, ``bench.<name>``.
        dataset: the part of its configuration that names the data set.
        rows: the kinds of result rows from which one is known where there is no manifest.
    """

    manifest: str
    what: str
    plural: str
    read: str
    page: str
    line: str
    headline: str
    curves: str = ""
    tags: Callable[[Config], dict[str, Any]]
    dataset: Callable[[Config], Config] = _itself
    rows: tuple[str, ...] = ()

    def run_tags(self, kept: Config) -> dict[str, Any]:
        """The tags of its run in MLflow, of what its manifest keeps."""
        found = {f"bench.{name}": value for name, value in self.tags(kept["config"]).items()}
        return found | ({"bench.code": kept["code"]} if "code" in kept else {})

    def load(self, part: Literal["read", "page", "line", "headline", "curves"]) -> Any:
        """The function that this field names."""
        module, _, name = getattr(self, part).partition(":")
        return getattr(import_module(f"bench.{module}"), name)


KINDS = {
    "search": StudyKind(
        manifest="study.yaml",
        what="a search",
        plural="Searches",
        read="reading:read_search",
        page="pages.search:search_page",
        line="report:search_line",
        headline="summary:headline",
        tags=lambda config: {name: config[name] for name in ("rule", "arch", "seed")},
        rows=("search", "confirm"),
    ),
    "robustness": StudyKind(
        manifest="robustness.yaml",
        what="a measurement of robustness",
        plural="Robustness",
        read="robustness_points:read_summary",
        page="pages.robustness:robustness_page",
        line="report:robustness_line",
        headline="robustness_summary:headline",
        curves="robustness_summary:curves",
        tags=lambda config: {"arch": _first(config["rules"])["arch"], "rules": ",".join(config["rules"])},
        dataset=lambda config: _first(config["rules"]),
        rows=("robustness",),
    ),
    "transfer": StudyKind(
        manifest="transfer.yaml",
        what="a transfer",
        plural="Transfers",
        read="transfer:read_summary",
        page="pages.transfer:transfer_page",
        line="report:transfer_line",
        headline="transfer_summary:headline",
        tags=lambda config: {"rules": ",".join(config["rules"]), "source": config["source"]},
        rows=("transfer",),
    ),
    "matrix": StudyKind(
        manifest="matrix.yaml",
        what="a matrix",
        plural="Matrices",
        read="matrix:read_summary",
        page="pages.matrix:matrix_page",
        line="report:matrix_line",
        headline="matrix_summary:headline",
        tags=lambda config: {"archs": ",".join(config["archs"]), "primitives": ",".join(config["primitives"])},
    ),
    "confirmation": StudyKind(
        manifest="confirmation.yaml",
        what="a confirmation",
        plural="Confirmations",
        read="confirmation:read_summary",
        page="confirmation:confirmation_page",
        line="report:confirmation_line",
        headline="confirmation:headline",
        tags=lambda config: {"configurations": ",".join(config["configs"])},
        dataset=lambda config: _first(config["configs"]),
    ),
}
