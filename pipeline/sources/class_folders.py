"""Class folders, `val/<class>/<image>`: the label is the rank of the class folder among the sorted ones.

The whole tree is one shard, so that a unit of work spans small folders. An ID is the path below the root to the first
dot of the file name, which is the key that the same image has in a tar of the tree; ImageNet's own file names
(`ILSVRC2012_val_00000293`, `n01440764_10026`) carry a unique ID already and stand alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.errors import BadRequest, printable
from pipeline.sources import IMAGE_SUFFIXES, RawSample, Shard
from pipeline.sources.webdataset import key_of

IMAGENET_NAME = re.compile(r"(ILSVRC2012_(?:val|test|train)_\d{8}|n\d{8}_\d+)(?:_n\d{8})?$")


@dataclass(frozen=True)
class ClassFolders:
    """Reader of a tree of class folders at `root`."""

    root: str
    kind: ClassVar[str] = "class folders"

    @classmethod
    def find(cls, folder: str) -> tuple[ClassFolders, list[str]]:
        """(reader, its one shard). Raises BadRequest if no folder below `folder` holds an image."""
        source = cls(folder)
        if not any(source.images(name) for name in source.classes()):
            raise BadRequest(f"--source: {printable(folder)} holds neither .tar shards nor class folders with images ({', '.join(IMAGE_SUFFIXES[:3])}, ...)")
        return source, ["."]

    def classes(self) -> list[str]:
        """Class folders in label order."""
        return sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir() and not entry.name.startswith("."))

    def images(self, folder: str) -> list[str]:
        """Image paths of one class, below the root, with `/`, sorted."""
        found = []
        for at, _, files in os.walk(os.path.join(self.root, folder)):
            found.extend(os.path.relpath(os.path.join(at, f), self.root) for f in files if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith("."))
        return sorted(Path(p).as_posix() for p in found)

    def census(self, name: str) -> Shard:
        """Counts files. A handle is [label, class folder, digest of its file names]; the version is a digest of all names."""
        marks, samples = [], 0
        for label, folder in enumerate(self.classes()):
            images = self.images(folder)
            marks.append((samples, [label, folder, _digest(images)]))
            samples += len(images)
        return Shard(name, samples, _digest(part for _, (_, *parts) in marks for part in parts), tuple(marks))

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        position = marks[0][0]
        for _, (label, folder, digest) in marks:
            images = self.images(folder)
            if _digest(images) != digest:
                raise BadRequest(f"{printable(os.path.join(self.root, folder))} holds other files than when the run began: put them back, or begin another run")
            for path in images:
                if start <= position < stop:
                    yield RawSample(sample_id_of(path), Path(self.root, path).read_bytes(), label)
                position += 1


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def sample_id_of(path: str) -> str:
    """`cat/001.jpg` -> `cat/001`; `n01440764/ILSVRC2012_val_00000293.JPEG` -> `ILSVRC2012_val_00000293`."""
    key = key_of(path)[0]
    known = IMAGENET_NAME.match(os.path.basename(key))
    return known.group(1) if known else key
