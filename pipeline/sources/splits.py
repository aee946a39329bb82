"""Halves of a data set that must not mix: what a name says of them (train, validation, test), and the refusal of several at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from glob import escape, glob

from pipeline.errors import BadRequest, printable

WORDS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test", "testing": "test"}
HUGGING_FACE = re.compile(r"([A-Za-z]\w*?)-\d+-of-\d+(?:-[0-9a-f]+)?\.[A-Za-z.]+$")
VERSION = re.compile(r"(?<=[_.-])v\d+(?=[_.-])", re.IGNORECASE)
PACKED = re.compile(r"(\.tar\.gz|\.tgz|\.tar)$", re.IGNORECASE)


def split_of(path: str) -> str:
    """The split that a file's path names last, or "": `imagenet1k-val-00.tar` and `validation/0.parquet` say validation."""
    if shard := HUGGING_FACE.match(os.path.basename(path)):
        return WORDS.get(shard[1].lower(), shard[1])
    return next((WORDS[word] for word in reversed(re.findall("[a-z]+", path.lower())) if word in WORDS), "")


def preferred(names: Iterable[str]) -> str:
    """Of several paths the one to propose: a validation split, then a test split, then what says nothing, training images last."""
    order = ["validation", "test", "", "train"]
    return min(names, key=lambda name: (order.index(split) if (split := split_of(name)) in order else 2, name))


def refuse_mixed(root: str, names: list[str], said: str) -> None:
    """Raises BadRequest, with a pattern that chooses one half, where files are of several splits, or a shard lies there packed and unpacked.

    `said`: the part of `--source` below the root; splits that it names one by one are meant.
    """
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(split_of(name), []).append(name)
    found = sorted(set(splits) - {""})
    meant = {WORDS.get(word) for word in re.findall("[a-z]+", said.lower())}
    if len(found) > 1 and not all(split in meant or split in said for split in found):
        chosen = splits[split_of(preferred(name for name in names if split_of(name)))]
        raise BadRequest(f"--source: {printable(root)} holds several splits ({printable(', '.join(found))}), which must not mix: name one by a pattern, for example '{printable(pattern_of(root, chosen))}'")
    stems: dict[str, str] = {}
    for name in names:
        other = stems.setdefault(PACKED.sub("", name), name)
        if other != name:
            chosen = [n for n in names if PACKED.search(n)[1].lower() == ".tar"] or [other]
            raise BadRequest(f"--source: {printable(root)} holds {printable(other)} and {printable(name)}, one shard twice: name one of them by a pattern, for example '{printable(pattern_of(root, chosen))}'")


def refuse_versions(root: str, names: list[str]) -> None:
    """Raises BadRequest for files whose names differ in their version alone: CIFAR-10.1 v4 and v6 share most of their images."""
    versions: dict[str, list[str]] = {}
    for name in names:
        versions.setdefault(VERSION.sub("", name), []).append(name)
    several = next((found for found in versions.values() if len(found) > 1), None)
    if several:
        raise BadRequest(f"--source: {printable(root)} holds several versions of one data set ({printable(', '.join(several))}): name one, for example '{printable(os.path.join(root, several[-1]))}'")


def pattern_of(root: str, chosen: list[str]) -> str:
    """A pattern that matches these files below `root` and no other; the first of them where there is none."""
    if len(chosen) == 1:
        return os.path.join(root, chosen[0])
    start, end = os.path.commonprefix(chosen).rstrip("0123456789"), os.path.commonprefix([name[::-1] for name in chosen])[::-1]
    end, folder = end[end.find(".") :] if "." in end else "", start[: start.rfind("/") + 1]
    names = set(chosen)
    for pattern in (f"{start}*{end}", f"{folder}*{end}", f"{folder}**/*{end}", f"**/{split_of(chosen[0])}*{end}"):
        if {os.path.relpath(p, root) for p in glob(os.path.join(escape(root), pattern), recursive=True)} == names:
            return os.path.join(root, pattern)
    return os.path.join(root, chosen[0])
