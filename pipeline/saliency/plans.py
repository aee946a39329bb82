"""How one convolution is cut up for `microcode.py`: what lies where in memory, and which part of the work is whose.

Maps are channels-last, [H, W, C] an image. A column is one weight of a filter; a run is columns that lie side by side in an image too: where kernels are not dilated and there is one group, a row of the
kernel with all its channels, otherwise one place of the kernel. A tap is where a run begins, a place where the kernel stands.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

BLOCK = 256  # places that a tile adds up before the next tile comes
TAPS = 9  # of a depthwise kernel, whose sums lie in registers at once
LINE = 16  # numbers of a line of cache, at which every room begins


class Sizes(NamedTuple):
    """Counts, and distances in numbers. Output channels and groups are those of the part."""

    samples: int
    groups: int
    ins: int  # input channels of a group
    outs: int  # output channels of a group
    all_outs: int  # of all parts
    image: int  # numbers of a sample's input
    gradients: int  # of its output's gradient
    skipped: int  # input channels of groups before the part's
    height: int  # rows of an image
    row: int  # numbers of one
    bordered_row: int  # of one with its padding
    border: int  # numbers before the image in it with its padding, or 0
    places: int
    block: int  # places
    runs: int
    run: int  # columns of one


class Addresses(NamedTuple):
    """In memory: of the three tensors, where the part begins in them; the two tables of the plan; rooms to work in."""

    input: int
    gradient: int
    found: int
    places: int
    taps: int
    bordered: int  # an image with its padding
    panel: int  # some columns at a block of places
    asked: int  # gradients at a block of places
    sums: int  # of |g| along columns
    partial: int  # products of the blocks so far


class Plan(NamedTuple):
    """places, taps: int64, in numbers from the beginning of an image; rooms: where the five begin in a memory of `numbers` numbers, whose first `zeros` are to be 0; skipped: output channels of other parts."""

    sizes: Sizes
    places: torch.Tensor
    taps: torch.Tensor
    rooms: tuple[int, ...]
    numbers: int
    zeros: int
    skipped: int
    depthwise: bool


@functools.lru_cache(4096)
def plan(seen, gave, shape, stride, padding, dilation, groups: int, lanes: int, rows: int, wide: int, part: int, parts: int) -> Plan | None:
    """Of one of so many parts, in which groups are shared out, or filters where there is one group; None where nothing is left for it.

    seen: (H, W, I), gave: (H', W', O), shape: (O, I / groups, k, k); lanes: numbers of a register, rows and wide: filters and registers of a tile.
    """
    (height, width, channels), (high, across, all_outs), (outs, ins, kernel_h, kernel_w) = seen, gave, shape
    grain, units = (lanes, groups) if groups > 1 else (rows, outs)
    step = -(-units // (parts * grain)) * grain
    mine = range(units)[part * step : (part + 1) * step]
    if not mine:
        return None
    depthwise, in_rows = ins == 1 and outs == groups > 1, groups == 1 and dilation[1] == 1
    bordered_row = (width + 2 * padding[1]) * channels
    apart = lambda count, far: torch.arange(count[0])[:, None] * far[0] * bordered_row + torch.arange(count[1]) * far[1] * channels  # noqa: E731
    places = apart((high, across), stride).flatten()
    taps = apart((kernel_h, 1 if in_rows else kernel_w), dilation).flatten()
    runs, run = len(taps), ins * (kernel_w if in_rows else 1)
    taps = torch.cat([taps, taps.new_zeros(-runs % TAPS)])
    here = (len(mine), outs // groups) if groups > 1 else (1, len(mine))
    block = -(-len(places) // -(-len(places) // BLOCK))
    image = (height + 2 * padding[0]) * bordered_row if any(padding) else 0
    if depthwise:
        run = len(taps)
        rooms = [image, 0, 0, 0, -(-len(mine) // lanes) * lanes * len(taps)]
    else:
        filters, columns = -(-here[1] // rows) * rows, lanes * wide
        rooms = [image, block * columns, block * filters, filters * lanes, filters * -(-runs * run // columns) * columns if block < len(places) else 0]
    ends = list(itertools.accumulate(-(-room // LINE) * LINE for room in rooms))
    sizes = Sizes(
        samples=0, groups=here[0], ins=ins, outs=here[1], all_outs=all_outs, image=height * width * channels, gradients=len(places) * all_outs, skipped=mine.start * ins if groups > 1 else 0,
        height=height, row=width * channels, bordered_row=bordered_row, border=padding[0] * bordered_row + padding[1] * channels, places=len(places), block=block, runs=runs, run=run,
    )  # fmt: skip
    return Plan(sizes, places, taps, (0, *ends[:-1]), ends[-1], image, mine.start * (outs // groups if groups > 1 else 1), depthwise)
