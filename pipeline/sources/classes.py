"""Which folders are classes, and what the label of each is: one rule for a tree of class folders and for a tar of it. And the ID of an image in one.

A label follows from a folder in one of three ways:

    numbers        the number itself, from 0 on, as in ImageNet-v2 (sorted as text, 0, 1, 10, 100, ..., every label would be wrong)
    WordNet IDs    the rank of n01440764 among all of them
    other names    the rank of the name among all of them

Where most folders are numbers, or any is a WordNet ID, others are no classes: empty ones are passed over, and images in them are refused; an
empty folder of that kind is a class without images, so that the ranks are those of the whole data set. Among other names a folder without
images is no class. Nothing is guessed: where no labels follow, the tree is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from pipeline.errors import BadRequest, printable
from pipeline.sources.files import DEVKIT
from pipeline.sources.splits import WORDS, preferred
from pipeline.sources.tars import key_of
from pipeline.wnids import LABEL

IMAGENET_NAME = re.compile(r"(ILSVRC2012_(?:val|test|train)_\d{8}|n\d{8}_\d+)(?:_n\d{8})?$")
WNID = re.compile(r"n\d{8}")
NUMBER = re.compile(r"\d{1,18}")
OLD_V2 = 20  # images in every class of the older release of ImageNet-v2


@dataclass
class Folder:
    """One of the folders right below the root: how many `images` it holds, `names` of the first of them, and how many lie in which subfolder."""

    images: int = 0
    names: list[str] = field(default_factory=list)
    deeper: dict[str, int] = field(default_factory=dict)

    def add(self, path: str) -> None:
        """`path` of an image, below this folder."""
        inner, _, name = path.rpartition("/")
        self.images += 1
        if len(self.names) < OLD_V2:
            self.names.append(name)
        if inner:
            self.deeper[inner] = self.deeper.get(inner, 0) + 1


def labels_of(where: str, folders: Mapping[str, Folder], give: str) -> dict[str, int]:
    """Label of every class folder, in label order.

    where: the tree or archive; give: the words before the path of a folder in it that should be given instead. Raises BadRequest, naming folder
    and remedy, if no labels follow.
    """
    full = {name: folder for name, folder in folders.items() if folder.images}
    _refuse_folder_above(where, full, give)
    classes, _, strangers = told_apart(full, set(folders) - set(full))
    if strangers:
        raise BadRequest(
            f"--source: {printable(where)}: the other class folders are named by {_scheme(full)[0]}, and {_some(strangers)} "
            f"{'holds images too' if len(strangers) == 1 else 'hold images too'}: move {'it' if len(strangers) == 1 else 'them'} elsewhere, or rename"
        )
    if len(classes) == 1 and not _is_number(classes[0]):
        raise BadRequest(
            f"--source: {printable(where)} holds images in one folder alone, {printable(classes[0])}, and no labels follow from that: "
            f"give the folder that holds all class folders, or pack the images as tar shards with .cls"
        )
    _refuse_old_v2(where, {name: full[name] for name in classes if name in full})
    if not _are_numbers(classes):
        return {name: rank for rank, name in enumerate(classes)}
    _refuse_numbers(where, classes)
    return {name: int(name) for name in classes}


def told_apart(full: Collection[str], empty: Collection[str]) -> tuple[list[str], list[str], list[str]]:
    """(class folders in label order, folders that are none and hold no images, folders that cannot be classes beside the others and hold some).

    full, empty: the folders that hold images, and those that hold none.
    """
    scheme = _scheme(full)
    classes = [name for name in (*full, *empty) if scheme[1].fullmatch(name)] if scheme else list(full)
    ordered = sorted(classes, key=int) if _are_numbers(classes) else sorted(classes)
    return ordered, sorted(set(empty) - set(classes)), sorted(set(full) - set(classes))


def is_class(name: str) -> bool:
    """Whether a folder's name alone says that it is a class: a number, or a WordNet ID."""
    return _is_number(name) or WNID.fullmatch(name) is not None


def stands_for_its_folders(name: str, inner: Collection[str]) -> bool:
    """Whether a folder beside which there is no other is no class, but merely holds the class folders `inner` (a release unpacked into one of its own)."""
    return bool(inner) and (not is_class(name) or all(map(is_class, inner)))


def remarks(full: Collection[str], empty: Collection[str]) -> list[str]:
    """What a user should know of the folders that are taken as classes, and of those that are not."""
    classes, passed, _ = told_apart(full, [name for name in empty if DEVKIT not in name])
    lines = [f"no class, since there are no images in it: {_some(passed)}"] if passed else []
    if _are_numbers(classes) and len(classes) > 1 and int(classes[-1]) >= len(classes):
        lines.append(f"the class folders are numbers with gaps ({printable(classes[0])} to {printable(classes[-1])}, {len(classes)} of them): the number of a folder is taken as its label, counted from 0")
    if 1 < len(classes) < len(LABEL) and all(name in LABEL for name in classes):
        lines.append(f"{len(classes)} of ImageNet's {len(LABEL):,} classes have a folder: a label is the rank among these; for a network of all {len(LABEL):,}, add an empty folder for every other class")
    return lines


def sample_id_of(path: str) -> str:
    """`cat/001.jpg` -> `cat/001`; `n01440764/ILSVRC2012_val_00000293.JPEG` -> `ILSVRC2012_val_00000293`."""
    key = key_of(path)[0]
    known = IMAGENET_NAME.match(os.path.basename(key))
    return known.group(1) if known else key


def _scheme(full: Collection[str]) -> tuple[str, re.Pattern] | None:
    """(what most of the folders that hold images are named by, a pattern of such names), or None for names of other kinds."""
    if any(map(WNID.fullmatch, full)):
        return "WordNet IDs", WNID
    numbers = sum(map(_is_number, full))
    return ("numbers", NUMBER) if numbers and 2 * numbers >= len(full) else None


def _is_number(name: str) -> bool:
    return NUMBER.fullmatch(name) is not None


def _are_numbers(classes: Collection[str]) -> bool:
    return bool(classes) and all(map(_is_number, classes))


def _refuse_numbers(where: str, ordered: list[str]) -> None:
    """Raises BadRequest for numbers that cannot be labels, counted from 0."""
    numbers = [int(name) for name in ordered]
    n, last = len(numbers), numbers[-1]
    if len(set(numbers)) < n:
        twice = [name for name, number in zip(ordered, numbers) if numbers.count(number) > 1]
        raise BadRequest(f"--source: {printable(where)}: the class folders are numbers, and {_some(twice[:2])} are the same one: rename them")
    if n > 1 and numbers == list(range(1, n + 1)):
        raise BadRequest(f"--source: {printable(where)}: the class folders are numbered 1 to {n}, and labels count from 0: rename them to 0..{n - 1}, or, if class 0 is merely missing, add an empty folder 0")
    if last >= max(n, 1000):
        raise BadRequest(f"--source: {printable(where)}: the class folders are numbers that cannot be labels ({printable(ordered[0])} to {printable(ordered[-1])}, {n} of them): rename them to 0..{n - 1}, or pack the images as tar shards with .cls")


def _refuse_folder_above(where: str, full: Mapping[str, Folder], give: str) -> None:
    """Raises BadRequest if the class folders lie further down: these are splits, corruptions or severities, and no classes."""
    splits = [name for name in full if _split(name)]
    halves = len({_split(name) for name in splits}) > 1 and 2 * len(splits) >= len(full)
    deeper = {f"{name}/{inner}": count for name, folder in full.items() if not WNID.fullmatch(name) for inner, count in folder.deeper.items()}
    instead = {name for name in splits if halves or sum(full[name].deeper.values()) == full[name].images} | _parents(deeper, WNID.fullmatch)
    numbered = sum(count for path, count in deeper.items() if _parents([path], _is_number))
    if not instead and 2 * numbered > sum(folder.images for folder in full.values()):
        instead = _parents(deeper, _is_number)
    if instead:
        what = f"holds several splits ({_some(sorted(splits))})" if halves else "has its class folders further down"
        better = preferred(instead | {path for path in deeper if _split(os.path.basename(path))})
        raise BadRequest(f"--source: {printable(where)} {what}, and no labels follow from its own folders: {give}{printable(better)}")


def _parents(paths: Iterable[str], is_class_folder: Callable[[str], object]) -> set[str]:
    """What the class folders that lie in others lie in."""
    return {"/".join(parts[:at]) for parts in (path.split("/") for path in paths) for at in range(1, len(parts)) if is_class_folder(parts[at])}


def _split(name: str) -> str | None:
    return WORDS.get(name.lower().rstrip("0123456789"))


def _refuse_old_v2(where: str, full: Mapping[str, Folder]) -> None:
    """Raises BadRequest for the older release of ImageNet-v2: 20 images in (nearly) each wnid-named folder, under names that are not ImageNet's."""
    twenty = sum(folder.images == OLD_V2 for folder in full.values())
    names = [name for folder in full.values() for name in folder.names]
    if full and all(map(WNID.fullmatch, full)) and 10 * twenty >= 9 * len(full) and 10 * sum(bool(IMAGENET_NAME.match(name.partition(".")[0])) for name in names) < len(names):
        raise BadRequest(
            f"--source: {printable(where)} looks like the older release of ImageNet-v2 (20 images in each folder named by a WordNet ID), whose labels are not to be relied on: "
            "fetch imagenetv2-matched-frequency.tar.gz, which has folders 0..999, or, if these are other images, pack them as tar shards with .cls"
        )


def _some(names: Collection[str]) -> str:
    return printable(", ".join(list(names)[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
