"""What `--source` may say: patterns, folders, links; and what is refused by name."""

import bz2
import gzip
import lzma
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards

from pipeline.errors import BadRequest
from pipeline.sources import open_source
from pipeline.sources.paths import expand_braces


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("a.tar", ["a.tar"]),
        ("{a,b}.tar", ["a.tar", "b.tar"]),
        ("v-{08..11}.tar", ["v-08.tar", "v-09.tar", "v-10.tar", "v-11.tar"]),
        ("v-{8..11}", ["v-8", "v-9", "v-10", "v-11"]),
        ("v-{2..0}", ["v-2", "v-1", "v-0"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{x}-{y..z}", ["{x}-{y..z}"]),
        ("{,s}", ["", "s"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, expected):
    assert expand_braces(pattern) == expected


@pytest.fixture
def many(tmp_path):
    for name in ("val-00.tar", "val-01.tar", "val-02.tar", "one/a.tar", "two/a.tar"):
        shards.write_shard(tmp_path / name, [0])
    (tmp_path / ".val-03.tar").write_bytes(b"half a download")
    return tmp_path


@pytest.mark.parametrize(
    "spec, names",
    [
        ("val-00.tar", ["val-00.tar"]),
        ("val-{00..02}.tar", ["val-00.tar", "val-01.tar", "val-02.tar"]),
        ("val-{02..01}.tar", ["val-02.tar", "val-01.tar"]),
        ("val-*.tar", ["val-00.tar", "val-01.tar", "val-02.tar"]),
        ("val-0[12].tar", ["val-01.tar", "val-02.tar"]),
        ("{val-00,val-0?}.tar", ["val-00.tar", "val-01.tar", "val-02.tar"]),
        ("**/a.tar", ["one/a.tar", "two/a.tar"]),
        ("{two,one}/a.tar", ["two/a.tar", "one/a.tar"]),
        ("", ["one/a.tar", "two/a.tar", "val-00.tar", "val-01.tar", "val-02.tar"]),
        ("o*", ["a.tar"]),
        ("{one,two}/*", ["one/a.tar", "two/a.tar"]),
    ],
)
def test_patterns_name_shards_by_their_path_below_the_root(many, spec, names):
    """In the order that was said, sorted inside a pattern, each once, hidden ones not; names of shards in two folders differ."""
    source, got = open_source(os.path.join(many, spec))
    assert (source.kind, got) == ("webdataset", names) and source.root == str(many / "one" if spec == "o*" else many)
    assert [source.census(name).samples for name in got] == [1] * len(names)


def test_relative_path_and_brackets_in_a_real_name(tmp_path, monkeypatch):
    """A file whose name looks like a pattern is that file."""
    shards.write_shard(tmp_path / "set [v2]{a,b}" / "a[0].tar", [0])
    monkeypatch.chdir(tmp_path)
    for spec in ("set [v2]{a,b}/a[0].tar", "set [v2]{a,b}", "set [v2]{a,b}/", "set [v2]{a,b}/*.tar", "set*"):
        source, (name,) = open_source(spec)
        assert source.census(name).samples == 1 and os.path.isabs(source.root)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nowhere.tar", "there is no .*nowhere.tar; give tar shards"),
        ("val-{00..05}.tar", r"there is no .*val-03.tar \(and 2 more\)"),
        ("x*.tar", r"there is no .*x\*\.tar"),
        ("set.zip", "set.zip is of no kind that is read here; what is: tar shards .*, Parquet files"),
        ("{val-00.tar,set.zip}", "set.zip is of no kind"),
        ("{val-00.tar,set.parquet}", "holds both tar shards and Parquet files: name one kind"),
        ("{one,two}", "names .*one, a folder, and more besides: name one folder, or the files in them, for example '.*/{one,two}/\\*.tar'"),
        ("nothing", "holds nothing that is read here; what is: tar shards .*class folders"),
        ("evil\n\x1b[2J.tar", r"there is no .*evil\\n\\x1b\[2J.tar"),
    ],
)
def test_unusable_source_is_refused_by_name(many, spec, message):
    shards.write_tree(many, {"set.parquet": b"", "set.zip": b"", "nothing/x/readme.txt": b""})
    with pytest.raises(BadRequest, match=f"^--source: .*{message}" if not message.startswith("there") else f"^--source: {message}"):
        open_source(os.path.join(many, spec))


def test_an_empty_source_is_not_the_folder_that_one_is_in():
    with pytest.raises(BadRequest, match="^--source is empty .*; give tar shards"):
        open_source(" ")


@pytest.mark.parametrize(
    "names, splits, example",
    [
        (["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar", "imagenet1k-validation-01.tar"], "train, validation", "imagenet1k-validation-*.tar"),
        (["train/00.tar", "train/01.tar", "val/00.tar", "val/01.tar"], "train, validation", "val/*.tar"),
        (["data/train.tar", "data/test.tar", "more.tar"], "test, train", "data/test.tar"),
        (["x/val/0/a.tar", "x/val/1/a.tar", "x/training/a.tar"], "train, validation", "x/val/**/*.tar"),
    ],
)
def test_splits_in_one_folder_are_refused_with_a_pattern_that_works(tmp_path, names, splits, example):
    """Training images must not become part of a holdout set unasked; said one by one they may."""
    for i, name in enumerate(names):
        shards.write_shard(tmp_path / name, [0], first=i)
    for spec in (tmp_path, tmp_path / "**/*.tar"):
        with pytest.raises(BadRequest) as refusal:
            open_source(str(spec))
        assert f"several splits ({splits}), which must not mix: name one by a pattern, for example '{tmp_path / example}'" in str(refusal.value)
    assert 0 < len(open_source(str(tmp_path / example))[1]) < len(names)
    assert len(open_source(f"{tmp_path}/{{{','.join(names)}}}")[1]) == len(names)


def test_shard_that_lies_there_packed_and_unpacked_is_refused(tmp_path):
    """Every sample would be there twice."""
    for i in range(3):
        path = shards.write_shard(tmp_path / f"v-{i}.tar", [0], first=i)
        (tmp_path / f"v-{i}.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(BadRequest, match=r"holds v-0.tar and v-0.tar.gz, one shard twice: name one of them by a pattern, for example '.*/v-\*.tar'"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path / "v-*.tar"))[1] == ["v-0.tar", "v-1.tar", "v-2.tar"]


def test_shards_behind_a_link_are_found_and_circles_are_not_entered(tmp_path):
    """A folder is often a collection of links to what lies on several disks."""
    shards.write_shard(tmp_path / "disk/b.tar", [1])
    shards.write_shard(tmp_path / "set/a.tar", [0])
    for link, target in (("more", "../disk"), ("again", "../disk"), ("self", "."), ("up", "..")):
        (tmp_path / "set" / link).symlink_to(target)
    assert open_source(str(tmp_path / "set"))[1] == ["a.tar", "again/b.tar"]


@pytest.mark.parametrize("name", ["x.tar", "features.npy", "meta.parquet", "test", "cat/x.tgz"])
def test_archive_among_class_folders_is_refused_naming_both_ways_out(tmp_path, name):
    """A file of features beside the images must not become the data set."""
    shards.write_tree(tmp_path, {f"{c}/{i}.jpg": b"J" for c in ("cat", "dog") for i in range(3)} | {name: b"\x80"})
    with pytest.raises(BadRequest, match=f"holds images .cat/0.jpg, .* and .* .{name}. beside them: name the one by '.*/{name}', or move it elsewhere to read the other"):
        open_source(str(tmp_path))
    (tmp_path / name).unlink()
    assert open_source(str(tmp_path))[0].kind == "class folders"


def test_pictures_beside_shards_are_no_data_set(many):
    shards.write_tree(many, {"docs/figure.png": b"J", "logo.png": b"J"})
    assert len(open_source(str(many))[1]) == 5


@pytest.mark.parametrize("name", ["A.TAR", "A.Tar.GZ", "A.TGZ", "A.Parquet", "A.NPZ"])
def test_case_of_a_suffix_means_nothing(tmp_path, name):
    if name == "A.Parquet":
        image = pa.array([{"bytes": b"J", "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        pq.write_table(pa.table({"image": image, "label": [3]}), tmp_path / name)
    elif name == "A.NPZ":
        with open(tmp_path / name, "wb") as file:
            np.savez(file, images=np.zeros((1, 4, 4, 3), np.uint8), labels=[3])
    else:
        path = shards.write_shard(tmp_path / name, [3])
        path.write_bytes(path.read_bytes() if name == "A.TAR" else gzip.compress(path.read_bytes()))
    for spec in (tmp_path, tmp_path / name):
        source, names = open_source(str(spec))
        assert [s.label for s in shards.samples(source, *names)] == [3]


@pytest.mark.parametrize(
    "name, pack, message",
    [
        ("a.tar", gzip.compress, "a.tar is packed by gzip, whatever its name says: rename it to .tar.gz"),
        ("a.tar.gz", bytes, "a.tar.gz is a plain tar, whatever its name says: rename it to .tar"),
        ("a.tar", bz2.compress, "a.tar is packed by bzip2, which is not read here: unpack it, or pack it by gzip"),
        ("a.tar.gz", lzma.compress, "a.tar.gz is packed by xz, which is not read here"),
        ("a.tar", lambda content: content + content, "a.tar cannot be read to its end .*several archives in one file"),
        ("a.tar", lambda content: content + b"junk", "a.tar cannot be read to its end"),
    ],
)
def test_archive_that_is_not_what_its_name_says_is_refused(tmp_path, name, pack, message):
    """What follows the end mark of an archive would be lost without a word."""
    path = shards.write_shard(tmp_path / "made.tar", [0, 1])
    content = path.read_bytes()
    path.unlink()
    (tmp_path / name).write_bytes(pack(content))
    source, names = open_source(str(tmp_path / name))
    with pytest.raises(BadRequest, match=message):
        source.census(*names)


@pytest.mark.parametrize(
    "pattern, says",
    [("v-{0..99999999999}.tar", "names more than 1,000,000 files"), (f"v-{{0..{'1' * 5000}}}.tar", "names more than 1,000,000 files"), ("{0..999}{0..9999}", "names more than"), ("{a,b}" * 20, "names more than"), ("{1..1}" * 1100, "holds more than 20 braces")],
    ids=["long range", "long number", "product", "twenty twos", "many braces"],
)
def test_pattern_without_end_is_refused_at_once(pattern, says):
    """In one line, without making the list first."""
    with pytest.raises(BadRequest, match=says) as told:
        expand_braces(pattern)
    assert len(str(told.value)) < 250 and "--source" in str(told.value)


def test_braces_that_are_no_range_stay_as_they_are():
    assert expand_braces("{1..{2,z}}") == ["1", "2", "{1..z}"]
