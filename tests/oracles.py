"""What the numbers should be, said in the slowest and plainest way, in float64. Nothing here imports the code under test.

N samples, F filters, K neighbours, C classes, as everywhere.
"""

from __future__ import annotations

import copy
import math
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def saliency(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, aggregation: str) -> np.ndarray:
    """s̄, float64 [N, F], one sample at a time: d(cross-entropy)/d(weight) for each 4-D weight, then the mean over each of its
    rows: of |g| (`abs`), or |of g| (`signed`). A weight that the loss does not depend on has gradient 0."""
    network = copy.deepcopy(network).double().eval()
    weights = [p.requires_grad_(True) for _, p in network.named_parameters() if p.dim() == 4]
    rows = []
    for image, label in zip(images.double().clone(), labels):  # which a network may change in place
        with mock.patch.object(F, "batch_norm", batch_norm), mock.patch.object(F, "instance_norm", instance_norm), mock.patch.object(F, "hardsigmoid", hardsigmoid):
            loss = F.cross_entropy(network(image[None]), label[None])
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        row = []
        for weight, gradient in zip(weights, gradients):
            filters = torch.zeros_like(weight) if gradient is None else gradient
            filters = filters.reshape(weight.shape[0], -1)
            row.extend(filters.abs().mean(1).tolist() if aggregation == "abs" else filters.mean(1).abs().tolist())
        rows.append(row)
    return np.array(rows, dtype=np.float64)


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """By its formula: for a batch of one, torch's own has a gradient that is wrong in some layouts of memory."""
    axes, shape = [0, *range(2, input.dim())], (1, -1, *[1] * (input.dim() - 2))
    mean, var = (input.mean(axes), input.var(axes, correction=0)) if training else (running_mean, running_var)
    out = (input - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    return out * (1 if weight is None else weight.view(shape)) + (0 if bias is None else bias.view(shape))


def instance_norm(input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5):
    """One BatchNorm an image."""
    return torch.cat([batch_norm(image[None], running_mean, running_var, weight, bias, use_input_stats, momentum, eps) for image in input])


def hardsigmoid(input, inplace=False):
    """By its formula: the sixth in the backward pass of torch's own is of float32, whatever the type."""
    return F.relu6(input + 3) / 6


def logits(network: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    """float64 [N, C], one sample at a time."""
    network = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        return torch.cat([network(image[None]) for image in images.double().clone()]).numpy()


def relative_errors(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[N]: |got - truth| / |truth|, Euclidean norms over the filters."""
    return np.linalg.norm(np.asarray(got, dtype=np.float64) - truth, axis=1) / np.linalg.norm(truth, axis=1)


def mean_and_std(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of [N, F], in two passes over each filter, its sums exact: mean, then std with n - 1 (0 for fewer than two rows)."""
    means, stds = [], []
    for column in rows.T.astype(np.float64).tolist():
        means.append(math.fsum(column) / len(column))
        squares = math.fsum((value - means[-1]) ** 2 for value in column)
        stds.append(math.sqrt(squares / (len(column) - 1)) if len(column) > 1 else 0.0)
    return np.array(means), np.array(stds)


def standardise(rows: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """ŝ, float64 [N, F]; a filter with std <= 1e-12 is dead and gives 0."""
    out = np.zeros(rows.shape)
    for i, row in enumerate(rows):
        for k, value in enumerate(row):
            if std[k] > 1e-12:
                out[i, k] = (float(value) - mean[k]) / std[k]
    return out


def cosine_neighbours(queries: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions int [Q, K], cosine float64 [Q, K]) of the `count` most similar rows, best first, the first of equals first.
    A vector of zeros has similarity 0 with everything."""
    positions, similarities = [], []
    for query in queries.astype(np.float64):
        scores = []
        for row in rows.astype(np.float64):
            norms = np.sqrt(query @ query) * np.sqrt(row @ row)
            scores.append(query @ row / norms if norms > 0 else 0.0)
        order = np.argsort(-np.array(scores), kind="stable")[:count]
        positions.append(order)
        similarities.append(np.array(scores)[order])
    return np.array(positions), np.array(similarities)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result
