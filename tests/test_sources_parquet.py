"""Hugging Face Parquet in the layout of `ILSVRC/imagenet-1k`: IDs, labels, any interval, bounded memory, and what is refused."""

import hashlib
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadRequest
from pipeline.sources import open_source

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, rows, groups=4, image=IMAGE, label=pa.int64(), names=("image", "label"), **options):
    """rows: (bytes, path, label)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": b, "path": p} if pa.types.is_struct(image) else b for b, p, _ in rows]
    table = pa.table([pa.array(images, image), pa.array([r[2] for r in rows], label)], names=list(names))
    pq.write_table(table, path, row_group_size=groups, **options)
    return path


def read(path):
    source, names = open_source(str(path))
    return [s for name in names for s in shards.samples(source, name)]


def test_layout_of_imagenet_1k(tmp_path):
    """File names carry the WordNet ID in this release alone; the ID is the image's own, as in every other kind."""
    for i in range(2):
        write(tmp_path / f"data/validation-0000{i}-of-00002.parquet", [(b"J%d" % n, f"ILSVRC2012_val_{n:08d}_n01440764.JPEG", n % 7) for n in range(i * 5 + 1, i * 5 + 6)])
    source, names = open_source(str(tmp_path))
    assert source.kind == "parquet" and names == ["data/validation-00000-of-00002.parquet", "data/validation-00001-of-00002.parquet"]
    assert [(s.sample_id, s.image, s.label) for s in read(tmp_path)] == [(f"ILSVRC2012_val_{n:08d}", b"J%d" % n, n % 7) for n in range(1, 11)]
    assert [s.sample_id for s in read(tmp_path / "data/validation-*.parquet")] == [s.sample_id for s in read(tmp_path / "data/validation-{00000..00001}-of-00002.parquet")]


@pytest.mark.parametrize("image", [IMAGE, pa.struct([("bytes", pa.binary())]), pa.binary(), pa.large_binary()], ids=str)
def test_without_a_path_the_id_is_file_and_row(tmp_path, image):
    write(tmp_path / "data/validation-00000-of-00014.parquet", [(b"J", None, 3)] * 6, image=image)
    assert [s.sample_id for s in read(tmp_path)] == [f"data/validation-00000-of-00014/{i:06d}" for i in range(6)]


def test_id_of_other_paths_is_that_of_class_folders(tmp_path):
    rows = [(b"J", path, 0) for path in ("cat/1.jpg", "x.y.png", "", ".hidden", "two\nlines\u202e.jpg")]
    assert [s.sample_id for s in read(write(tmp_path / "a.parquet", rows))] == ["cat/1", "x", "a/000002", "a/000003", "two\nlines\u202e"]


@pytest.mark.parametrize("label", [pa.int64(), pa.int32(), pa.uint8()], ids=str)
@pytest.mark.parametrize("names", [("image", "label"), ("img", "fine_label")])
def test_whole_number_labels_of_any_width(tmp_path, label, names):
    assert [s.label for s in read(write(tmp_path / "a.parquet", [(b"J", None, 3), (b"J", None, 0)], label=label, names=names))] == [3, 0]


def test_what_a_row_lacks_is_said_and_the_row_kept_in_place(tmp_path):
    rows = [(b"J", "a.jpg", 1), (None, "b.jpg", 1), (None, None, 1), (b"J", "d.jpg", None), (b"J", "e.jpg", -1), (b"J", "f.jpg", 2)]
    got = read(write(tmp_path / "a.parquet", rows))
    assert [s.sample_id for s in got] == ["a", "b", "a/000002", "d", "e", "f"] and [s.label for s in got if s.fault is None] == [1, 2]
    assert [s.fault for s in got[1:5]] == ["the row holds no image bytes, only the path of a file elsewhere", "the row holds no image bytes", "the row's label is null", "its label is -1: this split is published without labels"]


def test_null_struct_is_a_row_without_bytes(tmp_path):
    pq.write_table(pa.table({"image": pa.array([None, {"bytes": b"J", "path": None}], IMAGE), "label": [1, 2]}), tmp_path / "a.parquet")
    assert [(s.fault or "")[:24] for s in read(tmp_path / "a.parquet")] == ["the row holds no image b", ""]


def test_path_that_is_no_text_is_written_as_its_escapes(tmp_path):
    """One odd name among a thousand must not end a run."""
    paths = pa.array([b"ok.jpg", b"caf\xe9.jpg", None], pa.binary()).view(pa.string())
    image = pa.StructArray.from_arrays([pa.array([b"J", b"K", b"L"]), paths], names=["bytes", "path"])
    pq.write_table(pa.table({"image": image, "label": [1, 2, 3]}), tmp_path / "a.parquet")
    assert [(s.sample_id, s.image, s.label, s.fault) for s in read(tmp_path / "a.parquet")] == [("ok", b"J", 1, None), ("caf\\xe9", b"K", 2, None), ("a/000002", b"L", 3, None)]


@pytest.mark.parametrize("twice", ["image", "label"])
def test_column_that_is_there_twice_is_refused(tmp_path, twice):
    columns = [("image", pa.array([{"bytes": b"J", "path": None}], IMAGE)), ("label", pa.array([1]))]
    columns += [c for c in columns if c[0] == twice]
    pq.write_table(pa.Table.from_arrays([c for _, c in columns], names=[n for n, _ in columns]), tmp_path / "a.parquet")
    with pytest.raises(BadRequest, match=f"a.parquet has 2 columns '{twice}': which one is meant"):
        read(tmp_path / "a.parquet")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("long") / "a.parquet", [(b"J" * (i % 40), None if i % 3 else f"{i}.jpg", i) for i in range(100)], groups=17)
    source, (name,) = open_source(str(path))
    return source, name, shards.samples(source, name)


@given(bounds=st.tuples(st.integers(0, 100), st.integers(0, 100)))
def test_any_interval_is_a_slice_of_the_whole(long, bounds):
    shards.check_interval(*long, *sorted(bounds))


def test_marks_are_row_groups_and_reading_begins_at_the_nearest(long):
    source, name, everything = long
    shard = source.census(name)
    assert [p for p, _ in shard.marks] == [0, 17, 34, 51, 68, 85] and shard.samples == len(everything) == 100
    assert shard.marks_for(40, 45)[0][0] == 34


def test_empty_row_groups_and_empty_files(tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", schema := pa.schema([("image", IMAGE), ("label", pa.int64())])) as out:
        for rows in ([], [1, 2], [], [3], []):
            out.write_table(pa.table([pa.array([{"bytes": b"J", "path": None}] * len(rows), IMAGE), pa.array(rows, pa.int64())], schema=schema), row_group_size=10)
    source, (name,) = open_source(str(tmp_path / "a.parquet"))
    assert [s.label for s in shards.samples(source, name)] == [1, 2, 3] and [s.label for s in shards.samples(source, name, 2, 3)] == [3]
    empty, (name,) = open_source(str(write(tmp_path / "empty.parquet", [])))
    assert empty.census(name).samples == 0


def test_memory_is_that_of_pages_not_of_a_row_group(tmp_path):
    """All images in one row group of 64 MiB, as a writer that was told nothing makes it."""
    noise = random.Random(0).randbytes(1 << 14)
    path = write(tmp_path / "a.parquet", [(noise[i:] + noise[:i], None, i) for i in range(4096)], groups=100_000, compression="none")
    source, (name,) = open_source(str(path))
    shard, before = source.census(name), pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in source.read(shard.marks, name, 3900, 4096))
    assert path.stat().st_size > 60 << 20 and most < 40 << 20 and source.census(name).marks == shard.marks[:1]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"pixels": [b"J"], "label": [1]}, r"has no column 'image' \(its columns: pixels, label\); rename yours"),
        ({"image": [{"bytes": b"J"}], "y": [1]}, "has no column 'label'"),
        ({"image": ["a.jpg"], "label": [1]}, r"column 'image' is string, not struct\{bytes, path\}"),
        ({"image": [{"path": "a.jpg"}], "label": [1]}, "column 'image' is struct<path: string>, not struct"),
        ({"image": [[1, 2]], "label": [1]}, "column 'image' is list<"),
        ({"image": [{"bytes": b"J"}], "label": ["cat"]}, "column 'label' is string, not a whole number"),
        ({"image": [{"bytes": b"J"}], "label": [1.0]}, "column 'label' is double, not a whole number"),
        ({"evil\x1b[2J\n": [1]}, r"its columns: evil\\x1b\[2J\\n"),
    ],
)
def test_schema_that_does_not_fit_is_refused_in_one_sentence(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source, (name,) = open_source(str(tmp_path / "a.parquet"))
    with pytest.raises(BadRequest, match=f"a.parquet.* ?{message}") as refusal:
        source.census(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", ["empty", "cut", "junk", "footer changed", "footer of absurd length"])
def test_damaged_file_is_refused(tmp_path, damage):
    path = write(tmp_path / "a.parquet", [(b"J" * 100, None, i) for i in range(20)])
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[:-100], "junk": b"junk" * 100, "footer changed": whole[:-300] + b"\xff" * 200 + whole[-100:], "footer of absurd length": whole[:-8] + b"\xff\xff\xff\xffPAR1"}[damage])
    source, (name,) = open_source(str(path))
    with pytest.raises(BadRequest, match="a.parquet cannot be read as Parquet .*: fetch it again, or leave it out of --source"):
        source.census(name)


def test_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "a.parquet").symlink_to("/nowhere")
    source, (name,) = open_source(str(tmp_path))
    with pytest.raises(BadRequest, match=r"a.parquet cannot be read \(.*No such file.*\): fetch it again, or leave it out of --source"):
        source.census(name)


def test_damaged_page_is_said_of_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", [(b"J" * 1000, None, i) for i in range(20)], compression="snappy", use_dictionary=False)
    source, (name,) = open_source(str(path))
    shard, content = source.census(name), bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(BadRequest, match="a.parquet cannot be read on from row 0 .*: fetch it again"):
        list(source.read(shard.marks, name, 0, 20))


def test_file_that_changed_since_the_census_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", [(b"J", None, i) for i in range(20)])
    source, (name,) = open_source(str(path))
    shard = source.census(name)
    write(path, [(b"J", None, i + 1) for i in range(20)])
    with pytest.raises(BadRequest, match="a.parquet is another file than when it was counted"):
        list(source.read(shard.marks, name, 0, 20))
    assert source.census(name).version != shard.version


def test_several_splits_in_a_folder_are_refused(tmp_path):
    """The folder of a whole repository: training images must not become part of a holdout set unasked."""
    for split in ("train", "validation"):
        write(tmp_path / f"data/{split}-00000-of-00001.parquet", [(b"J", None, 1)])
    with pytest.raises(BadRequest, match=r"holds several splits \(train, validation\), which must not mix: name one by a pattern, for example '.*/data/validation-00000-of-00001.parquet'"):
        open_source(str(tmp_path))
    assert len(read(tmp_path / "data/validation-*.parquet")) == 1


def test_real_photographs_have_the_id_and_bytes_of_their_tar(tmp_path, data):
    tar = data / "imagenet-sample/sample-00000.tar"
    with tarfile.open(tar) as members:
        real = {m.name: members.extractfile(m).read() for m in members}
    write(tmp_path / "validation-00000-of-00001.parquet", [(real[n], n, int(real[n.replace(".jpg", ".cls")])) for n in real if n.endswith(".jpg")], groups=50)
    facts = [{s.sample_id: (s.label, hashlib.sha1(s.image).hexdigest()) for s in read(p)} for p in (tar, tmp_path)]
    assert facts[0] == facts[1] and len(facts[0]) > 100
