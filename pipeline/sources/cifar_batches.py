"""CIFAR's python release: pickles `data_batch_1..5` and `test_batch` of CIFAR-10, `train` and `test` of CIFAR-100, read without running them.

A batch is a dict: `data`, uint8 [N, 3072], a row being the red, green and blue plane of 32 x 32 pixels; `labels` or `fine_labels`.
The ID is file and index, `test_batch/000042`. A folder that holds both halves stands for its test half: the saliency of images that
a network was trained on says nothing of its failures. Training batches are read where a file or pattern names them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import BadRequest, printable
from pipeline.sources import BATCH
from pipeline.sources.stretches import Rows, Stretches
from pipeline.sources.unpickle import Refused, array_of, integers_of, scan

LABELS = ("labels", "fine_labels")


@dataclass(frozen=True)
class CifarBatches(Stretches):
    """Reader of the batches in `root`."""

    root: str
    kind: ClassVar[str] = "cifar batches"

    @classmethod
    def find(cls, root: str, names: list[str]) -> tuple[CifarBatches, list[str]]:
        """(reader, the test batches, or all where there is none). Raises BadRequest if the batches lie in several folders."""
        places = sorted({os.path.dirname(name) for name in names})
        if len(places) > 1:
            raise BadRequest(f"--source: {printable(root)} holds CIFAR batches in several folders ({printable(', '.join(place or '.' for place in places[:3]))}): name one")
        names = [os.path.basename(name) for name in names]
        return cls(os.path.normpath(os.path.join(root, places[0]))), [name for name in names if name.startswith("test")] or names

    def advice(self, names: list[str]) -> list[str]:
        left = [e.name for e in os.scandir(self.root) if BATCH.fullmatch(e.name) and e.name not in names and not e.name.startswith("test")]
        if left and all(os.path.basename(name).startswith("test") for name in names):
            return [f"the test half alone is read; name training batches by a pattern, '{printable(os.path.join(self.root, 'train' if 'train' in left else 'data_batch_*'))}', if you mean them"]
        return []

    def stem(self, name: str) -> str:
        return name

    @contextmanager
    def opened(self, path: str) -> Iterator[Rows]:
        with open(path, "rb") as file:
            batch = scan(file)
            if not isinstance(batch, dict):
                raise Refused("it holds no dict")
            batch = {key.decode("utf-8", "replace") if isinstance(key, bytes) else key: value for key, value in batch.items()}
            labels = next((batch[key] for key in LABELS if key in batch), None)
            data = array_of(batch.get("data"))
            if data is None or labels is None:
                raise Refused(f"it holds no {'data' if data is None else 'labels (or fine_labels)'}; a batch of CIFAR has data, and labels or fine_labels")
            if data.dtype != "u1" or len(data.shape) != 2 or data.shape[1] != 3072:
                raise Refused(f"its data is {data.dtype} {data.shape}, not uint8 (N, 3072)")
            numbers = integers_of(labels, file, data.shape[0])
            if len(numbers) != data.shape[0]:
                raise Refused(f"it has {len(numbers)} labels for {data.shape[0]} images")
            yield Rows(data.open(file), 0, (3, 32, 32), numbers, planar=True, exact=True)
