"""ImageNet's validation images as released: one flat folder of `ILSVRC2012_val_<number>.JPEG`, and the devkit that knows their labels.

Line i of the devkit's `ILSVRC2012_validation_ground_truth.txt` belongs to image i. It holds an ILSVRC2012_ID, in an order of the devkit's own
and NOT that of the sorted WordNet IDs which every trained network uses: `meta.mat` says which WordNet ID it stands for, the leaves of its
tree (num_children 0) are the classes, and the label is the rank among their sorted WordNet IDs.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.errors import BadRequest, printable
from pipeline.sources import Each, RawSample, Shard, Source
from pipeline.sources.classes import WNID, is_class, sample_id_of
from pipeline.sources.files import DEVKIT, digest, folders_in, holds_image, images_in, is_litter, load, look
from pipeline.sources.matlab import structs

NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?:_n\d{8})?\.")
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
IMAGES = 50_000  # of the validation set
EVERY = 256  # images between two marks
MOST = 64 << 20  # bytes of a devkit's file


@dataclass(frozen=True)
class FlatImageNet(Source):
    """Reader of the flat folder `root`. The census needs the devkit; reading does not, since a mark carries its images' labels."""

    root: str
    devkit: str | None = None
    kind: ClassVar[str] = "flat ImageNet"
    together: ClassVar[int] = 4  # the folder is listed for each access

    @classmethod
    def find(cls, folder: str, devkit: str | None) -> tuple[FlatImageNet, list[str]] | None:
        """(reader, its one shard), or None if this is no flat folder of ImageNet. A folder above it will do, with the devkit beside it:
        as class folders, all images would be of one class. Raises BadRequest for a folder that is half sorted into class folders."""
        if not _is_flat(folder):
            inner = [name for name in folders_in(folder) if not is_litter(name)]
            if len(inner) != 1 or is_class(inner[0]) or not _is_flat(os.path.join(folder, inner[0])):
                return None
            folder = os.path.join(folder, inner[0])
        classes = [name for name in folders_in(folder) if is_class(name) and holds_image(os.path.join(folder, name), folder)]
        if classes:
            flat = [name for name in images_in(folder) if NAME.match(name)]
            raise BadRequest(
                f"--source: {printable(folder)} holds images of ImageNet's flat folder ({printable(flat[0])}, {len(flat)} in all) beside class folders with images "
                f"({printable(classes[0])}, {len(classes)} in all): move the ones or the others elsewhere, or finish sorting them"
            )
        return cls(folder, devkit), ["."]

    def images(self) -> list[str]:
        """File names, sorted."""
        return images_in(self.root)

    def census(self, name: str, each: Each | None = None) -> Shard:
        """Images of the folder, each of which is asked for its size. A handle is [digest of names and sizes up to the next mark, labels of
        these images]; the version is a digest of all of it."""
        images = self.images()
        numbers = [int(match[1]) if (match := NAME.match(image)) else 0 for image in images]
        labels = self._labels(max((n for n in numbers if n <= IMAGES), default=0))
        marks = []
        for position in range(0, len(images), EVERY):
            part = images[position : position + EVERY]
            known = [labels[n - 1] if 0 < n <= len(labels) else -1 for n in numbers[position : position + EVERY]]
            marks.append((position, [_digest(part, self._look(part)), known]))
        for image in images if each else ():
            each(sample_id_of(image), image)
        return Shard(name, len(images), digest(marks), tuple(marks))

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        images = self.images()
        for position, (known, labels) in marks:
            part = images[position : position + len(labels)]
            found = self._look(part)
            if _digest(part, found) != known:
                raise BadRequest(f"{printable(self.root)} holds other files than when it was counted: put them back, or extract into another --dataset")
            for at in range(max(start - position, 0), min(stop - position, len(part))):
                fault = found[at][1] if labels[at] >= 0 else f"the devkit has no label for this name; it knows {NAME.pattern.partition('(')[0]}00000001 and so on"
                content, fault = (b"", fault) if fault else load(os.path.join(self.root, part[at]))
                yield RawSample(sample_id_of(part[at]), content, -1 if fault else labels[at], fault)

    def _look(self, names: list[str]) -> list[tuple[int, str | None]]:
        """Size of each, and why it cannot be used."""
        return [look(os.path.join(self.root, name)) for name in names]

    def _labels(self, needed: int) -> list[int]:
        """Label of image 1, 2, ..., and of `needed` at least; the rank of its sorted WordNet ID."""
        where, truth, meta = _devkit_files(self.root, self.devkit)
        wnids = _leaves(where, meta)
        rank = {wnid: label for label, wnid in enumerate(sorted(wnids.values()))}
        try:
            ids = [int(line) for line in truth.split()]
        except ValueError:
            raise BadRequest(f"{printable(where)}: {TRUTH} is no list of whole numbers: fetch {DEVKIT}.tar.gz again") from None
        try:
            labels = [rank[wnids[i]] for i in ids]
        except KeyError as fault:
            raise BadRequest(f"{printable(where)}: {TRUTH} and {META} do not belong together ({printable(fault)} is no ILSVRC2012_ID of a leaf): fetch {DEVKIT}.tar.gz again") from None
        if len(labels) < needed:
            raise BadRequest(f"{printable(where)}: {TRUTH} has {len(labels):,} lines, and the images go up to number {needed:,} (the whole one has {IMAGES:,}): fetch {DEVKIT}.tar.gz again")
        return labels


def devkit_at(root: str, given: str | None) -> dict[int, str] | None:
    """ILSVRC2012_ID -> WordNet ID from the devkit that is named, or lies in or beside `root`; None where there is none. Raises BadRequest for a bad one."""
    if given is None and _beside(root) is None:
        return None
    where, _, meta = _devkit_files(root, given)
    return _leaves(where, meta)


def _beside(root: str) -> str | None:
    """The devkit in a folder or beside it."""
    at = (os.path.join(folder, DEVKIT + suffix) for folder in (root, os.path.dirname(root)) for suffix in ("", ".tar.gz", ".tgz", ".tar"))
    return next(filter(os.path.exists, at), None)


def _leaves(where: str, meta: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> WordNet ID of the synsets without children. Raises BadRequest for a meta.mat that is not the devkit's."""
    try:
        rows = [(_whole(s["ILSVRC2012_ID"]), s["WNID"], _whole(s["num_children"])) for s in structs(meta, "synsets", ("ILSVRC2012_ID", "WNID", "num_children"))]
        if not all(isinstance(wnid, str) and WNID.fullmatch(wnid) for _, wnid, _ in rows):
            raise ValueError("a WNID is none")
    except ValueError as fault:
        raise BadRequest(f"{printable(where)}: its {META} cannot be read ({printable(fault)[:100]}): fetch {DEVKIT}.tar.gz again") from None
    leaves = {number: wnid for number, wnid, children in rows if children == 0}
    if len(set(leaves.values())) != sum(children == 0 for _, _, children in rows):
        raise BadRequest(f"{printable(where)}: its {META} names a synset twice: fetch {DEVKIT}.tar.gz again")
    return leaves


def _whole(value: float | str | None) -> int:
    """Raises ValueError for what is no whole number."""
    if not isinstance(value, float) or not value.is_integer():
        raise ValueError("an ILSVRC2012_ID or num_children is no whole number")
    return int(value)


def _devkit_files(root: str, given: str | None) -> tuple[str, bytes, bytes]:
    """(where they lie, ground truth, meta.mat) from the first devkit there is. Raises BadRequest saying where it was looked for."""
    path = _beside(root) if given is None else os.path.expanduser(given)
    if path is None or not os.path.exists(path):
        option = "--devkit" if given else "--source"
        raise BadRequest(
            f"{option}: there is no {printable(given)}; name the folder {DEVKIT} or its tar.gz" if given else
            f"{option}: {printable(root)} is ImageNet's flat folder, whose labels are in the devkit, and there is none: put {DEVKIT} (the folder or its .tar.gz) beside it, or name it by --devkit"
        )  # fmt: skip
    try:
        found = _from_folder(path) if os.path.isdir(path) else _from_tar(path)
    except tarfile.ReadError:  # whose text tells of every packing that was tried
        raise BadRequest(f"{printable(path)} is no tar archive, or damaged: fetch {DEVKIT}.tar.gz again, and name that") from None
    except (OSError, tarfile.TarError, EOFError, zlib.error) as fault:
        raise BadRequest(f"{printable(path)} cannot be read ({printable(fault)}): fetch {DEVKIT}.tar.gz again") from None
    lacking = [name for name in (TRUTH, META) if name not in found]
    if lacking:
        raise BadRequest(f"{printable(path)} holds no data/{' and no data/'.join(lacking)} (or an absurdly large one): it is not {DEVKIT}: fetch {DEVKIT}.tar.gz again")
    return path, found[TRUTH], found[META]


def _from_folder(path: str) -> dict[str, bytes]:
    found = {}
    for folder in (path, os.path.join(path, "data"), os.path.join(path, DEVKIT, "data")):
        for name in (TRUTH, META):
            file = Path(folder, name)
            if name not in found and file.is_file() and file.stat().st_size <= MOST:
                found[name] = file.read_bytes()
    return found


def _from_tar(path: str) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            name = os.path.basename(member.name)
            if member.isreg() and name in (TRUTH, META) and name not in found and member.size <= MOST:
                found[name] = tar.extractfile(member).read()
            if len(found) == 2:
                break
    return found


def _is_flat(folder: str) -> bool:
    return any(map(NAME.match, images_in(folder)))


def _digest(names: list[str], found: list[tuple[int, str | None]]) -> str:
    return digest([*names, *(size for size, _ in found)])
