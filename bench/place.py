"""Where runs run: the machine, its share for each, the data and the stores, tried out before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.config import TrialConfig, UserError
from bench.evaluators.adversarial import ATTACKS
from bench.joining import check_address
from bench.noise import SITES
from bench.provenance import usable_cores
from bench.recipes import recipe_of
from bench.remote_results import RemotePath
from bench.rows import Data
from bench.stores import check_storage, check_uri, embedded
from bench.training import check_together, pick_device, prepare, update_levels


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a command runs; none of it is part of what is found. ``concurrent``: None is one trial per core (or GPU).

    ``address``: of a Ray cluster to join; None: one of our own, on this machine. ``storage``: the URL of an Optuna
    storage; None: a journal in the study's folder. ``gpus_per_trial``: None divides what there is.
    ``store``: the URI that ``results`` is this machine's copy of; None: they are kept where they are.
    """

    results: Path = Path("results")
    data_dir: str | None = None
    device: str = "auto"
    concurrent: int | None = None
    tracking_uri: str | None = None
    address: str | None = None
    storage: str | None = None
    gpus_per_trial: float | None = None
    workers_per_trial: int = 1
    store: str | None = None

    @property
    def shown(self) -> str:
        """``results`` as the user named them."""
        return self.store or str(self.results)

    def kept(self, study: str) -> Path | RemotePath:
        """Where what workers save of a study is: on the store, if there is one, so that any machine goes on from it."""
        return RemotePath(self.store) / study if self.store else (self.results / study).absolute()


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of ``concurrent`` trials has of the machine; None: there are as many as a cluster has room for.

    ``threads`` in each of its workers, ``gpus`` for all of them.
    """

    concurrent: int | None
    threads: int
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where runs run, and on what: tried out, so that nothing of it can be refused any more.

    ``dataset``: name and digest. ``chance``: the accuracy of guessing. ``key``: device and data, in which the same
    configuration gives the same result. ``uri`` and ``artifacts``: MLflow's.
    """

    options: Options
    share: Share
    dataset: tuple[str, str]
    examples: Mapping[str, int]
    chance: float
    key: str
    uri: str
    artifacts: Path | None

    @property
    def data(self) -> Data:
        """What rows from here are measured on."""
        return Data(key=self.key, examples=self.examples, chance=self.chance)


def share_out(options: Options, device_type: str) -> Share:
    """Cores, or GPUs, divided among the trials: on the CPU a worker per core, because one thread wastes nothing.

    Each worker has a GPU of its own, unless ``gpus_per_trial`` says otherwise. In a cluster that is joined there are as
    many trials as it has room for, with one core for each worker. UserError for a share of GPUs where there is none.
    """
    concurrent, gpus, workers = options.concurrent, options.gpus_per_trial, options.workers_per_trial
    if device_type != "cuda" and gpus:
        raise UserError(
            f"--gpus-per-trial {gpus:g} has no effect on {device_type}; leave it out, or use --device cuda."
        )
    if options.address is not None:
        return Share(concurrent=concurrent, threads=1, gpus=(gpus or float(workers)) if device_type == "cuda" else 0.0)
    cores = max(1, int(usable_cores()))
    if device_type != "cuda":
        trials = concurrent or max(1, cores // workers)
        return Share(concurrent=trials, threads=max(1, cores // (trials * workers)), gpus=0.0)
    found = torch.cuda.device_count()
    trials = concurrent or (int(found / gpus + 1e-9) if gpus else found // workers) or 1
    threads = max(1, cores // (trials * workers))
    return Share(concurrent=trials, threads=threads, gpus=gpus or min(float(workers), found / trials))


def survey(options: Options, config: TrialConfig) -> Place:
    """The place of runs such as ``config``; UserError for what cannot work, before anything is written."""
    uri, artifacts = (options.tracking_uri, None) if options.tracking_uri else embedded(options.results)
    if options.tracking_uri:
        check_uri(uri)
    if options.storage is not None:
        check_storage(options.storage)
    if options.address is not None:
        check_address(options.address)
    device = device_type(options)
    trial = prepare(config, data_dir=options.data_dir, device="cpu")
    if options.workers_per_trial > 1:
        check_together(trial, options.workers_per_trial)
    data = trial.data
    return Place(
        options=options,
        share=share_out(options, device),
        dataset=(data.name, data.digest),
        examples={str(split): count for split, count in data.sizes.items()},
        chance=1.0 / data.classes,
        key=f"{device} {data.digest}",
        uri=uri,
        artifacts=artifacts,
    )


def device_type(options: Options) -> str:
    """``cpu`` or ``cuda``: what these options' runs run on."""
    # the machines of a cluster may have what this one lacks
    elsewhere = options.address is not None and options.device != "auto"
    return options.device.partition(":")[0] if elsewhere else pick_device(options.device).type


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (AVX512-BF16, AMX): elsewhere it is slower than float32.

    By torch.cpu.get_capabilities, which is public; a torch that does not have it yet says no.
    """
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def recipe_for(
    dataset: str,
    arch: str,
    changes: Mapping[str, Any],
    options: Options,
    *,
    begun: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The recipe of new runs: that of the data set, the network and the optimizer, with ``changes`` over it.

    A configuration names its result, so ``precision = "auto"`` is float32 in every run on a CPU. It becomes bf16 here,
    on a CPU that has it, where nothing is ``begun``: the recipe of what is, whose precision it keeps.
    """
    recipe = {**recipe_of(dataset, arch, changes.get("optimizer", TrialConfig.optimizer)), **changes}
    if recipe.get("precision", "auto") != "auto":
        return recipe
    if begun is not None:
        recipe.pop("precision", None)
        return recipe | {name: begun[name] for name in ("precision",) if name in begun}
    return recipe | ({"precision": "bf16"} if device_type(options) == "cpu" and cpu_has_bf16() else {})


def default_levels(site: str, config: TrialConfig, options: Options) -> tuple[float, ...]:
    """The levels at this site (or of this attack) if nobody names any: its own grid; of ``update``, the recipe's."""
    own = ATTACKS[site].levels if site in ATTACKS else SITES[site].levels
    if own is not None:
        return own
    return update_levels(config, survey(options, config).examples["train"] // config.batch_size)
