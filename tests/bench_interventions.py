"""How fast interventions are beside the naive way, as ratios in one run: `python tests/bench_interventions.py [--rounds N] [--threads T]` prints JSON.

resnet56 at 32 x 32, with the real weights and photographs under FAULTLINE_DATA, otherwise with random ones. The naive way copies the network
for every setting, edits the copy and asks it one image at a time, in float32 as the fast way does, and in float64 as the tests' oracles do. The plain forward
is the floor: the network as it is asked once about as many images, in large batches; no way that computes every layer of them takes less. The ways take
turns, so that whatever else the machine does meets them all; `wall` is of the clock, `cpu` of this process's own time on all cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pipeline import models
from pipeline.cifar import NETWORKS
from pipeline.filters import FilterLayout
from pipeline.interventions import transfer
from pipeline.interventions.choice import STRATEGIES, ranking
from pipeline.interventions.finetuning import Tuner
from pipeline.interventions.pruning import MODES, Pruner, effects
from pipeline.saliency import make_engine
from pipeline.statistics import Moments, Reference

KS = (1, 5, 10, 20, 50, 100)


def subject(count: int = 192):
    """(network, layout, images [count, 3, 32, 32], labels, ŝ, live), the misclassified first."""
    if folder := os.environ.get("FAULTLINE_DATA"):
        from test_real_data import batch

        classifier = models.load("resnet56", str(Path(folder) / "cifar10/resnet56.safetensors"), None)
        network, (images, labels) = classifier.network, batch(Path(folder), "cifar10/val-00000.tar", count, classifier)
    else:
        torch.manual_seed(0)
        network, images, labels = NETWORKS["resnet56"]().eval().requires_grad_(False), torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
    layout = FilterLayout.of(network)
    order = torch.argsort((network(images).argmax(1) == labels).int(), stable=True)
    images, labels = images[order], labels[order]
    rows = torch.cat([make_engine("fused", network, "abs")(images[i : i + 32], labels[i : i + 32]).saliency for i in range(0, count, 32)]).numpy()
    moments = Moments.of(rows)
    reference = Reference(moments.mean, moments.std, count, "abs", "")
    return network, layout, images, labels.numpy(), reference.standardise(rows), reference.live


def naive_pruning(network, layout, image, columns) -> np.ndarray:
    edited, image = copy.deepcopy(network), image.to(next(network.parameters()).dtype)
    modules = dict(edited.named_modules())
    with torch.no_grad():
        for column in columns.tolist():
            name, row = layout.locate(column)
            modules[name].weight[row] = 0
            norm = modules[name.replace("conv", "bn")]
            norm.weight[row] = norm.bias[row] = 0
        return edited(image[None]).double().softmax(1)[0].numpy()


def naive_step(network, layout, images, sample, label, columns, rate) -> np.ndarray:
    edited, images = copy.deepcopy(network).requires_grad_(True), images.to(next(network.parameters()).dtype)
    F.cross_entropy(edited(images[sample : sample + 1]), torch.tensor([label])).backward()
    with torch.no_grad():
        parameters = dict(edited.named_parameters())
        places = [(p, ...) for p in parameters.values()] if columns is None else [(parameters[layout.locate(c)[0] + ".weight"], layout.locate(c)[1]) for c in columns.tolist()]
        norm = sum(float(p.grad[at].square().sum()) for p, at in places) ** 0.5
        for parameter, at in places if norm else ():
            parameter[at] -= rate * parameter.grad[at] / norm
        return torch.cat([edited(images[i : i + 1]) for i in (sample, *range(10, 20), *range(100, 140))]).double().softmax(1).numpy()


def timed(work) -> tuple[float, float]:
    """Seconds (wall, cpu) of what `work` does."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def plain(network, images: torch.Tensor, count: int) -> None:
    """`count` images through the network as it is, in the batches and the memory format that serve it best."""
    with torch.inference_mode():
        batch = images.repeat(-(-256 // len(images)), 1, 1, 1)[:256].contiguous(memory_format=torch.channels_last)
        for first in range(0, count, len(batch)):
            network(batch[: min(len(batch), count - first)])


def compared(fast, pieces: int, naive, naive_pieces: int, network, images: torch.Tensor, of_each: int, rounds: int) -> dict:
    """Pieces a minute, and how many times faster one way is, medians over rounds. naive: called with a network in float32 or float64; of_each: images that a piece is asked about."""
    double = copy.deepcopy(network).double()
    ways = {"fast": (fast, pieces), "float32": (lambda: naive(network), naive_pieces), "float64": (lambda: naive(double), naive_pieces), "plain": (lambda: plain(network, images, pieces * of_each), pieces)}
    fast()
    seen = [{name: [seconds / count for seconds in timed(work)] for name, (work, count) in ways.items()} for _ in range(rounds)]
    answer = {"per_minute": {name: round(statistics.median(60 / s[name][0] for s in seen)) for name in ways}}
    for name, shown in (("float32", "float32_copy"), ("float64", "float64_copy"), ("plain", "plain_forward")):
        answer[f"ratio_to_{shown}"] = {clock: round(statistics.median(s[name][i] / s["fast"][i] for s in seen), 2) for i, clock in enumerate(("wall", "cpu"))}
    return answer


def pruning(subject, rounds: int) -> dict:
    network, layout, images, labels, standardised, live = subject
    ids, predictions, few = [str(i) for i in range(len(images))], labels, 24
    columns = [ranking(s, standardised[0], live, 0, "0")[:k] for s in STRATEGIES for k in KS]
    naive = lambda network: [naive_pruning(network, layout, images[0], c) for c in columns]  # noqa: E731
    answers = {}
    for mode in MODES:
        pruner = Pruner(network, layout, images, mode)
        fast = lambda: effects(pruner, images[:few], labels[:few], predictions[:few], standardised[:few], live, ids[:few], KS)  # noqa: E731, B023
        answers[mode] = compared(fast, few * len(columns), naive, len(columns), network, images, 1, rounds)
    return answers


def finetuning(subject, rounds: int) -> dict:
    """Updates: each is the sample itself, 10 neighbours and 40 controls."""
    network, layout, images, labels, standardised, live = subject
    tuner, answers = Tuner(network, layout, images), {}
    cases = [transfer.Case(str(i), i, standardised[i], np.arange(10, 20), np.arange(100, 140)) for i in range(4)]
    filters = ("salient", "random_live", "least")
    for name, strategies, ks, rates in (("20 filters", filters, (20,), (0.5,)), ("whole network", ("all",), (), (0.5,)), ("sweep", (*filters, "all"), (1, 5, 20), (0.1, 0.5, 1.0))):
        settings = [(s, k, r) for s in strategies for k in (ks if s != "all" else (0,)) for r in rates]
        chosen = settings[:: max(1, len(settings) // 4)]

        def naive(network, chosen=chosen):
            for strategy, k, rate in chosen:
                naive_step(network, layout, images, 0, int(labels[0]), None if strategy == "all" else ranking(strategy, standardised[0], live, 0, "0")[:k], rate)

        some = cases if len(settings) < 10 else cases[:1]
        answers[name] = compared(lambda: transfer.transfers(tuner, images, labels, some, live, ks, rates, strategies), len(some) * len(settings), naive, len(chosen), network, images, len(cases[0].everyone), rounds)  # noqa: B023
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    made = subject()
    print(json.dumps({"threads": asked.threads, "pruning": pruning(made, asked.rounds), "finetuning": finetuning(made, asked.rounds)}, indent=1))
