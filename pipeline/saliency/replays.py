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
    """`replays(compute, *inputs)` is `compute(*inputs)`, tensors on one GPU -> a tuple of tensors, always the same function. The first batch of a shape is computed as it stands, which also
    prepares what is prepared once; the second is tried for what cannot be recorded, recorded, and replayed as all later ones are. One shape is kept, the latest. Raises what `compute` raises."""

    def __init__(self) -> None:
        self.seen: tuple | None = None  # shapes, types and precision of the last batch
        self.refused: tuple | None = None  # those that could not be recorded
        self.recorded: tuple[torch.cuda.CUDAGraph, Tensors, Tensors] | None = None  # what is replayed, where it reads and where it writes
        self.stream: torch.cuda.Stream | None = None  # of recordings: torch's own is shared by all, and so is what lies in its workspaces

    def __call__(self, compute: Compute, *inputs: torch.Tensor) -> Tensors:
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        key = (autocast, tf32, torch.is_grad_enabled(), *((t.shape, t.dtype, t.device) for t in inputs))
        with torch.cuda.device(inputs[0].device):
            if key != self.seen or key == self.refused:
                self.recorded = None
                results = _computed(compute, autocast, inputs)
                self.seen = key
                return results
            if not self.recorded:
                try:
                    self.recorded = self._record(compute, autocast, inputs)
                except Exception as fault:
                    self.refused = key
                    reason = str(fault).splitlines()[0][:160] if str(fault) else type(fault).__name__
                    warnings.warn(f"batches cannot be recorded as a CUDA graph ({reason}); they go on step by step", RuntimeWarning, stacklevel=2)
                if self.refused == key:  # out here, where the failed recording's tensors are let go
                    gc.collect()
                    with contextlib.suppress(RuntimeError):  # of a recording that broke off
                        torch.cuda.empty_cache()
                    return _computed(compute, autocast, inputs)
            return self._replay(inputs)

    def _replay(self, inputs: Tensors) -> Tensors:
        graph, places, results = self.recorded
        for place, given in zip(places, inputs):
            place.copy_(given.detach())
        graph.replay()
        return tuple(t.clone() for t in results)

    def _record(self, compute: Compute, autocast: torch.dtype | None, inputs: Tensors) -> tuple[torch.cuda.CUDAGraph, Tensors, Tensors]:
        """Raises RuntimeError where `compute` waits for the GPU: found before anything is recorded, since a recording that breaks off leaves torch's generator and allocator in its state.
        Also where a replay gives something else, as of a function that keeps something of its own."""
        places = tuple(t.detach().clone() for t in inputs)
        with _no_waiting():
            truth = _computed(compute, autocast, places)
        graph, stream, collects = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), gc.isenabled()
        self.stream = self.stream or torch.cuda.Stream()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what earlier batches used, which a recording cannot use again
        gc.disable()  # an earlier graph that is collected now would break the recording off
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):  # another thread may be waiting for an earlier batch
                results = _computed(compute, autocast, places)
        finally:
            if collects:
                gc.enable()
            torch.cuda.set_stream(stream)
        graph.replay()
        if not all(torch.allclose(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().nan_to_num(0, 0).max()), equal_nan=True) for a, b in zip(results, truth) if b.numel()):
            raise RuntimeError("a replay gives other numbers")
        return graph, places, results


def _computed(compute: Compute, autocast: torch.dtype | None, inputs: Tensors) -> Tensors:
    """Without autocast's cache of cast weights, which a recording would outlive."""
    with torch.autocast("cuda", autocast, cache_enabled=False) if autocast else contextlib.nullcontext():
        return compute(*inputs)


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
