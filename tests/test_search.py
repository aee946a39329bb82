"""The search against brute force in float64, over ties, zero vectors, ranges of layers and data sets, and k beyond what exists."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from index import Run
from index.build import build, normalise
from pipeline.census import Census
from pipeline.filters import FilterLayout
from pipeline.manifest import Manifest
from pipeline.samples import Preprocessing
from pipeline.sources import Shard
from pipeline.statistics import Reference
from pipeline.store import REJECTS, Store, profiles_schema
from pipeline.units import Unit

LAYOUT = FilterLayout((("a", 2), ("b", 3), ("c", 1)))
F = LAYOUT.total
MANIFEST = Manifest("m:net", "00" * 32, LAYOUT, Preprocessing(), "abs", "fp32", "fused", 8, 1, 256, 3, None, None, {}, "2026-01-01T00:00:00Z")
CLOSE = 2e-6  # of float32 inner products of unit vectors


def write_run(folder: Path, sets: dict[str, np.ndarray]) -> Run:
    """A run whose standardised vectors are exactly `sets`, float32 [N, F]: all samples are errors, mu is 0 and sigma 1."""
    MANIFEST.write(folder)
    store = Store(folder)
    (folder / "statistics").mkdir()
    pq.write_table(Reference(np.zeros(F), np.ones(F), 0, "abs", "a test").table(LAYOUT), folder / "statistics/unit.parquet")
    for name, vectors in sets.items():
        count = len(vectors)
        columns = {"sample_id": [f"{name}-{i}" for i in range(count)], "label": [0] * count, "prediction": [1] * count, "label_confidence": [0.1] * count}
        columns |= {"prediction_confidence": [0.9] * count, "loss": [1.0] * count, "saliency": list(vectors), "thumbnail": [b""] * count, "shard": ["s.tar"] * count}
        store.write_census(name, Census("/d", "webdataset", "/d", (Shard("s.tar", count, "v", ((0, 0),)),), None))
        store.commit(Unit(name, "s.tar", 0, count), [(pa.table(columns, schema=profiles_schema(F)), REJECTS.empty_table())])
    build(store, list(sets), "unit", "errors", "errors")
    return Run.open(folder)


# Few distinct values make ties, duplicates and zero vectors likely; a few vectors are tiny or huge.
rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.just(F)), elements=st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, 0.5]))
scales = st.sampled_from([1.0, 1.0, 1e-25, 1e25])


@settings(max_examples=30)
@given(rows, rows, scales, st.integers(1, 30), st.sampled_from([None, "val", "v2"]), st.sampled_from([None, "a", "b..c", "..b", "c.."]), st.data())
def test_neighbours_are_those_of_brute_force(val, v2, scale, k, within, layers, data):
    """Exactly k or all that exist; best first; the similarities of brute force; never the query itself, though its duplicates are welcome."""
    sets = {"val": val * np.float32(scale), "v2": v2}
    asked = data.draw(st.integers(0, len(val) - 1))
    folder = Path(tempfile.mkdtemp())
    try:
        found = write_run(folder, sets).neighbors(f"val:val-{asked}", k, within, layers)
    finally:
        shutil.rmtree(folder)
    columns = LAYOUT.columns(layers) if layers else slice(None)
    inside = [(name, i) for name in sets for i in range(len(sets[name])) if within in (None, name)]
    others = [(name, i) for name, i in inside if (name, i) != ("val", asked)]
    everything = np.array([sets[name][i] for name, i in others]).reshape(-1, F)
    _, truth = oracles.cosine_neighbours(sets["val"][asked : asked + 1, columns], everything[:, columns], len(others))
    got = [(row["dataset"], int(row["sample_id"].partition("-")[2])) for row in found.to_pylist()]
    assert len(got) == min(k, len(others)) == len(set(got)) and set(got) <= set(others)
    assert found["rank"].to_pylist() == list(range(1, len(got) + 1))
    scores = found["similarity"].to_numpy()
    assert np.all(np.diff(scores) <= 0)
    if got:
        assert np.abs(scores - truth[0][: len(got)]).max() < CLOSE  # the k best values, whichever of equals they are
        for key, score in zip(got, scores):
            own = oracles.cosine_neighbours(sets["val"][asked : asked + 1, columns], sets[key[0]][key[1]][None, columns], 1)[1][0, 0]
            assert abs(own - score) < CLOSE


@settings(max_examples=25)
@given(vectors=rows, copies=st.integers(2, 30), k=st.integers(1, 40), queries=st.integers(1, 40))
def test_equals_come_in_the_order_of_their_rows(vectors, copies, k, queries):
    """Exact duplicates tie to the bit, so the first of them are given, in order, to one query and to many at once."""
    folder = Path(tempfile.mkdtemp())
    try:
        index = write_run(folder, {"val": np.concatenate([vectors] * copies)}).index()
        asked = np.arange(queries) % len(vectors)
        similarity, found = index.search(vectors[asked], k, None, None, asked)
    finally:
        shutil.rmtree(folder)
    for i, row in enumerate(found):
        assert asked[i] not in row and len(set(row)) == len(row) == min(k, len(vectors) * copies - 1)
        for original in range(len(vectors)):
            mine = [r for r in row if r % len(vectors) == original]
            possible = [original + c * len(vectors) for c in range(copies) if original + c * len(vectors) != asked[i]]
            assert mine == possible[: len(mine)], (similarity[i], row)


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 4)), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_every_vector_gets_unit_length(vectors):
    """Down to the smallest and up to the largest numbers of float32; zero alone stays zero."""
    lengths = np.linalg.norm(normalise(vectors).astype(np.float64), axis=1)
    zero = ~vectors.any(axis=1)
    assert not lengths[zero].any() and np.allclose(lengths[~zero], 1, atol=1e-6)


def test_blocks_of_a_range_are_searched_as_one(tmp_path, monkeypatch):
    """A range of layers is cut out a block at a time; where the blocks are cut changes nothing."""
    import index.search

    vectors = np.random.default_rng(0).standard_normal((57, F)).astype(np.float32)
    opened = write_run(tmp_path / "run", {"val": vectors[:40], "v2": vectors[40:]})
    whole = opened.neighbors("val:val-3", 20, layers="b..c")
    monkeypatch.setattr(index.search, "BLOCK_NUMBERS", 4 * 5)
    pieces = opened.neighbors("val:val-3", 20, layers="b..c")
    assert pieces.drop(["similarity"]) == whole.drop(["similarity"]) and np.allclose(pieces["similarity"], whole["similarity"], atol=1e-6)


def test_empty_data_set_of_an_index_answers_with_nothing(tmp_path):
    opened = write_run(tmp_path / "run", {"val": np.eye(F, dtype=np.float32), "v2": np.zeros((0, F), np.float32)})
    assert opened.neighbors("val:val-0", 3, "v2").num_rows == 0 and opened.neighbors("val:val-0", 9).num_rows == F - 1
