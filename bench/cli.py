"""The command line: one verb per stage. Whatever is heavy is imported inside the verb that needs it."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import bench
from bench.config import UserError, one_line, unknown
from bench.disk import find_disk_error
from bench.verbs import cluster, compare, confirm, matrix, report, robustness, search, speed, sync, train, transfer
from bench.verbs.common import BAD_INPUT, BROKEN_PIPE, INTERRUPTED, add_json, add_kept, add_results, at_hand, verb
from bench.worker import is_of_memory


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Errors of the user are one line on stderr, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal, or a file's name, may lack or hold any character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        given = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = given.verb
        with at_hand(given):
            status = run(given)
        sys.stdout.flush()
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # whoever read our output has left; nothing can be said any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:  # of a disk, wherever it came; or of a path that nobody looked at before
        place = f"{error.filename}: " if error.filename is not None else ""
        other = UserError(f"{place}{error.strerror or error}; name another place, or permit it.")
        print(f"bench: {find_disk_error(error) or other}", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:  # torch's own, and Python's
        if not is_of_memory(error):
            raise
        said = one_line(str(error)).rpartition("DefaultCPUAllocator: ")[2] or "no more is to be had"
        print(
            f"bench: too little memory ({said}); take a smaller network, width, batch or image size.", file=sys.stderr
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bench", description=bench.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"bench {bench.__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add in (
        search.add,
        transfer.add,
        matrix.add,
        robustness.add,
        report.add,
        compare.add,
        confirm.add,
        sync.add,
        train.add_train,
        train.add_evaluate,
        _add_list,
        _add_ui,
        cluster.add,
        speed.add,
        _add_doctor,
    ):
        add(verbs)
    return parser


def _add_list(verbs: Any) -> None:
    p = verb(verbs, "list", _list, "show rules, networks, data sets, spaces, samplers, noise sites, attacks, ...")
    p.add_argument("what", nargs="?", default="all", help="one of these, or all")
    add_json(p)


def _add_ui(verbs: Any) -> None:
    p = verb(verbs, "ui", _ui, "open MLflow's user interface on the results")
    p.add_argument("--host", default="127.0.0.1", help="another than loopback exposes all runs, without a password")
    p.add_argument("--port", type=int, default=5000, help="the next free one, if it is taken")
    p.add_argument("--optuna", action="store_true", help="Optuna's dashboard on the searches' journals, too")
    add_results(p, writes=False)


def _add_doctor(verbs: Any) -> None:
    p = verb(verbs, "doctor", _doctor, "say what this machine has, and what would go wrong on it")
    add_kept(p, writes=None)
    add_json(p)


# --- their work


def _list(given: argparse.Namespace) -> int:
    from bench.listing import LISTS, listing
    from bench.terminal import console, table

    if given.what not in (*LISTS, "all"):
        raise unknown("list", given.what, (*LISTS, "all"))
    names = list(LISTS) if given.what == "all" else [given.what]
    found = {name: listing(name) for name in names}
    if given.json:
        print(json.dumps(found))
        return 0
    out = console(sys.stdout)
    for name, rows in found.items():
        out.print(table(name, list(rows[0]), [list(row.values()) for row in rows], texts=len(rows[0])))
    return 0


def _ui(given: argparse.Namespace) -> int:
    from bench.ui import serve

    serve(
        given.results,
        tracking_uri=given.tracking_uri,
        host=given.host,
        port=given.port,
        optuna=given.optuna,
        say=lambda line: print(line, flush=True),
    )
    return 0


def _doctor(given: argparse.Namespace) -> int:
    import dataclasses

    from bench.doctor import diagnose
    from bench.terminal import console, table

    checks = [dataclasses.asdict(check) for check in diagnose(given.results)]
    if given.json:
        print(json.dumps(checks))
    else:
        rows = [[c["status"], c["name"], c["detail"], c["remedy"] or ""] for c in checks]
        console(sys.stdout).print(table("this machine", ["", "check", "found", "remedy"], rows, texts=4))
    return 1 if any(check["status"] == "fail" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
