"""Networks that the fused engine would answer wrongly, or that no engine can differentiate: seen before a run, by what they do."""

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline import saliency
from pipeline.errors import BadRequest, Stopped
from pipeline.saliency import check_network, choose_engine, make_engine


class Devious(nn.Module):
    """A small network, of which `how` changes one thing."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.stem, self.norm, self.body, self.head = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.Linear(6, zoo.CLASSES)
        self.map = nn.Parameter(torch.randn(1, 6, 9, 6))
        self.norm.running_mean.normal_()

    def forward(self, x):
        stem, gamma = self.stem(x), self.norm.weight
        if self.how == "gamma of the content":
            gamma = gamma * torch.where(x.mean((1, 2, 3)) > 0, 2.0, 0.5)[0]
        if self.how == "gamma of the batch":
            gamma = gamma * (1 + x.detach().abs().mean())
        y = F.batch_norm(stem, self.norm.running_mean, self.norm.running_var, gamma, self.norm.bias)
        if self.how == "stem again for bright images" and x.mean() > 3:
            y = y + stem / 2
        y = F.relu(y)
        order = torch.arange(len(y)).flip(0) if self.how == "reversed" else y.mean((1, 2, 3)).argsort() if self.how == "sorted" else torch.arange(len(y))
        y = self.body(y[order])[order.argsort()]
        if self.how == "a map that whispers":
            y = y + 1e-4 * F.conv2d(self.map, self.head.weight[:, :1, None, None].expand(5, 6, 3, 3)[[0, 1, 2, 3, 4, 0]])
        if self.how == "a grain of the batch":
            y = y / (1 + 0.02 * x.amax())
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("how", ["reversed", "sorted", "gamma of the content", "gamma of the batch", "a map that whispers", "a grain of the batch"])
def test_what_the_fused_engine_would_get_wrong_is_seen(how):
    """Rows that change places inside, a BatchNorm that is another for other images, a weight that hardly matters, logits that hardly depend on the batch."""
    name, reason = choose_engine(Devious(how).eval(), zoo.images(3)[0])
    assert name == "vmap" and ("differs from autograd's" in reason or "which images share its batch" in reason)
    assert choose_engine(Devious("").eval(), zoo.images(3)[0])[0] == "fused", "the rest of it is no reason"


def test_a_convolution_that_is_used_besides_its_batchnorm_for_some_images_is_refused():
    network, (images, labels) = Devious("stem again for bright images").eval(), zoo.images(3)
    engine = make_engine("fused", network, "abs")
    assert choose_engine(network, images)[0] == "fused" and engine(images, labels).saliency.any()
    with pytest.raises(RuntimeError, match="the convolution stem goes through .*div.* besides its BatchNorm, as it did not at first"):
        engine(images + 10, labels)


class Checkpointed(nn.Module):
    """Neither engine can differentiate it: a layer is run again in the backward pass, with hooks on what is saved."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), nn.Linear(4, zoo.CLASSES)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False).mean((2, 3)))


def test_a_network_without_an_engine_is_refused():
    network, (images, _) = Checkpointed().eval(), zoo.images(3)
    name, _ = choose_engine(network, images)
    with pytest.raises(BadRequest, match=f"cannot be had of this network by the engine {name} "):
        saliency.try_engine(name, network, images)
    for animal in zoo.ZOO[:3]:
        saliency.try_engine("vmap", animal.make(), images)


class Vast(Devious):
    """Wants more memory than there is, in a forward pass or only where there are gradients."""

    def forward(self, x):
        if self.how == "always" or torch.is_grad_enabled():
            torch.empty(2**50)
        return super().forward(x)


@pytest.mark.parametrize("how", ["always", "gradients"])
@pytest.mark.parametrize("engine", ["fused", "vmap"])
def test_too_little_memory_is_no_fault_of_the_network(how, engine):
    """It decides neither that images are prepared wrongly nor which engine is exact: the same command goes on where there is more."""
    network, (images, _) = Vast(how).eval(), zoo.images(3)
    asked = [lambda: choose_engine(network, images), lambda: saliency.try_engine(engine, network, images)] + [lambda: check_network(network, images)] * (how == "always")
    for ask in asked:
        with pytest.raises(Stopped, match=r"too little memory here to run the network on 3 images of 11 x 8 pixels\nthe same command goes on"):
            ask()


class Contrast(nn.Module):
    """Each image over its own contrast: a black one has none, and gives NaN."""

    def forward(self, x):
        return x / x.std((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("black", [0, 1, 2])
def test_an_image_that_gives_nan_keeps_nobody_from_the_fused_engine(black):
    network, (images, labels) = nn.Sequential(Contrast(), Devious("")).eval(), zoo.images(3)
    clean = make_engine("fused", network, "abs")(images, labels).saliency
    images[black] = 0
    assert choose_engine(network, images)[0] == "fused"
    rows = make_engine("fused", network, "abs")(images, labels).saliency
    others = [i for i in range(3) if i != black]
    assert rows[black].isnan().any() and torch.allclose(rows[others], clean[others], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("how", ["reversed", "a grain of the batch"])
def test_it_hides_nothing_either(how):
    network, images = nn.Sequential(Contrast(), Devious(how)).eval(), zoo.images(3)[0]
    images[1] = 0
    assert choose_engine(network, images)[0] == "vmap"
    assert "not finite" in choose_engine(network, images * 0)[1]


class Particular(torch.nn.Module):
    """Wants its maps plain, and says so in a way of its own; or reads them as if they were."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.first, self.linear = how, torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, zoo.CLASSES)

    def forward(self, x):
        x = self.first(x)
        if self.how == "asserts":
            assert x.is_contiguous(), "plain maps please"
        if self.how == "views":
            x = x.view(x.shape[0] * x.shape[1], 1, *x.shape[2:]).relu().view(x.shape)
        if self.how == "strides":
            x = x.as_strided(x.shape, (x[0].numel(), x[0, 0].numel(), x.shape[3], 1))
        return self.linear(x.relu().mean((2, 3)))


@pytest.mark.parametrize("how", ["asserts", "views", "strides"])
def test_a_network_that_wants_plain_maps_has_them(how):
    network, (images, labels) = Particular(how).eval(), zoo.images(6)
    assert choose_engine(network, images[:3])[0] == "fused"
    engine = make_engine("fused", network, "abs")
    assert oracles.relative_errors(engine(images, labels).saliency, oracles.saliency(network, images, labels, "abs")).max() < 1e-4 and not engine.channels_last
