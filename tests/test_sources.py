"""Tar shards: what one is taken to hold, from any position, and how a damaged one is told."""

import io
import json
import os
import pickle
import subprocess
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
import shards
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadRequest
from pipeline.sources import Shard, open_source, tars


def of_tar(path: Path, members, **kwargs):
    """Samples of one tar of (name, content)."""
    source, names = open_source(str(shards.write_tar(path / "a.tar", members, **kwargs)))
    return shards.samples(source, *names)


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


# ---- tar shards: what is a sample ----------------------------------------------------------------------------------


def test_members_of_one_key_are_one_sample(tmp_path):
    got = of_tar(tmp_path, [("b.jpg", b"J"), ("b.cls", b"3\n"), ("b.txt", b"a caption"), ("a.cls", b" 0 "), ("a.png", b"P"), ("c.JPEG", b"G"), ("c.Cls", b"12")])
    assert [(s.sample_id, s.image, s.label, s.fault) for s in got] == [("b", b"J", 3, None), ("a", b"P", 0, None), ("c", b"G", 12, None)]


def test_key_keeps_folders_and_ends_at_the_first_dot_of_the_name(tmp_path):
    """As WebDataset has it: a dot in a folder ends nothing, and `a.1.jpg` is member `1.jpg` of `a`, which is no image."""
    got = of_tar(tmp_path, [("v1.0/cat/x.jpg", b"J"), ("v1.0/cat/x.cls", b"1"), ("v1.0/dog/x.jpg", b"K"), ("v1.0/dog/x.cls", b"2"), ("a.1.jpg", b"J"), ("a.cls", b"1")])
    assert [s.sample_id for s in got] == ["v1.0/cat/x", "v1.0/dog/x", "a"]
    assert [s.image for s in got[:2]] == [b"J", b"K"] and "no image" in got[2].fault


def test_a_tar_of_a_folder_from_within_gives_the_keys_of_its_files(tmp_path):
    """`tar cf x.tar .` writes ./a.jpg where `tar cf x.tar *` writes a.jpg: one image, one ID."""
    for name, before in (("plain", ""), ("dotted", "./")):
        shards.write_tar(tmp_path / name / "x.tar", [(f"{before}{member}", content) for member, content in (("a.jpg", shards.photo(1)), ("a.cls", b"1"), ("f/b.jpg", shards.photo(2)), ("f/b.cls", b"2"))])
    plain, dotted = ([(s.sample_id, s.label, s.image) for s in shards.samples(*_only(tmp_path / name))] for name in ("plain", "dotted"))
    assert plain == dotted and [sample_id for sample_id, _, _ in plain] == ["a", "f/b"]


def _only(folder):
    source, (name,) = open_source(str(folder))
    return source, name


def test_absolute_and_climbing_names_are_only_names(tmp_path):
    """Nothing is unpacked, so a path in an archive leads nowhere; its sample is read like any other."""
    got = of_tar(tmp_path, [("/etc/x.jpg", b"J"), ("/etc/x.cls", b"1"), ("../../y.jpg", b"K"), ("../../y.cls", b"2")])
    assert [(s.sample_id, s.image, s.label) for s in got] == [("/etc/x", b"J", 1), ("../../y", b"K", 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_strange_names_are_stored_as_text(tmp_path, format):
    """A newline, a right-to-left mark, bytes that are no UTF-8, and a name longer than a tar header."""
    names = ["two\nlines", "abc\u202egnp", os.fsdecode(b"caf\xe9"), "long/" * 60 + "x"]
    got = of_tar(tmp_path, [member for name in names for member in ((f"{name}.jpg", b"J"), (f"{name}.cls", b"1"))], format=format)
    assert [s.sample_id for s in got] == ["two\nlines", "abc\u202egnp", "caf\\xe9", "long/" * 60 + "x"]
    assert [s.sample_id.encode() for s in got] and all(s.fault is None for s in got)


@pytest.mark.parametrize("how", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix --sparse-version=1.0"])
def test_holes_of_a_sparse_member_are_zeros(tmp_path, how):
    """As `tar --sparse` packs files that have some, in each of its four ways."""
    if b"GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True).stdout:
        pytest.skip("the tar of this system is not GNU's")
    for i in range(3):
        with open(tmp_path / f"{i}.jpg", "wb") as file:
            for piece in range(i * 3):  # none, and more than a header has room for
                file.seek(piece << 17)
                file.write(b"J" * 5000)
            file.truncate(1 << 20)
        (tmp_path / f"{i}.cls").write_bytes(b"1")
    names = [f"{i}.{end}" for i in range(3) for end in ("jpg", "cls")]
    subprocess.run(["tar", "-C", tmp_path, "--sparse", *f"--format={how}".split(), "-cf", tmp_path / "a.tar", *names], check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1 << 19, "it has holes"
    source, shard = open_source(str(tmp_path / "a.tar"))
    got = shards.samples(source, *shard)
    assert [s.image for s in got] == [(tmp_path / f"{i}.jpg").read_bytes() for i in range(3)]


def test_hidden_and_special_members_are_no_part_of_a_sample(tmp_path):
    """Folders, links, devices, and the `._` files that macOS adds, also where they lie between the members of a sample."""
    got = of_tar(
        tmp_path,
        [
            special("cat", tarfile.DIRTYPE),
            ("cat/a.jpg", b"J"),
            ("cat/._a.jpg", b"mac"),
            special("cat/a.png", tarfile.SYMTYPE, "/etc/passwd"),
            special("cat/a.jpeg", tarfile.LNKTYPE, "cat/a.jpg"),
            special("cat/fifo.jpg", tarfile.FIFOTYPE),
            special("cat/disk.jpg", tarfile.BLKTYPE),
            ("cat/.DS_Store", b""),
            ("cat/a.cls", b"4"),
        ],
    )
    assert [(s.sample_id, s.image, s.label, s.fault) for s in got] == [("cat/a", b"J", 4, None)]


@pytest.mark.parametrize(
    "members, fault",
    [
        ([("x.cls", b"1")], "no image (.jpg, .jpeg or .png)"),
        ([("x.gif", b"G"), ("x.cls", b"1")], "no image"),
        ([("x.jpg", b"J")], "no label (.cls, or .json with"),
        ([("x.jpg", b"J"), ("x.jpg", b"K"), ("x.cls", b"1")], "two members named .jpg"),
        ([("x.jpg", b"J"), ("x.cls", b"1"), ("x.CLS", b"2")], "two members named .cls"),
        ([("x.jpg", b"J"), ("x.cls", b"1"), ("x.png", b"P")], "2 images under this key, .jpg and .png: which is it?"),
        ([("x.png", b"J"), ("x.jpeg", b"J"), ("x.JPG", b"J"), ("x.cls", b"1")], "3 images under this key, .jpg and .jpeg and .png: which is it?"),
        ([("x.jpg", b"J"), ("x.cls", b"cat")], "its .cls holds 'cat', not a whole number"),
        ([("x.jpg", b"J"), ("x.cls", b"1.5")], "'1.5', not a whole number"),
        ([("x.jpg", b"J"), ("x.cls", b"")], "'', not a whole number"),
        ([("x.jpg", b"J"), ("x.cls", b"1_0")], "'1_0', not a whole number"),
        ([("x.jpg", b"J"), ("x.cls", "٥".encode())], "'٥', not a whole number"),
        ([("x.jpg", b"J"), ("x.cls", b"\xff\x1b[2J\n1")], "'\ufffd\\x1b[2J\\n1'"),
        ([("x.jpg", b"J"), ("x.cls", b"1" * 10_000)], "its .cls holds 10,000 bytes, not a whole number"),
        ([("x.jpg", b"J"), ("x.cls", b"1" * 64)], None),
        ([("x.jpg", b"J"), ("x.json", b'{"label": "cat"}')], 'the label in its .json is "cat", not a whole number'),
        ([("x.jpg", b"J"), ("x.json", b'{"label": true}')], "is true, not a whole number"),
        ([("x.jpg", b"J"), ("x.json", b'{"label": 1.0}')], "is 1.0, not a whole number"),
        ([("x.jpg", b"J"), ("x.json", b"[1]")], 'its .json holds no "label"'),
        ([("x.jpg", b"J"), ("x.json", b"{")], 'its .json holds no "label"'),
        ([("x.jpg", b"J"), ("x.json", b"[" * 100_000)], 'its .json holds no "label"'),
        ([("x.jpg", b"J"), ("x.json", b'{"label": ' + b"9" * 5000 + b"}")], 'its .json holds no "label"'),
        ([("x.jpg", b"J"), ("x.json", b"\xff")], 'its .json holds no "label"'),
    ],
    ids=lambda value: None if isinstance(value, list) else (value or "a long number")[:30],
)
def test_what_is_missing_is_said_and_the_sample_kept_in_place(tmp_path, members, fault):
    got = of_tar(tmp_path, [("before.jpg", b"J"), ("before.cls", b"0"), *members, ("z.jpg", b"J"), ("z.cls", b"0")])
    assert [s.sample_id for s in got] == ["before", "x", "z"] and got[0].fault is got[2].fault is None
    if fault is None:
        assert got[1].fault is None and got[1].label > 10**60  # set aside later, as out of range
    else:
        assert fault in got[1].fault and got[1].image == b""


def test_json_label_counts_without_cls_and_never_against_it(tmp_path):
    members = [("a.jpg", b"J"), ("a.json", b'{"label": 7, "url": "x"}'), ("b.jpg", b"J"), ("b.json", b'{"label": 7}'), ("b.cls", b"2"), ("c.jpg", b"J"), ("c.json", b'{"label": "seven"}'), ("c.cls", b"2")]
    got = of_tar(tmp_path, members)
    assert [(s.label, s.fault) for s in got] == [(7, None), (-1, "its .cls says 2, and its .json 7"), (2, None)]


# ---- tar shards: reading from anywhere -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """(source, shard name, all its samples): samples of one to three members, some without an image, names of all lengths."""
    members = []
    for i in range(300):
        name = ("folder/" * (i % 40)) + f"{i}"
        members += [(f"{name}.jpg", b"J" * (i % 700))] * (i % 17 != 0) + [(f"{name}.cls", b"%d" % i)] + [(f"{name}.txt", b"t" * 513)] * (i % 3 == 0)
    source, (name,) = open_source(str(shards.write_tar(tmp_path_factory.mktemp("long") / "a.tar", members)))
    everything = shards.samples(source, name)
    assert len(everything) == 300 and len(source.census(name).marks) == 3
    return source, name, everything


@given(bounds=st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_reading_from_any_position_is_a_slice_of_the_whole(long, bounds):
    source, name, everything = long
    start, stop = sorted(bounds)
    if start < stop:
        assert shards.samples(source, name, start, stop) == everything[start:stop]


def test_marks_are_few_and_reading_begins_at_the_nearest(long):
    """So that the last unit of a shard does not read the whole of it."""
    source, name, _ = long
    shard = source.census(name)
    assert [position for position, _ in shard.marks] == [0, tars.MARK_EVERY, 2 * tars.MARK_EVERY]
    assert [shard.marks_for(*interval)[0][0] for interval in ((0, 5), (127, 129), (128, 129), (299, 300))] == [0, 0, 128, 256]
    assert [position for position, _ in shard.marks_for(100, 200)] == [0, 128]


def test_reader_travels_to_another_process(long):
    source, name, everything = long
    assert list(pickle.loads(pickle.dumps(source)).read(source.census(name).marks, name, 0, 5)) == everything[:5]


# ---- tar shards: damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["at once", "in the first header", "in an image", "in a header", "between two members", "between two samples", "before the end mark"])
def test_truncated_tar_is_refused(tmp_path, cut):
    """Wherever the transfer ended: the file is named, and what to do. No shorter data set is made of it."""
    path = shards.write_shard(tmp_path / "cut \u202e.tar", [0, 1, 2])
    with tarfile.open(path) as tar:
        members = list(tar)
    end = members[-1].offset_data + 512
    at = {
        "at once": 0,
        "in the first header": 100,
        "in an image": members[2].offset_data + 50,
        "in a header": members[2].offset + 100,
        "between two members": members[3].offset,
        "between two samples": members[4].offset,
        "before the end mark": end,
    }[cut]
    path.write_bytes(path.read_bytes()[:at])
    source, (name,) = open_source(str(path))
    with pytest.raises(BadRequest, match=r"cut \\u202e\.tar cannot be read to its end .*fetch it again or repack it, or leave it out of --source"):
        source.census(name)


def test_damaged_header_hides_no_samples(tmp_path):
    """Python's tarfile takes a damaged header for the end of the archive."""
    path = shards.write_shard(tmp_path / "a.tar", [0, 1, 2])
    with tarfile.open(path) as tar:
        offset = list(tar)[2].offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 20] = b"\xff" * 20
    path.write_bytes(content)
    source, (name,) = open_source(str(path))
    with pytest.raises(BadRequest, match="a.tar cannot be read to its end"):
        source.census(name)


def test_bare_end_is_enough(tmp_path):
    """One block of zeros ends a tar, padding to a record or not; and a tar of nothing holds nothing."""
    path = shards.write_shard(tmp_path / "a.tar", [0, 1, 2])
    with tarfile.open(path) as tar:
        end = list(tar)[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[: end + 512])
    source, (name,) = open_source(str(path))
    assert source.census(name).samples == 3
    empty, (name,) = open_source(str(shards.write_tar(tmp_path / "empty.tar", [])))
    assert empty.census(name).samples == 0


@pytest.mark.parametrize("changed", [0, 5, 127, 128, 199])
@pytest.mark.parametrize("interval", [(0, 200), (0, 128), (128, 200), (100, 150), (198, 199)])
def test_a_shard_that_changes_while_a_job_runs_is_refused(tmp_path, changed, interval):
    """Another image of as many bytes, or none, under the same name and at the same place: what is read lies between two marks, and there the headers must be those of the census."""
    write = lambda at: shards.write_tar(tmp_path / "a.tar", [member for i in range(200) for member in ((f"{i}.jpg", b"J" * (600 + (i == at))), (f"{i}.cls", b"1"))])  # noqa: E731
    source, (name,) = open_source(str(write(-1)))
    shard = source.census(name)
    whole = shards.samples(source, name, *interval)
    write(changed)
    among = range(interval[0] // 128 * 128, min(200, -(-interval[1] // 128) * 128))
    if changed in among:
        with pytest.raises(BadRequest, match="a.tar is another file than when it was counted: put the old file back"):
            list(source.read(shard.marks_for(*interval), name, *interval))
    else:
        assert list(source.read(shard.marks_for(*interval), name, *interval)) == whole


@pytest.mark.parametrize("folders", [False, True], ids=["with labels", "class folders"])
@pytest.mark.parametrize("interval", [(0, 300), (130, 131), (200, 300), (256, 300)])
def test_what_an_archive_says_of_all_its_members_holds_wherever_reading_begins(tmp_path, folders, interval):
    """PAX's global headers, as `tar --pax-option=mtime=...` writes one: here at the beginning, and another in the middle."""
    parts = []
    for first, mtime in ((0, "1000"), (150, "2000")):
        with tarfile.open(tmp_path / "part.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"mtime": mtime}) as tar:
            for i in range(first, first + 150):
                for name, content in [(f"images/{'cat' if i < 200 else 'dog'}/{i}.jpg", b"J" * 600)] if folders else [(f"{i}.jpg", b"J" * 600), (f"{i}.cls", b"1")]:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            end = tar.offset
        parts.append((tmp_path / "part.tar").read_bytes()[:end])
    (tmp_path / "part.tar").unlink()
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
    source, (name,) = open_source(str(tmp_path / "a.tar"))
    shard = source.census(name)
    shard = Shard(**json.loads(json.dumps(asdict(shard))) | {"marks": tuple(map(tuple, json.loads(json.dumps(shard.marks))))})
    whole = list(source.read(shard.marks, name, 0, 300))
    assert len(whole) == shard.samples == 300 and list(source.read(shard.marks_for(*interval), name, *interval)) == whole[slice(*interval)]


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("interval", [(0, 200), (100, 101), (128, 200)])
def test_labels_that_change_under_the_same_headers_are_another_file(tmp_path, kind, interval):
    """As a packer that sets no times writes it: a label of one digit for another."""
    label = lambda number: b"%d" % number if kind == "cls" else b'{"label": %d}' % number  # noqa: E731
    write = lambda at: shards.write_tar(tmp_path / "a.tar", [member for i in range(200) for member in ((f"{i}.jpg", b"J" * 600), (f"{i}.{kind}", label(1 + (i == at))))])  # noqa: E731
    source, (name,) = open_source(str(write(-1)))
    shard = source.census(name)
    whole = shards.samples(source, name, *interval)
    assert source.census(name) == shard and list(source.read(shard.marks_for(*interval), name, *interval)) == whole
    write(130)
    assert source.census(name).version != shard.version
    if interval[1] > 128:
        with pytest.raises(BadRequest, match="a.tar is another file than when it was counted"):
            list(source.read(shard.marks_for(*interval), name, *interval))
    else:
        assert list(source.read(shard.marks_for(*interval), name, *interval)) == whole


def test_shard_that_shrank_since_the_census_is_refused(tmp_path):
    """A reader counts on; a unit is never made of fewer samples than it stands for."""
    source, (name,) = open_source(str(shards.write_shard(tmp_path / "a.tar", [0, 1, 2])))
    shard = source.census(name)
    shards.write_shard(tmp_path / "a.tar", [0, 1])
    with pytest.raises(BadRequest, match="a.tar holds 2 samples where it held 3 or more when it was counted"):
        list(source.read(shard.marks, name, 0, 3))
    assert source.census(name).version != shard.version


def test_marks_of_a_shard_without_samples():
    assert Shard("a", 0, "", ()).marks_for(0, 0) == ()
