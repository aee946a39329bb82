"""Where images come from: a path that a user has -> shards -> samples, one reader a kind.

A reader is a small class that knows its root folder and does two things:

    census(name)               -> Shard: how many samples it holds, and marks from which reading can begin; no image is decoded
    read(shard, start, stop)   -> RawSample, one a sample, in order, from position `start` to `stop`

Both run wherever the shard can be reached, so a reader is picklable and holds no open file. A sample that is incomplete
comes out as a RawSample with its `fault`; it is never left out, so positions always count the same samples.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from typing import Protocol

from pipeline.errors import BadRequest, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Shard:
    """What the census learnt of one shard. `name` is its path below the root; `version` changes when its content does.

    `marks`: ((position, handle), ...), ascending from position 0: places where reading can begin. A handle means
    something to its reader alone and survives JSON.
    """

    name: str
    samples: int
    version: str
    marks: tuple[tuple[int, object], ...]

    def marks_for(self, start: int, stop: int) -> tuple[tuple[int, object], ...]:
        """The marks needed to read [start, stop): the last one at or before `start`, and those inside."""
        first = max((i for i, (position, _) in enumerate(self.marks) if position <= start), default=0)
        return tuple(mark for mark in self.marks[first:] if mark[0] < stop)


@dataclass(frozen=True)
class RawSample:
    """One sample as the source has it: encoded image bytes and label, or the `fault` that keeps it from being used."""

    sample_id: str
    image: bytes = b""
    label: int = -1
    fault: str | None = None


class Source(Protocol):
    """A reader. `kind` names it in messages and records, `root` is the absolute folder that shard names are relative to."""

    kind: str
    root: str

    def census(self, name: str) -> Shard:
        """Count a shard's samples without decoding. Raises BadRequest naming the file if it cannot be read to its end."""

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        """Samples [start, stop) of a shard. Raises OSError or BadRequest if the shard is not what the census saw."""


def open_source(spec: str) -> tuple[Source, list[str]]:
    """(reader, shard names in order) for what `--source` names; the kind follows from what the path holds.

    `spec` is a tar shard, a pattern of them (`*`, `?`, `[...]`, `{00..63}`, `{a,b}`), a folder of them, or a folder of
    class folders. Raises BadRequest if nothing usable is there.
    """
    from pipeline.sources.class_folders import ClassFolders
    from pipeline.sources.webdataset import WebDataset

    patterns = expand_braces(os.path.expanduser(spec))
    paths, missing = [], []
    for pattern in patterns:
        found = sorted(p for p in glob(pattern, recursive=True) if not os.path.isdir(p)) if has_magic(pattern) and not os.path.exists(pattern) else [pattern]
        paths.extend(os.path.abspath(p) for p in found)
        missing.extend([] if found and all(map(os.path.exists, found)) else [pattern])
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BadRequest(f"--source: there is no {printable(missing[0])}{more}; give tar shards (a file, a folder, or a pattern such as 'val-{{00..63}}.tar') or a folder of class folders")
    if len(paths) == 1 and os.path.isdir(paths[0]):
        folder = paths[0]
        tars = sorted(os.path.join(at, f) for at, _, files in os.walk(folder) for f in files if f.endswith(".tar") and not f.startswith("."))
        if not tars:
            return ClassFolders.find(folder)
        return WebDataset(folder), [os.path.relpath(p, folder) for p in tars]
    strange = [p for p in paths if not p.endswith(".tar")]
    if strange:
        hint = "unpack it with gunzip first" if strange[0].endswith((".tar.gz", ".tgz")) else "shards end in .tar"
        raise BadRequest(f"--source: {printable(strange[0])} is not a tar shard: {hint}")
    paths = list(dict.fromkeys(paths))
    fixed = re.split(r"[*?\[{]", os.path.abspath(os.path.expanduser(spec)), maxsplit=1)[0]
    root = os.path.dirname(fixed)
    return WebDataset(root), [os.path.relpath(p, root) for p in paths]


def expand_braces(pattern: str) -> list[str]:
    """`{a,b}` and `{00..63}` as a shell expands them, leading zeros kept; other text as it is."""
    match = re.search(r"\{([^{}]*,[^{}]*|-?\d+\.\.-?\d+)\}", pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    if "," in body:
        words = body.split(",")
    else:
        first, last = body.split("..")
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        words = [str(n).zfill(width) for n in range(int(first), int(last) + step, step)]
    return [whole for word in words for whole in expand_braces(pattern[: match.start()] + word + pattern[match.end() :])]


def reader(kind: str, root: str) -> Source:
    """The reader of a kind again, on any machine that reaches `root`."""
    from pipeline.sources.class_folders import ClassFolders
    from pipeline.sources.webdataset import WebDataset

    return {cls.kind: cls for cls in (WebDataset, ClassFolders)}[kind](root)
