"""Class folders, `val/<class>/<image>`; which folders are classes, and their labels, is said in classes.py.

The whole tree is one shard, so that a unit of work spans small folders. An ID is the path below the root to the first
dot of the file name, which is the key that the same image has in a tar of the tree; ImageNet's own file names
(`ILSVRC2012_val_00000293`, `n01440764_10026`) carry a unique ID already and stand alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import BadRequest, printable
from pipeline.sources import ACCEPTED, Each, RawSample, Shard, Source
from pipeline.sources.classes import Folder, labels_of, remarks, sample_id_of, stands_for_its_folders, told_apart
from pipeline.sources.files import digest, files_below, folders_in, holds_image, images_in, is_image, is_litter, load, look

EVERY = 64  # images between two marks: so many are looked at to read one


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
        while inner := source._only_folder():
            source = cls(inner)
        if source.classes():
            return source, ["."]
        if images := images_in(folder):
            raise BadRequest(
                f"--source: {printable(folder)} holds images ({printable(images[0])}), but no class folders that tell their labels: "
                "put the images of each class into a folder of its own, or pack them as tar shards with .cls"
            )
        raise BadRequest(f"--source: {printable(folder)} holds nothing that is read here; what is: {ACCEPTED}")

    def classes(self) -> list[str]:
        """Class folders in label order."""
        return told_apart(*self._full_and_empty())[0]

    def images(self, folder: str) -> list[str]:
        """Image paths of one class, below the root, with `/`, sorted."""
        start = len(os.path.join(self.root, ""))
        return [] if is_litter(folder) else sorted(path[start:] for path in files_below(os.path.join(self.root, folder), self.root) if is_image(path))

    def _full_and_empty(self) -> tuple[list[str], list[str]]:
        """(folders that hold images, folders that hold none)."""
        folders = folders_in(self.root)
        full = [folder for folder in folders if not is_litter(folder) and holds_image(os.path.join(self.root, folder), self.root)]
        return full, [folder for folder in folders if folder not in set(full)]

    def _only_folder(self) -> str | None:
        """The one folder that holds all images, if it holds class folders itself."""
        full, _ = self._full_and_empty() if not images_in(self.root) else ([], [])
        below = os.path.join(self.root, *full)
        return below if len(full) == 1 and not images_in(below) and stands_for_its_folders(full[0], ClassFolders(below)._full_and_empty()[0]) else None

    def census(self, name: str, each: Each | None = None) -> Shard:
        """Counts files, and asks the size of each. A handle is [label, class folder, place of its images in the folder, their number, digest
        of all names in the folder, digest of their sizes]; the version is a digest of all of it."""
        images = {folder: self.images(folder) for folder in folders_in(self.root)}
        folders = {}
        for folder, paths in images.items():
            folders[folder] = Folder()
            for path in paths:
                folders[folder].add(path[len(folder) + 1 :])
        marks, samples, labels = [], 0, labels_of(self.root, folders, f"give {self.root}/")
        for folder, label in labels.items():
            names = digest(images[folder])
            for first in range(0, len(images[folder]), EVERY):
                part = images[folder][first : first + EVERY]
                marks.append((samples + first, [label, folder, first, len(part), names, digest(size for size, _ in self._look(part))]))
            samples += len(images[folder])
            for path in images[folder] if each else ():
                each(sample_id_of(path), path)
        return Shard(name, samples, digest([list(labels), marks]), tuple(marks))

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        listed, images = None, []
        for position, (label, folder, first, count, names, sizes) in marks:
            if folder != listed:
                listed, images = folder, self.images(folder) if os.path.isdir(os.path.join(self.root, folder)) else []
            part = images[first : first + count]
            found = self._look(part) if digest(images) == names else []
            if digest(size for size, _ in found) != sizes:
                raise BadRequest(f"{printable(os.path.join(self.root, folder))} holds other files than when it was counted: put them back, or extract into another --dataset")
            for at in range(max(start - position, 0), min(stop - position, count)):
                fault = found[at][1]
                content, fault = (b"", fault) if fault else load(os.path.join(self.root, part[at]))
                yield RawSample(sample_id_of(part[at]), content, -1 if fault else label, fault, folder=folder)

    def advice(self, names: list[str]) -> list[str]:
        stray = images_in(self.root)
        return remarks(*self._full_and_empty()) + ([f"images that lie in no class folder are left out: {printable(stray[0])} ({len(stray)} in all)"] if stray else [])

    def _look(self, paths: list[str]) -> list[tuple[int, str | None]]:
        """Size of each, and why it cannot be used."""
        return [look(os.path.join(self.root, path)) for path in paths]
