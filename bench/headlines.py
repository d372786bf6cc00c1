"""The numbers of a plan on its run in MLflow, from its summary; those of a search are `bench.summary.headline`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def transfer(summary: Mapping[str, Any]) -> dict[str, float]:
    """Regrets, rank correlations and lost shares, by pair."""
    found = {}
    for pair in summary["pairs"]:
        where = f"{pair['rule']} {pair['space']}/{pair['source']} to {pair['target']}"
        for metric, regret in pair["regret"].items():
            if regret:
                found[f"{where}/regret_{metric}"] = regret["mean"]
        if pair["rank"]["rho"] is not None:
            found[f"{where}/rank_correlation"] = pair["rank"]["rho"]
        if pair["lost"]["of"]:
            found[f"{where}/lost_share"] = pair["lost"]["share"]
    return found


def matrix(summary: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracies of the subsets and effects of the primitives, by network."""
    found = {}
    for arch, whole in summary["archs"].items():
        for line in whole["table"]:
            if line["test_acc"]:
                found[f"{arch}/{line['name']}/test_acc"] = line["test_acc"]["mean"]
        for effect in whole["effects"]:
            if effect["test_acc"]:
                found[f"{arch}/effect/{effect['primitive']}"] = effect["test_acc"]["mean"]
    return found


def confirmation(summary: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracy of each configuration, and its difference to the first; none before all are trained."""
    lines = summary["studies"] if summary["complete"] else ()
    found = {f"{line['study']}/test_acc": line["test_acc"]["mean"] for line in lines}
    return found | {f"{line['study']}/versus_first": line["test_acc_versus_first"]["mean"] for line in lines[1:]}
