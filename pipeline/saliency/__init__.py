"""Filter saliency s̄ of a batch: the mathematics alone, no files and no samples.

An engine is called with images float32 [B, 3, H, W] and labels int64 [B] and gives a `Saliency`. There are two, and one
is the other's check:

    vmap   the definition: `torch.func.vmap(grad(L))`, one gradient a sample, whatever the network does
    fused  one batched forward and backward; each layer's per-sample weight gradient is reduced as it passes and let go

Both differentiate each sample's own cross-entropy (never the batch mean, which would scale s̄ by 1 / B) with the network in
eval mode, and both leave the network as they found it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Protocol

import torch

from pipeline.errors import BadRequest, Stopped, printable
from pipeline.filters import FilterLayout
from pipeline.saliency.threads import have_threads

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # as glibc's malloc.h numbers them


class Saliency(NamedTuple):
    """saliency: s̄, float32 [B, F], the mean |dL/dtheta| (`abs`) or |mean dL/dtheta| (`signed`) of each filter's weights;
    logits: float32 [B, C]."""

    saliency: torch.Tensor
    logits: torch.Tensor


class Engine(Protocol):
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> Saliency: ...

    def begin(self, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Saliency]:
        """What waits for the same and gives it, or raises. One thread begins batches, one after the other, and leaves both tensors and the network as they are until it has the results."""


def make_engine(name: str, network: torch.nn.Module, aggregation: str) -> Engine:
    """`fused` or `vmap` for a network in eval mode, whose weights must not change from its first batch on. Raises BadRequest if the network has no 4-D weight, ValueError in training mode."""
    from pipeline.saliency.fused import FusedEngine
    from pipeline.saliency.vmap import VmapEngine

    if any(module.training for module in network.modules()):
        raise ValueError("filter saliency is defined in eval mode; call network.eval() first")
    return {"fused": FusedEngine, "vmap": VmapEngine}[name](network, FilterLayout.of(network), aggregation)


def choose_engine(network: torch.nn.Module, images: torch.Tensor) -> tuple[str, str]:
    """(engine, why) for a network, from what it does with a few images float32 [B, 3, H, W], never from its class.

    `fused` only if it is exact: see `pipeline.saliency.objections`. Raises Stopped where memory is too short to tell: an engine is chosen by what a network does alone.
    """
    from pipeline.saliency.objections import objection

    try:
        reason = objection(network, images)
    except Exception as fault:
        if is_memory(fault):
            raise _no_memory(images) from None
        raise
    return ("vmap", reason) if reason else ("fused", "every 4-D weight is used in one convolution")


def try_engine(name: str, network: torch.nn.Module, images: torch.Tensor) -> None:
    """One image, float32 [B, 3, H, W], through an engine, under autocast where the caller is. Raises BadRequest if its gradients cannot be had that way, Stopped where memory is too short."""
    try:
        make_engine(name, network, "abs")(images[:1], torch.zeros(1, dtype=torch.int64, device=images.device))
    except Exception as fault:
        if is_memory(fault):
            raise _no_memory(images) from None
        reason = str(fault).strip().splitlines()[0][:200] if str(fault).strip() else type(fault).__name__
        raise BadRequest(f"--model: the gradients of one sample cannot be had of this network by the engine {name}{' in bf16' if torch.is_autocast_enabled('cpu') else ''} ({printable(reason)}), so that there are no profiles of it that way") from None


def check_network(network: torch.nn.Module, images: torch.Tensor) -> int:
    """C, the number of classes, from one forward. Raises BadRequest if it fails or does not give finite logits [B, C], C >= 2, and Stopped where memory is too short."""
    try:
        with torch.no_grad():
            logits = network(images.clone())  # which it may change in place
    except Exception as fault:
        if is_memory(fault):
            raise _no_memory(images) from None
        reason = str(fault).strip().splitlines()[0][:200] if str(fault).strip() else type(fault).__name__
        raise BadRequest(f"--model: the network cannot take images of shape {list(images.shape)} ({reason}); check --preprocess") from None
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[0] != len(images) or logits.shape[1] < 2:
        got = f"shape {list(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise BadRequest(f"--model: the network gives {got} for {len(images)} images; logits [{len(images)}, classes] with 2 classes or more are needed")
    if not logits.isfinite().all(1).any():
        raise BadRequest(f"--model: the network's output is not finite (NaN or infinity) for any of {len(images)} images; check --weights and --preprocess")
    return logits.shape[1]


def is_memory(fault: Exception) -> bool:
    """Whether the device, or the machine, had too little memory: torch has an exception for the most usual way alone."""
    return isinstance(fault, (torch.OutOfMemoryError, MemoryError)) or (isinstance(fault, RuntimeError) and any(text in str(fault) for text in ("out of memory", "can't allocate memory", "ALLOC_FAILED", "unable to find an engine")))


def _no_memory(images: torch.Tensor) -> Stopped:
    return Stopped(f"there is too little memory here to run the network on {len(images)} image{'s' * (len(images) != 1)} of {images.shape[-2]} x {images.shape[-1]} pixels\nthe same command goes on where there is more")


def prepare_process(threads: int, precision: str) -> None:
    """Make this process one that computes: with so many threads, at `fp32` (no TF32 anywhere) or `tf32` (`bf16` is fp32 here and autocast in the profiler). Raises Stopped where it does not get the threads.

    Memory that it frees stays its own, up to 32 MiB at a time and where the C library is glibc: the next batch needs it again at once, and pages that the system clears anew
    cost a quarter of the time of a small network.
    """
    have_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(MMAP_THRESHOLD, 2**25)  # the most that it takes: larger ones go back, and leave no holes
        libc.mallopt(ARENA_MAX, 1)  # of all threads: those of their own are given back whatever the threshold says
