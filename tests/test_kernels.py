"""The Triton kernels, run by Triton's interpreter on the CPU, against autograd in float64; and the guard that believes no kernel unseen."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pipeline.saliency import kernels, make_engine, products
from tiny import surroundings

pytest.importorskip("triton", reason="there is no Triton for this platform")

GEOMETRIES = {  # (B, I, H, W), (O, I / groups, k, k), stride, padding, dilation, groups
    "3x3": ((2, 5, 9, 8), (7, 5, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1": ((2, 20, 6, 6), (18, 20, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 strided": ((2, 3, 7, 7), (4, 3, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "stride, dilation": ((1, 3, 13, 12), (4, 3, 3, 3), (2, 1), (2, 1), (2, 3), 1),
    "asymmetric kernel": ((2, 4, 8, 9), (3, 4, 1, 7), (1, 1), (0, 3), (1, 1), 1),
    "many columns, split": ((1, 40, 5, 5), (6, 40, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "many outputs": ((1, 3, 5, 5), (70, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "groups": ((2, 6, 7, 7), (8, 3, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": ((2, 18, 7, 7), (18, 1, 3, 3), (2, 2), (1, 1), (1, 1), 18),
    "depthwise, two outputs each": ((2, 3, 7, 7), (6, 1, 5, 5), (1, 1), (2, 2), (1, 1), 3),
}

INTERPRETED = """
import sys, torch
from pipeline.saliency import kernels, make_engine, products
from test_kernels import GEOMETRIES, truth, case
for name in GEOMETRIES:
    for aggregation in ("abs", "signed"):
        found = kernels.filter_saliency(*case(name), aggregation)
        exact = truth(name, aggregation)
        print(name, aggregation, float((found.double() - exact).norm() / exact.norm()), tuple(found.shape) == tuple(exact.shape), sep=";")
"""


def case(name: str) -> tuple:
    """(input, gradient, shape, stride, padding, dilation, groups), seeded."""
    seen, shape, stride, padding, dilation, groups = GEOMETRIES[name]
    random = torch.Generator().manual_seed(len(name))
    input = torch.randn(seen, generator=random)
    out = F.conv2d(input, torch.zeros(shape), None, stride, padding, dilation, groups)
    return input, torch.randn(out.shape, generator=random), torch.Size(shape), stride, padding, dilation, groups


def truth(name: str, aggregation: str) -> torch.Tensor:
    """float64 [B, O], one sample at a time by autograd."""
    input, gradient, shape, *geometry = case(name)
    stride, padding, dilation, groups = geometry
    rows = []
    for x, g in zip(input.double(), gradient.double()):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        F.conv2d(x[None], weight, None, stride, padding, dilation, groups).backward(g[None])
        rows.append(weight.grad.abs().mean((1, 2, 3)) if aggregation == "abs" else weight.grad.mean((1, 2, 3)).abs())
    return torch.stack(rows)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[float, bool]]:
    """`name aggregation` -> (error, whether the shape is right), from one process in which Triton interprets."""
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=surroundings(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(";") for line in done.stdout.splitlines()]
    return {f"{name} {aggregation}": (float(error), shape == "True") for name, aggregation, error, shape in lines}


@pytest.mark.parametrize("aggregation", ["abs", "signed"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_kernel_gives_what_autograd_gives(interpreted, name, aggregation):
    error, right_shape = interpreted[f"{name} {aggregation}"]
    assert right_shape and error < 1e-5


def test_a_kernel_that_agrees_is_believed_and_tried_once(monkeypatch):
    monkeypatch.setattr(kernels, "_believed", {})
    calls = []
    plain = lambda input, gradient, shape: calls.append(len(input)) or gradient.sum((2, 3))  # noqa: E731
    input, gradient = torch.randn(4, 3, 5, 5), torch.randn(4, 2, 5, 5)
    assert all(kernels.agrees(plain, plain, input, gradient, (2, 3, 1, 1)) for _ in range(3))
    assert calls == [1, 1]  # one sample, twice: by the one and by the other


@pytest.mark.parametrize("fast, words", [(lambda i, g, s: g.sum((2, 3)) * 1.01, "differs by 1"), (lambda i, g, s: 1 / 0, r"fails \(ZeroDivisionError")])
def test_a_kernel_that_errs_or_breaks_is_not_believed(monkeypatch, fast, words):
    monkeypatch.setattr(kernels, "_believed", {})
    with pytest.warns(RuntimeWarning, match=words):
        assert not kernels.agrees(fast, lambda i, g, s: g.sum((2, 3)), torch.randn(4, 3, 5, 5), torch.randn(4, 2, 5, 5), (2, 3, 1, 1))


def test_the_engine_asks_a_kernel_for_every_convolution_and_gives_what_it_gives(monkeypatch):
    """With the plain products standing in for kernels, as on a device that these serve."""
    network, images, labels = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval(), torch.randn(3, 3, 9, 9), torch.arange(3)
    plain, asked = make_engine("fused", network, "abs")(images, labels), []
    monkeypatch.setattr(kernels, "_believed", {})
    monkeypatch.setattr(kernels, "serves", lambda input: True)
    monkeypatch.setattr(kernels, "filter_saliency", lambda input, gradient, *geometry: asked.append(len(input)) or products.by_products(input, gradient, *geometry))
    found = make_engine("fused", network, "abs")(images, labels)
    assert asked == [1, 3, 1, 3] and torch.equal(found.saliency, plain.saliency)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("room", [2**15, 2**16, 2**17, 232448])
def test_a_tile_fits_into_shared_memory_and_is_what_triton_takes(room, split):
    """Powers of two from 16 on, whatever the layer; never more columns than it has, padded."""
    for outs, ins, taps, positions in itertools.product((1, 3, 16, 24, 64, 128, 200, 2048), (1, 3, 16, 24, 64, 192, 256, 800), (1, 9, 49), (1, 49, 196, 50176)):
        block = kernels.tile(outs, ins, taps, positions, split, room)
        assert block.stages * (block.outs + block.columns) * block.positions * (4 if split else 2) <= room
        assert all(size >= 16 and size & (size - 1) == 0 for size in block[:3]) and block.columns < 2 * max(16, taps * 2 * ins) and block.outs < 2 * max(16, outs)


def test_a_cpu_is_not_served():
    assert not kernels.serves(torch.zeros(1))
