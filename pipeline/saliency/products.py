"""Filter saliency of one convolution for every sample, from what the layer saw and the gradient of what it gave.

On a CPU two per-sample products are used, both exact, chosen by shape alone (so that bits do not depend on the machine's load):
one grouped convolution with a group for every sample where weights are few, and im2col with one matrix product a sample
where they are many. On a GPU one kernel a layer does it all (`kernels.py`), where it has shown to agree with these.

For input saliency s̄ is differentiated by both of its arguments. With g the per-sample weight gradients, one filter's s̄ is mean |g|, whose derivative by g is
sign(g) / n: the signs alone are kept, a byte each, and the same two products lead back from them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipeline.saliency import kernels
from pipeline.saliency.vmap import reduce_filters

SLICE_NUMBERS = 2**24  # per-sample gradient numbers held at once: 64 MiB in float32
FEW_WEIGHTS = 2**16  # up to here a grouped convolution beats im2col on a CPU


def filter_saliency(input, gradient, shape, stride, padding, dilation, groups, aggregation) -> torch.Tensor:
    """s̄ of one convolution for every sample, float32 (float64 of float64) [B, O], differentiable once by input and gradient where autograd is on.

    input: [B, I, H, W], what the layer saw; gradient: [B, O, H', W'], dL/d(output); shape: of the weight, (O, I / groups, k, k).
    """
    geometry = (shape, stride, padding, dilation, groups)
    if torch.is_grad_enabled() and (input.requires_grad or gradient.requires_grad):
        return _Differentiable.apply(input, gradient, geometry, aggregation)
    if kernels.serves(input) and kernels.agrees(kernels.filter_saliency, by_products, input, gradient, *geometry, aggregation):
        return kernels.filter_saliency(input, gradient, *geometry, aggregation)
    return by_products(input, gradient, *geometry, aggregation)


def by_products(input, gradient, shape, stride, padding, dilation, groups, aggregation) -> torch.Tensor:
    """The same by torch's own products, a slice of samples at a time."""
    geometry = (shape, stride, padding, dilation, groups)
    parts = [reduce_filters(_weight_gradients(input[at], gradient[at], *geometry), aggregation) for at in _slices(input, geometry)]
    return torch.cat(parts) if parts else gradient.new_zeros(gradient.shape[:2])


class _Differentiable(torch.autograd.Function):
    """`by_products`, and its derivative by the input and the gradient of every sample."""

    @staticmethod
    def forward(ctx, input, gradient, geometry, aggregation):
        parts, signs = [gradient.new_zeros(0, gradient.shape[1])], []
        for at in _slices(input, geometry):
            found = _weight_gradients(input[at], gradient[at], *geometry)
            parts.append(reduce_filters(found, aggregation))
            signs.append((found if aggregation == "abs" else found.mean((2, 3, 4), keepdim=True)).sign().to(torch.int8))
        ctx.save_for_backward(input, gradient, *signs)
        ctx.geometry = geometry
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, above):
        input, gradient, *signs = ctx.saved_tensors
        weights = ctx.geometry[0][1:].numel()
        below = [torch.empty_like(input), torch.empty_like(gradient)]
        for at, sign in zip(_slices(input, ctx.geometry), signs):
            weight = (sign * (above[at] / weights)[..., None, None, None]).to(input.dtype).expand(-1, *ctx.geometry[0])
            below[0][at], below[1][at] = _products_of(weight, input[at], gradient[at], *ctx.geometry)
        return *below, None, None


def _slices(input, geometry) -> list[slice]:
    """Samples that are done at once."""
    per_sample = geometry[0].numel()
    step = max(1, SLICE_NUMBERS // per_sample)
    if _many(geometry[0], geometry[-1]) and not input.is_cuda:
        step = 1  # one sample's im2col stays in cache
    return [slice(start, start + step) for start in range(0, len(input), step)]


def _many(shape, groups) -> bool:
    """Whether im2col is the product that serves."""
    return shape.numel() > FEW_WEIGHTS and groups == 1


def _weight_gradients(input, gradient, shape, stride, padding, dilation, groups) -> torch.Tensor:
    """Per-sample weight gradients [b, O, I / groups, k, k], float32 or float64."""
    b = len(input)
    if _many(shape, groups):
        found = torch.bmm(gradient.flatten(2), _columns(input, shape, stride, padding, dilation).transpose(1, 2))
    else:  # samples become groups of one image of b * I channels
        weight = input.new_empty((b * shape[0], *shape[1:]))
        found = torch.ops.aten.convolution_backward(_wide(gradient), _wide(input), weight, None, stride, padding, dilation, False, (0, 0), b * groups, (False, True, False))[1]
    return (found if found.dtype == torch.float64 else found.float()).view(b, *shape)


def _products_of(weight, input, gradient, shape, stride, padding, dilation, groups) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_weight_gradients`, weighed by `weight` [b, O, I / groups, k, k] and summed, has as its derivatives by input and gradient."""
    b = len(input)
    if _many(shape, groups):
        columns, flat = _columns(input, shape, stride, padding, dilation), weight.flatten(2)
        to_columns = torch.bmm(flat.transpose(1, 2), gradient.flatten(2))
        whole = to_columns.view_as(input) if _pointwise(shape, stride, padding) else F.fold(to_columns, input.shape[2:], shape[2:], dilation, padding, stride)
        return whole, torch.bmm(flat, columns).view_as(gradient)
    wide = weight.reshape(b * shape[0], *shape[1:])
    to_input = torch.ops.aten.convolution_backward(_wide(gradient), _wide(input), wide, None, stride, padding, dilation, False, (0, 0), b * groups, (True, False, False))[0]
    return to_input.view_as(input), F.conv2d(_wide(input), wide, None, stride, padding, dilation, b * groups).view_as(gradient)


def _wide(maps) -> torch.Tensor:
    """[b, C, H, W] -> [1, b * C, H, W]."""
    return maps.reshape(1, -1, *maps.shape[2:])


def _columns(input, shape, stride, padding, dilation) -> torch.Tensor:
    """im2col: [b, I * k * k, positions]."""
    return input.flatten(2) if _pointwise(shape, stride, padding) else F.unfold(input, shape[2:], dilation, padding, stride)


def _pointwise(shape, stride, padding) -> bool:
    return tuple(shape[2:]) == (1, 1) and stride == (1, 1) and padding == (0, 0)
