"""Filter saliency of a layer by torch's own products, where no machine code of this processor serves: one layer in any shape, whole networks, the memory that it takes."""

import numpy as np
import oracles
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.saliency import make_engine, microkernels, products

FUSED = [pytest.param(animal, id=animal.id) for animal in zoo.ZOO if animal.engine == "fused"]


@pytest.fixture(autouse=True)
def no_machine_code(monkeypatch):
    monkeypatch.setattr(microkernels, "serves", lambda *_: False)


@pytest.mark.parametrize("animal", FUSED)
def test_is_the_naive_loop(animal):
    network, (images, labels) = animal.make(), zoo.images()
    errors = oracles.relative_errors(make_engine("fused", network, "abs")(images, labels).saliency, oracles.saliency(network, images, labels, "abs"))
    assert np.median(errors) < 1e-5 and errors.max() < 1e-4


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("animal", FUSED)
def test_permuted_batch_permutes_the_rows(animal, threads, set_threads):
    set_threads(threads)
    engine = make_engine("fused", animal.make(), "abs")
    for size, order in ((8, [5, 2, 7, 0, 1, 6, 4, 3]), (5, [4, 2, 0, 1, 3]), (3, [2, 0, 1])):
        whole, permuted = engine(*zoo.images(size)), engine(*(t[order] for t in zoo.images(size)))
        assert torch.equal(permuted.saliency, whole.saliency[order])


@settings(max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), stride=st.tuples(st.integers(1, 3), st.integers(1, 2)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3), channels=st.tuples(st.integers(1, 3), st.integers(1, 3)), count=st.integers(1, 5), side=st.tuples(st.integers(5, 9), st.integers(5, 9)), last=st.tuples(st.booleans(), st.booleans()), positions=st.sampled_from([0, 1000]),
)
def test_products_of_a_layer_in_either_layout(kernel, stride, padding, dilation, groups, channels, count, side, last, positions):
    """By both ways, each map plain or channels-last: each sample's weight gradient by autograd, in float64."""
    torch.manual_seed(count)
    weight = torch.randn(channels[0] * groups, channels[1], *kernel, dtype=torch.float64, requires_grad=True)
    input = torch.randn(count, channels[1] * groups, *side, dtype=torch.float64)
    output = torch.nn.functional.conv2d(input, weight, None, stride, padding, dilation, groups)
    gradient = torch.randn_like(output)
    truth = [torch.autograd.grad(output[i], weight, gradient[i], retain_graph=True)[0].flatten(1).abs().mean(1) for i in range(count)]
    saw, gave = (t.float().contiguous(memory_format=torch.channels_last if cl else torch.contiguous_format) for t, cl in zip((input, gradient), last))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "FEWER_POSITIONS", positions)
        found = products.by_products(saw, gave, weight.shape, stride, padding, dilation, groups, "abs")
    assert oracles.relative_errors(found, torch.stack(truth).numpy()).max() < 1e-5


@pytest.mark.parametrize("matrices", [True, False], ids=["im2col", "grouped convolution"])
def test_fused_never_holds_the_gradients_of_all_samples(matrices, monkeypatch):
    """No tensor is larger than a slice of per-sample gradients or an activation, and slicing changes no answer."""
    network, (images, labels) = next(a for a in zoo.ZOO if a.id == "many-weights").make(), zoo.images(48)
    weights = max(p.numel() for p in network.parameters() if p.dim() == 4)
    monkeypatch.setattr(products, "_way", lambda input, *_: (matrices, [slice(None)]))
    whole = make_engine("fused", network, "abs")(images, labels).saliency
    monkeypatch.setattr(products, "_way", lambda input, *_: (matrices, [slice(at, at + 3) for at in range(0, len(input), 3)]))
    with oracles.Largest() as largest:
        sliced = make_engine("fused", network, "abs")(images, labels).saliency
    torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-6 * float(whole.max()))
    with torch.no_grad(), oracles.Largest() as forward:
        network(images)
    assert largest.numbers <= max(3 * weights, 2 * forward.numbers) < 48 * weights
