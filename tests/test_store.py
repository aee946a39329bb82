"""A run's files: whole or absent whatever fails in between, counted as they are, and never mixed with another run's."""

import json
import os
from dataclasses import replace
from glob import glob

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline import store as store_module
from pipeline.census import Census
from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout
from pipeline.manifest import Manifest
from pipeline.samples import Preprocessing
from pipeline.sources import Shard
from pipeline.store import REJECTS, Store, profiles_schema, saliency_of
from pipeline.units import Unit

LAYOUT = FilterLayout((("conv1", 2), ("conv2", 1)))
MANIFEST = Manifest(
    model="m:net",
    weights_sha256="ab" * 32,
    layers=LAYOUT,
    preprocessing=Preprocessing(crop=None),
    aggregation="abs",
    precision="fp32",
    engine="fused",
    batch_size=8,
    threads=1,
    unit_samples=16,
    classes=3,
    class_names=("cat", "dog", "owl"),
    import_root=None,
    versions={"torch": "2.15"},
    created="2026-01-01T00:00:00Z",
)
SHARDS = (Shard("a.tar", 20, "v", ((0, 0),)), Shard("b.tar", 12, "v", ((0, 0), (8, 4096))))


def profiles(ids: list[str], shard: str = "a.tar") -> pa.Table:
    count = len(ids)
    columns = {"sample_id": ids, "label": [0] * count, "prediction": [1] * count, "label_confidence": [0.25] * count, "prediction_confidence": [0.5] * count}
    columns |= {"loss": [1.5] * count, "saliency": [[float(i), 1.0, 2.0] for i in range(count)], "thumbnail": [b"J"] * count, "shard": [shard] * count}
    return pa.table(columns, schema=profiles_schema(3))


def rejects(ids: list[str]) -> pa.Table:
    return pa.table([ids, ["a.tar"] * len(ids), ["empty"] * len(ids)], schema=REJECTS)


def commit(store: Store, unit: Unit, bad: int = 0) -> None:
    ids = [f"{unit.shard}/{i:04d}" for i in range(unit.start, unit.stop)]
    store.commit(unit, [(profiles(ids[bad:], unit.shard), rejects(ids[:bad]))])


def begun(folder) -> Store:
    """A run of which two shards are counted."""
    MANIFEST.write(folder)
    store = Store(folder)
    store.write_census("val", Census("/data", "webdataset", "/data", SHARDS, None))
    return store


@pytest.fixture
def store(tmp_path):
    return begun(tmp_path)


UNIT = Unit("val", "a.tar", 0, 16)


# ---- commit --------------------------------------------------------------------------------------------------------


def test_committed_unit_is_two_files_of_one_name(store):
    commit(store, UNIT, bad=2)
    assert sorted(glob("**/*", root_dir=store.run, recursive=True, include_hidden=True)) == sorted(
        ["datasets", "datasets/val.json", "profiles", "profiles/val", f"profiles/val/{UNIT.stem}.parquet", "rejects", "rejects/val", f"rejects/val/{UNIT.stem}.parquet", "run.json"]
    )
    assert store.is_committed(UNIT) and store.committed("val") == [UNIT.stem] and store.rejects("val")["sample_id"].to_pylist() == ["a.tar/0000", "a.tar/0001"]


def test_rejects_come_first_and_profiles_are_the_commit(store, monkeypatch):
    """Also when there are none, and when no row is left."""
    order = []
    replace_file = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (order.append(str(target.relative_to(store.run)).split("/")[0]), replace_file(source, target)))
    commit(store, UNIT)
    commit(store, Unit("val", "b.tar", 0, 2), bad=2)
    assert order == ["rejects", "profiles"] * 2 and store.progress("val").rejected == 2


def failing(at: int, original, fault: BaseException):
    """`original`, but the call number `at` raises `fault` instead."""
    calls = iter(range(99))

    def call(*args, **kwargs):
        if next(calls) == at:
            raise fault
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
@pytest.mark.parametrize("file", ["rejects", "profiles"])
@pytest.mark.parametrize("step", ["write_table", "fsync", "replace"])
def test_unit_that_fails_at_any_step_is_not_there(store, monkeypatch, step, file, fault):
    """Nothing of its profiles is visible, nothing is left behind, it is still to do, and the next attempt is as if it were the first."""
    module = {"write_table": store_module.pq.ParquetWriter, "fsync": os, "replace": os}[step]
    order = ["profiles", "rejects"] if step == "write_table" else ["rejects", "profiles"]
    monkeypatch.setattr(module, step, failing(order.index(file), getattr(module, step), fault))
    before = store.todo("val", 16)
    with pytest.raises(type(fault)):
        commit(store, UNIT, bad=1)
    assert not list(store.run.glob("profiles/**/*.*")) and not list(store.run.glob("**/.*"))
    assert store.todo("val", 16) == before and store.progress("val").done == 0 and store.rejects("val").num_rows == 0
    monkeypatch.undo()
    commit(store, UNIT, bad=1)
    assert store.progress("val").done == 15 and store.rejects("val").num_rows == 1


def test_unit_that_runs_twice_is_there_once_and_the_same(store):
    commit(store, UNIT)
    first = (store.run / "profiles/val" / f"{UNIT.stem}.parquet").read_bytes()
    commit(store, UNIT)
    assert (store.run / "profiles/val" / f"{UNIT.stem}.parquet").read_bytes() == first and store.progress("val").done == 16


@pytest.fixture
def partial(store):
    """A store with one unit, in whose folders attempts died while they wrote another."""
    commit(store, UNIT)
    whole = (store.run / "profiles/val" / f"{UNIT.stem}.parquet").read_bytes()
    for folder in ("profiles", "rejects"):
        names = []
        for at, content in enumerate((b"", whole[: len(whole) // 2], whole)):
            names.append(f".a-00000016-00000020.parquet.{at:08x}.tmp")
            (store.run / folder / "val" / names[-1]).write_bytes(content)
    return store


def test_names_of_unfinished_files_are_the_ones_that_the_writer_uses(store, monkeypatch):
    """So that the two tests below are about what really is left by a kill between writing and renaming."""
    seen = []
    monkeypatch.setattr(os, "replace", lambda source, target: seen.append(source.name) or (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        commit(store, UNIT)
    assert seen[0].startswith(f".{UNIT.stem}.parquet.") and seen[0].endswith(".tmp")


def test_unfinished_files_are_seen_by_no_reader(partial):
    """Ours, pyarrow's dataset, pandas, and the `*.parquet` of DuckDB, polars and shells."""
    folder = partial.run / "profiles/val"
    assert partial.committed("val") == [UNIT.stem] and sum(batch.num_rows for _, _, batch in partial.blocks("val", ["label"])) == 16
    assert ds.dataset(folder, format="parquet").count_rows() == 16 and pq.read_table(folder).num_rows == 16
    pandas = pytest.importorskip("pandas")
    assert len(pandas.read_parquet(folder)) == 16
    assert [os.path.basename(p) for p in glob(str(folder / "*.parquet"))] == [f"{UNIT.stem}.parquet"]
    assert glob(str(partial.run / "**/*.parquet"), recursive=True, include_hidden=True) == [p for p in glob(str(partial.run / "**/*.parquet"), recursive=True)]


def test_sweep_removes_what_was_left_and_nothing_else(partial):
    (partial.run / "profiles/val/notes.txt").write_text("mine")
    partial.sweep("val")
    assert sorted(p.name for p in partial.run.glob("*/val/*")) == sorted([f"{UNIT.stem}.parquet"] * 2 + ["notes.txt"])
    partial.sweep("not there yet")


# ---- progress and reading ------------------------------------------------------------------------------------------


def test_progress_counts_files(store):
    """samples = done + pending + rejected, at every moment, also where a limit was asked for and passed."""
    def now():
        p = store.progress("val")
        return p.samples, p.done, p.pending, p.rejected

    assert now() == (32, 0, 32, 0) and store.progress("val").images_per_s is None
    commit(store, UNIT, bad=3)
    assert now() == (32, 13, 16, 3)
    commit(store, Unit("val", "b.tar", 0, 12))
    assert now() == (32, 25, 4, 3)
    store.write_census("val", Census("/data", "webdataset", "/data", SHARDS, 18))
    assert now() == (30, 25, 2, 3) and covered(store.todo("val", 16)) == [("a.tar", 16, 18)]


def covered(units):
    return [(unit.shard, unit.start, unit.stop) for unit in units]


def test_rate_leaves_out_the_pause_between_two_jobs(store):
    """Four units of four samples, a second apart, and an hour between the second and the third."""
    for i, stamp in enumerate((1000, 1001, 4601, 4602)):
        unit = Unit("val", "a.tar", 4 * i, 4 * i + 4)
        commit(store, unit)
        os.utime(store.run / "profiles/val" / f"{unit.stem}.parquet", (stamp, stamp))
    assert store.progress("val").images_per_s == 4.0


def test_profiles_read_back_as_the_interface_says(store):
    commit(store, UNIT)
    table = store.profiles("val").to_table()
    assert [f"{field.name} {field.type}" for field in table.schema] == [
        "sample_id string",
        "label int32",
        "prediction int32",
        "label_confidence float",
        "prediction_confidence float",
        "loss float",
        "saliency fixed_size_list<element: float>[3]",
        "thumbnail binary",
        "shard string",
    ]
    truth = np.array([[i, 1, 2] for i in range(16)], np.float32)
    assert (saliency_of(table) == truth).all() and (saliency_of(table.slice(5, 3)) == truth[5:8]).all()
    assert (saliency_of(table.to_batches()[0].slice(5, 3)) == truth[5:8]).all() and saliency_of(table.slice(0, 0)).shape == (0, 3)


def test_blocks_come_in_one_order_with_their_places(store):
    """Bounded batches; a file and a position in it find the row again."""
    for unit in (Unit("val", "b.tar", 0, 12), Unit("val", "a.tar", 16, 20), UNIT):
        commit(store, unit)
    blocks = [(file.stem, position, batch.column(0).to_pylist()) for file, position, batch in store.blocks("val", ["sample_id"], rows=5)]
    assert [i for _, _, ids in blocks for i in ids] == [f"a.tar/{i:04d}" for i in range(20)] + [f"b.tar/{i:04d}" for i in range(12)]
    assert max(len(ids) for _, _, ids in blocks) <= 5
    for stem, position, ids in blocks:
        assert pq.read_table(store.run / "profiles/val" / f"{stem}.parquet")["sample_id"].to_pylist()[position : position + len(ids)] == ids


def test_unknown_data_set_names_those_that_are_there(store):
    with pytest.raises(BadRequest, match="there is no data set 'v\\\\x1b2' in .*; it has: val"):
        store.census("v\x1b2")
    assert store.datasets() == ["val"]


def test_census_survives_json(store):
    census = Census("/data/{a,b}.tar", "webdataset", "/data", (*SHARDS, Shard("\udcff.tar", 1, "v", ((0, [3, "cat"]),))), 7)
    store.write_census("v2", census)
    back = Store(store.run).census("v2")
    assert (back.spec, back.limit, back.samples, [s.name for s in back.shards]) == (census.spec, 7, 7, ["a.tar", "b.tar", "\udcff.tar"])
    assert back.shards[1].marks == SHARDS[1].marks and back.shards[2].marks == ((0, [3, "cat"]),)


def test_damaged_census_is_named(store):
    for content in ("{", '{"spec": 1}', '{"spec": "", "kind": "", "root": "", "shards": [{}], "limit": null}'):
        (store.run / "datasets/val.json").write_text(content)
        with pytest.raises(BadRequest, match="val.json cannot be read"):
            store.census("val")


# ---- run.json ------------------------------------------------------------------------------------------------------


def test_manifest_survives_its_file(tmp_path):
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST and Manifest.read(tmp_path).fingerprint == MANIFEST.fingerprint
    fields = json.loads((tmp_path / "run.json").read_text())
    assert fields["layers"] == [{"name": "conv1", "filters": 2}, {"name": "conv2", "filters": 1}] and fields["class_names"] == ["cat", "dog", "owl"]
    unnamed = replace(MANIFEST, class_names=None)
    unnamed.write(tmp_path)
    assert Manifest.read(tmp_path) == unnamed and [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert (MANIFEST.name_of(2), MANIFEST.name_of(3), MANIFEST.name_of(-1), unnamed.name_of(0)) == ("owl", None, None, None)


DIFFERENT = {
    "model": "resnet20",
    "weights_sha256": "cd" * 32,
    "layers": FilterLayout((("conv1", 3),)),
    "preprocessing": Preprocessing(),
    "aggregation": "signed",
    "precision": "bf16",
}


@pytest.mark.parametrize("setting", DIFFERENT)
def test_runs_of_different_settings_are_never_mixed(setting, tmp_path):
    """The fingerprint tells them apart and the refusal names the setting, both values and the remedy."""
    assert replace(MANIFEST, **{setting: DIFFERENT[setting]}).fingerprint != MANIFEST.fingerprint
    own = {name: getattr(MANIFEST, name) for name in DIFFERENT}
    MANIFEST.must_match(own, tmp_path)
    MANIFEST.must_match(dict.fromkeys(own), tmp_path)
    with pytest.raises(BadRequest, match=f" was made with {setting} .*, not .*: vectors of different settings are never mixed.* give another --run") as fault:
        MANIFEST.must_match(own | {setting: DIFFERENT[setting]}, tmp_path)
    assert not any(other in str(fault.value) for other in set(DIFFERENT) - {setting})


def test_all_differences_are_named_at_once(tmp_path):
    with pytest.raises(BadRequest, match="aggregation abs, not signed; batch_size 8, not 16; weights_sha256 abababababab..., not cdcdcdcdcdcd"):
        MANIFEST.must_match({"aggregation": "signed", "batch_size": 16, "weights_sha256": "cd" * 32, "threads": None}, tmp_path)


def test_who_made_a_run_is_no_part_of_its_fingerprint():
    assert replace(MANIFEST, created="later", versions={}, class_names=None, import_root="/elsewhere", engine="vmap").fingerprint == MANIFEST.fingerprint


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": "x"}', "\xff"])
def test_damaged_run_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(BadRequest, match="run.json"):
        Manifest.read(tmp_path)


def test_no_run_is_said(tmp_path):
    with pytest.raises(BadRequest, match="--run: there is no run at .*nowhere .*faultline extract begins one"):
        Manifest.read(tmp_path / "nowhere")


def test_json_is_whole_or_absent(tmp_path, monkeypatch):
    MANIFEST.write(tmp_path)
    monkeypatch.setattr(os, "replace", failing(0, os.replace, OSError("no space")))
    with pytest.raises(OSError):
        replace(MANIFEST, model="other").write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST and [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["run.json"]


@pytest.mark.parametrize("cut", [[(0, 8), (8, 16)], [(0, 16), (0, 8)], [(4, 12), (0, 16)]], ids=str)
def test_a_straggler_that_commits_a_unit_cut_otherwise_doubles_nothing(store, cut):
    """No sample is read twice meanwhile, and sweeping leaves each once for every reader."""
    whole = Unit("val", "a.tar", 0, 16)
    for start, stop in [*cut, (0, 16)]:
        commit(store, Unit("val", "a.tar", start, stop))
    ids = [i for _, _, batch in store.blocks("val", ["sample_id"]) for i in batch["sample_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == 16 and store.progress("val").done == 16
    store.sweep("val")
    assert [p.stem for folder in ("profiles", "rejects") for p in (store.run / folder / "val").iterdir()] == [whole.stem] * 2
    assert ds.dataset(store.run / "profiles/val", format="parquet").count_rows() == 16


def test_rejects_whose_profiles_never_came_are_swept(store):
    """Of a unit that died between its two files and was then cut otherwise; plain readers of `rejects/` would see its samples twice."""
    whole = Unit("val", "a.tar", 0, 16)
    commit(store, whole, bad=2)
    (store.run / "profiles/val" / f"{whole.stem}.parquet").unlink()
    for start in (0, 8):
        commit(store, Unit("val", "a.tar", start, start + 8), bad=1)
    store.sweep("val")
    assert ds.dataset(store.run / "rejects/val", format="parquet").count_rows() == store.rejects("val").num_rows == 2
