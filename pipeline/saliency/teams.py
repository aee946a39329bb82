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
EVERYWHERE = tuple(getattr(torch.nn.modules.module, f"_global_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre"))  # of all modules there are
KNOWN = ("torch.nn.", "torchvision.", "pipeline.")  # whose modules keep nothing of a forward pass but in themselves


class Teams:
    """`teams(compute, images, labels)` is `compute(network, images, labels)`, tensors on the CPU with a row for each sample, always the same function.

    Teams share parameters and buffers, and each has modules of its own, which may keep in themselves what they like of a forward pass. Code that keeps it elsewhere (in a global, a buffer, what a hook
    has hold of) would mix the teams' samples, and no trial would be sure to show it: so a network has teams only where its modules are of torch, torchvision or this package, without
    hooks and without functions from elsewhere. Any other, and one that cannot be copied, has whole batches. What modules hold must not change after the first batch. Which samples a team has follows from their number and the process's threads alone. Raises what `compute` raises.
    """

    def __init__(self, network: torch.nn.Module):
        self.network, self.alone = network, not all(map(_is_known, network.modules()))
        self.networks: list[torch.nn.Module] = []  # one a team
        self.pool: ThreadPoolExecutor | None = None

    def __call__(self, compute: Compute, images: torch.Tensor, labels: torch.Tensor) -> Tensors:
        threads = torch.get_num_threads()
        teams = next((n for n in NUMBERS if threads % n == 0), 1)
        if teams == 1 or len(images) % teams or self.alone or any(EVERYWHERE) or not all(map(_is_known, self.network.modules())) or not self._assembled(teams):
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
        return tuple(map(torch.cat, zip(*(p.result() for p in parts))))

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


def _is_known(module: torch.nn.Module) -> bool:
    """Of torch, torchvision or this package, without hooks, and with no function from elsewhere, as a Lambda has."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    functions = [v for v in vars(module).values() if callable(v) and not isinstance(v, (torch.nn.Module, torch.Tensor))]
    return _is_ours(type(module)) and not any(hooks) and "forward" not in vars(module) and all(map(_is_ours, functions))


def _is_ours(one: object) -> bool:
    return f"{getattr(one, '__module__', None) or ''}.".startswith(KNOWN)
