"""IDs that stand twice: told while shards are counted, before hours are spent, in every kind; and no two different IDs are ever taken for one."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
import tiny

from pipeline.errors import BadRequest
from pipeline.sources import open_source
from pipeline.sources.doubles import Ids


def count(spec):
    """As an extraction does before it begins."""
    source, names = open_source(str(spec))
    ids = Ids(source)
    counted = [ids.census(name) for name in names]
    assert counted == [source.census(name) for name in names]
    ids.refuse_doubles()
    return sum(shard.samples for shard in counted)


def write_parquet(path, paths):
    image = pa.array([{"bytes": b"J", "path": p} for p in paths], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "label": [0] * len(paths)}), path)


def pairs(*names):
    return [(f"{name}.{end}", b"1") for name in names for end in ("jpg", "cls")]


def write(folder, case):
    """A data set with one ID in two places."""
    if case == "in a shard":
        shards.write_tar(folder / "a.tar", pairs("x", "y", "x"))
    elif case == "in a row":
        shards.write_tar(folder / "a.tar", pairs("v", "x", "x"))
    elif case == "across shards":
        shards.write_tar(folder / "a.tar", pairs("v", "x"))
        shards.write_tar(folder / "b.tar", pairs("y", "x"))
    elif case == "tar.gz":
        path = shards.write_tar(folder / "made.tar", pairs("x", "y", "x"))
        (folder / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    elif case == "not sorted":
        shards.write_tar(folder / "a.tar", sorted(pairs("x", "y"), key=lambda m: m[0].partition(".")[2]))
    elif case == "class folders":
        shards.write_tree(folder, {"n00000001/ILSVRC2012_val_00000007.JPEG": b"J", "n00000002/ILSVRC2012_val_00000007.JPEG": b"J"})
    elif case == "one stem":
        shards.write_tree(folder, {"cat/x.1.jpg": b"J", "cat/x.2.jpg": b"J", "dog/1.jpg": b"J"})
    elif case == "tar of class folders":
        shards.write_tar(folder / "a.tar", [("v/0/a.jpg", b"J"), ("v/1/a.jpg", b"J"), ("v/0/a.jpg", b"J")])
    elif case == "twice in a row in a tar":
        shards.write_tar(folder / "a.tar", [("v/0/a.jpg", b"J"), ("v/1/a.jpg", b"J"), ("v/1/a.jpg", b"J")])
    elif case == "parquet":
        write_parquet(folder / "a.parquet", ["x.jpg", None, "y.jpg"])
        write_parquet(folder / "b.parquet", [None, "z/0.jpg", "x.png"])
    else:
        np.savez(folder / "a.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1])
        np.save(folder / "a.npy", np.zeros((2, 4, 4, 3), np.uint8))
        np.save(folder / "a_labels.npy", np.zeros(2, int))


@pytest.mark.parametrize(
    "case, message",
    [
        ("in a shard", r"the ID 'x' stands twice, in a.tar \(x.jpg\), sample 1 and in a.tar \(x.jpg\), sample 3: remove or rename one of them"),
        ("in a row", r"the ID 'x' stands twice, in a.tar \(x.jpg\) and in a.tar \(x.jpg again, at byte 4096\): remove or rename one of them"),
        ("across shards", r"the ID 'x' stands twice, in a.tar \(x.jpg\) and in b.tar \(x.jpg\): remove or rename"),
        ("tar.gz", r"the ID 'x' stands twice, in a.tar.gz \(x.jpg\), sample 1 and in a.tar.gz \(x.jpg\), sample 3"),
        ("not sorted", r"the ID 'x' stands twice, in a.tar \(x.cls\) and in a.tar \(x.jpg\): the members of a sample must follow each other \(tar --sort=name\)"),
        ("class folders", "the ID 'ILSVRC2012_val_00000007' stands twice, in n00000001/ILSVRC2012_val_00000007.JPEG and in n00000002/ILSVRC2012_val_00000007.JPEG: remove"),
        ("one stem", r"the ID 'cat/x' stands twice, in cat/x.1.jpg and in cat/x.2.jpg: rename one of them \(an ID ends at the first dot of a file name\)"),
        ("tar of class folders", r"the ID 'v/0/a' stands twice, in a.tar \(v/0/a.jpg\)"),
        ("twice in a row in a tar", r"the ID 'v/1/a' stands twice, in a.tar \(v/1/a.jpg\) and in a.tar \(v/1/a.jpg again, at byte 2048\)"),
        ("parquet", r"the ID 'x' stands twice, in a.parquet \(row 0\) and in b.parquet \(row 2\)"),
        ("arrays", r"the ID 'a/000000' stands twice, in a.np. \(image 0\) and in a.np. \(image 0\)"),
    ],
)
def test_id_that_stands_twice_is_refused_naming_both_places(tmp_path, case, message):
    write(tmp_path, case)
    with pytest.raises(BadRequest, match=message):
        count(tmp_path)


def test_ids_of_one_hash_are_two_ids(tmp_path, monkeypatch):
    """8 bytes an ID only raise a suspicion; the IDs themselves decide."""
    monkeypatch.setattr("pipeline.sources.doubles.hash", lambda sample_id: len(sample_id), raising=False)
    shards.write_tar(tmp_path / "a.tar", pairs("x", "y"))
    shards.write_tar(tmp_path / "b.tar", pairs("z"))
    assert count(tmp_path) == 3
    shards.write_tar(tmp_path / "c.tar", pairs("y"))
    with pytest.raises(BadRequest, match="the ID 'y' stands twice, in a.tar .* and in c.tar"):
        count(tmp_path)


def test_extraction_does_not_begin(tmp_path):
    shards.write_shard(tmp_path / "data/a.tar", [0, 1])
    shards.write_shard(tmp_path / "data/b.tar", [0, 1], first=1)
    ended = tiny.call("extract", "--run", tmp_path / "run", "--dataset", "val", "--source", tmp_path / "data", "--model", tiny.MODEL)
    assert ended.code == 2 and "the ID '00001' stands twice, in a.tar (00001.jpg) and in b.tar (00001.jpg)" in ended.err and not (tmp_path / "run").exists()
