"""A tar or tar.gz of class folders, `<folders>/<class>/<image>`, without labels of its own: `imagenetv2-matched-frequency.tar.gz`.

Every image in a class folder is a sample, in the archive's order. Label, ID and the refusal of ImageNet-v2's older release are those
of the unpacked tree (class_folders.py): folders that all images share are no part of an ID. One archive is one data set,
since the rank of a class needs all classes.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import BadRequest, printable
from pipeline.sources import IMAGE_SUFFIXES, RawSample, Shard, Source
from pipeline.sources.class_folders import in_label_order, labels_of, refuse_old_v2, remark, sample_id_of
from pipeline.sources.tars import MARK_EVERY, MOST_BYTES, Group, count, fingerprint, groups, is_gzip
from pipeline.sources.webdataset import slow


@dataclass(frozen=True)
class TarFolders(Source):
    """Reader of the archives of class folders in `root`."""

    root: str
    kind: ClassVar[str] = "tar of class folders"

    @classmethod
    def holds(cls, files: list[str]) -> bool:
        """Whether the first files of an archive are images in folders, and no labels."""
        images = [f for f in files if _key(f)]
        return bool(images) and not any(f.lower().endswith((".cls", ".json")) for f in files)

    def census(self, name: str) -> Shard:
        """Images of the archive from its headers alone. A handle is [byte offset (of a .tar.gz: its fingerprint), parts of a path above the
        class folder, [[class, label], ...] of the samples up to the next mark]."""
        path = os.path.join(self.root, name)
        per_folder: dict[str, list[str]] = {}
        marks: list[tuple[int, object, dict]] = []

        def each(position: int, group: Group) -> None:
            folder, file = posixpath.split(group.key)
            seen = per_folder.setdefault(folder, [])
            seen.append(file if len(seen) <= 20 else "")  # as many names as refuse_old_v2 looks at
            if position % MARK_EVERY == 0:
                marks.append((position, group.members[0].offset, {}))
            marks[-1][2][folder] = None

        samples, version = count(path, _key, each)
        start = fingerprint(path) if is_gzip(name) else None
        above = _shared(list(per_folder))
        classes: dict[str, list[str]] = {}
        for folder, files in per_folder.items():
            classes.setdefault(folder.split("/")[above], []).extend(files)
        refuse_old_v2(path, classes)
        label = labels_of(in_label_order(classes))
        handles = [(p, [start or offset, above, sorted({f.split("/")[above]: label[f.split("/")[above]] for f in folders}.items())]) for p, offset, folders in marks]
        return Shard(name, samples, version, tuple((p, [at, up, [list(pair) for pair in pairs]]) for p, (at, up, pairs) in handles))

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        path = os.path.join(self.root, name)
        labels = dict(pair for _, (_, _, pairs) in marks for pair in pairs)
        position, (at, above, _) = marks[0]
        for group in groups(path, _key, lambda member: True, (position, at), start, stop):
            parts = group.key.split("/")[above:]
            if len(parts) < 2 or parts[0] not in labels:
                raise BadRequest(f"{printable(path)} holds other files than when the run began: put the old file back, or begin another run")
            sample_id, member = sample_id_of("/".join(parts)), group.members[0]
            if len(group.members) > 1:
                yield RawSample(sample_id, fault="two members of this name in a row")
            elif member.size > MOST_BYTES:
                yield RawSample(sample_id, fault=f"larger than {MOST_BYTES >> 20} MiB")
            else:
                yield RawSample(sample_id, group.contents[member.offset], labels[parts[0]], folder=parts[0])

    def advice(self, names: list[str]) -> list[str]:
        shard = self.census(names[0]) if not is_gzip(names[0]) else None
        numbers = sorted({label for _, (_, _, pairs) in shard.marks for name, label in pairs if name.isdigit()}) if shard else []
        return slow(names) + remark([str(n) for n in numbers])


def _key(member: str) -> str:
    """The path of an image in a folder, without `./`; "" for all else, and for a path that climbs out of the archive."""
    path = posixpath.normpath(member)
    folder, file = posixpath.split(path)
    return path if folder.strip("/") and not path.startswith("../") and file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".") else ""


def _shared(folders: list[str]) -> int:
    """How many leading parts all folders share, the class folder not counted: an archive of one class keeps it."""
    paths = [folder.split("/") for folder in folders]
    above = 0
    while paths and all(len(p) > above + 1 and p[above] == paths[0][above] for p in paths):
        above += 1
    return above
