"""`faultline explain`: what in an image made its filters fail. Sections 2.2 and 3.3 of the paper, for an image of a run or for a file.

One image, in this process: its profile, its most salient filters (or chosen ones), the pixels that decide them, and its neighbours where there is an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from index.run import Run
from jobs.experiment import Request, refuse_changed_source, standards
from jobs.figures import check_gallery
from jobs.neighbors import refuse_inside
from jobs.progress import say
from pipeline.errors import BadRequest, closest, printable
from pipeline.experiment import Gatherer, Named, network_of, results_folder, units_of, unpack
from pipeline.filters import FilterLayout
from pipeline.samples import Preprocessing, Sample, decode
from pipeline.sources import RawSample
from pipeline.statistics import Reference, import_published
from pipeline.units import shard_stem

if TYPE_CHECKING:
    import torch

NEIGHBOURS = 5  # that are drawn
LARGEST = 64 * 2**20  # bytes of an image file


@dataclass(frozen=True)
class Wanted:
    """What is asked of an image. filters: `layer:channel`, several with commas, in place of the k most salient (of some layers, FIRST..LAST); copies: noisy ones to average over (0: none), of which noise is `share`."""

    k: int = 10
    filters: str | None = None
    layers: str | None = None
    boost: float = 100.0
    copies: int = 0
    share: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Raises BadRequest with every fault of the settings together."""
        faults = []
        for option, value, least in (("-k", self.k, 1), ("--smooth", self.copies, 0), ("--seed", self.seed, 0)):
            if value < least:
                faults.append(f"{option}: {value} is less than {least}")
        if not 1 < self.boost < float("inf"):
            faults.append(f"--boost: {self.boost:g} boosts nothing: give a number above 1")
        if not 0 < self.share < 1:
            faults.append(f"--noise: {self.share:g} is not a share between 0 and 1")
        if self.filters and self.layers:
            faults.append("--filters and --layers: the filters are named, or the most salient of some layers are taken; give one of them")
        if faults:
            raise BadRequest("\n".join(faults))


@dataclass(frozen=True)
class Case:
    """An image and the network that took it for something else. dataset: empty for a file; reference: mu and sigma; names: of the classes."""

    sample: Sample
    dataset: str
    network: torch.nn.Module
    preprocessing: Preprocessing
    layout: FilterLayout
    reference: Reference
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Target:
    """Which image, and who is asked about it: an ID of a run, a file by a run's network, or a file by a named network and statistics."""

    target: str
    run: Path | None = None
    label: int | None = None
    model: str | None = None
    weights: str | None = None
    preprocess: str | None = None
    statistics: Path | None = None
    aggregation: str | None = None
    reference: str | None = None
    name: str | None = None
    device: str | None = None

    def check(self) -> None:
        """Raises BadRequest if it cannot be told which of the three is meant."""
        alone = {"--model": self.model, "--weights": self.weights, "--preprocess": self.preprocess, "--statistics": self.statistics, "--aggregation": self.aggregation}
        given = [option for option, value in alone.items() if value is not None]
        if self.run and given:
            raise BadRequest(f"{', '.join(given)}: the run has its own; leave {'it' if len(given) == 1 else 'them'} out, or leave --run out")
        if not self.run and (missing := [option for option, value in (("--label", self.label), ("--model", self.model), ("--statistics", self.statistics)) if value is None]):
            raise BadRequest(f"{', '.join(missing)}: needed for an image file without a run (an ID needs --run)")
        if self.reference and not self.run:
            raise BadRequest("--reference: it names statistics of a run; a file without one takes --statistics FILE")
        if self.device not in (None, "cpu", "cuda"):
            raise BadRequest(f"--device: '{printable(self.device)}' is not one of cpu, cuda")
        if self.run and self.label is None and Path(self.target).is_file():
            raise BadRequest(f"--label: {printable(self.target)} is a file: say its true class, as a number")


def explain(target: Target, wanted: Wanted, out: Path | None) -> dict:
    """Compute and draw; the numbers, with `figure` and `neighbours`. Raises BadRequest before anything is written."""
    from jobs import cluster, heatmaps

    wanted.check()
    target.check()
    if out:
        check_gallery(out, "--out")
    device = cluster.device_for(target.device, None)
    run = Run.open(target.run) if target.run else None
    if run and out:
        refuse_inside(run, out, "--out")
    if run is None:
        case = case_without_run(Path(target.target), target.label, target.model, target.weights, target.preprocess, target.statistics, target.aggregation, device)
    elif target.label is None:
        case = case_of_sample(run, target.target, target.reference, device)
    else:
        case = case_in_run(run, Path(target.target), target.label, target.reference, device)
    found = compute(case, wanted, device)
    neighbours = neighbours_of(run, case, found, target.name) if run else None
    path = out or (Path.cwd() if run is None or not case.dataset else results_folder(run.store.run, "explain")) / f"{shard_stem(':'.join(filter(None, (case.dataset, case.sample.sample_id))))}.explained.png"
    profile = [(layer, found["standardised"][span]) for layer, span in case.layout.slices.items()]
    true, predicted = (found[f"{key}_name"] or found[key] for key in ("label", "prediction"))
    title = f"Why {true} was taken for {predicted}" if found["label"] != found["prediction"] else f"{true}, rightly predicted"
    heatmaps.draw(path, found, case.sample.pixels, profile, neighbours, title)
    say(f"figure: {printable(path)}")
    shown = [{key: value for key, value in row.items() if key != "thumbnail"} for row in neighbours or []]
    return {key: value for key, value in found.items() if key not in ("heat", "map", "standardised")} | {"neighbours": shown, "figure": str(path)}


def case_of_sample(run: Run, sample: str, reference: str | None, device: str) -> Case:
    """An image of a run by its ID, read from its source again. Raises BadRequest."""
    place = run.find(sample)
    standard = _standard(run, reference, place.dataset)
    wanted = Named(place.sample_id)
    (unit, _), = units_of(run.store, place.dataset, wanted)
    refuse_changed_source(run.store, place.dataset, {unit.shard})
    samples, _, aside = unpack(Gatherer.of(run.store, place.dataset, wanted, (), True).gather(unit))
    if aside:
        raise BadRequest(f"{printable(place.dataset)}:{printable(place.sample_id)} cannot be had any more: {printable(aside[0][1])}")
    manifest, network = network_of(run.store.run, device)
    return Case(samples[0], place.dataset, network, manifest.preprocessing, manifest.layers, standard, manifest.class_names)


def case_of_file(path: Path, label: int, network: torch.nn.Module, preprocessing: Preprocessing, names: tuple[str, ...] | None, classes: int, reference: Reference) -> Case:
    """An image file that a network of `classes` classes is asked about. Raises BadRequest."""
    try:
        if path.stat().st_size > LARGEST:
            raise BadRequest(f"{printable(path)} is larger than {LARGEST // 2**20} MiB: is it an image?")
        image = path.read_bytes()
    except OSError as fault:
        raise BadRequest(f"{printable(path)} cannot be read ({fault.strerror}): give an image file, or the ID of a sample with --run") from None
    sample = decode(RawSample(path.name, image, label), preprocessing, classes)
    if sample.reason:
        raise BadRequest(f"{printable(path)}: {printable(sample.reason)}")
    return Case(sample, "", network, preprocessing, FilterLayout.of(network), reference, names)


def case_in_run(run: Run, path: Path, label: int, reference: str | None, device: str) -> Case:
    """An image file by a run's network and statistics. Raises BadRequest."""
    standard = _standard(run, reference, next(iter(run.datasets), "val"))
    manifest, network = network_of(run.store.run, device)
    return case_of_file(path, label, network, manifest.preprocessing, manifest.class_names, manifest.classes, standard)


def _standard(run: Run, reference: str | None, dataset: str) -> Reference:
    """mu and sigma as every verb chooses them."""
    return standards(run.store, Request(run.store.run, reference=reference).reference_of(run.store, dataset), run.manifest.aggregation)


def case_without_run(path: Path, label: int, model: str, weights: str | None, preprocess: str | None, statistics: Path, aggregation: str | None, device: str) -> Case:
    """An image file by a named network and stored or published statistics. Raises BadRequest."""
    import torch

    from pipeline import models
    from pipeline.saliency import check_network

    say(f"loading {printable(model)}")
    classifier = models.load(model, weights, preprocess)
    layout = FilterLayout.of(classifier.network)
    if statistics.suffix == ".parquet":
        reference = Reference.read(statistics, layout)
        if aggregation not in (None, reference.aggregation):
            raise BadRequest(f"--aggregation: {printable(statistics)} was aggregated as '{reference.aggregation}', not '{printable(aggregation)}'")
    elif aggregation is None:
        raise BadRequest("--aggregation: published statistics do not say how they were aggregated; say abs, the mean of |gradient|, or signed, |the mean|")
    else:
        reference = import_published(statistics, aggregation, layout)
    side = classifier.preprocessing.crop or 64
    classes = check_network(classifier.network, torch.zeros(1, 3, side, side))
    return case_of_file(path, label, classifier.network.to(device), classifier.preprocessing, classifier.class_names, classes, reference)


def compute(case: Case, wanted: Wanted, device: str) -> dict:
    """The numbers of one image: what is said on stdout, and under `heat` (float32 [H, W], 0..1, as drawn), `map` (float32 [3, H, W]) and `standardised` (float32 [F]) what is drawn."""
    import torch

    from pipeline.explanation.heat import display, heat
    from pipeline.explanation.input_saliency import InputSaliency

    images = case.preprocessing.normalise(torch.from_numpy(case.sample.pixels[None].copy()).to(device))
    labels = torch.tensor([case.sample.label], device=device)
    engine = InputSaliency(case.network, case.reference, case.reference.aggregation)
    standardised = engine.standardised(images, labels)[0].float().cpu().numpy()
    columns = chosen(case, wanted, standardised)
    ask = (images, labels, [columns], wanted.boost)
    found = engine.smooth(*ask, wanted.copies, wanted.share, wanted.seed) if wanted.copies else engine(*ask)
    if not (found.logits.isfinite().all() and found.maps.isfinite().all()):
        raise BadRequest(f"{printable(case.sample.sample_id)}: the network's output, or its gradient, is not finite (NaN or infinity) for this image: nothing can be explained")
    confidence = found.logits[0].double().softmax(0)
    prediction = int(confidence.argmax())
    hot = heat(found.maps)
    return {
        "sample_id": case.sample.sample_id, "dataset": case.dataset or None,
        "label": case.sample.label, "label_name": _name(case, case.sample.label), "label_confidence": float(confidence[case.sample.label]),
        "prediction": prediction, "prediction_name": _name(case, prediction), "confidence": float(confidence[prediction]),
        "filters": [dict(zip(("layer", "filter", "standardised"), (*case.layout.locate(int(c)), float(standardised[c])))) for c in columns],
        "dead_filters": int((~case.reference.live).sum()), "boost": wanted.boost, "distance": float(found.distance[0]),
        "heat": display(hot)[0], "map": found.maps[0].float().cpu().numpy(), "standardised": standardised,
    }  # fmt: skip


def chosen(case: Case, wanted: Wanted, standardised: np.ndarray) -> np.ndarray:
    """F as columns, most salient first. Raises BadRequest for filters or layers that the network does not have, or that are dead."""
    live = case.reference.live
    if wanted.filters:
        columns = [_column(case.layout, text.strip()) for text in wanted.filters.split(",")]
        dead = [text for text, column in zip(wanted.filters.split(","), columns) if not live[column]]
        if dead:
            raise BadRequest(f"--filters: {printable(', '.join(dead))} never differed in the reference (sigma is 0), so that nothing can be said of it")
        return np.array(sorted(dict.fromkeys(columns), key=lambda c: -standardised[c]))
    span = case.layout.columns(wanted.layers) if wanted.layers else slice(0, case.layout.total)
    columns = np.flatnonzero(live[span]) + span.start
    if not len(columns):
        raise BadRequest("--layers: all filters of these layers are dead in the reference (sigma is 0)")
    if len(columns) < wanted.k:
        say(f"only {len(columns)} filters are live there")
    return columns[np.argsort(-standardised[columns], kind="stable")][: wanted.k]


def _column(layout: FilterLayout, text: str) -> int:
    layer, _, channel = text.rpartition(":")
    if layer not in layout.slices:
        raise BadRequest(f"--filters: '{printable(text)}' is not LAYER:CHANNEL of a layer of this network; close to it: {closest(layer or text, layout.slices)}")
    span = layout.slices[layer]
    if not channel.isdecimal() or not channel.isascii() or int(channel) >= span.stop - span.start:
        raise BadRequest(f"--filters: {printable(layer)} has the filters 0..{span.stop - span.start - 1}, not '{printable(channel)}'")
    return span.start + int(channel)


def neighbours_of(run: Run, case: Case, found: dict, name: str | None) -> list[dict] | None:
    """Its neighbours in the run's index, with thumbnails, as `figures` draws them; None, and a word why, where no index can be asked. Raises BadRequest for a `name` that cannot."""
    try:
        index = run.index(name)
    except BadRequest as fault:
        if name:
            raise
        say(f"no neighbours are drawn: {printable(str(fault).splitlines()[0])}")
        return None
    reference = index.about["reference"]
    if not np.array_equal(Reference.read(run.store.run / "statistics" / f"{reference}.parquet", case.layout).mean, case.reference.mean):
        say(f"no neighbours are drawn: the index was made with the statistics of {printable(reference)}, not those asked for")
        return None
    own = index.row_of(case.dataset, case.sample.sample_id) if case.dataset else -1
    similarity, rows = index.search(found["standardised"][None], NEIGHBOURS, None, None, np.array([own]))
    table = run.table_of(index, similarity[0], rows[0], found["label"], found["prediction"])
    return [row | run.record(run.indexed(row["dataset"], row["sample_id"], name), ["thumbnail"]) for row in table.to_pylist()]


def _name(case: Case, index: int) -> str | None:
    return case.names[index] if case.names and index < len(case.names) else None
