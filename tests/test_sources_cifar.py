"""CIFAR's python release: exact pixels, labels and IDs from pickles of every age, and no pickle ever runs."""

import io
import os
import pickle
import pickletools
import struct
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest
import shards
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import BadRequest
from pipeline.samples import PRESETS, decode
from pipeline.sources import open_source
from pipeline.sources.unpickle import Refused, scan


def pictures(count, seed=0):
    """uint8 [N, 32, 32, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def rows(images):
    """As CIFAR has them: [N, 3072], the red plane, the green, the blue."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)


def python2(data, labels, key=b"labels"):
    """The bytes of the original release: Python 2's protocol 2, byte strings for every text, the array's bytes in a BINSTRING."""
    short = lambda text: b"U" + bytes([len(text)]) + text  # noqa: E731
    number = lambda n: b"M" + struct.pack("<H", n)  # noqa: E731
    out = b"\x80\x02}q\x01(" + short(b"batch_label") + short(b"testing batch 1 of 1") + short(key) + b"]q\x05("
    out += b"".join(b"K" + bytes([n]) for n in labels) + b"e" + short(b"data") + b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85q\x08U\x01bq\x09\x87Rq\x0a"
    out += b"(K\x01" + number(len(data)) + number(3072) + b"\x86q\x0bcnumpy\ndtype\nq\x0cU\x02u1q\x0dK\x00K\x01\x87Rq\x0e(K\x03U\x01|q\x0fNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x10b\x89"
    return out + b"T" + struct.pack("<I", data.size) + data.tobytes() + b"q\x11tq\x12b" + short(b"filenames") + b"]q\x13(" + b"".join(short(b"cat_s_%06d.png" % i) for i in range(len(data))) + b"eu."


def dump(path, images, labels, age=2, keys=("data", "labels"), **more):
    """A batch as Python 2 wrote it (age "release"), or as today's Python writes it with that protocol."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if age == "release":
        path.write_bytes(python2(rows(images), labels, keys[1].encode()))
    else:
        path.write_bytes(pickle.dumps({keys[0].encode(): rows(images), keys[1].encode(): labels, b"filenames": ["a"] * len(images), **more}, protocol=age))
    return path


def pixels(raw):
    return np.asarray(Image.open(io.BytesIO(raw.image)))


def all_of(spec):
    source, names = open_source(str(spec))
    return [s for name in names for s in shards.samples(source, name)]


@pytest.mark.parametrize("age", ["release", 2, 3, 4, 5])
def test_pixels_labels_and_ids_are_exact(tmp_path, age):
    images, labels = pictures(200), [i % 10 for i in range(200)]
    got = all_of(dump(tmp_path / "cifar-10-batches-py/test_batch", images, labels, age).parent)
    assert [s.sample_id for s in got] == [f"test_batch/{i:06d}" for i in range(200)] and [s.label for s in got] == labels
    assert all((pixels(s) == image).all() for s, image in zip(got, images))
    assert (decode(got[7], PRESETS["cifar"], 10).pixels == images[7]).all()


def test_made_up_release_is_what_python_reads(tmp_path):
    """The bytes above are a real pickle: Python's own reader, as every tutorial has it, gives the same."""
    images = pictures(5)
    batch = pickle.loads(python2(rows(images), [1, 2, 3, 4, 5]), encoding="bytes")
    assert (batch[b"data"] == rows(images)).all() and batch[b"labels"] == [1, 2, 3, 4, 5] and len(batch[b"filenames"]) == 5


@pytest.mark.parametrize("labels", [[3, 1, 2], np.array([3, 1, 2]), np.array([3, 1, 2], np.uint8), [np.int64(3), 1, np.int32(2)]], ids=["list", "int64", "uint8", "scalars"])
@pytest.mark.parametrize("age", [2, 5])
def test_labels_of_every_form(tmp_path, labels, age):
    assert [s.label for s in all_of(dump(tmp_path / "test_batch", pictures(3), labels, age))] == [3, 1, 2]


def test_cifar100_has_fine_labels(tmp_path):
    images = pictures(6)
    dump(tmp_path / "cifar-100-python/test", images, [99, 0, 5, 5, 1, 42], keys=("data", "fine_labels"), **{"coarse_labels": [1] * 6})
    got = all_of(tmp_path / "cifar-100-python")
    assert [(s.sample_id, s.label) for s in got] == [(f"test/{i:06d}", label) for i, label in enumerate([99, 0, 5, 5, 1, 42])]


def write_release(folder, each=4):
    for i, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        dump(folder / name, pictures(each, i), [i] * each, "release")
    return shards.write_tree(folder, {"batches.meta": pickle.dumps({"label_names": ["cat"]}, 2), "readme.html": b"<html>"})


def test_folder_stands_for_its_test_half_and_says_so(tmp_path):
    folder = write_release(tmp_path / "cifar-10-batches-py")
    for spec in (folder, tmp_path):
        source, names = open_source(str(spec))
        assert (names, source.root, source.kind) == (["test_batch"], str(folder), "cifar batches")
    assert "the test half alone is read; name training batches by a pattern" in source.advice(names)[0]
    assert [s.sample_id for s in all_of(folder / "data_batch_*")] == [f"data_batch_{b}/{i:06d}" for b in (1, 2) for i in range(4)]
    source, names = open_source(str(folder / "data_batch_{1..2}"))
    assert source.advice(names) == []
    (folder / "test_batch").unlink()
    assert len(all_of(folder)) == 8


def test_two_releases_in_one_folder_are_refused(tmp_path):
    write_release(tmp_path / "a")
    write_release(tmp_path / "b")
    with pytest.raises(BadRequest, match=r"CIFAR batches in several folders \(a, b\): name one"):
        open_source(str(tmp_path))
    with pytest.raises(BadRequest, match=r"CIFAR batches in several folders \(., below\): name one"):
        open_source(str(write_release(tmp_path / "a/below").parent))


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-python.tar"])
def test_packed_release_is_refused_with_the_remedy(tmp_path, name):
    write_release(tmp_path / "cifar-10-batches-py")
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
        tar.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    with pytest.raises(BadRequest, match="is a release that is read unpacked: tar xf it into a folder"):
        open_source(str(tmp_path / name))


@pytest.fixture(scope="module", params=["release", 2, 5])
def long(request, tmp_path_factory):
    path = dump(tmp_path_factory.mktemp("long") / "test_batch", pictures(400), [i % 7 for i in range(400)], request.param)
    source, (name,) = open_source(str(path))
    return source, name, shards.samples(source, name)


@given(bounds=st.tuples(st.integers(0, 400), st.integers(0, 400)))
def test_any_interval_is_a_slice_of_the_whole(long, bounds):
    shards.check_interval(*long, *sorted(bounds))


@pytest.mark.parametrize("age", ["release", 2, 5])
def test_memory_is_that_of_a_stretch_not_of_the_batch(tmp_path, age):
    source, (name,) = open_source(str(dump(tmp_path / "test_batch", pictures(10_000), [1] * 10_000, age)))
    tracemalloc.start()
    shard = source.census(name)
    assert sum(1 for _ in source.read(shard.marks_for(9000, 9128), name, 9000, 9128)) == 128
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shard.samples == 10_000 and peak < 8 << 20 < 10_000 * 3072


# ---- hostile and damaged -------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("where", ["alone", "as labels", "as data", "as a key beside", "in the labels"])
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, __import__, getattr, np.load], ids=lambda f: f.__name__)
def test_pickle_with_code_is_refused_and_does_not_run(tmp_path, protocol, where, function):
    mark = tmp_path / "it ran"
    args = {"mkdir": (str(mark),), "system": (f"mkdir '{mark}'",), "eval": (f"__import__('os').mkdir({str(mark)!r})",), "__import__": ("antigravity",), "getattr": (1, "real"), "load": (str(mark),)}[function.__name__]
    evil, batch = Evil(function, *args), {"data": rows(pictures(2)), "labels": [0, 1]}
    content = {"alone": evil, "as labels": batch | {"labels": evil}, "as data": batch | {"data": evil}, "as a key beside": batch | {"more": evil}, "in the labels": batch | {"labels": [0, evil]}}[where]
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol))
    source, (name,) = open_source(str(tmp_path / "test_batch"))
    with pytest.raises(BadRequest, match=r"test_batch cannot be read: it asks to call \S+; it was not called"):
        source.census(name)
    assert not mark.exists() and "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x80\x02" + b"(S'echo'\nios\nsystem\n.", "opcode"),
        (b"\x80\x02" + b"Pevil\n.", "opcode"),
        (b"\x80\x02" + b"\x82\x01.", "opcode"),
        (b"\x80\x02cos\x1b[2J\nsystem\n.", r"call os\\x1b\[2J.system"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "opcode"),
        (b"\x80\x02N.", "it holds no dict"),
        (b"\x80\x02}.", "it holds no data"),
        (b"\x80\x02" + b"K\x01\x85" * 200_000 + b"K\x01" + b"}" + b".", "it holds no data"),
        (b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s.", "damaged"),
        (b"\x80\x02]q\x00h\x00a.", "it holds no dict"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02u.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "cut off"),
        (b"\x80\x04\x8a\xff\x01.", "cut off"),
        (b"\x80\x09N.", "no pickle of protocol 2 to 5"),
        (b"\x80", "no pickle of protocol"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:16]),
)
def test_strange_pickles_are_refused(tmp_path, content, message):
    (tmp_path / "test_batch").write_bytes(content)
    source, (name,) = open_source(str(tmp_path / "test_batch"))
    with pytest.raises(BadRequest, match=f"test_batch cannot be read: .*{message}"):
        source.census(name)


@given(at=st.integers(0, 700), byte=st.integers(0, 255), age=st.sampled_from(["release", 2, 5]))
def test_a_changed_byte_never_does_more_than_be_refused(at, byte, age):
    images = pictures(1)
    content = bytearray(python2(rows(images), [1]) if age == "release" else pickle.dumps({"data": rows(images), "labels": [1]}, age))
    content[-at - 1 if at % 2 else at // 2] = byte
    try:
        found = scan(io.BytesIO(content))
    except Refused as fault:
        found = str(fault)
    assert found == "" or kinds(found) <= {"dict", "list", "tuple", "set", "int", "float", "bool", "bytes", "str", "NoneType", "Span", "Call"}


def kinds(value, seen=None):
    """Names of all types inside `value`, itself included: plain ones, or a description of what a pickle would have called."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return set()
    seen[id(value)] = value
    inside = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple, set)) else list(vars(value).values()) if type(value).__name__ == "Call" else []
    return {type(value).__name__}.union(*(kinds(v, seen) for v in inside))


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"data": rows(pictures(2))}, "it holds no labels"),
        ({"labels": [1]}, "it holds no data"),
        ({"data": rows(pictures(2)), "labels": [1]}, "it has 1 labels for 2 images"),
        ({"data": rows(pictures(2)), "labels": ["cat", "dog"]}, "its labels are not whole numbers"),
        ({"data": rows(pictures(2)), "labels": [1.0, True]}, "its labels are not whole numbers"),
        ({"data": rows(pictures(2)).astype(np.int64), "labels": [1, 2]}, r"its data is int64 \(2, 3072\), not uint8"),
        ({"data": pictures(2), "labels": [1, 2]}, r"its data is uint8 \(2, 32, 32, 3\), not uint8 \(N, 3072\)"),
        ({"data": np.asfortranarray(rows(pictures(2))), "labels": [1, 2]}, "Fortran"),
        ({"data": rows(pictures(2)).astype(float), "labels": [1, 2]}, "not of whole numbers"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_batch_that_does_not_fit_is_refused_in_one_sentence(tmp_path, batch, message, protocol):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol))
    source, (name,) = open_source(str(tmp_path / "test_batch"))
    with pytest.raises(BadRequest, match=f"test_batch cannot be read: .*{message}"):
        source.census(name)


@pytest.mark.parametrize("age", ["release", 2, 5])
def test_cut_or_changed_batch_is_refused(tmp_path, age):
    path = dump(tmp_path / "test_batch", pictures(300), [1] * 300, age)
    source, (name,) = open_source(str(path))
    shard, whole = source.census(name), bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRequest, match="test_batch cannot be read: .*cut off"):
        source.census(name)
    dump(path, pictures(300, 1), [1] * 300, age)
    with pytest.raises(BadRequest, match="test_batch is not what it was when it was counted"):
        list(source.read(shard.marks, name, 0, 300))
    assert source.census(name).version != shard.version
    dump(path, pictures(300), [2] * 300, age)
    with pytest.raises(BadRequest, match="is not what it was"):
        list(source.read(shard.marks_for(200, 210), name, 200, 210))


def test_opcodes_that_are_read_are_those_of_plain_data():
    """Every opcode of Python's that can call or import is refused, or goes through the list of names."""
    for op in pickletools.opcodes:
        if op.name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"):
            with pytest.raises(Refused):
                scan(io.BytesIO(b"\x80\x02" + op.code.encode("latin-1") + b"\x00" * 8))
