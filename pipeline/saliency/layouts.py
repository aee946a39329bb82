"""Keeps torch from misreading a gradient that enters BatchNorm or InstanceNorm.

Where an axis has length 1 (a batch of one image, maps of width one), its stride means nothing, and a tensor may pass for
contiguous and for channels-last at once. torch's CPU kernels then walk the gradient in the order of the input (seen in torch
2.11 and 2.15, in eval mode, where maps become tokens as in XCiT): they raise nothing, and every layer below gets wrong numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

NORMS = (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)


class PlainLayouts(TorchFunctionMode):
    """While it is entered, input and output gradient of such a norm are laid out plainly, [B, C, H, W] in this order. Values are the same."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in NORMS:
            return func(*args, **kwargs)
        if args:
            args = (_plain(args[0]), *args[1:])
        else:
            kwargs = kwargs | {"input": _plain(kwargs["input"])}
        result = func(*args, **kwargs)
        if result.requires_grad:
            result.register_hook(_plain)
        return result


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Tensors without an axis of length 1 have one layout alone, and keep it."""
    return tensor.contiguous() if 1 in tensor.shape else tensor
