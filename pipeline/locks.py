"""Who may write: one job a data set, an index, an experiment, the beginning of a run. A lock is held by a living process alone, so a job that died leaves none behind."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.atomic import unwaiting
from pipeline.errors import BadRequest, printable

IN_THE_WAY = (errno.ENXIO, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)  # a pipe, a file where a folder should be, a folder where a file should be


class Busy(BadRequest):
    """Another job holds what this one needs: waiting helps."""


@contextmanager
def hold(lock: Path, run: Path, refusal: str, seconds: float = 0) -> Iterator[None]:
    """Hold a lock file against a second job; the lock dies with the process. Raises Busy with `refusal` if another job holds it, and still does after so many seconds."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w", opener=unwaiting)
    except OSError as fault:
        remedy = "remove what lies there" if fault.errno in IN_THE_WAY else "make it writable, or give a copy of it"
        raise BadRequest(f"--run: {printable(run)} cannot be written ({printable(fault)}): {remedy}") from None
    with file:
        limit = time.monotonic() + seconds
        while not _locked(file):
            if time.monotonic() >= limit:
                raise Busy(refusal)
            time.sleep(0.1)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
