"""A file of a run is whole or not there: written under a name that no reader matches, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial as bound
from pathlib import Path

from pipeline import failpoints


def regular(path: Path) -> Path:
    """`path`, to be read. Raises OSError where nothing is, and where a pipe or a device is, on which a reader might wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def unwaiting(path: str, flags: int) -> int:
    """`opener` of a file that may be written in its place: a pipe there is refused, not waited for. Raises OSError."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def replace_file(path: Path, write: Callable[[Path], object], reach: Callable[[str], None] | None = None) -> None:
    """`write(partial)`, and what it wrote is at `path`: see `replacing`."""
    with replacing(path, reach) as partial:
        write(partial)


@contextmanager
def replacing(path: Path, reach: Callable[[str], None] | None = None) -> Iterator[Path]:
    """A name that no reader matches; what lies there at the end is flushed to the disk, then renamed to `path`. Nothing stays if the block raises.

    reach: told `written` before the rename and `renamed` after it; for the failpoints of files that decide what is done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        if reach:
            reach("written")
        os.replace(partial, path)
    except BaseException as fault:
        partial.unlink(missing_ok=True)
        if isinstance(fault, OSError) and fault.errno and str(fault.filename or partial) == str(partial):
            raise OSError(fault.errno, os.strerror(fault.errno), str(path)) from fault  # which file, and not its passing name
        raise
    if reach:
        reach("renamed")


def write_json(path: Path, value: dict, what: str | None = None, free: tuple[str, ...] = ()) -> None:
    """`value` as JSON, whole or not at all, its last entry a checksum of the others, but for those that anybody is `free` to change. what: the name of its failpoints."""
    text = json.dumps(value | {"checksum": checksum(value, free)}, indent=1) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"), at(what) if what else None)


def checksum(value: dict, free: tuple[str, ...] = ()) -> str:
    """Of what JSON says, however it is laid out: the same before it was written and after it was read."""
    return hashlib.sha256(json.dumps({key: entry for key, entry in value.items() if key not in free}).encode()).hexdigest()[:16]


def at(what: str, unit: failpoints.Interval | None = None) -> Callable[[str], None]:
    """The failpoints of a file: `what.written`, `what.renamed`."""
    return bound(_reach, what, unit)


def _reach(what: str, unit: failpoints.Interval | None, when: str) -> None:
    failpoints.reach(f"{what}.{when}", unit)
