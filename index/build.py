"""Profiles -> statistics -> a FAISS cosine index, all streamed: memory holds one block of rows, whatever the run's size.

An index is a folder of three files: `index.faiss` (an `IndexFlatIP` of L2-normalised ŝ), `rows.parquet` (which sample each vector is)
and `index.json` (what it was built from), written in that order. A reader believes the first two only if they carry the
identity that the third one states, so an index that is half rebuilt is never searched.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.atomic import at, regular, replace_file, write_json
from pipeline.errors import BadRequest, printable
from pipeline.locks import hold
from pipeline.statistics import Reference, moments
from pipeline.store import Store, rows_of, saliency_of

SUBSETS = ("errors", "all")
FACTS = ("sample_id", "label", "prediction", "label_confidence", "prediction_confidence", "loss")
ROWS = pa.schema(
    [("dataset", pa.string()), ("sample_id", pa.string()), ("label", pa.int32()), ("prediction", pa.int32()), ("label_confidence", pa.float32()),
     ("prediction_confidence", pa.float32()), ("loss", pa.float32()), ("profile", pa.string()), ("position", pa.int32())]
)  # profile, position: the profile file and the row in it  # fmt: skip


@dataclass(frozen=True)
class Built:
    """What `build` made: its folder, the number of vectors of each data set, and how many filters are dead."""

    folder: Path
    rows: dict[str, int]
    dead: int


def build(store: Store, datasets: list[str], reference: str, subset: str, name: str, tick: Callable[[str, int, int], None] = lambda *_: None) -> Built:
    """Build `index/<name>` over `datasets`, standardised by `reference` (a data set of the run, or imported statistics).

    `tick(stage, samples done, samples in all)` is called as it goes. Raises BadRequest while an extraction is unfinished, for statistics of
    another network or aggregation, for an ID that stands twice in a data set, and if there is nothing to index.
    """
    manifest = store.manifest()
    for dataset in dict.fromkeys([*datasets, *([reference] if reference in store.datasets() else [])]):
        progress = store.progress(dataset)
        if progress.pending:
            raise BadRequest(f"{printable(dataset)} is unfinished: {progress.pending:,} of {progress.samples:,} samples are still to do; run its faultline extract command again, then index")
        _refuse_duplicates(store, dataset)
    standard = ensure_reference(store, reference, tick)
    if standard.aggregation != manifest.aggregation:
        raise BadRequest(f"--reference: {printable(reference)} was aggregated as '{standard.aggregation}', this run as '{manifest.aggregation}'; the two are never mixed")
    counts = {dataset: sum(len(_kept(batch, subset)) for _, _, batch in store.blocks(dataset, ["label", "prediction"], 65536)) for dataset in datasets}
    if not sum(counts.values()):
        raise BadRequest(f"there is no misclassified sample in {', '.join(map(printable, datasets))}: nothing to index; --subset all indexes every sample")
    about = identity(store, datasets, reference, subset)
    about |= {"rows": sum(counts.values()), "rows_by_dataset": counts, "filters": manifest.layers.total, "dead_filters": int((~standard.live).sum())}
    folder = store.run / "index" / name
    with hold(folder.with_name(f".{name}.lock"), store.run, f"another job is building the index {printable(folder)}: wait for it, or give another --name"):
        _write(store, folder, datasets, subset, standard, about, tick)
    return Built(folder, counts, about["dead_filters"])


def _write(store: Store, folder: Path, datasets: list[str], subset: str, standard: Reference, about: dict, tick) -> None:
    """The three files, `index.json` last. Raises BadRequest if what they are built from changes meanwhile; the old index is then still there."""

    folder.mkdir(exist_ok=True)

    parity = np.uint32(0)

    def write(partial: Path) -> None:
        nonlocal parity
        rows_partial = folder / f".rows.{partial.name}"
        with open(partial, "wb") as out, pq.ParquetWriter(rows_partial, ROWS.with_metadata({"identity": about["identity"]}), compression="zstd", write_page_checksum=True) as rows:
            out.write(flat_header(about["rows"], about["filters"]))
            for dataset in datasets:
                for vectors, table in _rows(store, dataset, subset, standard, tick):
                    vectors = np.ascontiguousarray(vectors, "<f4")
                    out.write(vectors.data)
                    parity ^= parity_of(vectors)
                    rows.write_table(table)
        if identity(store, datasets, about["reference"], subset)["identity"] != about["identity"]:
            raise _changed(datasets)
        (folder / "index.json").unlink(missing_ok=True)  # from here to the new one there is no index; until here the old one serves
        rows_partial.replace(folder / "rows.parquet")

    for stale in [*folder.glob(".*.tmp"), *folder.glob(".rows.*")]:  # of a build that died
        stale.unlink(missing_ok=True)
    try:
        replace_file(folder / "index.faiss", write, at("index"))
    finally:
        for stale in folder.glob(".rows.*"):
            stale.unlink(missing_ok=True)
    write_json(folder / "index.json", about | {"parity": int(parity)})


def parity_of(vectors: np.ndarray) -> np.uint32:
    """The bits of all numbers float32 [N, F], in one piece, laid over each other (xor): another as soon as a byte of them is. As fast as memory is."""
    return np.bitwise_xor.reduce(vectors.reshape(-1).view(np.uint32), initial=0)


def _changed(datasets: list[str]) -> BadRequest:
    return BadRequest(f"the profiles of {', '.join(map(printable, datasets))} changed while they were read: an extraction is at work on them; wait for it, then give the same command again")


def ensure_reference(store: Store, reference: str, tick: Callable[[str, int, int], None] = lambda *_: None) -> Reference:
    """mu and sigma under that name: read where they are as new as the profiles, computed and written otherwise.

    Raises BadRequest if the name is neither a data set of the run nor imported statistics.
    """
    layout, path = store.manifest().layers, store.run / "statistics" / f"{reference}.parquet"
    if reference not in store.datasets():
        if not path.exists():
            imported = sorted(p.stem for p in path.parent.glob("*.parquet"))
            known = ", ".join(dict.fromkeys(map(printable, store.datasets() + imported)))
            raise BadRequest(f"--reference: there is neither a data set nor imported statistics named '{printable(reference)}'; there is: {known or 'nothing yet'}")
        return Reference.read(path, layout)
    origin = f"{reference} {profiles_digest(store, reference)}"
    if path.exists():
        stored = Reference.read(path, layout)
        if stored.origin == origin:
            return stored
    total, seen = store.progress(reference).done, 0

    def blocks():
        nonlocal seen
        tick("statistics", 0, total)
        for file, _, batch in store.blocks(reference, ["saliency"]):
            yield _finite(saliency_of(batch), file, reference)
            seen += batch.num_rows
            tick("statistics", seen, total)

    found = moments(blocks(), layout.total)
    if f"{reference} {profiles_digest(store, reference)}" != origin:
        raise _changed([reference])
    if found.count < 2:
        raise BadRequest(f"--reference: {printable(reference)} has {found.count} profiles; a standard deviation needs two or more")
    standard = Reference(found.mean, found.std, found.count, store.manifest().aggregation, origin)
    with hold(path.with_name(f".{reference}.lock"), store.run, f"another job is writing {printable(path)}: give the same command again when it has", 10):
        for stale in path.parent.glob(f".{reference}.parquet.{'[0-9a-f]' * 8}.tmp"):  # of a job that died here
            stale.unlink(missing_ok=True)
        replace_file(path, lambda partial: standard.write(layout, partial), at("statistics"))
    return standard


def profiles_digest(store: Store, dataset: str) -> str:
    """Changes when the profiles of a data set do: over the names and sizes of their files."""
    listing = "\n".join(f"{f.name} {f.stat().st_size}" for f in store.files(dataset))
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def identity(store: Store, datasets: list[str], reference: str, subset: str) -> dict:
    """What an index over these would be built from now; `identity` is the digest of it all."""
    statistics = store.run / "statistics" / f"{reference}.parquet"
    about = {
        "run": store.manifest().fingerprint,
        "datasets": {dataset: profiles_digest(store, dataset) for dataset in datasets},
        "reference": reference,
        "reference_profiles": profiles_digest(store, reference) if reference in store.datasets() else None,
        "statistics_sha256": hashlib.sha256(regular(statistics).read_bytes()).hexdigest() if statistics.exists() else None,
        "subset": subset,
        "metric": "cosine (inner product of L2-normalised standardised filter saliency)",
    }
    return about | {"identity": hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:16]}


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Rows of float32 [N, F] to unit L2 length, however long or short; a zero row stays zero, so that its cosine with anything is 0."""
    lengths = np.sqrt(np.einsum("nf,nf->n", vectors, vectors, dtype=np.float64))  # squares of float32 leave float32's range
    return np.divide(vectors, np.where(lengths > 0, lengths, 1.0)[:, None], out=np.empty(vectors.shape, np.float32), casting="same_kind")


def flat_header(rows: int, filters: int) -> bytes:
    """What FAISS writes before the numbers of an `IndexFlatIP` (a test holds it against FAISS): then rows * filters float32 follow."""
    return struct.pack("<4siqqqBi", b"IxFI", filters, rows, 1 << 20, 1 << 20, 1, 0) + struct.pack("<Q", rows * filters)


def _rows(store: Store, dataset: str, subset: str, standard: Reference, tick):
    """(normalised ŝ float32 [n, F], table of `ROWS`) a block at a time, in the order of the profiles."""
    seen, total = 0, sum(rows_of(f) for f in store.files(dataset))
    tick(f"index {dataset}", 0, total)
    for file, position, batch in store.blocks(dataset, [*FACTS, "saliency"]):
        facts = pa.Table.from_batches([batch])
        keep = _kept(batch, subset)
        seen += batch.num_rows
        tick(f"index {dataset}", seen, total)
        if len(keep):
            standardised = _finite(standard.standardise(saliency_of(batch)[keep]), file, dataset)
            chosen = facts.select(FACTS).take(keep)
            columns = [pa.array([dataset] * len(keep)), *chosen.columns, pa.array([file.name] * len(keep)), pa.array(position + keep, pa.int32())]
            yield normalise(standardised), pa.table(columns, schema=ROWS)


def _finite(rows: np.ndarray, file: Path, dataset: str) -> np.ndarray:
    """Rows that are numbers. Raises BadRequest naming the file of others."""
    if not np.isfinite(rows).all():
        raise BadRequest(f"{printable(file)} holds saliency that is not finite: remove it, and extract {printable(dataset)} again with the same command")
    return rows


def _kept(batch: pa.RecordBatch, subset: str) -> np.ndarray:
    """Positions in a batch of profiles that belong to the subset."""
    return np.flatnonzero(batch["label"].to_numpy() != batch["prediction"].to_numpy()) if subset == "errors" else np.arange(batch.num_rows)


def _refuse_duplicates(store: Store, dataset: str) -> None:
    """Raises BadRequest naming both places of an ID that stands twice. Holds eight bytes a sample, and strings only of suspects."""
    digests = [np.fromiter((hash(i) for i in batch["sample_id"].to_pylist()), np.int64, batch.num_rows) for _, _, batch in store.blocks(dataset, ["sample_id"], 4096)]
    if not digests:
        return
    values, counts = np.unique(np.concatenate(digests), return_counts=True)
    suspects, places = set(values[counts > 1].tolist()), {}
    if not suspects:
        return
    for file, position, batch in store.blocks(dataset, ["sample_id", "shard"], 4096):
        for row, (sample_id, shard) in enumerate(zip(batch["sample_id"].to_pylist(), batch["shard"].to_pylist())):
            if hash(sample_id) not in suspects:
                continue
            here = f"{printable(shard)} (row {position + row} of {file.name})"
            if sample_id in places:
                raise BadRequest(f"the ID '{printable(sample_id)}' stands twice in {printable(dataset)}: in {places[sample_id]} and in {here}; IDs must be unique in a data set: rename one in the source and extract into another --run")
            places[sample_id] = here
