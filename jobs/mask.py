"""`faultline mask`: section 3.4 of the paper over a data set. Of every misclassified sample the pixels that its most salient filters are sensitive to are masked, or pasted
into images of its class that the network is right about, beside as many others; with boxes at hand, those outside the object alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import charts
from jobs.experiment import Request, carry_out, standards
from jobs.explain import check_explainable
from jobs.prune import filters_of
from pipeline import boxes
from pipeline.errors import BadRequest, printable
from pipeline.experiment import Named, Rows, batches, gathered, images_of, network_of
from pipeline.intervals import FEW, Interval, bootstrap_mean, bootstrap_means, paired_shares, wilson
from pipeline.interventions import masking
from pipeline.interventions.choice import choose
from pipeline.samples import Preprocessing, Sample
from pipeline.statistics import Reference
from pipeline.store import Store, saliency_of

if TYPE_CHECKING:
    import torch

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
STRATEGIES = {"salient": "most salient", "moved": "the same shape elsewhere", "random": "random", "least": "least salient"}
NEAR = 0.05  # of the pixels: the share that the paper, and the sentence, are about, or the grid's nearest
PAIRS = (("salient", "moved"), ("salient", "random"), ("salient", "least"))  # whose differences on the same samples are told
HOSTS = 10  # images of a class that a region is pasted into, at most
MAP = 8  # forwards that a map is worth
TOGETHER = 8  # maps of one call


@dataclass(frozen=True)
class Masking:
    """The experiment on `dataset`. shares: of the pixels; fill: see `pipeline/interventions/masking.py`; k, boost, layers: of eq. 3; hosts: images of a class that regions are
    pasted into, at most; boxes: the folder of annotations, or None; `reference` standardises."""

    dataset: str
    reference: str
    shares: tuple[float, ...]
    fill: str
    k: int
    boost: float
    layers: str | None
    hosts: int
    boxes: str | None
    seed: int
    name: str = "mask"
    images: bool = True
    columns: tuple[str, ...] = ("saliency",)
    schema: pa.Schema = masking.EFFECTS

    @property
    def forwards(self) -> int:
        """Of one sample, beside its map."""
        return (len(STRATEGIES) + 2 * bool(self.boxes)) * len(self.shares) + 2 * self.hosts

    @property
    def weight(self) -> float:
        return (MAP + self.forwards) / 3  # an extraction is worth three forwards

    def settings(self) -> dict[str, object]:
        return {"strategies": list(STRATEGIES), "shares": list(self.shares), "fill": self.fill, "k": self.k, "boost": self.boost, "layers": self.layers, "hosts": self.hosts, "boxes": self.boxes}

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
        self.files = boxes.find(Path(experiment.boxes)) if experiment.boxes else {}
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
        parts = []
        for at in batches(samples, TOGETHER):
            some, facts = [samples[i] for i in at], profiles.take(pa.array(at))
            pixels = np.stack([s.pixels for s in some])
            shape, heats = pixels.shape[1:], self._heats(some, facts)
            ids, labels, predictions = facts["sample_id"].to_pylist(), facts["label"].to_numpy(), facts["prediction"].to_numpy()
            e, nobody = self.experiment, (np.zeros((0, *shape), np.uint8), np.zeros((0, self.manifest.classes)))
            share = e.shares[_nearest(e.shares)]
            parts.append(masking.effects(self.classify, pixels, heats, labels, predictions, ids, e.shares, e.fill, e.seed, [self._outside(s) for s in some]))
            parts.append(masking.transplants(self.classify, pixels, heats, labels, predictions, ids, share, e.seed, lambda label, _: self.hosts.get((label, shape), nobody)))
        return pa.concat_tables(parts)

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

    def _outside(self, sample: Sample) -> np.ndarray | None:
        """The pixels outside its boxes; None where there is no annotation, or none that can be used."""
        file = boxes.annotation_of(sample.sample_id, self.files)
        try:
            return boxes.outside(boxes.read(file), sample.label, self.manifest.classes, self.manifest.preprocessing, sample.pixels.shape[:2]) if file else None
        except boxes.Unusable:
            return None


@dataclass(frozen=True)
class Mask:
    """The verb."""

    experiment: Masking
    subset: str = "errors"
    figures: tuple[str, ...] = ("corrected", "wrong_confidence", "true_confidence")
    also: tuple[str, ...] = ()

    def check(self, store: Store, samples: list[Sample]) -> None:
        """Raises BadRequest if which pixels matter cannot be asked of the network."""
        check_explainable(store, self.experiment.reference, samples)

    def cost(self, samples: int) -> str:
        return f"{samples:,} misclassified samples x (a map, as {MAP} forwards of the image, and {self.experiment.forwards} masked or pasted images)"

    def summarise(self, store: Store, dataset: str, reference: Reference, rows: pa.Table) -> dict:
        """Of every strategy and share the mean changes with bootstrap intervals over samples and the share corrected with Wilson's; `paired`: differences of the
        shares corrected on the same samples, `paired_curves` at every share; `transplant` and `outside_box`: see there, None where there was nothing to paste into, or no box."""
        e, curves, corrected = self.experiment, {}, {}
        at = _nearest(e.shares)
        for strategy in STRATEGIES:
            by = _columns(rows, strategy, len(e.shares))
            curves[strategy] = {column: dict(zip(("mean", "low", "high"), (v.tolist() for v in bootstrap_means(by[column], e.seed)))) for column in masking.EFFECTS.names[3:5]}
            shares = [wilson(int(column.sum()), len(column)) for column in by["corrected"].T]
            curves[strategy]["corrected"] = {"mean": [s.estimate for s in shares], "low": [s.low for s in shares], "high": [s.high for s in shares]}
            corrected[strategy] = by["corrected"]
        samples = len(corrected["salient"])
        summary = {"dataset": dataset, "samples": samples, "shares": list(e.shares), "fill": e.fill, "k": e.k, "curves": curves}
        pairs = {f"{a}_minus_{b}": [paired_shares(x, y) for x, y in zip(corrected[a].T, corrected[b].T)] for a, b in PAIRS}
        summary["paired"] = {name: gaps[at].to_json() for name, gaps in pairs.items()}
        summary["paired_curves"] = {name: {"mean": [g.estimate for g in gaps], "low": [g.low for g in gaps], "high": [g.high for g in gaps]} for name, gaps in pairs.items()}
        summary |= {"transplant": transplant(rows, e.seed), "outside_box": outside_box(rows, len(e.shares), at, e.seed)}
        result = {"samples": samples, "share": e.shares[at]} | {f"{column}_{strategy}": curves[strategy][column]["mean"][at] for column in masking.EFFECTS.names[3:6] for strategy in STRATEGIES}
        for name in ("transplant", "outside_box"):
            result |= {f"{name}_{key}": value["estimate"] if isinstance(value, dict) else value for key, value in (summary[name] or {}).items()}
        return summary | {"result": result, "found": found(summary, at)}

    def draw(self, store: Store, summary: dict, folder: Path) -> None:
        asked = f"{summary['samples']:,} misclassified samples of data set {summary['dataset']}"
        for figure, column, up in (("corrected", "corrected", "share corrected"), ("wrong_confidence", "wrong_confidence_change", "change of the wrong class's confidence"), ("true_confidence", "true_confidence_change", "change of the true class's confidence")):
            bands = {name: tuple(summary["curves"][strategy][column][key] for key in ("mean", "low", "high")) for strategy, name in STRATEGIES.items()}
            note = f"by the {summary['k']} most salient filters; filled by {summary['fill']}; bands: 95% intervals over samples"
            charts.curves(folder / figure, [100 * share for share in summary["shares"]], bands, charts.Words(f"Pixels masked in {asked}", "% of the pixels masked", up, note), log=True)


def transplant(rows: pa.Table, seed: int) -> dict | None:
    """Regions pasted into other images of their class: `samples`, `pairs` of sample and image, and intervals over samples of: `rises`, the share of images in which
    the wrong class's confidence rises; `change`, by how much; `rises_random`, `change_random` and the differences on the same samples for as many random pixels."""
    pasted, control = (rows.filter(pc.equal(rows["strategy"], name)) for name in ("transplant", "transplant_random"))
    if not pasted.num_rows:
        return None
    found = {"samples": pasted.num_rows, "pairs": int(pc.sum(pasted["hosts"]).as_py())}
    for key, column in (("rises", "rises"), ("change", "wrong_confidence_change")):
        own, other = pasted[column].to_numpy(), control[column].to_numpy()
        found |= {name: bootstrap_mean(values, seed).to_json() for name, values in ((key, own), (f"{key}_random", other), (f"{key}_minus_random", own - other))}
    return found


def outside_box(rows: pa.Table, shares: int, at: int, seed: int) -> dict | None:
    """Salient pixels outside the object's boxes masked, less as many random ones there, on the same samples: mean differences of both classes' confidences with
    intervals, and p-values of Wilcoxon's signed-rank test and of Student's paired t, two-sided."""
    from scipy.stats import ttest_rel, wilcoxon

    own, other = (_columns(rows, f"{name}_outside", shares) for name in ("salient", "random"))
    samples = len(own["corrected"])
    if not samples:
        return None
    found: dict[str, object] = {"samples": samples}
    for key, column in (("wrong", "wrong_confidence_change"), ("true", "true_confidence_change")):
        a, b = own[column][:, at], other[column][:, at]
        found[key] = bootstrap_mean(a - b, seed).to_json()
        differ = samples > 1 and np.any(a != b)
        found |= {f"{key}_p_wilcoxon": float(wilcoxon(a, b).pvalue) if differ else 1.0, f"{key}_p_t": float(ttest_rel(a, b).pvalue) if differ else 1.0}
    return found


def found(summary: dict, at: int) -> str:
    """Figure 8, the transplants and the boxes in one sentence, at one share."""
    n, percent = summary["samples"], f"{100 * summary['shares'][at]:g}%"
    share = {s: Interval(*(summary["curves"][s]["corrected"][key][at] for key in ("mean", "low", "high")), n) for s in STRATEGIES}
    apart = {b: Interval(**summary["paired"][f"{a}_minus_{b}"]) for a, b in PAIRS}
    few = f"; {'1 is' if n == 1 else f'{n:,} are'} too few to conclude anything from"
    doubt = few if n < FEW else "" if all(gap.low > 0 for gap in apart.values()) else ", the reverse of what the paper found" if any(gap.high < 0 for gap in apart.values()) else " (not all clearly apart)"
    said = (
        f"masking the {percent} most salient pixels corrects {share['salient'].text(3)} of {n:,} misclassified samples, the same shape elsewhere {share['moved'].text(3)}, random pixels {share['random'].text(3)}, "
        f"the least salient {share['least'].text(3)}; differences on the same samples {', '.join(gap.text(3, '+') for gap in apart.values())}{doubt}"
    )
    if pasted := summary["transplant"]:
        rises, gap = Interval(**pasted["rises"]), Interval(**pasted["rises_minus_random"])
        said += f"; pasted into {pasted['pairs']:,} other images of their class they raise the wrong class's confidence in {rises.text(3)} of them, {gap.text(3, '+')} against random pixels"
    if box := summary["outside_box"]:
        said += f"; outside the object's boxes ({box['samples']:,} samples) the wrong class's confidence changes by {Interval(**box['wrong']).text(3, '+')} against random pixels there (p = {box['wrong_p_wilcoxon']:.2g})"
    return said


def mask(request: Request, shares: str | None, fill: str, k: int, boost: float, layers: str | None, hosts: int, folder: Path | None) -> dict:
    """Do it. Raises BadRequest with what cannot be done."""
    store = Store(request.run.expanduser().absolute())
    grid = shares_of(shares)
    check_settings(fill, k, boost, hosts)
    if folder:
        boxes.find(folder.expanduser().absolute())
    dataset = request.dataset_of(store)
    reference, manifest = request.reference_of(store, dataset), store.manifest()
    live = filters_of(manifest.layers, layers, standards(store, reference, manifest.aggregation))
    if k > live:
        raise BadRequest(f"-k: {k} is more than the {live:,} live filters that there are")
    experiment = Masking(dataset, reference, grid, fill, k, boost, layers, hosts, str(folder.expanduser().absolute()) if folder else None, request.seed)
    return carry_out(Mask(experiment), request)


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


def _columns(rows: pa.Table, strategy: str, shares: int) -> dict[str, np.ndarray]:
    """float64 [N, shares] of a strategy's rows, by column."""
    table = rows.filter(pc.equal(rows["strategy"], strategy))
    return {column: table[column].to_numpy().astype(np.float64).reshape(-1, shares) for column in masking.EFFECTS.names[3:6]}
