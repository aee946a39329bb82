"""What runs on a GPU in Triton: filter saliency of one convolution in one kernel, and the bias of one that a BatchNorm was folded into.

Maps are channels-last there, where a shift of the window moves whole runs of channels. A program takes one sample and a tile of output channels. For a tile of weight
columns it sums output gradient times input over all positions (the im2col is in the addresses), takes |.|, adds it up along the columns and writes one number a channel:
per-sample weight gradients live in registers and are never written. The order of every sum follows from shapes alone, so that results are bit-equal from run to run on
one kind of device.

A kernel is believed on a device only where it has agreed there with torch on a layer of that shape (`agrees`, `add_bias`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from pipeline.errors import is_device
from pipeline.saliency import is_memory

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the plain products serve
    triton = None

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative, over a layer's filters
TF32_TOLERANCE = 5e-3
PROGRAMS = 4096  # enough to fill a GPU: below it, columns are split among programs too
LONG = 4096  # positions: beyond it, what matrix units cut off a sum is more than 1e-5 of it
FEW_OUTPUTS = 16  # of a group with one input: below it, there is too little for a matrix product
MANY = 2**30  # stands for input channels that fill a tile of columns alone
_believed: dict[tuple, bool] = {}


class Tile(NamedTuple):
    """What one program of `_dense` has in registers, and how it is run: see `tile`."""

    outs: int
    columns: int
    positions: int
    warps: int
    stages: int


def serves(input: torch.Tensor) -> bool:
    """Whether there are kernels for tensors like this."""
    return triton is not None and input.is_cuda and input.dtype in TOLERANCE and input[:1].numel() < 2**31


def agrees(fast: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], input: torch.Tensor, gradient: torch.Tensor, *geometry: object) -> bool:
    """Whether `fast` gives what `plain` gives in float64, for seeded noise of a layer's shape: tried once for every device, type and geometry, and never with a user's images."""
    single = input.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    key = (str(input.device), input.dtype, single, *input.shape[1:], *geometry)
    if key not in _believed:
        noise = torch.Generator(input.device).manual_seed(0)
        maps = [torch.randn(1, *t.shape[1:], generator=noise, device=t.device).to(t.dtype) for t in (input, gradient)]
        reason = _reason(lambda: fast(*maps, *geometry), lambda: plain(*(t.double() for t in maps), *geometry), TF32_TOLERANCE if single else TOLERANCE[input.dtype])
        _believed[key] = not reason
        if reason:
            warnings.warn(f"the fused kernel {reason} for a convolution of {list(geometry[0])} here; the slower products serve", RuntimeWarning, stacklevel=2)
    return _believed[key]


def _reason(fast: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor], tolerance: float) -> str:
    """Why `fast` is not to be believed, or nothing. Raises what says that memory ran out, or that the GPU failed."""
    truth = plain()
    try:
        error = float((fast() - truth).norm() / truth.norm())
    except Exception as fault:  # compilers fail in many ways
        if is_memory(fault) or is_device(fault):
            raise
        return f"fails ({type(fault).__name__}: {str(fault).splitlines()[0][:120] if str(fault) else ''})"
    return "" if error <= tolerance else f"differs by {error:.1e}"


def filter_saliency(input, gradient, shape, stride, padding, dilation, groups, aggregation) -> torch.Tensor:
    """s̄ of one convolution for every sample, float32 [B, O]; arguments as of `products.filter_saliency`. Sums in float32.

    Of float32 the matrix products are of halves: a sample's input, and its gradient channel by channel, scaled by a power of two, so that float16 has room for them, and rounded to it
    once (11 bits, as TF32 has) where TF32 is allowed, or split into two (22 bits), of whose products all but the least are taken. So a filter is as right as any other, however small
    its gradient is beside theirs; where an input is 1e-8 of the sample's largest, for a whole group or wherever a filter's gradient lies, it is right to 1e-4, and at 1e-10 to 1e-2.
    """
    batch, outs_in_all, (height, width) = *gradient.shape[:2], input.shape[2:]
    outs, ins, taps, positions = outs_in_all // groups, shape[1], shape[2] * shape[3], gradient[0, 0].numel()
    input, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (input, gradient))
    sizes = (positions, height, width, gradient.shape[3], *stride, *padding, *dilation)
    settings = {"KERNEL_W": shape[3], "TAPS": taps, "SIGNED": aggregation == "signed"}
    if ins == 1 and outs < FEW_OUTPUTS:
        found = torch.empty(batch, 1, outs_in_all, device=input.device)
        block = min(32, triton.next_power_of_2(outs_in_all))
        _depthwise[(batch, triton.cdiv(outs_in_all, block))](input, gradient, found, 1 / taps, outs, groups, outs_in_all, *sizes, **settings, ALL_TAPS=triton.next_power_of_2(taps), OUTS=block, POSITIONS=8)
    else:
        scaled = input.dtype == torch.float32
        split = scaled and not torch.backends.cuda.matmul.allow_tf32
        seen, asked = (_halved(input, split, False), _halved(gradient, split, True)) if scaled else (Halves(t, t, t) for t in (input, gradient))
        block = tile(outs, ins, taps, positions, split, _room(input.device))
        few = triton.next_power_of_2(ins)
        wide = few >= block.columns  # a tile of columns has one tap then, else a few with all their channels
        chunks = taps * triton.cdiv(ins, block.columns) if wide else triton.cdiv(taps * few, block.columns)
        tiles = groups * triton.cdiv(outs, block.outs)
        span = triton.cdiv(chunks, max(1, min(chunks, PROGRAMS // (batch * tiles))))
        found = torch.empty(batch, triton.cdiv(chunks, span), outs_in_all, device=input.device)
        pointwise = taps == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
        _dense[(batch, tiles, found.shape[1])](
            *seen, *asked, found, 1 / (ins * taps), span, chunks, outs, ins, groups, *sizes, **settings, SCALED=scaled, SPLIT=split, INS=MANY if wide else few,
            POINTWISE=pointwise, SHORT=positions <= block.positions, LONG=split and positions > LONG, OUTS=block.outs, COLUMNS=block.columns, POSITIONS=block.positions, STAGES=block.stages, num_warps=block.warps,
        )  # fmt: skip
    total = found.sum(1) if found.shape[1] > 1 else found[:, 0]
    return total.abs() if aggregation == "signed" else total


def tile(outs: int, ins: int, taps: int, positions: int, split: bool, room: int) -> Tile:
    """The fastest tile of most layers that were measured on an H200 (docs/data/performance/gpu.json), by shape alone; smaller where it does not fit into `room` bytes of shared memory."""
    few = triton.next_power_of_2(ins)
    outs, columns = max(16, triton.next_power_of_2(outs)), max(16, triton.next_power_of_2(taps * few))
    stages = 2 if split else 3
    if outs < 128 or (few < 16 and taps > 1):  # few input channels: columns of a tile lie apart in memory
        block = Tile(min(64, outs), min(64 if split or outs < 32 or few < 16 else 128, columns), 64, 4, stages)
    elif positions <= 64:
        block = Tile(128, min(128, columns), 64, 8, stages) if split else Tile(128, min(64, columns), 64, 4, stages)
    elif columns >= 256 and (ins % 256 == 0 or ins % 256 > 128):
        block = Tile(128, 256, 32, 8, stages + 1)
    elif columns >= 128:
        block = Tile(128, 128, 32 if split else 64, 8, 3)
    else:
        block = Tile(64 if split else 128, columns, 64, 4, stages)
    if split and positions > LONG and block.outs * block.columns > 2**14:
        block = block._replace(columns=2**14 // block.outs)  # two sums of a tile are held then
    while block.stages * (block.outs + block.columns) * block.positions * (4 if split else 2) > room:
        block = block._replace(stages=block.stages - 1) if block.stages > 2 else block._replace(columns=block.columns // 2) if block.columns >= block.outs else block._replace(outs=block.outs // 2)
    return block


@lru_cache
def _room(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**16) if device.type == "cuda" else 2**18


class Halves(NamedTuple):
    """Maps in float16 and what that leaves, [B, C, H, W] channels-last; peaks: float32 [B, 1] or [B, C], the largest |number| that a scale was made of. Without a split, low is not read; unscaled, peaks are not."""

    high: torch.Tensor
    low: torch.Tensor
    peaks: torch.Tensor


def _halved(maps: torch.Tensor, split: bool, by_channel: bool) -> Halves:
    """Every sample scaled as one, or channel by channel."""
    (batch, channels), positions = maps.shape[:2], maps[0, 0].numel()
    block = 16 if channels <= 16 else 64
    rows, blocks = 2048 // block, triton.cdiv(channels, block)
    span = rows * max(4, triton.cdiv(positions * batch * blocks, rows * PROGRAMS))
    peaks = maps.new_empty(batch, triton.cdiv(positions, span), channels)
    _peak[(batch, peaks.shape[1], blocks)](maps, peaks, positions, channels, span, ROWS=rows, CHANNELS=block)
    peaks = peaks.amax(1) if by_channel else peaks.amax((1, 2))[:, None]
    high = torch.empty_like(maps, dtype=torch.float16)
    low = torch.empty_like(high) if split else high
    _halve[(triton.cdiv(positions * channels, 2048), batch)](maps, peaks, high, low, positions * channels, peaks.shape[1], SPLIT=split, BLOCK=2048)
    return Halves(high, low, peaks)


def add_bias(maps: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """maps [B, C, H, W] + bias [C], written over the maps, at the rate of a copy where they are channels-last. Sums in float32."""
    plain = lambda maps, bias: maps.add_(bias.to(maps.dtype)[:, None, None])  # noqa: E731
    if not maps.is_contiguous(memory_format=torch.channels_last) or not maps.numel():
        return plain(maps, bias)
    key = ("bias", str(maps.device), maps.dtype, bias.dtype)
    if key not in _believed:
        tried = lambda: torch.linspace(-1, 1, 2 * 5 * 3 * 3, device=maps.device).to(maps.dtype).reshape(2, 5, 3, 3).contiguous(memory_format=torch.channels_last)  # noqa: E731
        weights = torch.arange(5, device=bias.device).to(bias.dtype)
        reason = _reason(lambda: _biased(tried(), weights), lambda: plain(tried().double(), weights), TOLERANCE[maps.dtype])
        _believed[key] = not reason
        if reason:
            warnings.warn(f"the kernel that adds a bias {reason} here; torch adds it", RuntimeWarning, stacklevel=2)
    return _biased(maps, bias) if _believed[key] else plain(maps, bias)


def _biased(maps: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    _add_bias[(triton.cdiv(maps.numel(), 2048),)](maps, bias.contiguous(), maps.numel(), maps.shape[1], 2048)
    return maps


if triton is not None:
    PLACES = ["positions", "height", "width", "out_width", "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"]  # of which no compiled code is special

    @triton.jit(do_not_specialize=["factor", "span", "chunks", *PLACES])
    def _dense(
        input, input_low, input_peaks, gradient, gradient_low, gradient_peaks, found, factor, span, chunks, outs, ins, groups,
        positions, height, width, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        KERNEL_W: tl.constexpr, TAPS: tl.constexpr, SIGNED: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, INS: tl.constexpr, POINTWISE: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr,
        OUTS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """found [B, splits, O]: the sum over a split of columns (weights of a filter) of |gradient . unfolded input|, times factor. Grid: sample, tile of a group's outputs, split.

        SHORT: all positions fit into one tile, and the gradient is read once. LONG: each tile of positions is summed by itself first, since matrix units cut off what falls below a sum
        instead of rounding it, which after n of their steps has taken about n / 2^26 of it.
        """
        sample, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(outs, OUTS)
        group, out = tl.program_id(1) // tiles, (tl.program_id(1) % tiles) * OUTS + tl.arange(0, OUTS)
        row = groups * outs
        asks, sees = sample * positions * row + group * outs + out[None, :], sample * height * width * groups * ins + group * ins
        total = tl.zeros([OUTS], tl.float32)
        first, place = tl.program_id(2) * span, tl.arange(0, POSITIONS)
        if SHORT:
            within = (place < positions)[:, None] & (out < outs)[None, :]
            asked = tl.load(gradient + asks + place[:, None] * row, mask=within, other=0.0)
            if SPLIT:
                asked_low = tl.load(gradient_low + asks + place[:, None] * row, mask=within, other=0.0)
            for chunk in tl.range(first, min(first + span, chunks), num_stages=STAGES):
                seen = _unfolded(input + sees, chunk, place, positions, ins, groups * ins, height, width, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, KERNEL_W, TAPS, INS, POINTWISE, COLUMNS)
                product = tl.dot(tl.trans(asked), seen)
                if SPLIT:
                    seen_low = _unfolded(input_low + sees, chunk, place, positions, ins, groups * ins, height, width, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, KERNEL_W, TAPS, INS, POINTWISE, COLUMNS)
                    product = tl.dot(tl.trans(asked_low), seen, tl.dot(tl.trans(asked), seen_low, product))
                total += tl.sum(product if SIGNED else tl.abs(product), 1)
        else:
            for chunk in range(first, min(first + span, chunks)):
                product = tl.zeros([OUTS, COLUMNS], tl.float32)
                for begin in tl.range(0, positions, POSITIONS, num_stages=STAGES):
                    position = begin + place
                    within = (position < positions)[:, None] & (out < outs)[None, :]
                    asked = tl.load(gradient + asks + position[:, None] * row, mask=within, other=0.0)
                    seen = _unfolded(input + sees, chunk, position, positions, ins, groups * ins, height, width, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, KERNEL_W, TAPS, INS, POINTWISE, COLUMNS)
                    sums = tl.dot(tl.trans(asked), seen, tl.zeros([OUTS, COLUMNS], tl.float32) if LONG else product)
                    if SPLIT:
                        asked_low = tl.load(gradient_low + asks + position[:, None] * row, mask=within, other=0.0)
                        seen_low = _unfolded(input_low + sees, chunk, position, positions, ins, groups * ins, height, width, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, KERNEL_W, TAPS, INS, POINTWISE, COLUMNS)
                        sums = tl.dot(tl.trans(asked_low), seen, tl.dot(tl.trans(asked), seen_low, sums))
                    product = product + sums if LONG else sums
                total += tl.sum(product if SIGNED else tl.abs(product), 1)
        total *= factor
        if SCALED:
            one, other = _scale(tl.load(input_peaks + sample)), _scale(tl.load(gradient_peaks + sample * row + group * outs + out, mask=out < outs, other=1.0))
            total = total / tl.maximum(one, other) / tl.minimum(one, other)  # the larger first: nothing overflows on the way
        tl.store(found + (sample * tl.num_programs(2) + tl.program_id(2)) * row + group * outs + out, total, mask=out < outs)

    @triton.jit
    def _unfolded(
        inputs, chunk, position, positions, ins, channels, height, width, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        KERNEL_W: tl.constexpr, TAPS: tl.constexpr, INS: tl.constexpr, POINTWISE: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """A tile of im2col, [POSITIONS, COLUMNS]; a column is a tap and an input channel, channels fastest, padded to whole tiles or, where they are few, to INS."""
        if POINTWISE:
            channel = chunk * COLUMNS + tl.arange(0, COLUMNS)
            return tl.load(inputs + position[:, None] * channels + channel[None, :], mask=(position < positions)[:, None] & (channel < ins)[None, :], other=0.0)
        elif INS >= COLUMNS:
            tap = chunk // tl.cdiv(ins, COLUMNS)
            channel = chunk % tl.cdiv(ins, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
            y = position // out_width * stride_h - padding_h + tap // KERNEL_W * dilation_h
            x = position % out_width * stride_w - padding_w + tap % KERNEL_W * dilation_w
            inside = (position < positions) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            return tl.load(inputs + ((y * width + x) * channels)[:, None] + channel[None, :], mask=inside[:, None] & (channel < ins)[None, :], other=0.0)
        else:
            column = chunk * COLUMNS + tl.arange(0, COLUMNS)
            tap, channel = column // INS, column % INS
            y = (position // out_width * stride_h - padding_h)[:, None] + (tap // KERNEL_W * dilation_h)[None, :]
            x = (position % out_width * stride_w - padding_w)[:, None] + (tap % KERNEL_W * dilation_w)[None, :]
            inside = (position < positions)[:, None] & ((channel < ins) & (tap < TAPS))[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            return tl.load(inputs + (y * width + x) * channels + channel[None, :], mask=inside, other=0.0)

    @triton.jit(do_not_specialize=["factor", *PLACES])
    def _depthwise(
        input, gradient, found, factor, outs, ins_in_all, channels, positions, height, width, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        KERNEL_W: tl.constexpr, TAPS: tl.constexpr, SIGNED: tl.constexpr, ALL_TAPS: tl.constexpr, OUTS: tl.constexpr, POSITIONS: tl.constexpr,
    ):  # fmt: skip
        """The same where each group has one input channel and few outputs: all taps at once, no matrix product. found [B, 1, O]. Grid: sample, tile of outputs."""
        sample = tl.program_id(0).to(tl.int64)
        out, tap = tl.program_id(1) * OUTS + tl.arange(0, OUTS), tl.arange(0, ALL_TAPS)
        gradients = gradient + sample * positions * channels + out[None, :]
        inputs = input + sample * height * width * ins_in_all + (out // outs)[None, None, :]
        product = tl.zeros([POSITIONS, ALL_TAPS, OUTS], tl.float32)
        for begin in range(0, positions, POSITIONS):
            position = begin + tl.arange(0, POSITIONS)
            y = (position // out_width * stride_h - padding_h)[:, None] + (tap // KERNEL_W * dilation_h)[None, :]
            x = (position % out_width * stride_w - padding_w)[:, None] + (tap % KERNEL_W * dilation_w)[None, :]
            inside = (position < positions)[:, None] & (tap < TAPS)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            seen = tl.load(inputs + ((y * width + x) * ins_in_all)[:, :, None], mask=inside[:, :, None] & (out < channels)[None, None, :], other=0.0)
            asked = tl.load(gradients + position[:, None] * channels, mask=(position < positions)[:, None] & (out < channels)[None, :], other=0.0)
            product += seen.to(tl.float32) * asked.to(tl.float32)[:, None, :]
        weight = tl.sum(product, 0)
        tl.store(found + sample * channels + out, tl.sum(weight if SIGNED else tl.abs(weight), 0) * factor, mask=out < channels)

    @triton.jit(do_not_specialize=["positions", "span"])
    def _peak(maps, peaks, positions, channels, span, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
        """peaks [B, parts, C]: the largest |number| of each stretch of `span` positions of each channel. Grid: sample, part, block of channels."""
        sample, channel = tl.program_id(0).to(tl.int64), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        first, found = tl.program_id(1) * span, tl.zeros([ROWS, CHANNELS], tl.float32)
        for start in range(first, min(first + span, positions), ROWS):
            position = start + tl.arange(0, ROWS)
            within = (position < positions)[:, None] & (channel < channels)[None, :]
            number = tl.load(maps + (sample * positions + position)[:, None] * channels + channel[None, :], mask=within, other=0.0)
            found = tl.maximum(found, tl.abs(number))
        tl.store(peaks + (sample * tl.num_programs(1) + tl.program_id(1)) * channels + channel, tl.max(found, 0), mask=channel < channels)

    @triton.jit
    def _scale(peak):
        """The power of two that brings a peak to 2^14 .. 2^15; NaN for one that is not finite."""
        exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
        scale = (tl.minimum(tl.maximum(2 * 127 + 14 - exponent, 1), 254) << 23).to(tl.float32, bitcast=True)
        return tl.where(exponent == 255, float("nan"), scale)

    @triton.jit
    def _halve(maps, peaks, high, low, numbers, peaks_each, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
        """Maps times the scales of their peaks (1 or C of each sample) in float16; low: what that rounding left, again in float16. What shares a peak with an infinity becomes NaN."""
        sample, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(maps + sample * numbers + at, mask=at < numbers, other=0.0) * _scale(tl.load(peaks + sample * peaks_each + at % peaks_each))
        tl.store(high + sample * numbers + at, value.to(tl.float16), mask=at < numbers)
        if SPLIT:
            tl.store(low + sample * numbers + at, (value - value.to(tl.float16).to(tl.float32)).to(tl.float16), mask=at < numbers)

    @triton.jit
    def _add_bias(maps, bias, numbers, channels, BLOCK: tl.constexpr):
        """maps, flat and channels-last, plus bias [C], in place."""
        start, here = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
        at, channel = start + here, ((start % channels).to(tl.int32) + here) % channels
        found = tl.load(maps + at, mask=at < numbers).to(tl.float32) + tl.load(bias + channel, mask=at < numbers).to(tl.float32)
        tl.store(maps + at, found, mask=at < numbers)
