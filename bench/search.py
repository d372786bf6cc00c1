"""`bench search`: Ray runs the trials, the study proposes, the best is confirmed beside its controls."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from bench import engine
from bench.campaign import Campaign, Options, Ready, Share, trial_config
from bench.choices import check_choices
from bench.config import StudyConfig, UserError
from bench.files import read_yaml, write_yaml
from bench.provenance import usable_cores
from bench.rows import RowFile
from bench.space import Space
from bench.stores import check_uri, embedded
from bench.study import Study
from bench.summary import headline
from bench.tracking import Tracker
from bench.trial import pick_device, prepare

Outcome = Literal["done", "interrupted", "known"]


def share_out(concurrent: int | None, device_type: str) -> Share:
    """Cores, or GPUs, divided among the trials: on the CPU a trial per core, because one thread wastes nothing."""
    cores = max(1, int(usable_cores()))
    if device_type != "cuda":
        trials = concurrent or cores
        return Share(concurrent=trials, threads=max(1, cores // trials), gpus=0.0)
    import torch

    gpus = torch.cuda.device_count()
    trials = concurrent or gpus
    return Share(concurrent=trials, threads=max(1, cores // trials), gpus=min(1.0, gpus / trials))


def study_name(rule: str, arch: str, dataset: str) -> str:
    """The default name: what the study is about, in characters that every file system takes."""
    kind, _, path = dataset.partition(":")
    data = f"{kind}-{Path(path).name}" if path else kind
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", f"{rule}-{arch}-{data}").strip("-.")


def check(config: StudyConfig, space: Space, options: Options) -> Ready:
    """Everything that a search needs, tried out; UserError for what cannot work, before anything is written."""
    check_choices(config)
    uri, artifacts = (options.tracking_uri, None) if options.tracking_uri else embedded(options.results)
    if options.tracking_uri:
        check_uri(uri)
    device = pick_device(options.device).type
    lowest = trial_config(config, space.changes(space.corners()[0]))
    data = prepare(lowest, data_dir=options.data_dir, device="cpu").data
    return Ready(
        config=config,
        space=space,
        options=options,
        share=share_out(options.concurrent, device),
        dataset=(data.name, data.digest),
        chance=1.0 / data.classes,
        control_key=f"{device} {data.digest}",
        uri=uri,
        artifacts=artifacts,
    )


def search(
    ready: Ready,
    *,
    say: Callable[[str], None],
    watch: Callable[[Campaign], Callable[[], None]] | None = None,
) -> tuple[Outcome, dict[str, Any]]:
    """Run the search to its end, or go on with it; the summary of what is known by then.

    "known": everything had been run before. ``watch`` gets the campaign and returns what is called about
    ten times a second.
    """
    config, options, folder = ready.config, ready.options, ready.folder
    distributions = ready.space.distributions()
    with Study.open(folder, config, distributions, say=say, chance=ready.chance) as study:
        identity = _write_config(ready)
        spool = options.results / "spool"
        with Tracker.open(uri=ready.uri, artifacts=ready.artifacts, spool=spool, say=say) as tracker:
            rows = RowFile(folder / "rows.jsonl", say=say)
            controls = RowFile(options.results / "controls" / "rows.jsonl", say=say)
            campaign = Campaign(ready, study, tracker, rows=rows, controls=controls)
            tags = {"bench.rule": config.rule, "bench.arch": config.arch, "bench.seed": config.seed}
            tracker.study(config.name, config=config.to_dict(), tags=tags, identity=identity)
            tracker.dataset(*ready.dataset)
            campaign.record_known()
            outcome: Outcome = "known"
            if not campaign.complete:
                outcome = engine.run(
                    campaign,
                    concurrent=ready.share.concurrent,
                    cpus_per_trial=ready.share.threads,
                    gpus_per_trial=ready.share.gpus,
                    log=folder / "ray.log",
                    say=say,
                    tick=None if watch is None else watch(campaign),
                )
            summary = campaign.summary()
            _write_best(folder, campaign, summary)
            tracker.headline(headline(summary))
            files = ("study.yaml", "rows.jsonl", "journal.log", "best.yaml")
            tracker.artifacts([folder / name for name in files if (folder / name).exists()])
            tracker.close("KILLED" if outcome == "interrupted" else "FINISHED")
            return outcome, {**summary, "folder": str(folder), "mlflow": tracker.link()}


def _write_config(ready: Ready) -> str:
    """Keep the resolved configuration with the study; the id by which MLflow tells it from others of its name.

    UserError for a smaller budget than before, and for other data or another kind of device.
    """
    config, path = ready.config, ready.folder / "study.yaml"
    before = read_yaml(path) if path.exists() else {}
    known = before.get("config", {})
    if before and not (isinstance(known, dict) and isinstance(known.get("trials"), int)):
        raise UserError(f"{path} is damaged: it has no config with its trials. Mend it, or use another --name.")
    if before and known["trials"] > config.trials:
        raise UserError(
            f"study {config.name!r} has a budget of {known['trials']} trials; --trials may grow, not shrink."
        )
    if before and before.get("runs_on") != ready.control_key:
        raise UserError(
            f"study {config.name!r} was begun on {before.get('runs_on')!r} (device, digest of the data), and this is "
            f"{ready.control_key!r}; use the same, or another --name."
        )
    identity = str(before.get("id") or uuid.uuid4().hex)
    write_yaml(path, {"id": identity, "runs_on": ready.control_key, "config": config.to_dict()})
    return identity


def _write_best(folder: Path, campaign: Campaign, summary: Mapping[str, Any]) -> None:
    """The best confirmed configuration (before any is: the search's best), as `bench train --config` takes it."""
    configs = [found["config"] for found in summary["confirmed"]]
    if not configs:
        finished = [r for r in campaign.search_rows() if r["status"] == "finished"]
        configs = [r["config"] for r in sorted(finished, key=lambda r: -r["metrics"]["val_acc"])]
    if configs:
        write_yaml(folder / "best.yaml", {**configs[0], "seed": campaign.config.seed})
