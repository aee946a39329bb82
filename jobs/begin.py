"""What a new run is, and whether it should be: its network, engine and sizes from a look at the images, and the doctor's word before hours are spent."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from jobs import cluster
from jobs.progress import say
from pipeline.errors import BadRequest, printable
from pipeline.filters import FilterLayout, coverage
from pipeline.manifest import Manifest
from pipeline.store import Store
from pipeline.units import MOST

if TYPE_CHECKING:  # torch is loaded for new data sets alone
    import torch

    from pipeline.doctor import Diagnosis, Look
    from pipeline.models import Classifier

LOOK, AGAIN = 64, 256  # samples that every new data set is judged by, and where those puzzle
TRIAL = 3  # images on which an engine is chosen


def load_model(model: str, weights: str | None, preprocess: str | None, precision: str | None, device: str | None, address: str | None = None) -> Classifier:
    """The network of a new run: before shards are counted, so that a mistyped name is told at once. Raises BadRequest."""
    say(f"loading {printable(model)}")
    from pipeline import models

    if precision == "tf32" and cluster.device_for(device, address) == "cpu":
        raise BadRequest("--precision: tf32 exists on CUDA GPUs alone; use fp32")
    return models.load(model, weights, preprocess)


def describe(seen: Look, classifier: Classifier, model: str, engine: str, precision: str | None, aggregation: str, batch_size: int | None, device: str) -> Manifest:
    """Try the network on a few of the images that were seen, and choose what was left open. Raises BadRequest if it cannot take them."""
    from pipeline.saliency import check_network, choose_engine

    layers = FilterLayout.of(classifier.network)
    images = trial_images(seen, classifier)
    classes = check_network(classifier.network, images)
    engine, reason = (engine, "as asked") if engine != "auto" else choose_engine(classifier.network, images)
    say(f"engine: {engine} ({reason}); {layers.total:,} filters in {len(layers.layers)} layers, {classes} classes")
    names = classifier.class_names if classifier.class_names and len(classifier.class_names) == classes else None
    return Manifest(
        model=model, weights_sha256=classifier.weights_sha256, layers=layers, preprocessing=classifier.preprocessing, aggregation=aggregation,
        precision=precision or "fp32", engine=engine, batch_size=batch_size or default_batch(device, images.shape[-2] * images.shape[-1]), threads=cluster.threads_of_an_engine(),
        unit_samples=MOST if device == "cuda" else MOST // 4, classes=classes, class_names=names, import_root=os.getcwd() if ":" in model else None,
        versions={name: _version(name) for name in ("faultline", "torch", "torchvision", "ray", "pyarrow", "numpy", "pillow")},
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), promised_top1=classifier.promised,
    )  # fmt: skip


def trial_images(seen: Look, classifier: Classifier) -> torch.Tensor:
    """float32 [1..3, 3, H, W]: some of the images that were seen and share a shape."""
    import numpy as np
    import torch

    if not seen.samples:
        why = f" ({printable(seen.reasons[0])})" if seen.reasons else ""
        raise BadRequest(f"--source: none of the {len(seen.reasons)} samples that were tried can be used{why}; is this a labelled data set of images?")
    shape = Counter(s.pixels.shape for s in seen.samples).most_common(1)[0][0]
    alike = [s.pixels for s in seen.samples if s.pixels.shape == shape][:TRIAL]
    return classifier.preprocessing.normalise(torch.from_numpy(np.stack(alike)))


def default_batch(device: str, pixels: int) -> int:
    """Images of one forward. On a CPU more than these only leave the cache: measured fastest for photographs and for small images."""
    if device == "cuda":
        return 128
    return 8 if pixels > 96 * 96 else 32


def admit(seen: Look, again: Callable[[int], Look], network: torch.nn.Module, manifest: Manifest, force: bool) -> None:
    """Say what the doctor finds on a few samples; `again` looks at more, where those puzzle. Raises BadRequest if a run would be garbage, unless it is forced."""
    found = examine(seen, network, manifest)
    if found.puzzling:
        say(f"check: top-1 is {found.top1:.3f} on {found.seen} images, which is little; looking at more")
        found = examine(again(AGAIN), network, manifest)
    for line in [*found.doubts, *found.warnings, *filter(None, [coverage(network)[1]])]:
        say(f"check: {line}")
    if found.faults and not force:
        raise BadRequest(f"{found.faults[0]}\n--force goes on all the same; faultline check says more")
    for fault in found.faults:
        say(f"check: {fault} (going on: --force)")


def examine(seen: Look, network: torch.nn.Module, manifest: Manifest, devkit: dict[int, str] | None = None) -> Diagnosis:
    """The doctor's diagnosis, computed on this machine's GPU if it has one."""
    import torch

    from pipeline import doctor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return doctor.examine(network.to(device), manifest.preprocessing, seen, manifest.classes, manifest.promised_top1, devkit, device, manifest.batch_size)


def write(store: Store, manifest: Manifest, network: torch.nn.Module) -> None:
    """Begin the run: its weights, then run.json. Raises BadRequest if the folder cannot be written."""
    from pipeline import models

    try:
        store.run.mkdir(parents=True, exist_ok=True)
        models.save_weights(network, store.run / "weights.safetensors")
        manifest.write(store.run)
    except OSError as fault:
        raise BadRequest(f"--run: {printable(store.run)} cannot be written ({printable(fault)}); choose another folder") from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
