"""A network of three small convolutions, images for it, and the command called on them: runs that take a fraction of a second."""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread, local
from time import sleep
from unittest import mock

import numpy as np
import shards
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.samples import PRESETS, Preprocessing

CLASSES = 5
MODEL = "tiny:net"
LAYERS = [("conv1", 6), ("conv2", 8), ("conv3", 10)]
FILTERS = 24


class Net(nn.Module):
    """Input [B, 3, H, W], output [B, 5]; weights from a seed, so that it errs on four images of five."""

    preprocessing = Preprocessing(resize=None, crop=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    class_names = ("ant", "bee", "cat", "dog", "eel")

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2), nn.Conv2d(8, 10, 3, padding=1)
            self.linear = nn.Linear(10, CLASSES)
            nn.init.normal_(self.linear.weight, 0, 8)

    def forward(self, x):
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def net() -> nn.Module:
    return Net()


class Level(Net):
    """Answers with each class as readily as with any other, on pictures such as `shards.picture`."""

    def __init__(self):
        super().__init__()
        pixels = [np.asarray(shards.picture(i), np.float32) for i in range(60)]
        with torch.no_grad():
            logits = self(torch.from_numpy((np.stack(pixels) / 255 - 0.5) / 0.25).permute(0, 3, 1, 2))
            self.linear.weight /= logits.std(0)[:, None]
            self.linear.bias.copy_((self.linear.bias - logits.mean(0)) / logits.std(0))


def level() -> nn.Module:
    return Level()


def other_weights() -> nn.Module:
    return Net(seed=1)


class Broken(Net):
    """Gives what `answer` makes of the logits."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(super().forward(x))


def nan() -> nn.Module:
    return Broken(lambda logits: logits * float("nan"))


def only_single(logits: torch.Tensor) -> torch.Tensor:
    if logits.dtype != torch.float32:
        raise TypeError(f"float32 is wanted, not {logits.dtype}")
    return logits


def single() -> nn.Module:
    return Broken(only_single)


def noisy() -> nn.Module:
    return Broken(lambda logits: (print("so many:", len(logits)), logits)[1])


def loud(logits: torch.Tensor) -> torch.Tensor:
    """In every way that there is: Python's, a descriptor's, C's, another process's."""
    print("printed")
    sys.__stdout__.write("underscored\n")
    os.write(1, b"described\n")
    ctypes.CDLL(None).printf(b"formatted\n")
    subprocess.run(["echo", "echoed"])
    return logits


def shouting() -> nn.Module:
    """From a thread that goes on when the network is done, too."""
    Thread(target=lambda: [print("threaded", flush=True) or sleep(0.005) for _ in range(1500)], daemon=True).start()
    return Broken(loud)


class Bound(Net):
    """Works in the thread that made it, and in no other: it keeps something there."""

    def __init__(self):
        super().__init__()
        self.__dict__["own"] = local()
        self.own.scale = 1.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images * self.own.scale)


def bound() -> nn.Module:
    return Bound()


def slamming() -> nn.Module:
    return Broken(lambda logits: (sys.stdout.close(), logits)[1])


def zeros() -> nn.Module:
    network = Net()
    for weights in network.parameters():
        nn.init.zeros_(weights)
    return network


def constant() -> nn.Module:
    return Broken(lambda logits: logits * 0 + torch.arange(5.0))


def bypass() -> nn.Module:
    """What it answers differs from image to image, and no filter has a part in it."""
    network = Net()
    network.forward = lambda x: x.mean((1, 2, 3))[:, None] * torch.arange(5.0) + 0 * Net.forward(network, x)
    return network


def pair() -> nn.Module:
    return Broken(lambda logits: (logits, logits))


def one_number() -> nn.Module:
    return Broken(lambda logits: logits[:, 0])


def hostile_names() -> nn.Module:
    """Class names as a stranger might write them: an ANSI escape, markup, a newline, a right-to-left override."""
    network = Net()
    network.class_names = ("\x1b[31mant\x1b[0m", "[red]bee[/red]", "cat\nfaultline: all is well", "dog\u202egod", "eel")
    return network


@dataclass(frozen=True)
class Small:
    """A finished and indexed run over `val` (three shards of 20) and `v2` (one of 30). Not to be changed: copy it."""

    run: Path
    sources: Path

    def extract(self, dataset: str = "val", *more: object, run: Path | None = None, model: str = MODEL) -> Ended:
        source = self.sources / dataset
        return call("extract", "--run", run or self.run, "--dataset", dataset, "--source", source, "--model", model, *more)


@dataclass(frozen=True)
class Ended:
    """What a command left: exit code, stdout as bytes, stderr."""

    code: int
    raw: bytes
    err: str

    @property
    def out(self) -> str:
        return self.raw.decode()

    @property
    def json(self):
        return json.loads(self.out)

    def refused(self) -> str:
        """The message of a wrong request: exit code 2, one to three lines, nothing on stdout."""
        lines = [line for line in self.err.splitlines() if not line.startswith(("loading", "counting", "engine:", "check:"))]
        assert self.code == 2 and not self.raw and 1 <= len(lines) <= 3 and lines[0].startswith("faultline: "), (self.code, self.err)
        assert "Traceback" not in self.err and "a defect" not in self.err
        return "\n".join(lines)


def make_sources(folder: Path) -> Path:
    for i in range(3):
        shards.write_shard(folder / f"val/val-{i:05d}.tar", [(7 * n + i) % CLASSES for n in range(20)], first=20 * i)
    shards.write_shard(folder / "v2/v2-00000.tar", [(3 * n) % CLASSES for n in range(30)], first=1000)
    return folder


def make(folder: Path) -> Small:
    small = Small(folder / "run", make_sources(folder / "sources"))
    for dataset in ("val", "v2"):
        ended = small.extract(dataset)
        assert ended.code == 0, ended.err
    ended = call("index", "--run", small.run, "--datasets", "val,v2", "--reference", "val")
    assert ended.code == 0, ended.err
    return small


def call(*words: object) -> Ended:
    """The command in this process."""
    from jobs.cli import main

    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with mock.patch.object(sys, "argv", ["faultline", *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        out.flush()
        return Ended(end.code or 0, out.buffer.getvalue(), err.getvalue())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


COMMAND = Path(sys.executable).with_name("faultline")


def process(*words: object, seconds: float = 120, **environment: str) -> Ended:
    """The command as a process of its own, where `tiny:net` can be found."""
    done = subprocess.run([COMMAND, *map(str, words)], capture_output=True, env=surroundings(**environment), timeout=seconds)
    return Ended(done.returncode, done.stdout, done.stderr.decode())


def python(code: str) -> str:
    """What a fresh interpreter prints on stdout."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=surroundings(), timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def surroundings(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "100"} | more


class Palette(nn.Module):
    """Knows ImageNet's 1,000 classes as colours, on a grid of ten levels a channel: the nearest one is the answer. Trained on nothing, right on everything.

    Input normalised as on ImageNet; `raw`: it takes 0..1 and normalises by itself.
    """

    preprocessing = replace(PRESETS["imagenet"], resize=None, crop=None)
    LEVELS = 10

    def __init__(self, raw: bool = False):
        super().__init__()
        usual = (0.0,) * 3, (1.0,) * 3
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (usual if raw else (self.preprocessing.mean, self.preprocessing.std)))
        colours = torch.tensor([palette(label) for label in range(1000)]).view(1000, 3, 1, 1) / 255
        self.conv = nn.Conv2d(3, 1000, 1)
        self.conv.weight.data = 4000 * colours * std
        self.conv.bias.data = 4000 * ((colours * mean).sum((1, 2, 3)) - colours.square().sum((1, 2, 3)) / 2)

    def forward(self, x):
        return self.conv(x.mean((2, 3), keepdim=True)).flatten(1)


class Narrow(Palette):
    """Fails on images that are wider than high."""

    def forward(self, x):
        if x.shape[3] > x.shape[2]:
            raise ValueError("too wide")
        return super().forward(x)


def narrow() -> nn.Module:
    return Narrow()


def palette(label: int) -> list[float]:
    """The colour of a class, 0..255; neighbours in label order are far apart."""
    return [20.0 + 23 * (label * 7 // 10**i % 10) for i in range(3)]


def colours() -> nn.Module:
    return Palette()


def raw_colours() -> nn.Module:
    return Palette(raw=True)


class Twice(Net):
    """Its last convolution is applied twice."""

    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.linear(self.conv3(F.relu(self.conv3(x))).mean((2, 3)))


def twice() -> nn.Module:
    return Twice()
