"""Set before anything is imported: quiet libraries, one thread, and Hypothesis without a stopwatch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Small tensors on few cores: threads cost more than they give, and processes inherit all of this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What the tests import, the programs that they start import too.
_HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE.parent), str(_HERE), os.environ.get("PYTHONPATH", "")]).rstrip(
    ":"
)

# A busy machine is slow, not wrong; and what CI finds must be found again.
settings.register_profile("bench", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("bench")

# A shell that starts a job in the background lets it ignore SIGINT (nohup: SIGHUP), and every child would inherit
# that: the tests that interrupt a program would wait for ever. A handler of our own is reset in the children.
for _signal, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first and in one process: Ray keeps its first token, and the order must not vary."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("faults")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("slow" if item.path in slow else item.path.name))


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test finds does not depend on whether this CPU has bfloat16."""
    monkeypatch.setattr("bench.place.cpu_has_bf16", lambda: False)
