"""Files in a run's folders that are not its own: refused by name, never counted, never removed."""

import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
import tiny
from test_store import UNIT, begun, commit

from pipeline.errors import BadRequest
from pipeline.store import Store
from pipeline.units import Unit, shard_stem


@pytest.mark.parametrize("unit, words", [(Unit("val", "c.tar", 0, 4), "none of the shards is its own"), (Unit("val", "b.tar", 8, 16), "the shard that it is part of has 12 samples")], ids=["another shard", "past the end"])
def test_a_unit_of_another_source_is_refused_and_left_alone(tmp_path, unit, words):
    store = begun(tmp_path)
    commit(store, UNIT)
    commit(store, unit)
    for ask in (store.files, store.progress, store.sweep, store.profiles):
        with pytest.raises(BadRequest, match=rf"{unit.stem}\.parquet is no unit of /data.*{words}; remove it"):
            ask("val")
    for folder in ("profiles", "rejects"):
        (store.run / folder / "val" / f"{unit.stem}.parquet").unlink()
    assert store.progress("val").done == 16


@pytest.mark.parametrize("change, words", [
    (lambda t: t.set_column(1, "label", t["label"].cast(pa.string())), "its column label is of string, not of int32"),
    (lambda t: t.drop_columns(["loss"]), "its column loss is missing"),
    (lambda t: t.set_column(6, "saliency", t["saliency"].cast(pa.list_(pa.float32()))), "its column saliency is of list<element: float>, not of fixed_size_list<element: float>[3]"),
], ids=["text", "missing", "lists of any length"])  # fmt: skip
def test_profiles_of_another_schema_are_refused_by_name(tmp_path, change, words):
    """Also where other columns are read, or none."""
    store = begun(tmp_path)
    commit(store, UNIT)
    file = store.files("val")[0]
    pq.write_table(change(pq.read_table(file)), file)
    for read in (lambda: list(store.blocks("val", ["shard"])), lambda: store.progress("val")):
        with pytest.raises(BadRequest) as told:
            read()
        assert str(told.value) == f"{file} is no file of profiles: {words}; remove this one and give the faultline extract command of val again"


def test_a_census_that_was_lost_is_made_again_with_all_shards_that_were_begun(copied):
    """Also those that are not asked for this time: their units are no strangers."""
    (copied.run / "datasets/val.json").unlink()
    ended = copied.extract("val", "--shards", 1)
    assert ended.code == 0, ended.err
    assert len(Store(copied.run).census("val").shards) == 3 and Store(copied.run).progress("val").done == 60


def test_a_census_that_was_lost_is_not_made_again_of_another_source(copied, tmp_path):
    """Not of shards that have the same names, and whose samples have the same IDs."""
    shutil.copytree(copied.sources / "val", tmp_path / "sources/val")
    shards.write_shard(tmp_path / "sources/val/val-00001.tar", [2] * 20, first=20)
    (copied.run / "datasets/val.json").unlink()
    before = {file: file.read_bytes() for file in copied.run.glob("**/*.parquet")}
    told = tiny.Small(copied.run, tmp_path / "sources").extract("val").refused()
    assert re.search(r"val-00001-00000000-00000020\.parquet was made of another shard than .*sources/val holds now: give the --source that val was begun with", told), told
    assert not (copied.run / "datasets/val.json").exists() and before == {file: file.read_bytes() for file in copied.run.glob("**/*.parquet")}
    assert copied.extract("val").code == 0


def test_a_unit_of_another_data_set_of_the_same_name_is_refused(copied, tmp_path):
    """Two data sets whose shards are called alike."""
    (tmp_path / "sources/other").mkdir(parents=True)
    shards.write_shard(tmp_path / "sources/other/val-00001.tar", [3] * 20, first=20)
    assert tiny.Small(copied.run, tmp_path / "sources").extract("other").code == 0
    name = "val-00001-00000000-00000020.parquet"
    for folder in ("profiles", "rejects"):
        shutil.copy(copied.run / folder / "other" / name, copied.run / folder / "val" / name)
    for words in (["status"], ["index", "--datasets", "val"], ["profile", "val:00000"]):
        assert f"profiles/val/{name} was made of another shard than" in tiny.call(words[0], "--run", copied.run, *words[1:]).refused(), words


@pytest.mark.parametrize("column, row", [("label", 3), ("saliency", 7), ("sample_id", 0)])
def test_a_value_that_is_missing_is_named(tmp_path, column, row):
    store = begun(tmp_path)
    commit(store, UNIT)
    file = store.files("val")[0]
    table = pq.read_table(file)
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array([None if i == row else value for i, value in enumerate(table[column].to_pylist())], table.schema.field(at).type)), file)
    with pytest.raises(BadRequest, match=rf"{UNIT.stem}\.parquet is no file of profiles: a {column} is missing in row {row}; remove this one"):
        list(store.blocks("val", [column]))


@pytest.mark.parametrize("names", [("一丁万丈丁丅.tar", "一丂丅三丅丅.tar"), ("x y.tar", "x-y-1a5ba3cc.tar")], ids=["by chance", "on purpose"])
def test_two_shards_of_one_name_are_refused(tmp_path, names):
    """Names that are not plain are told apart by eight digits, which may be the same."""
    assert len({shard_stem(name) for name in names}) == 1
    for first, name in enumerate(names):
        shards.write_shard(tmp_path / "val" / name, [1, 2, 3], first=3 * first)
    for verb in (["extract", "--run", tmp_path / "run", "--dataset", "val"], ["check"]):
        told = tiny.call(*verb, "--source", tmp_path / "val", "--model", tiny.MODEL).refused()
        assert f"would go by one name in the run ({shard_stem(names[0])}): rename one of them" in told and names[0].split(".")[0] in told
    assert not (tmp_path / "run").exists()
