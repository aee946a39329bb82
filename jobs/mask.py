"""`faultline mask`: section 3.4 of the paper over a data set. Of every misclassified sample the pixels that its most salient filters are sensitive to are masked, or pasted
into images of its class that the network is right about, beside as many others; with boxes at hand, those outside the object alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from jobs import annotations, charts
from jobs.experiment import Request, carry_out, standards
from jobs.explain import check_explainable
from jobs.masked import PAIRS, STRATEGIES, columns_of, found, outside_box, transplant, unboxed
from jobs.prune import filters_of
from pipeline.errors import BadRequest, printable
from pipeline.experiment import Choice, Named, Rows, batches, gathered, images_of, network_of
from pipeline.intervals import CHANGE, bootstrap_means, paired_shares, wilson
from pipeline.interventions import masking
from pipeline.interventions.choice import choose
from pipeline.samples import Preprocessing, Sample
from pipeline.statistics import Reference
from pipeline.store import Store, saliency_of

if TYPE_CHECKING:
    import torch

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
NEAR = 0.05  # of the pixels: the share that the paper, and the sentence, are about, or the grid's nearest
HOSTS = 10  # images of a class that a region is pasted into, at most
MAP = 12  # forwards that a map is worth: four passes forward and back
TOGETHER = 8  # maps of one call
SCHEMA = masking.EFFECTS.append(pa.field("unboxed", pa.string()))  # why a sample has no pixels outside its boxes, on each of its rows; null where it has, or where no boxes were asked for


@dataclass(frozen=True)
class Masking:
    """The experiment on `dataset`. shares: of the pixels; fill: see `pipeline/interventions/masking.py`; k, boost, layers: of eq. 3; hosts: images of a class that regions are
    pasted into, at most; boxes: the folder of annotations, or None; annotations: the digest of what these say; `reference` standardises."""

    dataset: str
    reference: str
    shares: tuple[float, ...]
    fill: str
    k: int
    boost: float
    layers: str | None
    hosts: int
    boxes: str | None
    annotations: str | None
    seed: int
    name: str = "mask"
    images: bool = True
    columns: tuple[str, ...] = ("saliency",)
    schema: pa.Schema = SCHEMA

    @property
    def forwards(self) -> int:
        """Of one sample, beside its map."""
        return (len(STRATEGIES) + 2 * bool(self.boxes)) * len(self.shares) + 2 * self.hosts

    @property
    def weight(self) -> float:
        return (MAP + self.forwards) / 3  # an extraction is worth three forwards

    def settings(self) -> dict[str, object]:
        return {"strategies": list(STRATEGIES), "shares": list(self.shares), "fill": self.fill, "k": self.k, "boost": self.boost, "layers": self.layers, "hosts": self.hosts, "boxes": self.boxes} | ({"annotations": self.annotations} if self.boxes else {})

    def start(self, run: Path, device: str) -> Rows:
        return Bench(self, run, device).rows


def classifier(network: torch.nn.Module, preprocessing: Preprocessing, device: str) -> masking.Classify:
    """uint8 pixels [B, H, W, 3] -> softmax probabilities float64 [B, C], some images at once."""
    import torch

    def classify(pixels: np.ndarray) -> np.ndarray:
        step = max(8, masking.TOGETHER * (64 if device == "cuda" else 1) // (pixels.shape[1] * pixels.shape[2]))
        with torch.inference_mode():
            parts = [network(preprocessing.normalise(torch.from_numpy(np.ascontiguousarray(pixels[i : i + step])).to(device))).double().softmax(1).cpu().numpy() for i in range(0, len(pixels), step)]
        return np.concatenate(parts)

    return classify


class Bench:
    """One worker's network, and what regions are pasted into."""

    def __init__(self, experiment: Masking, run: Path, device: str):
        from pipeline.explanation.input_saliency import InputSaliency

        self.experiment, self.device = experiment, device
        self.manifest, network = network_of(run, device)
        self.standard = Reference.read(run / "statistics" / f"{experiment.reference}.parquet", self.manifest.layers)
        self.classify = classifier(network, self.manifest.preprocessing, device)
        self.engine = InputSaliency(network, self.standard, self.manifest.aggregation)
        self.boxes = annotations.Boxes.of(Path(experiment.boxes), self.manifest) if experiment.boxes else None
        self.hosts: dict[tuple[int, tuple[int, ...]], tuple[np.ndarray, np.ndarray]] = {}
        if experiment.hosts:
            self._gather_hosts(Store(run))

    def _gather_hosts(self, store: Store) -> None:
        chosen = Named.of_each_class(store, self.experiment.dataset, "correct", self.experiment.hosts, self.experiment.seed)
        found: dict[tuple[int, tuple[int, ...]], list[np.ndarray]] = {}
        for samples, _ in gathered(store, self.experiment.dataset, chosen):
            for s in samples:
                found.setdefault((s.label, s.pixels.shape), []).append(s.pixels)
        for key, pixels in found.items():
            self.hosts[key] = np.stack(pixels), self.classify(np.stack(pixels))

    def rows(self, samples: list[Sample], profiles: pa.Table) -> pa.Table:
        parts, unboxed = [], {}
        for at in batches(samples, TOGETHER):
            some, facts = [samples[i] for i in at], profiles.take(pa.array(at))
            pixels = np.stack([s.pixels for s in some])
            shape, heats = pixels.shape[1:], self._heats(some, facts)
            ids, labels, predictions = facts["sample_id"].to_pylist(), facts["label"].to_numpy(), facts["prediction"].to_numpy()
            e, nobody = self.experiment, (np.zeros((0, *shape), np.uint8), np.zeros((0, self.manifest.classes)))
            share = e.shares[_nearest(e.shares)]
            outside = [self.boxes.outside(s) if self.boxes else None for s in some]
            unboxed |= {i: where for i, where in zip(ids, outside) if isinstance(where, str)}
            parts.append(masking.effects(self.classify, pixels, heats, labels, predictions, ids, e.shares, e.fill, e.seed, [None if isinstance(where, str) else where for where in outside]))
            parts.append(masking.transplants(self.classify, pixels, heats, labels, predictions, ids, share, e.seed, lambda label, _: self.hosts.get((label, shape), nobody)))
        rows = pa.concat_tables(parts)
        return rows.append_column(SCHEMA.field("unboxed"), pa.array([unboxed.get(i) for i in rows["sample_id"].to_pylist()], pa.string()))

    def _heats(self, samples: list[Sample], facts: pa.Table) -> np.ndarray:
        """float32 [N, H, W] of each sample's k most salient filters."""
        import torch

        from pipeline.explanation.heat import heat

        e, standard = self.experiment, self.standard
        among = standard.live.copy()
        if e.layers:
            span = self.manifest.layers.columns(e.layers)
            among[: span.start] = among[span.stop :] = False
        columns = [choose("salient", e.k, z, among, e.seed, "") for z in standard.standardise(saliency_of(facts))]
        labels = torch.tensor([s.label for s in samples], device=self.device)
        return heat(self.engine(images_of(samples, self.manifest.preprocessing, self.device), labels, columns, e.boost).maps).float().cpu().numpy()


@dataclass(frozen=True)
class Mask:
    """The verb. survey: what the annotations say, where boxes are asked for."""

    experiment: Masking
    survey: annotations.Survey | None = None
    subset: str = "errors"
    figures: tuple[str, ...] = ("corrected", "wrong_confidence", "true_confidence")
    also: tuple[str, ...] = ()

    def check(self, store: Store, samples: list[Sample]) -> None:
        """Raises BadRequest if which pixels matter cannot be asked of the network, or if boxes cover all that it sees."""
        check_explainable(store, self.experiment.reference, samples)
        if self.survey:
            annotations.Boxes.of(Path(self.experiment.boxes), store.manifest()).refuse_covered(store, self.experiment.dataset, self.survey)

    def cost(self, samples: int) -> str:
        return f"{samples:,} misclassified samples x (a map, as {MAP} forwards of the image, and {self.experiment.forwards} masked or pasted images)"

    def summarise(self, store: Store, dataset: str, reference: Reference, rows: pa.Table) -> dict:
        """Of every strategy and share the mean changes with bootstrap intervals over samples and the share corrected with Wilson's; `paired`: differences of the
        shares corrected on the same samples, `paired_curves` at every share; `transplant` and `outside_box`: see there, None where there was nothing to paste into, or no box; `boxes`: see `unboxed`."""
        e, curves, corrected = self.experiment, {}, {}
        at = _nearest(e.shares)
        for strategy in STRATEGIES:
            by = columns_of(rows, strategy, len(e.shares))
            curves[strategy] = {column: dict(zip(("mean", "low", "high"), (v.tolist() for v in bootstrap_means(by[column], e.seed, ends=CHANGE)))) for column in masking.EFFECTS.names[3:5]}
            shares = [wilson(int(column.sum()), len(column)) for column in by["corrected"].T]
            curves[strategy]["corrected"] = {"mean": [s.estimate for s in shares], "low": [s.low for s in shares], "high": [s.high for s in shares]}
            corrected[strategy] = by["corrected"]
        samples = len(corrected["salient"])
        summary = {"dataset": dataset, "samples": samples, "shares": list(e.shares), "fill": e.fill, "k": e.k, "curves": curves}
        pairs = {f"{a}_minus_{b}": [paired_shares(x, y) for x, y in zip(corrected[a].T, corrected[b].T)] for a, b in PAIRS}
        summary["paired"] = {name: gaps[at].to_json() for name, gaps in pairs.items()}
        summary["paired_curves"] = {name: {"mean": [g.estimate for g in gaps], "low": [g.low for g in gaps], "high": [g.high for g in gaps]} for name, gaps in pairs.items()}
        summary |= {"transplant": transplant(rows, e.seed), "outside_box": outside_box(rows, len(e.shares), at, e.seed), "boxes": unboxed(rows) if e.boxes else None}
        result = {"samples": samples, "share": e.shares[at]} | {f"{column}_{strategy}": curves[strategy][column]["mean"][at] for column in masking.EFFECTS.names[3:6] for strategy in STRATEGIES}
        for name in ("transplant", "outside_box"):
            result |= {f"{name}_{key}": value["estimate"] if isinstance(value, dict) else value for key, value in (summary[name] or {}).items()}
        result |= {"outside_box_unused": sum(summary["boxes"]["unused"].values())} if e.boxes else {}
        return summary | {"result": result, "found": found(summary, at)}

    def draw(self, store: Store, summary: dict, folder: Path) -> None:
        asked = f"{summary['samples']:,} misclassified samples of data set {summary['dataset']}"
        for figure, column, up in (("corrected", "corrected", "share corrected"), ("wrong_confidence", "wrong_confidence_change", "change of the wrong class's confidence"), ("true_confidence", "true_confidence_change", "change of the true class's confidence")):
            bands = {name: tuple(summary["curves"][strategy][column][key] for key in ("mean", "low", "high")) for strategy, name in STRATEGIES.items()}
            note = f"by the {summary['k']} most salient filters; filled by {summary['fill']}; bands: 95% intervals over samples"
            charts.curves(folder / figure, [100 * share for share in summary["shares"]], bands, charts.Words(f"Pixels masked in {asked}", "% of the pixels masked", up, note), log=True)


def mask(request: Request, shares: str | None, fill: str, k: int, boost: float, layers: str | None, hosts: int, folder: Path | None) -> dict:
    """Do it. Raises BadRequest with what cannot be done."""
    store = Store(request.run.expanduser().absolute())
    grid = shares_of(shares)
    check_settings(fill, k, boost, hosts)
    request.check()
    dataset = request.dataset_of(store)
    reference, manifest = request.reference_of(store, dataset), store.manifest()
    live = filters_of(manifest.layers, layers, standards(store, reference, manifest.aggregation))
    if k > live:
        raise BadRequest(f"-k: {k} is more than the {live:,} live filters that there are")
    folder = folder.expanduser().absolute() if folder else None
    survey = annotations.Boxes.of(folder, manifest).survey(store, dataset, Choice.smallest(store, dataset, Mask.subset, request.max_samples, request.seed)) if folder else None
    experiment = Masking(dataset, reference, grid, fill, k, boost, layers, hosts, str(folder) if folder else None, survey.digest if survey else None, request.seed)
    summary = carry_out(Mask(experiment, survey), request)
    if survey and not request.rehearsed:
        annotations.told(summary["boxes"])
    return summary


def check_settings(fill: str, k: int, boost: float, hosts: int) -> None:
    """Raises BadRequest with every fault of them together."""
    faults = []
    if fill not in masking.FILLS:
        faults.append(f"--fill: '{printable(fill)}' is not one of {', '.join(masking.FILLS)}")
    if not 1 < boost < float("inf"):
        faults.append(f"--boost: {boost:g} boosts nothing: give a number above 1")
    faults += [f"{option}: {value} is less than {least}" for option, value, least in (("-k", k, 1), ("--hosts", hosts, 0)) if value < least]
    if faults:
        raise BadRequest("\n".join(faults))


def shares_of(text: str | None) -> tuple[float, ...]:
    """`1,5,20`, in percent of the pixels, as shares, ascending. Raises BadRequest naming --percent."""
    try:
        grid = SHARES if text is None else tuple(sorted({float(part) / 100 for part in text.split(",")}))
    except ValueError:
        grid = (0.0,)
    if not all(0 < share <= 0.5 for share in grid):
        raise BadRequest(f"--percent: '{printable(text)}' is no list of numbers above 0 and up to 50, the percent of the pixels to mask, such as 1,5,20")
    return grid


def _nearest(shares: tuple[float, ...]) -> int:
    return int(np.argmin(np.abs(np.array(shares) - NEAR)))
