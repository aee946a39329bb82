"""The demo's data set, made on the spot from scikit-learn's handwritten digits: a small network, and shards of images it never saw.

1,797 images of 8 x 8 pixels in 17 grey levels. They come writer by writer, and the network learns from the first 15 of each class, the
hands of a few writers: 150 images. Of the other 1,647, which it meets as `val` and `v2`, it takes one in ten for another digit, and always
for the same few reasons. Everything is on the disk afterwards as a user's own data would be, WebDataset shards and a weights file.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from pipeline.atomic import replace_file, write_json
from pipeline.errors import BadRequest, printable
from pipeline.models import file_sha256, save_weights
from pipeline.samples import Preprocessing, decode
from pipeline.sources import RawSample

MODEL = "jobs.digits:DigitsNet"  # what --model calls it
TRAIN_PER_CLASS = 15
SHARDS = {"val": 3, "v2": 2}  # data set -> shards; val gets two thirds of the images
SIDE = 64  # pixels of a stored image: large enough to look at
MARKER = "digits.json"  # written last: the folder is whole
RECIPE = 1  # raised when what `write` makes changes, so that an older folder is made again

EPOCHS, BATCH, RATE = 40, 30, 3e-3
BEND = 0.2  # rotation in radians, slant and change of scale of a training image, at most


class DigitsNet(nn.Module):
    """Eight 3x3 convolutions with BatchNorm, 320 filters. Input [B, 3, 32, 32], output [B, 10]."""

    preprocessing = Preprocessing(resize=32, crop=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    class_names = tuple("0123456789")

    def __init__(self):
        super().__init__()
        inputs = 3
        for i, (outputs, stride) in enumerate([(16, 2), (16, 1), (32, 1), (32, 2), (32, 1), (64, 1), (64, 2), (64, 1)], 1):
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
            inputs = outputs
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x):
        for i in range(1, 9):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        return self.linear(x.mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """What `write` left in a folder. samples, errors: data set -> count; accuracy: over both data sets together."""

    folder: Path
    trained_on: int
    samples: dict[str, int]
    errors: dict[str, int]

    @property
    def weights(self) -> Path:
        """For --weights."""
        return self.folder / "weights.safetensors"

    @property
    def accuracy(self) -> float:
        return 1 - sum(self.errors.values()) / sum(self.samples.values())

    def shards(self, dataset: str) -> list[Path]:
        return [self.folder / f"{dataset}-{i:05d}.tar" for i in range(SHARDS[dataset])]

    def source(self, dataset: str) -> str:
        """For --source: the pattern of `val`'s or `v2`'s shards."""
        return str(self.folder / f"{dataset}-{{00000..{SHARDS[dataset] - 1:05d}}}.tar")


def write(folder: Path, seed: int = 0) -> Digits:
    """Train, and fill `folder`; a few seconds. A folder that an earlier call finished with the same seed is taken as it is.

    On one machine the same seed gives the same bytes. Raises BadRequest if the folder cannot be written.
    """
    folder = Path(folder)
    if finished := _finished(folder, seed):
        return finished
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).unlink(missing_ok=True)
        images = _images()
        train, splits = _split(np.array([image.label for image in images]), seed)
        network = _train([images[i] for i in train], seed)
        made = Digits(folder, len(train), {}, {})
        save_weights(network, made.weights)
        for dataset, chosen in splits.items():
            made.samples[dataset], made.errors[dataset] = len(chosen), _errors(network, [images[i] for i in chosen])
            for path, part in zip(made.shards(dataset), np.array_split(chosen, SHARDS[dataset])):
                replace_file(path, lambda partial, part=part: _write_shard(partial, [images[i] for i in part]))
        about = asdict(made) | {"recipe": RECIPE, "seed": seed, "sha256": {path.name: file_sha256(path) for path in _files(made)}}
        write_json(folder / MARKER, {key: value for key, value in about.items() if key != "folder"})
    except OSError as fault:
        raise BadRequest(f"the digits cannot be written to {printable(folder)} ({printable(fault)}): name a folder that can be written to, on a disk with 20 MB free") from None
    return made


def _files(made: Digits) -> list[Path]:
    return [made.weights, *(path for dataset in SHARDS for path in made.shards(dataset))]


def _finished(folder: Path, seed: int) -> Digits | None:
    """What the folder holds, if it is whole and of this seed and recipe; None if it must be made."""
    try:
        about = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        made = Digits(folder, about["trained_on"], about["samples"], about["errors"])
        whole = all(file_sha256(path) == about["sha256"][path.name] for path in _files(made))
        return made if whole and (about["recipe"], about["seed"]) == (RECIPE, seed) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _images() -> list[RawSample]:
    """All 1,797 in scikit-learn's order, as PNG files of SIDE x SIDE grey pixels. The ID is the position: `digit_0042`."""
    from sklearn.datasets import load_digits

    samples, digits = [], load_digits()
    for i, (levels, label) in enumerate(zip(digits.images, digits.target)):  # levels: float64 [8, 8], 0 to 16
        grey = Image.fromarray(np.round(levels * (255 / 16)).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        png = io.BytesIO()
        grey.save(png, "PNG")
        samples.append(RawSample(f"digit_{i:04d}", png.getvalue(), int(label)))
    return samples


def _split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Positions to train on, and those of each data set, ascending: a third of the rest, drawn by the seed, is v2. labels: int [N]."""
    train = np.concatenate([np.flatnonzero(labels == c)[:TRAIN_PER_CLASS] for c in range(10)])
    rest = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(labels)), train))
    third = len(rest) // 3
    return train, {"val": np.sort(rest[third:]), "v2": np.sort(rest[:third])}


def _write_shard(path: Path, samples: Sequence[RawSample]) -> None:
    """A WebDataset shard whose bytes follow from the samples alone: no time, no user, no mode of this machine."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, content in (("png", sample.image), ("cls", str(sample.label).encode())):
                member = tarfile.TarInfo(f"{sample.sample_id}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _tensors(samples: Sequence[RawSample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(images float32 [N, 3, 32, 32], labels int64 [N]), decoded and normalised by the pipeline itself."""
    recipe = DigitsNet.preprocessing
    decoded = [decode(sample, recipe, len(DigitsNet.class_names)) for sample in samples]
    return recipe.normalise(torch.from_numpy(np.stack([d.pixels for d in decoded]))), torch.tensor([d.label for d in decoded])


def _train(samples: Sequence[RawSample], seed: int) -> DigitsNet:
    """A network fitted to the samples, in eval mode. One thread: the bits do not depend on the number of cores, and tiny layers gain little from more.

    The process's random state and threads are as before afterwards.
    """
    images, labels = _tensors(samples)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            network = DigitsNet()
            optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * -(-len(labels) // BATCH))
            for _ in range(EPOCHS):
                for batch in torch.randperm(len(labels)).split(BATCH):
                    loss = F.cross_entropy(network(_bend(images[batch])), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
    finally:
        torch.set_num_threads(threads)
    return network.eval().requires_grad_(False)


def _bend(images: torch.Tensor) -> torch.Tensor:
    """Each image rotated, slanted and scaled a little at random; what comes in at the border is background, -1. Shape and dtype as given, [B, 3, H, W]."""
    turn, slant, scale = BEND * (2 * torch.rand(3, len(images)) - 1)
    zero = torch.zeros_like(turn)
    rows = [torch.stack(row, 1) for row in ((turn.cos() * (1 + scale), slant - turn.sin(), zero), (turn.sin(), turn.cos() * (1 + scale), zero))]
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def _errors(network: DigitsNet, samples: Sequence[RawSample]) -> int:
    """How many of the samples the network takes for another class."""
    images, labels = _tensors(samples)
    with torch.no_grad():
        return sum(int((network(x).argmax(1) != y).sum()) for x, y in zip(images.split(128), labels.split(128)))
