"""Filter saliency of one convolution in one Triton kernel a layer: per-sample weight gradients live in registers and are never written.

A program takes one sample and a tile of output channels. For a tile of weight columns it sums output gradient times input over all positions
(the im2col is in the addresses), takes |.|, adds it up along the columns and writes one number a channel. The order of every sum follows from
shapes alone, so that results are bit-equal from run to run on one kind of device.

A kernel is believed on a device only where it has agreed there with the plain products of `fused.py` on the same layer (`agrees`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the plain products serve
    triton = None

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative, over a layer's filters; float32 may be TF32
PROGRAMS = 4096  # enough to fill a GPU: below it, columns are split among programs too
_believed: dict[tuple, bool] = {}


def serves(input: torch.Tensor) -> bool:
    """Whether there are kernels for tensors like this."""
    return triton is not None and input.is_cuda and input.dtype in TOLERANCE


def agrees(fast: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], input: torch.Tensor, gradient: torch.Tensor, *geometry: object) -> bool:
    """Whether `fast` gives what `plain` gives for the first sample of a layer; tried once for every device, type and geometry."""
    key = (str(input.device), input.dtype, *input.shape[1:], *geometry)
    if key not in _believed:
        try:
            truth = plain(input[:1], gradient[:1], *geometry)
            error = float((fast(input[:1], gradient[:1], *geometry) - truth).norm() / truth.norm().clamp_min(1e-30))
            reason = "" if error <= TOLERANCE[input.dtype] or not truth.any() else f"differs by {error:.1e}"
        except torch.OutOfMemoryError:
            raise
        except Exception as fault:  # compilers fail in many ways
            reason = f"fails ({type(fault).__name__}: {str(fault).splitlines()[0][:120] if str(fault) else ''})"
        _believed[key] = not reason
        if reason:
            warnings.warn(f"the fused kernel {reason} for a convolution of {list(geometry[0])} here; the slower products serve", RuntimeWarning, stacklevel=2)
    return _believed[key]


def filter_saliency(input, gradient, shape, stride, padding, dilation, groups, aggregation) -> torch.Tensor:
    """s̄ of one convolution for every sample, float32 [B, O]; arguments as of `fused.filter_saliency`. Sums in float32."""
    batch, outs_in_all, (height, width) = *gradient.shape[:2], input.shape[2:]
    out_height, out_width = gradient.shape[2:]
    outs, ins, columns, positions = outs_in_all // groups, shape[1], shape[1] * shape[2] * shape[3], out_height * out_width
    input, gradient = input.contiguous(), gradient.contiguous()
    sizes = (outs, ins, groups, columns, positions, height, width, out_width, *stride, *padding, *dilation)
    if ins == 1 and outs < 16:
        block = min(16, triton.next_power_of_2(outs_in_all))
        found = torch.empty(batch, 1, outs_in_all, device=input.device)
        _depthwise[(batch, triton.cdiv(outs_in_all, block))](input, gradient, found, outs_in_all, *sizes, shape[2], shape[3], aggregation == "signed", block, 128)
    else:
        tile = 64 if outs > 32 else 32 if outs > 16 else 16
        tiles, column_tiles = groups * triton.cdiv(outs, tile), triton.cdiv(columns, 64)
        splits = max(1, min(column_tiles, PROGRAMS // (batch * tiles)))
        span = 64 * math.ceil(column_tiles / splits)
        found = torch.empty(batch, triton.cdiv(columns, span), outs_in_all, device=input.device)
        precise = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        _dense[(batch, tiles, found.shape[1])](input, gradient, found, span, *sizes, shape[2], shape[3], aggregation == "signed", precise, tile, 64, 32)
    total = found.sum(1) / columns
    return total.abs() if aggregation == "signed" else total


if triton is not None:

    @triton.jit
    def _dense(
        input, gradient, found, span, outs, ins, groups, columns, positions, height, width, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, SIGNED: tl.constexpr, PRECISION: tl.constexpr, OUTS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
    ):  # fmt: skip
        """found [B, splits, O]: the sum over a split of columns (weights of a filter) of |gradient . unfolded input|. Grid: sample, tile of a group's outputs, split."""
        sample, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(outs, OUTS)
        group, out = tl.program_id(1) // tiles, (tl.program_id(1) % tiles) * OUTS + tl.arange(0, OUTS)
        gradients = gradient + ((sample * groups + group) * outs + out)[:, None] * positions
        inputs = input + (sample * groups + group) * ins * height * width
        total = tl.zeros([OUTS], tl.float32)
        first = tl.program_id(2) * span
        for start in range(first, min(first + span, columns), COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            channel, down, right = column // (KERNEL_H * KERNEL_W), column % (KERNEL_H * KERNEL_W) // KERNEL_W * dilation_h, column % KERNEL_W * dilation_w
            product = tl.zeros([OUTS, COLUMNS], tl.float32)
            for begin in range(0, positions, POSITIONS):
                position = begin + tl.arange(0, POSITIONS)
                y = (position // out_width * stride_h - padding_h)[:, None] + down[None, :]
                x = (position % out_width * stride_w - padding_w)[:, None] + right[None, :]
                inside = (position < positions)[:, None] & (column < columns)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                seen = tl.load(inputs + (channel[None, :] * height + y) * width + x, mask=inside, other=0.0)
                asked = tl.load(gradients + position[None, :], mask=(out < outs)[:, None] & (position < positions)[None, :], other=0.0)
                product = tl.dot(asked, seen, product, input_precision=PRECISION)
            total += tl.sum(product if SIGNED else tl.abs(product), 1)
        tl.store(found + (sample * tl.num_programs(2) + tl.program_id(2)) * groups * outs + group * outs + out, total, mask=out < outs)

    @triton.jit
    def _depthwise(
        input, gradient, found, channels, outs, ins, groups, columns, positions, height, width, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, SIGNED: tl.constexpr, OUTS: tl.constexpr, POSITIONS: tl.constexpr,
    ):  # fmt: skip
        """The same where each group has one input channel and few outputs: too little for a matrix product. found [B, 1, O]. Grid: sample, tile of outputs."""
        sample = tl.program_id(0).to(tl.int64)
        out = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
        gradients = gradient + (sample * channels + out)[:, None] * positions
        inputs = input + ((sample * groups + out // outs) * height * width)[:, None]
        total = tl.zeros([OUTS], tl.float32)
        for column in range(KERNEL_H * KERNEL_W):
            product = tl.zeros([OUTS, POSITIONS], tl.float32)
            for begin in range(0, positions, POSITIONS):
                position = begin + tl.arange(0, POSITIONS)
                y = position // out_width * stride_h - padding_h + column // KERNEL_W * dilation_h
                x = position % out_width * stride_w - padding_w + column % KERNEL_W * dilation_w
                here = (out < channels)[:, None] & (position < positions)[None, :]
                inside = here & ((y >= 0) & (y < height) & (x >= 0) & (x < width))[None, :]
                seen = tl.load(inputs + (y * width + x)[None, :], mask=inside, other=0.0).to(tl.float32)
                product += seen * tl.load(gradients + position[None, :], mask=here, other=0.0).to(tl.float32)
            weight = tl.sum(product, 1)
            total += weight if SIGNED else tl.abs(weight)
        tl.store(found + sample * channels + out, total, mask=out < channels)
