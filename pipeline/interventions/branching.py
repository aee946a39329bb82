"""One forward for many branches: each is one of a few images under an intervention of its own.

Until a branch's first change it is its image, so the images alone are computed, and branches join them where they first differ.
While the network runs, every function is watched: a tensor carries the generation of rows that it holds (the images, and the branches
that had joined by then), and where an older meets a newer one, its rows are repeated. A network that does something else with its batch
axis than carry it along is found out at the start, on real images; its branches then are rows from the beginning.

The convolutions are those of `watching.Plan`, BatchNorms folded in; on a CPU memory is channels_last where the network allows it, which
is faster by a half.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pipeline.errors import BadRequest
from pipeline.interventions.watching import CONVOLUTIONS, Plan, Use, close, leaves, trial

DOORS = 16  # convolutions at which branches may join: each copies rows, and more of them save little


class Convolve(Protocol):
    """The convolution as it is, of the rows `part` of its input, or of all; or with another kernel in the place of `Use.kernel`."""

    def __call__(self, part: slice = slice(None), kernel: torch.Tensor | None = None) -> torch.Tensor: ...


class Edits(Protocol):
    """What the branches of a batch change. first: int64 [B], the first convolution (call of conv2d in a forward, from 0) that each
    changes, any number beyond the last for none; calls: every convolution that some branch changes."""

    first: torch.Tensor
    calls: Collection[int]

    def output(self, call: int, use: Use, rows: torch.Tensor, convolve: Convolve) -> torch.Tensor:
        """What a convolution of `calls` gives, [R, O, H, W]. rows: int64 [B], on the CPU, where each branch is among the R (its image's row,
        which is not to be changed, while it has not come to its first change)."""


class Forward:
    """The logits of branches. network: in eval mode; plan: of `watch`; images: float [B, 3, H, W], those that it was watched on.

    channels_last, joining: what was found to work. Raises BadRequest if nothing does.
    """

    def __init__(self, network: torch.nn.Module, plan: Plan, images: torch.Tensor):
        self.network, self.plan = network, plan
        self.doors = torch.linspace(0, max(0, len(plan.uses) - 1), min(DOORS, max(1, len(plan.uses)))).round().long().unique()
        images = trial(images)
        with torch.inference_mode():
            expected = network(images.clone())
        for self.joining, self.channels_last in ((True, True), (True, False), (False, True), (False, False)):
            if (images.device.type == "cpu" or not self.channels_last) and self._works(images, expected):
                return
        raise BadRequest("--model: the network cannot be followed from one convolution to the next (it does not do the same every time), so no intervention in it is exact")

    def _works(self, images: torch.Tensor, expected: torch.Tensor) -> bool:
        """Branches through every door, and some that never leave their image, changing nothing: their logits must be their image's."""
        first = torch.cat([self.doors, self.doors, self.doors[-1:] + 1])  # an odd number of rows, so that no fixed shape fits by chance
        origin = torch.arange(len(first)) % len(images)
        try:
            return close(self(images, origin, _Nothing(first)), expected[origin.to(expected.device)])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, origin: torch.Tensor, edits: Edits) -> torch.Tensor:
        """Logits [B, C] of B >= 1 branches. images: float [S, 3, H, W]; origin: int64 [B], on the CPU: the image of each branch."""
        used, origin = origin.unique(return_inverse=True)
        images = images[used.to(images.device)]
        doors = None
        if self.joining:
            doors = self.doors[(torch.searchsorted(self.doors, edits.first, right=True) - 1).clamp(min=0)]
        else:
            images = images[origin.to(images.device)]
        run = _Run(self.plan, edits, Generations(origin, doors, images.device))
        images = images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        with run:
            return run.finish(self.network(run.mark(images, 0)))


@dataclass(frozen=True)
class _Nothing:
    first: torch.Tensor

    @property
    def calls(self) -> list[int]:
        return self.first.tolist()

    def output(self, call, use, rows, convolve) -> torch.Tensor:
        return convolve()


class Generations:
    """Which rows a tensor holds. Generation 0: the S images; then these, followed by the branches that have joined; the last: all B
    branches, and no image. Branches stand in the order in which they joined. Without doors the only generation is the branches.

    origin: int64 [B], in 0..S-1; doors: int64 [B], the convolution at which each joins; begins: convolution -> generation.
    """

    def __init__(self, origin: torch.Tensor, doors: torch.Tensor | None, device: torch.device):
        self.origin, self.device = origin, device
        self.images = int(origin.max()) + 1 if doors is not None else len(origin)
        times, turn = doors.unique(return_inverse=True) if doors is not None else (origin[:0], torch.full_like(origin, -1))
        self.begins = {call: generation for generation, call in enumerate(times.tolist(), 1)}
        self.last = len(times)
        self.turn = turn + 1  # the generation in which each branch joined
        self.order = torch.argsort(self.turn, stable=True)
        self.rank = torch.empty_like(self.order).index_copy_(0, self.order, torch.arange(len(origin)))
        self.joined = torch.bincount(self.turn, minlength=self.last + 1).cumsum(0).tolist()  # branches, by generation
        self._moves: dict[tuple[int, int], torch.Tensor] = {}

    def base(self, generation: int) -> int:
        """Images at the head of a generation's rows."""
        return 0 if generation == self.last else self.images

    def size(self, generation: int) -> int:
        """Its rows in all."""
        return self.base(generation) + self.joined[generation]

    def rows(self, generation: int) -> torch.Tensor:
        """int64 [B]: the row of each branch, or of its image where it has not joined."""
        return torch.where(self.turn <= generation, self.base(generation) + self.rank, self.origin)

    def move(self, old: int, new: int) -> torch.Tensor:
        """int64, on the device: for every row of the newer generation, its row in the older."""
        if (old, new) not in self._moves:
            branches = self.rows(old)[self.order[: self.joined[new]]]
            self._moves[old, new] = torch.cat([torch.arange(self.base(new)), branches]).to(self.device)
        return self._moves[old, new]


class _Run(TorchFunctionMode):
    """One forward. A tensor that came from the images carries its generation as an attribute of its own."""

    def __init__(self, plan: Plan, edits: Edits, generations: Generations):
        super().__init__()
        self.plan, self.edits, self.generations = plan, edits, generations
        self.calls, self.now, self.touched = 0, 0, frozenset(edits.calls)

    def mark(self, tensor: torch.Tensor, generation: int) -> torch.Tensor:
        tensor.generation = generation
        return tensor

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """Rows in the order of the branches."""
        logits = self._bring(logits, self.generations.last)
        return logits[self.generations.rank.to(logits.device)]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        taken = [t for t in leaves((args, kwargs)) if hasattr(t, "generation")]
        if not taken:
            return func(*args, **kwargs)
        if func in CONVOLUTIONS:
            return self._convolve(*args, **kwargs)
        if func is F.batch_norm and hasattr(taken[0], "folded"):
            del taken[0].folded
            return taken[0]
        newest = max(t.generation for t in taken)
        if any(t.generation < newest for t in taken):
            args, kwargs = self._meet((args, kwargs), newest)
        out = func(*args, **kwargs)
        made = [t for t in leaves(out) if isinstance(t, torch.Tensor)]
        if made and any(hasattr(t, "folded") for t in taken):
            raise RuntimeError("the output of a convolution does not go to its BatchNorm as when the network was watched")
        for tensor in made:
            self.mark(tensor, newest)
        return out

    def _convolve(self, input, weight, bias=None, *geometry, **named):
        call, self.calls = self.calls, self.calls + 1
        use = self.plan.uses[call]
        if use.layer is not None:
            if use.kernel.shape != weight.shape:
                raise RuntimeError("the convolutions do not come in the order in which they came when the network was watched")
            weight, bias = use.kernel, use.bias
        self.now = self.generations.begins.get(call, self.now)
        generation = input.generation
        if call in self.touched:
            generation, input = self.now, self._bring(input, self.now)

        def convolve(part=slice(None), kernel=None):
            return F.conv2d(input[part], weight if kernel is None else kernel, bias, *geometry, **named)

        touched = call in self.touched
        output = self.mark(self.edits.output(call, use, self.generations.rows(generation), convolve) if touched else convolve(), generation)
        if use.norm:
            output.folded = True
        return output

    def _bring(self, tensor: torch.Tensor, generation: int) -> torch.Tensor:
        """Its rows repeated as a newer generation needs them."""
        old = tensor.generation
        if tensor.dim() == 0 or len(tensor) != self.generations.size(old):
            raise RuntimeError(f"a tensor of shape {list(tensor.shape)} does not have the {self.generations.size(old)} images along its first axis")
        return tensor if old == generation else self.mark(tensor[self.generations.move(old, generation)], generation)

    def _meet(self, value, generation: int):
        """The same nest with every older tensor brought to that generation."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._meet(v, generation) for v in value)
        if isinstance(value, dict):
            return {k: self._meet(v, generation) for k, v in value.items()}
        return self._bring(value, generation) if hasattr(value, "generation") else value
