"""`index.Run`, as a notebook uses it: three lines, light imports, every form of an ID, and rows that say what they mean."""

import numpy as np
import oracles
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny

from index import Run
from index.run import NEIGHBOURS
from pipeline.errors import BadRequest
from pipeline.store import Store


@pytest.fixture(scope="module")
def run(small):
    return Run.open(small.run)


def rename(run, dataset, change):
    """Give the samples of a data set other IDs: change(ID, row) -> ID."""
    for file in Store(run).files(dataset):
        table = pq.read_table(file)
        ids = [change(old, i) for i, old in enumerate(table["sample_id"].to_pylist())]
        pq.write_table(table.set_column(0, table.schema.field("sample_id"), pa.array(ids)), file)


def index(run):
    assert tiny.call("index", "--run", run, "--datasets", "val,v2", "--subset", "all", "--name", "errors").code == 0


def test_three_lines_load_neither_torch_nor_ray_nor_the_command(small):
    code = f"""
import sys
from index import Run
run = Run.open({str(small.run)!r})
table = run.neighbors("val:00003", k=4, within="v2")
print(table.num_rows, table.column_names, sorted({{"torch", "ray", "typer", "matplotlib"}} & set(sys.modules)))
"""
    assert tiny.python(code).strip() == f"4 {NEIGHBOURS.names} []"


def test_what_a_run_holds(run, small):
    assert run.datasets == ["v2", "val"] and run.layers == tiny.LAYERS
    assert {name: (p.samples, p.done, p.pending, p.rejected) for name, p in run.status().items()} == {"val": (60, 60, 0, 0), "v2": (30, 30, 0, 0)}
    profiles = run.profiles("val").to_table(columns=["sample_id", "loss"], filter=pc.field("label") == 2)
    assert 0 < profiles.num_rows < 60 and profiles.column_names == ["sample_id", "loss"]
    statistics = run.statistics("val")
    assert list(zip(statistics["layer"].to_pylist(), statistics["filter"].to_pylist())) == [(name, i) for name, count in tiny.LAYERS for i in range(count)]
    assert set(statistics["count"].to_pylist()) == {60}
    with pytest.raises(BadRequest, match="there are no statistics 'v3' in .*: faultline index makes those"):
        run.statistics("v3")
    with pytest.raises(BadRequest, match="there is no data set 'v3' in .*; it has: v2, val"):
        run.profiles("v3")


def test_there_is_no_run_there(tmp_path):
    with pytest.raises(BadRequest, match="--run: there is no run at .*absent .*faultline extract begins one"):
        Run.open(tmp_path / "absent")


# ---- neighbours ----------------------------------------------------------------------------------------------------


def facts(run, dataset):
    return {row["sample_id"]: row for row in run.profiles(dataset).to_table(columns=["sample_id", "label", "prediction", "prediction_confidence"]).to_pylist()}


def vectors(run, dataset):
    """sample_id -> ŝ float64 [F], the slow way."""
    reference = run.profiles("val").to_table(columns=["saliency"])["saliency"].to_pylist()
    table = run.profiles(dataset).to_table(columns=["sample_id", "saliency"])
    return dict(zip(table["sample_id"].to_pylist(), oracles.standardise(np.array(table["saliency"].to_pylist()), *oracles.mean_and_std(np.array(reference)))))


@pytest.mark.parametrize("right", [False, True], ids=["misclassified", "correctly classified"])
@pytest.mark.parametrize("within", [None, "val", "v2"])
def test_columns_mean_what_they_say(run, right, within):
    """For one query of each kind: brute force over the errors gives the same rows, and each column is the neighbour's own."""
    known = {name: facts(run, name) for name in run.datasets}
    asked = next(row for row in known["val"].values() if (row["label"] == row["prediction"]) == right)
    table = run.neighbors(f"val:{asked['sample_id']}", 12, within)
    assert table.schema == NEIGHBOURS
    errors = [(name, i) for name in ("val", "v2") for i, row in known[name].items() if within in (None, name) and row["label"] != row["prediction"]]
    errors = [key for key in errors if key != ("val", asked["sample_id"])]
    scores = {name: vectors(run, name) for name in run.datasets}
    order, similarity = oracles.cosine_neighbours(scores["val"][asked["sample_id"]][None], np.array([scores[n][i] for n, i in errors]), 12)
    assert list(zip(table["dataset"].to_pylist(), table["sample_id"].to_pylist())) == [errors[i] for i in order[0]]
    assert np.abs(table["similarity"].to_numpy() - similarity[0]).max() < 1e-5
    for rank, row in enumerate(table.to_pylist(), 1):
        own = known[row["dataset"]][row["sample_id"]]
        a, b, c, d = asked["label"], asked["prediction"], own["label"], own["prediction"]
        assert (row["rank"], row["label"], row["prediction"], row["confidence"]) == (rank, c, d, own["prediction_confidence"])
        assert (row["label_name"], row["prediction_name"]) == (tiny.Net.class_names[c], tiny.Net.class_names[d])
        assert row["pair"] == ("same" if (a, b) == (c, d) else "reverse" if (a, b) == (d, c) else "other")
    assert right or {"same", "other"} <= set(table["pair"].to_pylist())


def test_pairs_of_a_correct_query_and_of_its_like(copied):
    """Among all samples: a correctly classified one shares its pair with those of its class that are right, and nothing is the reverse of it."""
    index(copied.run)
    run = Run.open(copied.run)
    asked = next(row for row in facts(run, "val").values() if row["label"] == row["prediction"])
    table = run.neighbors(f"val:{asked['sample_id']}", 89)
    assert table.num_rows == 89 and asked["sample_id"] not in table["sample_id"].to_pylist()
    for row in table.to_pylist():
        assert row["pair"] == ("same" if row["label"] == row["prediction"] == asked["label"] else "other")


@pytest.mark.parametrize("k", [0, -3])
def test_no_neighbours_cannot_be_asked_for(run, k):
    with pytest.raises(BadRequest, match=f"-k: {k} neighbours cannot be given"):
        run.neighbors("val:00003", k)


def test_layers_by_name(run):
    whole = run.neighbors("val:00003", 5)
    assert run.neighbors("val:00003", 5, layers="conv1..conv3") == whole == run.neighbors("val:00003", 5, layers="..")
    assert run.neighbors("val:00003", 5, layers="conv2") == run.neighbors("val:00003", 5, layers="conv2..conv2") != whole
    with pytest.raises(BadRequest, match="--layers: this network has no layer 'conv9'; close to it: conv"):
        run.neighbors("val:00003", layers="conv9")
    with pytest.raises(BadRequest, match="--layers: 'conv3' comes after 'conv1' in the network; write conv1..conv3"):
        run.neighbors("val:00003", layers="conv3..conv1")


def test_a_data_set_that_is_not_indexed_may_ask_but_not_answer(copied):
    assert tiny.call("index", "--run", copied.run, "--datasets", "v2", "--name", "v2alone").code == 0
    run = Run.open(copied.run)
    assert set(run.neighbors("val:00003", name="v2alone")["dataset"].to_pylist()) == {"v2"}
    with pytest.raises(BadRequest, match="--in: the index v2alone does not hold 'val'; it holds v2"):
        run.neighbors("val:00003", within="val", name="v2alone")


# ---- IDs -----------------------------------------------------------------------------------------------------------


def test_an_id_with_and_without_its_data_set(run):
    assert run.find("00003") == run.find("val:00003") and run.find("01003").dataset == "v2"
    assert run.neighbors("00003") == run.neighbors("val:00003")


def test_an_id_with_colons_in_it(copied):
    """Found as it is; `dataset:ID` names exactly one sample, even where another ID begins like a data set's name."""
    rename(copied.run, "val", lambda old, i: {"00000": "a:b:c", "00020": "v2:01003"}.get(old, old))
    index(copied.run)
    run = Run.open(copied.run)
    assert run.find("a:b:c") == run.find("val:a:b:c") and run.find("a:b:c").sample_id == "a:b:c"
    assert (run.find("v2:01003").dataset, run.find("v2:01003").sample_id) == ("v2", "01003")
    assert (run.find("val:v2:01003").dataset, run.find("val:v2:01003").sample_id) == ("val", "v2:01003")
    assert run.neighbors("val:a:b:c").num_rows == 10


def test_an_id_in_two_data_sets_must_be_said_in_full(copied):
    rename(copied.run, "v2", lambda old, i: f"{i:05d}")
    index(copied.run)
    run = Run.open(copied.run)
    with pytest.raises(BadRequest, match="the ID '00003' is in more than one data set: write v2:00003 or val:00003"):
        run.neighbors("00003")
    ours, theirs = run.neighbors("val:00003", 5), run.neighbors("v2:00003", 5)
    assert ours != theirs
    assert ("val", "00003") not in zip(ours["dataset"].to_pylist(), ours["sample_id"].to_pylist())
    everyone = run.neighbors("val:00003", 89)
    assert ("v2", "00003") in zip(everyone["dataset"].to_pylist(), everyone["sample_id"].to_pylist())  # its namesake is another image


@pytest.mark.parametrize("asked, near", [("0000", "val:0000"), ("val:00003x", "val:00003"), ("v2:1003", "v2:01003"), ("VAL:00003", "val:00003"), ("", "val:")])
def test_an_unknown_id_is_answered_with_close_ones(run, asked, near):
    with pytest.raises(BadRequest) as refusal:
        run.neighbors(asked)
    message = str(refusal.value)
    assert f"there is no sample '{asked}' in this run; close to it: " in message and near in message


def test_an_id_that_was_set_aside_tells_its_reason(copied):
    name = next(iter(Store(copied.run).files("v2"))).name
    pq.write_table(pa.table({"sample_id": ["bad\x1b[31m"], "shard": ["v2-00000.tar"], "reason": ["the image is\nempty"]}), copied.run / "rejects/v2" / name)
    for asked in ("bad\x1b[31m", "v2:bad\x1b[31m"):
        with pytest.raises(BadRequest) as refusal:
            Run.open(copied.run).find(asked)
        assert "was set aside when v2 was extracted: the image is\\nempty" in str(refusal.value) and "\x1b" not in str(refusal.value)


# ---- which index ---------------------------------------------------------------------------------------------------


def test_the_index_is_errors_or_the_only_one(copied):
    import shutil

    run = Run.open(copied.run)
    assert run.index().folder.name == "errors"
    shutil.rmtree(copied.run / "index")
    with pytest.raises(BadRequest, match="has no index: build one with faultline index --run"):
        Run.open(copied.run).neighbors("val:00003")
    assert tiny.call("index", "--run", copied.run, "--name", "one").code == 0
    assert Run.open(copied.run).index().folder.name == "one"
    assert tiny.call("index", "--run", copied.run, "--name", "two").code == 0
    with pytest.raises(BadRequest, match="--name: this run has several indexes, say which: one, two"):
        Run.open(copied.run).index()
    with pytest.raises(BadRequest, match="--name: there is no index 'onee'; there is one"):
        Run.open(copied.run).index("onee")


def test_reading_changes_nothing(copied):
    """A run that may only be read answers everything: asking writes no file and touches none."""
    before = {p: p.stat().st_mtime_ns for p in copied.run.rglob("*")}
    run = Run.open(copied.run)
    run.neighbors("val:00003"), run.status(), run.statistics("val"), run.profiles("val").to_table()
    assert tiny.call("query", "--run", copied.run, "val:00003").code == tiny.call("status", "--run", copied.run).code == 0
    assert {p: p.stat().st_mtime_ns for p in copied.run.rglob("*")} == before
