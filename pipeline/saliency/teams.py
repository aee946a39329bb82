"""A batch on a CPU in equal parts, each computed by a team of threads of its own.

Threads that share a layer wait for each other at its end, hundreds of times a batch: a small network's layers are over before the next thread has woken, and where another process
takes one core for a moment, all stand still. Teams that have samples of their own meet once a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from pipeline.saliency.threads import have_threads

Tensors = tuple[torch.Tensor, ...]
Compute = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], Tensors]
NUMBERS = (2, 3)  # of teams: few, since Python runs in one of them at a time


class Teams:
    """`teams(compute, images, labels)` is `compute(network, images, labels)`, tensors on the CPU with a row for each sample, always the same function.

    Each team has the network's modules to itself, which may keep what they like of a forward pass; parameters and buffers are the same for all. Where a network cannot be copied, or fails in another
    thread and not in this one, whole batches are computed here from then on. Which samples a team has follows from their number and the process's threads alone. Raises what `compute` raises.
    """

    def __init__(self, network: torch.nn.Module):
        self.network = network
        self.networks: list[torch.nn.Module] = []  # one a team
        self.pool: ThreadPoolExecutor | None = None
        self.alone = False

    def __call__(self, compute: Compute, images: torch.Tensor, labels: torch.Tensor) -> Tensors:
        threads = torch.get_num_threads()
        teams = next((n for n in NUMBERS if threads % n == 0), 1)
        if self.alone or teams == 1 or len(images) < teams or not self._assembled(teams):
            return compute(self.network, images, labels)
        autocast = {"dtype": torch.get_autocast_dtype("cpu"), "enabled": torch.is_autocast_enabled("cpu")}  # a thread has its own

        def part(*of: object) -> Tensors:
            if torch.get_num_threads() != threads // teams:
                have_threads(threads // teams)
            with torch.autocast("cpu", **autocast):
                return compute(*of)

        parts = [self.pool.submit(part, *of) for of in zip(self.networks, images.tensor_split(teams), labels.tensor_split(teams))]
        wait(parts)
        torch.set_num_threads(threads)  # with which any new thread begins
        try:
            return tuple(map(torch.cat, zip(*(p.result() for p in parts))))
        except Exception:
            whole = compute(self.network, images, labels)  # raises, where it is the samples' fault
            self.alone = True
            return whole

    def _assembled(self, teams: int) -> bool:
        """Whether there are so many networks and threads."""
        if len(self.networks) != teams:
            shared = {id(t): t for t in (*self.network.parameters(), *self.network.buffers())}
            try:
                self.networks = [self.network, *(copy.deepcopy(self.network, dict(shared)) for _ in range(teams - 1))]
            except Exception:  # modules hold what they like
                self.alone = True
                return False
            self.pool = ThreadPoolExecutor(teams, "team")
        return True
