"""An image, and the network that is asked about it: a sample of a run by its ID, a file by a run's network, or a file by a named network and somebody's statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from index.run import Run
from jobs import cluster
from jobs.experiment import Request, refuse_changed_source, standards
from jobs.figures import check_gallery
from jobs.neighbors import refuse_inside
from jobs.progress import say
from pipeline.errors import BadRequest, printable
from pipeline.experiment import Gatherer, Named, network_of, results_folder, units_of, unpack
from pipeline.filters import FilterLayout
from pipeline.samples import Preprocessing, Sample, decode
from pipeline.sources import RawSample
from pipeline.statistics import Reference, import_published
from pipeline.units import shard_stem

if TYPE_CHECKING:
    import torch

LARGEST = 64 * 2**20  # bytes of an image file


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

    def name(self, label: int) -> str | None:
        """Of a class; None where the classes have none."""
        return self.names[label] if self.names and label < len(self.names) else None


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


def opened(target: Target, out: Path | None) -> tuple[Run | None, Case, str]:
    """(the run, or None; the image and its network; the device) of a target whose picture goes to `out`, or where `picture_of` says. Raises BadRequest."""
    target.check()
    if out:
        check_gallery(out, "--out")
    device = cluster.device_for(target.device, None)
    if not target.run:
        return None, case_without_run(Path(target.target), target.label, target.model, target.weights, target.preprocess, target.statistics, target.aggregation, device), device
    run = Run.open(target.run)
    if out:
        refuse_inside(run, out, "--out")
    if target.label is None:
        return run, case_of_sample(run, target.target, target.reference, device), device
    return run, case_in_run(run, Path(target.target), target.label, target.reference, device), device


def picture_of(case: Case, run: Run | None, verb: str, ending: str) -> Path:
    """Where the picture of a case lies by default: among the verb's results in the run for one of its samples, beside the user for a file."""
    folder = results_folder(run.store.run, verb) if run and case.dataset else Path.cwd()
    return folder / f"{shard_stem(':'.join(filter(None, (case.dataset, case.sample.sample_id))))}.{ending}.png"


def case_of_sample(run: Run, sample: str, reference: str | None, device: str) -> Case:
    """An image of a run by its ID, read from its source again. Raises BadRequest."""
    place = run.find(sample)
    standard = _standard(run, reference, place.dataset)
    wanted = Named(frozenset([place.sample_id]))
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
        remedy = "; give another --label" if sample.reason.startswith("label ") else "; fetch it again, or give another image"
        raise BadRequest(f"{printable(path)}: {printable(sample.reason)}{remedy}")
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
    from pipeline.saliency import check_network, prepare_process

    say(f"loading {printable(model)}")
    prepare_process(cluster.threads_of_an_engine(), "fp32")
    classifier = models.load(model, weights, preprocess)
    layout = FilterLayout.of(classifier.network)
    if statistics.suffix == ".parquet":
        reference = Reference.read(statistics, layout, run=False)
        if aggregation not in (None, reference.aggregation):
            raise BadRequest(f"--aggregation: {printable(statistics)} was aggregated as '{reference.aggregation}', not '{printable(aggregation)}'")
    elif aggregation is None:
        raise BadRequest("--aggregation: published statistics do not say how they were aggregated; say abs, the mean of |gradient|, or signed, |the mean|")
    else:
        reference = import_published(statistics, aggregation, layout, run=False)
    side = classifier.preprocessing.crop or 64
    classes = check_network(classifier.network, torch.zeros(1, 3, side, side))
    return case_of_file(path, label, classifier.network.to(device), classifier.preprocessing, classifier.class_names, classes, reference)
