"""`faultline neighbors`: the batch job says for every image what `query` says for one, and how much neighbours agree, beside chance."""

import itertools

import numpy as np
import oracles
import pyarrow as pa
import pyarrow.compute  # noqa: F401 (pa.compute)
import pyarrow.parquet as pq
import pytest
import tiny

from index import Run
from index.run import NEIGHBOURS
from pipeline.store import Store, saliency_of


def ask(small, out, *words):
    ended = tiny.call("neighbors", "--run", small.run, "--out", out, *words)
    assert ended.code == 0, ended.err
    return pq.read_table(out), ended


def facts(run, dataset):
    rows = run.profiles(dataset).to_table(columns=["sample_id", "label", "prediction"]).to_pylist()
    return [(row["sample_id"], row["label"], row["prediction"]) for row in rows]


@pytest.mark.parametrize(
    "words, query",
    [
        (["--from", "val", "--in", "v2"], {"within": "v2"}),
        (["--from", "val", "--in", "val", "-k", "3"], {"within": "val", "k": 3}),
        (["--from", "v2", "-k", "100"], {"k": 100}),
        (["--from", "v2", "--all", "--layers", "conv2..conv3"], {"layers": "conv2..conv3"}),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_every_row_is_what_query_says(small, tmp_path, words, query):
    """To the last bit, for every misclassified image of the data set (with --all for every image), in their order."""
    table, ended = ask(small, tmp_path / "n.parquet", *words)
    assert not ended.raw and table.column_names == ["query_dataset", "query_id", "query_label", "query_prediction", *NEIGHBOURS.names]
    run, source = Run.open(small.run), words[1]
    asked = [row for row in facts(run, source) if "--all" in words or row[1] != row[2]]
    assert f"neighbours of {len(asked)} images" in ended.err
    groups = [(key, list(rows)) for key, rows in itertools.groupby(table.to_pylist(), lambda r: (r["query_id"], r["query_label"], r["query_prediction"]))]
    assert [key for key, _ in groups] == asked and set(table["query_dataset"].to_pylist()) == {source}
    for (sample_id, *_), rows in groups:
        assert [{c: row[c] for c in NEIGHBOURS.names} for row in rows] == run.neighbors(f"{source}:{sample_id}", **query).to_pylist()
        assert (source, sample_id) not in {(row["dataset"], row["sample_id"]) for row in rows}


def naive(run, source, within, k):
    """Agreement and chance, one pair at a time, from profiles and brute force alone."""
    mean, std = oracles.mean_and_std(np.array(run.profiles("val").to_table()["saliency"].to_pylist()))
    vectors = {d: oracles.standardise(np.array(run.profiles(d).to_table()["saliency"].to_pylist()), mean, std) for d in run.datasets}
    gallery = [(d, *row, z) for d in ("val", "v2") if within in (None, d) for row, z in zip(facts(run, d), vectors[d]) if row[1] != row[2]]
    same, reverse, chances, pairs = 0, 0, [], 0
    for (i, a, b), z in zip(facts(run, source), vectors[source]):
        if a == b:
            continue
        others = [other for other in gallery if other[:2] != (source, i)]
        best, _ = oracles.cosine_neighbours(z[None], np.array([other[4] for other in others]), k)
        for _, _, c, d, _ in (others[row] for row in best[0]):
            same, reverse, pairs = same + ((c, d) == (a, b)), reverse + ((d, c) == (a, b)), pairs + 1
        chances.append(sum((c, d) in ((a, b), (b, a)) for _, _, c, d, _ in others) / len(others))
    return {"queries": len(chances), "k": k, "same": same / pairs, "reverse": reverse / pairs, "either": (same + reverse) / pairs, "chance": sum(chances) / len(chances)}


@pytest.mark.parametrize("source, within", [("val", "v2"), ("val", None), ("v2", "v2")])
def test_agreement_and_chance_are_those_of_brute_force(copied, tmp_path, source, within):
    words = ["--from", source, *(["--in", within] if within else []), "-k", 7, "--evaluate"]
    _, ended = ask(copied, tmp_path / "n.parquet", *words, "--format", "json")
    truth = naive(Run.open(copied.run), source, within, 7)
    assert {key: ended.json[key] for key in truth} == pytest.approx(truth, abs=1e-12)
    _, ended = ask(copied, tmp_path / "n.parquet", *words)
    lines = dict(line.split() for line in ended.out.splitlines()[1:])
    assert set(lines) >= {"queries", "k", "same", "reverse", "either", "chance"} and 0 < float(lines["chance"]) < 1


def test_a_data_set_without_errors_gives_an_empty_file(copied, tmp_path):
    """It has the columns all the same; there is nothing to evaluate."""
    for file in Store(copied.run).files("v2"):
        table = pq.read_table(file)
        pq.write_table(table.set_column(2, table.schema.field("prediction"), table["label"]), file)
    assert tiny.call("index", "--run", copied.run, "--datasets", "val").code == 0
    table, _ = ask(copied, tmp_path / "n.parquet", "--from", "v2")
    assert table.num_rows == 0 and "rank" in table.column_names
    message = tiny.call("neighbors", "--run", copied.run, "--from", "v2", "--out", tmp_path / "n.parquet", "--evaluate")
    assert message.code == 2 and "no neighbours to evaluate" in message.err and not message.raw


def test_a_data_set_that_is_not_indexed_asks_all_that_are(copied, tmp_path):
    assert tiny.call("index", "--run", copied.run, "--datasets", "v2").code == 0
    table, _ = ask(copied, tmp_path / "n.parquet", "--from", "val", "-k", "2")
    assert set(table["dataset"].to_pylist()) == {"v2"} and table.num_rows % 2 == 0


def test_exact_copies_of_the_query_come_first_and_the_query_never(copied, tmp_path):
    """A data set of one image thirty times: each has 29 neighbours at similarity 1, itself not among them."""
    for file in Store(copied.run).files("v2"):
        table = pq.read_table(file)
        wrong = table.filter(pa.compute.not_equal(table["label"], table["prediction"])).slice(0, 1)
        copies = wrong.take([0] * 30).set_column(0, table.schema.field("sample_id"), pa.array([f"copy{i}" for i in range(30)]))
        pq.write_table(copies, file)
        assert not np.diff(saliency_of(copies), axis=0).any()
    assert tiny.call("index", "--run", copied.run, "--datasets", "val,v2").code == 0
    table, _ = ask(copied, tmp_path / "n.parquet", "--from", "v2", "-k", 29)
    assert table.num_rows == 30 * 29 and set(table["dataset"].to_pylist()) == {"v2"} and np.allclose(table["similarity"], 1, atol=1e-6)
    for i in range(30):
        mine = table.filter(pa.compute.equal(table["query_id"], f"copy{i}"))
        assert mine["sample_id"].to_pylist() == [f"copy{n}" for n in range(30) if n != i]


def test_a_refused_request_leaves_the_old_file(small, tmp_path):
    out = tmp_path / "n.parquet"
    ask(small, out, "--from", "val", "-k", "1")
    before = out.read_bytes()
    for words in (["--from", "val", "--in", "v3"], ["--from", "val", "-k", "0"], ["--from", "val", "--layers", "nothing"]):
        tiny.call("neighbors", "--run", small.run, "--out", out, *words).refused()
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["n.parquet"]


def test_real_images_end_to_end(data, tmp_path):
    """resnet20 on 400 + 400 CIFAR images through the command: agreement far above chance, and the neighbours of brute force."""
    run = tmp_path / "run"
    for dataset, shard in (("val", "val-00000.tar"), ("v2", "holdout-00000.tar")):
        words = ["--source", data / "cifar10" / shard, "--model", "resnet20", "--weights", data / "cifar10/resnet20.safetensors", "--max-samples", 400]
        ended = tiny.call("extract", "--run", run, "--dataset", dataset, *words)
        assert ended.code == 0 and "400 profiles, 0 set aside" in ended.err, ended.err
    assert tiny.call("index", "--run", run, "--datasets", "val,v2", "--reference", "val").code == 0
    table, ended = ask(tiny.Small(run, data), tmp_path / "n.parquet", "--from", "val", "--in", "v2", "-k", "5", "--evaluate", "--format", "json")
    assert ended.json["either"] > 3 * ended.json["chance"]
    opened = Run.open(run)
    mean, std = oracles.mean_and_std(np.array(opened.profiles("val").to_table()["saliency"].to_pylist()))
    profiles = opened.profiles("v2").to_table()
    wrong = profiles.filter(pa.compute.not_equal(profiles["label"], profiles["prediction"]))
    gallery = oracles.standardise(np.array(wrong["saliency"].to_pylist()), mean, std)
    own = opened.profiles("val").to_table()
    for i in table["query_id"].unique().to_pylist()[:8]:
        query = oracles.standardise(np.array(own.filter(pa.compute.equal(own["sample_id"], i))["saliency"].to_pylist()), mean, std)
        positions, similarity = oracles.cosine_neighbours(query, gallery, 5)
        rows = table.filter(pa.compute.equal(table["query_id"], i))
        assert rows["sample_id"].to_pylist() == wrong["sample_id"].take(positions[0]).to_pylist()
        assert np.abs(rows["similarity"].to_numpy() - similarity[0]).max() < 1e-5
