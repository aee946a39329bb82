"""Images that lie as rows of numbers in a file, read a stretch at a time: what CIFAR's batches and .npy and .npz arrays share.

A stretch is at most 128 rows and about 4 MiB. Its digest is the handle of its mark, so that a file that was changed anywhere is
refused where it is read. Pixels become a PNG of themselves, which keeps them exactly: an image is encoded bytes from here on.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from pipeline.errors import BadRequest, printable
from pipeline.sources import Each, RawSample, Shard, Source

ROWS, BYTES = 128, 4 << 20  # of a stretch, at most (one row may be larger)
FAULTS = (OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, zlib.error, zipfile.BadZipFile)  # what damaged files make their readers raise


class Unfit(ValueError):
    """A file that is whole, and not what is read here; the text ends with what to do about it."""


class Seekable(Protocol):
    def seek(self, position: int) -> object: ...

    def read(self, size: int) -> bytes: ...


@dataclass(frozen=True)
class Rows:
    """An opened file: image i is `size` bytes from `offset + i * size` on. shape: (H, W, 3), or (3, H, W) where colours lie apart.
    `exact`: the file ends with the last image, and more would mean that something in it has shifted."""

    file: Seekable
    offset: int
    shape: tuple[int, int, int]
    labels: list[int]
    planar: bool = False
    exact: bool = False

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def stretch(self) -> int:
        """Rows of a stretch."""
        return max(1, min(ROWS, BYTES // self.size))

    def pixels(self, start: int, stop: int) -> np.ndarray:
        """uint8 [stop - start, H, W, 3]. Raises EOFError if the file is too short."""
        self.file.seek(self.offset + start * self.size)
        data = bytearray()
        while len(data) < (stop - start) * self.size and (more := self.file.read((stop - start) * self.size - len(data))):
            data += more
        if len(data) < (stop - start) * self.size:
            raise EOFError(f"it ends before image {stop - 1}")
        rows = np.frombuffer(data, np.uint8).reshape(-1, *self.shape)
        return rows.transpose(0, 2, 3, 1) if self.planar else rows

    def digest(self, start: int, pixels: np.ndarray) -> str:
        labels = repr(self.labels[start : start + len(pixels)])
        return hashlib.sha256(np.ascontiguousarray(pixels).data.tobytes() + labels.encode()).hexdigest()[:16]


class Stretches(Source, ABC):
    """Reader of files of rows below `root`; a kind says how one is opened."""

    root: str
    kind = "rows"
    together = 16  # a stretch is read whole

    @abstractmethod
    def opened(self, path: str) -> AbstractContextManager[Rows]:
        """Raises one of FAULTS, whose text ends up behind the path, or BadRequest."""

    def stem(self, name: str) -> str:
        """What an ID begins with."""
        return os.path.splitext(name)[0]

    def census(self, name: str, each: Each | None = None) -> Shard:
        """Reads the file once. A handle is the digest of the stretch's pixels and labels; the version is a digest of them all."""
        marks = []
        try:
            with self.opened(self._path(name)) as rows:
                for start in range(0, len(rows.labels), rows.stretch):
                    marks.append((start, rows.digest(start, rows.pixels(start, min(start + rows.stretch, len(rows.labels))))))
                if rows.exact and rows.file.read(1):
                    raise EOFError("it holds more pixels than its images have")
                for at in range(len(rows.labels) if each else 0):
                    each(self._id(name, at), f"image {at}")
                return Shard(name, len(rows.labels), hashlib.sha256(repr(marks).encode()).hexdigest()[:16], tuple(marks))
        except FAULTS as fault:
            raise BadRequest(f"{printable(self._path(name))} cannot be read: {printable(fault)[:300]}{remedy(fault)}") from None

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        try:
            with self.opened(self._path(name)) as rows:
                for first, digest in marks:
                    pixels = rows.pixels(first, min(first + rows.stretch, len(rows.labels)))
                    if rows.digest(first, pixels) != digest:
                        raise EOFError("it holds other images or labels")
                    for at in range(max(start, first), min(stop, first + len(pixels))):
                        yield RawSample(self._id(name, at), png(pixels[at - first]), rows.labels[at])
        except FAULTS as fault:
            raise BadRequest(f"{printable(self._path(name))} is not what it was when it was counted ({printable(fault)[:300]}): put the old file back, or extract into another --dataset") from None

    def _id(self, name: str, at: int) -> str:
        return f"{self.stem(name)}/{at:06d}"

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)


def remedy(fault: Exception) -> str:
    """What ends the message about a file that cannot be read."""
    return "" if isinstance(fault, Unfit) else "; fetch it again, or leave it out of --source"


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] without loss."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG", compress_level=1)
    return out.getvalue()
