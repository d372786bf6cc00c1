"""The numbers of a plan on its run in MLflow, from its summary; those of a search are `bench.summary.headline`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def robustness(summary: Mapping[str, Any]) -> dict[str, float]:
    """A measurement's own; none before it is complete: the area under a part of a grid is another number."""
    found: dict[str, float] = {}
    if not summary["complete"]:
        return found
    for site in summary["sites"]:
        for rule in site["rules"]:
            # a relative area of some of the networks, or by a gradient that is none, is no headline
            partial = rule["at_chance"] or site["true_site"]
            for name in ("clean", "area", *(() if partial else ("relative_area",))):
                if rule[name] is not None:
                    found[f"{site['site']}/{rule['rule']}/{name}"] = rule[name]["mean"]
    return found


def curves(summary: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """A measurement's curves of test accuracy, by their names in MLflow and the level."""
    found = {}
    for site in summary["sites"]:
        for rule in site["rules"]:
            levels = [{"level": 0.0, "acc": rule["clean"]}, *rule["curve"]]
            curve = {point["level"]: point["acc"]["mean"] for point in levels if point["acc"]}
            found[f"{site['site']}/{rule['rule']}/test_acc"] = curve
    return found


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
