"""Files in a run's folders that are not its own: refused by name, never counted, never removed."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_store import UNIT, begun, commit

from pipeline.errors import BadRequest
from pipeline.store import Store
from pipeline.units import Unit


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
