"""What runs on a CPU in machine code of its own: filter saliency of one convolution, reduced in registers.

A sample's gradient by a filter's weights is a matrix product, output gradient [O, places] by input [places, columns], a column being one weight of a filter. Libraries write that product, and it is read
again to be reduced. Here a tile of it, some filters by some columns, lies in registers while the places pass; then |.| is taken and added up along the columns. Where there are many places the tile is
put aside between two blocks of them; otherwise it is never written. Input and gradient are packed, a panel of columns and a tile of filters side by side, which is all of im2col that there is.
In a depthwise convolution channels go side by side.

A sample's sums are made in one order, wherever it lies in a batch and however many threads there are. LLVM makes the code when it is first asked for, for the processor at hand (`microcode.py`); where it
cannot, or where what it made is not right, there is one warning, and `serves` says no.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from pipeline.saliency.plans import Addresses, Sizes, plan

LITTLE = 8  # input channels of a group, from which on a grouped convolution is packed
NUMBER = 4  # bytes
WRONG = 1e-5  # relative, beside float64
TRIALS = (((20, 7, 3, 2), 1, 18), ((40, 1, 3, 4), 40, 5), ((18, 9, 1, 1), 2, 4))  # weight, groups, side of the maps
KINDS = (torch.float32, torch.bfloat16, torch.float16)
_lock = threading.Lock()
_addresses, _sizes = ctypes.c_void_p * len(Addresses._fields), ctypes.c_int64 * len(Sizes._fields)


def serves(input: torch.Tensor, shape: torch.Size, groups: int, aggregation: str) -> bool:
    """Whether there is a kernel for maps like these, and a weight of this shape, (O, I / groups, k, k)."""
    fits = groups == 1 or shape[1] >= LITTLE or shape[1] == 1 and shape[0] == groups
    return fits and input.device.type == "cpu" and input.dtype in KINDS and _code(aggregation) is not None


def filter_saliency(input, gradient, shape, stride, padding, dilation, groups, aggregation) -> torch.Tensor:
    """s̄ of one convolution for every sample, float32 [B, O]; arguments as of `products.filter_saliency`. Sums in float32."""
    return _filter_saliency(_code(aggregation), input, gradient, shape, stride, padding, dilation, groups)


def _filter_saliency(code, input, gradient, shape, *geometry) -> torch.Tensor:
    """Samples are shared out among the process's threads, or groups or filters where there are fewer samples."""
    input, gradient = (maps.float().permute(0, 2, 3, 1).contiguous() for maps in (input, gradient))
    found = gradient.new_empty(len(gradient), shape[0])
    samples, threads = len(found), torch.get_num_threads()
    layer = tuple(input.shape[1:]), tuple(gradient.shape[1:]), tuple(shape), *geometry, *code.host[2:]

    def compute(first: int, stop: int, part: int, parts: int) -> None:
        way = plan(*layer, part, parts)
        if way is None:
            return
        room = input.new_empty(way.numbers)
        room[: way.zeros] = 0
        begin = first * way.sizes.image, first * way.sizes.gradients + way.skipped, first * found.shape[1] + way.skipped
        maps = (tensor.data_ptr() + NUMBER * numbers for tensor, numbers in zip((input, gradient, found), begin))
        rooms = (room.data_ptr() + NUMBER * numbers for numbers in way.rooms)
        run = code.depthwise if way.depthwise else code.dense
        run(_addresses(*maps, way.places.data_ptr(), way.taps.data_ptr(), *rooms), _sizes(stop - first, *way.sizes[1:]))

    if samples >= threads:
        parts = [(i * samples // threads, (i + 1) * samples // threads, 0, 1) for i in range(threads)]
    else:
        parts = [(0, samples, i, threads) for i in range(threads if samples else 0)]
    others = [_pool(os.getpid()).submit(compute, *part) for part in parts[1:]]
    for part in parts[:1]:
        compute(*part)
    for other in others:
        other.result()
    return found


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of a process: threads do not come along into a fork."""
    return ThreadPoolExecutor(os.cpu_count(), "microkernels")


def _code(aggregation: str):
    with _lock:  # lest two threads make it
        return _made(aggregation)


@functools.cache
def _made(aggregation: str):
    """The compiled code, or None, with a warning, where it cannot be had or is not right."""
    try:
        from pipeline.saliency import microcode  # LLVM takes a while to load

        code = microcode.compiled(microcode.host(), aggregation == "abs")
        error = max(_error(code, aggregation, *trial) for trial in TRIALS)
        reason = "" if error <= WRONG else f"differs by {error:.1e}"
    except Exception as fault:  # compilers fail in many ways
        reason = f"fails ({type(fault).__name__}: {(str(fault).splitlines() or [''])[0][:120]})"
    if reason:
        warnings.warn(f"filter saliency in this processor's machine code {reason}; slower products serve", RuntimeWarning, stacklevel=2)
        return None
    return code


def _error(code, aggregation: str, shape: tuple[int, ...], groups: int, side: int) -> float:
    """The largest relative error of two samples' s̄, of noise, beside torch's own weight gradients in float64."""
    noise = torch.Generator().manual_seed(0)
    how = (2, 1), (1, 2), (1, 2), groups
    images, weight = torch.randn(2, shape[1] * groups, side, side + 1, generator=noise), torch.zeros(2, *shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        given = torch.cat([F.conv2d(image[None].double(), own, None, *how) for image, own in zip(images, weight)])
        gradient = torch.randn(given.shape, generator=noise)
        exact = torch.autograd.grad(given, weight, gradient.double())[0].flatten(2)
    exact = exact.abs().mean(2) if aggregation == "abs" else exact.mean(2).abs()
    return float(((_filter_saliency(code, images, gradient, shape, *how) - exact).norm(dim=1) / exact.norm(dim=1)).max())
