"""`faultline bench index`: building an index, searching it in batches beside the plain matrix product, and one query by ID, warm and cold.

The run is made up: profiles of every row are written as an extraction writes them, with error modes that lie close to each other, and all
that follows is the line's own code.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from index import Run
from index.build import build
from index.search import Index
from jobs.bench.measure import Measure, medians
from jobs.neighbors import BLOCK
from jobs.progress import say
from pipeline.census import Census
from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout
from pipeline.manifest import Manifest
from pipeline.samples import Preprocessing
from pipeline.sources import Shard
from pipeline.store import REJECTS, Store, profiles_schema
from pipeline.units import Unit

UNIT, MODES, K = 1000, 50, 10
COMMAND = "import sys; from jobs.cli import main; sys.argv[0] = 'faultline'; main()"


def bench_index(rows: int, filters: int, rounds: int) -> list[Measure]:
    """Raises BadRequest for what cannot be measured."""
    for value, option, least in ((rows, "--rows", K + 1), (filters, "--filters", 1), (rounds, "--rounds", 1)):
        if value < least:
            raise BadRequest(f"{option}: {value} is less than {least}")
    with tempfile.TemporaryDirectory(prefix="faultline-bench-") as folder:
        store = made_up(Path(folder), rows, filters)
        turns = {"build": lambda: build(store, ["val"], "val", "errors", "errors"), "read": lambda: [b for f in store.blocks("val", ["saliency"]) for b in f]}
        seconds = medians(turns, min(rounds, 3))
        found = [Measure.over("build: statistics and index", rows / seconds["build"], "vectors/s", "reading the profiles once", rows / seconds["read"])]
        found += _searches(Run.open(store.run).index(), rounds)
        return found + _queries(store.run, rows, rounds)


def made_up(folder: Path, rows: int, filters: int) -> Store:
    """A run of `rows` errors in `MODES` modes; saliency is log-normal, as real profiles nearly are."""
    say(f"writing {rows:,} profiles of {filters:,} filters")
    store = Store(folder / "run")
    preprocessing = Preprocessing(resize=None, crop=None, mean=(0, 0, 0), std=(1, 1, 1))
    Manifest("made-up", "0" * 64, FilterLayout((("conv", filters),)), preprocessing, "abs", "fp32", "fused", 32, 1, UNIT, 10, None, None, {}, "").write(store.run)
    store.write_census("val", Census("made up", "made up", str(folder), (Shard("a.tar", rows, ((0, 0),), ""),), None))
    random = np.random.default_rng(0)
    modes = random.normal(size=(MODES, filters)).astype(np.float32)
    schema = profiles_schema(filters)
    for start in range(0, rows, UNIT):
        n = min(UNIT, rows - start)
        numbers = np.exp(modes[random.integers(MODES, size=n)] + random.normal(size=(n, filters)).astype(np.float32)).astype(np.float32)
        columns = {
            "sample_id": [f"sample_{start + i:08d}" for i in range(n)], "label": np.zeros(n), "prediction": np.ones(n), "label_confidence": np.full(n, 0.1), "prediction_confidence": np.full(n, 0.9),
            "loss": np.full(n, 2.3), "thumbnail": [b""] * n, "shard": ["a.tar"] * n,
        }  # fmt: skip
        saliency = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), type=schema.field("saliency").type)
        table = pa.table({name: saliency if name == "saliency" else pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names}, schema=schema)
        store.commit(Unit("val", "a.tar", start, start + n), [(table, REJECTS.empty_table())])
    return store


def _searches(index: Index, rounds: int) -> list[Measure]:
    """All vectors ask for their 10 nearest, in blocks as `faultline neighbors` asks, beside the product of the same blocks alone."""
    vectors = np.ascontiguousarray(index.vectors)
    rows = np.arange(len(vectors))
    blocks = [slice(i, i + BLOCK) for i in range(0, min(len(vectors), 20 * BLOCK), BLOCK)]
    asked = min(len(vectors), 20 * BLOCK)

    def search() -> None:
        for block in blocks:
            index.search(vectors[block], K, None, None, rows[block])

    def product() -> None:
        numbers = torch.from_numpy(vectors)
        for block in blocks:
            torch.mm(numbers[block], numbers.T)

    seconds = medians({"search": search, "product": product}, rounds)
    return [Measure.over("batch search of 10 neighbours", asked / seconds["search"], "queries/s", "the plain matrix product", asked / seconds["product"])]


def _queries(run: Path, rows: int, rounds: int) -> list[Measure]:
    """One query by ID in a warm process, and as a command that starts from nothing, beside a Python that loads the libraries and ends."""
    opened, asked = Run.open(run), f"sample_{rows // 2:08d}"
    warm = medians({"warm query": lambda: opened.neighbors(asked, K)}, max(rounds, 5))["warm query"]

    def command(*words: str) -> None:
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    turns = {"cold command": lambda: command("-c", COMMAND, "query", "--run", str(run), asked), "libraries alone": lambda: command("-c", "import numpy, pyarrow.parquet, faiss, typer, rich.table")}
    cold = medians(turns, rounds)
    return [Measure("one query by ID in a warm process", 1000 * warm, "ms"), Measure.over("one query as a cold command", cold["cold command"], "s", "Python loading its libraries", cold["libraries alone"])]
