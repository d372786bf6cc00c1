"""What a measurement of robustness runs: networks, noise in their training, and noise or attacks after it.

Each run has a uid that says what it is (configuration, evaluation, device and data), so a plan may grow by rules,
seeds, sites and levels, in any order, and what was run once is never run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.checkpoint import File, location
from bench.config import (
    Strict,
    TrialConfig,
    UserError,
    check_levels,
    check_range,
    digest,
    study_name,
    unknown,
)
from bench.evaluators.adversarial import ATTACKS, QUERIES
from bench.files import read_yaml
from bench.learning.rules import parse_rule
from bench.noise import SITES
from bench.place import Options, recipe_for
from bench.probe import digest_of
from bench.recipes import recipe_of
from bench.robustness_summary import THROUGH_B
from bench.runs import Planned
from bench.spaces import SETTINGS
from bench.tracking import STEPS_PER_LEVEL

#: Networks are measured with other seeds than those by which a search confirmed its best, which may have chosen it.
FIRST_MEASURE_SEED = 2000
#: The rule that every other one stands beside.
REFERENCE = "backprop"
#: What differs between rules by right; everything else is the recipe, and must be the same.
OF_A_RULE = (
    *("rule", "coefficients", "feedback_lr_factor", "feedback_every", "feedback_warmup_epochs"),
    *SETTINGS,
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(Strict):
    """One measurement: which rules, seeds, sites and levels; kept with its results and in MLflow.

    ``rules``: by name, the whole TrialConfig of each (its seed is not used). ``levels``: by site or attack, rising,
    without 0, which is always measured. ``draws`` of noise an evaluation. ``update_on``: which parameters' updates
    are noisy. ``clip``: noisy pixels are cut to [0, 1], as in the -C benchmarks. ``gradients``: by which an attack
    goes (``true``, and ``feedback``: through B). ``attacked``: examples under attack; ``queries``: a black-box one's.

    UserError for a level out of range, and for a setting without effect on what is measured.
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
    queries: int = QUERIES
    first_seed: int = FIRST_MEASURE_SEED

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels:
            raise UserError(f"robustness: nothing to measure; name sites or attacks: {', '.join([*SITES, *ATTACKS])}.")
        for site, levels in self.levels.items():
            _check_grid(site, levels)
        check_range("robustness", "seeds", self.seeds, 1, 1000)
        check_range("robustness", "first_seed", self.first_seed, 0, 2**31 - 1 - self.seeds)
        check_range("robustness", "draws", self.draws, 1, 10_000)
        check_range("robustness", "attacked", self.attacked, 1)
        check_range("robustness", "queries", self.queries, QUERIES, 10**6)
        if not self.gradients or len(set(self.gradients)) < len(self.gradients):
            raise UserError(f"--gradient {','.join(self.gradients)}: write true, feedback, or true,feedback.")
        self._check_effects()

    def without_effect(self) -> dict[str, tuple[str, str]]:
        """The settings that change nothing of what is measured: by name, the option, and what it needs."""
        attacks = [ATTACKS[site] for site in self.levels if site in ATTACKS]
        after = [site for site in self.levels if site in SITES and SITES[site].disturb]
        needs = {
            "draws": ("--draws", after, "a site of noise after training: weight, activation, input"),
            "update_on": ("--on", "update" in self.levels, "site update"),
            "clip": ("--clip", "input" in self.levels, "site input"),
            "gradients": ("--gradient", any(a.uses_gradient for a in attacks), "an attack by gradient: fgsm, pgd"),
            "attacked": ("--attacked", attacks, "an attack"),
            "queries": ("--queries", any(not a.uses_gradient for a in attacks), "a black-box attack: square"),
        }
        return {name: (option, what) for name, (option, there, what) in needs.items() if not there}

    def unaffected(self, rule: str) -> bool:
        """Whether noise in updates has nowhere to go: only B's are noisy, and this rule's B does not learn."""
        return self.update_on == "feedback" and not parse_rule(rule).learns

    def _check_effects(self) -> None:
        """Refuse a setting that changes nothing of what is measured."""
        for name, (option, what) in self.without_effect().items():
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{option} has no effect without {what}; leave it out.")
        if self.update_on == "feedback" and not any(parse_rule(rule).learns for rule in self.rules):
            raise UserError(
                "--on feedback has no effect: no B learns in these rules; use both or forward, or add a rule."
            )


def _check_grid(site: str, levels: Sequence[float]) -> None:
    """UserError for an unknown site, and for levels that cannot be measured, or told apart in MLflow."""
    if site not in SITES and site not in ATTACKS:
        raise unknown("site or attack", site, [*SITES, *ATTACKS])
    check_levels(site, levels)
    if site in ATTACKS and levels[-1] > 1:
        raise UserError(
            f"{site}: ε = {levels[-1]:g} is in pixel values of [0, 1], and must not be above 1; of 255 steps, 8 is "
            f"{8 / 255:.5f}."
        )
    if len({round(level * STEPS_PER_LEVEL) for level in (0.0, *levels)}) <= len(levels):
        raise UserError(f"{site}: two levels (or one and 0) are closer than {1 / STEPS_PER_LEVEL:g}; spread them.")


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network to be measured: its configuration, the uid of its training, and where its weights are kept.

    ``file``: the digest of the user's own checkpoint, which is measured as it is; None for one that is trained here.
    """

    uid: str
    config: TrialConfig
    path: File
    file: str | None = None

    @property
    def given(self) -> bool:
        return self.file is not None


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
        self,
        config: RobustnessConfig,
        *,
        key: str,
        folder: File,
        given: Sequence[tuple[TrialConfig, Path]] = (),
    ) -> None:
        """``folder``: of the networks; a URI, if they are kept on a store."""
        if given and "update" in config.levels:
            raise UserError("site update is noise in training: it cannot be measured of a --checkpoint.")
        self.config, self._key, self._folder = config, key, folder
        self._given = {(c.rule, c.seed): path for c, path in given}
        self._bases = {rule: TrialConfig.from_dict(values) for rule, values in config.rules.items()}
        self.seeds = sorted({c.seed for c, _ in given}) or [config.first_seed + i for i in range(config.seeds)]
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
                uid, path = self._uid(config.identity()), self._given.get((rule, seed))
                kept = self._folder / f"networks/{uid}.pt"
                yield Network(uid=uid, config=config, path=path or kept, file=digest_of(path) if path else None)

    def noisy(self, network: Network, level: float) -> tuple[str, TrialConfig]:
        """The training of this network with noise in its updates; at level 0 it is the network's own."""
        if not level:
            return network.uid, network.config
        on = self.config.update_on if parse_rule(network.config.rule).learns else "both"  # one name for one training
        config = network.config.replace(update_noise=level, update_noise_on=on)
        return self._uid(config.identity()), config

    def trainings(self) -> dict[str, Planned]:
        """By uid, in the order in which they run: the networks, then those with noise in their updates."""
        tasks = {}
        for network in self.networks:
            if not network.given:
                keep = {"checkpoint": location(network.path)} if self.evaluates else {}
                tasks[network.uid] = _training(network.config, keep)
        for network in self.networks:
            for level in () if self.config.unaffected(network.config.rule) else self.config.levels.get("update", ()):
                uid, config = self.noisy(network, level)
                tasks.setdefault(uid, _training(config, {}))
        return tasks

    def probes(self) -> dict[str, Probe]:
        """By uid: every evaluation of every network, at level 0 first."""
        found = {}
        for network in self.networks:
            for curves, evaluation in self._evaluations(network.config):
                for level in (0.0, *self.config.levels[evaluation["site"]]):
                    file = {"file": network.file} if network.given else {}
                    whole = {**evaluation, "level": level, **file}
                    uid = self._uid(network.config.identity(), whole)
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
        curves = {"true": site, "feedback": f"{site}{THROUGH_B}"}
        if not ATTACKS[site].uses_gradient:
            yield (site,), {**common, "gradient": "true", "queries": self.config.queries}
        elif parse_rule(config.rule).feedback == "weight":  # its B is W: one attack, a point of both curves
            yield tuple(curves[g] for g in self.config.gradients), {**common, "gradient": "true"}
        else:
            yield from (((curves[g],), {**common, "gradient": g}) for g in self.config.gradients)

    def planned(self, probe: Probe) -> Planned:
        """The probe as a run."""
        options = {"network": location(probe.network.path), "evaluation": probe.evaluation}
        return Planned(config=probe.network.config, kind="robustness", options=options, evaluation=probe.evaluation)


def _training(config: TrialConfig, keep: Mapping[str, Any]) -> Planned:
    return Planned(config=config, kind="robustness", options={"read_test": True, **keep})


def rules_of(
    names: Sequence[str],
    *,
    arch: str | None = None,
    dataset: str | None = None,
    changes: Mapping[str, Any],
    files: Sequence[Path] = (),
    options: Options,
    given: Sequence[TrialConfig] = (),
    begun: Mapping[str, Any] | None = None,
) -> dict[str, TrialConfig]:
    """The configuration of each rule, `REFERENCE` first; all with one recipe.

    Coefficients come from ``given`` (trained networks) or ``files`` (a best.yaml); else from the rule's own study under
    the results. The recipe is that of the first rule for which there is such a configuration (else the data set's; see
    `bench.place.recipe_for`, also for ``begun``), with ``changes`` over it: another optimizer brings its own recipe. So
    are the network and the data set, unless ``arch`` and ``dataset`` name others.
    UserError where a rule's coefficients are not known, or two recipes differ.
    """
    named = {name: value for name, value in (("arch", arch), ("dataset", dataset)) if value is not None}
    known = _from_files(files) | _from_networks(given, named)
    for values in known.values():
        _without_measurement(values)
    rules = list(dict.fromkeys([*(parse_rule(n).name for n in names), *known]))
    if not rules:
        raise UserError("name the rules to measure: --rule, --config, --study or --checkpoint.")
    first: Mapping[str, Any] = next(iter(known.values()), {})
    where = {name: first.get(name, getattr(TrialConfig, name)) for name in ("arch", "dataset")} | named
    named_one = {name: value for name, value in changes.items() if name == "optimizer"}
    base = {**recipe_for(where["dataset"], where["arch"], named_one, options, begun=begun), **where}
    for rule in rules:
        if rule not in known:
            known[rule] = _without_measurement(_from_study(rule, where["arch"], where["dataset"], options.results))
    shared = next(({**base, "optimizer": TrialConfig.optimizer, **known[rule]} for rule in rules if known[rule]), base)
    recipe = {name: value for name, value in shared.items() if name not in OF_A_RULE}
    if named_one and shared.get("optimizer", TrialConfig.optimizer) != named_one["optimizer"]:
        changes = {**recipe_of(where["dataset"], where["arch"], **named_one), **changes}
    found = {
        rule: TrialConfig.from_dict(
            {**(base if known[rule] else recipe), **known[rule], **named, "rule": rule, **changes}
        )
        for rule in rules
    }
    reference = found.pop(REFERENCE, None) or TrialConfig.from_dict({**recipe, **named, "rule": REFERENCE, **changes})
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
        if "rule" not in values:
            raise UserError(f"{path} names no rule; give a configuration, such as a study's best.yaml.")
        rule = parse_rule(str(values["rule"])).name
        if rule in known:
            raise UserError(f"{path}: rule {rule!r} is given twice; measure one configuration of a rule at a time.")
        known[rule] = values
    return known


def _from_networks(given: Sequence[TrialConfig], named: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configuration that all networks of a rule have; UserError where they differ in more than the seed."""
    known: dict[str, dict[str, Any]] = {}
    for config in given:
        values = config.to_dict()
        for name, value in named.items():
            if values[name] != value:
                raise UserError(f"--{name} {value}: the --checkpoint has {values[name]}; leave out --{name}.")
        first = known.setdefault(config.rule, values)
        if other := [k for k in values if k != "seed" and values[k] != first[k]]:
            raise UserError(
                f"the checkpoints of rule {config.rule!r} differ in {', '.join(other)}: they are no seeds of one "
                "configuration; measure them one at a time, each with a --name."
            )
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
            option = f"--{other[0]} …" if other[0] in ("arch", "dataset", "epochs") else f"--set {other[0]}=…"
            raise UserError(
                f"the rules' recipes differ in {', '.join(other)} ({first}): such a comparison says nothing of the "
                f"rules. Set it for all ({option}); of a --checkpoint, give those of one recipe."
            )
