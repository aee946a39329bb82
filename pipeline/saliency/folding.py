"""Which BatchNorms can be folded into the convolution before them, found by what a network does.

In eval mode a BatchNorm is affine, y = a x + c with a = gamma / sqrt(var + eps), and where nothing but it looks at the convolution's output,
the two are one convolution with weights a W. Forward and backward are then spared two passes over memory each. Since dL/dW = a dL/d(a W),
the filter saliency of the original weights is that of the folded ones times |a|, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (torch.conv2d, F.conv2d)
NORMS = (F.batch_norm, torch.batch_norm)
LOOKS = ("dim", "size", "numel", "requires_grad_", "is_floating_point", "is_complex")  # functions that only ask about a tensor
VIEWS = ("T", "H", "mT", "mH", "real")  # properties through which its values pass


@dataclass(frozen=True)
class Norm:
    """The arguments of one call of batch_norm."""

    input: torch.Tensor | None
    mean: torch.Tensor | None
    variance: torch.Tensor | None
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    training: bool
    eps: float

    @classmethod
    def of(cls, func, args, kwargs) -> Norm:
        """Of either spelling."""
        if func is torch.batch_norm:
            names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
        else:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, args)) | kwargs
        return cls(*(given.get(n) for n in ("input", "running_mean", "running_var", "weight", "bias")), given.get("training", False), given.get("eps", 1e-5))

    @property
    def own(self) -> tuple[torch.Tensor | None, ...]:
        """What it does to its input, but for eps."""
        return self.mean, self.variance, self.gamma, self.beta

    def again(self, other: Norm) -> bool:
        """Whether another call does the same to its input: with the very same tensors."""
        return self.eps == other.eps and self.training == other.training and all(a is b for a, b in zip(self.own, other.own))


@dataclass(frozen=True)
class Fold:
    """A convolution with the BatchNorm that follows it. weight, bias: of the one that stands for both; scale: |a|, float32 [O]; norm: the BatchNorm, by which it is known again."""

    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor
    norm: Norm


def folds(network: torch.nn.Module, weights: list[torch.nn.Parameter], images: torch.Tensor) -> dict[int, Fold]:
    """layer -> what stands for it and its BatchNorm. network: in eval mode; weights: its 4-D ones, in vector order; images: float32 [B, 3, H, W], one or more."""
    watch, lasting = _Watch(weights), {id(t) for t in (*network.parameters(), *network.buffers())}
    with torch.no_grad(), watch:
        watch.use(network(images.clone()))
    return {layer: _fold(weights[layer], calls[0].bias, calls[0].users[0]) for layer, calls in watch.calls.items() if len(calls) == 1 and _alone(calls[0], lasting)}


@dataclass(frozen=True)
class _Call:
    """One convolution: its bias and output, and what looked at that: a Norm, or None for anything else."""

    bias: torch.Tensor | None
    output: torch.Tensor
    users: list[Norm | None]


class _Watch(TorchFunctionMode):
    """Records the convolutions of `weights`, and who uses their outputs."""

    def __init__(self, weights: list[torch.nn.Parameter]):
        super().__init__()
        self.layer = {id(w): i for i, w in enumerate(weights)}
        self.calls: dict[int, list[_Call]] = {}
        self.outputs: dict[int, _Call] = {}  # calls hold their outputs, so that an id means one tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        norm = Norm.of(func, args, kwargs) if func in NORMS else None
        if norm and id(norm.input) in self.outputs:
            self.outputs[id(norm.input)].users.append(norm)
        elif not looks_only(func):
            self.use((args, kwargs))
        result = func(*args, **kwargs)
        if func in CONVOLUTIONS:
            given = dict(zip(("input", "weight", "bias"), args)) | kwargs
            layer = self.layer.get(id(given["weight"]))
            if layer is not None:
                call = _Call(given.get("bias"), result, [])
                self.calls.setdefault(layer, []).append(call)
                self.outputs[id(result)] = call
        return result

    def use(self, values: object) -> None:
        for value in leaves(values):
            if id(value) in self.outputs:
                self.outputs[id(value)].users.append(None)


def _alone(call: _Call, lasting: set[int]) -> bool:
    """Whether one BatchNorm with fixed statistics is all that looks at a convolution. lasting: ids of the network's parameters and buffers; what a forward computes may be another the next time."""
    if len(call.users) != 1 or call.users[0] is None:
        return False
    norm = call.users[0]
    return not norm.training and norm.mean is not None and norm.variance is not None and call.output.dim() == 4 and all(t is None or id(t) in lasting for t in norm.own)


def _fold(weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm) -> Fold:
    """Computed in float64: what folding adds to the error is one rounding of each weight."""
    exact = lambda t, default: torch.full_like(norm.mean, default, dtype=torch.float64) if t is None else t.detach().double()  # noqa: E731
    a = exact(norm.gamma, 1.0) / (norm.variance.double() + norm.eps).sqrt()
    shift = exact(norm.beta, 0.0) + a * (exact(bias, 0.0) - norm.mean.double())
    return Fold((weight.detach().double() * a[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype), a.abs().to(torch.promote_types(weight.dtype, torch.float32)), replace(norm, input=None))


def looks_only(func) -> bool:
    """Whether a torch function asks about a tensor (its shape, its type) and passes none of its values on."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in VIEWS
    return name in LOOKS


def leaves(value: object) -> list:
    """All values in nested lists, tuples and dicts."""
    found, nested = [], [value]
    for one in nested:  # which grows meanwhile
        if isinstance(one, (tuple, list)):
            nested.extend(one)
        elif isinstance(one, dict):
            nested.extend(one.values())
        else:
            found.append(one)
    return found
