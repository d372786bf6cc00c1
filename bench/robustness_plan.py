"""What a measurement of robustness runs: networks, noise in their training, and noise or attacks after it.

Each run has a uid that says what it is (configuration, evaluation, device and data), so a plan may grow by rules,
seeds, sites and levels, in any order, and what was run once is never run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.config import Strict, TrialConfig, UserError, check_levels, check_range, digest, study_name
from bench.evaluators.adversarial import ATTACKS
from bench.files import read_yaml
from bench.learning.rules import parse_rule
from bench.noise import SITES
from bench.recipes import recipe_of
from bench.runs import FIRST_CONFIRM_SEED, Planned

#: The rule that every other one stands beside.
REFERENCE = "backprop"
#: What differs between rules by right; everything else is the recipe, and must be the same.
OF_A_RULE = ("rule", "coefficients", "feedback_lr_factor", "feedback_every", "feedback_warmup_epochs", "seed")


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(Strict):
    """One measurement: which rules, seeds, sites and levels; kept with its results and in MLflow.

    ``rules``: by name, the whole TrialConfig of each (its seed is not used). ``levels``: by site or attack, rising,
    without 0, which is always measured. ``draws`` of noise an evaluation. ``update_on``: which parameters' updates
    are noisy. ``clip``: noisy pixels are cut to [0, 1], as in the -C benchmarks. ``gradients``: by which an attack
    goes (``true``, and ``feedback``: through B). ``attacked``: examples under attack; ``queries``: a black-box one's.
    """

    name: str
    rules: dict[str, dict[str, Any]]
    levels: dict[str, tuple[float, ...]]
    seeds: int = 5
    draws: int = 5
    update_on: Literal["both", "forward", "feedback"] = "both"
    clip: bool = False
    gradients: tuple[Literal["true", "feedback"], ...] = ("true",)
    attacked: int = 200
    queries: int = 1000

    def __post_init__(self) -> None:
        self._settle()
        for site, levels in self.levels.items():
            check_levels(site, levels)
        check_range("robustness", "seeds", self.seeds, 1, 1000)
        check_range("robustness", "draws", self.draws, 1, 10_000)
        check_range("robustness", "attacked", self.attacked, 1)
        check_range("robustness", "queries", self.queries, 1000)


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network to be measured: its configuration, the uid of its training, and where its weights are kept."""

    uid: str
    config: TrialConfig
    path: Path
    given: bool = False


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One evaluation of a network: the curves that it is a point of, and its level."""

    network: Network
    curves: tuple[str, ...]
    level: float
    evaluation: dict[str, Any] = field(default_factory=dict)


class Plan:
    """Everything that there is to run for one RobustnessConfig; ``key``: device and data."""

    def __init__(
        self, config: RobustnessConfig, *, key: str, folder: Path, given: Sequence[tuple[TrialConfig, Path]] = ()
    ) -> None:
        self.config, self._key, self._folder = config, key, folder
        self._given = {(c.rule, c.seed): path for c, path in given}
        self._bases = {rule: TrialConfig.from_dict(values) for rule, values in config.rules.items()}
        self.seeds = sorted({c.seed for c, _ in given}) or [FIRST_CONFIRM_SEED + i for i in range(config.seeds)]
        self.networks = list(self._networks())

    @property
    def evaluates(self) -> bool:
        """Whether anything is measured of trained networks, so that they must be kept until then."""
        return any(site != "update" for site in self.config.levels)

    def _uid(self, *what: Any) -> str:
        return f"{self.config.name}-{digest([*what, self._key])}"

    def _networks(self) -> Iterator[Network]:
        """One for each seed and rule; seeds outermost, so that rules can be compared before all is over."""
        for seed in self.seeds:
            for rule, base in self._bases.items():
                config = base.replace(seed=seed)
                uid, path = self._uid(config.to_dict()), self._given.get((rule, seed))
                kept = self._folder / "networks" / f"{uid}.pt"
                yield Network(uid=uid, config=config, path=path or kept, given=path is not None)

    def noisy(self, network: Network, level: float) -> tuple[str, TrialConfig]:
        """The training of this network with noise in its updates.

        Where there is nothing to be noisy (level 0; B's updates, in a rule whose B does not learn), it is the network's
        own training.
        """
        on = self.config.update_on
        if not level or (on == "feedback" and not parse_rule(network.config.rule).learns):
            return network.uid, network.config
        config = network.config.replace(update_noise=level, update_noise_on=on)
        return self._uid(config.to_dict()), config

    def trainings(self) -> dict[str, Planned]:
        """By uid, in the order in which they run: the networks, then those with noise in their updates."""
        tasks = {}
        for network in self.networks:
            if not network.given:
                keep = {"checkpoint": str(network.path.absolute())} if self.evaluates else {}
                tasks[network.uid] = _training(network.config, keep)
        for network in self.networks:
            for level in self.config.levels.get("update", ()):
                uid, config = self.noisy(network, level)
                tasks.setdefault(uid, _training(config, {}))
        return tasks

    def probes(self) -> dict[str, Probe]:
        """By uid: every evaluation of every network, at level 0 first."""
        found = {}
        for network in self.networks:
            for curves, evaluation in self._evaluations(network.config):
                for level in (0.0, *self.config.levels[evaluation["site"]]):
                    whole = {**evaluation, "level": level}
                    file = {"file": digest_of(network.path)} if network.given else {}
                    uid = self._uid(network.config.to_dict(), whole, file)
                    found[uid] = Probe(network=network, curves=curves, level=level, evaluation=whole)
        return found

    def _evaluations(self, config: TrialConfig) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        """(names of the curves, what is done): all that is settled but the level."""
        for site in self.config.levels:
            if site in ATTACKS:
                yield from self._attacks(config, site)
            elif site != "update":
                clips = {"clip": True} if site == "input" and self.config.clip else {}
                yield (site,), {"site": site, "draws": self.config.draws, **clips}

    def _attacks(self, config: TrialConfig, site: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        common = {"site": site, "attacked": self.config.attacked}
        curves = {"true": site, "feedback": f"{site} through B"}
        if not ATTACKS[site].uses_gradient:
            yield (site,), {**common, "gradient": "true", "queries": self.config.queries}
        elif config.rule == REFERENCE:  # its B is W: one attack, a point of both curves
            yield tuple(curves[g] for g in self.config.gradients), {**common, "gradient": "true"}
        else:
            yield from (((curves[g],), {**common, "gradient": g}) for g in self.config.gradients)

    def planned(self, probe: Probe) -> Planned:
        """The probe as a run."""
        options = {"network": str(probe.network.path.absolute()), "evaluation": probe.evaluation}
        return Planned(config=probe.network.config, kind="robustness", options=options, evaluation=probe.evaluation)


def _training(config: TrialConfig, keep: Mapping[str, Any]) -> Planned:
    return Planned(config=config, kind="robustness", options={"read_test": True, **keep})


def digest_of(path: Path) -> str:
    """Sixteen digits that tell this file's content from another's."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def rules_of(
    names: Sequence[str],
    *,
    arch: str,
    dataset: str,
    changes: Mapping[str, Any],
    files: Sequence[Path],
    results: Path,
    given: Sequence[TrialConfig] = (),
) -> dict[str, TrialConfig]:
    """The configuration of each rule, `REFERENCE` first; all with one recipe.

    Coefficients come from ``given`` (trained networks) or ``files`` (a best.yaml); else from the rule's own study under
    ``results``. The recipe comes from there too, with ``changes`` over it. UserError where a rule's coefficients are
    not known, or two recipes differ.
    """
    known = _from_files(files) | {c.rule: c.to_dict() for c in given}
    for values in known.values():
        _without_measurement(values)
    wanted = list(dict.fromkeys([*(parse_rule(n).name for n in names), *known]))
    if not wanted:
        raise UserError("name the rules to measure: --rule, --config, --study or --checkpoint.")
    found = {}
    for rule in wanted:
        values = known.get(rule) or _without_measurement(_from_study(rule, arch, dataset, results))
        if rule != REFERENCE or values:
            found[rule] = TrialConfig.from_dict(
                {**recipe_of(dataset, arch), "arch": arch, "dataset": dataset, **values, "rule": rule, **changes}
            )
    first = next(iter(found.values()), None)
    recipe = {**recipe_of(dataset, arch), "arch": arch, "dataset": dataset, **changes}
    if first is not None:
        recipe = {k: v for k, v in first.to_dict().items() if k not in OF_A_RULE}
    reference = found.pop(REFERENCE, None) or TrialConfig.from_dict({**recipe, "rule": REFERENCE})
    found = {REFERENCE: reference, **found}
    _check_recipes(found)
    if reference.update_noise:
        raise UserError("the recipe has update_noise, which is what is measured here; set update_noise=0.")
    return found


def _without_measurement(values: dict[str, Any]) -> dict[str, Any]:
    """What a search for robustness measured in its trials is no part of the network."""
    for name in ("noise_site", "noise_levels", "noise_draws"):
        values.pop(name, None)
    return values


def _from_files(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    for path in files:
        values = read_yaml(path)
        rule = parse_rule(str(values.get("rule", ""))).name
        if rule in known:
            raise UserError(f"{path}: rule {rule!r} is given twice; measure one configuration of a rule at a time.")
        known[rule] = values
    return known


def _from_study(rule: str, arch: str, dataset: str, results: Path) -> dict[str, Any]:
    """What the rule's own study found, if there is one; nothing for a rule that has nothing to be found."""
    path = results / study_name(rule, arch, dataset) / "best.yaml"
    if path.exists():
        return read_yaml(path)
    if parse_rule(rule).learns and not parse_rule(rule).task_gradient:
        raise UserError(
            f"rule {rule!r} needs coefficients, and there is no {path}: run `bench search --rule {rule} --arch {arch} "
            f"--dataset {dataset}` first, or give --config or --study."
        )
    return {}


def _check_recipes(configs: Mapping[str, TrialConfig]) -> None:
    reference = configs[REFERENCE].to_dict()
    for rule, config in configs.items():
        values = config.to_dict()
        if other := [k for k in values if k not in OF_A_RULE and values[k] != reference[k]]:
            first = f"{other[0]} is {values[other[0]]!r} for {rule!r} and {reference[other[0]]!r} for {REFERENCE!r}"
            raise UserError(
                f"the rules' recipes differ in {', '.join(other)} ({first}): such a comparison says nothing of the "
                f"rules. Set it for all, e.g. --set {other[0]}=… or --epochs."
            )


def default_levels(sites: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Each site's or attack's own grid."""
    return {site: SITES[site].levels if site in SITES else ATTACKS[site].levels for site in sites}
