"""How a network uses its 4-D weights, learnt by watching it on a few images: never from the names or classes of its modules.

One forward is watched, function by function. Every `conv2d` whose weight is a 4-D parameter, or is computed from one alone and row
by row, belongs to that parameter's layer. If one BatchNorm (running statistics) takes its output, and nothing else does, the two are
one affine map and are folded into one kernel. What is used in any other way is told, layer by layer, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout

CONVOLUTIONS = (torch.conv2d, F.conv2d)
TOLERANCE = 1e-3  # of the largest logit, between two ways to compute the same logits in float32


@dataclass(frozen=True)
class Use:
    """One call of conv2d in a forward. layer: position in the layout, None for a kernel that is no 4-D parameter.

    kernel: [O, I / groups, k, k] and bias: [O] or None, the BatchNorm's affine map folded in where `norm` says that one follows;
    scale: [O], what folding multiplied the kernel by (1 without); rest: [O], what a map is with the filter's weights and its
    BatchNorm's bias (or its own) at zero; plain: the kernel is the parameter itself, not computed from it.
    """

    layer: int | None
    norm: bool = False
    plain: bool = True
    kernel: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    rest: torch.Tensor | None = None


@dataclass
class Plan:
    """uses: of every conv2d of a forward, in order; strange: layer -> why its filters' maps cannot be told; classes: C; calls: layer ->
    its uses."""

    uses: list[Use]
    strange: dict[int, str]
    classes: int
    calls: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self):
        for call, use in enumerate(self.uses):
            if use.layer is not None:
                self.calls.setdefault(use.layer, []).append(call)


@torch.no_grad()
def watch(network: torch.nn.Module, layout: FilterLayout, images: torch.Tensor) -> Plan:
    """The plan of a network in eval mode. images: float32 [B, 3, H, W], one or more, on the network's device.

    Raises BadRequest if an image's logits depend on which images share its batch, ValueError in training mode.
    """
    if any(module.training for module in network.modules()):
        raise ValueError("interventions are defined in eval mode; call network.eval() first")
    images = trial(images)
    weights = [p for p in network.parameters() if p.dim() == 4]
    watched = _Watch(weights, images)
    with watched:
        logits = network(images.clone())  # which it may change in place
    if not close(network(images[:1].clone()), logits[:1]):
        raise BadRequest("--model: an image's logits depend on which images share its batch, so no batch of interventions is exact; give its BatchNorm running statistics")
    strange = {layer: reasons[0] for layer, reasons in watched.strange.items()}
    strange |= _mixed_rows(network, weights, images, watched)
    unseen = [layer for layer in range(len(weights)) if layer not in strange and layer not in {u.layer for u in watched.found}]
    if unseen and _matter(network, [weights[layer] for layer in unseen], images, logits):
        strange |= {layer: "it changes the logits, but no use of it can be seen" for layer in unseen}
    return Plan([_folded(use, watched) for use in watched.found], strange, logits.shape[1])


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


def trial(images: torch.Tensor) -> torch.Tensor:
    """Two different images [2, 3, H, W]: the first two, or one and its negative."""
    return images[:2] if len(images) > 1 else torch.cat([images, -images.flip(-1)])


def refuse(plan: Plan, layout: FilterLayout) -> None:
    """Raises BadRequest naming the first layer whose filters have no map that could be told."""
    for layer, reason in sorted(plan.strange.items()):
        raise BadRequest(f"--model: the filters of {layout.layers[layer][0]} cannot be turned off: {reason}; a network is needed whose 4-D weights all are kernels of 2-D convolutions")


@dataclass
class _Found:
    """A call of conv2d as it was watched: its tensors, and every function that then took its output."""

    layer: int | None
    plain: bool
    weight: torch.Tensor
    bias: torch.Tensor | None
    takers: list = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Follows two kinds of tensors through every function: those computed from the images, and those computed from 4-D weights alone.

    All of them are kept until the end, so that an id is one tensor.
    """

    def __init__(self, weights: list[torch.nn.Parameter], images: torch.Tensor):
        super().__init__()
        self.batch = len(images)
        self.origin = {id(w): i for i, w in enumerate(weights)}  # tensors that are a layer's weight, or computed from it alone
        self.parameters = set(self.origin)
        self.activations = {id(images)}
        self.found: list[_Found] = []
        self.outputs: dict[int, _Found] = {}
        self.strange: dict[int, list[str]] = {}
        self.kept = [images]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [t for t in leaves(out) if isinstance(t, torch.Tensor)]
        if not made:
            return out  # it only asked for a shape or a type
        taken = [t for t in leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.kept += made + taken
        for tensor in taken:
            if id(tensor) in self.outputs:
                self.outputs[id(tensor)].takers.append((func, args, kwargs))
        active = any(id(t) in self.activations for t in taken)
        if active:
            self.activations.update(map(id, made))
        if func in CONVOLUTIONS and active:
            self._convolved(out, *args, **kwargs)
        else:
            self._pass(getattr(func, "__name__", "a function"), taken, made, active)
        return out

    def _convolved(self, out, input, weight, bias=None, *geometry, **named):
        layer = self.origin.get(id(weight))
        plain = id(weight) in self.parameters
        use = _Found(layer, plain, weight if plain else weight.clone(), bias)  # one that is computed may be a view
        self.found.append(use)
        self.outputs[id(out)] = use
        if layer is not None and (input.dim() != 4 or len(input) != self.batch):
            self._object(layer, f"its convolution sees {list(input.shape)}, not one map for each of {self.batch} images")
        for other in (input, bias):
            if id(other) in self.origin:
                self._object(self.origin[id(other)], "it goes through conv2d, not as the kernel")

    def _pass(self, name, taken, made, active) -> None:
        layers = {self.origin[id(t)] for t in taken if id(t) in self.origin}
        if active or len(layers) > 1:
            for layer in layers:
                self._object(layer, f"its weight goes through {name}" + ("" if active else " together with another layer's"))
        elif layers:
            self.origin.update({id(t): min(layers) for t in made})

    def _object(self, layer: int, reason: str) -> None:
        self.strange.setdefault(layer, []).append(reason)


def _folded(found: _Found, watched: _Watch) -> Use:
    if found.layer is None:
        return Use(None)
    weight, bias = found.weight.detach(), found.bias
    ones = weight.new_ones(weight.shape[0])
    norm = _norm_of(found, watched)
    if norm is None:
        return Use(found.layer, False, found.plain, weight, bias, ones, torch.zeros_like(ones))
    mean, var, gamma, beta, eps = norm
    mean, var = mean.double(), var.double()
    gamma, beta, own = (mean.new_full(mean.shape, value) if t is None else t.detach().double() for t, value in ((gamma, 1), (beta, 0), (bias, 0)))
    scale = gamma / torch.sqrt(var + eps)
    rest = scale * (own - mean)
    kernel = weight.double() * scale[:, None, None, None]
    return Use(found.layer, True, found.plain, *(t.to(weight.dtype) for t in (kernel, rest + beta, scale, rest)))


def _norm_of(found: _Found, watched: _Watch):
    """(mean, var, gamma, beta, eps) of the one BatchNorm that alone takes a convolution's output, or None."""
    if len(found.takers) != 1 or found.takers[0][0] is not F.batch_norm:
        return None

    def arguments(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        return running_mean, running_var, weight, bias, eps, training, input

    *norm, training, input = arguments(*found.takers[0][1], **found.takers[0][2])
    return None if training or norm[0] is None or watched.outputs.get(id(input)) is not found else norm


def _mixed_rows(network, weights, images, watched) -> dict[int, str]:
    """Layers of which a kernel is computed, but not row by row: where some rows of the parameter are changed, others change with them."""
    computed = sorted({u.layer for u in watched.found if u.layer is not None and not u.plain} - set(watched.strange))
    strange = {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3 if computed else 0):
        rows = {layer: (torch.rand(len(weights[layer]), generator=generator) < 0.5).to(weights[layer].device) for layer in computed}
        again = _Watch(weights, images)
        with _changed([weights[layer] for layer in computed], [rows[layer] for layer in computed]), again:
            network(images.clone())
        for before, after in zip(watched.found, again.found):
            if before.layer in rows:
                same = len(before.weight) == len(rows[before.layer]) and before.weight.shape == after.weight.shape
                moved = (before.weight != after.weight).flatten(1).any(1) if same else None
                if not same or not torch.equal(moved, rows[before.layer]):
                    strange[before.layer] = "its kernel is computed from its weight, and not filter by filter"
    return strange


def _matter(network, weights, images, logits) -> bool:
    with _changed(weights, [slice(None)] * len(weights)):
        return not torch.equal(network(images.clone()), logits)


class _changed:
    """Rows of some parameters are others inside; they are exactly what they were afterwards."""

    def __init__(self, weights, rows):
        self.weights, self.rows = weights, rows

    def __enter__(self):
        self.before = [w.detach().clone() for w in self.weights]
        generator = torch.Generator().manual_seed(1)
        for weight, rows in zip(self.weights, self.rows):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.data[rows] = (weight.data * 1.25 + noise * weight.data.abs().mean())[rows]

    def __exit__(self, *_):
        for weight, before in zip(self.weights, self.before):
            weight.data.copy_(before)


def leaves(value):
    """What a nest of tuples, lists and dicts holds."""
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from leaves(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves(v)
    else:
        yield value
