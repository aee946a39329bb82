"""How salient a sample's filters are, and where in the network: ŝ by layer and by depth (paper, section 2.1, figures 1 and 2).

Depth counts layers, as the figures do, whatever their number of filters: the mean of ŝ over a layer's filters, then over the layers of a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.experiment import Rows
from pipeline.filters import FilterLayout
from pipeline.manifest import Manifest
from pipeline.samples import Sample
from pipeline.statistics import Reference
from pipeline.store import saliency_of


def layer_means(vectors: np.ndarray, layout: FilterLayout, live: np.ndarray) -> np.ndarray:
    """The mean of ŝ [N, F] over the live filters of each layer, float64 [N, L]; 0 where all of a layer are dead. live: bool [F]."""
    out = np.zeros((len(vectors), len(layout.layers)))
    for at, columns in enumerate(layout.slices.values()):
        alive = np.flatnonzero(live[columns]) + columns.start
        if len(alive):
            out[:, at] = vectors[:, alive].mean(1, dtype=np.float64)
    return out


def parts(layers: int) -> tuple[slice, slice, slice]:
    """The early, the middle and the deep third of L layers, as slices; the early and the deep one are equally long."""
    third = max(1, layers // 3)
    return slice(0, third), slice(third, layers - third), slice(layers - third, layers)


def sorted_within_layers(vector: np.ndarray, layout: FilterLayout, beside: np.ndarray | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """One vector [F] cut into its layers, shallow to deep, each sorted from its largest to its smallest value; with each the numbers that stood `beside` its own, [F] (None: zeros), in the same order."""
    beside = np.zeros_like(vector) if beside is None else beside
    orders = [columns.start + np.argsort(-vector[columns], kind="stable") for columns in layout.slices.values()]
    return [(vector[order], beside[order]) for order in orders]


@dataclass(frozen=True)
class DepthProfile:
    """An `Experiment` that needs profiles alone: mean ŝ of each sample, over all filters, by layer and by third of the layers."""

    layout: FilterLayout
    reference: str
    name: str = "profile"
    images: bool = False
    columns: tuple[str, ...] = ("saliency",)
    weight: float = 0.02

    @property
    def schema(self) -> pa.Schema:
        """saliency: mean ŝ over all F filters, the dead ones counting 0; early, middle, deep: the means of `layers` over the thirds; layers: see `layer_means`."""
        numbers = [(name, pa.float32()) for name in ("saliency", "early", "middle", "deep")]
        return pa.schema([("sample_id", pa.string()), ("label", pa.int32()), ("prediction", pa.int32()), *numbers, ("layers", pa.list_(pa.field("element", pa.float32()), len(self.layout.layers)))])

    def settings(self) -> dict[str, object]:
        return {}

    def start(self, run: Path, device: str) -> Rows:
        standard = Reference.read(run / "statistics" / f"{self.reference}.parquet", Manifest.read(run).layers)
        return lambda samples, profiles: self.rows(samples, profiles, standard)

    def rows(self, samples: list[Sample], profiles: pa.Table, standard: Reference) -> pa.Table:
        """One row a profile row."""
        vectors = standard.standardise(saliency_of(profiles))
        layers = layer_means(vectors, self.layout, standard.live)
        thirds = [layers[:, part].mean(1) if part.stop > part.start else np.zeros(len(layers)) for part in parts(layers.shape[1])]
        numbers = [pa.array(column, pa.float32()) for column in (vectors.mean(1, dtype=np.float64), *thirds)]
        by_layer = pa.FixedSizeListArray.from_arrays(pa.array(layers.astype(np.float32).reshape(-1)), type=self.schema.field("layers").type)
        return pa.table([profiles["sample_id"], profiles["label"], profiles["prediction"], *numbers, by_layer], schema=self.schema)
