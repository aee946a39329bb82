"""Images, tar shards and class folders, made from nothing for one test; and what a reader makes of them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.sources import RawSample, Source, reader


def picture(seed: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """Random pixels, smooth enough that a JPEG of them keeps them apart; size is (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def photo(seed: int = 0, size: tuple[int, int] = (12, 10)) -> bytes:
    """A small JPEG."""
    return encoded(picture(seed, size))


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, content) in order; a TarInfo in place of a name is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isfile():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shard(path: Path, labels: list[int], first: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    """A shard of samples `00000`, `00001`, ... from `first` on, each a JPEG of its own and a `.cls`."""
    members = []
    for i, label in enumerate(labels, first):
        members += [(f"{i:05d}.jpg", photo(i, size)), (f"{i:05d}.cls", str(label).encode())]
    return write_tar(path, members)


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """Files below `root` by their path; a path that ends in `/` is an empty folder."""
    for name, content in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def samples(source: Source, name: str, start: int = 0, stop: int | None = None) -> list[RawSample]:
    """Samples [start, stop) of a shard, read as a worker on another machine would: reader and marks come out of JSON."""
    shard = source.census(name)
    stop = shard.samples if stop is None else stop
    marks = tuple(map(tuple, json.loads(json.dumps(shard.marks_for(start, stop)))))
    return list(reader(source.kind, source.root).read(marks, name, start, stop))


def check_interval(source: Source, name: str, everything: list[RawSample], start: int, stop: int) -> None:
    """Samples [start, stop), read by a reader that was pickled, as to another machine, are that slice of the whole shard."""
    if start < stop:
        assert samples(pickle.loads(pickle.dumps(source)), name, start, stop) == everything[start:stop]
