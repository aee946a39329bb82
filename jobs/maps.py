"""`faultline explain --all-errors`: an input saliency map of every misclassified sample of a data set (eq. 3 and 4), as rows that programs read, and a sheet of some of them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from jobs.experiment import Request, carry_out, standards
from jobs.explain import Wanted, check_explainable
from jobs.prune import filters_of
from pipeline.errors import BadRequest
from pipeline.experiment import Choice, Rows, batches, images_of, network_of, read_results
from pipeline.intervals import FEW, Interval, bootstrap_mean, share_mean
from pipeline.interventions.choice import choose
from pipeline.samples import Sample
from pipeline.statistics import Reference
from pipeline.store import Store, saliency_of

TOGETHER = 8  # samples of one call
EXAMPLES = 8  # on the sheet
HOT = 0.05  # of the pixels, whose part of a map's heat is told
QUALITY = 90  # of the pictures' JPEG
SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("label", pa.int32()), ("prediction", pa.int32()), ("filters", pa.list_(pa.int32())), ("standardised", pa.list_(pa.float32())), ("distance", pa.float64()),
     ("height", pa.int32()), ("width", pa.int32()), ("heat", pa.binary()), ("peak", pa.float64()), ("hot", pa.float64()), ("picture", pa.binary())]
)  # fmt: skip


@dataclass(frozen=True)
class Mapping:
    """The experiment. k, boost, layers, copies, share, seed: see `jobs.explain.Wanted`; `reference` standardises."""

    reference: str
    wanted: Wanted
    name: str = "explain"
    images: bool = True
    columns: tuple[str, ...] = ("saliency",)
    schema: pa.Schema = SCHEMA

    @property
    def weight(self) -> float:
        return 4.0 * (1 + self.wanted.copies)  # a map is worth some four extractions, and images go through together as there

    def settings(self) -> dict[str, object]:
        w = self.wanted
        return {"k": w.k, "boost": w.boost, "layers": w.layers, "smooth": w.copies, "noise": w.share if w.copies else None}

    def start(self, run: Path, device: str) -> Rows:
        import torch

        from pipeline.explanation.heat import heat
        from pipeline.explanation.input_saliency import InputSaliency

        manifest, network = network_of(run, device)
        standard = Reference.read(run / "statistics" / f"{self.reference}.parquet", manifest.layers)
        engine, wanted, among = InputSaliency(network, standard, manifest.aggregation), self.wanted, standard.live.copy()
        if wanted.layers:
            span = manifest.layers.columns(wanted.layers)
            among[: span.start] = among[span.stop :] = False

        def rows(samples, profiles):
            found = []
            for at in batches(samples, TOGETHER):
                facts, images = profiles.take(pa.array(at)), images_of([samples[i] for i in at], manifest.preprocessing, device)
                vectors = standard.standardise(saliency_of(facts))
                filters = [choose("salient", wanted.k, vector, among, wanted.seed, "") for vector in vectors]
                ask = (images, torch.tensor([samples[i].label for i in at], device=device), filters, wanted.boost)
                explained = engine.smooth(*ask, wanted.copies, wanted.share, wanted.seed) if wanted.copies else engine(*ask)
                heats, distances = heat(explained.maps).float().cpu().numpy(), explained.distance.tolist()
                found += [_row(samples[i], fact, columns, vector[columns], distance, hot) for i, fact, columns, vector, distance, hot in zip(at, facts.drop_columns(["saliency"]).to_pylist(), filters, vectors, distances, heats)]
            return pa.Table.from_pylist(found, SCHEMA)

        return rows


def _row(sample: Sample, fact: dict, filters: np.ndarray, standardised: np.ndarray, distance: float, heat: np.ndarray) -> dict:
    if not np.isfinite(heat).all():
        heat, distance = np.zeros_like(heat), float("nan")
    peak, hottest = float(heat.max()), np.sort(heat.astype(np.float64), None)[::-1]
    out = io.BytesIO()
    Image.fromarray(sample.pixels).save(out, "JPEG", quality=QUALITY)
    return {
        "sample_id": fact["sample_id"], "label": fact["label"], "prediction": fact["prediction"], "filters": filters.tolist(), "standardised": standardised.tolist(), "distance": distance,
        "height": heat.shape[0], "width": heat.shape[1], "heat": (heat / (peak or 1.0)).astype("<f2").tobytes(), "peak": peak,
        "hot": float(hottest[: max(1, round(HOT * heat.size))].sum() / (hottest.sum() or 1.0)), "picture": out.getvalue(),
    }  # fmt: skip


def heat_of(row: dict) -> np.ndarray:
    """float32 [H, W] of a row, in the unit of eq. 4."""
    return np.frombuffer(row["heat"], "<f2").reshape(row["height"], row["width"]).astype(np.float32) * np.float32(row["peak"])


@dataclass(frozen=True)
class Maps:
    """The verb."""

    experiment: Mapping
    subset: str = "errors"
    figures: tuple[str, ...] = ("maps",)
    also: tuple[str, ...] = ()

    def check(self, store: Store, samples: list[Sample]) -> None:
        """Raises BadRequest if which pixels matter cannot be asked of the network."""
        check_explainable(store, self.experiment.reference, samples)

    def cost(self, samples: int) -> str:
        copies = self.experiment.wanted.copies
        return f"{samples:,} maps{f' of {copies + 1} images each' if copies else ''}, each about four passes forward and back"

    def summarise(self, store: Store, dataset: str, reference: Reference, rows: pa.Table) -> dict:
        """How concentrated maps are, and which samples are on the sheet: those with the smallest seeded hashes."""
        w = self.experiment.wanted
        known = rows.filter(pc.is_finite(rows["distance"]))
        if not known.num_rows:
            raise BadRequest("the network's gradient is not finite (NaN or infinity) for any of these images: nothing can be explained")
        order = np.argsort(Choice("all", w.seed).hashes(known["sample_id"].to_pylist()), kind="stable")[:EXAMPLES]
        hot, n = share_mean(known["hot"].to_numpy()), known.num_rows
        summary = {"dataset": dataset, "samples": n, "not_finite": rows.num_rows - n, "k": w.k, "boost": w.boost, "hot": hot.to_json(), "distance": bootstrap_mean(known["distance"].to_numpy(), w.seed, ends=(0.0, 2.0)).to_json()}
        summary["examples"] = known["sample_id"].take(pa.array(order)).to_pylist()
        result = {"samples": n, "hot": hot.estimate, "distance": summary["distance"]["estimate"]}
        return summary | {"result": result, "found": found(summary)}

    def draw(self, store: Store, summary: dict, folder: Path) -> None:
        from jobs import heatmaps
        from pipeline.explanation.heat import display

        import torch

        table, names = read_results(store.run, self.experiment.name, SCHEMA), store.manifest().class_names
        rows = {row["sample_id"]: row for row in table.filter(pc.is_in(table["sample_id"], pa.array(summary["examples"], pa.string()))).to_pylist()}
        tiles = []
        for row in (rows[i] for i in summary["examples"]):
            named = {f"{key}_name": names[row[key]] if names and row[key] < len(names) else None for key in ("label", "prediction")}
            tiles.append((row | named | {"dataset": summary["dataset"]}, np.asarray(Image.open(io.BytesIO(row["picture"]))), display(torch.from_numpy(heat_of(row))[None])[0]))
        heatmaps.sheet(folder / "maps", tiles, f"What {len(tiles)} errors of {summary['dataset']} hang on")


def found(summary: dict) -> str:
    n, hot = summary["samples"], Interval(**summary["hot"])
    few = f"; {'1 is' if n == 1 else f'{n:,} are'} too few to conclude anything from" if n < FEW else ""
    lost = f"; {summary['not_finite']:,} more have a gradient that is not finite" if summary["not_finite"] else ""
    return f"maps of {n:,} misclassified samples: the hottest {HOT:.0%} of the pixels hold {hot.text(3)} of a map's heat{lost}{few}"


def all_errors(request: Request, wanted: Wanted) -> dict:
    """Do it. Raises BadRequest for settings that cannot be."""
    wanted.check()
    store = Store(request.run.expanduser().absolute())
    manifest, reference = store.manifest(), request.reference_of(store, request.dataset_of(store))
    live = filters_of(manifest.layers, wanted.layers, standards(store, reference, manifest.aggregation))
    if wanted.k > live:
        raise BadRequest(f"-k: {wanted.k} is more than the {live:,} live filters that there are")
    return carry_out(Maps(Mapping(reference, wanted)), request)
