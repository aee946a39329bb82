"""`faultline neighbors`: the neighbours of every sample of a data set, as one batch job into one Parquet file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from index.build import FACTS
from index.evaluate import chances
from index.run import NEIGHBOURS, Run
from jobs.progress import ProgressBar
from pipeline.atomic import replace_file
from pipeline.errors import BadRequest, printable
from pipeline.statistics import Reference
from pipeline.store import saliency_of

BLOCK = 256  # queries searched at once
COLUMNS = pa.schema([("query_dataset", pa.string()), ("query_id", pa.string()), ("query_label", pa.int32()), ("query_prediction", pa.int32()), *NEIGHBOURS])


@dataclass(frozen=True)
class Agreement:
    """Of all (query, neighbour) pairs the share whose (label, prediction) is the same, the reverse, or either; and the share that is either
    when the neighbours are drawn at random from the same errors."""

    queries: int
    k: int
    same: float
    reverse: float
    either: float
    chance: float


def neighbors(run: Run, source: str, within: str | None, k: int, out: Path, layers: str | None, name: str | None, everyone: bool) -> int:
    """Write the k neighbours of every misclassified sample of `source` (of every sample, with `everyone`); returns how many queries.

    Columns: query_dataset, query_id, query_label, query_prediction, then those of `Run.neighbors`; ordered by query, then rank.
    Raises BadRequest for what cannot be asked; `out` appears whole or not at all.
    """
    if k < 1:
        raise BadRequest(f"-k: {k} neighbours cannot be given; ask for 1 or more")
    refuse_inside(run, out, "--out")
    if out.suffix != ".parquet" or not out.absolute().parent.is_dir():
        raise BadRequest(f"--out: {printable(out)} must end in .parquet and lie in a folder that exists")
    total = run.store.progress(source).done if source in run.datasets else run.store.census(source).samples
    index = run.index(name)
    index.range_of(within)
    columns = run.manifest.layers.columns(layers) if layers else None
    standard = Reference.read(run.store.run / "statistics" / f"{index.about['reference']}.parquet", run.manifest.layers)
    asked = 0

    def write(partial: Path) -> None:
        nonlocal asked
        with pq.ParquetWriter(partial, COLUMNS, compression="zstd") as writer, ProgressBar(f"neighbours of {source}", total) as bar:
            seen = 0
            for _, _, batch in run.store.blocks(source, [*FACTS, "saliency"], BLOCK):
                facts = pa.Table.from_batches([batch]).select(FACTS)
                keep = np.arange(batch.num_rows) if everyone else np.flatnonzero(facts["label"].to_numpy() != facts["prediction"].to_numpy())
                if len(keep):
                    writer.write_table(_search(run, index, source, standard.standardise(saliency_of(batch)[keep]), facts.take(keep), k, within, columns))
                asked += len(keep)
                seen += batch.num_rows
                bar.to(seen)

    replace_file(out, write)
    return asked


def refuse_inside(run: Run, path: Path, option: str) -> None:
    """Raises BadRequest for a path among the run's own files, which a result must not replace or join."""
    for own in ("datasets", "profiles", "rejects", "statistics", "index", "experiments"):
        if path.absolute().resolve().is_relative_to((run.store.run / own).absolute().resolve()):
            raise BadRequest(f"{option}: {printable(path)} lies among the run's own files; choose a place outside {printable(run.store.run / own)}")


def _search(run: Run, index, source: str, queries: np.ndarray, facts: pa.Table, k: int, within: str | None, columns: slice | None) -> pa.Table:
    ids, labels, predictions = (facts[c].to_pylist() for c in ("sample_id", "label", "prediction"))
    own = own_rows(index, source, ids)
    tables = []
    for one in (own >= 0, own < 0):  # those that are in the index leave themselves out
        at = np.flatnonzero(one)
        similarity, rows = index.search(queries[at], k, within, columns, own[at])
        tables += [(i, run.table_of(index, s, r, labels[i], predictions[i])) for i, s, r in zip(at.tolist(), similarity, rows)]
    tables.sort(key=lambda pair: pair[0])
    parts = [[source, ids[i], labels[i], predictions[i]] for i, t in tables for _ in range(t.num_rows)]
    head = [pa.array(c, f.type) for c, f in zip(list(zip(*parts)) or [[], [], [], []], COLUMNS)]
    hits = pa.concat_tables([t for _, t in tables])
    return pa.table([*head, *(hits[c].combine_chunks() for c in NEIGHBOURS.names)], schema=COLUMNS)


def own_rows(index, dataset: str, ids: list[str]) -> np.ndarray:
    """int64 [Q]: the index row of each sample of a data set, -1 where it is not indexed."""
    if dataset not in index.datasets:
        return np.full(len(ids), -1)
    first, last = index.range_of(dataset)
    at = pc.index_in(pa.array(ids, pa.string()), index.rows["sample_id"].slice(first, last - first).combine_chunks())
    found = at.fill_null(-1).to_numpy().astype(np.int64)
    return np.where(found >= 0, found + first, -1)


def refuse_empty(run: Run, source: str, within: str | None, name: str | None) -> None:
    """Before anything is written: raises BadRequest where nobody would ask, or nobody could be found, so that there is nothing to evaluate."""
    start, stop = run.index(name).range_of(within)
    if start == stop:
        raise BadRequest(f"--in: the index holds no sample of {printable(within) if within else 'any data set'}, so that there are no neighbours to evaluate: name another data set, or leave --evaluate out")
    if not any((b["label"].to_numpy() != b["prediction"].to_numpy()).any() for _, _, b in run.store.blocks(source, ["label", "prediction"], 65536)):
        raise BadRequest(f"--from: {printable(source)} has no misclassified sample, so that there are no neighbours to evaluate: name another data set, or leave --evaluate out")


def evaluate(run: Run, out: Path, within: str | None, name: str | None) -> Agreement:
    """How often the neighbours in `out` share their query's (label, prediction) pair or its reverse, beside chance (paper, section 3.2)."""
    table = pq.read_table(out, columns=["query_dataset", "query_id", "query_label", "query_prediction", "rank", "pair"])
    if not table.num_rows:
        raise BadRequest(f"{printable(out)} holds no neighbours to evaluate: no misclassified sample asked, or {printable(within) if within else 'the index'} has none to be found")
    share = {kind: pc.mean(pc.equal(table["pair"], kind)).as_py() for kind in ("same", "reverse")}
    first = table.filter(pc.equal(table["rank"], 1))
    index = run.index(name)
    start, stop = index.range_of(within)
    gallery = index.rows.slice(start, stop - start)
    own = own_rows(index, first["query_dataset"][0].as_py(), first["query_id"].to_pylist())
    asked = (first[c].to_numpy() for c in ("query_label", "query_prediction"))
    chance = chances(gallery["label"].to_numpy(), gallery["prediction"].to_numpy(), *asked, (own >= start) & (own < stop))
    return Agreement(first.num_rows, int(pc.max(table["rank"]).as_py()), share["same"], share["reverse"], share["same"] + share["reverse"], float(chance.mean()))
