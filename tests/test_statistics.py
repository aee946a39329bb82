"""mu and sigma do not depend on how the rows were cut; dead filters give 0; a reference is never another network's."""

import os
from pathlib import Path

import numpy as np
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout
from pipeline.statistics import Moments, Reference, import_published, moments

LAYOUT = FilterLayout((("conv1", 2), ("layer1.0.conv", 3)))


def rows_of(seed: int, count: int, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """float32 [count, 5]; filter 1 is always the same number, as that of a dead filter is."""
    rows = (np.random.default_rng(seed).gamma(2.0, scale, (count, 5)) + offset).astype(np.float32)
    rows[:, 1] = np.float32(0.1)
    return rows


@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(0, 12), max_size=8), scale=st.sampled_from([1e-9, 1e-3, 1.0]), offset=st.sampled_from([0.0, 1.0, 1000.0]))
def test_any_partition_gives_the_two_passes(seed, sizes, scale, offset):
    """Also far from zero, where sums of squares would lose everything; empty parts and no parts among them."""
    rows = rows_of(seed, sum(sizes), scale, offset)
    total = moments(np.split(rows, np.cumsum(sizes)[:-1]) if sizes else [], 5)
    assert total.count == len(rows)
    if len(rows):
        mean, std = oracles.mean_and_std(rows)
        np.testing.assert_allclose(total.mean, mean, rtol=1e-14)
        np.testing.assert_allclose(total.std, std, rtol=1e-6, atol=1e-14 * max(1, offset))  # the last digits of the mean
    else:
        assert (total.mean == 0).all() and (total.std == 0).all()


@given(seed=st.integers(0, 99), a=st.integers(0, 9), b=st.integers(0, 9))
def test_sum_has_no_order(seed, a, b):
    left, right = Moments.of(rows_of(seed, a)), Moments.of(rows_of(seed + 1, b))
    one, other = left + right, right + left
    assert one.count == other.count == a + b
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-14)
    np.testing.assert_allclose(one.m2, other.m2, rtol=1e-12, atol=1e-25)


def test_std_is_that_of_a_sample():
    """n - 1, as the authors have it; one sample has no spread."""
    rows = np.array([[1.0], [2.0], [4.0]], np.float32)
    assert Moments.of(rows).std[0] == pytest.approx(np.std([1, 2, 4], ddof=1), rel=1e-15) and Moments.of(rows[:1]).std[0] == 0.0


def reference(rows: np.ndarray) -> Reference:
    total = Moments.of(rows)
    return Reference(total.mean, total.std, total.count, "abs", "val")


def test_standardised_is_the_plain_formula():
    rows = rows_of(1, 40)
    got = reference(rows).standardise(rows)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, oracles.standardise(rows, *oracles.mean_and_std(rows)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[:, [0, 2, 3, 4]].std(0, ddof=1), 1, rtol=1e-5)


def test_dead_filters_give_zero_and_never_nan():
    """Whatever another data set has there; the rule is std <= 1e-12, whether its 0 is rounded or not."""
    rows = rows_of(1, 40)
    rows[:, 3] = 0
    dead = reference(rows)
    assert dead.live.tolist() == [True, False, True, False, True]
    other = rows_of(2, 7)
    other[:, 1] = np.inf
    with np.errstate(all="raise"):
        got = dead.standardise(other)
    assert (got[:, [1, 3]] == 0).all() and np.isfinite(got).all()
    edge = Reference(np.zeros(2), np.array([1e-12, 1.1e-12]), 9, "abs", "val")
    assert edge.standardise(np.full((1, 2), 1e-12)).tolist() == [[0.0, pytest.approx(1 / 1.1)]]


def test_nothing_is_changed_in_place():
    rows = rows_of(1, 9)
    kept, own = rows.copy(), reference(rows)
    mean, std = own.mean.copy(), own.std.copy()
    own.standardise(rows)
    assert (rows == kept).all() and (own.mean == mean).all() and (own.std == std).all()


# ---- files ---------------------------------------------------------------------------------------------------------


def test_table_is_one_row_a_filter_in_vector_order(tmp_path):
    """The layout that interface programs read, and back without loss."""
    own = reference(rows_of(1, 12))
    table = own.table(LAYOUT)
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {"layer": "string", "filter": "int32", "mean": "double", "std": "double", "count": "int64"}
    assert list(zip(table["layer"].to_pylist(), table["filter"].to_pylist())) == [("conv1", 0), ("conv1", 1)] + [("layer1.0.conv", i) for i in range(3)]
    assert table["count"].to_pylist() == [12] * 5
    pq.write_table(table, tmp_path / "val.parquet")
    back = Reference.read(tmp_path / "val.parquet", LAYOUT)
    assert (back.mean == own.mean).all() and (back.std == own.std).all() and (back.count, back.aggregation, back.origin) == (12, "abs", "val")


@pytest.mark.parametrize("layout", [FilterLayout((("conv1", 2), ("other", 3))), FilterLayout((("conv1", 2),)), FilterLayout((("layer1.0.conv", 3), ("conv1", 2)))])
def test_statistics_of_another_network_are_refused(tmp_path, layout):
    pq.write_table(reference(rows_of(1, 12)).table(LAYOUT), tmp_path / "val.parquet")
    with pytest.raises(BadRequest, match=f"val.parquet holds the statistics of another network: 5 filters where this run has {layout.total}"):
        Reference.read(tmp_path / "val.parquet", layout)


@pytest.mark.parametrize("kind", ["absent", "no Parquet", "other columns", "no metadata", "no rows"])
def test_unreadable_statistics_are_named(tmp_path, kind):
    path, table = tmp_path / "val.parquet", reference(rows_of(1, 12)).table(LAYOUT)
    if kind == "no Parquet":
        path.write_bytes(b"PAR1 not really")
    elif kind != "absent":
        pq.write_table({"other columns": table.drop_columns("mean"), "no metadata": table.replace_schema_metadata(None), "no rows": table.slice(0, 0)}[kind], path)
    with pytest.raises(BadRequest, match="val.parquet cannot be read as statistics .*faultline index"):
        Reference.read(path, LAYOUT)


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path):
    path, own = tmp_path / "val.parquet", reference(rows_of(1, 12))
    own.write(LAYOUT, path)
    content = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(content), 7):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            back = Reference.read(path, LAYOUT)
        except BadRequest as fault:
            refused += "val.parquet" in str(fault)
        else:
            assert (back.mean == own.mean).all() and (back.std == own.std).all() and (back.count, back.aggregation, back.origin) == (own.count, own.aggregation, own.origin), f"bit {bit}"
    assert refused > len(content) / 2


@pytest.mark.parametrize("numbers", [0, 1e-9])
def test_statistics_that_somebody_writes_again_are_taken(tmp_path, numbers):
    path, own = tmp_path / "val.parquet", reference(rows_of(1, 12))
    own.write(LAYOUT, path)
    table = pq.read_table(path)
    table = table.replace_schema_metadata(dict(reversed(table.schema.metadata.items()))).set_column(2, "mean", pa.array(own.mean + numbers))
    for again in ({}, {"write_page_checksum": True}, {"compression": "zstd"}, {"use_dictionary": False}, {"data_page_version": "2.0"}):
        pq.write_table(table, path, **again)
        assert (Reference.read(path, LAYOUT).mean == own.mean + numbers).all()


def published(path: Path, **changes) -> Path:
    saved = {"mean": torch.arange(5.0), "std": torch.arange(5.0) + 1, **changes}
    torch.save({name: value for name, value in saved.items() if value is not None}, path)
    return path


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, "list", "column"])
def test_published_statistics_are_taken_over(tmp_path, kind):
    vectors = {"mean": torch.arange(5.0), "std": torch.arange(5.0) + 1}
    as_kind = {"list": lambda v: v.tolist(), "column": lambda v: v[:, None]}.get(kind, lambda v: v.to(kind))
    got = import_published(published(tmp_path / "stat.pth", **{name: as_kind(v) for name, v in vectors.items()}), "signed", LAYOUT)
    assert got.mean.dtype == got.std.dtype == np.float64 and got.mean.tolist() == [0, 1, 2, 3, 4] and got.std.tolist() == [1, 2, 3, 4, 5]
    assert (got.count, got.aggregation) == (0, "signed") and "stat.pth" in got.origin


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mean": torch.zeros(4), "std": torch.zeros(4)}, "is about 4 filters, this run's network has 5: it belongs to another model"),
        ({"std": torch.zeros(4)}, "holds 5 means and 4 stds"),
        ({"std": None}, "cannot be read as statistics .* a dict of two vectors, mean and std, is needed"),
        ({"mean": "much"}, "cannot be read as statistics"),
        ({"mean": torch.tensor([0, 1, 2, 3, float("nan")])}, "not finite"),
        ({"std": torch.tensor([0, 1, 2, 3, float("inf")])}, "not finite"),
        ({"std": torch.tensor([0, 1, 2, 3, -1.0])}, "negative std"),
    ],
)
def test_unusable_published_statistics_are_refused(tmp_path, changes, message):
    with pytest.raises(BadRequest, match=f"stat.pth .*{message}"):
        import_published(published(tmp_path / "stat.pth", **changes), "abs", LAYOUT)


def test_code_in_published_statistics_never_runs(tmp_path):
    path = published(tmp_path / "stat.pth", extra=Bomb(tmp_path / "ran"))
    with pytest.raises(BadRequest, match="cannot be read as statistics"):
        import_published(path, "abs", LAYOUT)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # so it would have


def test_missing_and_foreign_files_are_named(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    for name, message in (("nowhere.pth", "there is no file .*nowhere.pth"), ("text.pth", "text.pth cannot be read as statistics")):
        with pytest.raises(BadRequest, match=message):
            import_published(tmp_path / name, "abs", LAYOUT)


def test_table_of_an_import_reads_back(tmp_path):
    got = import_published(published(tmp_path / "stat.pth"), "signed", LAYOUT)
    pq.write_table(got.table(LAYOUT), tmp_path / "theirs.parquet")
    assert Reference.read(tmp_path / "theirs.parquet", LAYOUT).aggregation == "signed" and pa.types.is_float64(got.table(LAYOUT)["mean"].type)
