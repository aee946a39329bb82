"""Filter saliency of one convolution for every sample, from what the layer saw and the gradient of what it gave.

On a CPU it is machine code of its own (`microkernels.py`), on a GPU one kernel a layer (`kernels.py`), where either has shown to be right. Elsewhere, and in float64, two of torch's own products
are used, both exact, chosen by shape alone (`_way`): the convolution's own weight gradient, a few samples at a time as groups of one wide image, and matrix products, of 1 x 1 kernels and where few
positions meet many weights, by im2col. What they give is never more than fits a core's own cache, and is reduced where it lies. They take plain maps and channels-last ones as these lie.

For input saliency s̄ is differentiated by both of its arguments. With g the per-sample weight gradients, one filter's s̄ is mean |g|, whose derivative by g is
sign(g) / n: the signs alone are kept, a byte each, and the same two products lead back from them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pipeline.saliency import kernels, microkernels
from pipeline.saliency.places import NUMBERS

GRADIENTS = 2**18  # per-sample gradient numbers that a thread of a CPU holds at once: 1 MiB in float32
MAPS = 2**18  # numbers of the maps that one wide image is made of there, a thread
MANY_WEIGHTS, FEW_POSITIONS = 2**16, 196  # above and up to which im2col beats the convolution's own gradient on a CPU
FEWER_POSITIONS = 64  # up to which it does with any weights
MANY_SHARED, FEW_SHARED = 2**20, 49  # weights and positions from and up to which a batch's 1 x 1 convolution is one product on a CPU: image by image, the weights are read again for each
FEW_CHANNELS = 16  # below it, a wide image of several samples is slow on a CPU unless it is channels-last
SLICE_NUMBERS = 2**24  # per-sample gradient numbers held at once on a GPU: 64 MiB in float32
FEW_WEIGHTS = 2**16  # up to here the convolution's own gradient is taken there


def filter_saliency(input, gradient, shape, stride, padding, dilation, groups, aggregation) -> torch.Tensor:
    """s̄ of one convolution for every sample, float32 (float64 of float64) [B, O], differentiable once by input and gradient where autograd is on.

    input: [B, I, H, W], what the layer saw; gradient: [B, O, H', W'], dL/d(output); shape: of the weight, (O, I / groups, k, k).
    """
    geometry = (shape, stride, padding, dilation, groups)
    if torch.is_grad_enabled() and (input.requires_grad or gradient.requires_grad):
        return _Differentiable.apply(input, gradient, geometry, aggregation)
    if kernels.serves(input) and kernels.agrees(kernels.filter_saliency, by_products, input, gradient, *geometry, aggregation):
        return kernels.filter_saliency(input, gradient, *geometry, aggregation)
    if microkernels.serves(input, gradient, shape, groups, aggregation):
        return microkernels.filter_saliency(input, gradient, *geometry, aggregation)
    return by_products(input, gradient, *geometry, aggregation)


def by_products(input, gradient, shape, stride, padding, dilation, groups, aggregation) -> torch.Tensor:
    """The same by torch's own products, a slice of samples at a time."""
    if tuple(shape[2:]) == (1, 1) and padding == (0, 0) and stride != (1, 1):
        input, stride = input[..., :: stride[0], :: stride[1]].contiguous(memory_format=layout_of(input)), (1, 1)  # the places that it reads
    parts = _of_weight_gradients(input, gradient, (shape, stride, padding, dilation, groups), lambda found: _reduced(found, aggregation))
    return torch.cat(parts) if parts else gradient.new_zeros(gradient.shape[:2])


class _Differentiable(torch.autograd.Function):
    """`by_products`, and its derivative by the input and the gradient of every sample."""

    @staticmethod
    def forward(ctx, input, gradient, geometry, aggregation):
        input, gradient = input.contiguous(), gradient.contiguous()  # the ways back are those of plain maps
        signs = []

        def take(found):
            signs.append((found if aggregation == "abs" else found.mean(2, keepdim=True)).sign().to(torch.int8))
            return _reduced(found, aggregation)

        parts = _of_weight_gradients(input, gradient, geometry, take)
        ctx.save_for_backward(input, gradient, *signs)
        ctx.geometry = geometry
        return torch.cat([gradient.new_zeros(0, gradient.shape[1]), *parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, above):
        input, gradient, *signs = ctx.saved_tensors
        weights = ctx.geometry[0][1:].numel()
        below = [torch.empty_like(input), torch.empty_like(gradient)]
        matrices, slices = _way(input, gradient, ctx.geometry)
        for at, sign in zip(slices, signs):
            weight = (sign * (above[at] / weights)[..., None]).to(input.dtype).expand(-1, -1, weights)
            below[0][at], below[1][at] = _products_of(weight, input[at], gradient[at], ctx.geometry, matrices)
        return *below, None, None


def _way(input, gradient, geometry) -> tuple[bool, list[slice]]:
    """(whether by matrix products, samples that are done at once)."""
    shape, groups = geometry[0], geometry[4]
    weights, positions, threads, matrices = shape.numel(), gradient.shape[2:].numel(), torch.get_num_threads(), False
    if input.is_cuda:
        matrices, step = groups == 1 and weights > FEW_WEIGHTS, SLICE_NUMBERS // weights
    elif groups == 1 and (_pointwise(geometry) or positions <= FEWER_POSITIONS or positions <= FEW_POSITIONS and weights > MANY_WEIGHTS):
        matrices, step = True, threads * max(1, GRADIENTS // weights)
    elif groups == 1 and shape[1] < FEW_CHANNELS and not is_channels_last(input):
        step = 1
    else:
        step = threads * min(GRADIENTS // weights, MAPS // max(1, input.shape[1:].numel()))
    step = 2 ** (max(1, step).bit_length() - 1)
    while not input.is_cuda and len(input) % step:  # slices of one size, lest a sample's sums depend on which it falls into
        step //= 2
    return matrices, [slice(start, start + step) for start in range(0, len(input), step)]


def _of_weight_gradients(input, gradient, geometry, take: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """`take` of the weight gradients [b, O, I / groups * k * k], float32 or float64, of slice after slice of the samples.

    `take` may change what it gets and must not keep it: the memory serves the next slice, since new memory costs as much as a product.
    """
    if not len(input):
        return []
    shape, stride, padding, dilation, groups = geometry
    matrices, slices = _way(input, gradient, geometry)
    out = columns = weight = None
    parts = []
    for at in slices:
        saw, gave = input[at], gradient[at]
        if input.is_cuda:
            saw, gave = saw.contiguous(), gave.contiguous()
        if matrices:
            outs, weights = shape[0], shape[1:].numel()
            more = (-outs % NUMBERS, -weights % NUMBERS) if (outs % 2 or weights % 2) and not input.is_cuda else (0, 0)  # or a sample's sums would depend on where it begins in memory
            positions = gave[0, 0].numel()
            long = -positions % NUMBERS if positions % 2 and not input.is_cuda and not is_channels_last(gave) else 0  # the same of plain maps
            out = gave.new_empty(len(saw), outs + more[0], weights + more[1]) if out is None else out[: len(saw)]
            columns = _columns(saw, gave, geometry, columns)
            asked, seen = (F.pad(maps, (0, long, 0, wide)) if long or any(more) else maps for maps, wide in zip((gave.flatten(2), columns), more))
            found = torch.bmm(asked, seen.transpose(1, 2), out=out)[:, :outs, :weights]
        else:  # samples become groups of one image of b * I channels
            weight = torch.empty((len(saw) * shape[0], *shape[1:]), dtype=saw.dtype, device=saw.device, memory_format=layout_of(saw)) if weight is None else weight[: len(saw) * shape[0]]
            found = torch.ops.aten.convolution_backward(_wide(gave), _wide(saw), weight, None, stride, padding, dilation, False, (0, 0), len(saw) * groups, (False, True, False))[1]
            found = (found if found.is_contiguous() else found.permute(0, 2, 3, 1)).reshape(len(saw), shape[0], -1)
        parts.append(take(found if found.dtype == torch.float64 else found.float()))
        del found
    return parts


def _reduced(found, aggregation) -> torch.Tensor:
    """Weight gradients [b, O, n] of one's own -> [b, O]: mean |g| over a filter's weights (`abs`), or |mean g| (`signed`)."""
    return found.abs_().mean(2) if aggregation == "abs" else found.mean(2).abs_()


def _products_of(weight, input, gradient, geometry, matrices) -> tuple[torch.Tensor, torch.Tensor]:
    """The derivatives by input and gradient of the sum of their weight gradients times `weight` [b, O, I / groups * k * k]."""
    shape, stride, padding, dilation, groups = geometry
    if matrices:
        columns = _columns(input, gradient, geometry)
        back = torch.bmm(weight.transpose(1, 2), gradient.flatten(2))
        whole = back.view_as(input) if _pointwise(geometry) else F.fold(back, input.shape[2:], shape[2:], dilation, padding, stride)
        return whole, torch.bmm(weight, columns).view_as(gradient)
    wide, groups = weight.reshape(-1, *shape[1:]), len(input) * groups
    back = torch.ops.aten.convolution_backward(_wide(gradient), _wide(input), wide, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False))[0]
    return back.reshape(input.shape), F.conv2d(_wide(input), wide, None, stride, padding, dilation, groups).reshape(gradient.shape)


def _wide(maps) -> torch.Tensor:
    """[b, C, H, W] -> [1, b * C, H, W], in the same layout."""
    if not is_channels_last(maps):
        return maps.reshape(1, -1, *maps.shape[2:])
    return maps.permute(2, 3, 0, 1).reshape(1, *maps.shape[2:], -1).permute(0, 3, 1, 2)


def _columns(input, gradient, geometry, out=None) -> torch.Tensor:
    """im2col, [b, I * k * k, positions], or k * k * I of channels-last maps; into `out` if there is one, of as many samples or more."""
    shape, stride, padding, dilation, _ = geometry
    if _pointwise(geometry):
        return input.flatten(2)
    if is_channels_last(input):
        return _patches(input, gradient, geometry, out)
    if out is None:
        out = input.new_empty(len(input), shape[1:].numel(), gradient[0, 0].numel())
    return torch.ops.aten.im2col.out(input, shape[2:], dilation, padding, stride, out=out[: len(input)])


def _patches(input, gradient, geometry, out) -> torch.Tensor:
    """im2col of channels-last maps: all channels of a place lie together, and are copied together."""
    shape, stride, padding, dilation, _ = geometry
    input = F.pad(input, (padding[1], padding[1], padding[0], padding[0])) if padding != (0, 0) else input
    b, c, h, w = input.stride()
    windows = input.as_strided((len(input), *gradient.shape[2:], *shape[2:], shape[1]), (b, stride[0] * h, stride[1] * w, dilation[0] * h, dilation[1] * w, c), input.storage_offset())
    if out is None:
        out = input.new_empty(len(input), gradient[0, 0].numel(), shape[1:].numel()).transpose(1, 2)
    out = out[: len(input)]
    out.transpose(1, 2).view(windows.shape).copy_(windows)
    return out


def is_product(input, weight, stride, padding, groups) -> bool:
    """Whether a convolution's forward pass is best had as a product of all places of the batch with its weights."""
    few = tuple(weight.shape[2:]) == (1, 1) and padding == (0, 0) and groups == 1 and weight.numel() >= MANY_SHARED
    return few and not input.is_cuda and is_channels_last(input) and -(-input.shape[2] // stride[0]) * -(-input.shape[3] // stride[1]) <= FEW_SHARED


def is_channels_last(maps) -> bool:
    """Whether they lie so, and not plainly too, as maps of one channel or one place do."""
    return maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()


def layout_of(maps) -> torch.memory_format:
    """Channels-last where they are, be they plain too."""
    return torch.channels_last if maps.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _pointwise(geometry) -> bool:
    shape, stride, padding = geometry[:3]
    return tuple(shape[2:]) == (1, 1) and stride == (1, 1) and padding == (0, 0)
