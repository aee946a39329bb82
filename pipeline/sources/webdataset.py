"""WebDataset tar shards, `.tar` or `.tar.gz`: consecutive members with one key are one sample.

The key is the member's path to the first dot of its file name, folders kept; it is the sample's ID. A sample has one
image (`.jpg`, `.jpeg` or `.png`) and a label: `.cls`, a whole number as text, or `.json` with a `label`. One that has two is not chosen for:
two images, or labels that disagree, and the sample is set aside.
Members are read in place and never unpacked, so a hostile path in an archive leads nowhere.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import printable
from pipeline.sources import Each, RawSample, Shard, Source
from pipeline.sources.tars import MARK_EVERY, MOST_BYTES, Group, count, fingerprint, groups, handle_of, is_gzip, key_of

IMAGES = ("jpg", "jpeg", "png")
LABELS = ("cls", "json")
LONGEST = 64  # bytes of a .cls


@dataclass(frozen=True)
class WebDataset(Source):
    """Reader of tar shards below `root`."""

    root: str
    kind: ClassVar[str] = "webdataset"

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def census(self, name: str, each: Each | None = None) -> Shard:
        """Samples of one shard from its headers and labels alone. A handle is [byte offset of a sample's first header, digest of the headers and labels up to the next mark] (of a
        .tar.gz, which can be read from its beginning alone, its fingerprint); the version is a digest of all members' names, sizes, times and places, and of the labels."""
        marks = []

        def note(position: int, group: Group) -> None:
            if each:
                each(group.key, group.members[0].name)
                if again := _second(group.members):
                    each(group.key, f"{again.name} again, at byte {again.offset}")
            if position % MARK_EVERY == 0 and not is_gzip(name):
                marks.append((position, group))

        samples, version, digests = count(self.path(name), _key, note, _is_label)
        marks = [(position, handle_of(group, digest)) for (position, group), digest in zip(marks, digests)]
        if is_gzip(name):
            marks = [(0, fingerprint(self.path(name)))]
        return Shard(name, samples, version, tuple(marks))

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        for group in groups(self.path(name), _key, _is_part, marks, start, stop, _is_label):
            yield _sample(group, group.key, group.members)

    def advice(self, names: list[str]) -> list[str]:
        return slow(names)


def slow(names: list[str]) -> list[str]:
    """What a user of .tar.gz should know."""
    packed = [name for name in names if is_gzip(name)]
    what = f"{printable(packed[0])} is" if len(packed) == 1 else f"{len(packed)} shards are"
    return [f"{what} gzip, which cannot be entered in the middle: counting unpacks all of it, and every worker reads it from its beginning; gunzip it first to be faster"] if packed else []


def _key(member: tarfile.TarInfo) -> str:
    """Hidden files have no key, and neither have folders, links and devices: they are no part of a sample."""
    return key_of(member.name)[0] if member.isfile() else ""


def _is_part(member: str) -> bool:
    return key_of(member)[1] in IMAGES + LABELS


def _is_label(member: str) -> bool:
    return key_of(member)[1] in LABELS


def _second(members: list[tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The image of a second sample that follows another of its own key: image and label are both there twice."""
    kinds = [key_of(member.name)[1] for member in members]
    images, labels = ([m for m, kind in zip(members, kinds) if kind == one] for one in (max(of, key=kinds.count) for of in (IMAGES, LABELS)))
    return images[1] if len(images) > 1 and len(labels) > 1 else None


def _sample(tar: Group, key: str, members: list[tarfile.TarInfo]) -> RawSample:
    parts = {}
    for member in members:
        extension = key_of(member.name)[1]
        if extension in parts:
            return RawSample(key, fault=f"two members named .{printable(extension)} under this key")
        parts[extension] = member
    if any(member.size > MOST_BYTES for extension, member in parts.items() if extension in IMAGES + LABELS):
        return RawSample(key, fault=f"a member under this key is larger than {MOST_BYTES >> 20} MiB")
    images = [e for e in IMAGES if e in parts]
    if len(images) != 1:
        return RawSample(key, fault=f"{len(images)} images under this key, .{' and .'.join(images)}: which is it?" if images else "no image (.jpg, .jpeg or .png) under this key")
    try:
        label = _label(tar, parts)
    except ValueError as fault:
        return RawSample(key, fault=str(fault))
    return RawSample(key, tar.extractfile(parts[images[0]]).read(), label)


def _also(tar: Group, parts: dict[str, tarfile.TarInfo]) -> int | None:
    """What a .json beside a .cls calls the label, where it says a whole number, in whatever form: most hold captions and the like. Raises ValueError where it says two."""
    try:
        label = _in_json(tar, parts) if "json" in parts else None
    except KeyError:
        return None
    if isinstance(label, str) and re.fullmatch(" *[+-]?[0-9]+ *", label):
        return int(label)
    return int(label) if type(label) in (int, float) and label == label // 1 else None


def _in_json(tar: Group, parts: dict[str, tarfile.TarInfo]) -> object:
    """The "label" of a .json. Raises KeyError where it has none, ValueError where it has several that differ: which one holds, readers do not agree on."""
    labels = []

    def note(pairs: list[tuple[str, object]]) -> dict:
        labels[:] = [value for key, value in pairs if key == "label"]  # an outer object comes after those in it
        return dict(pairs)

    try:
        told = json.loads(tar.extractfile(parts["json"]).read(), object_pairs_hook=note)
    except (ValueError, RecursionError):
        raise KeyError from None
    if not isinstance(told, dict) or "label" not in told:
        raise KeyError
    if len({json.dumps(label) for label in labels}) > 1:
        raise ValueError(f"its .json says {printable(' and '.join(json.dumps(label)[:20] for label in labels[:2]))} for \"label\"")
    return labels[0]


def _label(tar: Group, parts: dict[str, tarfile.TarInfo]) -> int:
    """Raises ValueError with the reason if there is no usable label, or two that disagree."""
    if "cls" in parts:
        if parts["cls"].size > LONGEST:
            raise ValueError(f"its .cls holds {parts['cls'].size:,} bytes, not a whole number")
        text = tar.extractfile(parts["cls"]).read().decode("utf-8", "replace").strip()
        if not re.fullmatch("[+-]?[0-9]+", text):  # int() would take 1_0 for 10
            raise ValueError(f"its .cls holds '{printable(text)}', not a whole number")
        if (other := _also(tar, parts)) not in (None, int(text)):
            raise ValueError(f"its .cls says {text}, and its .json {other}")
        return int(text)
    if "json" in parts:
        try:
            label = _in_json(tar, parts)
        except KeyError:
            raise ValueError("its .json holds no \"label\"") from None
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"the label in its .json is {printable(json.dumps(label)[:40])}, not a whole number")
        return label
    raise ValueError("no label (.cls, or .json with \"label\") under this key")
