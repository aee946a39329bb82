"""Networks that dawdle, straggle, die or raise at images that ask for it, such images, and what readers find after jobs that were harmed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from shards import encoded, picture, write_tar

NETWORKS = '''
import contextlib, glob, os, signal, threading, time
import torch
from torch import nn
from jobs.digits import DigitsNet
from pipeline.samples import Preprocessing

class Slow(DigitsNet):
    """The digits' network, which dawdles for NAP seconds a batch."""
    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", 0)))
        return super().forward(x)

class Touchy(nn.Module):
    """Kills its process at an image whose first pixel is pure red; raises at one whose first pixel is pure green, and at any in another thread than the one that made it."""
    preprocessing = Preprocessing(resize=None, crop=None, mean=(0, 0, 0), std=(1, 1, 1))
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        self.thread = threading.get_ident()
    def forward(self, x):
        if threading.get_ident() != self.thread:
            raise RuntimeError("it keeps to its thread")
        time.sleep(float(os.environ.get("NAP", 0)))
        red, green, blue = x[:, :, 0, 0].T
        if ((red == 1) & (green == 0) & (blue == 0)).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if ((red == 0) & (green == 1) & (blue == 0)).any():
            raise ValueError("green is too much")
        return self.linear(self.conv(x).relu().mean((2, 3)))

class Straggler(Touchy):
    """In the one process that comes first, a batch takes until the run STRAGGLER has the profiles of ENOUGH units, or a minute: then it leaves word."""
    straggles = False
    def forward(self, x):
        if folder := os.environ.get("STRAGGLER"):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(folder + "/first", os.O_CREAT | os.O_EXCL))
                Straggler.straggles = True
            end = time.monotonic() + 60
            while Straggler.straggles and len(glob.glob(folder + "/profiles/val/*.parquet")) < int(os.environ["ENOUGH"]):
                time.sleep(0.05)
                if time.monotonic() > end:
                    open(folder + "/in-vain", "w").close()
                    break
        return super().forward(x)
'''
RED, GREEN = (255, 0, 0), (0, 255, 0)


def write_networks(folder: Path) -> Path:
    (folder / "networks.py").write_text(NETWORKS)
    return folder


def touchy(path: Path, count: int, first: int = 0, **marked: tuple[int, int, int]) -> Path:
    """A shard of `count` small images `00000`, ... from `first` on; `at_2=RED` paints the first pixel of the third."""
    members = []
    for i in range(count):
        image = picture(first + i)
        image.putpixel((0, 0), marked.get(f"at_{i}", (9, 9, 9)))
        members += [(f"{first + i:05d}.png", encoded(image, "PNG")), (f"{first + i:05d}.cls", b"1")]
    return write_tar(path, members)


def rows(run: Path, dataset: str = "val") -> dict[str, list]:
    """Every column of all profiles as Parquet readers see them, in the order of the IDs; floats as the bits they are."""
    table = pq.read_table(run / "profiles" / dataset).sort_by("sample_id")
    columns = {name: table[name].to_pylist() for name in table.column_names if name != "saliency"}
    for name in ("label_confidence", "prediction_confidence", "loss"):
        columns[name] = table[name].to_numpy().view(np.uint32).tolist()
    saliency = np.stack(table["saliency"].to_numpy())
    return columns | {"saliency": saliency.view(np.uint32).tolist()}


def rejects(run: Path, dataset: str = "val") -> dict[str, str]:
    """sample_id -> reason."""
    table = pq.read_table(run / "rejects" / dataset)
    assert len(set(table["sample_id"].to_pylist())) == table.num_rows
    return dict(zip(table["sample_id"].to_pylist(), table["reason"].to_pylist()))
