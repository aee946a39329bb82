"""A tar or tar.gz of class folders, `<folders>/<class>/<image>`, without labels of its own: `imagenetv2-matched-frequency.tar.gz`.

Every image in a class folder is a sample, in the archive's order. Labels, IDs and refusals are those of the unpacked tree (classes.py):
folders that all images share are no part of an ID. One archive is one data set, since the rank of a class needs all classes.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from pipeline.errors import BadRequest, printable
from pipeline.sources import Each, RawSample, Shard, Source
from pipeline.sources.classes import Folder, labels_of, remarks, sample_id_of, stands_for_its_folders
from pipeline.sources.files import MOST_BYTES, is_image, is_litter
from pipeline.sources.tars import MARK_EVERY, Group, count, fingerprint, groups, handle_of, is_gzip
from pipeline.sources.webdataset import slow


@dataclass(frozen=True)
class TarFolders(Source):
    """Reader of the archives of class folders in `root`."""

    root: str
    kind: ClassVar[str] = "tar of class folders"

    @classmethod
    def holds(cls, files: list[str]) -> bool:
        """Whether the first files of an archive are images in folders, and no labels."""
        return any(_image_path(f) for f in files) and not any(f.lower().endswith((".cls", ".json")) for f in files)

    def census(self, name: str, each: Each | None = None) -> Shard:
        """Images of the archive from its headers alone. A handle is [[byte offset, digest of the headers up to the next mark] (of a .tar.gz: its fingerprint), parts of a path above the
        class folder, [[class, label], ...] of the samples up to the next mark]."""
        path, contents = os.path.join(self.root, name), _Contents()
        marks: list[tuple[int, Group, dict]] = []

        def note(position: int, group: Group) -> None:
            for times, member in enumerate(group.members if each else ()):
                each(sample_id_of(group.key), group.key + (f" again, at byte {member.offset}" if times else ""))
            if position % MARK_EVERY == 0:
                marks.append((position, group, {}))
            marks[-1][2][posixpath.dirname(group.key)] = None

        samples, version, digests = count(path, contents.key, note)
        contents.refuse_other_layouts(path)
        up = contents.above()
        label = labels_of(path, contents.folders(up), f"unpack it, and give the folder {'/'.join([*contents.shared(up), ''])}")
        start = fingerprint(path) if is_gzip(name) else None
        handles = [(p, [start or handle_of(group, digest), up, [list(pair) for pair in sorted({f.split("/")[up]: label[f.split("/")[up]] for f in folders}.items())]]) for (p, group, folders), digest in zip(marks, digests)]
        return Shard(name, samples, version, tuple(handles))

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        path = os.path.join(self.root, name)
        labels = dict(pair for _, (_, _, pairs) in marks for pair in pairs)
        above = marks[0][1][1]
        for group in groups(path, _key, lambda member: True, [(position, at) for position, (at, _, _) in marks], start, stop):
            parts = group.key.split("/")[above:]
            if len(parts) < 2 or parts[0] not in labels:
                raise BadRequest(f"{printable(path)} holds other files than when it was counted: put the old file back, or extract into another --dataset")
            sample_id, member = sample_id_of("/".join(parts)), group.members[0]
            if len(group.members) > 1:
                yield RawSample(sample_id, fault="two members of this name in a row")
            elif not member.isfile():
                yield RawSample(sample_id, fault="the archive holds a link in its place: pack the images themselves (tar --dereference --hard-dereference)")
            elif member.size > MOST_BYTES:
                yield RawSample(sample_id, fault=f"larger than {MOST_BYTES >> 20} MiB")
            else:
                yield RawSample(sample_id, group.contents[member.offset], labels[parts[0]], folder=parts[0])

    def advice(self, names: list[str]) -> list[str]:
        if is_gzip(names[0]):  # counting unpacks all of it
            return slow(names)
        contents = _Contents()
        count(os.path.join(self.root, names[0]), contents.key, lambda position, group: None)
        folders = contents.folders(contents.above())
        return remarks([f for f, folder in folders.items() if folder.images], [f for f, folder in folders.items() if not folder.images])


@dataclass
class _Contents:
    """What the headers of an archive say. `images`: the first names in each folder of images, and how many there are; `empty`: all other folders."""

    images: dict[str, Folder] = field(default_factory=dict)
    empty: dict[str, None] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)  # folder -> the first member there that looks like a label
    stray: str = ""  # the first image that lies in no folder

    def key(self, member: tarfile.TarInfo) -> str:
        """As `_key`, and takes note of the member."""
        key = _key(member)
        path = posixpath.normpath(member.name)
        folder, name = posixpath.split(path)
        if key:
            self.images.setdefault(folder, Folder()).add(name)
        elif member.isdir() and not name.startswith(".") and name:
            self.empty[path] = None
        elif member.isfile() and not name.startswith(".") and path.lower().endswith((".cls", ".json")):
            self.labels.setdefault(folder, path)
        elif member.isfile() and is_image(path) and not folder.strip("/"):
            self.stray = self.stray or path
        return key

    def refuse_other_layouts(self, path: str) -> None:
        """Raises BadRequest for an archive whose labels are not, or not only, those of its folders."""
        label = next((label for folder, label in self.labels.items() if label.lower().endswith(".cls") or folder in self.images), None)
        if label:
            raise BadRequest(f"--source: {printable(path)} begins as class folders do, and holds labels as well ({printable(label)}): pack it so that each image is followed by its label (tar --sort=name), or without the labels")
        if self.stray:
            raise BadRequest(f"--source: {printable(path)} holds an image that lies in no class folder ({printable(self.stray)}): pack it without, or all images as tar shards with .cls")

    def shared(self, parts: int) -> list[str]:
        return next(iter(self.images), "").split("/")[:parts]

    def above(self) -> int:
        """How many leading parts of a path stand above the class folder: folders that all images share."""
        paths, up = [folder.split("/") for folder in self.images], 0
        while paths and all(len(p) > up + 1 and p[up] == paths[0][up] for p in paths) and stands_for_its_folders(paths[0][up], {p[up + 1] for p in paths}):
            up += 1
        return up

    def folders(self, up: int) -> dict[str, Folder]:
        """The folders below the shared ones."""
        found: dict[str, Folder] = {}
        for folder, held in self.images.items():
            name, *inner = folder.split("/")[up:]
            one = found.setdefault(name, Folder())
            one.images += held.images
            one.names += held.names
            if inner:
                one.deeper["/".join(inner)] = held.images
        for folder in self.empty:
            parts = folder.split("/")
            if len(parts) > up and parts[:up] == self.shared(up):
                found.setdefault(parts[up], Folder())
        return found


def _key(member: tarfile.TarInfo) -> str:
    """The path of an image, or of a link in the place of one, in a folder, without `./`; "" for all else."""
    return _image_path(member.name) if member.isfile() or member.islnk() or member.issym() else ""


def _image_path(name: str) -> str:
    """As `_key`; "" for a path that climbs out of the archive, or that a tree would not show."""
    path = posixpath.normpath(name)
    folder = posixpath.dirname(path)
    return path if folder.strip("/") and is_image(path) and not path.startswith("../") and not _hidden(folder.split("/")) else ""


def _hidden(folders: Iterable[str]) -> bool:
    return any(map(is_litter, filter(None, folders)))
