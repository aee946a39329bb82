"""How many threads compute in a process, and that they are really there.

Some of torch's convolutions (oneDNN's weight gradients) share their work out among the threads that OpenMP announces, before it grants them. Where it grants fewer, because of
OMP_THREAD_LIMIT, OMP_DYNAMIC or OMP_MAX_ACTIVE_LEVELS, nobody does a part of the work: no error, numbers up to 1e37 in the place of gradients, or no end (seen in torch 2.15).
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

from pipeline.errors import Stopped

REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def have_threads(threads: int) -> None:
    """torch computes with so many in this process from here on. Raises Stopped if OpenMP does not grant them.

    OpenMP keeps its word to each thread by itself: whoever computes in another thread than the one that called this calls it there.
    """
    torch.set_num_threads(threads)
    granted = _granted()
    if granted is not None and granted < threads:
        raise Stopped(f"OpenMP grants this process {granted} of the {threads} threads that this run computes with, and torch's convolutions would come out wrong: unset OMP_THREAD_LIMIT, and what else begins with OMP_ or KMP_, where it starts\nthe same command resumes")


def _granted() -> int | None:
    """The size of a team of this process's OpenMP, as whoever asks for no size gets it; None where torch has another way to its threads."""
    library, team = ctypes.CDLL(None), []
    region = REGION(lambda _: team.append(None))
    with suppress(AttributeError):
        library.omp_set_dynamic(0)
        if library.omp_get_max_active_levels() < 1:
            library.omp_set_max_active_levels(1)
        library.GOMP_parallel(region, None, 0, 0)
    return len(team) or None
