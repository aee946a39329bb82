"""A unit of decoded samples -> its rows: batches of one size, the engine, and what makes a sample impossible to profile.

Every batch has the run's batch size, padded where samples are missing, and a sample's row in it follows from its position in the
shard alone. Its numbers do not depend on who shares its batch, but a matrix product may round a row by where it lies in memory:
with a row of its own a sample is bit-equal however a unit was cut, retried or resumed.

Where a batch does not fit into a GPU's memory, it is computed in halves, quarters and so on, `most` rows at a time, and so are all later ones of
this process; run.json's batch size stays. Row r of the batch is then row r mod `most` of a smaller one: its numbers are the same up to what the
device's matrix products round otherwise for another number of rows (bit-equal where they do not, as for most networks on a CPU; about 1e-6 where they do). A sample's
row still follows from its position alone, so another process cuts it alike.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline import models
from pipeline.errors import is_device, said
from pipeline.manifest import Manifest
from pipeline.samples import Sample
from pipeline.saliency import is_memory, make_engine, prepare_process
from pipeline.saliency.loss import cross_entropy
from pipeline.saliency.threads import have_threads
from pipeline.store import MADE_BY, REJECTS, profiles_schema


class Launched(NamedTuple):
    """Rows of a batch that are computed at once: their places in the batch, and what waits for [s̄, logits], in memory of this process, and gives them or raises."""

    places: list[int]
    results: Callable[[], tuple[torch.Tensor, ...]]


Batch = list[Launched]


class Profiler:
    """A run's network on one device. One a process: it sets the process's threads and precision, as run.json says. The network is its own from here on: no parameter asks for a gradient. Threads that profile a unit each take turns at the device: a unit's batches are begun one after the other."""

    def __init__(self, manifest: Manifest, network: torch.nn.Module, device: str):
        prepare_process(manifest.threads, manifest.precision)
        self.manifest, self.device = manifest, torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.halves = self.on_gpu  # a CPU's bits are promised: there the unit waits until the memory is free again
        self.ahead = 1  # batches that are begun before the rows of an earlier one are made
        self.turn = threading.RLock()  # of the thread that begins batches
        self.most = manifest.batch_size  # rows that fit into memory at once, as far as is known
        self.engine = make_engine(manifest.engine, network.to(self.device).requires_grad_(False), manifest.aggregation)

    @classmethod
    def restore(cls, run: Path, device: str) -> Profiler:
        """From a run directory alone, on any machine that reaches it."""
        manifest = Manifest.read(run)
        models.reach(manifest.import_root)
        return cls(manifest, models.restore(manifest.model, run / "weights.safetensors", manifest.saved_sha256), device)

    def profile(self, samples: list[Sample], shard: str, start: int) -> tuple[pa.Table, pa.Table]:
        """(profiles, rejects) of one unit, the samples from position `start` of a shard on; both in the order of the samples.

        A sample that fails is set aside, alone.
        """
        return tuple(map(pa.concat_tables, zip(*self.parts(samples, shard, start))))

    def parts(self, samples: list[Sample], shard: str, start: int) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The same, batch by batch. Raises Stopped where this thread does not get those that compute with it.

        The next batch is begun before the rows of this one are waited for and made, and on a GPU the next unit before the last rows of this one: it never waits. Close what is given where it is not read to its end.
        """
        have_threads(self.manifest.threads)
        shard = shard.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        begun: deque[tuple[list[int], list]] = deque()
        with self.turn:
            for _, batch in groupby(range(len(samples)), lambda i: (start + i) // self.manifest.batch_size):
                batch = list(batch)
                begun.append((batch, self._begun(samples, start, batch)))
                if len(begun) > self.ahead:
                    yield self._rows(samples, shard, start, *begun.popleft())
        while begun:
            yield self._rows(samples, shard, start, *begun.popleft())

    def _begun(self, samples, start, batch) -> list[tuple[list[int], Batch | BaseException]]:
        """The samples of a batch that can be profiled, those of one shape together, and what is begun of them, or why it was not."""
        good, groups = [i for i in batch if not samples[i].reason], []
        for shape in dict.fromkeys(samples[i].pixels.shape for i in good):
            chosen = [i for i in good if samples[i].pixels.shape == shape]
            try:
                groups.append((chosen, self._launch(self._places(samples, start, chosen))))
            except KeyboardInterrupt:
                raise
            except BaseException as fault:
                groups.append((chosen, fault))
        return groups

    def _rows(self, samples, shard, start, batch, groups) -> tuple[pa.Table, pa.Table]:
        """(profiles, rejects) of a batch that was begun."""
        reasons = {i: samples[i].reason for i in batch if samples[i].reason}
        rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for chosen, begun in groups:
            self._isolate(samples, start, chosen, rows, reasons, begun)
        rejects = [(samples[i].sample_id, shard, reasons[i]) for i in sorted(reasons)]
        return self._table([samples[i] for i in sorted(rows)], [rows[i] for i in sorted(rows)], shard), pa.table(list(zip(*rejects)) or [[], [], []], schema=REJECTS)

    def _isolate(self, samples, start, chosen, rows, reasons, begun: Batch | BaseException | None = None) -> None:
        """Profile a batch; where it raises, each half of it, down to the samples that are the cause."""
        try:
            if isinstance(begun, BaseException):
                raise begun
            saliency, logits = self._results(begun or self._launch(self._places(samples, start, chosen)))
        except KeyboardInterrupt:
            raise
        except BaseException as fault:  # a network is anybody's code
            if is_memory(fault) or is_device(fault) or isinstance(fault, OSError):
                raise  # not even one image at a time fits, the GPU failed, or the system did; no sample is to blame
            if len(chosen) == 1:
                reasons[chosen[0]] = f"the network fails on it: {said(fault)}"
                return
            for half in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]):
                self._isolate(samples, start, half, rows, reasons)
            return
        for row, i in enumerate(chosen):
            if not np.isfinite(logits[row]).all():
                reasons[i] = "the network's output for it is not finite"
            elif not np.isfinite(saliency[row]).all():
                reasons[i] = "its filter saliency is not finite"
            else:
                rows[i] = saliency[row], logits[row]

    def _places(self, samples, start, chosen) -> dict[int, Sample]:
        return {(start + i) % self.manifest.batch_size: samples[i] for i in chosen}

    def _launch(self, places: dict[int, Sample]) -> Batch:
        """Samples of one shape, each computed in its place (a row of the batch), `most` rows at a time: begun, and not waited for."""
        with self.turn:
            while True:
                blocks = [list(block) for _, block in groupby(places, lambda row: row // self.most)]
                try:
                    return [self._launch_rows({row % self.most: places[row] for row in block}) for block in blocks]
                except Exception as fault:
                    if not self.halves or self.most == 1 or not is_memory(fault):
                        raise
                self.most = (self.most + 1) // 2  # out here, where the failed batch's tensors are let go
                gc.collect()  # those that hold each other
                if self.on_gpu:
                    torch.cuda.empty_cache()

    def transfer(self, places: dict[int, Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels uint8 [most, H, W, 3], labels int64 [most]) on the device, of samples of one shape, each in its place and one of them in all that are empty: begun, on a GPU, and not waited for."""
        filler = next(iter(places.values()))
        padded = [places.get(row, filler) for row in range(self.most)]
        pixels = torch.empty(self.most, *filler.pixels.shape, dtype=torch.uint8, pin_memory=self.on_gpu)
        np.stack([s.pixels for s in padded], out=pixels.numpy())
        labels = torch.tensor([s.label for s in padded], pin_memory=self.on_gpu)
        return pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _launch_rows(self, places: dict[int, Sample]) -> Launched:
        """The same as `_launch`, of rows that are computed at once."""
        pixels, labels = self.transfer(places)
        bf16 = torch.autocast(self.device.type, torch.bfloat16) if self.manifest.precision == "bf16" else contextlib.nullcontext()
        with bf16:
            begun = self.engine.begin(self.manifest.preprocessing.normalise(pixels), labels)
        if not self.on_gpu:
            return Launched(list(places), begun)
        back = tuple(torch.empty(t.shape, pin_memory=True).copy_(t, non_blocking=True) for t in begun())
        done = torch.cuda.Event(blocking=True)
        done.record()
        return Launched(list(places), lambda: (done.synchronize(), back)[1])

    @staticmethod
    def _results(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """(s̄ float32 [B, F], logits float32 [B, C]) of what was launched, once it is there."""
        return tuple(np.concatenate([t.float().numpy()[launched.places] for t, launched in zip(part, batch)]) for part in zip(*(launched.results() for launched in batch)))

    def _table(self, samples: list[Sample], rows: list[tuple[np.ndarray, np.ndarray]], shard: str) -> pa.Table:
        schema = profiles_schema(self.manifest.layers.total).with_metadata({MADE_BY: self.manifest.fingerprint})
        if not samples:
            return schema.empty_table()
        logits = torch.from_numpy(np.stack([logits for _, logits in rows])).double()
        labels = torch.tensor([s.label for s in samples])
        loss = cross_entropy(logits, labels)
        confidence, prediction = logits.softmax(1).max(1)
        saliency = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([s for s, _ in rows])), type=schema.field("saliency").type)
        columns = {
            "sample_id": [s.sample_id for s in samples],
            "label": labels.numpy(),
            "prediction": prediction.numpy(),
            "label_confidence": (-loss).exp().float().numpy(),
            "prediction_confidence": confidence.float().numpy(),
            "loss": loss.float().numpy(),
            "saliency": saliency,
            "thumbnail": [s.thumbnail for s in samples],
            "shard": [shard] * len(samples),
        }
        return pa.table({name: pa.array(columns[name], schema.field(name).type) if name != "saliency" else saliency for name in schema.names}, schema=schema)
