"""A batch's whole computation on a GPU as one CUDA graph: recorded once for a shape, then replayed.

A small network is done sooner than Python can ask for its layers one by one; a replay asks once. The numbers are those of the computation as recorded, kernel by kernel.
A computation that cannot be recorded (it looks at its own numbers to decide what to do) goes on being asked for step by step.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator

import torch

Tensors = tuple[torch.Tensor, ...]
Compute = Callable[..., Tensors]


class Replays:
    """`replays(compute, *inputs)` is `compute(*inputs)`, tensors on a GPU -> a tuple of tensors, always the same function. The first batch of a shape is computed as it stands, which also
    prepares what is prepared once; the second is tried for what cannot be recorded, then recorded. One shape is kept, the latest. Raises what `compute` raises."""

    def __init__(self) -> None:
        self.seen: tuple | None = None  # shapes, types and precision of the last batch
        self.recorded: tuple[torch.cuda.CUDAGraph, Tensors, Tensors] | None = None  # what is replayed, where it reads and where it writes
        self.refused = False

    def __call__(self, compute: Compute, *inputs: torch.Tensor) -> Tensors:
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (autocast, torch.is_grad_enabled(), *((t.shape, t.dtype, t.device) for t in inputs))
        if key != self.seen or self.refused:
            self.recorded = None
            results = _computed(compute, autocast, inputs)
            self.seen = key
            return results
        if not self.recorded:
            try:
                self.recorded = _record(compute, autocast, inputs)
            except Exception as fault:
                self.refused = True
                reason = str(fault).splitlines()[0][:160] if str(fault) else type(fault).__name__
                warnings.warn(f"batches cannot be recorded as a CUDA graph ({reason}); they go on step by step", RuntimeWarning, stacklevel=2)
            if self.refused:  # out here, where the failed recording's tensors are let go
                gc.collect()
                torch.cuda.empty_cache()
                return _computed(compute, autocast, inputs)
        graph, places, results = self.recorded
        for place, given in zip(places, inputs):
            place.copy_(given)
        graph.replay()
        return tuple(t.clone() for t in results)


def _computed(compute: Compute, autocast: torch.dtype | None, inputs: Tensors) -> Tensors:
    """Without autocast's cache of cast weights, which a recording would outlive."""
    with torch.autocast("cuda", autocast, cache_enabled=False) if autocast else contextlib.nullcontext():
        return compute(*inputs)


def _record(compute: Compute, autocast: torch.dtype | None, inputs: Tensors) -> tuple[torch.cuda.CUDAGraph, Tensors, Tensors]:
    """Raises RuntimeError where `compute` waits for the GPU: found before anything is recorded, since a recording that breaks off leaves torch's generator and allocator in its state."""
    places = tuple(t.clone() for t in inputs)
    with _no_waiting():
        _computed(compute, autocast, places)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what earlier batches used, which a recording cannot use again
    gc.disable()  # an earlier graph that is collected now would break the recording off
    try:
        with torch.cuda.graph(graph):
            results = _computed(compute, autocast, places)
    finally:
        gc.enable()
        torch.cuda.set_stream(stream)
    return graph, places, results


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """What would make this thread wait for the GPU raises RuntimeError inside."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
