"""The devkit's meta.mat, read without scipy: what scipy writes is what is read, and a damaged file is refused, never more."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from pipeline.sources.matlab import structs

FIELDS = ("ILSVRC2012_ID", "WNID", "num_children")
ROWS = [(3.0, "n01440764", 0.0, np.array([[1.0, 2.0]])), (1.0, "n02119789", 2.0, np.zeros((0, 0))), (70_000.0, "n12998815", 0.5, "words, \u00e9")]


def written(compressed: bool = False, rows=ROWS, shape=(-1, 1), name: str = "synsets") -> bytes:
    table = np.empty(len(rows), [(field, object) for field in (*FIELDS, "more")])
    for at, row in enumerate(rows):
        table[at] = row
    out = io.BytesIO()
    savemat(out, {"before": np.arange(6.0), name: table.reshape(shape)}, do_compression=compressed)
    return out.getvalue()


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("shape", [(-1, 1), (1, -1)], ids=["column", "row"])
def test_what_scipy_writes_is_read(compressed, shape):
    assert structs(written(compressed, shape=shape), "synsets", FIELDS) == [dict(zip(FIELDS, row)) for row in ROWS]
    assert [row["more"] for row in structs(written(compressed), "synsets", ("more",))] == [None, None, "words, \u00e9"]


def test_numbers_of_any_kind():
    rows = [(np.uint8(7), "a", np.int32(-5), None), (np.float32(2.5), "b", np.uint16(60_000), None)]
    rows = [tuple(np.empty((0, 0)) if value is None else value for value in row) for row in rows]
    assert structs(written(rows=rows), "synsets", FIELDS) == [dict(zip(FIELDS, row)) for row in [(7, "a", -5), (2.5, "b", 60_000)]]


@pytest.mark.parametrize(
    "content, message",
    [(b"", "version 5"), (b"junk" * 100, "version 5"), (written()[:128] + struct.pack("<II", 14, 0), "damaged"), (written()[:300], "longer than the whole|damaged"), (written(name="other"), "no array of structs"), (written(True)[:-40], "longer|damaged")],
    ids=["empty", "junk", "a matrix of nothing", "cut", "another name", "cut in its compressed part"],
)
def test_what_cannot_be_read(content, message):
    with pytest.raises(ValueError, match=message):
        structs(content, "synsets", FIELDS)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_a_changed_file_is_read_or_refused(compressed):
    """scipy's own reader ends the process on some of these."""
    whole = written(compressed)

    @settings(max_examples=300)
    @given(st.lists(st.tuples(st.integers(128, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.one_of(st.none(), st.integers(0, len(whole))))
    def change(changes, cut):
        content = bytearray(whole)
        for at, value in changes:
            content[at] = value
        try:
            found = structs(bytes(content[:cut]), "synsets", FIELDS)
        except ValueError:
            return
        assert all(set(row) == set(FIELDS) for row in found)

    change()
