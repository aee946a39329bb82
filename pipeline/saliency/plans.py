"""How one convolution is cut up for `microcode.py`: what lies where in memory, and which part of the work is whose.

A place is where the kernel stands, one of H' x W'. A column is one weight of a filter; a run is columns that lie side by side in a channels-last image too: where kernels are not dilated and there is one
group, a row of the kernel with all its channels, otherwise one weight's place with the channels of a group. A tap is where a run begins.
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
    channels: int  # of an image
    skipped: int  # of them, of groups before the part's
    image: int  # numbers of a sample's input
    gradients: int  # of its output's gradient
    gradient_row: int  # from one place's gradients to the next one's, once they lie channels-last
    copied: int  # whether an image goes into its room, for its padding or because it is plain
    plain: int  # whether images are plain, channel after channel
    plain_gradient: int
    lines: int  # pieces of an image that lie in one piece with its padding too
    line: int  # places of one
    bordered_row: int  # numbers of a row with its padding
    border: int  # numbers before the image in it with its padding
    high: int
    across: int
    down: int  # numbers from a place to that below
    right: int
    places: int
    block: int  # places
    runs: int
    run: int  # columns of one


class Addresses(NamedTuple):
    """In memory: of the three tensors, where the part begins in them; the table of the plan; rooms to work in."""

    input: int
    gradient: int
    found: int
    taps: int
    bordered: int  # an image with its padding, channels-last
    turned: int  # a sample's gradients, channels-last
    standing: int  # where each place is in an image: int64
    panel: int  # some columns at a block of places
    asked: int  # gradients at a block of places
    sums: int  # of |g| along columns
    partial: int  # products of the blocks so far


class Plan(NamedTuple):
    """taps: int64, in numbers from the beginning of an image; rooms: where each begins in a memory of `numbers` numbers, whose first `zeros` are to be 0; skipped: output channels of other parts."""

    sizes: Sizes
    taps: torch.Tensor
    rooms: tuple[int, ...]
    numbers: int
    zeros: int
    skipped: int
    depthwise: bool


@functools.lru_cache(1024)
def plan(seen, plain: bool, gave, plain_gradient: bool, shape, stride, padding, dilation, groups: int, lanes: int, rows: int, wide: int, part: int, parts: int) -> Plan | None:
    """Of one of so many parts, in which groups are shared out, or filters where there is one group; None where nothing is left for it.

    seen: (H, W, I), gave: (H', W', O), and whether they are plain; shape: (O, I / groups, k, k); lanes: numbers of a register, rows and wide: filters and registers of a tile.
    Raises ValueError where such a convolution does not give so many places or channels.
    """
    (height, width, channels), (high, across, all_outs), (outs, ins, kernel_h, kernel_w) = seen, gave, shape
    gives = tuple((size + 2 * pad - far * (kernel - 1) - 1) // step + 1 for size, pad, far, kernel, step in zip((height, width), padding, dilation, (kernel_h, kernel_w), stride))
    if (*gives, outs, ins * groups, outs % groups) != (*gave, channels, 0):
        raise ValueError(f"a convolution of {list(shape)} in {groups} groups gives {[*gives, outs]} of {list(seen)}, not {list(gave)}")
    grain, units = (lanes, groups) if groups > 1 else (rows, outs)
    step = -(-units // (parts * grain)) * grain
    mine = range(units)[part * step : (part + 1) * step]
    if not mine:
        return None
    depthwise, in_rows = ins == 1 and outs == groups > 1, groups == 1 and dilation[1] == 1
    bordered_row = (width + 2 * padding[1]) * channels
    taps = (torch.arange(kernel_h, device="cpu")[:, None] * dilation[0] * bordered_row + torch.arange(1 if in_rows else kernel_w, device="cpu") * dilation[1] * channels).flatten()
    runs, run, places = len(taps), ins * (kernel_w if in_rows else 1), high * across
    taps = torch.cat([taps, taps.new_zeros(-runs % TAPS)])
    of_part = (len(mine), outs // groups) if groups > 1 else (1, len(mine))
    block = -(-places // -(-places // BLOCK))
    copied = plain or any(padding)
    bordered = (height + 2 * padding[0]) * bordered_row if copied else 0
    rooms = [bordered, places * of_part[0] * of_part[1] if plain_gradient else 0, 2 * places]
    if depthwise:
        run = len(taps)
        rooms += [0, 0, 0, -(-len(mine) // lanes) * lanes * len(taps)]
    else:
        filters, columns = -(-of_part[1] // rows) * rows, lanes * wide
        rooms += [block * columns, block * filters, filters * lanes, filters * -(-runs * run // columns) * columns if block < places else 0]
    ends = list(itertools.accumulate(-(-room // LINE) * LINE for room in rooms))
    lines = height if any(padding) else 1
    skipped = mine.start * (outs // groups if groups > 1 else 1)
    sizes = Sizes(
        samples=0, groups=of_part[0], ins=ins, outs=of_part[1], all_outs=all_outs, channels=channels, skipped=mine.start * ins if groups > 1 else 0, image=height * width * channels, gradients=places * all_outs,
        gradient_row=of_part[0] * of_part[1] if plain_gradient else all_outs, copied=int(copied), plain=int(plain), plain_gradient=int(plain_gradient),
        lines=lines, line=height * width // lines, bordered_row=bordered_row, border=padding[0] * bordered_row + padding[1] * channels,
        high=high, across=across, down=stride[0] * bordered_row, right=stride[1] * channels, places=places, block=block, runs=runs, run=run,
    )  # fmt: skip
    return Plan(sizes, taps, (0, *ends[:-1]), ends[-1], bordered if any(padding) else 0, skipped, depthwise)
