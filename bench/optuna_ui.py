"""Optuna's own dashboard over the journals of all searches: ``python -m bench.optuna_ui RESULTS HOST PORT``.

It shows what the journals held when it started; they are only read. The one place that imports optuna-dashboard.
"""

from __future__ import annotations

import sys
from pathlib import Path

import optuna
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend


def gathered(results: Path) -> InMemoryStorage:
    """The studies of all journals under ``results``, copied: a dashboard takes one storage."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = InMemoryStorage()
    for journal in sorted(results.glob("*/journal.log")):
        storage = JournalStorage(JournalFileBackend(str(journal)))
        for study in storage.get_all_studies():
            taken = {known.study_name for known in found.get_all_studies()}
            name = study.study_name if study.study_name not in taken else f"{study.study_name} ({journal.parent.name})"
            optuna.copy_study(
                from_study_name=study.study_name, from_storage=storage, to_storage=found, to_study_name=name
            )
    return found


def main() -> None:
    from optuna_dashboard import run_server

    results, host, port = sys.argv[1:]
    run_server(gathered(Path(results)), host=host, port=int(port))


if __name__ == "__main__":
    main()
