"""`faultline bench maps`: what an input saliency map costs beside a plain forward and backward pass of the same image, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from jobs import cluster
from jobs.bench.engine import built, step, subject
from jobs.bench.measure import Measure, medians
from pipeline.errors import BadRequest
from pipeline.explanation.input_saliency import InputSaliency
from pipeline.filters import FilterLayout
from pipeline.saliency import prepare_process
from pipeline.statistics import Reference

MODELS = ("resnet50", "squeezenet1_1", "resnet56")
FILTERS = 10  # boosted


def bench_maps(names: list[str], device: str | None, rounds: int) -> list[Measure]:
    """Images a second of maps of a batch and of one image at a time, beside plain passes of the same images in the same way. Raises BadRequest."""
    if rounds < 1:
        raise BadRequest(f"--rounds: {rounds} is less than 1")
    device = cluster.device_for(device, None)
    prepare_process(cluster.threads_of_an_engine(), "fp32")
    found = []
    for name in names:
        images, labels, network = subject(name, built(name), None, device)
        layout = FilterLayout.of(network)
        engine = InputSaliency(network, Reference(np.zeros(layout.total), np.ones(layout.total), 2, "abs", "bench"))
        columns = [np.arange(FILTERS)] * len(images)
        network.requires_grad_(True)
        ways = {"together": _together, "one by one": _one_by_one}
        jobs = {(way, what): partial(ways[way], *job) for way in ways for what, job in {"maps": (engine, images, labels, columns), "step": (partial(step, network), images, labels)}.items()}
        seconds = medians({f"{what} {way}": job for (way, what), job in jobs.items()}, rounds)
        rate = {key: len(images) / value for key, value in seconds.items()}
        for way in ways:
            maps, floor = rate[f"maps {way}"], rate[f"step {way}"]
            found.append(Measure(f"{name}: maps of {len(images)} images {way}", maps, "images/s", f"forward and backward, {way}", floor, floor / maps))
    return found


def _together(call: Callable[..., object], *parts: Sequence) -> None:
    call(*parts)


def _one_by_one(call: Callable[..., object], *parts: Sequence) -> None:
    for row in range(len(parts[0])):
        call(*(part[row : row + 1] for part in parts))
