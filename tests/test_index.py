"""`faultline index`: vectors are what the float64 oracle says, in the order of the rows; FAISS reads the file; what it was not built from, it refuses."""

import json
import shutil

import faiss
import numpy as np
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from index.build import flat_header
from pipeline.store import Store, saliency_of


def table_of(run, dataset):
    """All profiles of a data set, in the order of the files."""
    return pa.concat_tables(pq.read_table(f) for f in Store(run).files(dataset))


def expected(run, datasets, subset, reference="val"):
    """(dataset, sample_id) and normalised ŝ float64 [N, F] of what belongs into an index, the slow way."""
    mean, std = oracles.mean_and_std(saliency_of(table_of(run, reference)))
    keys, vectors = [], []
    for dataset in datasets:
        table = table_of(run, dataset)
        scores = oracles.standardise(saliency_of(table), mean, std)
        for row, z in zip(table.select(["sample_id", "label", "prediction"]).to_pylist(), scores):
            if subset == "all" or row["label"] != row["prediction"]:
                keys.append((dataset, row["sample_id"]))
                vectors.append(z / np.linalg.norm(z))
    return keys, np.array(vectors)


def contents(run, name):
    """rows.parquet as (dataset, sample_id), and the vectors as plain FAISS reads them."""
    rows = pq.read_table(run / "index" / name / "rows.parquet")
    index = faiss.read_index(str(run / "index" / name / "index.faiss"))
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT and index.is_trained
    return list(zip(rows["dataset"].to_pylist(), rows["sample_id"].to_pylist())), index.reconstruct_n(0, index.ntotal), rows


def build(small, *words):
    return tiny.call("index", "--run", small.run, *words)


def query(small, *words):
    return tiny.call("query", "--run", small.run, "val:00003", *words)


# ---- what is in it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset, datasets, reference", [("errors", "val,v2", "val"), ("all", "v2,val", "v2"), ("errors", "v2", "val")])
def test_vectors_and_rows_are_the_oracles(copied, subset, datasets, reference):
    """Every vector within 1e-5, in the order of the data sets as they were named; each row says where its profile lies."""
    assert build(copied, "--datasets", datasets, "--reference", reference, "--subset", subset, "--name", "mine").code == 0
    keys, vectors = expected(copied.run, datasets.split(","), subset, reference)
    got_keys, got, rows = contents(copied.run, "mine")
    assert got_keys == keys and len(keys) > 20
    assert np.abs(got - vectors).max() < 1e-5
    for row in rows.to_pylist():
        profile = pq.read_table(copied.run / "profiles" / row["dataset"] / row["profile"]).slice(row["position"], 1).to_pylist()[0]
        shared = set(row) & set(profile)
        assert {"sample_id", "label", "prediction", "loss"} <= shared and all(row[key] == profile[key] for key in shared)
    about = json.loads((copied.run / "index/mine/index.json").read_text())
    assert about["rows"] == len(keys) and about["filters"] == tiny.FILTERS and sum(about["rows_by_dataset"].values()) == len(keys)


@pytest.mark.parametrize("rows, filters", [(0, 1), (1, 1), (3, 7), (1000, 64), (17, 320)])
def test_header_is_faiss_own(rows, filters):
    """Byte for byte what faiss.serialize_index writes before the numbers, and then exactly the numbers."""
    index = faiss.IndexFlatIP(filters)
    vectors = np.random.default_rng(0).standard_normal((rows, filters)).astype(np.float32)
    index.add(vectors)
    assert flat_header(rows, filters) + vectors.tobytes() == faiss.serialize_index(index).tobytes()


def test_same_build_gives_the_same_bytes(copied):
    """Twice, and in a process with another hash seed."""
    before = {p.name: p.read_bytes() for p in (copied.run / "index/errors").iterdir()}
    assert set(before) == {"index.faiss", "rows.parquet", "index.json"}
    shutil.rmtree(copied.run / "index")
    shutil.rmtree(copied.run / "statistics")
    assert tiny.process("index", "--run", copied.run, "--datasets", "val,v2", "--reference", "val", PYTHONHASHSEED="7").code == 0
    assert {p.name: p.read_bytes() for p in (copied.run / "index/errors").iterdir()} == before


def test_filters_that_are_dead_count_nothing(copied):
    """A filter whose saliency never varies contributes 0 to every vector, and is counted."""
    for file in Store(copied.run).files("val"):
        table = pq.read_table(file)
        saliency = saliency_of(table).copy()
        saliency[:, 5] = 0.25
        column = pa.FixedSizeListArray.from_arrays(pa.array(saliency.reshape(-1)), type=table.schema.field("saliency").type)
        pq.write_table(table.set_column(table.schema.get_field_index("saliency"), table.schema.field("saliency"), column), file)
    ended = build(copied, "--datasets", "val")
    assert ended.code == 0 and "; 1 filter is dead and counts 0" in ended.err
    assert not contents(copied.run, "errors")[1][:, 5].any()


# ---- requests that are wrong ---------------------------------------------------------------------------------------


def test_unfinished_extraction_is_refused(small, copied):
    """As a data set and as the reference; the message says how much is left; nothing is built."""
    next(iter(Store(copied.run).files("v2"))).unlink()
    shutil.rmtree(copied.run / "index")
    for words in (("--datasets", "val,v2"), ("--datasets", "val", "--reference", "v2")):
        message = build(copied, *words).refused()
        assert "v2 is unfinished: 30 of 30 samples" in message and "run its faultline extract command again" in message
    assert not (copied.run / "index").exists()


def test_no_error_is_refused_and_the_old_index_stays(copied):
    """A network that never errs leaves nothing to index; --subset all is the way out. A refusal changes nothing."""
    for file in Store(copied.run).files("v2"):
        table = pq.read_table(file)
        pq.write_table(table.set_column(2, table.schema.field("prediction"), table["label"]), file)
    assert "no misclassified sample in v2" in build(copied, "--datasets", "v2", "--name", "none").refused()
    assert not (copied.run / "index/none").exists()
    kept = (copied.run / "index/errors/index.json").read_bytes()
    assert "--subset all" in build(copied, "--datasets", "v2").refused()
    assert (copied.run / "index/errors/index.json").read_bytes() == kept
    assert build(copied, "--datasets", "v2", "--subset", "all").code == 0


@pytest.mark.parametrize("seed", ["1", "2"])
def test_id_that_stands_twice_is_refused_naming_both_places(copied, seed):
    first, second = Store(copied.run).files("val")[:2]
    table = pq.read_table(second)
    ids = table["sample_id"].to_pylist()
    pq.write_table(table.set_column(0, table.schema.field("sample_id"), pa.array(["00007", *ids[1:]])), second)
    message = tiny.process("index", "--run", copied.run, "--datasets", "val", PYTHONHASHSEED=seed).refused()
    assert "'00007' stands twice in val" in message
    assert f"val-00000.tar (row 7 of {first.name})" in message and f"val-00001.tar (row 0 of {second.name})" in message


def test_the_same_id_in_two_data_sets_is_none_of_this(copied):
    for file in Store(copied.run).files("v2"):
        table = pq.read_table(file)
        pq.write_table(table.set_column(0, table.schema.field("sample_id"), pa.array([f"{i:05d}" for i in range(table.num_rows)])), file)
    assert build(copied, "--datasets", "val,v2").code == 0


@pytest.mark.parametrize(
    "words, says",
    [
        (["--datasets", "val,v3"], "no data set 'v3'"),
        (["--reference", "v3"], "neither a data set nor imported statistics named 'v3'; there is: v2, val"),
        (["--subset", "wrong"], "'wrong' is not one of errors, all"),
        (["--name", "../up"], "--name: '../up' cannot name a folder"),
    ],
)
def test_wrong_words_are_refused(small, words, says):
    assert says in build(small, *words).refused()


def test_folder_that_cannot_be_written_is_no_defect(copied):
    shutil.rmtree(copied.run / "index")
    (copied.run / "index").write_text("a file in the way")
    assert str(copied.run / "index") in build(copied).refused()


# ---- statistics ----------------------------------------------------------------------------------------------------


def published(path, filters=tiny.FILTERS, **changes):
    """As the authors publish them: a dict of two vectors."""
    generator = torch.Generator().manual_seed(3)
    torch.save({"mean": torch.rand(filters, generator=generator) * 0.01, "std": torch.rand(filters, generator=generator) * 0.01 + 0.001} | changes, path)
    return path


def import_it(small, file, aggregation="abs", name="published"):
    return tiny.call("statistics", "import", file, "--run", small.run, "--name", name, "--aggregation", aggregation)


def test_imported_statistics_standardise(copied, tmp_path):
    file = published(tmp_path / "stat.pth")
    assert import_it(copied, file).code == 0
    assert build(copied, "--datasets", "v2", "--reference", "published", "--subset", "all", "--name", "theirs").code == 0
    saved = torch.load(file, weights_only=True)
    scores = oracles.standardise(saliency_of(table_of(copied.run, "v2")), saved["mean"].double().numpy(), saved["std"].double().numpy())
    assert np.abs(contents(copied.run, "theirs")[1] - scores / np.linalg.norm(scores, axis=1, keepdims=True)).max() < 1e-5
    found = query(copied, "--name", "theirs", "--format", "json").json
    assert len(found) == 10 and {row["dataset"] for row in found} == {"v2"}


def test_statistics_of_another_aggregation_are_refused(copied, tmp_path):
    """Where they are imported, and again where a file of the other kind lies there all the same."""
    file = published(tmp_path / "stat.pth")
    message = import_it(copied, file, "signed").refused()
    assert "--aggregation" in message and "'signed'" in message and "'abs'" in message and not (copied.run / "statistics/published.parquet").exists()
    assert import_it(copied, file).code == 0
    path = copied.run / "statistics/published.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"aggregation": b"signed"}), path)
    assert "published was aggregated as 'signed', this run as 'abs'" in build(copied, "--reference", "published").refused()


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda p: published(p, 7), "is about 7 filters, this run's network has 24"),
        (lambda p: published(p, mean=torch.full((24,), float("nan"))), "not finite"),
        (lambda p: p.write_text("no torch file"), "cannot be read as statistics"),
        (lambda p: torch.save([1, 2], p), "a dict of two vectors, mean and std"),
        (lambda p: None, "there is no file"),
    ],
    ids=["other network", "NaN", "text", "list", "absent"],
)
def test_files_that_are_no_statistics_are_refused(copied, tmp_path, make, says):
    make(tmp_path / "stat.pth")
    message = import_it(copied, tmp_path / "stat.pth").refused()
    assert says in message and "stat.pth" in message


def test_imported_statistics_cannot_take_a_data_sets_name(copied, tmp_path):
    assert "is a data set of this run" in import_it(copied, published(tmp_path / "stat.pth"), name="val").refused()


def test_statistics_follow_the_profiles(small, copied, tmp_path):
    """Computed once while the profiles stay, again when there are more of them."""
    path, run = tmp_path / "grown/statistics/val.parquet", tmp_path / "grown"
    assert small.extract("val", "--max-samples", 20, run=run).code == 0 and tiny.call("index", "--run", run).code == 0
    mean, std = oracles.mean_and_std(saliency_of(table_of(run, "val")))
    table = pq.read_table(path)
    assert table["count"].to_pylist() == [20] * tiny.FILTERS and np.allclose(table["mean"], mean, rtol=1e-9) and np.allclose(table["std"], std, rtol=1e-9)
    first = path.stat().st_mtime_ns
    assert tiny.call("index", "--run", run, "--subset", "all").code == 0 and path.stat().st_mtime_ns == first
    assert small.extract("val", run=run).code == 0 and tiny.call("index", "--run", run).code == 0
    table = pq.read_table(path)
    assert table["count"].to_pylist() == [60] * tiny.FILTERS and table.equals(pq.read_table(small.run / "statistics/val.parquet"))


# ---- indexes that are not what they say ----------------------------------------------------------------------------


def more_profiles(run, small, tmp_path):
    import shards

    sources = shutil.copytree(small.sources / "v2", tmp_path / "v2")
    shards.write_shard(sources / "v2-00001.tar", [0, 1, 2], first=5000)
    census = json.loads((run / "datasets/v2.json").read_text()) | {"root": str(sources)}
    (run / "datasets/v2.json").write_text(json.dumps(census))
    assert tiny.call("extract", "--run", run, "--dataset", "v2", "--source", sources, "--model", tiny.MODEL).code == 0


def replaced_statistics(run, *_):
    table = pq.read_table(run / "statistics/val.parquet")
    changed = table.set_column(2, "mean", pa.array(table["mean"].to_numpy() * 1.01))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), run / "statistics/val.parquet")


def other_run(run, *_):
    fields = json.loads((run / "run.json").read_text())
    fields.pop("checksum")
    (run / "run.json").write_text(json.dumps(fields | {"weights_sha256": "0" * 64}))


CHANGES = [(more_profiles, "its profiles"), (replaced_statistics, "its statistics"), (other_run, "run.json")]


@pytest.mark.parametrize("change, says", CHANGES, ids=["profiles", "statistics", "run.json"])
def test_stale_index_says_so(small, copied, tmp_path, change, says):
    """And answers again once it is built again; under another run.json it is not built, since its profiles are not that run's."""
    assert query(copied).code == 0
    change(copied.run, small, tmp_path)
    message = query(copied).refused()
    assert f"is stale: {says} changed since it was built" in message and "run faultline index again" in message
    if says == "run.json":
        assert "was made with other settings than run.json states" in build(copied).refused()
    else:
        assert build(copied).code == 0 and query(copied).code == 0


def half_built(run):
    (run / "index/errors/index.json").unlink()


def rows_of_another_build(run):
    assert tiny.call("index", "--run", run, "--datasets", "v2", "--name", "second").code == 0
    shutil.copy(run / "index/second/rows.parquet", run / "index/errors/rows.parquet")


def vectors_of_another_build(run):
    assert tiny.call("index", "--run", run, "--datasets", "v2", "--name", "second").code == 0
    shutil.copy(run / "index/second/index.faiss", run / "index/errors/index.faiss")


def cut_off(run):
    whole = (run / "index/errors/index.faiss").read_bytes()
    (run / "index/errors/index.faiss").write_bytes(whole[: len(whole) // 2])


def no_json(run):
    (run / "index/errors/index.json").write_text("{")


def not_its_keys(run):
    (run / "index/errors/index.json").write_text("{}")


@pytest.mark.parametrize("damage", [half_built, rows_of_another_build, vectors_of_another_build, cut_off, no_json, not_its_keys])
def test_damaged_index_is_never_searched(copied, damage):
    damage(copied.run)
    message = query(copied, "--name", "errors").refused()
    assert "errors" in message and "run faultline index again" in message
    assert build(copied, "--datasets", "val,v2").code == 0 and query(copied, "--name", "errors").code == 0
