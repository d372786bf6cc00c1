"""A tiny search, as a script to be killed: python engine_driver.py FOLDER TRIALS SECONDS_PER_EPOCH [ADDRESS].

Prints one line per event. Each start opens the study in FOLDER and goes on with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from optuna.distributions import FloatDistribution

from bench import engine
from bench.config import StudyConfig, TrialConfig, TrialResult
from bench.streams import quiet
from bench.study import Study

EPOCHS = 3


class StudySource:
    """What `bench.search` does, without rows and without MLflow."""

    def __init__(self, study: Study, seconds: float, say: Callable[[str], None]) -> None:
        self.study, self.seconds, self.say = study, seconds, say

    def next(self) -> engine.Task | engine.Wait | None:
        proposal = self.study.ask()
        if proposal is None:
            return None
        options = {"seconds": self.seconds, "checkpoint": str(self.study.folder / f"{proposal.uid}.epochs")}
        config = TrialConfig(rule="sparse", epochs=EPOCHS, coefficients=proposal.params)
        return engine.Task(uid=proposal.uid, config=config, options=options)

    def started(self, uid: str) -> None:
        self.say(f"started {uid}")

    def reported(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        self.say(f"reported {uid} {epoch}")
        return self.study.report(uid, epoch, metrics["val_acc"])

    def completed(self, uid: str, result: TrialResult) -> None:
        self.study.tell(uid, result)
        self.say(f"completed {uid} {result.status}")


def main() -> None:
    folder, trials, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    config = StudyConfig(
        name="s",
        rule="sparse",
        arch="lenet",
        dataset="digits",
        trials=trials,
        epochs=EPOCHS,
        sampler="random",
        scheduler="none",
    )
    space = {"sparse": FloatDistribution(0.1, 1.0)}
    log = folder / "ray.log"
    with quiet(log) as (out, _), Study.open(folder, config, space, say=print, chance=0.1) as study:

        def say(line: str) -> None:
            out.write(line + "\n")

        source = StudySource(study, seconds, say)
        settings = {"concurrent": 2, "cpus_per_trial": 0.5, "address": None}
        if len(sys.argv) > 4:
            settings = {"concurrent": None, "cpus_per_trial": 1, "address": sys.argv[4]}
        say(engine.run(source, trial="fake_trials:train", log=log, say=say, **settings))


if __name__ == "__main__":
    main()
