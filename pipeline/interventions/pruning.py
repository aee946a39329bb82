"""Filters turned off, and what that does to a sample's confidences (section 3.1, figure 3).

`map`: a filter's map after its BatchNorm is zero; where no BatchNorm alone takes its convolution's output (none follows, a
concatenation comes between, or something else looks at it too), the map is zeroed at the convolution, bias included.
`weights-and-bias`: what the paper does, the filter's weights and its BatchNorm's bias (without one, its own) at zero. Its map then is
a constant, -gamma mu / sqrt(var + eps), and not zero.

A weight that is used more than once has its filters turned off at every use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from pipeline.filters import FilterLayout
from pipeline.interventions.branching import Convolve, Forward
from pipeline.interventions.choice import STRATEGIES, ranking
from pipeline.interventions.watching import Plan, Use, refuse, watch

MODES = ("map", "weights-and-bias")
PIXELS = {"cpu": 2**17, "cuda": 2**25}  # of the images of one batch: 128 of 32 x 32 on a CPU, where more only leave its cache

EFFECTS = pa.schema(
    [("sample_id", pa.string()), ("strategy", pa.string()), ("k", pa.int32()), ("wrong_confidence_change", pa.float64()), ("true_confidence_change", pa.float64()), ("corrected", pa.bool_())]
)


def batch_size(images: torch.Tensor) -> int:
    """Branches computed at once for images [.., 3, H, W] on their device, 8 or more."""
    return max(8, PIXELS.get(images.device.type, PIXELS["cpu"]) // (images.shape[-2] * images.shape[-1]))


class Pruner:
    """Logits of a network with filters turned off, different ones for every image of a batch.

    network: in eval mode; images: float32 [B, 3, H, W] on its device, one or more real ones, on which it is watched. Raises BadRequest
    if a filter's map cannot be told (`watching.watch` says when), ValueError for an unknown mode or a network in training mode.
    """

    def __init__(self, network: torch.nn.Module, layout: FilterLayout, images: torch.Tensor, mode: str = "map"):
        if mode not in MODES:
            raise ValueError(f"mode is '{mode}'; there are {', '.join(MODES)}")
        self.layout, self.mode = layout, mode
        plan = watch(network, layout, images)
        refuse(plan, layout)
        self.forward = Forward(network, plan, images)

    def logits(self, images: torch.Tensor, origin: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of B pairs. images: float32 [S, 3, H, W]; origin: int64 [B], the image of each pair; off: bool [B, F], the
        filters turned off, both on the CPU. Pairs are computed `batch_size` at once, those of one image best side by side."""
        size = batch_size(images)
        edits = (_Masks(self.forward.plan, self.layout, off[i : i + size], self.mode, images.device) for i in range(0, len(origin), size))
        parts = [self.forward(images, origin[i * size : (i + 1) * size], e) for i, e in enumerate(edits)]
        return torch.cat(parts) if parts else images.new_zeros(0, self.forward.plan.classes)


class _Masks:
    """`branching.Edits`: maps set to zero, or to the constant that stays of them."""

    def __init__(self, plan: Plan, layout: FilterLayout, off: torch.Tensor, mode: str, device: torch.device):
        self.mode, self.device = mode, device
        columns, branches = off.T.nonzero(as_tuple=True)  # by column, so that a layer's are a slice
        bounds = torch.searchsorted(columns, torch.tensor([0] + [s.stop for s in layout.slices.values()])).tolist()
        self.first = torch.full((len(off),), len(plan.uses))
        self.calls: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, (columns_of_layer, start, stop) in enumerate(zip(layout.slices.values(), bounds, bounds[1:])):
            for call in plan.calls.get(layer, ()) if stop > start else ():
                self.calls[call] = branches[start:stop], columns[start:stop] - columns_of_layer.start
                self.first[branches[start:stop]] = self.first[branches[start:stop]].clamp(max=call)

    def output(self, call: int, use: Use, rows: torch.Tensor, convolve: Convolve) -> torch.Tensor:
        branches, channels = self.calls[call]
        channels = channels.to(self.device)
        rest = use.rest[channels] if self.mode == "weights-and-bias" else use.rest.new_zeros(len(channels))
        maps = convolve()
        maps[rows[branches].to(self.device), channels] = rest[:, None, None]
        return maps


def effects(
    pruner: Pruner, images: torch.Tensor, labels: np.ndarray, predictions: np.ndarray, standardised: np.ndarray, live: np.ndarray,
    sample_ids: Sequence[str], ks: Sequence[int], strategies: Sequence[str] = STRATEGIES, seed: int = 0, among: slice = slice(None),
) -> pa.Table:  # fmt: skip
    """`EFFECTS`: a row for every sample, strategy and k, in that order.

    images: float32 [N, 3, H, W]; labels, predictions: int [N], of the whole network; standardised: ŝ float32 [N, F]; live: bool [F].
    Changes are of softmax probabilities in float64, after less before: wrong_ of the class `predictions`, true_ of `labels`. corrected:
    the new prediction is the label. among: the columns that may be chosen. Where k is above what a strategy may choose from, all of that is turned off.
    """
    settings = [(strategy, k) for strategy in strategies for k in ks]
    asked = np.zeros(len(live), bool)
    asked[among] = True
    pairs = len(settings) + 1  # the first of a sample has nothing turned off
    step = max(1, 16 * batch_size(images) // pairs)
    parts = []
    for start in range(0, len(images), step):
        chosen = range(start, min(start + step, len(images)))
        off = torch.zeros(len(chosen), pairs, pruner.layout.total, dtype=torch.bool)
        for i, n in enumerate(chosen):
            orders = {strategy: ranking(strategy, standardised[n], live, seed, sample_ids[n]) for strategy in strategies}
            rankings = {strategy: torch.from_numpy(order[asked[order]]) for strategy, order in orders.items()}
            for j, (strategy, k) in enumerate(settings, 1):
                off[i, j, rankings[strategy][:k]] = True
        origin = torch.arange(start, chosen.stop).repeat_interleave(pairs)
        logits = pruner.logits(images, origin, off.flatten(0, 1))
        parts.append(logits.double().softmax(1).view(len(chosen), pairs, -1).cpu().numpy())
    probabilities = np.concatenate(parts) if parts else np.zeros((0, pairs, 1))
    n = np.arange(len(images))
    change = [(probabilities[n, :, classes] - probabilities[n, :1, classes])[:, 1:].ravel() for classes in (np.asarray(predictions), np.asarray(labels))]
    corrected = probabilities[:, 1:].argmax(2) == np.asarray(labels)[:, None]
    ids = [sample_id for sample_id in sample_ids for _ in settings]
    columns = [ids, [s for s, _ in settings] * len(images), [k for _, k in settings] * len(images), *change, corrected.ravel()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, EFFECTS)], schema=EFFECTS)
