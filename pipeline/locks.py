"""Who may write: one job a data set, an index, an experiment. A lock is held by a living process alone, so a job that died leaves none behind."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import BadRequest, printable


class Busy(BadRequest):
    """Another job holds what this one needs: waiting helps."""


@contextmanager
def hold(lock: Path, run: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file against a second job; the lock dies with the process. Raises Busy with `refusal` if another job holds it."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")
    except OSError as fault:
        raise BadRequest(f"--run: {printable(run)} cannot be written ({printable(fault)}): make it writable, or give a copy of it") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(refusal) from None
        yield
