"""Whether an explanation depends on what a network has learnt: the cascading randomisation of Adebayo et al., 2018, "Sanity checks for saliency maps". Mathematics alone.

Layers of a copy are randomised from the output down, a few more at every stage. What explained the trained network should not explain these: a map that stays
as it was is an edge detector, a profile that stays as it was is the architecture.

Randomised means shuffled: the entries of each parameter change places among themselves. So every layer keeps its numbers, their scale and their tails, and loses which
number stood where, which is all that was learnt; a fresh draw would also change how loud a layer is, and a fall would say as much of that. A parameter whose entries are
all equal stays as it is. BatchNorm's running mean and variance are no parameters but measurements of the layers below, false once these are shuffled: with the trained ones
activations grow or die out layer by layer, and nothing but that would be seen. So they are measured again, in the randomised part alone, on a few images.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import BadRequest, printable
from pipeline.filters import FilterLayout

STAGES = 7  # below the head, at most
FEWEST = 3  # filters of a layer whose order means something


@dataclass(frozen=True)
class Stage:
    """What a stage adds. layer: the deepest weight that is randomised by then, called as in a `FilterLayout`; modules: names of those that become so."""

    layer: str
    modules: tuple[str, ...]


def stages(network: torch.nn.Module, images: torch.Tensor, most: int = STAGES) -> list[Stage]:
    """The cascade of a network: its head (what comes last with a weight of two axes or more), then at most `most` stages cut evenly over the other layers
    with such weights, by one forward of images float [B, 3, H, W]. The last stage ends with every parameter that there is."""
    modules = dict(network.named_modules())
    owners = top_down(network, images)
    cuts = [(at, weight) for at, owner in enumerate(owners) if (weight := _weight(owner, modules[owner]))]
    rest = cuts[1:]
    count = min(most, len(rest))
    ends = [cuts[0], *(rest[(i + 1) * len(rest) // count - 1] for i in range(count))]
    stops = [at + 1 for at, _ in ends[:-1]] + [len(owners)]
    return [Stage(weight, tuple(owners[start:stop])) for (_, weight), start, stop in zip(ends, [0, *stops], stops)]


def top_down(network: torch.nn.Module, images: torch.Tensor) -> list[str]:
    """Names of the modules that own parameters, the one called last first: in the order of what a forward does, not of how the network was written down.

    One that is called more than once counts where it is called last; one that is never called, where what it belongs to is. The network is left as it was.
    """
    modules = dict(network.named_modules())
    called: dict[str, int] = {}

    def note(name: str):
        def hook(*_: object) -> None:
            called[name] = clock[0] = clock[0] + 1

        return hook

    clock = [0]
    with ExitStack() as hooks, torch.no_grad():
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(note(name)).remove)
        network(images.clone())

    def when(name: str) -> int:
        while name and name not in called:
            name = name.rpartition(".")[0]
        return called[name]

    owners = [name for name, module in modules.items() if next(module.parameters(recurse=False), None) is not None]
    return sorted(reversed(owners), key=when, reverse=True)


def cascade(network: torch.nn.Module, stages: list[Stage], seed: int, images: torch.Tensor) -> Iterator[torch.nn.Module]:
    """Stage after stage one and the same copy of the network, whose randomised part grows; what is drawn depends on (seed, name of the parameter) alone. The network itself
    is never touched. images: float [B, 3, H, W], on which the BatchNorms of the randomised part are measured.

    Raises BadRequest if the network cannot be copied.
    """
    try:
        network = copy.deepcopy(network)
    except Exception as fault:
        raise BadRequest(f"the network cannot be copied ({printable(str(fault).splitlines()[0][:200] if str(fault) else type(fault).__name__)}), and sanity randomises none but a copy") from None
    modules, names = dict(network.named_modules()), {id(p): name for name, p in network.named_parameters()}
    norms: list[_BatchNorm] = []
    for stage in stages:
        for module in map(modules.get, stage.modules):
            for parameter in module.parameters(recurse=False):
                if name := names.pop(id(parameter), None):  # a weight that two modules share is shuffled once
                    _shuffle(parameter, seed, name)
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                norms.append(module)
        _measure(network, norms, images)
        yield network


def _weight(owner: str, module: torch.nn.Module) -> str | None:
    """What a module's first parameter of two axes or more is called as a layer."""
    names = (f"{owner}.{name}" if owner else name for name, p in module.named_parameters(recurse=False) if p.dim() >= 2)
    return next((name.removesuffix(".weight") for name in names), None)


def _shuffle(parameter: torch.Tensor, seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
    places = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    with torch.no_grad():
        shuffled = parameter.flatten()[places.to(parameter.device)].view_as(parameter)
        parameter.copy_(shuffled.flatten().roll(1).view_as(parameter) if torch.equal(shuffled, parameter) else shuffled)  # of two numbers every second shuffle changes nothing


def _measure(network: torch.nn.Module, norms: list[_BatchNorm], images: torch.Tensor) -> None:
    """Give BatchNorms the mean and variance of what they see, from the images up: each sees what the ones below, measured before it, let through."""

    def hook(norm: _BatchNorm, args: tuple, kwargs: dict) -> None:
        seen = args[0] if args else kwargs["input"]
        axes = [0, *range(2, seen.dim())]
        if seen.numel() > seen.shape[1]:  # one number a channel has no variance
            norm.running_mean.copy_(seen.mean(axes))
            norm.running_var.copy_(seen.var(axes))

    with ExitStack() as hooks, torch.no_grad():
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if norms:
            network(images.clone())


# ---- similarities --------------------------------------------------------------------------------------------------


def cosine(trained: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64 [N], of rows [N, F]: the neighbours' measure for ŝ. 0 where the other is 0 or not finite, NaN where the trained one is."""
    (a, one), (b, two) = (_clean(rows) for rows in (trained, other))
    a, b = (rows / np.where(rows.any(1), np.abs(rows).max(1, initial=0), 1.0)[:, None] for rows in (a, b))  # so that no square is too large
    return _correlated(a, b, one, two)


def spearman(trained: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rank correlation, float64 [N], of rows [N, M]; ties share their mean rank. 0 where the other has no spread or is not finite, since nothing of the order is left then;
    NaN where the trained one is so, since there is no order to keep."""
    (a, one), (b, two) = (_clean(rows) for rows in (trained, other))
    a, b = (rankdata(rows, axis=1) - (rows.shape[1] + 1) / 2 for rows in (a, b))
    return _correlated(a, b, one, two)


def rank_within_layers(trained: np.ndarray, other: np.ndarray, layout: FilterLayout, live: np.ndarray) -> np.ndarray:
    """float64 [N]: of s̄ [N, F] the mean over layers of `spearman` within the layer, among its live filters, where these are `FEWEST` or more. How loud one layer is beside
    another is the architecture's and no evidence. A layer without an order in the trained network is left out; NaN where none is left."""
    spans = [np.arange(span.start, span.stop)[live[span]] for span in layout.slices.values()]
    found = np.array([spearman(trained[:, columns], other[:, columns]) for columns in spans if len(columns) >= FEWEST]).reshape(-1, len(trained))
    counted = ~np.isnan(found)
    return np.divide(np.nansum(found, 0), counted.sum(0), out=np.full(len(trained), np.nan), where=counted.any(0))


def _clean(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows in float64, 0 where one of their numbers is not finite; which were finite, bool [N])."""
    rows = np.asarray(rows, np.float64)
    finite = np.isfinite(rows).all(1)
    return np.where(finite[:, None], rows, 0.0), finite


def _correlated(a: np.ndarray, b: np.ndarray, trained: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of rows, with the gaps that `cosine` and `spearman` speak of."""
    lengths = np.sqrt(np.square(a).sum(1)) * np.sqrt(np.square(b).sum(1))
    values = np.divide((a * b).sum(1), lengths, out=np.zeros(len(a)), where=lengths > 0)
    return np.where(trained & a.any(1), np.where(other, values.clip(-1, 1), 0.0), np.nan)
