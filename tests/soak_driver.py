"""A whole search of trials that do next to nothing, as a program to be killed: python soak_driver.py RESULTS TRIALS."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.config import StudyConfig
from bench.place import Options
from bench.recipes import recipe_of
from bench.search import Ready, check, search
from bench.space_files import load_space
from bench.streams import quiet

NAME, EPOCHS = "soak", 3


def ready_for(trials: int, results: Path, *, sampler: str = "random", epochs: int = EPOCHS) -> Ready:
    """A search of sparse on lenet with nothing that stops its trials."""
    space = load_space("sparse", "lenet")
    config = StudyConfig(
        name=NAME,
        rule="sparse",
        arch="lenet",
        dataset="digits",
        trials=trials,
        epochs=epochs,
        sampler=sampler,
        scheduler="none",
        confirm_seeds=1,
        recipe={**recipe_of("digits", "lenet"), **space.settings},
        space=space.to_dict(),
    )
    return check(config, space, Options(results=results))


def main() -> None:
    ready = ready_for(int(sys.argv[2]), Path(sys.argv[1]))
    with quiet(ready.folder / "ray.log") as (out, _):
        outcome, _ = search(ready, say=lambda line: out.write(f"{line}\n") and None, trial="fake_trials:soak")
        out.write(f"{outcome}\n")


if __name__ == "__main__":
    main()
