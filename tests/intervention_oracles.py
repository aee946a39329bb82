"""What interventions should give, in the slowest and plainest way: copy the network, edit its weights, one sample at a time, in
float64. Nothing here imports the code under test.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F


def filters(network: torch.nn.Module) -> list[tuple[str, int]]:
    """(parameter name, row) of every filter, in vector order."""
    return [(name, row) for name, p in network.named_parameters() if p.dim() == 4 for row in range(p.shape[0])]


def pruned(network: torch.nn.Module, off: list[int], norms: dict[str, str], mode: str) -> torch.nn.Module:
    """A copy in float64 with the filters of these columns turned off. norms: convolution's module name -> its BatchNorms' (one a use).

    `map`: the weights, the convolution's bias, and the BatchNorm's gamma and beta at zero, so that the map after it is zero; a BatchNorm
    without gamma gives zero for its mean, so there the bias is the mean. `weights-and-bias`: the weights at zero, and the BatchNorm's
    beta, or without one the convolution's bias.
    """
    edited = copy.deepcopy(network).double().eval()
    parameters, modules, table = dict(edited.named_parameters()), dict(edited.named_modules()), filters(edited)
    with torch.no_grad():
        for column in off:
            name, row = table[column]
            owner = name.rpartition(".")[0].removesuffix(".parametrizations.weight")
            following = [modules[norm] for norm in norms.get(owner, "").split()]
            users = {modules[owner], *(m for m in modules.values() if getattr(m, "weight", None) is parameters[name])}  # tied weights have more than one
            biases = [m.bias for m in users if getattr(m, "bias", None) is not None]
            parameters[name][row] = 0
            for bias in biases if not following or mode == "map" else ():
                bias[row] = 0
            for norm in following:
                if norm.affine:
                    norm.bias[row] = 0
                if norm.affine and mode == "map":
                    norm.weight[row] = 0
                if not norm.affine and mode == "map":
                    biases[0][row] = norm.running_mean[row]
    return edited


def alone(network: torch.nn.Module, image: torch.Tensor) -> np.ndarray:
    """Logits float64 [C] of one image [3, H, W]."""
    with torch.no_grad():
        return network(image[None].double().clone())[0].numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def stepped(network: torch.nn.Module, image: torch.Tensor, label: int, columns: list[int] | str, rate: float, scope: str) -> torch.nn.Module:
    """A copy in float64 after one normalised step on one sample: on the filters of these columns, or on `all` parameters, or on every
    `conv` weight. scope: one norm over all that moves (`global`), or one a filter (`filter`). Where a norm is zero nothing moves."""
    edited = copy.deepcopy(network).double().eval()
    named = dict(edited.named_parameters())
    wanted = [p.requires_grad_(True) for p in named.values()]
    loss = F.cross_entropy(edited(image[None].double().clone()), torch.tensor([label]))
    gradients = dict(zip(named, torch.autograd.grad(loss, wanted, allow_unused=True)))
    pieces = []  # (parameter, index into it)
    if columns == "all":
        pieces = [(name, ...) for name in named]
    else:
        table = filters(edited)
        pieces = table if columns == "conv" else [table[c] for c in columns]
    pieces = [(named[name], index, gradients[name][index]) for name, index in pieces if gradients[name] is not None]
    total = sum(float((g**2).sum()) for _, _, g in pieces) ** 0.5
    with torch.no_grad():
        for parameter, index, g in pieces:
            norm = total if scope == "global" else float((g**2).sum()) ** 0.5
            if norm > 0:
                parameter[index] -= rate * g / norm
    return edited
