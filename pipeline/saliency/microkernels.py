"""What runs on a CPU in machine code of its own: filter saliency of one convolution, reduced in registers.

A sample's gradient by a filter's weights is a matrix product, output gradient [O, places] by input [places, columns], a column being one weight of a filter. Libraries write that product, and it is read
again to be reduced. Here a tile of it, some filters by some columns, lies in registers while the places pass; then |.| is taken and added up along the columns. Where there are many places the tile is
put aside between two blocks of them; otherwise it is never written. Input and gradient are packed, a panel of columns and a tile of filters side by side, which is all of im2col that there is.
In a depthwise convolution channels go side by side. Plain maps are turned sample by sample, in a core's own cache.

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

from pipeline.saliency import is_memory
from pipeline.saliency.plans import Addresses, Sizes, plan

LITTLE = 8  # input channels of a group, from which on a grouped convolution is packed
NUMBER = 4  # bytes
WRONG = 1e-5  # relative, beside float64
TRIALS = (((20, 7, 3, 2), 1, 18), ((40, 1, 3, 4), 40, 5), ((18, 9, 1, 1), 2, 4))  # weight, groups, side of the maps
KINDS = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (torch.Tensor, torch.nn.Parameter)  # whose numbers lie in memory
_made: dict[str, object] = {}
_making = threading.Lock()
_addresses, _sizes = ctypes.c_void_p * len(Addresses._fields), ctypes.c_int64 * len(Sizes._fields)


def serves(input: torch.Tensor, gradient: torch.Tensor, shape: torch.Size, groups: int, aggregation: str) -> bool:
    """Whether there is a kernel for maps like these, and a weight of this shape, (O, I / groups, k, k)."""
    fits = groups == 1 or shape[1] >= LITTLE or shape[1] == 1 and shape[0] == groups
    return fits and all(type(maps) in PLAIN and maps.device.type == "cpu" and maps.dtype in KINDS for maps in (input, gradient)) and _code(aggregation) is not None


def filter_saliency(input, gradient, shape, stride, padding, dilation, groups, aggregation) -> torch.Tensor:
    """s̄ of one convolution for every sample, float32 [B, O]; arguments as of `products.filter_saliency`. Sums in float32. Raises ValueError where a convolution of the input does not give the gradient's shape."""
    return _filter_saliency(_code(aggregation), input, gradient, shape, stride, padding, dilation, groups)


def _filter_saliency(code, input, gradient, shape, *geometry) -> torch.Tensor:
    """Samples are shared out among the process's threads, or groups or filters where there are fewer samples."""
    (input, plain), (gradient, plain_gradient) = (_dense(maps.detach().float()) for maps in (input, gradient))
    found = gradient.new_empty(len(gradient), shape[0])
    (channels, *seen), (outs, *gave) = input.shape[1:], gradient.shape[1:]
    layer = (*seen, channels), plain, (*gave, outs), plain_gradient, tuple(shape), *geometry, *code.host[2:]

    def compute(first: int, stop: int, part: int, parts: int) -> None:
        way = plan(*layer, part, parts)
        if way is None:
            return
        room = input.new_empty(way.numbers)
        ctypes.memset(room.data_ptr(), 0, NUMBER * way.zeros)  # torch's own would have threads for it
        begin = first * way.sizes.image, first * way.sizes.gradients + way.skipped * (way.sizes.places if plain_gradient else 1), first * outs + way.skipped
        maps = (tensor.data_ptr() + NUMBER * numbers for tensor, numbers in zip((input, gradient, found), begin))
        rooms = (room.data_ptr() + NUMBER * numbers for numbers in way.rooms)
        run = code.depthwise if way.depthwise else code.dense
        run(_addresses(*maps, way.taps.data_ptr(), *rooms), _sizes(stop - first, *way.sizes[1:]))

    samples, threads = len(found), torch.get_num_threads()
    if samples >= threads:
        parts = [(i * samples // threads, (i + 1) * samples // threads, 0, 1) for i in range(threads)]
    else:
        parts = [(0, samples, i, threads) for i in range(threads if samples else 0)]
    if parts:
        _together(compute, parts)
    return found


def _dense(maps: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """[B, C, H, W] in one piece, and whether plain: as it is where it can be, otherwise turned."""
    if maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_neg():
        return maps, False
    if maps.is_contiguous() and not maps.is_neg():
        return maps, True
    return maps.resolve_neg().contiguous(memory_format=torch.channels_last), False


def _together(compute, parts: list[tuple[int, ...]]) -> None:
    """The first part here, the others in threads besides, or here too where the interpreter is about to end."""
    others = []
    for part in parts[1:]:
        try:
            others.append(_pool(os.getpid()).submit(compute, *part))
        except RuntimeError:
            compute(*part)
    compute(*parts[0])
    for other in others:
        other.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of a process: threads do not come along into a fork."""
    return ThreadPoolExecutor(os.cpu_count(), "microkernels")


def _code(aggregation: str):
    """The compiled code, or None where it cannot be had or is not right."""
    if aggregation not in _made:
        with _making:
            if aggregation not in _made:
                _made[aggregation] = _make(aggregation)
    return _made[aggregation]


def _free() -> None:
    """Nobody is making it in a process that was just forked."""
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_free)


def _make(aggregation: str):
    """In a thread of its own, which knows nothing of modes and devices that the caller is in. Warns where there is nothing to be had. Raises what says that memory ran out: it may be there the next time."""
    try:
        with ThreadPoolExecutor(1) as own:
            code, error = own.submit(_tried, aggregation).result()
        reason = "" if error <= WRONG else f"differs by {error:.1e}"
    except Exception as fault:  # compilers fail in many ways
        if is_memory(fault):
            raise
        reason = f"fails ({type(fault).__name__}: {(str(fault).splitlines() or [''])[0][:120]})"
    if reason:
        warnings.warn(f"filter saliency in this processor's machine code {reason}; slower products serve", RuntimeWarning, stacklevel=2)
        return None
    return code


def _tried(aggregation: str) -> tuple:
    """The compiled code, and its largest relative error in trials."""
    from pipeline.saliency import microcode  # LLVM takes a while to load

    code = microcode.compiled(microcode.host(), aggregation == "abs")
    return code, max(_error(code, aggregation, *trial) for trial in TRIALS)


def _error(code, aggregation: str, shape: tuple[int, ...], groups: int, side: int) -> float:
    """Of two samples' s̄, of noise in both layouts, beside im2col and a product in float64."""
    noise = torch.Generator().manual_seed(0)
    stride, padding, dilation = (2, 1), (1, 2), (1, 2)
    images = torch.randn(2, shape[1] * groups, side, side + 1, generator=noise)
    columns = F.unfold(images.double(), shape[2:], dilation, padding, stride).unflatten(1, (groups, -1))
    high = (side + 2 * padding[0] - dilation[0] * (shape[2] - 1) - 1) // stride[0] + 1
    gradient = torch.randn(2, shape[0], high, columns.shape[3] // high, generator=noise)
    exact = (gradient.double().flatten(2).unflatten(1, (groups, -1)) @ columns.transpose(2, 3)).flatten(1, 2)
    exact = exact.abs().mean(2) if aggregation == "abs" else exact.mean(2).abs()
    layouts = [(maps, maps.contiguous(memory_format=torch.channels_last)) for maps in (images, gradient)]
    found = torch.stack([_filter_saliency(code, *maps, shape, stride, padding, dilation, groups) for maps in zip(*layouts)])
    return float(((found - exact).norm(dim=2) / exact.norm(dim=1)).max())
