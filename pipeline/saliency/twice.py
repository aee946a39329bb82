"""What a network computes, so that autograd can differentiate its backward pass: input saliency is a second derivative.

torch has no derivative of the backward of some functions. Where an equal of one is at hand that has, the equal is taken.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def twice_differentiable() -> ExitStack:
    """A context. Attention is computed by plain products in it, and the hard sigmoid as what it is made of."""
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    stack.enter_context(_Equals())
    return stack


class _Equals(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.hardsigmoid, torch._C._nn.hardsigmoid):
            return F.relu6((args[0] if args else kwargs["input"]) + 3) / 6
        return func(*args, **kwargs or {})
