"""`faultline bench maps`: what an input saliency map costs beside a plain forward and backward pass of the same image, in one process."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from jobs import cluster
from jobs.bench.engine import step, subject
from jobs.bench.measure import Measure, medians
from pipeline import models
from pipeline.errors import BadRequest
from pipeline.explanation.input_saliency import InputSaliency
from pipeline.filters import FilterLayout
from pipeline.saliency import set_precision
from pipeline.statistics import Reference

MODELS = ("resnet50", "squeezenet1_1", "resnet56")
FILTERS = 10  # boosted


def bench_maps(names: list[str], device: str | None, rounds: int) -> list[Measure]:
    """Images a second of maps, one image at a time, beside plain passes of the same images one at a time and as one batch. Raises BadRequest."""
    if rounds < 1:
        raise BadRequest(f"--rounds: {rounds} is less than 1")
    device = cluster.device_for(device, None)
    torch.set_num_threads(cluster.threads_of_an_engine())
    set_precision("fp32")
    found = []
    for name in names:
        images, labels, network = subject(name, models.build(name), None, device)
        layout = FilterLayout.of(network)
        engine = InputSaliency(network, Reference(np.zeros(layout.total), np.ones(layout.total), 2, "abs", "bench"))
        columns = [np.arange(FILTERS)] * len(images)
        network.requires_grad_(True)
        seconds = medians({"maps": partial(engine, images, labels, columns), "one by one": partial(_one_by_one, network, images, labels), "one batch": partial(step, network, images, labels)}, rounds)
        rate = {key: len(images) / value for key, value in seconds.items()}
        for floor in ("one by one", "one batch"):
            found.append(Measure(f"{name}: maps of {len(images)} images", rate["maps"], "images/s", f"forward and backward, {floor}", rate[floor], rate[floor] / rate["maps"]))
    return found


def _one_by_one(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    for image, label in zip(images, labels):
        step(network, image[None], label[None])
