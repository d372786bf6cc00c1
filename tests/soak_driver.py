"""A whole search of trials that do next to nothing, as a program to be killed: python soak_driver.py RESULTS TRIALS."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.growth import ready_for
from bench.search import search
from bench.streams import quiet

NAME, EPOCHS = "growth", 3


def main() -> None:
    ready = ready_for(int(sys.argv[2]), Path(sys.argv[1]), epochs=EPOCHS)
    with quiet(ready.folder / "ray.log") as (out, _):
        outcome, _ = search(ready, say=lambda line: out.write(f"{line}\n") and None, trial="fake_trials:soak")
        out.write(f"{outcome}\n")


if __name__ == "__main__":
    main()
