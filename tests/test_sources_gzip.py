"""Tar shards in gzip: the same samples as unpacked, whoever reads which unit first, in bounded memory; what is damaged is refused."""

import gzip
import itertools
import pickle
import random
import tarfile
import tracemalloc

import pytest
import shards
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadRequest
from pipeline.sources import open_source, tars


def pack(path, name="a.tar.gz"):
    """The same archive in gzip, beside it."""
    packed = path.with_name(name)
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    return packed


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(source, name) of a tar of 300 samples in gzip, and all samples of the tar. Members end at, before and after a block's end."""
    members = []
    for i in range(300):
        name = ("folder/" * (i % 40)) + f"{i}"
        members += [(f"{name}.jpg", bytes([i % 251]) * (512 * (i % 3)))] * (i % 17 != 0) + [(f"{name}.cls", b"%d" % i)] + [(f"{name}.txt", b"t" * 513)] * (i % 3 == 0)
    plain = shards.write_tar(tmp_path_factory.mktemp("gz") / "a.tar", members)
    source, names = open_source(str(plain))
    packed, (name,) = open_source(str(pack(plain)))
    return packed, name, shards.samples(source, *names)


def test_samples_are_those_of_the_tar(both):
    source, name, everything = both
    assert source.kind == "webdataset" and shards.samples(source, name) == everything and len(everything) == 300


@given(bounds=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5))
def test_any_order_of_units_gives_slices_of_the_whole(both, bounds):
    """Forward, backward, overlapping, again: whatever stream the last unit left behind."""
    source, name, everything = both
    for start, stop in map(sorted, bounds):
        if start < stop:
            assert shards.samples(source, name, start, stop) == everything[start:stop]


def test_units_that_interleave_have_streams_of_their_own(both):
    source, name, everything = both
    marks = source.census(name).marks
    first, second = (source.read(marks, name, 0, 200) for _ in range(2))
    got = list(itertools.chain.from_iterable(zip(first, second)))
    assert got == [s for s in everything[:200] for _ in range(2)]


def test_units_in_order_unpack_the_archive_once(both, monkeypatch):
    source, name, everything = both
    shard, opened = source.census(name), []
    monkeypatch.setattr(tars, "Walk", lambda *args: opened.append(args) or WALK(*args))
    got = [sample for start in range(0, 300, 32) for sample in source.read(shard.marks, name, start, min(300, start + 32))]
    assert got == everything and len(opened) <= 1
    list(source.read(shard.marks, name, 10, 20))
    assert len(opened) <= 2


WALK = tars.Walk


def test_no_more_streams_stay_open_than_said(tmp_path):
    for i in range(tars.PARKED + 3):
        source, (name,) = open_source(str(pack(shards.write_shard(tmp_path / f"{i}.tar", [0, 1]), f"{i}.tar.gz")))
        list(source.read(source.census(name).marks, name, 0, 1))
    assert len(tars._streams) <= tars.PARKED


def test_memory_is_that_of_a_sample_not_of_the_archive(tmp_path):
    noise = random.Random(0).randbytes(1 << 18)
    members = [m for i in range(80) for m in ((f"{i}.jpg", noise), (f"{i}.cls", b"1"))]
    source, (name,) = open_source(str(pack(shards.write_tar(tmp_path / "a.tar", members))))
    tracemalloc.start()
    shard = source.census(name)
    assert sum(1 for _ in source.read(shard.marks, name, 70, 80)) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20 < 80 << 18


def test_member_that_unpacks_without_end_is_set_aside(tmp_path, monkeypatch):
    """A few kilobytes of gzip can claim any size."""
    monkeypatch.setattr(tars, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr("pipeline.sources.webdataset.MOST_BYTES", 1 << 20)
    plain = shards.write_tar(tmp_path / "a.tar", [("bomb.jpg", bytes(3 << 20)), ("bomb.cls", b"1"), ("z.jpg", b"J"), ("z.cls", b"2")])
    source, (name,) = open_source(str(pack(plain)))
    got = shards.samples(source, name)
    assert "larger than 1 MiB" in got[0].fault and (got[1].image, got[1].label) == (b"J", 2)


@pytest.mark.parametrize("spec", ["v-{0..1}.tar.gz", "v-*.tar.gz", "", "v-{0.tar.gz,1.tgz}", "v-?.t*gz"])
def test_patterns_name_them(tmp_path, spec):
    for i, suffix in enumerate((".tar.gz", ".tgz") if "tgz" in spec or "t*" in spec else (".tar.gz", ".tar.gz")):
        path = shards.write_shard(tmp_path / "made.tar", [i])
        pack(path, f"v-{i}{suffix}")
        path.unlink()
    source, names = open_source(str(tmp_path / spec))
    assert len(names) == 2 and [s.label for name in names for s in shards.samples(source, name)] == [0, 1]


def test_it_says_that_it_is_slow_and_what_to_do(tmp_path):
    path = shards.write_shard(tmp_path / "made.tar", [0])
    source, names = open_source(str(pack(path)))
    assert len(source.advice(names)) == 1 and "a.tar.gz is gzip" in source.advice(names)[0] and "gunzip" in source.advice(names)[0]
    assert source.advice(["made.tar"]) == []
    assert "2 shards are gzip" in source.advice(["made.tar", "b.tgz", "c.tar.gz"])[0]


@pytest.mark.parametrize("damage", ["gzip cut", "in its checksum", "tar cut inside whole gzip", "no end mark inside", "a byte changed", "empty", "junk after", "two archives"])
def test_damaged_archive_is_refused(tmp_path, damage):
    """Both layers have an end, and both are looked at: the outer one may be whole where the inner is cut."""
    path = shards.write_shard(tmp_path / "made.tar", list(range(20)), size=(64, 64))
    with tarfile.open(path) as tar:
        last = list(tar)[-1]
    whole, plain = pack(path).read_bytes(), path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF
    content = {
        "gzip cut": whole[: len(whole) // 2],
        "in its checksum": whole[:-5],
        "tar cut inside whole gzip": gzip.compress(plain[: last.offset_data - 700]),
        "no end mark inside": gzip.compress(plain[: last.offset_data + 512]),
        "a byte changed": bytes(changed),
        "empty": b"",
        "two archives": whole + gzip.compress(plain),
        "junk after": whole + b"junk",
    }[damage]
    (tmp_path / "cut \u202e.tar.gz").write_bytes(content)
    source, (name,) = open_source(str(tmp_path / "cut \u202e.tar.gz"))
    with pytest.raises(BadRequest, match=r"cut \\u202e\.tar\.gz cannot be read to its end .*fetch it again or repack it"):
        source.census(name)


def test_archive_that_changed_since_the_census_is_refused(tmp_path):
    packed = pack(shards.write_shard(tmp_path / "made.tar", [0, 1, 2]))
    source, (name,) = open_source(str(packed))
    shard = source.census(name)
    list(source.read(shard.marks, name, 0, 1))
    pack(shards.write_shard(tmp_path / "made.tar", [0, 1, 1]))
    with pytest.raises(BadRequest, match="a.tar.gz is another file than when it was counted"):
        list(source.read(shard.marks, name, 1, 2))
    assert source.census(name).version != shard.version
    assert [s.label for s in shards.samples(pickle.loads(pickle.dumps(source)), name)] == [0, 1, 1]
