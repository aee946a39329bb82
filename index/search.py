"""An index on disk -> the nearest of its vectors: exact cosine search over all filters or a range, in all data sets or one.

Vectors stay on disk and are mapped into memory; opening an index reads them once, at the speed of memory, to see that no byte has changed.
A data set is a contiguous range of rows, and a range of filters a slice of columns; both are cut out before the search, never filtered
after it, so k neighbours are found wherever k exist.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index.build import identity, normalise, parity_of
from pipeline.atomic import regular
from pipeline.errors import BadRequest, closest, printable
from pipeline.manifest import read_json
from pipeline.store import Store, read_table

MARGIN = 16  # neighbours that FAISS finds beyond those asked for
NOISE = 1e-6  # more than float32 can be wrong by in an inner product of unit vectors
BLOCK_NUMBERS = 2**26  # numbers copied at once where a range of columns is cut out: 256 MiB


class Index:
    """rows: pyarrow table, one row a vector, in index order. vectors: float32 [N, F], unit rows (or zero), read-only."""

    def __init__(self, store: Store, name: str | None):
        """Raises BadRequest if there is no such index, it is unfinished, damaged, or older than what it was built from."""
        self.folder = folder_of(store, name)
        if not (self.folder / "index.json").exists():
            raise BadRequest(f"the index {printable(self.folder)} is unfinished: run faultline index again")
        try:
            self.about = read_json(self.folder / "index.json", "run faultline index again")
        except BadRequest:
            raise BadRequest(f"the index {printable(self.folder)} cannot be read (its index.json is damaged): run faultline index again") from None
        try:
            now = identity(store, list(self.about["datasets"]), self.about["reference"], self.about["subset"])
            if now["identity"] != self.about["identity"]:
                changed = [key for key in ("run", "datasets", "reference_profiles", "statistics_sha256") if now[key] != self.about[key]]
                words = {"run": "run.json", "datasets": "its profiles", "reference_profiles": "the reference's profiles", "statistics_sha256": "its statistics"}
                raise BadRequest(f"the index {printable(self.folder)} is stale: {', '.join(words[c] for c in changed)} changed since it was built; run faultline index again")
            self.rows = read_table(self.folder / "rows.parquet")
            self._flat = faiss.read_index(str(regular(self.folder / "index.faiss")), faiss.IO_FLAG_MMAP_IFC)
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, pa.ArrowException) as fault:
            why = f"{fault.strerror}: {fault.filename}" if isinstance(fault, OSError) and fault.filename else type(fault).__name__
            raise BadRequest(f"the index {printable(self.folder)} cannot be read ({printable(why)}): run faultline index again") from None
        made = (self.rows.schema.metadata or {}).get(b"identity", b"").decode()
        if made != self.about["identity"] or self._flat.ntotal != self.rows.num_rows or self._flat.d != self.about["filters"]:
            raise BadRequest(f"the index {printable(self.folder)} is being rebuilt or was left half built: run faultline index again")
        self.vectors = self._whole(faiss.rev_swig_ptr(self._flat.get_xb(), self._flat.ntotal * self._flat.d).reshape(self._flat.ntotal, self._flat.d))

    def _whole(self, vectors: np.ndarray) -> np.ndarray:
        """The vectors as they were built: all of them are looked at, as an exact search will. Raises BadRequest if a byte has changed."""
        if self.about.get("parity") not in (None, int(parity_of(vectors))):
            raise BadRequest(f"the index {printable(self.folder)} is damaged (vectors in its index.faiss are not those that were built): run faultline index again")
        return vectors

    def is_current(self, store: Store) -> bool:
        """Whether what was opened is still what lies on the disk, and still what would be built from the run as it is now."""
        try:
            now = identity(store, self.datasets, self.about["reference"], self.about["subset"])["identity"]
            return now == self.about["identity"] == read_json(self.folder / "index.json", "run faultline index again").get("identity")
        except (BadRequest, OSError):
            return False

    @property
    def datasets(self) -> list[str]:
        return list(self.about["datasets"])

    def range_of(self, dataset: str | None) -> tuple[int, int]:
        """First row and the row after the last of a data set, or of all. Raises BadRequest for one that is not indexed."""
        if dataset is None:
            return 0, self.rows.num_rows
        if dataset not in self.datasets:
            raise BadRequest(f"--in: the index {self.folder.name} does not hold '{printable(dataset)}'; it holds {', '.join(map(printable, self.datasets))} (faultline index --datasets makes one that holds more)")
        counts = [self.about["rows_by_dataset"][d] for d in self.datasets]
        at = self.datasets.index(dataset)
        return sum(counts[:at]), sum(counts[: at + 1])

    def row_of(self, dataset: str, sample_id: str) -> int:
        """The row of a sample, or -1 if it is not indexed."""
        if dataset not in self.datasets:
            return -1
        first, last = self.range_of(dataset)
        found = pc.index(self.rows["sample_id"].slice(first, last - first), sample_id).as_py()
        return -1 if found < 0 else first + found

    def search(self, queries: np.ndarray, k: int, within: str | None, columns: slice | None, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(cosine similarity float32 [Q, k'], rows int64 [Q, k']), best first, ties by row; k' = k, or as many as there are.

        queries: ŝ float32 [Q, F]; own: int64 [Q], the row of each query itself, never among its neighbours (-1: none).
        """
        first, last = self.range_of(within)
        inside = (own >= first) & (own < last)
        found = min(k, last - first - int(inside.any()))
        if found <= 0 or not len(queries):
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        queries = normalise(queries if columns is None else queries[:, columns])
        similarity, rows = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        for start, block in self._blocks(first, last, columns):
            near, at = nearest(queries, block, min(found + 1, len(block)))
            similarity, rows = np.hstack([similarity, near]), np.hstack([rows, at + start])
            similarity = np.where(rows == own[:, None], -np.inf, similarity)
            order = np.lexsort((rows, -similarity))[:, : found + 1]
            similarity, rows = np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1)
        return similarity[:, :found], rows[:, :found]

    def _blocks(self, first: int, last: int, columns: slice | None):
        if columns is None:
            yield first, self.vectors[first:last]
            return
        step = max(1, BLOCK_NUMBERS // (columns.stop - columns.start))
        for start in range(first, last, step):
            yield start, normalise(self.vectors[start : min(start + step, last), columns])


def nearest(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(inner products float32 [Q, k], rows int64 [Q, k]) of the k largest, equals in the order of their rows.

    FAISS finds a few more than k, in float32 and with equals in any order; float64 decides among them. So an answer does not
    depend on how many ask at once, and a smaller k gives the beginning of a larger one's answer.
    """
    wide = min(k + MARGIN, len(vectors))
    candidates = _faiss(queries, vectors, wide)
    similarity, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for i, query in enumerate(queries):
        among = np.sort(candidates[i])
        scores = _inner(vectors[among], query)
        order = np.argsort(-scores, kind="stable")
        if wide < len(vectors) and scores[order[k - 1]] - scores[order[-1]] < NOISE:  # more equals than were found: look at all
            among, scores = np.arange(len(vectors)), _inner(vectors, query)
            order = np.argsort(-scores, kind="stable")
        similarity[i], rows[i] = scores[order[:k]], among[order[:k]]
    return similarity, rows


def _inner(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Inner products [N], summed in float64, as float32."""
    return np.einsum("nf,f->n", vectors, query, dtype=np.float64).astype(np.float32)


def _faiss(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Rows [Q, k] of the k largest inner products: on the GPU where FAISS sees one."""
    if faiss.get_num_gpus():
        return faiss.knn_gpu(faiss.StandardGpuResources(), queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1]


def folder_of(store: Store, name: str | None) -> Path:
    """The folder of an index; without a name `errors`, or the only one. Raises BadRequest if there is none, or a choice."""
    names = sorted(p.name for p in (store.run / "index").glob("*") if p.is_dir())
    if not names:
        raise BadRequest(f"{printable(store.run)} has no index: build one with faultline index --run {printable(store.run)}")
    if name is None:
        name = "errors" if "errors" in names else names[0]
        if name != "errors" and len(names) > 1:
            raise BadRequest(f"--name: this run has several indexes, say which: {', '.join(map(printable, names))}")
    if name not in names:
        raise BadRequest(f"--name: there is no index '{printable(name)}'; there is {closest(name, names)}")
    return store.run / "index" / name
