"""Arrays of numpy: images uint8 [N, H, W, 3] and a whole number each, as `.npy` with a `.npy` of labels beside it (CIFAR-10.1's
`cifar10.1_v6_data.npy` and `cifar10.1_v6_labels.npy`), or as one `.npz` with `images` and `labels`.

The ID is file and index, `cifar10.1_v6_data/000042`. Headers are parsed and rows read from their place; pickles inside are never loaded.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

import numpy as np

from pipeline.errors import BadRequest, printable
from pipeline.sources.splits import refuse_versions
from pipeline.sources.stretches import FAULTS, Rows, Stretches, Unfit

KEYS = (("images", "labels"), ("data", "labels"), ("x", "y"), ("x_test", "y_test"))  # of an .npz
WORDS = (("data", "labels"), ("images", "labels"))  # in the names of an .npy and its labels


@dataclass(frozen=True)
class Header:
    """Of one array: where its first byte lies, and what they mean."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @classmethod
    def read(cls, file: BinaryIO) -> Header:
        """Raises ValueError for what is no array of plain numbers in C's order."""
        try:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise Unfit(f"its format {version} is not known here: save it again with numpy.save")
            shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
        except (Unfit, OSError):
            raise
        except Exception:  # numpy parses the header as Python, which raises almost anything; its own words are about magic strings
            raise ValueError("it is no array of numpy's, or its beginning is damaged") from None
        if dtype.hasobject or dtype.names:
            raise Unfit("it holds Python objects (a pickle) or records, which are never loaded; save plain numbers")
        if fortran and len(shape) > 1:
            raise Unfit("it is in Fortran's order; save np.ascontiguousarray of it")
        return cls(shape, dtype, file.tell())

    @property
    def is_labels(self) -> bool:
        return self.dtype.kind in "iu" and (len(self.shape) == 1 or (len(self.shape) == 2 and self.shape[1] == 1))

    def check_images(self) -> None:
        """Raises ValueError with the remedy."""
        if self.dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or min(self.shape[1:]) < 1 or self.shape[0] < 0:
            hint = "transpose(0, 2, 3, 1) makes them so" if len(self.shape) == 4 and self.shape[1] == 3 else "grey images want their channel three times" if len(self.shape) == 3 else "save 0..255 as uint8"
            raise Unfit(f"its images are {self.dtype} {self.shape}, not uint8 (N, H, W, 3): {hint}")

    def labels(self, file: BinaryIO, images: int) -> list[int]:
        """Raises ValueError if they are not as many whole numbers as images."""
        if not self.is_labels or self.shape[0] != images:
            hint = ": save the argmax(1) of them" if len(self.shape) == 2 and self.shape[0] == images else ": save them as int64" if self.shape == (images,) else ": give each image one"
            raise Unfit(f"its labels are {self.dtype} {self.shape}, not {images} whole numbers{hint}")
        data = file.read(images * self.dtype.itemsize)
        if len(data) < images * self.dtype.itemsize:
            raise ValueError(f"its labels ({printable(os.path.basename(file.name))}) are cut off")
        return np.frombuffer(data, self.dtype).tolist()


class Unpacked:
    """A member of an .npz, read forward in small steps; going back begins it again. (zipfile itself skips 16 MiB at a time.)"""

    def __init__(self, file: zipfile.ZipExtFile):
        self.file = file

    def seek(self, position: int) -> None:
        if position < self.file.tell():
            self.file.seek(0)
        while (left := position - self.file.tell()) > 0 and self.file.read(min(1 << 20, left)):
            pass

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, 1 << 20))


@dataclass(frozen=True)
class Arrays(Stretches):
    """Reader of `.npz` files, and of `.npy` files with their labels, below `root`."""

    root: str
    kind: ClassVar[str] = "arrays"

    @classmethod
    def find(cls, root: str, names: list[str]) -> tuple[Arrays, list[str]]:
        """(reader, the files that hold images). Raises BadRequest if all hold labels, or two are versions of one data set."""
        images = [name for name in names if not _holds_labels(os.path.join(root, name))]
        refuse_versions(root, images)
        if not images:
            raise BadRequest(f"--source: {printable(names[0])} holds labels, and nothing in --source holds images: name the images' file; labels are found beside it")
        return cls(root), images

    @contextmanager
    def opened(self, path: str) -> Iterator[Rows]:
        with ExitStack() as files:
            if path.lower().endswith(".npz"):
                archive = files.enter_context(zipfile.ZipFile(path))
                members = {name.removesuffix(".npy") for name in archive.namelist()}
                pair = next((keys for keys in KEYS if members.issuperset(keys)), None)
                if pair is None:
                    raise Unfit(f"it holds {printable(', '.join(sorted(members)[:8])) or 'nothing'}; name its arrays images and labels")
                file, beside = (files.enter_context(archive.open(f"{key}.npy")) for key in pair)
                size = archive.getinfo(f"{pair[0]}.npy").file_size
            else:
                file, beside = (files.enter_context(open(p, "rb")) for p in (path, labels_beside(path)))
                size = os.path.getsize(path)
            header = Header.read(file)
            header.check_images()
            if header.offset + np.prod(header.shape, dtype=object) > size:
                raise ValueError(f"it is cut off: its header promises {header.shape[0]} images")
            yield Rows(Unpacked(file) if path.lower().endswith(".npz") else file, header.offset, header.shape[1:], _labels(beside, header.shape[0], printable(os.path.basename(beside.name))))


def _labels(file: BinaryIO, images: int, name: str) -> list[int]:
    """Raises ValueError saying that it is the labels, which are called so, that cannot be used."""
    try:
        header = Header.read(file)
    except ValueError as fault:
        raise type(fault)(f"its labels ({name}) cannot be used: {fault}") from None
    return header.labels(file, images)


def labels_beside(path: str) -> str:
    """The file with the labels of an `.npy` of images. Raises ValueError saying what it would be called."""
    folder, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    candidates = [os.path.join(folder, word.join(stem.rsplit(old, 1)) + ".npy") for old, word in WORDS if old in stem] + [os.path.join(folder, f) for f in (f"{stem}_labels.npy", "labels.npy")]
    found = next((c for c in candidates if c != path and os.path.isfile(c) and _holds_labels(c)), None)
    if found is None:
        raise Unfit(f"there are no labels beside it: put them into {printable(os.path.basename(candidates[0]))}, one whole number an image")
    return found


def _holds_labels(path: str) -> bool:
    """Whether an `.npy` is one of labels: by what it holds, or, where these are none that can be used, by its name."""
    if not path.lower().endswith(".npy"):
        return False
    try:
        with open(path, "rb") as file:
            header = Header.read(file)
            return header.is_labels or ("labels" in os.path.basename(path) and len(header.shape) < 3)
    except FAULTS:
        return "labels" in os.path.basename(path)
