"""Class folders, `val/<class>/<image>`: the label is the rank of the class folder among the sorted ones, or its number.

Folders named `0` to `n-1` are labels as they stand, as in ImageNet-v2, whose order as strings (0, 1, 10, 100, ...) would ruin every label.

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
from pipeline.sources import ACCEPTED, IMAGE_SUFFIXES, RawSample, Shard, Source
from pipeline.sources.tars import key_of

IMAGENET_NAME = re.compile(r"(ILSVRC2012_(?:val|test|train)_\d{8}|n\d{8}_\d+)(?:_n\d{8})?$")
WNID = re.compile(r"n\d{8}$")


@dataclass(frozen=True)
class ClassFolders(Source):
    """Reader of a tree of class folders at `root`."""

    root: str
    kind: ClassVar[str] = "class folders"

    @classmethod
    def find(cls, folder: str) -> tuple[ClassFolders, list[str]]:
        """(reader, its one shard). A folder that holds nothing but one folder of class folders stands for that one (a release
        unpacked into a folder of its own). Raises BadRequest if no folder below `folder` holds an image."""
        source = cls(folder)
        while len(inner := source.classes()) == 1 and not _files(below := os.path.join(source.root, inner[0])) and len(cls(below).classes()) > 1:
            source = cls(below)
        if not any(source.images(name) for name in source.classes()):
            raise BadRequest(f"--source: {printable(folder)} holds nothing that is read here; what is: {ACCEPTED}")
        return source, ["."]

    def classes(self) -> list[str]:
        """Class folders in label order."""
        return in_label_order(entry.name for entry in os.scandir(self.root) if entry.is_dir() and not entry.name.startswith("."))

    def images(self, folder: str) -> list[str]:
        """Image paths of one class, below the root, with `/`, sorted."""
        found = []
        for at, _, files in os.walk(os.path.join(self.root, folder)):
            found.extend(os.path.relpath(os.path.join(at, f), self.root) for f in files if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith("."))
        return sorted(Path(p).as_posix() for p in found)

    def census(self, name: str) -> Shard:
        """Counts files. A handle is [label, class folder, digest of its file names]; the version is a digest of all names."""
        marks, samples = [], 0
        classes = {folder: self.images(folder) for folder in self.classes()}
        refuse_old_v2(self.root, classes)
        labels = labels_of(list(classes))
        for folder, images in classes.items():
            marks.append((samples, [labels[folder], folder, _digest(images)]))
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
                    yield RawSample(sample_id_of(path), Path(self.root, path).read_bytes(), label, folder=folder)
                position += 1


    def advice(self, names: list[str]) -> list[str]:
        return remark(self.classes())


def _numbered(folders: list[str]) -> bool:
    """Whether these names are labels: whole numbers, each another one, and 0 to n-1 or at least ImageNet's."""
    if not folders or not all(f.isascii() and f.isdigit() for f in folders):
        return False
    numbers = set(map(int, folders))
    return len(numbers) == len(folders) and max(numbers) < max(len(folders), 1000)


def in_label_order(folders: Iterable[str]) -> list[str]:
    """Class folders sorted by label: numbers by their size, anything else as strings."""
    folders = list(folders)
    return sorted(folders, key=int) if _numbered(folders) else sorted(folders)


def labels_of(ordered: list[str]) -> dict[str, int]:
    """Label of every class folder: its number where all are numbers, its rank otherwise."""
    return {folder: int(folder) if _numbered(ordered) else rank for rank, folder in enumerate(ordered)}


def remark(ordered: list[str]) -> list[str]:
    """What a user should know of numbered folders with gaps."""
    if _numbered(ordered) and len(ordered) > 1 and int(ordered[-1]) >= len(ordered):
        return [f"the class folders are numbers with gaps ({printable(ordered[0])} to {printable(ordered[-1])}, {len(ordered)} of them): the number of a folder is taken as its label, counted from 0"]
    return []


def refuse_old_v2(where: str, classes: dict[str, list[str]]) -> None:
    """Raises BadRequest for the older release of ImageNet-v2: 20 images in each wnid-named folder, under names that are not ImageNet's."""
    if classes and all(WNID.match(folder) and len(images) == 20 for folder, images in classes.items()):
        if not any(IMAGENET_NAME.match(os.path.basename(image).partition(".")[0]) for images in classes.values() for image in images):
            raise BadRequest(
                f"--source: {printable(where)} looks like the older release of ImageNet-v2 (20 images in each folder named by a WordNet ID), whose labels are not to be relied on: "
                "fetch imagenetv2-matched-frequency.tar.gz, which has folders 0..999, or, if these are other images, pack them as tar shards with .cls"
            )


def _files(folder: str) -> list[str]:
    """Visible files of a folder."""
    return [entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def sample_id_of(path: str) -> str:
    """`cat/001.jpg` -> `cat/001`; `n01440764/ILSVRC2012_val_00000293.JPEG` -> `ILSVRC2012_val_00000293`."""
    key = key_of(path)[0]
    known = IMAGENET_NAME.match(os.path.basename(key))
    return known.group(1) if known else key
