"""What the verbs share: options that several have, and the reading of values."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bench.config import StudyConfig, UserError, check_range, unknown
from bench.files import parse_scalar
from bench.remote_results import is_uri

if TYPE_CHECKING:
    from bench.place import Options
    from bench.remote_results import RemoteResults

T = TypeVar("T")


class Shown(Protocol):
    """A source of runs, as the terminal sees it."""

    name: str

    def outlook(self) -> str:
        """What there is to do, in one line."""

    def render(self) -> str:
        """How far it is."""


Say = Callable[[str], None]
Watch = Callable[[Shown], Callable[[], None]]

#: Exit statuses: bad input or a state that the user must mend; an interruption (128 + SIGINT); 128 + SIGPIPE.
BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141

#: What ``--sigma`` calls the levels of `bench.noise.CORRUPTION_SEVERITIES`.
BENCHMARKS = ("imagenet-c", "cifar10-c")

#: Bytes that must be free where results are kept, or nothing is begun: a study's first lines, and a little more.
LEAST_ROOM = 2**16

#: The longest name of a study, in characters.
LONGEST_NAME = 100

#: Folders under the results that are no study's.
KEPT_FOLDERS = ("controls", "mlartifacts", "published", "train")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one to be said."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default in ("", [])
        return action.help if nothing else super()._get_help_string(action)


def verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary}.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    made.set_defaults(verb=run)
    return made


def add_results(parser: argparse.ArgumentParser, writes: bool = True) -> None:
    add_kept(parser, writes)
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow server (else SQLite under the results)")


def add_kept(parser: argparse.ArgumentParser, writes: bool | None) -> None:
    """Add ``--results``. Of a URI the verb reads or ``writes`` a copy (`at_hand`); None: it sees to that itself."""
    text = "where results are kept: a folder, or a URI (s3://…; see `bench doctor --results URI`)"
    parser.add_argument("--results", type=folder, default=Path("results"), metavar="DIR", help=text)
    parser.set_defaults(store=None, writes=writes, remote=None)


def folder(text: str) -> Path | str:
    """A folder on this machine, or a URI."""
    return text if is_uri(text) else Path(text)


def local_file(text: str) -> Path:
    """A file on this machine."""
    if is_uri(text):
        raise argparse.ArgumentTypeError(f"{text}: that must be a file on this machine; download it first")
    return Path(text)


@contextmanager
def at_hand(given: argparse.Namespace) -> Iterator[None]:
    """What a URI given as ``--results`` stands for, in a folder of this machine that takes its place meanwhile."""
    results, writes = getattr(given, "results", None), getattr(given, "writes", None)
    if writes is None or not isinstance(results, str):
        yield
        return
    from bench.remote_results import working_folder

    with working_folder(results, writes=writes) as remote:
        given.store, given.results, given.remote = results, remote.folder, remote
        if writes and not given.tracking_uri:
            remote.say("MLflow's SQLite store cannot lie there, and stays here; --tracking-uri names a server.")
        yield


def add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="PATH", help="where the data set's files are")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")


def add_machines(parser: argparse.ArgumentParser) -> None:
    """What the runs of a verb share: cores, GPUs, other machines."""
    parser.add_argument("--concurrent", type=int, metavar="K", help="runs at a time (else one per core, or GPU)")
    parser.add_argument("--gpus-per-trial", type=float, metavar="G", help="0.5: two share one (else what there is)")
    parser.add_argument("--workers-per-trial", type=int, default=1, metavar="W", help="that train one network together")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster to join; see `bench cluster`")
    parser.add_argument("--storage", metavar="URL", help="Optuna storage of the study (else a journal in its folder)")


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The options of searches that must have equal budgets; None is "as in those that exist, else the default"."""
    default = {name: field.default for name, field in StudyConfig.__dataclass_fields__.items()}
    for name, metavar, what in (
        ("trials", "N", "configurations to try in each search"),
        ("epochs", "E", "epochs of one whole trial"),
        ("confirm_seeds", "N", "fresh seeds for what is confirmed"),
        ("seed", "S", "of the searches and their trials"),
    ):
        option = f"--{name.replace('_', '-')}"
        text = f"{what} (else as in the searches that exist, or {default[name]})"
        parser.add_argument(option, type=int, metavar=metavar, help=text)
    parser.add_argument("--sampler", metavar="S", help="see `bench list samplers` (else as in those that exist, or gp)")
    parser.add_argument("--scheduler", metavar="S", help="see `bench list schedulers` (else as in those, or asha)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the training recipe")


def budget_of(given: argparse.Namespace) -> dict[str, Any]:
    """What the user said of `add_budget`'s options."""
    names = ("trials", "epochs", "confirm_seeds", "seed", "sampler", "scheduler")
    check_range(
        "--confirm-seeds", "confirm_seeds", given.confirm_seeds, 1
    )  # what is compared here is what is confirmed
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def add_space(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The kind of search space: what B sees, what moves it, and the ranges."""
    text = "of the coefficients: see `bench list spaces`"
    text += "; several with commas between, or all" if several else ""
    parser.add_argument("--space", default="default", metavar="S[,S...]" if several else "S", help=text)


def names(option: str, text: str, known: Collection[str] | None = None) -> list[str]:
    """Names with commas between, each once; of ``known``, if the names are listed."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise UserError(f"--{option} {text!r} names none; leave the option out, or name some.")
    for name in found:
        if known is not None and name not in known:
            raise unknown(option, name, known)
    return list(dict.fromkeys(found))


def carry_out(
    given: argparse.Namespace,
    name: str,
    options: Options,
    work: Callable[[Say, Watch], tuple[str, dict[str, Any]]],
    show: Callable[[str, dict[str, Any], Options], None],
) -> int:
    """Do the work of a verb that runs something, as `follow` has it, and `conclude` with what it found.

    ``name``: of the folder under the results that Ray's log goes to.
    """
    outcome, summary = follow(writable(given.results) / name / "ray.log", work, given.remote)
    return conclude(given, outcome, summary, options, show)


def conclude(
    given: argparse.Namespace,
    outcome: str,
    summary: dict[str, Any],
    options: Options,
    show: Callable[[str, dict[str, Any], Options], None],
) -> int:
    """Print what a verb found, as JSON or by ``show``; the exit status."""
    from bench.present import study_link

    summary["link"] = study_link(summary["mlflow"], options)
    if given.json:
        print(json.dumps({"outcome": outcome, **summary}))
    else:
        show(outcome, summary, options)
    return INTERRUPTED if outcome == "interrupted" else 0


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs, values as YAML scalars or lists; a key given twice is refused."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {setting!r}: write KEY=VALUE, e.g. --set lr=0.05.")
        if key.strip() in found:
            raise UserError(f"--set {key.strip()} is given twice; give it once.")
        found[key.strip()] = parse_scalar(key.strip(), value)
    return found


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers with commas between them; 8/255 is one too."""
    try:
        return tuple(float(Fraction(number.strip())) for number in text.split(","))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{option} {text}: write numbers with commas between, e.g. {option} 0.1,0.2,0.4.") from error


def sigmas(text: str, site: str) -> tuple[float, ...]:
    """The levels of noise that ``--sigma`` names: numbers, or a benchmark of noisy images."""
    from bench.noise import CORRUPTION_SEVERITIES

    if not is_benchmark(text):
        return numbers("--sigma", text)
    if site != "input":
        raise UserError(f"--sigma {text} belongs to --site input.")
    named = {name.lower().replace("-10", "10"): severities for name, severities in CORRUPTION_SEVERITIES.items()}
    return named[text.lower()]


def is_benchmark(text: str | None) -> bool:
    """Whether ``--sigma`` names a benchmark, of which clipping to [0, 1] is a part."""
    return text is not None and text.lower() in BENCHMARKS


def refuse_storage(given: argparse.Namespace, what: str) -> None:
    """UserError for --storage where nothing is proposed."""
    if given.storage:
        raise UserError(f"--storage has no effect on {what}, which proposes nothing: leave it out.")


def options_of(given: argparse.Namespace) -> Options:
    """The options that say where and how runs run."""
    from bench.place import Options

    check_range("--concurrent", "concurrent", given.concurrent, 1)
    check_range("--gpus-per-trial", "gpus_per_trial", given.gpus_per_trial, 0, open_low=True)
    check_range("--workers-per-trial", "workers_per_trial", given.workers_per_trial, 1)
    return Options(
        results=given.results,
        data_dir=given.data_dir,
        device=given.device,
        concurrent=given.concurrent,
        tracking_uri=given.tracking_uri,
        address=given.address,
        storage=given.storage,
        gpus_per_trial=given.gpus_per_trial,
        workers_per_trial=given.workers_per_trial,
        store=given.store,
    )


def follow(log: Path, work: Callable[[Say, Watch], T], remote: RemoteResults | None = None) -> T:
    """Do ``work(say, watch)`` with a live display; what Ray prints meanwhile goes to ``log``.

    ``watch(source)`` shows a source of runs, and returns what is to be called about ten times a second. ``remote``:
    what its uploads have to say is shown there, too.
    """
    from bench.streams import quiet
    from bench.terminal import Progress

    with (
        quiet(log) as (_, err),
        Progress(err, sys.stderr) as bar,  # sys.stderr: the log
        nullcontext() if remote is None else remote.heard_by(bar.say),
    ):

        def watch(source: Shown) -> Callable[[], None]:
            bar.say(f"{source.name}: {source.outlook()}; Ray's log: {log}")
            bar.show(source.render)
            return bar.tick

        return work(bar.say, watch)


def check_name(name: str) -> str:
    if len(name) > LONGEST_NAME:
        raise UserError(f"the name {name} is longer than {LONGEST_NAME} characters: give a shorter --name.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name) or name in KEPT_FOLDERS:
        raise UserError(f"--name {name!r}: use letters, digits and . _ + - (and not a folder that bench itself keeps).")
    return name


def writable(results: Path) -> Path:
    """The results folder, if files can be made in it; UserError otherwise."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results) as file:
            file.write(bytes(LEAST_ROOM))
            return results
    except OSError as error:
        raise UserError(
            f"--results {results}: {error.strerror or error}; choose a folder that can be written, or make room there."
        ) from error
