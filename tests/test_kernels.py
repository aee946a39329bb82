"""The Triton kernels, run by Triton's interpreter on the CPU, against autograd in float64; and the guard that believes no kernel unseen."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pipeline.saliency import kernels, make_engine, microkernels, prepare_process, products
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
    "tiles of one tap, short": ((1, 140, 4, 4), (130, 140, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "tiles of one tap": ((1, 260, 9, 8), (130, 260, 1, 1), (1, 1), (0, 0), (1, 1), 1),
}

INTERPRETED = """
import torch
from pipeline.saliency import kernels
from test_kernels import BESIDES, GEOMETRIES, case, truth
def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm()) if found.shape == exact.shape else "of another shape"
for tf32 in (False, True):
    torch.backends.cuda.matmul.allow_tf32 = tf32
    for name in GEOMETRIES:
        for aggregation in ("abs", "signed"):
            print(name, aggregation, tf32, error(kernels.filter_saliency(*case(name), aggregation), truth(name, aggregation)), sep=";")
torch.backends.cuda.matmul.allow_tf32 = False
for name, check in BESIDES.items():
    print(name, check(), sep=";")
"""


def of_scaled(input: float, gradient: float) -> float:
    """The error for maps times something."""
    seen, asked, *geometry = case("3x3")
    found = kernels.filter_saliency(seen * input, asked * gradient, *geometry, "abs") / input / gradient
    return float((found.double() - truth("3x3", "abs")).norm() / truth("3x3", "abs").norm())


def of_spoilt(which: int, value: float) -> str:
    """What comes of a sample with a number that is none, and of the one after it."""
    maps, geometry = list(case("3x3")[:2]), case("3x3")[2:]
    maps[which][0, 1, 2, 3] = value
    found = kernels.filter_saliency(*maps, *geometry, "abs")
    return "".join("nan" if not row.isfinite().any() else "some" if not row.isfinite().all() else "whole" for row in found)


def of_unread() -> str:
    """An infinity at a place that a strided convolution does not read: it must not pass for small numbers."""
    input, gradient, *geometry = case("1x1 strided")
    input[0, 0, 1, 1] = torch.inf
    return str(bool(kernels.filter_saliency(input, gradient, *geometry, "abs")[0].isfinite().any()))


def of_zeros() -> str:
    input, gradient, *geometry = case("3x3")
    return str(kernels.filter_saliency(input * 0, gradient, *geometry, "abs").count_nonzero().item())


def of_bias() -> str:
    """Maps of more numbers than a program takes, its last part not whole; a bias that does not lie as it counts."""
    maps, bias = torch.randn(3, 7, 11, 13).contiguous(memory_format=torch.channels_last), torch.randn(14)[::2]
    return str(torch.equal(kernels._biased(maps.clone(), bias), maps + bias[:, None, None]))


def of_many_parts() -> float:
    """A sample whose largest number is looked for in several parts."""
    random = torch.Generator().manual_seed(0)
    input, gradient = torch.randn(1, 2, 100, 100, generator=random), torch.randn(1, 16, 100, 100, generator=random)
    exact = torch.einsum("bohw,bihw->boi", gradient.double(), input.double()).abs().mean(2)
    found = kernels.filter_saliency(input, gradient, torch.Size((16, 2, 1, 1)), (1, 1), (0, 0), (1, 1), 1, "abs")
    return float((found.double() - exact).norm() / exact.norm())


def of_quiet() -> float:
    """The worst error of a filter where one's gradient is a trillionth of another's."""
    input, gradient, *geometry = case("3x3")
    quieter = torch.logspace(-12, 8, gradient.shape[1])
    found = kernels.filter_saliency(input, gradient * quieter[:, None, None], *geometry, "abs") / quieter
    return float(((found.double() - truth("3x3", "abs")) / truth("3x3", "abs")).abs().max())


BESIDES = {
    "tiny": lambda: of_scaled(1e-20, 1e-15), "huge": lambda: of_scaled(1e25, 1e-3), "apart": lambda: of_scaled(1e20, 1e-30), "NaN seen": lambda: of_spoilt(0, torch.nan), "NaN asked": lambda: of_spoilt(1, torch.nan),
    "inf seen": lambda: of_spoilt(0, torch.inf), "inf asked": lambda: of_spoilt(1, -torch.inf), "inf unread": of_unread, "zeros": of_zeros, "bias": of_bias, "many parts": of_many_parts, "quiet filters": of_quiet,
}  # fmt: skip


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
def interpreted() -> dict[tuple[str, ...], str]:
    """(name, aggregation, whether TF32 is allowed) -> error, and a check of `BESIDES` -> what it found, from one process in which Triton interprets."""
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=surroundings(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {tuple(words[:-1]): words[-1] for words in (line.split(";") for line in done.stdout.splitlines())}


@pytest.mark.parametrize("tf32, most", [(False, 1e-6), (True, 2e-3)])
@pytest.mark.parametrize("aggregation", ["abs", "signed"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_kernel_gives_what_autograd_gives(interpreted, name, aggregation, tf32, most):
    assert float(interpreted[name, aggregation, str(tf32)]) < most


@pytest.mark.parametrize("name", ["tiny", "huge", "apart", "many parts", "quiet filters"])
def test_maps_of_any_size_are_right(interpreted, name):
    assert float(interpreted[name,]) < 1e-6


@pytest.mark.parametrize("name, found", [("NaN seen", "nanwhole"), ("NaN asked", "somewhole"), ("inf seen", "nanwhole"), ("inf asked", "somewhole"), ("inf unread", "False"), ("zeros", "0"), ("bias", "True")])
def test_what_is_no_number_is_seen_in_its_own_sample_alone(interpreted, name, found):
    """An infinity never passes for a small number; zeros give zero; a bias is added to the bit."""
    assert interpreted[name,] == found


def test_a_kernel_that_agrees_is_believed_and_tried_once(monkeypatch):
    monkeypatch.setattr(kernels, "_believed", {})
    calls = []
    plain = lambda input, gradient, shape: calls.append(len(input)) or gradient.sum((2, 3))  # noqa: E731
    input, gradient = torch.randn(4, 3, 5, 5), torch.randn(4, 2, 5, 5)
    assert all(kernels.agrees(plain, plain, input, gradient, (2, 3, 1, 1)) for _ in range(3))
    assert calls == [1, 1]  # one sample, twice: by the one and by the other


def test_a_kernel_is_judged_by_no_users_images(monkeypatch):
    """A first sample of zeros or NaN neither clears a wrong kernel nor condemns a right one; with TF32 allowed it is another kernel."""
    monkeypatch.setattr(kernels, "_believed", {})
    right, wrong = lambda i, g, s: g.sum((2, 3)), lambda i, g, s: 7 * g.sum((2, 3))  # noqa: E731
    spoilt, zeros, maps = torch.full((1, 2, 5, 5), torch.nan), torch.zeros(1, 2, 5, 5), torch.randn(1, 3, 5, 5)
    assert kernels.agrees(right, right, maps, spoilt, "a")
    with pytest.warns(RuntimeWarning, match="differs by"):
        assert not kernels.agrees(wrong, right, maps, zeros, "b")
    assert kernels.agrees(right, right, maps, zeros, "c")
    prepare_process(torch.get_num_threads(), "tf32")
    try:
        with pytest.warns(RuntimeWarning, match="differs by"):
            assert not kernels.agrees(wrong, right, maps, zeros, "c")
    finally:
        prepare_process(torch.get_num_threads(), "fp32")


def test_memory_that_runs_out_condemns_no_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "_believed", {})
    plain = lambda i, g, s: g.sum((2, 3))  # noqa: E731
    for fault in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")):
        with pytest.raises(RuntimeError, match="out of memory"):
            kernels.agrees(lambda *_: (_ for _ in ()).throw(fault), plain, torch.zeros(1, 3, 5, 5), torch.zeros(1, 2, 5, 5), "a")
    assert kernels.agrees(plain, plain, torch.zeros(1, 3, 5, 5), torch.zeros(1, 2, 5, 5), "a")


def test_a_bias_is_added_by_torch_where_no_kernel_can(monkeypatch):
    monkeypatch.setattr(kernels, "_believed", {})
    maps, bias = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), torch.randn(3)
    expected = maps + bias[:, None, None]
    with pytest.warns(RuntimeWarning, match="the kernel that adds a bias fails"):
        assert torch.equal(kernels.add_bias(maps.clone(), bias), expected)
    assert torch.equal(kernels.add_bias(maps.clone(), bias), expected)


@pytest.mark.parametrize("fast, words", [(lambda i, g, s: g.sum((2, 3)) * 1.01, "differs by 1"), (lambda i, g, s: 1 / 0, r"fails \(ZeroDivisionError")])
def test_a_kernel_that_errs_or_breaks_is_not_believed(monkeypatch, fast, words):
    monkeypatch.setattr(kernels, "_believed", {})
    with pytest.warns(RuntimeWarning, match=words):
        assert not kernels.agrees(fast, lambda i, g, s: g.sum((2, 3)), torch.randn(4, 3, 5, 5), torch.randn(4, 2, 5, 5), (2, 3, 1, 1))


def test_the_engine_asks_a_kernel_for_every_convolution_and_gives_what_it_gives(monkeypatch, set_threads):
    """With the plain products standing in for kernels, as on a device that these serve."""
    set_threads(1)  # with more a batch is filled up, or computed in parts
    network, images, labels = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval(), torch.randn(3, 3, 9, 9), torch.arange(3)
    monkeypatch.setattr(microkernels, "serves", lambda *_: False)
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
