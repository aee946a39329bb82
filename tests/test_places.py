"""A sample's numbers do not depend on its place in a batch, nor on the batch's size: Linear layers and activations, whole networks, and what an activation promises besides."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import models
from pipeline.saliency import make_engine
from pipeline.saliency.places import CURVES, Places, in_company, padded_rows

NAMED = sorted(CURVES, key=str)


@pytest.fixture(autouse=True)
def two_threads(set_threads):
    set_threads(2)


def with_gradient(function, values: torch.Tensor, above: torch.Tensor, places: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """function(values), and the gradient of its sum with `above`."""
    values = values.clone(memory_format=torch.preserve_format).requires_grad_(True)
    if not places:
        found = function(values)
        return found.detach(), torch.autograd.grad(found, values, above)[0]
    with Places():
        found = function(values)
    return found.detach(), torch.autograd.grad(found, values, above)[0]


def check(function, values: torch.Tensor, above: torch.Tensor, order, rtol: float, atol: float) -> None:
    """In that order values and gradients are bit for bit the same; and they are the function's."""
    found, gradient = with_gradient(function, values, above)
    again, its = with_gradient(function, values[order], above[order])
    assert torch.equal(again, found[order]) and torch.equal(its, gradient[order])
    for mine, plain in zip((found, gradient), with_gradient(function, values, above, places=False)):
        torch.testing.assert_close(mine, plain, rtol=rtol, atol=atol)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_row_of_a_linear_layer_is_free_of_its_place(data):
    """Forward and back, for rows and layers of any size; and it is the layer's."""
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    rows, ins, outs = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 3, 7, 20, 64, 101, 486, 1001, 2048])), data.draw(st.sampled_from([1, 5, 10, 64, 365, 1000]))
    torch.manual_seed(rows * ins * outs)
    values, above, weight, bias = torch.randn(rows, ins), torch.randn(rows, outs), torch.randn(outs, ins), torch.randn(outs) if data.draw(st.booleans()) else None
    layer = lambda values: F.linear(values, weight, bias)  # noqa: E731
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    check(layer, values, above, order, rtol=1e-4, atol=1e-3)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_sample_of_an_activation_is_free_of_its_place(data):
    """Forward and back, in both layouts, be the maps few numbers, or more than one thread's but not all threads', or gelu's; the layout stays."""
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    function = data.draw(st.sampled_from(NAMED))
    shape = data.draw(st.sampled_from([(5, 3, 1, 1), (3, 11, 1, 1), (8, 10, 1, 1), (7, 13, 9, 5), (5, 31, 17, 17), (5, 16, 31, 31), (8, 64, 7, 7), (6, 33), (4, 7, 5)]))
    torch.manual_seed(sum(shape))
    values, above = torch.randn(shape), torch.randn(shape)
    if len(shape) == 4 and data.draw(st.booleans()):
        values, above = (t.contiguous(memory_format=torch.channels_last) for t in (values, above))
    order = torch.tensor(data.draw(st.permutations(range(shape[0]))))
    check(function, values, above, order, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_an_activation_gives_lies_as_it_would(data):
    """A network may count on it, and view it in another shape."""
    function, order = data.draw(st.sampled_from(NAMED)), data.draw(st.permutations(range(4)))
    values = torch.randn(5, 3, 7, 2).permute(order)
    if data.draw(st.booleans()):
        values = values[1:]
    if data.draw(st.booleans()):
        values = values[:, :1].expand(-1, 4, -1, -1)
    with Places():
        found = function(values)
    assert found.stride() == function(values).stride()


def test_a_linear_layer_can_be_viewed_in_any_shape():
    values, layer = torch.randn(5, 3, 7), torch.nn.Linear(7, 10)
    with Places():
        found = layer(values)
    torch.testing.assert_close(found.view(-1), layer(values).view(-1))
    found.detach().relu_()


@pytest.mark.parametrize("call", [lambda x: F.silu(x, inplace=True), lambda x: F.silu(x, True), lambda x: F.elu(x, 1.0, True), lambda x: F.mish(x, inplace=True), torch.sigmoid_, lambda x: x.tanh_(), lambda x: F.elu_(x, 0.5)])
def test_an_activation_in_place_changes_what_it_was_given(call):
    given_ = torch.linspace(-2, 2, 33).reshape(3, 11)
    plain, mine = given_.clone(), given_.clone()
    call(plain)
    with Places():
        assert call(mine) is mine
    torch.testing.assert_close(mine, plain)


def test_what_is_filled_up_can_be_changed_in_place_and_cut_off():
    """As a network may do with what it computed without gradients: a view could not be."""
    values, layer = torch.randn(5, 3, 7, requires_grad=True), torch.nn.Linear(7, 7)
    with Places():
        with torch.no_grad():
            gates = [layer(values), torch.sigmoid(values)]
        for gate in gates:
            gate *= values
            gate.detach_()
    torch.testing.assert_close(gates[1], (values.sigmoid() * values).detach())  # a vector's sigmoid may differ from a single number's in the last bit
    assert not gates[0].requires_grad


def test_whole_numbers_have_no_sigmoid_in_place():
    with Places(), pytest.raises(RuntimeError, match="can't be cast"):
        torch.arange(5).sigmoid_()


def test_an_activation_writes_where_it_is_told():
    given_, room = torch.linspace(-2, 2, 33), torch.empty(33)
    with Places():
        torch.tanh(given_, out=room)
    torch.testing.assert_close(room, given_.tanh())


@pytest.mark.parametrize("name", ["regnet_y_400mf", "mobilenet_v3_small", "efficientnet_b0"])
def test_networks_with_curves_on_few_numbers(name):
    """In an odd batch, of which two threads have unequal parts."""
    torch.manual_seed(0)
    network = models.build(name).eval()
    images, labels, order = torch.randn(5, 3, 64, 64), torch.arange(5), [3, 0, 4, 1, 2]
    engine = make_engine("fused", network, "abs")
    whole, permuted = engine(images, labels), engine(images[order], labels[order])
    assert torch.equal(permuted.saliency, whole.saliency[order]) and torch.equal(permuted.logits, whole.logits[order])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("engine", ["fused", "vmap"])
@pytest.mark.parametrize("name", ["resnet20", "squeezenet1_1", "mobilenet_v3_small", "densenet121"])
def test_the_size_of_a_batch_changes_no_bit(name, engine, threads):
    """Not even where an image is alone, or one of an odd number, for which torch has other kernels."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    made = make_engine(engine, models.build(name).eval(), "abs")
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    whole = made(images, labels)
    for size in (1, 2, 3, 4):
        parts = [made(*of) for of in zip(images.split(size), labels.split(size))]
        assert torch.equal(torch.cat([part.saliency for part in parts]), whole.saliency) and torch.equal(torch.cat([part.logits for part in parts]), whole.logits)


class Code(torch.nn.Sequential):
    """Somebody's own, which has no teams: all threads share a batch."""


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [torch.nn.Sequential, Code])
def test_norms_that_threads_would_share_change_no_bit(kind, dtype, threads):
    """A GroupNorm's sums are other ones where two threads have a part of an image each, and so are a convolution's in bfloat16: whoever shares the batch, in whatever order."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    body = [layer for _ in range(3) for layer in (torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.GroupNorm(4, 16), torch.nn.ReLU())]
    made = make_engine("fused", kind(torch.nn.Conv2d(3, 16, 3, padding=1), *body, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10)).eval(), "abs")
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 10
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        whole = made(images, labels).saliency
        for size in (1, 2, 3, 5, 6, 9, 23):
            parts = [made(*of).saliency for of in zip(images.split(size), labels.split(size))]
            assert torch.equal(torch.cat(parts), whole), size
        for size in (5, 6, 24):
            order = torch.randperm(size)
            assert torch.equal(made(images[order], labels[order]).saliency, whole[order]), size


@pytest.mark.parametrize("threads, filled", [(1, [2, 2, 3, 8]), (2, [2, 2, 4, 8]), (3, [3, 3, 3, 9]), (4, [4, 4, 4, 8])])
def test_each_thread_has_as_many_images(threads, filled):
    """And nobody is alone; what a batch is filled up with is its last image."""
    torch.set_num_threads(threads)
    for size, whole in zip((1, 2, 3, 8), filled):
        images, labels = in_company(torch.randn(size, 3, 2, 2), torch.arange(size))
        assert len(images) == len(labels) == whole and set(labels[size:].tolist()) <= {size - 1} and (images[size:] == images[size - 1]).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("ins, outs", [(11, 5), (10, 6), (33, 77), (6, 10)])
def test_a_pointwise_convolution_of_a_few_places_is_free_of_its_place(ins, outs, side, threads):
    torch.set_num_threads(threads)
    values, above, weight, order = torch.randn(8, ins, side, side), torch.randn(8, outs, side, side), torch.randn(outs, ins, 1, 1), [5, 2, 7, 0, 1, 6, 4, 3]
    layer = lambda values: F.conv2d(values, weight)  # noqa: E731
    check(layer, values, above, order, rtol=1e-5, atol=1e-5)


class Viewed(torch.nn.Module):
    """Wants plain maps."""

    def forward(self, x):
        return x.view(-1, 1, *x.shape[2:]).view(x.shape)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("ins, outs", [(33, 130), (130, 10), (34, 66)])
@pytest.mark.parametrize("engine, layers", [("vmap", ()), ("fused", ()), ("fused", (Viewed(),))])
def test_pointwise_layers_of_a_few_places_in_a_network(engine, layers, ins, outs, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    body = [torch.nn.AdaptiveAvgPool2d(3), torch.nn.Conv2d(ins, outs, 1), torch.nn.ReLU(), torch.nn.Conv2d(outs, ins, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    network = torch.nn.Sequential(torch.nn.Conv2d(3, ins, 3, stride=2), *layers, torch.nn.ReLU(), *body).eval()
    made = make_engine(engine, network, "abs")
    images, labels, order = torch.randn(7, 3, 15, 15), torch.arange(7) % 5, [3, 6, 0, 4, 1, 5, 2]
    whole, permuted = made(images, labels), made(images[order], labels[order])
    assert torch.equal(permuted.saliency, whole.saliency[order]) and torch.equal(permuted.logits, whole.logits[order])


def test_rows_are_filled_up_to_what_products_take_at_once():
    assert [padded_rows(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [8, 8, 8, 8, 8, 8, 16]
    assert [padded_rows(n, 4) for n in (1, 2, 3)] == [2, 2, 4] and padded_rows(197, 2) == 200 and padded_rows(7, 8) == 7
