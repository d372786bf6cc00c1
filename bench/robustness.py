"""`bench robustness`: how rules stand noise in their training, and noise or attacks after it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkpoint import File, location, remove_checkpoint
from bench.config import TrialConfig, TrialResult, UserError
from bench.director import WAIT, Task, Wait
from bench.figures import robustness_figure
from bench.files import read_yaml, write_yaml
from bench.journal import check_kind, claim
from bench.kinds import KINDS
from bench.place import Options, Place, survey
from bench.programme import conclude
from bench.robustness_plan import Network, Plan, RobustnessConfig
from bench.robustness_points import summarize_robustness
from bench.robustness_words import note, title
from bench.rows import Row, RowFile
from bench.runs import Outcome, Planned, Recorder, Running, Runs, carry_out
from bench.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A measurement of which nothing can be refused any more, as far as one can know before it begins."""

    config: RobustnessConfig
    plan: Plan
    place: Place

    @property
    def folder(self) -> Path:
        return self.place.options.results / self.config.name


class Robustness(Runs):
    """The source of all runs of one measurement (an `director.Source`), and the keeper of its rows."""

    def __init__(self, ready: Ready, tracker: Recorder, rows: RowFile) -> None:
        super().__init__(ready.config.name, ready.place, tracker, {"robustness": rows})
        self._plan = ready.plan
        self._trainings = ready.plan.trainings()
        self._probes = ready.plan.probes()
        self._networks = {network.uid: network for network in ready.plan.networks}
        self._whole = {network.uid for network in ready.plan.networks if network.given}  # files known to be, by now

    # --- what there is to run

    def _became(self, network: Network) -> str:
        """The status of its training by now; empty if there is none. A user's own network is trained."""
        known = self._row_of(network.uid)
        if network.given:  # whatever a training with the same configuration became here
            return "finished"
        return "" if known is None else str(known["status"])

    def _evaluations(self) -> dict[str, Planned]:
        """Those that there is something to evaluate for: not a network that diverged, or failed in this very start."""
        return {
            uid: self._plan.planned(probe)
            for uid, probe in self._probes.items()
            if self._became(probe.network) != "diverged" and not self._lost(probe.network)
        }

    def _lost(self, network: Network) -> bool:
        return self._became(network) == "failed" and self._next_attempt(network.uid) is None

    @property
    def complete(self) -> bool:
        """Nothing is left to run."""
        return not (any(self._open(self._trainings)) or any(self._open(self._evaluations())))

    # --- director.Source

    def next(self) -> Task | Wait | None:
        for uid, plan in self._ready():
            return self._task(uid, plan)
        return None if self.complete and not self._running else WAIT

    def _ready(self) -> Iterator[tuple[str, Planned]]:
        """The networks first, then what becomes of them, then the long row of noisy trainings."""
        networks = {uid: plan for uid, plan in self._trainings.items() if uid in self._networks}
        yield from self._open(networks)
        for uid, plan in self._open(self._evaluations()):
            network = self._probes[_base(uid, self._probes)].network
            # a file that was removed, or left half trained, is trained again by an evaluation: by one at a time
            alone = network.uid not in self._whole or _is_gone(network)
            if self._became(network) == "finished" and not (alone and self._busy(network)):
                yield uid, plan
        yield from self._open(self._trainings)

    def _busy(self, network: Network) -> bool:
        return any(run.plan.config == network.config for run in self._running.values())

    def _filed(self, uid: str, run: Running, result: TrialResult) -> None:
        base = _base(uid, self._probes) if run.plan.evaluation else _base(uid, self._networks)
        network = self._probes[base].network if run.plan.evaluation else self._networks.get(base)
        if network is not None and result.status == "finished":
            self._whole.add(network.uid)

    def _checkpoint(self, uid: str) -> File:
        base = _base(uid, self._trainings)
        if base in self._networks and self._plan.evaluates:
            return self._networks[base].path
        return super()._checkpoint(uid)

    def _task(self, uid: str, plan: Planned) -> Task:
        if plan.evaluation:
            network = self._probes[_base(uid, self._probes)].network
            if _is_gone(network):
                self._whole.discard(network.uid)
            return super()._task(uid, plan)
        return super()._task(uid, plan.with_options(checkpoint=location(self._checkpoint(uid))))

    def _tidy(self, uid: str) -> None:
        if _base(uid, self._trainings) not in self._networks or not self._plan.evaluates:
            super()._tidy(uid)

    def remove_networks(self) -> None:
        """Those that were trained here; a user's own checkpoints stay where they are."""
        for network in self._networks.values():
            if not network.given:
                remove_checkpoint(network.path)
                folder = network.path.parent if isinstance(network.path, Path) else None
                if folder is not None and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    # --- what is known

    def rows(self) -> list[Row]:
        """The rows of this plan, and of no other that was run in the same folder."""
        return [*self._rows_of(self._trainings), *self._rows_of(dict.fromkeys(self._probes))]  # type: ignore[arg-type]

    def record_known(self) -> None:
        """Tell MLflow what an earlier start left as rows."""
        self.record(self.rows())

    def summary(self) -> dict[str, Any]:
        """What `bench.robustness_points` makes of the rows of this plan."""
        return summarize_robustness(self._plan.config, self.rows(), self._place.data)

    def outlook(self) -> str:
        """What there is to do, in one line."""
        epochs, done = self._plan.networks[0].config.epochs, self._settled(self._trainings)
        known = done + self._settled(self._evaluations())
        before = f", of which {known} are known" if known > 1 else ", of which 1 is known" if known else ""
        gone = len(self._gone())
        again = f"; {gone} networks were removed and are trained again (--keep-networks keeps them)" if gone else ""
        return f"{len(self._trainings)} trainings of {epochs} epochs, {len(self._probes)} evaluations{before}{again}"

    def _gone(self) -> set[str]:
        """The networks that were trained and removed, and that something is still to be measured of."""
        wanted = {self._probes[_base(uid, self._probes)].network.uid for uid, _ in self._open(self._evaluations())}
        trained = {uid for uid in wanted if self._became(self._networks[uid]) == "finished"}
        return {uid for uid in trained if _is_gone(self._networks[uid])}

    def repeated(self) -> list[str]:
        """What of this measurement is of several networks: trained again after their removal, and not the same."""
        found: dict[str, set[str]] = {}
        for uid, probe in self._probes.items():
            known = self._row_of(uid)
            if known is not None and (digest := known["provenance"].get("network")):
                name = f"{probe.network.config.rule} seed {probe.network.config.seed}"
                found.setdefault(name, set()).add(digest)
        return [name for name, digests in found.items() if len(digests) > 1]

    def render(self) -> str:
        """The live display: a line for the whole, and one for each run under way."""
        evaluations = self._evaluations()
        trained, evaluated = self._settled(self._trainings), self._settled(evaluations)
        parts = [f"{trained}/{len(self._trainings)} trainings"]
        if evaluations:
            parts.append(f"{evaluated}/{len(evaluations)} evaluations")
        status = [r["status"] for r in self._rows_of(self._trainings)]
        parts += [f"{n} {what}" for what in ("diverged", "failed") if (n := status.count(what))]
        parts.append(self._time(len(self._trainings) - trained, len(evaluations) - evaluated))
        return "\n".join([f"{self.name}: " + " · ".join(parts), *self._lines()])


def _is_gone(network: Network) -> bool:
    """Whether its file was removed. On a store only its worker looks: here a look would hold up all runs."""
    return isinstance(network.path, Path) and not network.path.exists()


def _base(uid: str, known: Mapping[str, Any]) -> str:
    """The uid of a run's first attempt."""
    return uid if uid in known else uid.rpartition(".")[0]


def prepare_measurement(
    config: RobustnessConfig, options: Options, given: Sequence[tuple[TrialConfig, Path]] = ()
) -> Ready:
    """Everything that it needs, tried out; UserError for what cannot work, before anything is written."""
    check_kind(options.results / config.name, "robustness.yaml")
    rules = [TrialConfig.from_dict(values) for values in config.rules.values()]
    for rule in rules:
        place = survey(options, rule)
    plan = Plan(config, key=place.key, folder=options.kept(config.name), given=given)
    return Ready(config=config, plan=plan, place=place)


def measure(
    ready: Ready,
    *,
    say: Callable[[str], None],
    watch: Callable[[Robustness], Callable[[], None]] | None = None,
    keep_networks: bool = False,
) -> tuple[Outcome, dict[str, Any]]:
    """Run the measurement to its end, or go on with it; the summary of what is known by then.

    "known": everything had been run before. The networks are removed at the end, unless they are to be kept, in this
    start or in an earlier one, or a run failed, which the next start will try again.
    """
    place, folder, name = ready.place, ready.folder, ready.config.name
    with claim(folder):
        kept = _write_config(ready, keep_networks)
        results = place.options.results
        with Tracker.open(uri=place.uri, artifacts=place.artifacts, results=results, say=say) as tracker:
            source = Robustness(ready, tracker, RowFile(folder / "rows.jsonl", say=say))
            tags = KINDS["robustness"].run_tags(kept)
            tracker.study(name, config=ready.config.to_dict(), tags=tags, identity=kept["id"])
            tracker.dataset(*place.dataset)
            source.record_known()
            source.sweep()
            outcome = carry_out(source, place, folder / "ray.log", trial="bench.probe:run_probe", say=say, watch=watch)
            summary = source.summary()
            if repeated := source.repeated():
                say(
                    f"{name}: trained again, these networks came out different ({'; '.join(repeated)}), so their "
                    "curves are of more than one network: measure them anew under another --name, with --keep-networks."
                )
            found = conclude("robustness", tracker, folder, summary, end=outcome, files=list(_figures(summary, folder)))
            if summary["complete"] and not summary["runs"]["failed"] and not kept["keep_networks"]:
                source.remove_networks()
            return outcome, found


def _write_config(ready: Ready, keep_networks: bool) -> dict[str, Any]:
    """What the manifest keeps, now written; UserError for settings that make another measurement of it.

    ``id``: by which MLflow tells this measurement from others of its name. ``keep_networks``: once that was asked for,
    they are kept.
    """
    path = ready.folder / "robustness.yaml"
    before = read_yaml(path) if path.exists() else {}
    config = ready.config.to_dict() | (_check_same(before, ready) if before else {})
    identity, kept = str(before.get("id") or uuid.uuid4().hex), keep_networks or before.get("keep_networks") is True
    whole = {"id": identity, "runs_on": ready.place.key, "keep_networks": kept, "config": config}
    write_yaml(path, whole)
    return whole


#: What may change between one start of a measurement and the next; rules may come and go, each as it was.
MAY_CHANGE = ("rules", "levels", "seeds", "gradients")


def _check_same(before: Mapping[str, Any], ready: Ready) -> dict[str, Any]:
    """UserError for settings that make another measurement of it; the earlier ones that have no effect on this."""
    known, now = before.get("config"), ready.config.to_dict()
    if not isinstance(known, dict) or not isinstance(known.get("rules"), dict):
        raise UserError(f"{ready.folder / 'robustness.yaml'} is damaged: restore it, or use another --name.")
    kept = {name: known[name] for name in ready.config.without_effect() if name in known}
    was = {**{k: v for k, v in known.items() if k not in MAY_CHANGE}, "device and data": before.get("runs_on")}
    is_now = {**now, **kept, "device and data": ready.place.key}
    for rule in known["rules"].keys() & now["rules"].keys():
        # its seed is not used: that of the file that it was read from, or of a checkpoint
        was |= {f"{rule}'s {k}": v for k, v in known["rules"][rule].items() if k != "seed"}
        is_now |= {f"{rule}'s {k}": v for k, v in now["rules"][rule].items()}
    if changed := [f"{k} was {v}, is now {is_now.get(k)}" for k, v in was.items() if is_now.get(k) != v]:
        begun = f"{ready.config.name!r} was begun with other settings ({'; '.join(changed[:4])})"
        raise UserError(f"{begun}; use another --name for these.")
    return kept


def _figures(summary: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Draw each site's curves; gives the files."""
    for site in summary["sites"]:
        if not site["levels"]:  # interrupted before the first: there is nothing to draw
            continue
        path = folder / f"{site['site'].replace(' ', '-')}.svg"
        heading, below = title(site["site"], summary), note(summary, site)
        robustness_figure(site, title=heading, note=below, unit=site["unit"], path=path)
        yield path
