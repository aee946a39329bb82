"""How much neighbours agree on why they fail (paper, section 3.2): the nearest of every error under several settings, by one pass over the profiles.

An `Experiment` of `pipeline/experiment.py` that needs profiles alone. Vectors are standardised, normalised and compared a block at a time, so that all samples
may be neighbours without an index of them; the neighbours are those of a cosine search in float32, equals in the order of the profiles.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from index.build import normalise
from index.run import pair_of
from pipeline.errors import BadRequest, closest, printable
from pipeline.experiment import Choice, Rows
from pipeline.filters import FilterLayout
from pipeline.manifest import Manifest
from pipeline.statistics import Reference
from pipeline.store import Store, saliency_of

K = 50  # neighbours that are looked at
SETTINGS = ("standardised", "unstandardised", "first", "last", "all_samples", "random")
LEVELS = 4  # of each of red, green and blue in a colour histogram
COLUMNS = pa.schema(
    [("sample_id", pa.string()), ("label", pa.int32()), ("prediction", pa.int32()), ("setting", pa.string()), ("rank", pa.int32()), ("neighbor_dataset", pa.string()), ("neighbor_id", pa.string()),
     ("neighbor_label", pa.int32()), ("neighbor_prediction", pa.int32()), ("similarity", pa.float32()), ("pair", pa.string()), ("colour_distance", pa.float32())]
)  # fmt: skip


def ends(layout: FilterLayout, split: str | None) -> tuple[slice, slice]:
    """The first and the last columns of a vector: thirds of its filters, or all up to the layer `split`, itself included, and all after it.

    Raises BadRequest for a layer that is not there, or has none after it.
    """
    if split is None:
        third = max(1, layout.total // 3)
        return slice(0, third), slice(layout.total - third, layout.total)
    if split not in layout.slices:
        raise BadRequest(f"--split: this network has no layer '{printable(split)}'; close to it: {closest(split, layout.slices)} (all of them: run.json, \"layers\")")
    at = layout.slices[split].stop
    if at == layout.total:
        raise BadRequest(f"--split: '{split}' is the last layer, nothing comes after it: name an earlier one")
    return slice(0, at), slice(at, layout.total)


def colours(thumbnail: bytes) -> np.ndarray:
    """float32 [64]: which share of an image's pixels has each of 4 x 4 x 4 colours; of a thumbnail that cannot be decoded NaN."""
    try:
        with Image.open(io.BytesIO(thumbnail), formats=("JPEG",)) as image:
            pixels = np.asarray(image.convert("RGB"), np.int64) * LEVELS // 256
    except Exception:  # PIL's decoders raise almost anything on a damaged file
        return np.full(LEVELS**3, np.nan, np.float32)
    codes = (pixels[..., 0] * LEVELS + pixels[..., 1]) * LEVELS + pixels[..., 2]
    return (np.bincount(codes.reshape(-1), minlength=LEVELS**3) / codes.size).astype(np.float32)


def colour_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[...]: half the sum of absolute differences of histograms [..., 64]: 0 for the same colours, 1 for none in common."""
    return np.abs(a - b).sum(-1) / 2


def chances(label: np.ndarray, prediction: np.ndarray, asked_label: np.ndarray, asked_prediction: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """float64 [Q]: the share of samples [N] with the pair of each query [Q] or its reverse, itself left out where it is among them (`inside`, bool [Q])."""
    size = int(max(a.max(initial=0) for a in (label, prediction, asked_label, asked_prediction))) + 1
    counts: dict[int, int] = dict(zip(*(v.tolist() for v in np.unique(label.astype(np.int64) * size + prediction, return_counts=True))))
    out = []
    for a, b, itself in zip(asked_label.tolist(), asked_prediction.tolist(), inside.tolist()):
        alike = counts.get(a * size + b, 0) - int(itself) + (counts.get(b * size + a, 0) if a != b else 0)
        out.append(alike / max(1, len(label) - int(itself)))
    return np.array(out)


@dataclass(frozen=True)
class Evaluation:
    """The experiment: for every chosen error of `source`, its `k` nearest in `datasets`, under each of `SETTINGS`.

    standardised: ŝ, among errors; unstandardised: s̄, among errors; first, last: the ends of ŝ, among errors; all_samples: ŝ, among all; random: errors drawn by `seed`.
    A sample is never its own neighbour.
    """

    layout: FilterLayout
    source: str
    datasets: tuple[str, ...]
    reference: str
    split: str | None
    seed: int
    k: int = K
    name: str = "neighbors"
    images: bool = False
    columns: tuple[str, ...] = ("saliency", "thumbnail")
    weight: float = 1.0

    @property
    def schema(self) -> pa.Schema:
        """`COLUMNS`: rank from 1; colour_distance null where the neighbour is no error or an image cannot be read; similarity null for `random`."""
        return COLUMNS

    def settings(self) -> dict[str, object]:
        return {"datasets": list(self.datasets), "split": self.split, "k": self.k}

    def start(self, run: Path, device: str) -> Rows:
        search = Search(self, Store(run))
        return lambda samples, profiles: search.rows(profiles)


class Search:
    """One worker's view of the samples among which neighbours are sought: facts of all in memory, their vectors streamed."""

    def __init__(self, evaluation: Evaluation, store: Store):
        self.evaluation, self.store = evaluation, store
        self.standard = Reference.read(store.run / "statistics" / f"{evaluation.reference}.parquet", Manifest.read(store.run).layers)

    @cached_property
    def facts(self) -> pa.Table:
        """dataset, sample_id, label, prediction of all, in the order in which the profiles are streamed."""
        parts = []
        for dataset in self.evaluation.datasets:
            for _, _, batch in self.store.blocks(dataset, ["sample_id", "label", "prediction"], 65536):
                parts.append(pa.Table.from_batches([batch]).add_column(0, "dataset", pa.array([dataset] * batch.num_rows, pa.string())))
        return pa.concat_tables(parts).combine_chunks()

    @cached_property
    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """(label, prediction) of all, int32 [N]."""
        return self.facts["label"].to_numpy(), self.facts["prediction"].to_numpy()

    @cached_property
    def errors(self) -> np.ndarray:
        """int64: which of all are misclassified."""
        return np.flatnonzero(self.classes[0] != self.classes[1])

    @cached_property
    def place(self) -> dict[str, int]:
        """Row of each sample of the source, where it is among those that are sought."""
        return {i: row for row, (dataset, i) in enumerate(zip(self.facts["dataset"].to_pylist(), self.facts["sample_id"].to_pylist())) if dataset == self.evaluation.source}

    @cached_property
    def histograms(self) -> np.ndarray:
        """float32 [errors, 64], in the order of `errors`."""
        found = []
        for dataset in self.evaluation.datasets:
            for _, _, batch in self.store.blocks(dataset, ["label", "prediction", "thumbnail"]):
                for row in np.flatnonzero(batch["label"].to_numpy() != batch["prediction"].to_numpy()):
                    found.append(colours(batch["thumbnail"][row].as_py()))
        return np.array(found, np.float32).reshape(-1, LEVELS**3)

    def rows(self, profiles: pa.Table) -> pa.Table:
        """`COLUMNS` for queries given as profile rows."""
        ids = profiles["sample_id"].to_pylist()
        own = np.array([self.place.get(i, -1) for i in ids])
        found = self.nearest(saliency_of(profiles), own) | {"random": (None, self._random(ids, own))}
        palette = np.stack([colours(thumbnail) for thumbnail in profiles["thumbnail"].to_pylist()])
        return pa.concat_tables([self._table(profiles, palette, setting, *found[setting]) for setting in SETTINGS])

    def nearest(self, queries: np.ndarray, own: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """setting -> (cosines float32 [Q, k'], rows int64 [Q, k'] among all), best first. queries: s̄ [Q, F]; own: the row of each query itself, or -1."""
        first, last = ends(self.evaluation.layout, self.evaluation.split)
        standardised = self.standard.standardise(queries)
        asked = {"all_samples": normalise(standardised), "unstandardised": normalise(queries), "first": normalise(standardised[:, first]), "last": normalise(standardised[:, last])}
        best = {setting: Best(own, self.evaluation.k) for setting in SETTINGS if setting != "random"}
        start = 0
        for dataset in self.evaluation.datasets:
            for _, _, batch in self.store.blocks(dataset, ["label", "prediction", "saliency"], 512):
                raw = saliency_of(batch)
                wrong = np.flatnonzero(batch["label"].to_numpy() != batch["prediction"].to_numpy())
                vectors = self.standard.standardise(raw)
                similarity = asked["all_samples"] @ normalise(vectors).T
                best["all_samples"].see(similarity, np.arange(start, start + len(raw)))
                best["standardised"].see(similarity[:, wrong], start + wrong)
                for setting, block in (("unstandardised", raw[wrong]), ("first", vectors[wrong][:, first]), ("last", vectors[wrong][:, last])):
                    best[setting].see(asked[setting] @ normalise(block).T, start + wrong)
                start += len(raw)
        return {setting: kept.sorted() for setting, kept in best.items()}

    def _random(self, ids: list[str], own: np.ndarray) -> np.ndarray:
        """int64 [Q, k']: errors drawn without replacement, for each sample by its ID and the seed alone; its own row is not among them."""
        drawn = []
        for sample_id, row in zip(Choice("all", self.evaluation.seed).hashes(ids), own):
            others = self.errors[self.errors != row]
            drawn.append(np.random.default_rng([self.evaluation.seed, int(sample_id)]).choice(others, min(self.evaluation.k, len(others)), replace=False))
        shortest = min(map(len, drawn))
        return np.array([d[:shortest] for d in drawn], np.int64).reshape(len(ids), shortest)

    def _table(self, profiles: pa.Table, palette: np.ndarray, setting: str, similarity: np.ndarray | None, rows: np.ndarray) -> pa.Table:
        queries, k = rows.shape
        flat = rows.reshape(-1)
        label, prediction = (profiles[c].to_numpy()[:, None] for c in ("label", "prediction"))
        there = [self.classes[i][rows] for i in (0, 1)]
        at = np.searchsorted(self.errors, rows).clip(0, max(0, len(self.errors) - 1))
        wrong = there[0] != there[1]
        distance = colour_distance(palette[:, None], self.histograms[at]) if len(self.errors) else np.full(rows.shape, np.nan)
        hits = self.facts.take(pa.array(flat))
        asking = profiles.select(["sample_id", "label", "prediction"]).take(pa.array(np.repeat(np.arange(queries), k)))
        columns = [
            *asking.columns, pa.array([setting] * len(flat), pa.string()), pa.array(np.tile(np.arange(1, k + 1, dtype=np.int32), queries)),
            hits["dataset"], hits["sample_id"], hits["label"], hits["prediction"],
            pa.nulls(len(flat), pa.float32()) if similarity is None else pa.array(similarity.reshape(-1), pa.float32()),
            pa.array(pair_of(*there, label, prediction).reshape(-1), pa.string()),
            pa.array(distance.reshape(-1), pa.float32(), mask=~(wrong & np.isfinite(distance)).reshape(-1)),
        ]  # fmt: skip
        return pa.table(columns, schema=COLUMNS)


class Best:
    """The k largest cosines of each query so far, itself left out; equals in the order in which they are seen."""

    def __init__(self, own: np.ndarray, k: int):
        self.own, self.k = own, k
        self.similarity, self.rows = np.zeros((len(own), 0), np.float32), np.zeros((len(own), 0), np.int64)

    def see(self, similarity: np.ndarray, rows: np.ndarray) -> None:
        """Another block: similarity float32 [Q, n], rows int64 [n], larger than those before."""
        similarity = np.hstack([self.similarity, np.where(rows == self.own[:, None], -np.inf, similarity)])
        every = np.hstack([self.rows, np.broadcast_to(rows, (len(self.own), len(rows)))])
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : self.k + 1]
        self.similarity, self.rows = np.take_along_axis(similarity, order, 1), np.take_along_axis(every, order, 1)

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Best first; as many as every query has, at most k."""
        most = min(self.k, int(np.isfinite(self.similarity).sum(1).min(initial=self.k)))
        return self.similarity[:, :most], self.rows[:, :most]
