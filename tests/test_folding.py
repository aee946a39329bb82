"""BatchNorms folded into convolutions: found by what a network does, exact, and never assumed where the network does something else."""

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from pipeline.filters import FilterLayout
from pipeline.saliency import choose_engine, make_engine
from pipeline.saliency.folding import folds


class Pair(nn.Module):
    """A convolution and its BatchNorm; `then` is what happens between and around them."""

    def __init__(self, then=None, **options):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.norm, self.then = nn.Conv2d(3, 6, 3, **options), nn.BatchNorm2d(6), then
        self.last, self.linear = nn.Conv2d(6, 4, 3), nn.Linear(4, zoo.CLASSES)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.3, 3)
        nn.init.normal_(self.norm.weight)  # some gammas are negative
        nn.init.normal_(self.norm.bias)
        self.eval()

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y) if self.then is None else self.then(self, x, y)
        return self.linear(self.last(F.relu(z)).mean((2, 3)))


def found(network):
    weights = [p for p in network.parameters() if p.dim() == 4]
    return sorted(folds(network, weights, zoo.images()[0][:1]))


def test_a_batchnorm_that_alone_follows_is_folded_and_exact():
    for options in ({}, {"bias": False}, {"stride": 2, "padding": 1}, {"groups": 3}):
        network = Pair(**options)
        images, labels = zoo.images()
        assert found(network) == [0]  # the last convolution has none
        got = make_engine("fused", network, "abs")(images, labels)
        assert oracles.relative_errors(got.saliency.numpy(), oracles.saliency(network, images, labels, "abs")).max() < 1e-5
        assert torch.allclose(got.logits, network(images), atol=1e-4)
        assert choose_engine(network, images[:3])[0] == "fused"


def test_a_batchnorm_without_gamma_and_a_filter_of_gamma_zero():
    network = Pair()
    network.norm.weight.data[2] = 0
    images, labels = zoo.images()
    truth = oracles.saliency(network, images, labels, "signed")
    assert (truth[:, 2] == 0).all() and (make_engine("fused", network, "signed")(images, labels).saliency[:, 2] == 0).all()
    network.norm = nn.BatchNorm2d(6, affine=False).eval()
    got = make_engine("fused", network, "abs")(images, labels)
    assert found(network) == [0] and oracles.relative_errors(got.saliency.numpy(), oracles.saliency(network, images, labels, "abs")).max() < 1e-5


@pytest.mark.parametrize(
    "then",
    [
        lambda self, x, y: self.norm(y) + y.mean(),
        lambda self, x, y: self.norm(F.relu(y)),
        lambda self, x, y: self.norm(torch.cat([y[:, :3], y[:, 3:]], 1)),
        lambda self, x, y: F.batch_norm(y, None, None, training=True),
        lambda self, x, y: F.instance_norm(y),
    ],
    ids=["used-twice", "relu-between", "concatenated", "of-the-batch", "instance-norm"],
)
def test_what_is_not_a_batchnorm_alone_is_left_as_it_is(then):
    assert found(Pair(then)) == []


def test_a_network_that_does_something_else_later_is_refused_not_answered_wrongly():
    network = Pair(lambda self, x, y: self.norm(y) if self.plainly else y)
    network.plainly = True
    images, labels = zoo.images()
    engine = make_engine("fused", network, "abs")
    engine(images, labels)
    network.plainly = False
    with pytest.raises(RuntimeError, match="before its BatchNorm"):
        engine(images, labels)


def test_weights_and_statistics_are_as_before():
    network = Pair()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    make_engine("fused", network, "abs")(*zoo.images())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert FilterLayout.of(network).total == 10
