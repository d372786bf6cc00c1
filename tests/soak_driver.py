"""A whole search of trials that do next to nothing, as a program to be killed: python soak_driver.py RESULTS TRIALS."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.config import StudyConfig
from bench.place import Options
from bench.recipes import recipe_of
from bench.search import check, search
from bench.space import load_space
from bench.streams import quiet

NAME, EPOCHS = "soak", 3


def main() -> None:
    results, trials = Path(sys.argv[1]), int(sys.argv[2])
    space = load_space("sparse", "lenet")
    config = StudyConfig(
        name=NAME,
        rule="sparse",
        arch="lenet",
        dataset="digits",
        trials=trials,
        epochs=EPOCHS,
        sampler="random",
        scheduler="none",
        confirm_seeds=1,
        recipe=recipe_of("digits", "lenet"),
        space=space.to_dict(),
    )
    ready = check(config, space, Options(results=results, concurrent=2))
    with quiet(ready.folder / "ray.log") as (out, _):
        outcome, _ = search(ready, say=lambda line: out.write(f"{line}\n") and None, trial="fake_trials:soak")
        out.write(f"{outcome}\n")


if __name__ == "__main__":
    main()
