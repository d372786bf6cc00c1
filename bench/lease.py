"""Who uploads to a store: one machine at a time, by a lease that it renews.

The lease is an object with its owner's id. pyarrow knows no conditional writes, so two machines that take one in the
same second may both believe that they have it, for as long as `RENEWED`: then the one whose lease was overwritten
notices, and uploads no more.
"""

from __future__ import annotations

import json
import platform
import time
from datetime import UTC, datetime
from typing import Any

from bench.config import UserError
from bench.objects import Store

NAME = ".lease"

#: Seconds from one renewal to the next, and after which a lease that was not renewed is nobody's.
RENEWED, STALE = 30.0, 180.0

#: Seconds after which whoever took a lease looks whether another did so at the same time.
SETTLE = 1.0


class TakenError(UserError):
    """Another machine has the lease."""


class Lease:
    """The lease on this store, for the owner of this id. Nothing is asked of the store before `take`."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store, self._owner = store, owner
        self._renewed = -RENEWED

    def take(self) -> None:
        """`TakenError` if another machine has it; a UserError if the store cannot be written."""
        now = self._now()
        held = self._held()
        if held is not None and held["owner"] != self._owner and (age := now - held["written"]) < STALE:
            raise TakenError(
                f"{self._store.uri} is in use by bench on another machine ({held.get('host')}, {age:.0f} s ago); wait "
                f"for it, or end it: a killed one's claim lapses after {STALE / 60:.0f} minutes."
            )
        self._write()
        if held is None or held["owner"] != self._owner:
            time.sleep(SETTLE)
            self._check()

    def renew(self) -> None:
        """Renew it, if it is time; `TakenError` if another machine has, or had, it meanwhile."""
        if abs(time.time() - self._renewed) >= RENEWED:  # not monotonic(): that stands still while a machine sleeps
            self._check()
            self._write()

    def release(self) -> None:
        """Let others take it."""
        held = self._held()
        if held is not None and held["owner"] == self._owner:
            self._store.remove(NAME)

    def _check(self) -> None:
        held = self._held()
        if held is None or held["owner"] != self._owner:
            host = "another machine" if held is None else held.get("host")
            raise TakenError(
                f"{self._store.uri} was taken over by {host}, because this one had not renewed its claim; nothing more "
                "is uploaded from here."
            )

    def _now(self) -> float:
        """By the store's clock, which also times the lease; by ours, if it tells no times. Tries out writing."""
        probe = f"{NAME}-{self._owner}"
        self._store.put(probe, b"{}")
        found = self._store.version(probe)
        self._store.remove(probe)
        return time.time() if found is None or found[1] is None else found[1] / 1e9

    def _held(self) -> dict[str, Any] | None:
        """The lease as it is, ``written``: when; None if there is none."""
        try:
            found: Any = json.loads(self._store.read(NAME))
        except (FileNotFoundError, ValueError):  # ValueError: no lease of ours, whatever it is
            return None
        if not isinstance(found, dict) or "owner" not in found:
            return None
        version = self._store.version(NAME)
        written = version[1] / 1e9 if version and version[1] is not None else float(found.get("time", 0.0))
        return {**found, "written": written}

    def _write(self) -> None:
        now = time.time()
        since = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        content = {"owner": self._owner, "host": platform.node(), "time": now, "renewed": since}
        self._store.put(NAME, json.dumps(content).encode())
        self._renewed = now
