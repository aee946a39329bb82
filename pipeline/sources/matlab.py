"""A MATLAB file (version 5) that holds one array of structs, read without scipy, whose reader brings the process down on a damaged one.

An element is a tag (type, bytes) and its data, padded to 8 bytes; one of at most 4 bytes may be packed into its tag. A matrix is an element
of elements: flags, dimensions, name, then its numbers or its text, or of a struct array its field names and a matrix a field.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator

import numpy as np

MATRIX, COMPRESSED = 14, 15  # types of an element
STRUCT, CHAR = 2, 4  # classes of a matrix
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}  # types of elements that hold some
TEXTS = {1: "latin-1", 2: "utf-8", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
MOST = 256 << 20  # bytes that a file may unpack to


def structs(content: bytes, name: str, fields: Collection[str]) -> list[dict[str, float | str | None]]:
    """The array of structs called `name`: of each, these fields, a number or a text, None for anything else. Raises ValueError if it is not there or damaged."""
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise ValueError("it is no MATLAB file of version 5")
    try:
        for kind, data in _elements(content[128:], order):
            if kind == COMPRESSED:
                kind, data = next(_elements(zlib.decompressobj().decompress(data, MOST), order))
            if kind == MATRIX and (found := _struct_array(data, order, name, fields)) is not None:
                return found
    except (struct.error, zlib.error, StopIteration, UnicodeDecodeError, KeyError, IndexError) as fault:
        raise ValueError(f"it is damaged: {type(fault).__name__}") from None
    raise ValueError(f"it holds no array of structs called {name}")


def _elements(data: bytes | memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, data) of each element. Raises ValueError for one that is longer than what holds it."""
    data, at = memoryview(data), 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind >> 16:
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            start, end = at + 8, at + 8 + size + (-size % 8 if kind != COMPRESSED else 0)
        if start + size > len(data) or (start == at + 4 and size > 4):
            raise ValueError("it is damaged: a part is longer than the whole")
        yield kind, data[start : start + size]
        at = end


def _struct_array(data: memoryview, order: str, name: str, fields: Collection[str]) -> list[dict[str, float | str | None]] | None:
    """None if it is another matrix."""
    parts = _elements(data, order)
    flags, dimensions, own = [next(parts)[1] for _ in range(3)]  # a list: in a generator, StopIteration would be a RuntimeError
    if flags[0 if order == "<" else 3] != STRUCT or bytes(own).decode("latin-1") != name:
        return None
    count = int(np.prod(np.frombuffer(dimensions, f"{order}i4"), dtype=object))
    width = struct.unpack(f"{order}i", next(parts)[1])[0]
    if width < 1 or count < 0:
        raise ValueError("it is damaged: its fields have no names")
    names = bytes(next(parts)[1])
    keys = [names[at : at + width].partition(b"\0")[0].decode("latin-1") for at in range(0, len(names), width)]
    if not keys or count * len(keys) * 8 > len(data) or not set(fields) <= set(keys):
        raise ValueError(f"it has not the fields {', '.join(fields)}, or not as many as it says")
    found = []
    for _ in range(count):
        row = {key: next(parts) for key in keys}
        found.append({key: _value(*row[key], order) for key in fields})
    return found


def _value(kind: int, data: memoryview, order: str) -> float | str | None:
    """A single number, or a text."""
    if kind != MATRIX or not len(data):
        return None
    parts = list(_elements(data, order))
    if len(parts) < 4:
        return None
    (_, flags), _, _, (kind, values) = parts[:4]
    if flags[0 if order == "<" else 3] == CHAR:
        return bytes(values).decode(TEXTS[kind] + ({"<": "-le", ">": "-be"}[order] if TEXTS[kind] == "utf-16" else ""))
    if kind not in NUMBERS or len(values) != np.dtype(NUMBERS[kind]).itemsize:
        return None
    return float(np.frombuffer(values, order + NUMBERS[kind])[0])
