"""On a CUDA GPU: kernels and engines give what a naive float64 loop gives, replays what the first batch gave, and what cannot be recorded goes on all the same.

Skipped where torch sees none. Needs neither Ray nor FAISS.
"""

import copy
import gc
import warnings
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from menagerie import Viewed
from test_kernels import GEOMETRIES, case, truth
from test_profiler import RECIPE, samples_of
from test_store import MANIFEST
from torch import nn

from jobs.bench.engine import bench_engine
from pipeline.filters import FilterLayout
from pipeline.profiler import Profiler
from pipeline.saliency import choose_engine, kernels, make_engine, prepare_process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")

FUSED = [pytest.param(animal, id=animal.id) for animal in zoo.FUSED]
CASES = [pytest.param(animal, name, id=f"{animal.id}-{name}") for animal in zoo.ZOO for name in ("fused", "vmap") if name == "vmap" or animal.engine == "fused"]
ERROR = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 1e-2}  # of one layer


@pytest.fixture(autouse=True)
def fp32():
    prepare_process(1, "fp32")
    yield
    prepare_process(1, "fp32")


@pytest.mark.parametrize("aggregation", ["abs", "signed"])
@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_kernel_gives_what_autograd_gives(name, precision, aggregation):
    prepare_process(1, precision)
    input, gradient, *geometry = case(name)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = kernels.filter_saliency(input.cuda().to(dtype), gradient.cuda().to(dtype), *geometry, aggregation)
    exact = truth(name, aggregation)
    assert float((found.double().cpu() - exact).norm() / exact.norm()) < ERROR[precision] * (5 if aggregation == "signed" else 1)


@pytest.mark.parametrize("name", ["3x3", "depthwise", "1x1"])
def test_a_kernel_takes_maps_in_any_layout(name):
    input, gradient, *geometry = case(name)
    plain = kernels.filter_saliency(input.cuda(), gradient.cuda(), *geometry, "abs")
    last = kernels.filter_saliency(*(t.cuda().contiguous(memory_format=torch.channels_last) for t in (input, gradient)), *geometry, "abs")
    assert torch.equal(plain, last)


@pytest.mark.parametrize("side", [64, 65, 224, 1000])
def test_a_sum_over_many_positions_is_as_right_as_a_short_one(side):
    """Of numbers that are all positive, where whatever is cut off a sum is missing at its end."""
    random = torch.Generator("cuda").manual_seed(0)
    input, gradient = (torch.rand(2, channels, side, side, generator=random, device="cuda") for channels in (16, 32))
    exact = torch.einsum("bohw,bihw->boi", gradient.double(), input.double()).mean(2)
    found = kernels.filter_saliency(input, gradient, torch.Size((32, 16, 1, 1)), (1, 1), (0, 0), (1, 1), 1, "abs")
    assert float(((found - exact) / exact).abs().max()) < 4e-5


@pytest.mark.parametrize("animal, name", CASES)
def test_an_engine_is_the_naive_loop(animal, name):
    """And every kernel is believed: a warning would say that the plain products served."""
    network, (images, labels) = animal.make().cuda(), zoo.images()
    kernels._believed.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the fused kernel")
        engine = make_engine(name, network, "abs")
        for _ in range(3):  # as it stands, recorded, replayed
            got = engine(images.cuda(), labels.cuda())
            errors = oracles.relative_errors(got.saliency.cpu(), oracles.saliency(animal.make(), images, labels, "abs"))
            assert np.median(errors) < 1e-5 and errors.max() < 1e-4
            np.testing.assert_allclose(got.logits.cpu(), oracles.logits(animal.make(), images), rtol=1e-4, atol=1e-4)
    assert name == "vmap" or engine.replays.recorded


@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("animal", FUSED)
def test_the_choice_of_an_engine_is_that_of_a_cpu_at_any_precision(animal, precision):
    prepare_process(1, precision)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        assert choose_engine(animal.make().cuda(), zoo.images()[0][:3].cuda())[0] == "fused"


@pytest.mark.parametrize("precision", ERROR)
def test_replays_give_every_batch_its_own_numbers(precision):
    """Bit for bit those that a fresh engine gives it, whoever came before; what was given earlier stays as it was."""
    prepare_process(1, precision)
    network = zoo.FUSED[0].make().cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        engine = make_engine("fused", network, "abs")
        batches = [tuple(t.cuda() for t in zoo.images(seed=seed)) for seed in range(5)]
        found = [engine(*batch) for batch in batches]
        assert engine.replays.recorded
        for batch, got in zip(batches, found):
            fresh = make_engine("fused", network, "abs")(*batch)
            assert torch.equal(got.saliency, fresh.saliency) and torch.equal(got.logits, fresh.logits)


@pytest.mark.parametrize("precision", ERROR)
def test_the_steps_beside_which_the_engine_is_timed_are_replayed_too(precision):
    """One that is asked for layer by layer would make the engine look faster than it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="batches cannot be recorded")
        rows = bench_engine(["resnet20"], 8, "cuda", precision, 1, ["step-folded", "fused"])
    assert [row.engine for row in rows] == ["step", "step-folded", "fused"]


def test_a_sample_does_not_depend_on_who_shares_its_batch():
    network, (images, labels) = zoo.FUSED[0].make().cuda(), zoo.images(8)
    engine = make_engine("fused", network, "abs")
    whole = engine(images.cuda(), labels.cuda()).saliency
    other = torch.cat([images[:1], torch.randn(7, *images.shape[1:])])
    assert torch.equal(engine(other.cuda(), labels.cuda()).saliency[0], whole[0])
    alone = torch.cat([engine(images[i : i + 1].cuda(), labels[i : i + 1].cuda()).saliency for i in range(8)])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-7)


class Looks(nn.Module):
    """Asks for its own numbers while it runs, which cannot be recorded."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.b(y / max(1.0, float(y.detach().abs().max()) * 1e-6)).mean((2, 3))


def test_a_network_that_cannot_be_recorded_goes_on_step_by_step():
    network, (images, labels) = Looks().eval(), zoo.images()
    exact = oracles.saliency(network, images, labels, "abs")
    engine = make_engine("fused", copy.deepcopy(network).cuda(), "abs")
    engine(images.cuda(), labels.cuda())
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        engine(images.cuda(), labels.cuda())
    assert oracles.relative_errors(engine(images.cuda(), labels.cuda()).saliency.cpu(), exact).max() < 1e-4
    torch.randint(5, (3,), device="cuda")  # a recording that broke off would have spoilt the generator
    test_replays_give_every_batch_its_own_numbers("fp32")  # and others are recorded after it


def test_a_network_that_wants_plain_maps_gets_them():
    network, (images, labels) = Viewed().eval(), zoo.images()
    engine = make_engine("fused", copy.deepcopy(network).cuda(), "abs")
    got = engine(images.cuda(), labels.cuda())
    assert not engine.channels_last and oracles.relative_errors(got.saliency.cpu(), oracles.saliency(network, images, labels, "abs")).max() < 1e-4


def test_maps_can_be_differentiated():
    network, (images, labels) = zoo.FUSED[0].make(), zoo.images()
    there, here = images.cuda().requires_grad_(), images.clone().requires_grad_()
    for engine, pixels, true in ((make_engine("fused", copy.deepcopy(network).cuda(), "abs"), there, labels.cuda()), (make_engine("fused", network, "abs"), here, labels)):
        engine.twice(pixels, true).saliency.square().sum().backward()
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-3, atol=1e-5 * float(here.grad.abs().max()))


def test_a_batch_that_does_not_fit_is_halved():
    """With 2 GiB of the device's memory left: 64 images do not fit, fewer do, and every sample has its row."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    manifest = replace(MANIFEST, layers=FilterLayout.of(network), preprocessing=RECIPE, classes=8, batch_size=64, engine="fused")
    samples = samples_of(64, (1000, 1000))
    whole, none = Profiler(manifest, network, "cuda").profile(samples, "a.tar", 0)
    gc.collect()
    torch.cuda.empty_cache()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - 2**31, dtype=torch.uint8, device="cuda")
    try:
        profiler = Profiler(manifest, network, "cuda")
        found, rejects = profiler.profile(samples, "a.tar", 0)
    finally:
        del hog
    assert profiler.most < 64 and none.num_rows == rejects.num_rows == 0 and found["sample_id"].to_pylist() == whole["sample_id"].to_pylist()
    np.testing.assert_allclose(np.stack(found["saliency"].to_pylist()), np.stack(whole["saliency"].to_pylist()), rtol=1e-4, atol=1e-6)


def test_a_network_that_fails_on_an_image_is_not_recorded():
    """Nothing is recorded of a shape that was never computed; the next that can be computed is."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)).eval().cuda()
    engine, labels = make_engine("fused", network, "abs"), torch.zeros(2, dtype=torch.int64, device="cuda")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            engine(torch.randn(2, 3, 9, 9, device="cuda"), labels)
    images = torch.randn(2, 3, 8, 8, device="cuda")
    first, *others = (engine(images, labels).saliency for _ in range(3))
    assert engine.replays.recorded and all(torch.equal(first, other) for other in others)
    torch.randint(5, (3,), device="cuda")  # a recording that broke off would have spoilt the generator
