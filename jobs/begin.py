"""What a new run is, and whether it should be: its network, engine and sizes from a look at the images, and the doctor's word before hours are spent."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import cluster
from jobs.apart import Died, apart
from jobs.progress import say
from pipeline.errors import BadRequest, Fault, Stopped, printable
from pipeline.filters import FilterLayout, coverage
from pipeline.locks import hold
from pipeline.manifest import Manifest
from pipeline.store import Store
from pipeline.units import MOST

if TYPE_CHECKING:  # torch is loaded for new data sets alone
    import torch

    from pipeline.doctor import Diagnosis, Look
    from pipeline.models import Classifier

LOOK, AGAIN = 64, 256  # samples that every new data set is judged by, and where those puzzle
TRIAL = 3  # images on which an engine is chosen
PATIENCE = 60.0  # seconds in which another job has begun a run
TRIES = 4  # times that a network is tried, each time on other images, where some kill its process


def load_model(model: str, weights: str | None, preprocess: str | None, precision: str | None, device: str | None, address: str | None = None) -> Classifier:
    """The network of a new run: before shards are counted, so that a mistyped name is told at once. Raises BadRequest."""
    say(f"loading {printable(model)}")
    from pipeline import models

    if precision == "tf32" and cluster.device_for(device, address) == "cpu":
        raise BadRequest("--precision: tf32 exists on CUDA GPUs alone; use fp32")
    classifier = models.load(model, weights, preprocess)
    try:
        FilterLayout.of(classifier.network)
    except BadRequest as fault:
        raise BadRequest(f"--model: {printable(model)}: {fault}") from None
    return classifier


@dataclass(frozen=True)
class Asked:
    """What is asked of a run's network, as another process can be told it. `saved`: the run that keeps its weights; None while it is new."""

    model: str
    weights: str | None = None
    preprocess: str | None = None
    engine: str = "auto"
    precision: str | None = None
    aggregation: str = "abs"
    batch_size: int | None = None
    device: str = "cpu"
    saved: Path | None = None
    devkit: dict[int, str] | None = None  # ILSVRC2012_ID -> WordNet ID, where one lies with the source

    def load(self) -> Classifier:
        """The classifier of a new run, or the one that a run keeps."""
        from pipeline import models

        if self.saved is None:
            return models.load(self.model, self.weights, self.preprocess)
        manifest = Store(self.saved).manifest()
        models.reach(manifest.import_root)
        network = models.restore(self.model, self.saved / "weights.safetensors", manifest.saved_sha256)
        return models.Classifier(network, manifest.preprocessing, manifest.class_names, manifest.weights_sha256, manifest.promised_top1)


def describe(asked: Asked, seen: Look, classifier: Classifier) -> Manifest:
    """Try the network on a few of the images that were seen, and choose what was left open. Raises BadRequest if it cannot take them."""
    import torch

    from pipeline.saliency import check_network, choose_engine, try_engine
    from pipeline.saliency.places import filled_up

    layers = FilterLayout.of(classifier.network)
    trials = trial_images(seen, classifier)
    try:
        images, classes = trials[0], check_network(classifier.network, trials[0])
    except BadRequest:  # because of one bad image?
        images, classes = trials[-1], check_network(classifier.network, trials[-1])
    engine, reason = ("vmap", "as asked") if asked.engine == "vmap" else choose_engine(classifier.network, images)
    if (asked.engine, engine) == ("fused", "vmap"):
        raise BadRequest(f"--engine: fused is not exact for this network ({printable(reason)}); use vmap, or leave it out")
    with torch.autocast("cpu", torch.bfloat16, enabled=asked.precision == "bf16" and asked.device == "cpu"):
        try_engine(engine, classifier.network, images)
    say(f"engine: {engine} ({reason}); {layers.total:,} filters in {len(layers.layers)} layer{'s' * (len(layers.layers) != 1)}, {classes} classes")
    threads = cluster.threads_of_an_engine()
    batch_size = asked.batch_size or default_batch(asked.device, images.shape[-2] * images.shape[-1], threads if engine == "fused" else 1)
    if engine == "fused" and asked.device == "cpu" and (whole := filled_up(batch_size, threads)) > batch_size:
        say(f"check: batches of {batch_size} are filled up to {whole}, so that a sample's numbers are those of any other batch: --batch-size {whole} takes less time")
    names = classifier.class_names if classifier.class_names and len(classifier.class_names) == classes else None
    return Manifest(
        model=asked.model, weights_sha256=classifier.weights_sha256, layers=layers, preprocessing=classifier.preprocessing, aggregation=asked.aggregation,
        precision=asked.precision or "fp32", engine=engine, batch_size=batch_size, threads=threads,
        unit_samples=whole_batches(MOST if asked.device == "cuda" else MOST // 4, batch_size), classes=classes, class_names=names, import_root=os.getcwd() if ":" in asked.model else None,
        versions={name: _version(name) for name in ("faultline", "torch", "torchvision", "ray", "pyarrow", "numpy", "pillow")},
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), promised_top1=classifier.promised,
    )  # fmt: skip


def trial_images(seen: Look, classifier: Classifier) -> list[torch.Tensor]:
    """One or two times float32 [1..3, 3, H, W]: some of the images that were seen and share a shape, the first of them and the last."""
    import numpy as np
    import torch

    if not seen.samples:
        why = f" ({printable(seen.reasons[0])})" if seen.reasons else ""
        raise BadRequest(f"--source: none of the {len(seen.reasons)} samples that were tried can be used{why}; is this a labelled data set of images?")
    shape = Counter(s.pixels.shape for s in seen.samples).most_common(1)[0][0]
    alike = [s.pixels for s in seen.samples if s.pixels.shape == shape]
    chosen = [alike[:TRIAL], alike[TRIAL:][-TRIAL:]]
    return [classifier.preprocessing.normalise(torch.from_numpy(np.stack(pixels))) for pixels in chosen if pixels]


def default_batch(device: str, pixels: int, threads: int = 1) -> int:
    """Images of one forward. On a CPU more than these only leave the cache: measured fastest for photographs and for small images; a multiple of the threads, to which the fused engine would fill it up."""
    if device == "cuda":
        return 128
    least = 8 if pixels > 96 * 96 else 32
    return least + -least % threads


def whole_batches(samples: int, batch_size: int) -> int:
    """No more than so many samples, or one batch: a batch of which two units have a part is computed for each of them."""
    return max(1, samples // batch_size) * batch_size


def admit(asked: Asked, seen: Look, again: Callable[[int], Look], manifest: Manifest | None, classifier: Classifier | None, alone: bool, force: bool) -> Manifest:
    """What the run is, once the doctor has said what a few samples tell; `again` looks at more, where those puzzle.

    manifest: of a run that has begun; classifier: of a new one. alone: the network runs in a process of its own, as it will in the job, so that an
    image that kills it is set aside there. Raises BadRequest if a run would be garbage, unless it is forced.
    """
    judge = partial(apart, judged, asked) if alone else partial(judged, asked, classifier=classifier or asked.load())
    try:
        manifest, found = judge(seen, manifest)
        if found.puzzling and len((more := again(AGAIN)).samples) > len(seen.samples):
            say(f"check: top-1 is {found.top1:.3f} on {found.seen} images, which is little; looking at more")
            manifest, found = judge(more, manifest)
    except Died as death:
        say(f"check: the network's process ended ({death}) on one of the images that were looked at: nothing is said about top-1")
        return manifest or _described_alone(asked, seen)
    for line in [*found.doubts, *found.warnings]:
        say(f"check: {line}")
    if found.faults and not force:
        raise BadRequest(f"{found.faults[0]}\n--force goes on all the same; faultline check says more")
    for fault in found.faults:
        say(f"check: {fault} (going on: --force)")
    return manifest


def judged(asked: Asked, seen: Look, manifest: Manifest | None, classifier: Classifier | None = None) -> tuple[Manifest, Diagnosis]:
    """What the run is, and the doctor's diagnosis. Raises BadRequest if the network cannot take the images."""
    classifier = classifier or asked.load()
    manifest = manifest or describe(asked, seen, classifier)
    return manifest, examine(seen, classifier.network, manifest, asked.devkit)


def _described_alone(asked: Asked, seen: Look) -> Manifest:
    """By a few images, or by others where the network died on those. Raises BadRequest if it dies on all of them."""
    for few in filter(None, (seen.samples[at::TRIES][:TRIAL] for at in range(TRIES))):
        try:
            return apart(_described, asked, replace(seen, samples=few))
        except Died as died:
            death = died
    raise BadRequest(f"--model: the process of {printable(asked.model)} ends ({death}) when it is given images of this source: is there enough memory, and does the network run by itself?")


def _described(asked: Asked, seen: Look) -> Manifest:
    return describe(asked, seen, asked.load())


def examine(seen: Look, network: torch.nn.Module, manifest: Manifest, devkit: dict[int, str] | None = None, tell: Callable[[str], None] = lambda text: None) -> Diagnosis:
    """The doctor's diagnosis, computed on this machine's GPU if it has one, and what part of the network a profile covers."""
    import torch

    from pipeline import doctor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = doctor.examine(network.to(device), manifest.preprocessing, seen, manifest.classes, manifest.promised_top1, devkit, device, manifest.batch_size, tell)
    found.warnings.extend(filter(None, [coverage(network)[1]]))
    return found


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """While this job looks whether the run is there, and begins it, no other does. Raises BadRequest if the folder cannot be written, Busy if another job is at it for long."""
    try:
        store.run.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise _unwritable(store, fault) from None
    with hold(store.run / ".begin.lock", store.run, f"another job is beginning {printable(store.run)}: give the same command again when it has", PATIENCE):
        yield


def write(store: Store, manifest: Manifest, network: torch.nn.Module) -> None:
    """Begin the run: its weights, then run.json. Raises BadRequest if the folder cannot be written."""
    from pipeline import models

    try:
        for stale in (*store.run.glob(".run.json.*.tmp"), *store.run.glob(".weights.safetensors.*.tmp")):  # of a job that died here
            stale.unlink(missing_ok=True)
        models.save_weights(network, store.run / "weights.safetensors")
        replace(manifest, saved_sha256=models.file_sha256(store.run / "weights.safetensors")).write(store.run)
    except OSError as fault:
        raise _unwritable(store, fault) from None


def _unwritable(store: Store, fault: OSError) -> Fault:
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return Stopped(f"--run: {printable(store.run)} cannot be written ({os.strerror(fault.errno)}): make room\nthe same command goes on")
    return BadRequest(f"--run: {printable(store.run)} cannot be written ({printable(fault)}); choose another folder")


def save_weights(store: Store, network: torch.nn.Module) -> None:
    """A run's weights again, where somebody removed them. Raises BadRequest if the folder cannot be written."""
    from pipeline import models

    try:
        models.save_weights(network, store.run / "weights.safetensors")
    except OSError as fault:
        raise _unwritable(store, fault) from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
