"""mu and sigma of every filter over a reference set, merged from parts in float64, and the standardisation ŝ (eq. 2).

A reference is a Parquet table with one row a filter in vector order: layer, filter, mean, std (n - 1), count. Its metadata say
where it came from and with which aggregation, since |mean(grad)| and mean(|grad|) must never be mixed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.atomic import regular
from pipeline.errors import BadRequest, printable
from pipeline.filters import FilterLayout

IMPORTED = "imported from "  # how the origin of somebody else's statistics begins
MARK = "whole"  # in the metadata of a file that this package wrote
DEAD = 1e-12  # a filter whose sigma is not above this contributes 0


@dataclass(frozen=True)
class Moments:
    """Count n, mean and M2 (the sum of squared deviations from the mean) of vectors; mean, m2: float64 [F]."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> Moments:
        """Of s̄ [N, F], N may be 0."""
        rows = rows.astype(np.float64)
        mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
        return cls(len(rows), mean, np.square(rows - mean).sum(0))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both parts together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        share = other.count / count
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + np.square(delta) * (self.count * share))

    @property
    def std(self) -> np.ndarray:
        """float64 [F], with n - 1; 0 for fewer than two samples."""
        return np.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else np.zeros_like(self.mean)


@dataclass(frozen=True)
class Reference:
    """mu and sigma, float64 [F], over `count` samples (0: not known, as with imported ones)."""

    mean: np.ndarray
    std: np.ndarray
    count: int
    aggregation: str
    origin: str

    @property
    def live(self) -> np.ndarray:
        """bool [F]: filters that are not dead, sigma > 1e-12."""
        return self.std > DEAD

    def standardise(self, rows: np.ndarray) -> np.ndarray:
        """s̄ [N, F] -> ŝ float32 [N, F]: z-scores, and 0 where the filter is dead."""
        return np.where(self.live, (rows - self.mean) / np.where(self.live, self.std, 1.0), 0.0).astype(np.float32)

    def table(self, layout: FilterLayout) -> pa.Table:
        layers, filters = map(list, zip(*layout.places))
        columns = {"layer": layers, "filter": pa.array(filters, pa.int32()), "mean": self.mean, "std": self.std, "count": pa.array([self.count] * len(layers), pa.int64())}
        return pa.table(columns).replace_schema_metadata({"aggregation": self.aggregation, "origin": self.origin})

    def write(self, layout: FilterLayout, where: Path | pa.NativeFile) -> None:
        """The Parquet file, with page checksums, and marked as a file that can be held against what it should be."""
        table = self.table(layout)
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, MARK: "1"}), where, write_page_checksum=True)

    @classmethod
    def read(cls, path: Path, layout: FilterLayout, run: bool = True) -> Reference:
        """run: whether the file is that of a run, which can make it anew, or was given by somebody. Raises BadRequest if it is absent, damaged, or of another network."""
        remedy = "remove it, and run faultline index again" if run else "give statistics that were made with this --model (statistics/NAME.parquet of a run)"
        try:
            with pq.ParquetFile(regular(path), page_checksum_verification=True) as parquet:
                table = parquet.read()
            layers = list(zip(table["layer"].to_pylist(), table["filter"].to_pylist()))
            about = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
            reference = cls(table["mean"].to_numpy(), table["std"].to_numpy(), int(table["count"][0].as_py()), about["aggregation"], about["origin"])
            whole = MARK not in about or _is_whole(table, parquet.metadata.created_by, Path(path).read_bytes())
            if reference.aggregation not in ("abs", "signed") or not reference.origin:
                raise KeyError
        except (OSError, pa.ArrowException, KeyError, IndexError, TypeError, ValueError) as fault:
            raise BadRequest(f"{printable(path)} cannot be read as statistics ({type(fault).__name__}): {remedy}{' (or faultline statistics import, if they were imported)' if run else ''}") from None
        if layers != layout.places:
            raise BadRequest(f"{printable(path)} holds the statistics of another network: {len(layers)} filters where {'this run' if run else 'the network of --model'} has {layout.total}: {remedy}")
        if not whole:
            raise BadRequest(f"{printable(path)} cannot be read as statistics (it is not as it was written): {remedy}{' (or faultline statistics import, if they were imported)' if run else ''}")
        return reference


def _is_whole(table: pa.Table, created_by: str, content: bytes) -> bool:
    """Whether a file that is marked is, byte for byte, what would be written of the table that it holds: Parquet's checksums leave out what stands between pages. Not told of one that another version of pyarrow
    wrote, or that somebody wrote again in another way: it has another length."""
    again = pa.BufferOutputStream()
    pq.write_table(table, again, write_page_checksum=True)
    again = again.getvalue()
    return content == again or len(content) != len(again) or pq.read_metadata(pa.BufferReader(again)).created_by != created_by


def moments(blocks: Iterable[np.ndarray], filters: int) -> Moments:
    """Of all rows of a stream of s̄ blocks [n, F], one block in memory at a time."""
    total = Moments(0, np.zeros(filters), np.zeros(filters))
    for block in blocks:
        total = total + Moments.of(block)
    return total


def _real(values):
    """A torch tensor as it is. Raises ValueError for complex numbers, of which torch would drop a half."""
    if values.is_complex():
        raise ValueError
    return values


def import_published(path: Path, aggregation: str, layout: FilterLayout, run: bool = True) -> Reference:
    """Somebody else's `mean` and `std`, as the authors publish them: a `.pth` dict of two vectors [F] in vector order.

    run: whether the network is that of a run. Read with `weights_only=True`. Raises BadRequest if it is anything else, has another length, or is not finite.
    """
    import torch

    if not Path(path).is_file():  # a pipe, too: reading it might never end
        raise BadRequest(f"{'no regular file is' if Path(path).exists() else 'there is no file'} {printable(path)}: give a torch file with a dict of two vectors, mean and std")
    try:
        with warnings.catch_warnings(action="ignore"):  # about a pickle's protocol, before it is refused
            saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError
        mean, std = (np.asarray(_real(torch.as_tensor(saved[key])).double()).reshape(-1) for key in ("mean", "std"))
    except Exception as fault:
        raise BadRequest(f"{printable(path)} cannot be read as statistics ({type(fault).__name__}); a torch file with a dict of two vectors, mean and std, is needed") from None
    if len(mean) != len(std):
        raise BadRequest(f"{printable(path)} holds {len(mean)} means and {len(std)} stds: save one of each for every filter")
    if len(mean) != layout.total:
        network = "this run's network" if run else "the network of --model"
        raise BadRequest(f"{printable(path)} is about {len(mean)} filters, {network} has {layout.total}: it belongs to another model; give the statistics of this one")
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
        raise BadRequest(f"{printable(path)} holds values that are not finite, or a negative std: save them again, as they were computed")
    return Reference(mean, std, 0, aggregation, f"{IMPORTED}{Path(path).name}")
