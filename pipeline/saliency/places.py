"""Keeps a sample's numbers free of its place in the batch, and of how many share it, where torch's arithmetic on a CPU does not.

A matrix product takes some rows together and the rest one by one, and rows that begin at odd addresses another way than others. A sigmoid takes sixteen numbers at once and the rest by
another formula. The last bits of a sample then depend on where it lies. They do not where all comes in the numbers that vectors have, so it is filled up to them. A 1 x 1 convolution is such
a product too, in one thread, unless oneDNN has it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

CURVES = {torch.selu, torch.celu, torch.sigmoid, torch.Tensor.sigmoid, torch.special.expit, torch.tanh, torch.Tensor.tanh, F.silu, F.gelu, F.mish, F.softplus, F.elu, F.selu, F.celu}
IN_PLACE = {torch.sigmoid_: torch.sigmoid, torch.Tensor.sigmoid_: torch.sigmoid, torch.tanh_: torch.tanh, torch.Tensor.tanh_: torch.tanh, F.elu_: F.elu, F.selu_: F.selu, F.celu_: F.celu, torch.selu_: F.selu, torch.celu_: F.celu}
ONEDNN = torch.backends.mkldnn.is_available()
NONE = (0, (0,), (0, 0), [0], [0, 0], "valid")  # ways to say no padding
NUMBERS = 4  # that a row's length is a multiple of
ROWS = 8  # that a product's rows are a multiple of
VECTOR = 64  # numbers that a curve takes at once, at most
GRAIN = 2**15  # numbers that torch gives a thread, at least
GELUS_GRAIN = 2**14  # above which gelu has all threads


class Places(TorchFunctionMode):
    """While it is entered, a sample's part of a Linear layer, an activation or a 1 x 1 convolution on a CPU, and its gradient, have the same bits wherever it lies among as many others; values are the same.

    samples: that share a call inside `vmap`, a power of two.
    """

    def __init__(self, samples: int = 1):
        super().__init__()
        self.samples = samples

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.conv2d:
            return _convolution(*args, **kwargs)
        if func in IN_PLACE and args and args[0].device.type == "cpu" and args[0].is_floating_point():
            return _curve(IN_PLACE[func], *args, **kwargs, inplace=True)
        return _curve(func, *args, **kwargs) if func in CURVES else func(*args, **kwargs)

    def _linear(self, input, weight, bias=None):
        if input.device.type != "cpu" or weight.dim() != 2 or not input.numel() or not weight.numel():
            return F.linear(input, weight, bias)
        number, (outs, ins) = input.shape[:-1].numel(), weight.shape
        more, more_ins, more_outs = padded_rows(number, self.samples) - number, -ins % NUMBERS, -outs % NUMBERS
        if not (more or more_ins or more_outs):
            return F.linear(input, weight, bias)
        rows = input.reshape(-1, input.shape[-1])
        if more_ins or more_outs:
            weight, bias = F.pad(weight, (0, more_ins, 0, more_outs)), bias if bias is None else F.pad(bias, (0, more_outs))
        if more or more_ins:
            rows = F.pad(rows, (0, more_ins, 0, more))
        return F.linear(rows, weight, bias)[:number, :outs].reshape(*input.shape[:-1], outs).clone(memory_format=torch.contiguous_format)  # no view, which could not be changed in place everywhere


def in_company(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch, on a CPU filled up by its last image to `filled_up` many."""
    more = 0 if images.is_cuda else filled_up(len(images), torch.get_num_threads()) - len(images)
    if not more:
        return images, labels
    return tuple(torch.cat([t, t[-1:].expand(more, *t.shape[1:])]) for t in (images, labels))


def filled_up(images: int, threads: int) -> int:
    """The least batch, this or more, in which each thread has as many images and none is alone: where threads share an image some convolutions and norms sum it up in other parts, and for a small one that is alone torch has another kernel. Either rounds otherwise, enough to take a ReLU to the other side of its kink."""
    return max(2, images + -images % threads)


def padded_rows(number: int, samples: int = 1) -> int:
    """The least number of rows, of each of `samples` (a power of two), that is this or more, so that all of them are a multiple of ROWS."""
    unit = max(1, ROWS // samples)
    return -(-number // unit) * unit


def _convolution(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if ONEDNN and input.device.type == "cpu" and set(weight.shape[2:]) == {1} and padding in NONE:
        dilation = 2  # which a kernel of one weight has not; but torch takes oneDNN's way for it, even in one thread
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _curve(func, input, *args, inplace=False, **kwargs):
    if inplace and func in (torch.sigmoid, torch.tanh):
        whole = lambda: input.copy_(func(input, *args, **kwargs))  # noqa: E731
    else:
        whole = lambda: func(input, *args, **kwargs, **({"inplace": True} if inplace else {}))  # noqa: E731
    if input.device.type != "cpu" or input.layout is not torch.strided or not input.numel() or "out" in kwargs or any(a is True for a in args):
        return whole()
    if any(stride == 0 and size > 1 for size, stride in zip(input.shape, input.stride())):
        return whole()  # of an expanded tensor torch has its own idea how the result lies
    more = padded_numbers(input.numel()) - input.numel()
    order = sorted(range(input.dim()), key=lambda axis: -input.stride(axis))  # as it lies in memory, and so will what is found
    lying = input.permute(order)
    if not more and lying.is_contiguous():
        return whole()
    found = func(F.pad(lying.reshape(-1), (0, more)), *args, **kwargs)[: input.numel()].view(lying.shape).permute([order.index(axis) for axis in range(input.dim())])
    return input.copy_(found) if inplace else found.clone(memory_format=torch.preserve_format)


def padded_numbers(number: int) -> int:
    """The least number of numbers, this or more, of which each thread that torch lets have some has whole vectors."""
    while number % (unit := VECTOR * _parts(number)):
        number += -number % unit  # which may let one more thread in
    return number


def _parts(number: int) -> int:
    """A common multiple of the parts that torch makes of so many numbers, gelu's being other than those of all else."""
    threads = torch.get_num_threads()
    return math.lcm(min(threads, -(-number // GRAIN)), threads if number > GELUS_GRAIN else 1)
