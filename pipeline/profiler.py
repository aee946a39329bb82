"""A unit of decoded samples -> its rows: batches of one size, the engine, and what makes a sample impossible to profile.

Every batch has the run's batch size, padded where samples are missing, and a sample's row in it follows from its position in the
shard alone. Its numbers do not depend on who shares its batch, but a matrix product may round a row by where it lies in memory:
with a row of its own a sample is bit-equal however a unit was cut, retried or resumed.

Where a batch does not fit into the device's memory, it is computed in halves, quarters and so on, `most` rows at a time, and so are all later ones of
this process; run.json's batch size stays. Row r of the batch is then row r mod `most` of a smaller one: its numbers are the same up to what the
device's matrix products round otherwise for another number of rows (bit-equal where they do not, as for most networks on a CPU; about 1e-6 where they do). A sample's
row still follows from its position alone, so two devices of the same memory agree bit for bit.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline import models
from pipeline.errors import is_device, printable
from pipeline.manifest import Manifest
from pipeline.samples import Sample
from pipeline.saliency import is_memory, make_engine, prepare_process
from pipeline.saliency.loss import cross_entropy
from pipeline.saliency.threads import have_threads
from pipeline.store import MADE_BY, REJECTS, profiles_schema


class Profiler:
    """A run's network on one device. One a process: it sets the process's threads and precision, as run.json says."""

    def __init__(self, manifest: Manifest, network: torch.nn.Module, device: str):
        prepare_process(manifest.threads, manifest.precision)
        self.manifest, self.device = manifest, torch.device(device)
        self.most = manifest.batch_size  # rows that fit into memory at once, as far as is known
        self.engine = make_engine(manifest.engine, network.to(self.device), manifest.aggregation)

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
        """The same, batch by batch. Raises Stopped where this thread does not get those that compute with it."""
        have_threads(self.manifest.threads)
        shard = shard.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        for _, batch in groupby(range(len(samples)), lambda i: (start + i) // self.manifest.batch_size):
            batch = list(batch)
            reasons = {i: samples[i].reason for i in batch if samples[i].reason}
            rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            good = [i for i in batch if i not in reasons]
            for shape in dict.fromkeys(samples[i].pixels.shape for i in good):
                self._isolate(samples, start, [i for i in good if samples[i].pixels.shape == shape], rows, reasons)
            rejects = [(samples[i].sample_id, shard, reasons[i]) for i in sorted(reasons)]
            yield self._table([samples[i] for i in sorted(rows)], [rows[i] for i in sorted(rows)], shard), pa.table(list(zip(*rejects)) or [[], [], []], schema=REJECTS)

    def _isolate(self, samples, start, chosen, rows, reasons) -> None:
        """Profile a batch; where it raises, each half of it, down to the samples that are the cause."""
        try:
            saliency, logits = self._batch({(start + i) % self.manifest.batch_size: samples[i] for i in chosen})
        except (Exception, SystemExit) as fault:  # a network is anybody's code
            if is_memory(fault) or is_device(fault) or isinstance(fault, OSError):
                raise  # not even one image at a time fits, the GPU failed, or the system did; no sample is to blame
            if len(chosen) == 1:
                reasons[chosen[0]] = f"the network fails on it: {printable(str(fault).splitlines()[0] if str(fault) else type(fault).__name__)[:200]}"
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

    def _batch(self, places: dict[int, Sample]) -> tuple[np.ndarray, np.ndarray]:
        """(s̄ float32 [B, F], logits float32 [B, C]) of samples of one shape, each computed in its place (a row of the batch), `most` rows at a time."""
        while True:
            blocks = [list(block) for _, block in groupby(places, lambda row: row // self.most)]
            try:
                parts = [self._rows({row % self.most: places[row] for row in block}) for block in blocks]
                return tuple(np.concatenate(part) for part in zip(*parts))
            except Exception as fault:
                if self.most == 1 or not is_memory(fault):
                    raise
            self.most = (self.most + 1) // 2  # out here, where the failed batch's tensors are let go
            gc.collect()  # those that hold each other
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _rows(self, places: dict[int, Sample]) -> tuple[np.ndarray, np.ndarray]:
        """The same, of rows that are computed at once."""
        filler = next(iter(places.values()))
        padded = [places.get(row, filler) for row in range(self.most)]
        pixels = torch.from_numpy(np.stack([s.pixels for s in padded])).to(self.device)
        labels = torch.tensor([s.label for s in padded], device=self.device)
        bf16 = torch.autocast(self.device.type, torch.bfloat16) if self.manifest.precision == "bf16" else contextlib.nullcontext()
        with bf16:
            result = self.engine(self.manifest.preprocessing.normalise(pixels), labels)
        return tuple(t[list(places)].float().cpu().numpy() for t in result)

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
