"""The peers of `bench engine`: libraries whose per-sample gradients become filter saliency in the same last step as ours.

Each gets what helps it: gradients of the 4-D weights alone, no in-place ReLUs where it cannot have them, its own fastest loss reduction.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch

from pipeline.errors import BadRequest
from pipeline.saliency.loss import cross_entropy
from pipeline.saliency.vmap import reduce_filters

OPACUS = ("opacus-hooks", "opacus-functorch", "opacus-ew")
PEERS = (*OPACUS, "backpack")

Saliency = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (images [B, 3, H, W], labels [B]) -> s̄ [B, F]


def peer(name: str, network: torch.nn.Module) -> Saliency:
    """One of `PEERS` for a network in eval mode, of which it takes a copy. Raises BadRequest where the package is not installed."""
    warnings.filterwarnings("ignore", message=".*[Bb]ackward hook")
    own = copy.deepcopy(network)
    for module in own.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
        if isinstance(module, torch.nn.Conv2d):
            module.training = True  # Opacus records nothing in eval mode; a convolution does the same in both
    for parameter in own.parameters():
        parameter.requires_grad_(parameter.dim() == 4)
    try:
        return _backpack(own) if name == "backpack" else _opacus(name, own)
    except ImportError:
        raise BadRequest(f"--engines: {name} is not installed: pip install 'faultline[bench]'") from None


def _opacus(name: str, network: torch.nn.Module) -> Saliency:
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights

    if name == "opacus-ew":
        watched = GradSampleModuleExpandedWeights(network, loss_reduction="sum")
    else:
        watched = GradSampleModule(network, loss_reduction="sum", strict=False, force_functorch=name == "opacus-functorch")

    def run(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cross_entropy(watched(images).float(), labels).sum().backward()
        return _reduced(network, "grad_sample")

    return run


def _backpack(network: torch.nn.Module) -> Saliency:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    watched, loss = extend(network, use_converter=True), extend(torch.nn.CrossEntropyLoss(reduction="sum"))

    def run(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with backpack(BatchGrad()):
            loss(watched(images).float(), labels).backward()
        return _reduced(watched, "grad_batch")

    return run


def _reduced(network: torch.nn.Module, attribute: str) -> torch.Tensor:
    """s̄ [B, F] from the per-sample gradients that lie beside the weights, which are let go."""
    parts = []
    for parameter in network.parameters():
        if parameter.dim() == 4:
            found = getattr(parameter, attribute, None)
            parts.append(reduce_filters(found.float(), "abs"))
            setattr(parameter, attribute, None)
            parameter.grad = None
    return torch.cat(parts, 1)
