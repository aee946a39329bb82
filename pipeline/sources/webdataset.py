"""WebDataset tar shards: consecutive members with one key are one sample.

The key is the member's path to the first dot of its file name, folders kept; it is the sample's ID. A sample has one
image (`.jpg`, `.jpeg` or `.png`) and a label: `.cls`, a whole number as text, or `.json` with a `label`.
Members are read in place and never unpacked, so a hostile path in an archive leads nowhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import ClassVar

from pipeline.errors import BadRequest, printable
from pipeline.sources import RawSample, Shard

MARK_EVERY = 128  # samples between two places from which reading can begin
IMAGES = ("jpg", "jpeg", "png")


@dataclass(frozen=True)
class WebDataset:
    """Reader of uncompressed tar shards below `root`."""

    root: str
    kind: ClassVar[str] = "webdataset"

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def census(self, name: str) -> Shard:
        """Samples of one shard from its headers alone. A handle is the byte offset of a sample's first header; the version is
        a digest of all members' names, sizes and times."""
        marks, samples, headers = [], 0, hashlib.sha256()
        try:
            with tarfile.open(self.path(name), "r:") as tar:
                for key, members in _by_key(tar):
                    if samples % MARK_EVERY == 0:
                        marks.append((samples, members[0].offset))
                    samples += 1
                    headers.update(repr([(m.name, m.size, m.mtime) for m in members]).encode("utf-8", "surrogateescape"))
                    tar.members.clear()  # tarfile keeps every header it has seen
                _check_end(tar)
        except (tarfile.TarError, OSError, EOFError) as fault:
            raise BadRequest(f"{printable(self.path(name))} cannot be read to its end ({printable(fault)}): fetch it again or repack it, or leave it out of --source") from None
        return Shard(name, samples, headers.hexdigest()[:16], tuple(marks))

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        position, offset = marks[0]
        with open(self.path(name), "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for key, members in _by_key(tar):
                    if position >= stop:
                        return
                    if position >= start:
                        yield _sample(tar, key, members)
                    position += 1
                    tar.members.clear()
        if position < stop:
            raise BadRequest(f"{printable(self.path(name))} holds {position} samples where it held {stop} or more when the run began: put the old file back, or begin another run")


def key_of(path: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member: `a/b.c/img.01.JPG` -> (`a/b.c/img`, `01.jpg`).

    Bytes that are no UTF-8 are written as their escapes, so that every key can be stored as text.
    """
    path = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    folder, name = posixpath.split(path)
    key, _, extension = name.partition(".")
    return posixpath.join(folder, key) if key else "", extension.lower()


def _by_key(tar: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Consecutive regular files of one key. Folders, links, devices and hidden files are no part of a sample."""
    keyed = ((key_of(member.name)[0], member) for member in tar if member.isfile())
    for key, group in groupby(((k, m) for k, m in keyed if k), key=itemgetter(0)):
        yield key, [member for _, member in group]


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError unless the archive ends with tar's own end mark, a block of zeros: tarfile stops as quietly where a
    transfer was cut off, or at a damaged header."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"{'a damaged header' if block else 'no end mark'} at byte {tar.offset}")


def _sample(tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo]) -> RawSample:
    parts = {}
    for member in members:
        extension = key_of(member.name)[1]
        if extension in parts:
            return RawSample(key, fault=f"two members named .{printable(extension)} under this key")
        parts[extension] = member
    image = next((parts[e] for e in IMAGES if e in parts), None)
    if image is None:
        return RawSample(key, fault="no image (.jpg, .jpeg or .png) under this key")
    try:
        label = _label(tar, parts)
    except ValueError as fault:
        return RawSample(key, fault=str(fault))
    return RawSample(key, tar.extractfile(image).read(), label)


def _label(tar: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> int:
    """Raises ValueError with the reason if there is no usable label."""
    if "cls" in parts:
        text = tar.extractfile(parts["cls"]).read(64).decode("utf-8", "replace").strip()
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"its .cls holds '{printable(text)}', not a whole number") from None
    if "json" in parts:
        try:
            label = json.loads(tar.extractfile(parts["json"]).read())["label"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError("its .json holds no \"label\"") from None
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"the label in its .json is {printable(json.dumps(label)[:40])}, not a whole number")
        return label
    raise ValueError("no label (.cls, or .json with \"label\") under this key")
