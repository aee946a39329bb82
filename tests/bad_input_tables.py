"""Tables, arrays, pickles and folders that are whole, and hold what they should not: refused, or samples set aside by name."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shards
from bad_input_archives import RANGE, TWICE, Refused
from bad_input_sources import COUNT, labels, pictures


@dataclass(frozen=True)
class Aside:
    """make(folder) -> what --source names. aside: sample_id -> a part of the reason; `profiled` others are there."""

    id: str
    make: Callable[[Path], Path]
    aside: dict[str, str]
    profiled: int


# ---- Parquet ---------------------------------------------------------------------------------------------------------

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(paths: list[str | None] | None = None) -> list[dict]:
    return [{"bytes": shards.photo(i), "path": paths[i] if paths else None} for i in range(COUNT)]


def parquet(image: object = None, label: object = None, **columns: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        given = {"image": pa.array(images(), IMAGE) if image is None else image, "label": labels() if label is None else label} | columns
        pq.write_table(pa.table({name: value for name, value in given.items() if value is not ...}), folder / "a.parquet")
        return folder / "a.parquet"

    return make


def rows(*changed: tuple[bytes | None, str | None, int | None]) -> Callable[[Path], Path]:
    """Good rows, then these."""
    good = [(shards.photo(i), None, i % 5) for i in range(COUNT)]
    return parquet(pa.array([{"bytes": b, "path": p} for b, p, _ in [*good, *changed]], IMAGE), pa.array([n for _, _, n in [*good, *changed]], pa.int64()))


NAME = r"a\.parquet"
PARQUET = [
    Refused("parquet: no image column", parquet(image=..., picture=labels()), rf"{NAME} has no column 'image' \(its columns: label, picture\); rename yours"),
    Refused("parquet: no label column", parquet(label=...), rf"{NAME} has no column 'label' \(its columns: image\); rename"),
    Refused("parquet: labels as text", parquet(label=list("abcdefghij")), f"{NAME}: column 'label' is string, not a whole number; write it"),
    Refused("parquet: labels as floats", parquet(label=[float(i) for i in labels()]), f"{NAME}: column 'label' is double, not a whole number"),
    Refused("parquet: labels as lists", parquet(label=[[i] for i in labels()]), f"{NAME}: column 'label' is list"),
    Refused("parquet: labels as truth", parquet(label=[True] * COUNT), f"{NAME}: column 'label' is bool"),
    Refused("parquet: images as text", parquet(image=["x"] * COUNT), f"{NAME}: column 'image' is string, not struct.* write it"),
    Refused("parquet: images as pixels", parquet(image=[[1, 2, 3]] * COUNT), f"{NAME}: column 'image' is list"),
    Refused("parquet: images by path alone", parquet(image=[{"path": "x"}] * COUNT), f"{NAME}: column 'image' is struct<path"),
    Refused("parquet: no row", lambda folder: parquet(pa.array([], IMAGE), pa.array([], pa.int64()))(folder), "a.parquet holds no sample: give"),
    Refused("parquet: no column", lambda folder: written(folder / "a.parquet", pa.table({})), f"{NAME} has no column 'image' .its columns: none.; rename"),
    Refused("parquet: one path twice", parquet(pa.array(images(["a.jpg", "a.jpg", *"cdefghij"]), IMAGE)), TWICE),
    Refused("parquet: all labels null", parquet(label=pa.array([None] * COUNT, pa.int64())), "10 of 10 samples would be set aside.*null.*\n--force"),
    Refused("parquet: a test split without labels", parquet(label=[-1] * COUNT), "10 of 10 samples would be set aside.*published without labels.*\n--force"),
    Refused("parquet: another schema in the second file", lambda folder: parquet()(folder) and parquet(label=...)(made(folder / "more")).parent.parent, rf"more/{NAME} has no column 'label'.*; rename"),
    Aside("parquet: rows that lack something", rows((None, None, 1), (b"", None, 1), (shards.photo(1), None, None), (shards.photo(1), None, -1), (None, "elsewhere.jpg", 1)),
          {"a/000010": "the row holds no image bytes", "a/000011": "the image is empty (0 bytes)", "a/000012": "the row's label is null", "a/000013": "its label is -1", "elsewhere": "only the path of a file elsewhere"}, COUNT),
    Aside("parquet: labels out of range", rows((shards.photo(1), "five.jpg", 5), (shards.photo(1), "huge.jpg", 2**62), (shards.photo(1), "low.jpg", -(2**62))), {"five": f"label 5 {RANGE}", "huge": RANGE, "low": RANGE}, COUNT),
    Aside("parquet: unsigned labels", parquet(label=pa.array([*labels()[:-1], 2**64 - 1], pa.uint64())), {"a/000009": RANGE}, COUNT - 1),
    Aside("parquet: strange paths", rows((b"x", "a\nb.jpg", 1), (b"x", "\x1b[31m.jpg", 1), (b"x", "gpj\u202e.jpg", 1), (b"x", "../../up.jpg", 1), (b"x", "l" * 5000 + ".jpg", 1), (b"x", ".jpg", 1)),
          dict.fromkeys(["a\nb", "\x1b[31m", "gpj\u202e", "../../up", "l" * 5000, "a/000015"], "not an image"), COUNT),
]  # fmt: skip


def written(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# ---- arrays ----------------------------------------------------------------------------------------------------------


class Trap:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def arrays(given: object = None, label: object = None, names: tuple[str, str] = ("images", "labels")) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        both = [pictures() if given is None else given, np.array(labels()) if label is None else label]
        both = [np.array([Trap(folder / "ran")], object) if one is Trap else one for one in both]
        np.savez(folder / "a.npz", **dict(zip(names, both)))
        return folder / "a.npz"

    return make


def raw_npz(**members: bytes) -> Callable[[Path], Path]:
    """An .npz with these bytes as its members, beside good ones."""

    def make(folder: Path) -> Path:
        content = {}
        for name, array in (("images", pictures()), ("labels", np.array(labels()))):
            out = io.BytesIO()
            np.save(out, array)
            content[name] = members.get(name, out.getvalue())
        with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(f"{name}.npy", data)
        return folder / "a.npz"

    return make


def header(shape: object, descr: str = "|u1") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


NPZ = r"a\.npz cannot be read: "
ARRAYS = [
    Refused("npz: images as floats", arrays(pictures() / 255), NPZ + r"its images are float64 .*: save 0..255 as uint8"),
    Refused("npz: images that are grey", arrays(pictures()[..., 0]), NPZ + "its images are uint8 .*: grey images want their channel three times"),
    Refused("npz: colours first", arrays(pictures().transpose(0, 3, 1, 2).copy()), NPZ + r".*: transpose\(0, 2, 3, 1\)"),
    Refused("npz: one image", arrays(pictures()[0]), NPZ + "its images are uint8"),
    Refused("npz: images without pixels", arrays(np.zeros((COUNT, 0, 32, 3), np.uint8)), NPZ + "its images are"),
    Refused("npz: no image", arrays(pictures()[:0], np.zeros(0, np.int64)), "a.npz holds no sample: give"),
    Refused("npz: labels as floats", arrays(label=np.array(labels(), float)), NPZ + "its labels are float64 .*: save them as int64"),
    Refused("npz: labels as text", arrays(label=np.array(list("abcdefghij"))), NPZ + "its labels are"),
    Refused("npz: labels one-hot", arrays(label=np.eye(5, dtype=int)[labels()]), NPZ + r"its labels are .*: save the argmax\(1\)"),
    Refused("npz: too few labels", arrays(label=np.array(labels()[:-1])), NPZ + r"its labels are int64 \(9,\), not 10 whole numbers: give"),
    Refused("npz: too many labels", arrays(label=np.array([*labels(), 1])), NPZ + r"its labels are int64 \(11,\), not 10 whole numbers: give"),
    Refused("npz: a pickle as labels", arrays(label=Trap), NPZ + r"its labels \(labels.npy\) cannot be used: it holds Python objects .*; save plain numbers"),
    Refused("npz: a pickle as images", arrays(given=Trap), NPZ + "it holds Python objects .*; save plain numbers"),
    Refused("npz: records", arrays(label=np.zeros(COUNT, [("a", int)])), NPZ + r"its labels .*records"),
    Refused("npz: in Fortran's order", arrays(np.asfortranarray(pictures())), NPZ + "it is in Fortran's order; save np.ascontiguousarray"),
    Refused("npz: other names", arrays(names=("pixels", "classes")), NPZ + "it holds classes, pixels; name its arrays images and labels"),
    Refused("npz: a header of any size", raw_npz(images=header((10**12, 1000, 1000, 3))), NPZ + "it is cut off: its header promises 1000000000000 images; fetch it again"),
    Refused("npz: a header below nothing", raw_npz(images=header((-5, 32, 32, 3)) + bytes(100)), NPZ + r"its images are uint8 \(-5, 32, 32, 3\)"),
    Refused("npz: a header that is code", raw_npz(images=header("__import__('os').getpid()")), NPZ + "it is no array of numpy's, or its beginning is damaged; fetch it again"),
    Refused("npz: a header without end", raw_npz(labels=b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"(" * 100_000), NPZ + r"its labels \(labels.npy\) cannot be used: it is no array"),
    Refused("npz: a member that is no array", raw_npz(labels=b"a,b\n1,2\n"), NPZ + r"its labels \(labels.npy\) cannot be used: it is no array of numpy's.*; fetch it again"),
    Aside("npz: labels out of range", arrays(label=np.array([*labels()[:-3], 5, -1, 2**62])), {"a/000007": f"label 5 {RANGE}", "a/000008": f"label -1 {RANGE}", "a/000009": RANGE}, COUNT - 3),
]


# ---- CIFAR's pickles -------------------------------------------------------------------------------------------------


def batch(change: Callable[[dict, Path], object], protocol: int = 2) -> Callable[[Path], Path]:
    """test_batch, whose dict is changed, or replaced by what `change` returns."""

    def make(folder: Path) -> Path:
        content = {b"data": np.ascontiguousarray(pictures().transpose(0, 3, 1, 2)).reshape(COUNT, 3072), b"labels": labels()}
        content = change(content, folder) or content
        (folder / "test_batch").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
        return folder

    return make


BATCH = r"test_batch cannot be read: .*"
AGAIN = "; fetch it again, or leave it out of --source"
PICKLES = [
    Refused("cifar: code in it", batch(lambda content, folder: content.update(x=Trap(folder / "ran"))), BATCH + r"it asks to call \w+\.mkdir; it was not called.*" + AGAIN),
    Refused("cifar: code alone", batch(lambda content, folder: Trap(folder / "ran"), 4), BATCH + "it was not called.*" + AGAIN),
    Refused("cifar: no data", batch(lambda content, _: {b"labels": content[b"labels"]}), BATCH + "it holds no data.*" + AGAIN),
    Refused("cifar: no labels", batch(lambda content, _: {b"data": content[b"data"]}), BATCH + "it holds no labels.*" + AGAIN),
    Refused("cifar: a list", batch(lambda *_: [1, 2]), BATCH + "it holds no dict" + AGAIN),
    Refused("cifar: too few labels", batch(lambda content, _: content | {b"labels": labels()[1:]}), BATCH + "it has 9 labels for 10 images" + AGAIN),
    Refused("cifar: labels as text", batch(lambda content, _: content.update({b"labels": list("abcdefghij")})), BATCH + "its labels are not whole numbers" + AGAIN),
    Refused("cifar: labels as floats", batch(lambda content, _: content.update({b"labels": [1.5] * COUNT})), BATCH + "its labels are not whole numbers" + AGAIN),
    Refused("cifar: data as floats", batch(lambda content, _: content.update({b"data": content[b"data"] / 255})), BATCH + "not of whole numbers" + AGAIN),
    Refused("cifar: data of another size", batch(lambda content, _: content.update({b"data": content[b"data"][:, :300].copy()})), BATCH + "its data is .* not uint8 .N, 3072." + AGAIN),
    Refused("cifar: protocol 0", batch(lambda *_: {b"data": 1}, 0), "test_batch cannot be read: it is no pickle of protocol 2 to 5" + AGAIN),
    Refused("cifar: nested without end", batch(lambda *_: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), BATCH + AGAIN),
    Refused("cifar: memory without end", batch(lambda *_: b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f."), BATCH + AGAIN),
    Aside("cifar: labels out of range", batch(lambda content, _: content.update({b"labels": [*labels()[:-2], 10, -1]})), {"test_batch/000008": f"label 10 {RANGE}", "test_batch/000009": f"label -1 {RANGE}"}, COUNT - 2),
]
