"""Where images come from: a path that a user has -> shards -> samples, one reader a kind.

A reader is a small class that knows its root folder and does two things:

    census(name, each)         -> Shard: how many samples it holds, and marks from which reading can begin; no image is decoded
    read(shard, start, stop)   -> RawSample, one a sample, in order, from position `start` to `stop`

Both run wherever the shard can be reached, so a reader is picklable and holds no open file. A sample that is incomplete
comes out as a RawSample with its `fault`; it is never left out, so positions always count the same samples.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from pipeline.errors import BadRequest, printable
from pipeline.sources.files import DEVKIT, files_below, is_image
from pipeline.sources.paths import ACCEPTED, paths_of
from pipeline.sources.splits import pattern_of, refuse_mixed

FILES = {
    "tar shards": (".tar", ".tar.gz", ".tgz"),
    "Parquet files": (".parquet",),
    "arrays": (".npz", ".npy"),
}
BATCH = re.compile(r"data_batch_\d+|test_batch|train|test")  # what CIFAR's python release calls its pickles
UNPACKED = re.compile(rf"(.*/)?({BATCH.pattern})|(\./)?((?!n\d{{8}}/)\D[^/]*/)?ILSVRC2012_val_\d{{8}}\.JPEG")  # in a tar: CIFAR's python release, ImageNet's flat images
NO_DEVKIT = "--devkit: it tells the labels of ImageNet's flat validation folder (ILSVRC2012_val_00000001.JPEG, ...), and --source is not one; leave it out"


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
    """One sample as the source has it: encoded image bytes and label, or the `fault` that keeps it from being used.

    `folder`: the class folder that it lies in, where the kind has some.
    """

    sample_id: str
    image: bytes = b""
    label: int = -1
    fault: str | None = None
    folder: str = field(default="", compare=False)


Each = Callable[[str, str], None]  # of the ID of a sample, and where in its shard it lies, in words


class Source(Protocol):
    """A reader. `kind` names it in messages and records, `root` is the absolute folder that shard names are relative to."""

    kind: str
    root: str
    together = 1  # samples that a single access gives at the price of one, where their neighbours are of other classes

    def census(self, name: str, each: Each | None = None) -> Shard:
        """Count a shard's samples without decoding; `each` is shown every one. Raises BadRequest naming the file if it cannot be read to its end."""

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        """Samples [start, stop) of a shard. Raises OSError or BadRequest if the shard is not what the census saw."""

    def pick(self, shard: Shard, wanted: int) -> Iterator[RawSample]:
        """About `wanted` samples spread evenly over a shard, without reading all of it where its kind allows that. Raises as `read` does."""
        chosen = spread(shard.samples, wanted, self.together)
        if len(shard.marks) == 1:  # it can be read from its beginning alone
            among = set(chosen)
            yield from (raw for at, raw in enumerate(self.read(shard.marks, shard.name, 0, chosen[-1] + 1 if chosen else 0)) if at in among)
            return
        for _, run in groupby(enumerate(chosen), lambda pair: pair[1] - pair[0]):  # positions without a gap
            places = [at for _, at in run]
            start, stop = places[0], places[-1] + 1
            yield from self.read(shard.marks_for(start, stop), shard.name, start, stop)

    def advice(self, names: list[str]) -> list[str]:
        """Lines that a user should see before hours are spent on these shards."""
        return []


def spread(samples: int, wanted: int, together: int) -> list[int]:
    """About `wanted` of the positions 0 to `samples` - 1, ascending: runs of `together`, their middles evenly apart; all where there are no more."""
    if wanted >= samples:
        return list(range(samples))
    runs = max(1, round(wanted / together))
    starts = (min(samples - together, max(0, int((i + 0.5) * samples / runs) - together // 2)) for i in range(runs))
    return sorted({at for start in starts for at in range(max(0, start), min(samples, start + together))})


def open_source(spec: str, devkit: str | None = None) -> tuple[Source, list[str]]:
    """(reader, shard names in order) for what `--source` names; the kind follows from what the path holds.

    `spec` is a file, a pattern of files (`*`, `?`, `[...]`, `{00..63}`, `{a,b}`), or a folder. Raises BadRequest if nothing usable is there.
    """
    paths, root, said = paths_of(spec)
    if len(paths) == 1 and os.path.isdir(paths[0]):
        root, said = paths[0], ""
        files = sorted(files_below(root, root))
        paths = [p for p in files if DEVKIT not in os.path.basename(p) and kind_of_file(p)]
        if not paths:
            return _folder(root, devkit)
        _refuse_beside_images(root, [os.path.relpath(p, root) for p in paths], [os.path.relpath(p, root) for p in files if is_image(p)])
    kinds = {kind_of_file(p): p for p in reversed(paths)}
    if None in kinds:
        raise BadRequest(f"--source: {printable(kinds[None])} is of no kind that is read here; what is: {ACCEPTED}")
    if len(kinds) > 1:
        one, other = sorted(kinds)[:2]
        raise BadRequest(f"--source: {printable(spec)} holds both {other} and {one}: name one kind by a pattern, for example '*{os.path.splitext(kinds[one])[1]}'")
    if devkit:
        raise BadRequest(NO_DEVKIT)
    (kind,), names = kinds, [os.path.relpath(p, root) for p in paths]
    if kind != "CIFAR batches":  # whose halves are known
        refuse_mixed(root, names, said)
    return _files(kind, root, names)


def _refuse_beside_images(root: str, archives: list[str], images: list[str]) -> None:
    """Raises BadRequest for a folder of images with a few archives in it: which of the two is the data set, nobody can tell. (A picture or two beside shards illustrate something.)"""
    folders = {os.path.dirname(image) for image in images} - {""}
    if len(images) > len(archives) and (len(folders) > 1 or any(UNPACKED.fullmatch(image) for image in images)):
        raise BadRequest(
            f"--source: {printable(root)} holds images ({printable(images[0])}, ...) and {kind_of_file(os.path.join(root, archives[0]))} ({printable(archives[0])}) beside them: "
            f"name the one by '{printable(pattern_of(root, archives))}', or move {'it' if len(archives) == 1 else 'them'} elsewhere to read the other"
        )


def kind_of_file(path: str) -> str | None:
    """What a file is, in the words of a message; None for what no reader takes, a pipe or device too."""
    name = os.path.basename(path)
    kind = "CIFAR batches" if BATCH.fullmatch(name) else next((kind for kind, suffixes in FILES.items() if name.lower().endswith(suffixes)), None)
    if kind is None or (os.path.exists(path) and not os.path.isfile(path)):
        return None
    if name in ("train", "test"):  # others call their files so too
        try:
            with open(path, "rb") as file:
                return kind if file.read(1) == b"\x80" else None
        except OSError:  # a link that leads nowhere: whoever counts it will say so
            return kind
    return kind


def _files(kind: str, root: str, names: list[str]) -> tuple[Source, list[str]]:
    """The reader of files of one kind."""
    from pipeline.sources.arrays import Arrays
    from pipeline.sources.cifar_batches import CifarBatches
    from pipeline.sources.parquet import HuggingFaceParquet
    from pipeline.sources.tar_folders import TarFolders
    from pipeline.sources.tars import first_files
    from pipeline.sources.webdataset import WebDataset

    if kind == "Parquet files":
        return HuggingFaceParquet(root), names
    if kind == "arrays":
        return Arrays.find(root, names)
    if kind == "CIFAR batches":
        return CifarBatches.find(root, names)
    if len(names) == 1:
        path = os.path.join(root, names[0])
        files = first_files(path)
        if any(UNPACKED.fullmatch(f) for f in files) and not any(f.endswith((".cls", ".json")) for f in files):
            raise BadRequest(f"--source: {printable(path)} is a release that is read unpacked: tar xf it into a folder, and give that folder")
        if TarFolders.holds(files):
            return TarFolders(root), names
    return WebDataset(root), names


def _folder(root: str, devkit: str | None) -> tuple[Source, list[str]]:
    """The reader of a folder that holds images as files."""
    from pipeline.sources.class_folders import ClassFolders
    from pipeline.sources.flat_imagenet import FlatImageNet

    if found := FlatImageNet.find(root, devkit):
        return found
    if devkit:
        raise BadRequest(NO_DEVKIT)
    return ClassFolders.find(root)


def reader(kind: str, root: str) -> Source:
    """The reader of a kind again, on any machine that reaches `root`."""
    from pipeline.sources.arrays import Arrays
    from pipeline.sources.cifar_batches import CifarBatches
    from pipeline.sources.class_folders import ClassFolders
    from pipeline.sources.flat_imagenet import FlatImageNet
    from pipeline.sources.parquet import HuggingFaceParquet
    from pipeline.sources.tar_folders import TarFolders
    from pipeline.sources.webdataset import WebDataset

    return {cls.kind: cls for cls in (WebDataset, TarFolders, HuggingFaceParquet, ClassFolders, FlatImageNet, CifarBatches, Arrays)}[kind](root)
