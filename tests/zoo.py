"""Small networks, one a way in which a convolution can be used, for both engines and every property.

Input float32 [B, 3, 11, 8], output [B, 5]. `engine` is what `choose_engine` must say, `reason` a part of why it says `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

CLASSES = 5


@dataclass(frozen=True)
class Animal:
    id: str
    body: Callable[[], nn.Module]  # [B, 3, 11, 8] -> [B, anything]
    engine: str = "fused"
    reason: str = ""
    alone: bool = True  # whether a sample's answer is independent of who shares its batch

    def make(self, seed: int = 0) -> nn.Module:
        """The network in eval mode, its parameters and BatchNorm statistics far from where they start."""
        torch.manual_seed(seed)
        body = self.body()
        with torch.no_grad():
            width = body.eval()(torch.randn(2, 3, 11, 8)).flatten(1).shape[1]
        network = nn.Sequential(body, nn.Flatten(), nn.Linear(width, CLASSES))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                nn.init.normal_(module.running_mean, 0, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        return network.eval()


def images(count: int = 5, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(images float32 [count, 3, 11, 8], labels int64 [count])."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 11, 8, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def plain(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Not called until wanted, so that the weights are drawn under the seed."""
    return lambda: nn.Sequential(*(layer() for layer in layers))


def conv(*args, **kwargs):
    return lambda: nn.Conv2d(*args, **kwargs)


def norm(channels: int, **kwargs):
    return lambda: nn.BatchNorm2d(channels, **kwargs)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return F.relu(x + self.b(F.relu(self.a(x))))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 4, 3, padding=1), nn.Conv2d(11, 4, 1)

    def forward(self, x):
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.c(x)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.thin, self.thick, self.pooled = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return torch.cat([self.thin(x), self.thick(x), self.pooled(F.max_pool2d(x, 3, 1, 1))], 1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.again(torch.tanh(self.again(self.stem(x))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.stem(x))))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3) / 5)

    def forward(self, x):
        return F.conv2d(x, self.kernel, padding=1)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """Weights standardised by a BatchNorm over themselves, as timm's NFNets do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, self.gain.view(-1), None, True, 0.0, 1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Transposed(nn.Module):
    """The kernel reaches its convolution through a property and not through a function that is called."""

    def __init__(self):
        super().__init__()
        self.stem, self.kernel = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4, 4, 3, 3) * 1e-6)

    def forward(self, x):
        x = self.stem(x)
        return x + F.conv2d(x, self.kernel.mT, padding=1)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrised():
    layer = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(layer, "weight", Halved())
    return nn.Sequential(layer, nn.ReLU())


class Weighted(nn.Module):
    """A 4-D parameter that is no kernel: one number a channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)

    def forward(self, x):
        return self.stem(x) * self.scale


class Auxiliary(nn.Module):
    """A head that only training uses, as Inception's: in eval its filters have saliency 0, first and last in the vector."""

    def __init__(self):
        super().__init__()
        self.before, self.main, self.after = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        y = F.relu(self.main(x))
        return (y, self.before(x), self.after(y)) if self.training else y


class WithoutGradient(nn.Module):
    """A frozen stem under no_grad: the loss does not depend on it as far as differentiation goes."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        with torch.no_grad():
            x = torch.tanh(self.stem(x))
        return self.head(x)


class Patches(nn.Module):
    """One convolution over every quarter of the image, quarters stacked along the batch axis."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        quarters = torch.cat([x[..., :5, :4], x[..., 5:10, :4], x[..., :5, 4:], x[..., 5:10, 4:]])
        return torch.cat(self.stem(quarters).chunk(4), 1)


class Tokens(nn.Module):
    """Maps become a sequence of tokens, as in a transformer with a convolutional stem: a gradient comes back with its channels last."""

    def __init__(self, norm: Callable[[], nn.Module], kernel):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, kernel, bias=False), norm())
        self.place = nn.Parameter(torch.randn(1, (12 - kernel[0]) * (9 - kernel[1]), 4))

    def forward(self, x):
        return torch.tanh(self.stem(x).flatten(2).transpose(1, 2) + self.place)


class Normalising(nn.Module):
    """Normalises its input where it lies."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.stem(x.sub_(0.3).mul_(2))


class Gated(nn.Module):
    """Squeeze and excitation with a hard sigmoid, as in MobileNetV3: torch cannot differentiate its backward pass."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Hardsigmoid()

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        return x * self.act(self.gate(x.mean((2, 3), keepdim=True)))


class Squeezed(nn.Module):
    """Squeeze and excitation with curves on a few numbers, one of them in place, as in EfficientNet and RegNet-Y."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 5, 1), nn.Conv2d(5, 11, 1)

    def forward(self, x):
        x = F.gelu(self.stem(x))
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)), inplace=True)))


class Attentive(nn.Module):
    """Tokens that look at each other, by torch's own attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.look = nn.Conv2d(3, 4, 4, stride=3), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.look(tokens, tokens, tokens, need_weights=False)[0]


RELU = lambda: nn.ReLU()  # noqa: E731
IN_PLACE = lambda: nn.ReLU(inplace=True)  # noqa: E731

ZOO = [
    Animal("batchnorm", plain(conv(3, 6, 3, bias=False), norm(6), RELU, conv(6, 4, 3, bias=False), norm(4), RELU)),
    Animal("bias", plain(conv(3, 6, 3, bias=True), RELU, conv(6, 4, 3, bias=True))),
    Animal("grouped", plain(conv(3, 6, 3), RELU, conv(6, 8, 3, groups=2, padding=1))),
    Animal("depthwise", plain(conv(3, 6, 3), RELU, conv(6, 6, 3, groups=6, padding=1), RELU, conv(6, 4, 1))),
    Animal("depth-multiplied", plain(conv(3, 9, 3, groups=3), RELU)),
    Animal("stride", plain(conv(3, 6, 3, stride=2), RELU, conv(6, 4, 3, stride=(2, 1), padding=1))),
    Animal("stride-leaves-rest", plain(conv(3, 6, 3, stride=3), RELU)),
    Animal("dilation", plain(conv(3, 6, 3, dilation=2), RELU, conv(6, 4, 2, dilation=(3, 2)))),
    Animal("same-even-kernel", plain(conv(3, 6, 4, padding="same"), RELU, conv(6, 4, (2, 4), padding="same", dilation=(1, 2)))),
    Animal("valid", plain(conv(3, 6, 3, padding="valid"), RELU)),
    Animal("asymmetric", plain(conv(3, 6, (1, 5), padding=(0, 2)), RELU, conv(6, 4, (5, 1), padding=(3, 0)))),
    Animal("reflect", plain(conv(3, 6, 3, padding=1, padding_mode="reflect"), RELU, conv(6, 4, 3, padding=1, padding_mode="circular"))),
    Animal("pointwise", plain(conv(3, 6, 1), RELU, conv(6, 4, 1, stride=2))),
    Animal("pointwise-strides", plain(conv(3, 6, 1), RELU, conv(6, 6, 1, stride=(2, 1), groups=3), RELU, conv(6, 4, 1, stride=(1, 2), padding="valid"))),
    Animal("many-weights", plain(conv(3, 90, 3, stride=2), RELU, conv(90, 90, 3, stride=2, padding=1), RELU)),
    Animal("many-weights-dilated", plain(conv(3, 90, 1), RELU, conv(90, 90, (5, 2), dilation=(2, 1), padding=(4, 0), bias=False), RELU)),
    Animal("many-pointwise", plain(conv(3, 260, 1, stride=4), RELU, conv(260, 260, 1), RELU)),
    Animal("many-shared", plain(conv(3, 1024, 1, stride=3), RELU, conv(1024, 1024, 1, stride=2), IN_PLACE)),
    Animal("residual", Residual),
    Animal("dense", Dense),
    Animal("branches", Branches),
    Animal("in-place-relu", plain(conv(3, 6, 3), IN_PLACE, conv(6, 4, 3), norm(4), IN_PLACE)),
    Animal("bare-parameter", Bare),
    Animal("auxiliary", Auxiliary),
    Animal("no-grad-stem", WithoutGradient),
    Animal("in-place-input", Normalising),
    Animal("hard-sigmoid", Gated),
    Animal("squeeze-excitation", Squeezed),
    Animal("attention", Attentive),
    Animal("tokens", lambda: Tokens(norm(4), (3, 3))),
    Animal("tokens-in-place", lambda: Tokens(plain(norm(4), IN_PLACE), (3, 3))),
    Animal("tokens-of-narrow-maps", lambda: Tokens(norm(4), (3, 8))),
    Animal("used-twice", Twice, "vmap", "used in 2 convolutions"),
    Animal("tied-weights", Tied, "vmap", "used in 2 convolutions"),
    Animal("standardised-weight", plain(conv(3, 4, 1), lambda: Standardised(4, 4, 3)), "vmap", "the weight of 0.1 goes through"),
    Animal("weight-through-batchnorm", plain(conv(3, 4, 1), RELU, lambda: Scaled(4, 6, 3)), "vmap", "goes through"),
    Animal("transposed-weight", Transposed, "vmap", "goes through"),
    Animal("parametrised", parametrised, "vmap", "computes its weight from others"),
    Animal("transposed-convolution", plain(conv(3, 4, 3), lambda: nn.ConvTranspose2d(4, 6, 3, stride=2)), "vmap", "goes through conv_transpose2d"),
    Animal("no-kernel", Weighted, "vmap", "goes through"),
    Animal("patches", Patches, "vmap", "not one map for each"),
    Animal("batch-statistics", plain(conv(3, 6, 3), norm(6, track_running_stats=False), RELU), "vmap", "which images share its batch", alone=False),
]
FUSED = [animal for animal in ZOO if animal.engine == "fused"]
