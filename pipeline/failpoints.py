"""Named points of the work at which a fault can be planted: the process killed or stopped there, delayed, or refused by its disk.

Off in normal use: without FAULTLINE_FAILPOINTS a point is one comparison. With it, the variable names a folder, and a fault is a file of
it, `<anything>.json`, that exactly one process carries out, whichever comes by first, on whatever machine reaches the folder:

    {"point": "profiles.written", "action": "kill", "shard": "val-00003.tar", "position": 17, "times": 1}

point       one of `POINTS`
action      kill (SIGKILL), stop (SIGSTOP), sleep (`seconds`), or error (`errno`, an OSError)
shard, position   only where the unit at work holds them; absent: any unit
times       1 (the default): the file is taken away by whoever carries it out; null: it stays

Where the folder holds a file `trace`, every point that is reached is appended to it, a line each: point, unit, process.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Protocol

VARIABLE = "FAULTLINE_FAILPOINTS"
POINTS = {
    "manifest.written": "run.json is on the disk under another name; the weights lie beside it",
    "manifest.renamed": "the run is begun, and has no data set",
    "census.written": "the census of a data set is on the disk under another name",
    "census.renamed": "the census has its name, and no unit has begun",
    "decode": "a unit is about to be read from its shard",
    "profile": "its samples have arrived at an engine",
    "profiled": "its vectors are computed, and nothing of them has a name that a reader matches",
    "rejects.written": "its rejects are on the disk, under a name that no reader matches",
    "rejects.renamed": "its rejects have their name",
    "profiles.written": "its profiles are on the disk, under a name that no reader matches",
    "profiles.renamed": "it is committed, and nobody has been told",
    "statistics.written": "mu and sigma are on the disk under another name",
    "statistics.renamed": "they have their name",
    "index.written": "the vectors of an index are on the disk under another name; index.json is gone",
    "index.renamed": "vectors and rows of an index are in place, index.json is not",
    "rows.written": "the rows of a unit of an experiment are on the disk under another name",
    "rows.renamed": "they have their name",
}  # in the order in which a run comes to them


class Interval(Protocol):
    """What a point knows of the unit at work."""

    shard: str
    start: int
    stop: int


def reach(point: str, unit: Interval | None = None) -> None:
    """Carry out what is planted here. Raises OSError where that is what was planted."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return
    trace = Path(folder) / "trace"
    if trace.exists():
        with open(trace, "a", encoding="utf-8") as file:  # one short write in append mode: lines of several processes do not mix
            file.write(f"{point}\t{unit.shard if unit else ''}\t{unit.start if unit else 0}\t{unit.stop if unit else 0}\t{os.getpid()}\n")
    for path in sorted(Path(folder).glob("*.json")):
        try:
            planted = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # somebody else has just taken it
        if planted["point"] == point and _holds(planted, unit) and _taken(path, planted):
            _carry_out(planted)


def _holds(planted: dict, unit: Interval | None) -> bool:
    if planted.get("shard") is None:
        return True
    position = planted.get("position")
    return unit is not None and unit.shard == planted["shard"] and (position is None or unit.start <= position < unit.stop)


def _taken(path: Path, planted: dict) -> bool:
    """Whether this process is the one to carry it out."""
    if planted.get("times", 1) is None:
        return True
    try:
        path.rename(path.with_suffix(f".{os.getpid()}"))
    except OSError:
        return False
    return True


def _carry_out(planted: dict) -> None:
    action = planted["action"]
    if action == "sleep":
        time.sleep(planted["seconds"])
    elif action == "error":
        number = getattr(errno, planted["errno"])
        raise OSError(number, os.strerror(number))
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action])
