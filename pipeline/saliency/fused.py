"""The fused engine: one batched forward and backward, every layer's per-sample gradient reduced to [B, O] as it passes.

While the network runs, each `conv2d` whose weight *is* one of the network's 4-D parameters is replaced by `_Convolution`, whose
backward turns the layer's input and output gradient into filter saliency for every sample and never keeps more than a slice of
per-sample weight gradients. Memory is that of an ordinary training step.

A BatchNorm that alone follows a convolution is folded into it (`folding.py`), which spares its passes over memory; a network that then
does something else with the convolution's output than it did at first is refused, never answered wrongly.

What turns a layer's two into filter saliency is in `products.py`. It can be differentiated once more, and so can all else here: with `twice`,
s̄ is a function of the images that autograd knows, at the price of a second batched backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pipeline.filters import FilterLayout
from pipeline.saliency import Saliency, is_memory, kernels
from pipeline.saliency.folding import CONVOLUTIONS, NORMS, Fold, Norm, folds, leaves, looks_only
from pipeline.saliency.layouts import PlainLayouts
from pipeline.saliency.loss import cross_entropy
from pipeline.saliency.places import ONEDNN, Places, in_company
from pipeline.saliency.products import filter_saliency, is_channels_last, is_product, layout_of
from pipeline.saliency.replays import Replays
from pipeline.saliency.teams import Teams
from pipeline.saliency.twice import twice_differentiable


class Objection(RuntimeError):
    """The network does what this engine would not be exact for."""


class FusedEngine:
    """See `pipeline.saliency.Engine`. Exact for networks to which `objections.py` has none."""

    def __init__(self, network: torch.nn.Module, layout: FilterLayout, aggregation: str):
        self.network, self.aggregation, self.filters = network, aggregation, layout.total
        self.names = [name for name, _ in layout.layers]
        self.weights = [p for p in network.parameters() if p.dim() == 4]
        self.folds: dict[int, Fold] | None = None
        self.laid: dict[int, torch.Tensor] = {}  # layer -> its weight as its maps lie, where it lies otherwise
        self.channels_last = False
        self.replays, self.teams = Replays(), Teams(network)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> Saliency:
        """Raises Objection if a weight is used in a way that this engine does not see (never returns a partial answer).

        BatchNorms are folded at the first call; weights must not change after it. On a GPU the second batch of a shape is recorded, and it and all later ones are replays; on a CPU
        a batch is done in parts.
        """
        if not len(images):
            return self.once(images, labels)
        if images.is_cuda:
            return Saliency(*self.replays(self.once, images, labels))
        with frozen(self.network):
            return self.begin(images, labels)()

    def begin(self, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Saliency]:
        """See `pipeline.saliency.Engine`. On a CPU teams compute it meanwhile, if no parameter asks for a gradient: where one does, as it may again before they are done, all is done when this returns."""
        if not len(images) or images.is_cuda or any(p.requires_grad for p in self.network.parameters()):
            found = self(images, labels)
            return lambda: found
        size = len(images)
        images, labels = in_company(images, labels)
        self._prepare(images)
        result = self.teams.begin(self._computed, images, labels)
        return lambda: Saliency(*(t[:size] for t in result()))

    def once(self, images: torch.Tensor, labels: torch.Tensor) -> Saliency:
        """The same as one batch that is never recorded: for those that will not come again."""
        self._prepare(images)
        with frozen(self.network):
            return self._computed(self.network, images, labels)

    def _computed(self, network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Saliency:
        """network: this one, its parameters frozen, or another that has the same."""
        sink = self._sink(images)
        with torch.enable_grad(), PlainLayouts(), Places(), sink:
            logits = network(self._laid_out(images.detach())).float()
            sink.close()
            sink.refuse()
            if len(images) and logits.requires_grad:
                cross_entropy(logits, labels).sum().backward()
                sink.refuse()  # the backward pass may run parts of the network again
        return Saliency(torch.cat(sink.parts, 1), logits.detach())

    def twice(self, images: torch.Tensor, labels: torch.Tensor) -> Saliency:
        """The same as functions of the images, which ask for a gradient: autograd can differentiate both once. s̄ and logits are of the images' dtype. Raises as above."""
        self._prepare(images)
        sink = self._sink(images)
        with frozen(self.network), torch.enable_grad(), PlainLayouts(), twice_differentiable(), sink:
            logits = self.network(self._laid_out(images) if images.is_cuda else images.clone(memory_format=torch.contiguous_format))
            sink.close()
            sink.refuse()
            torch.autograd.grad(cross_entropy(logits, labels).sum(), [images, *sink.frozen], create_graph=True, allow_unused=True)
            sink.refuse()
        return Saliency(torch.cat(sink.parts, 1), logits)

    def _prepare(self, images: torch.Tensor) -> None:
        """Find out, once, how the network takes its maps and which BatchNorms are folded. Raises Objection where its weights are others than when the engine was made."""
        now = [p for p in self.network.parameters() if p.dim() == 4]
        if len(now) != len(self.weights) or any(a is not b for a, b in zip(now, self.weights)):
            raise Objection("the network's weights are others than when this engine was made: make another")
        if self.folds is None and len(images):
            self.channels_last = takes_channels_last(self.network, images[:2].detach())
            found = folds(self.network, self.weights, self._laid_out(images[:1].detach()))
            self.folds = {layer: replace(fold, weight=self._laid_out(fold.weight)) for layer, fold in found.items()}
            self.laid = {i: self._laid_out(w.detach()) for i, w in enumerate(self.weights) if i not in found and self.channels_last and not w.is_contiguous(memory_format=torch.channels_last)}

    def _laid_out(self, maps: torch.Tensor) -> torch.Tensor:
        """A copy of images, which the network may change in place, or of a weight: channels-last if it takes such maps, as convolutions like them best."""
        return maps.clone(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def _sink(self, images: torch.Tensor) -> _Sink:
        return _Sink(self.names, self.weights, self.folds or {}, self.laid, images, self.aggregation)


class _Sink(TorchFunctionMode):
    """Watches every torch function that a network calls, and takes over its convolutions.

    parts: per layer the filter saliency [B, O], zero until the backward pass reaches it (or for ever, if the loss does
    not depend on it); strange: uses of a 4-D weight that are not one plain convolution.
    """

    def __init__(self, names: list[str], weights: list[torch.nn.Parameter], folds: dict[int, Fold], laid: dict[int, torch.Tensor], images: torch.Tensor, aggregation: str):
        super().__init__()
        self.names, self.layer = names, {id(w): i for i, w in enumerate(weights)}
        self.folds, self.laid = folds, laid
        self.awaited: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}  # id of what the network has of a folded convolution -> (layer, it, its output), until its BatchNorm comes
        self.spent: dict[int, tuple[int, weakref.ref]] = {}  # the same, (layer, it), once its BatchNorm has come
        wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        self.parts = [torch.zeros(len(images), w.shape[0], device=images.device, dtype=wide) for w in weights]
        self.frozen: list[torch.Tensor] = []  # the weights that convolutions were computed with
        self.batch, self.aggregation, self.calls, self.strange = len(images), aggregation, {}, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            self._meet((args, kwargs))
            return self._convolve(*args, **kwargs)
        if func in NORMS and self.awaited:
            norm = Norm.of(func, args, kwargs)
            layer, handle, output = self.awaited.get(id(norm.input), (None, None, None))
            if layer is not None and norm.again(self.folds[layer].norm):
                del self.awaited[id(norm.input)]
                self.spent[id(handle)] = layer, weakref.ref(handle)
                return output
        if not looks_only(func):
            self._meet((args, kwargs), func)
        return func(*args, **kwargs)

    def _meet(self, values: object, func=None) -> None:
        """Note uses of a 4-D weight in a function that is no convolution, and of a folded convolution's output in one that is not its BatchNorm."""
        name = getattr(getattr(func, "__self__", func) if getattr(func, "__name__", "") == "__get__" else func, "__name__", "conv2d")
        for value in leaves(values):
            if func is not None and id(value) in self.layer:
                self.strange.append(f"the weight of {self.names[self.layer[id(value)]]} goes through {name}")
            if id(value) in self.awaited:
                self.strange.append(f"the convolution {self.names[self.awaited[id(value)][0]]} goes through {name} before its BatchNorm, as it did not at first")
            if id(value) in self.spent and self.spent[id(value)][1]() is value:
                self.strange.append(f"the convolution {self.names[self.spent[id(value)][0]]} goes through {name} besides its BatchNorm, as it did not at first")

    def close(self) -> None:
        """The network has given its answer: every folded convolution must have met its BatchNorm."""
        self.strange += [f"the convolution {self.names[layer]} is not followed by its BatchNorm, as it was at first" for layer, *_ in self.awaited.values()]

    def refuse(self) -> None:
        """Raises Objection if a 4-D weight was used in another way than in one plain convolution."""
        if self.strange:
            raise Objection(f"the fused engine is not exact here: {self.strange[0]}; use --engine vmap")

    def _convolve(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        layer = self.layer.get(id(weight))
        if layer is None:
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if self.calls[layer] > 1:
            self.strange.append(f"the weight of {self.names[layer]} is used in {self.calls[layer]} convolutions")
        if input.dim() != 4 or input.shape[0] != self.batch:
            self.strange.append(f"the convolution {self.names[layer]} sees {list(input.shape)}, not one map for each of {self.batch} images")
        stride, dilation = _pair(stride), _pair(dilation)
        if isinstance(padding, str):
            input, padding = _pad_same(input, weight, dilation) if padding == "same" else input, (0, 0)
        if not input.is_cuda and tuple(weight.shape[2:]) == (1, 1) and _pair(padding) == (0, 0):
            if stride != (1, 1) and not is_channels_last(input):  # what it reads, alone: a strided backward pass takes thrice as long
                input, stride = input[..., :: stride[0], :: stride[1]].contiguous(), (1, 1)
            if stride == (1, 1) and ONEDNN:  # a kernel of one weight has no dilation, but torch takes oneDNN's way for it, even in one thread
                dilation = (2, 2)
        fold = self.folds.get(layer)
        if fold:
            weight, bias = fold.weight, fold.bias
        if not weight.is_contiguous(memory_format=layout_of(input)):
            weight = self.laid.get(layer, weight).contiguous(memory_format=layout_of(input))
        self.frozen.append(weight.detach().requires_grad_(True))  # makes the output part of the graph; its own gradient is never computed
        output = _Convolution.apply(input, self.frozen[-1], bias, stride, _pair(padding), dilation, groups, self, layer)
        if not fold:
            return output
        handle = output.detach()  # what the network holds of it, which is to reach its BatchNorm and nothing else
        self.awaited[id(handle)] = layer, handle, output
        return handle


class _Convolution(torch.autograd.Function):
    """conv2d whose backward gives the gradient of its input, and each sample's filter saliency to the sink.

    Autograd guards the saved input: if the network changes it in place before the backward pass, that pass raises.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, dilation, groups, sink, layer):
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.sink, ctx.layer = (stride, padding, dilation, groups), sink, layer
        if bias is not None and kernels.serves(input):
            return kernels.add_bias(F.conv2d(input, weight, None, stride, padding, dilation, groups), bias)
        if is_product(input, weight, stride, padding, groups):
            places = input[..., :: stride[0], :: stride[1]].permute(0, 2, 3, 1)
            return F.linear(places, weight.flatten(1), bias).permute(0, 3, 1, 2).clone(memory_format=torch.channels_last)  # a view could not be changed in place
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, gradient):
        input, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        gradient = gradient.contiguous(memory_format=layout_of(input))  # and so are those below it
        found = filter_saliency(input.to(gradient.dtype), gradient, weight.shape, stride, padding, dilation, groups, ctx.sink.aggregation)
        fold = ctx.sink.folds.get(ctx.layer)
        ctx.sink.parts[ctx.layer] += found * fold.scale if fold else found
        below = None
        if ctx.needs_input_grad[0]:
            same = (t.to(gradient.dtype) for t in (input, weight))
            below = torch.ops.aten.convolution_backward(gradient, *same, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False))[0].to(input.dtype)
        return below, *(None,) * 8


@contextmanager
def frozen(network: torch.nn.Module):
    """No parameter asks for a gradient inside; each asks as before afterwards."""
    asked = [(p, p.requires_grad) for p in network.parameters()]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in asked:
            parameter.requires_grad_(flag)


def takes_channels_last(network: torch.nn.Module, images: torch.Tensor, noise: bool = False) -> bool:
    """Whether it gives the same logits of images [1 or more, 3, H, W] that are laid out so: a `view` across the axes raises, and `as_strided` reads other numbers. Where it gives no finite logits of any of them, noise is tried."""
    with torch.no_grad():
        plain = network(images.clone(memory_format=torch.contiguous_format))
        try:
            last = network(images.clone(memory_format=torch.channels_last))
        except Exception as fault:  # a network may ask for what it likes
            if is_memory(fault):
                raise
            return False
        sound = sound_rows(plain)
        if not sound.any() and not noise:  # of what all images of a batch happen to be nothing may depend
            return takes_channels_last(network, torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images), noise=True)
        return bool(sound.any()) and torch.allclose(last[sound], plain[sound], rtol=0.05, atol=0.05 * float(plain[sound].abs().max()))


def sound_rows(rows: torch.Tensor) -> torch.Tensor:
    """bool [B]: which rows are finite. A network may give NaN for an image that another has nothing to do with."""
    return rows.flatten(1).isfinite().all(1)


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _pad_same(input, weight, dilation) -> torch.Tensor:
    """Explicit zeros for `padding="same"`; the odd one goes right and below, as torch does."""
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    return F.pad(input, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
