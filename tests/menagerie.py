"""More small networks, for interventions: what stands between a convolution and its BatchNorm, and what networks do with their batch axis.

Input float32 [B, 3, 11, 8], output [B, 5], as in `zoo`. `norms`: convolution -> the BatchNorms that alone take its output, one a use.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import zoo
from torch import nn
from zoo import RELU, conv, norm, plain


@dataclass(frozen=True)
class Animal(zoo.Animal):
    norms: dict[str, str] = field(default_factory=dict, hash=False)
    joining: bool = True  # whether its branches may join in the middle of a forward


class Downsampled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 6, 1, 2, bias=False), nn.BatchNorm2d(6))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class DenseBlock(nn.Module):
    """Convolution, concatenation, and only then a BatchNorm: it takes no convolution's output as it is."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(7, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(7), nn.BatchNorm2d(11)

    def forward(self, x):
        x = torch.cat([x, self.conv1(x)], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn1(x)))], 1)
        return F.relu(self.bn2(x))


class PreActivation(nn.Module):
    """The stem's output goes to a BatchNorm and around it."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1, self.conv1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class TwoNorms(nn.Module):
    """One convolution used twice, each time with a BatchNorm of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.again, self.bn1, self.bn2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.again(F.relu(self.bn1(self.again(F.relu(self.stem(x)))))))


class Viewed(nn.Module):
    """`view` on a convolution's output needs it contiguous: channels_last memory does not do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.pick = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6 * 7 * 4, 8)

    def forward(self, x):
        y = self.b(F.relu(self.a(x)))
        return self.pick(y.view(y.shape[0], -1))


class Shuffled(nn.Module):
    """The channel shuffle of ShuffleNet, its batch size asked for at the very start: branches cannot join later."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=2)

    def forward(self, x):
        batch = x.shape[0]
        y = F.relu(self.a(x))
        y = y.reshape(batch, 2, 3, *y.shape[2:]).transpose(1, 2).reshape(batch, 6, *y.shape[2:])
        return self.b(y)


class Overwritten(nn.Module):
    """A map that is kept, then changed in place where its other use does not look."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        kept = x = self.stem(x)
        y = self.a(F.relu(x))
        kept.add_(y)
        return self.b(F.relu(x)) + y


MORE = [
    Animal("bias-and-norm", plain(conv(3, 6, 3), norm(6), RELU, conv(6, 4, 3), norm(4)), norms={"0.0": "0.1", "0.3": "0.4"}),
    Animal("norm-without-gamma", plain(conv(3, 6, 3), norm(6, affine=False), RELU, conv(6, 4, 3)), norms={"0.0": "0.1"}),
    Animal("depthwise-norm", plain(conv(3, 6, 1, bias=False), norm(6), RELU, conv(6, 6, 3, groups=6, bias=False), norm(6)), norms={"0.0": "0.1", "0.3": "0.4"}),
    Animal("norm-after-relu", plain(conv(3, 6, 3), RELU, norm(6), conv(6, 4, 3, stride=2))),
    Animal("downsampled", Downsampled, norms={"0.conv1": "0.bn1", "0.conv2": "0.bn2", "0.shortcut.0": "0.shortcut.1"}),
    Animal("dense-block", DenseBlock),
    Animal("pre-activation", PreActivation, norms={"0.conv1": "0.bn2"}),
    Animal("two-norms", TwoNorms, norms={"0.again": "0.bn1 0.bn2"}),
    Animal("viewed", Viewed),
    Animal("shuffled", Shuffled, joining=False),
    Animal("overwritten", Overwritten, joining=False),
]
NORMS = {
    "batchnorm": {"0.0": "0.1", "0.3": "0.4"}, "in-place-relu": {"0.2": "0.3"},
    "tokens": {"0.stem.0": "0.stem.1"}, "tokens-in-place": {"0.stem.0": "0.stem.1.0"}, "tokens-of-narrow-maps": {"0.stem.0": "0.stem.1"},
}  # of the zoo's  # fmt: skip
