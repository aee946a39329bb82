"""Where in an image its object is: ImageNet's annotation files (PASCAL VOC's XML) -> the pixels, as the network sees them, that no box covers.

Coordinates are relative to the width and height that the XML itself states, which need not be those of the image at hand, nor of its shape: a box is first brought to
where it lies in the image, and then goes where the image's pixels go. An object may stand there several times; its corners may be in the wrong order, or one pixel wide. Annotations come from strangers: no DTD is read, so that no entity can be declared in one.
"""

from __future__ import annotations

import os
import xml.parsers.expat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import BadRequest, printable
from pipeline.samples import Preprocessing
from pipeline.wnids import IDS

LARGEST = 2**20  # bytes of an annotation
NUMBERS = ("xmin", "ymin", "xmax", "ymax")


class Unusable(ValueError):
    """An annotation that says nothing. reason: which many can share; the text adds what is particular to this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason + (f" ({detail})" if detail else ""))
        self.reason = reason


@dataclass(frozen=True)
class Annotation:
    """Of one image: width and height that the boxes are relative to; (name, xmin, ymin, xmax, ymax) of each object, corners in order, xmax and ymax beyond the box."""

    width: float
    height: float
    objects: tuple[tuple[str, float, float, float, float], ...]


def find(folder: Path) -> dict[str, Path]:
    """File stem -> path, of every .xml below a folder. Raises BadRequest if there is none."""
    found = {name[: -len(".xml")]: Path(above, name) for above, _, names in os.walk(folder, followlinks=True) for name in sorted(names) if name.lower().endswith(".xml")}
    if not found:
        raise BadRequest(f"--boxes: there is no .xml below {printable(folder)}; give the folder of the annotations, such as ILSVRC/Annotations/CLS-LOC/val")
    return found


def annotation_of(sample_id: str, files: dict[str, Path]) -> Path | None:
    """The file that belongs to a sample: called as the last part of its ID, or as that without the class at its end (`ILSVRC2012_val_00000293_n01440764`)."""
    name = sample_id.rpartition("/")[2]
    return files.get(name) or files.get(name.rpartition("_n")[0])


def read(path: Path) -> Annotation:
    """An annotation. Raises Unusable with the reason."""
    try:
        if path.stat().st_size > LARGEST:
            raise Unusable("its annotation is larger than 1 MiB")
        content = path.read_bytes()
    except OSError as fault:
        raise Unusable("its annotation cannot be read", fault.strerror) from None
    texts = _texts(content)
    width, height = (_number(texts, f"annotation/size/{name}") for name in ("width", "height"))
    if width <= 0 or height <= 0:
        raise Unusable("its annotation states no size of the image")
    columns = [texts.get(f"annotation/object/{'name' if n == 'name' else f'bndbox/{n}'}", []) for n in ("name", *NUMBERS)]
    if len({len(c) for c in columns}) != 1 or not columns[0]:
        raise Unusable("its annotation holds no object with a box" if not columns[1] else "its annotation holds an object without a name or a whole box")
    objects = []
    for name, *corners in zip(*columns):
        x1, y1, x2, y2 = (_as_number(text) for text in corners)
        objects.append((name.strip(), min(x1, x2), min(y1, y2), max(x1, x2, min(x1, x2) + 1), max(y1, y2, min(y1, y2) + 1)))
    return Annotation(width, height, tuple(objects))


def of_class(annotation: Annotation, label: int, classes: int) -> list[list[float]]:
    """The boxes of the label's class: of 1,000 classes those of its WordNet ID, else all. Raises Unusable if there is none."""
    own = [box for name, *box in annotation.objects if classes != len(IDS) or name == IDS[label]]
    if not own:
        raise Unusable("its annotation has no box of its class", IDS[label])
    return own


def outside(annotation: Annotation, label: int, classes: int, preprocessing: Preprocessing, shape: tuple[int, int], whole: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: the pixels that the network sees and no box of the label's class covers, not even in part.

    shape: height and width of the pixels, after the preprocessing's resizing and cropping, which is followed here; whole: of the image before that. Raises Unusable if it
    holds no box of the class, or if these leave no pixel.
    """
    own = of_class(annotation, label, classes)
    height, width = whole
    if preprocessing.resize is not None:
        short, long = sorted((width, height))
        size = preprocessing.resize, int(preprocessing.resize * long / short)
        width, height = size if width <= height else size[::-1]
    left = top = 0.0
    if preprocessing.crop is None:
        height, width = shape
    else:  # the middle of it, black beside it where it is smaller
        left, top = (round((side - preprocessing.crop) / 2) if side >= preprocessing.crop else -((preprocessing.crop - side) // 2) for side in (width, height))
    free = np.ones(shape, bool)
    for x1, y1, x2, y2 in own:
        columns = [x * width / annotation.width - left for x in (x1, x2)]
        rows = [y * height / annotation.height - top for y in (y1, y2)]
        (first, last), (upper, lower) = ((max(0, int(np.floor(a))), max(0, int(np.ceil(b)))) for a, b in (columns, rows))
        free[upper:lower, first:last] = False
    if not free.any():
        raise Unusable("its boxes cover all that the network sees")
    return free


def _texts(content: bytes) -> dict[str, list[str]]:
    """Path of an element -> the texts of all elements there, in order. Raises Unusable for what is no XML, or declares entities."""
    path: list[str] = []
    found: dict[str, list[str]] = {}

    def begin(name: str, _: dict) -> None:
        path.append(name)
        found.setdefault("/".join(path), []).append("")

    def refuse(*_: object) -> None:
        raise Unusable("its annotation has a DTD, which is not read")

    parser = xml.parsers.expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = begin, lambda name: path.pop()
    parser.CharacterDataHandler = lambda text: found["/".join(path)].append(found["/".join(path)].pop() + text)
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except xml.parsers.expat.ExpatError as fault:
        raise Unusable("its annotation is no XML", printable(fault)) from None
    return found


def _number(texts: dict[str, list[str]], path: str) -> float:
    return _as_number(next(iter(texts.get(path, ["0"])), "0"))


def _as_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < 1e9:
        raise Unusable("its annotation has no number where there should be one", f"'{printable(text.strip())[:40]}'")
    return number
