"""A batch on a CPU in equal parts, each computed by a team of threads of its own.

Threads that share a layer wait for each other at its end, hundreds of times a batch: a small network's layers are over before the next thread has woken, and where another process
takes one core for a moment, all stand still. Teams that have samples of their own meet once a batch, or, where the next batch is begun before this one is waited for, not even then: whoever is done
goes on with the next part.
"""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from types import BuiltinFunctionType, CellType, ClassMethodDescriptorType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType, MethodType, ModuleType, WrapperDescriptorType

import torch

from pipeline.saliency.threads import have_threads

Tensors = tuple[torch.Tensor, ...]
Compute = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], Tensors]
NUMBERS = (2, 3)  # of teams: few, since Python runs in one of them at a time
LEAST = 2  # samples of a team: torch has another kernel for a small image that is alone, which rounds otherwise, enough to take a ReLU to the other side of its kink
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TORCHS_OWN = frozenset(vars(torch.nn.Module())) - {"training", "_parameters", "_buffers"}  # what every module has, and torch looks after
CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict)
PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
INNATE = (ClassMethodDescriptorType, GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType, WrapperDescriptorType)  # what a class has that is not written in Python
EMPTY = CellType()
WRITTEN = ("torch.", "torchvision.", "pipeline.cifar.")
PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.memory_format))
EVERYWHERE = tuple(getattr(torch.nn.modules.module, f"_global_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre"))  # of all modules there are
KNOWN = ("torch.nn.", "torchvision.", "pipeline.cifar.")  # whose modules keep nothing of a forward pass but in themselves


class Teams:
    """`teams(compute, images, labels)` is `compute(network, images, labels)`, tensors on the CPU with a row for each sample, always the same function; `begin` gives what waits for it.

    Teams share tensors, and each has modules of its own, which may keep in themselves what they like of a forward pass. Code that keeps it elsewhere (in a global, a buffer, what a hook
    has hold of) would mix the teams' samples, and no trial would be sure to show it: so a network has teams only where its modules are of torch, torchvision or this package, without
    hooks and without functions or objects from elsewhere, be they in a list. Any other, and one that cannot be copied, has whole batches. That is looked at for every batch, and teams are copied anew where anything that a module holds is another. Which samples a team has follows from their number and the process's threads alone. Raises what `compute` raises.
    """

    def __init__(self, network: torch.nn.Module):
        self.network, self.alone = network, _held(network) is None
        self.networks: list[torch.nn.Module] = []  # one a team, none of them the network itself, which is looked at while they compute
        self.held: tuple[list, list] = [], []  # by the network when they were copied
        self.pool: ThreadPoolExecutor | None = None
        self.free: SimpleQueue[torch.nn.Module] | None = None  # those of the networks that no team computes with

    def __call__(self, compute: Compute, images: torch.Tensor, labels: torch.Tensor) -> Tensors:
        return self.begin(compute, images, labels)()

    def begin(self, compute: Compute, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Tensors]:
        """What gives the result, or raises, once all teams are done; where there are none, all is done already. Batches are computed in the order in which they are begun."""
        threads = torch.get_num_threads()
        teams = next((n for n in NUMBERS if threads % n == 0), 1)
        if teams == 1 or len(images) % teams or len(images) < LEAST * teams or self.alone or any(EVERYWHERE) or not self._assembled(teams):
            whole = compute(self.network, images, labels)
            return lambda: whole
        autocast = {"dtype": torch.get_autocast_dtype("cpu"), "enabled": torch.is_autocast_enabled("cpu")}  # a thread has its own
        free = self.free

        def part(*of: torch.Tensor) -> Tensors:
            if torch.get_num_threads() != threads // teams:
                have_threads(threads // teams)
            network = free.get()
            try:
                with torch.autocast("cpu", **autocast):
                    return compute(network, *of)
            finally:
                free.put(network)

        parts = [self.pool.submit(part, *of) for of in zip(images.tensor_split(teams), labels.tensor_split(teams))]

        def result() -> Tensors:
            wait(parts)
            torch.set_num_threads(torch.get_num_threads())  # with which any new thread begins
            return tuple(map(torch.cat, zip(*(p.result() for p in parts))))

        return result

    def _assembled(self, teams: int) -> bool:
        """Whether there are so many networks, as the network is now, and threads."""
        held = _held(self.network)
        if held is None:
            return False
        if len(self.networks) != teams or held[0] != self.held[0] or len(held[1]) != len(self.held[1]) or any(map(operator.is_not, held[1], self.held[1])):
            shared = {id(t): t for t in held[1] if isinstance(t, torch.Tensor)}
            try:
                self.networks = [copy.deepcopy(self.network, dict(shared)) for _ in range(teams)]
            except Exception:  # modules hold what they like
                self.alone = True
                return False
            self.held, self.pool, self.free = held, ThreadPoolExecutor(teams, "team"), SimpleQueue()
            for network in self.networks:
                self.free.put(network)
        return True

    def __getstate__(self) -> dict:
        """A copy assembles teams of its own."""
        return vars(self) | {"networks": [], "held": ([], []), "pool": None, "free": None}


def _held(network: torch.nn.Module) -> tuple[list, list] | None:
    """(plain data, objects) that it can reach, or None unless all of it is of torch, torchvision or this package: modules without hooks, and neither functions nor objects from elsewhere, however deep in a list or an object."""
    reached, plain, objects, seen = [network], [], [], set()
    for one in reached:  # which grows meanwhile
        kind = type(one)
        if kind in PLAIN:
            plain.append(one)
            continue
        plain.append(kind)  # so that the two lists keep step
        objects.append(one)  # as often as it is met: what is in its place there may be one that is met elsewhere
        if id(one) in seen:
            continue
        seen.add(id(one))
        if kind in PROXIES:  # which may lead nowhere
            return None
        if isinstance(one, torch.nn.Module):
            if kind not in seen and not all(map(_is_as_written, kind.__mro__)) or not _is_ours(kind) or any(getattr(one, hooks) for hooks in HOOKS):
                return None
            seen.add(kind)
            held = {name: value for name, value in vars(one).items() if name not in TORCHS_OWN}
            reached.extend((one._modules, len(held), *held, *held.values()))
        elif kind in CONTAINERS or isinstance(one, (list, tuple, set, frozenset, dict)) and _is_ours(kind):
            reached.extend((len(one), *one, *(one.values() if isinstance(one, dict) else ())))
        elif kind is functools.partial:
            reached.extend((one.func, one.args, one.keywords))
        elif kind is weakref.ref:
            reached.append(one())
        elif kind in (torch.Tensor, torch.nn.Parameter):
            pass
        elif isinstance(one, FunctionType):
            if not _is_ours(one) or not _is_written_by_torch(one):
                return None
        elif isinstance(one, BuiltinFunctionType):
            if not _is_torchs_builtin(one):
                return None
        elif isinstance(one, MethodType):
            reached.extend((one.__func__, one.__self__))
        elif isinstance(one, type):
            if not _is_ours(one) and one.__module__ != "builtins":
                return None
        elif _is_ours(kind) and all(map(_is_as_written, kind.__mro__)):
            held = getattr(one, "__dict__", {})
            reached.extend((len(held), *held, *held.values()))
        else:
            return None
    return plain, objects


def _is_as_written(kind: type) -> bool:
    """Whether nothing that a class can do is somebody else's, put there later."""
    return all(map(_is_torchs_attribute, vars(kind).values()))


def _is_torchs_attribute(value: object) -> bool:
    value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    if isinstance(value, property):
        return all(part is None or isinstance(part, FunctionType) and _is_written_by_torch(part) for part in (value.fget, value.fset, value.fdel))
    if isinstance(value, FunctionType):
        return _is_written_by_torch(value)
    if isinstance(value, type):
        return f"{value.__module__}.".startswith(("builtins.", *WRITTEN))
    does = callable(value) or hasattr(type(value), "__get__")
    return not does or isinstance(value, INNATE) or isinstance(value, BuiltinFunctionType) and _is_torchs_builtin(value) or f"{type(value).__module__}.".startswith("torch.") and not isinstance(value, torch.nn.Module)


def _is_written_by_torch(function: FunctionType) -> bool:
    """Where it was written, whatever name it goes by, and whatever it wraps that can be called."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != EMPTY]
    inner = [one for cell in cells for one in (cell if isinstance(cell, (list, tuple)) else [cell]) if callable(one)]
    return f"{function.__globals__.get('__name__')}.".startswith(WRITTEN) and all(map(_is_torchs_attribute, inner))


def _is_torchs_builtin(function: BuiltinFunctionType) -> bool:
    """Of a module or a class of theirs, and not of an object, or of somebody's class (as `apply` of an autograd.Function is)."""
    of = function.__self__
    return f"{function.__module__ or getattr(of, '__module__', None)}.".startswith(("torch.", "builtins.")) and (of is None or isinstance(of, (type, ModuleType)) and _is_torchs_attribute(of))


def _is_ours(one: object) -> bool:
    return f"{getattr(one, '__module__', None) or ''}.".startswith(KNOWN)
