"""One normalised gradient step on some filters of a network, and what it does to other images (section 3.3, figure 6).

g is the gradient of one sample's own cross-entropy in eval mode; the step at a rate is theta_F -= rate * g_F / |g_F|, on the conv weights
of the filters F alone, or on the whole network. Where |g_F| is 0 nothing changes, and `Step.unmoved` says so.

Updated networks are never copied. Many updates share one forward: where a convolution's kernel is another for some of them, each of these
has its images convolved with its own, and until its first one an update is not computed at all. (Adding conv(x, -rate * step) to the chosen
maps is the same by linearity, and slower: convolutions with one or two filters are.) Steps on whole parameters, and on weights that are no
plain kernels of a convolution, are written in place, one update at a time, and taken back to the bit: meanwhile no other thread may use the
network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout
from pipeline.interventions.branching import Convolve, Forward
from pipeline.interventions.pruning import batch_size
from pipeline.interventions.watching import Use, watch
from pipeline.saliency.loss import cross_entropy

SCOPES = ("global", "filter")
WHOLES = ("all", "conv")
PIECE = 16  # images of a group computed together, beside those of other groups: many updates of few images share more than few of many


@dataclass(frozen=True)
class Part:
    """What a step takes from one parameter at rate 1: direction [n, ...], from its rows int64 [n], or from all of it (None)."""

    parameter: str
    rows: torch.Tensor | None
    direction: torch.Tensor


@dataclass(frozen=True)
class Step:
    """A normalised step; without parts it changes nothing. unmoved: how many of its filters stay as they are because their gradient is 0."""

    parts: tuple[Part, ...]
    unmoved: int = 0


NOTHING = Step(())


class Gradient:
    """g of one sample: parameter name -> d(cross-entropy)/d(parameter), 0 where the loss does not depend on it.

    image: float32 [3, H, W]; label: 0..C-1. Network in eval mode, or ValueError. Every step of the sample is taken from this one gradient.
    """

    def __init__(self, network: torch.nn.Module, layout: FilterLayout, image: torch.Tensor, label: int):
        if any(module.training for module in network.modules()):
            raise ValueError("interventions are defined in eval mode; call network.eval() first")
        named = dict(network.named_parameters())
        with _asking(named.values()), torch.enable_grad():
            loss = cross_entropy(network(image[None].clone()), torch.tensor([label], device=image.device)).sum()
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if loss.requires_grad else [None] * len(named)
        self.layout = layout
        self.parameters = {name: torch.zeros_like(p) if g is None else g.detach() for (name, p), g in zip(named.items(), found)}
        self.kernels = [name for name, p in named.items() if p.dim() == 4]  # in the order of the layout

    def step(self, columns: np.ndarray, scope: str = "global") -> Step:
        """On the filters of these columns of the vector. scope: `global`, one norm over all of their weights; `filter`, each filter's
        gradient by its own norm, so that every filter moves as far."""
        _check(scope, SCOPES)
        columns = np.sort(np.asarray(columns, dtype=np.int64))
        rows, starts = [], np.array([s.start for s in self.layout.slices.values()])
        for layer, name in enumerate(self.kernels):
            inside = columns[np.searchsorted(starts, columns, side="right") - 1 == layer] - starts[layer]
            if len(inside):
                chosen = torch.from_numpy(inside).to(self.parameters[name].device)
                rows.append((name, chosen, self.parameters[name][chosen]))
        return _normalised(rows, scope)

    def whole(self, which: str = "all", scope: str = "global") -> Step:
        """On `all` parameters, or on all `conv` weights (the 4-D ones). Only `conv` has the scope `filter`."""
        _check(which, WHOLES)
        if which == "all" and scope == "filter":
            raise ValueError("the whole network is not made of filters alone: its step has one norm (scope 'global')")
        _check(scope, SCOPES)
        names = self.parameters if which == "all" else self.kernels
        return _normalised([(name, None, self.parameters[name]) for name in names], scope)


def take(network: torch.nn.Module, layout: FilterLayout, image: torch.Tensor, label: int, columns: np.ndarray, scope: str = "global") -> Step:
    """`Gradient(...).step(columns, scope)`: one step of one sample."""
    return Gradient(network, layout, image, label).step(columns, scope)


def _normalised(rows: list[tuple[str, torch.Tensor | None, torch.Tensor]], scope: str) -> Step:
    """rows: (parameter, its rows, their gradient [n, ...]) of everything that moves."""
    squares = [g.double().square().flatten(1).sum(1) if g.dim() == 4 else g.double().square().sum()[None] for _, _, g in rows]
    unmoved = sum(int((s == 0).sum()) for s, (_, _, g) in zip(squares, rows) if g.dim() == 4)
    whole = float(torch.stack([s.sum().cpu() for s in squares]).sum().sqrt()) if rows else 0.0
    if whole == 0:
        return Step((), unmoved)
    norms = [s.sqrt().view(-1, 1, 1, 1) if scope == "filter" else whole for s in squares]
    return Step(tuple(Part(name, at, torch.nan_to_num(g.double() / norm, nan=0.0).to(g.dtype)) for (name, at, g), norm in zip(rows, norms)), unmoved)


@dataclass(frozen=True)
class Group:
    """An updated network and the images it is asked about: int64 [n], positions in the images of `Tuner.logits`."""

    step: Step
    rate: float
    images: torch.Tensor


class Tuner:
    """Logits of many updated networks. network: in eval mode; images: float32 [B, 3, H, W], real ones, on which it is watched.

    kernels: the parameters (name -> layer) whose updates share forwards; other steps are written in place. Raises BadRequest if an image's
    logits depend on which images share its batch.
    """

    def __init__(self, network: torch.nn.Module, layout: FilterLayout, images: torch.Tensor):
        self.network, self.layout, self.kernels = network, layout, {}
        self.plan = watch(network, layout, images)
        try:
            self.forward = Forward(network, self.plan, images)
        except BadRequest:  # then every step is written in place
            self.forward = None
            return
        for layer, name in enumerate(name for name, p in network.named_parameters() if p.dim() == 4):
            if layer not in self.plan.strange and all(self.plan.uses[call].plain for call in self.plan.calls.get(layer, ())):
                self.kernels[name] = layer

    def logits(self, images: torch.Tensor, groups: Sequence[Group]) -> list[torch.Tensor]:
        """Logits [n, C] of every group, in their order. images: float32 [S, 3, H, W]."""
        size, parts = 2 * batch_size(images), [[images.new_zeros(0, self.plan.classes)] for _ in groups]
        shared = [i for i, g in enumerate(groups) if self.forward and all(p.rows is not None and p.parameter in self.kernels for p in g.step.parts)]
        for i in sorted(set(range(len(groups))) - set(shared)):
            with written(self.network, groups[i].step, groups[i].rate):
                parts[i] += self._plain(images[groups[i].images.to(images.device)], size)
        pieces = []
        for i in sorted(shared, key=lambda i: self._first(groups[i].step)):
            count = -(-len(groups[i].images) // min(PIECE, size))
            pieces += [(turn, i, Group(groups[i].step, groups[i].rate, some)) for turn, some in enumerate(groups[i].images.chunk(max(1, count))) if len(some)]
        for batch in _batches(sorted(pieces, key=lambda p: p[0]), size):
            chosen = [piece for *_, piece in batch]
            logits = self.forward(images, torch.cat([g.images for g in chosen]), _Rows(self, chosen))
            for (_, i, _), part in zip(batch, logits.split([len(g.images) for g in chosen])):
                parts[i].append(part)
        return [torch.cat(p) for p in parts]

    def _first(self, step: Step) -> int:
        """The first convolution of a forward that a step changes."""
        calls = (self.plan.calls.get(self.kernels[p.parameter], ()) for p in step.parts)
        return min((min(c) for c in calls if c), default=len(self.plan.uses))

    @torch.inference_mode()
    def _plain(self, images: torch.Tensor, size: int) -> list[torch.Tensor]:
        if self.forward and self.forward.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return [self.network(some) for some in images.split(size) if len(some)]


def _batches(pieces: list[tuple[int, int, Group]], size: int) -> Iterator[list[tuple[int, int, Group]]]:
    """Stretches of the pieces with up to `size` images."""
    batch, rows = [], 0
    for piece in pieces:
        count = len(piece[-1].images)
        if batch and rows + count > size:
            yield batch
            batch, rows = [], 0
        batch.append(piece)
        rows += count
    if batch:
        yield batch


class _Rows:
    """`branching.Edits`: each group's images see the kernels of its own step."""

    def __init__(self, tuner: Tuner, groups: Sequence[Group]):
        plan = tuner.plan
        self.first = torch.repeat_interleave(torch.tensor([tuner._first(g.step) for g in groups]), torch.tensor([len(g.images) for g in groups]))
        self.calls: dict[int, list[tuple[slice, Part, float]]] = {}
        start = 0
        for group in groups:
            branches = slice(start, start + len(group.images))
            start = branches.stop
            for part in group.step.parts:
                for call in plan.calls.get(tuner.kernels[part.parameter], ()):
                    self.calls.setdefault(call, []).append((branches, part, group.rate))

    def output(self, call: int, use: Use, rows: torch.Tensor, convolve: Convolve) -> torch.Tensor:
        pieces, done = [], 0
        moved = [(int(rows[branches.start]), branches.stop - branches.start, part, rate) for branches, part, rate in self.calls[call]]
        for start, count, part, rate in sorted(moved, key=lambda m: m[0]):
            if start > done:
                pieces.append(convolve(slice(done, start)))
            kernel = use.kernel.index_add(0, part.rows, part.direction * use.scale[part.rows, None, None, None], alpha=-rate)
            pieces.append(convolve(slice(start, start + count), kernel))  # a group's branches join together, and so stay side by side
            done = start + count
        rest = convolve(slice(done, None))
        return torch.cat([*pieces, rest]) if len(rest) else torch.cat(pieces)


@contextmanager
def written(network: torch.nn.Module, step: Step, rate: float) -> Iterator[None]:
    """The network's parameters are updated inside, in place; afterwards every bit is as before, whatever was raised."""
    named = dict(network.named_parameters())
    before = [(named[p.parameter], named[p.parameter].detach().clone()) for p in step.parts]
    try:
        with torch.no_grad():
            for part, (parameter, _) in zip(step.parts, before):
                if part.rows is None:
                    parameter.sub_(part.direction, alpha=rate)
                else:
                    parameter.index_add_(0, part.rows, part.direction, alpha=-rate)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@contextmanager
def _asking(parameters) -> Iterator[None]:
    """Every parameter asks for a gradient inside; each asks as before afterwards."""
    asked = [(p, p.requires_grad) for p in parameters]
    for parameter, _ in asked:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in asked:
            parameter.requires_grad_(flag)


def _check(value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"'{value}' is none of {', '.join(known)}")
