"""One unit from shard to file, in two steps that can run on different machines: `decode_unit`, then `UnitWriter`.

Between them a unit is one Arrow table, a row a sample (`DECODED`). What goes wrong with a sample becomes its reason; what goes
wrong with a unit (an unreadable shard, a full disk) becomes the `fault` of its receipt. Neither step raises, but
for a `Broken` GPU, which only another process can mend, and neither is told who calls it: the same code serves one process and a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import Broken, Fault, is_device, printable
from pipeline.failpoints import reach
from pipeline.samples import Preprocessing, Sample, decode
from pipeline.sources import reader
from pipeline.store import Store
from pipeline.units import Unit

DECODED = pa.schema(
    [
        ("unit", pa.string()),  # JSON, on the first row alone
        ("fault", pa.string()),  # of the unit, on the first row alone
        ("sample_id", pa.string()),
        ("label", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.binary()),  # uint8 [H, W, 3]
        ("thumbnail", pa.binary()),
        ("reason", pa.string()),  # why the sample is set aside, or null
    ]
)


@dataclass(frozen=True)
class Receipt:
    """What comes back of a unit: never its rows. `fault` says why nothing was committed, or is empty; `refused`: because the run cannot be written, as no other unit can then."""

    stem: str
    samples: int
    rejects: int
    seconds: float
    fault: str
    refused: bool = False


@dataclass(frozen=True)
class Decoder:
    """What a decode worker must know: the reader's kind and root, the recipe, and C."""

    kind: str
    root: str
    preprocessing: Preprocessing
    classes: int

    def __call__(self, unit: Unit) -> pa.Table:
        """A unit as a `DECODED` table of `unit.samples` rows, or of one row with the unit's fault."""
        try:
            reach("decode", unit)
            raw = list(reader(self.kind, self.root).read(unit.marks, unit.shard, unit.start, unit.stop))
            samples = [decode(r, self.preprocessing, self.classes) for r in raw]
            if len(samples) != unit.samples:
                raise OSError(f"{printable(unit.shard)} gave {len(samples)} samples for positions {unit.start} to {unit.stop}")
            return _pack(unit, samples, "")
        except (Fault, OSError) as fault:
            return _pack(unit, [Sample("")], printable(fault))
        except Exception as fault:
            return _pack(unit, [Sample("")], f"{printable(unit.shard)} cannot be read at {unit.start}..{unit.stop}: {type(fault).__name__}: {printable(fault)}")


class UnitWriter:
    """Profiles decoded units on one device and commits them. Threads may call it for a unit each: their batches take turns at the device, and nothing else waits."""

    def __init__(self, run: Path, device: str):
        from pipeline.profiler import Profiler

        self.store = Store(run)
        self.profiler = Profiler.restore(run, device)

    def __call__(self, decoded: pa.Table) -> Receipt:
        """The unit's files are there when this returns, or the receipt's fault says why not. What is committed already is not computed again. Raises Broken."""
        start = time.monotonic()
        unit, fault = Unit.from_json(decoded["unit"][0].as_py()), decoded["fault"][0].as_py()
        rejects, refused = 0, False
        if not fault and not self.store.is_committed(unit):  # it is, where only its receipt was lost
            try:
                self._stat()
                with closing(self._parts(unit, decoded)) as parts:
                    rejects = self.store.commit(unit, parts)
            except OSError as error:
                fault, refused = f"{printable(error.filename or self.store.run)} cannot be written: {printable(error.strerror or error)}", True
            except Exception as error:
                if is_device(error):
                    raise Broken.by(error) from None
                text = str(error).strip().splitlines()
                fault = f"{printable(unit.shard)} {unit.start}..{unit.stop}: {': '.join([type(error).__name__, *(printable(line)[:300] for line in text[:1])])}"
        return Receipt(unit.stem, unit.samples, rejects, time.monotonic() - start, fault, refused)

    def _parts(self, unit: Unit, decoded: pa.Table) -> Iterator[tuple[pa.Table, pa.Table]]:
        reach("profile", unit)
        with closing(self.profiler.parts(_unpack(decoded), unit.shard, unit.start)) as parts:
            while part := _next(parts):
                self._stat()
                yield part
        reach("profiled", unit)
        self._stat()

    def _stat(self) -> None:
        """Raises OSError where the folder was moved away: nothing is begun anew at its old place."""
        (self.store.run / "run.json").stat()


def _next(parts: Iterator[tuple[pa.Table, pa.Table]]) -> tuple[pa.Table, pa.Table] | None:
    """The next of what is computed, or None. Raises RuntimeError for an OSError, which would be taken for one of the run's disk (a full /tmp, say, where kernels are compiled)."""
    try:
        return next(parts, None)
    except OSError as fault:
        raise RuntimeError(str(fault)) from fault


def _pack(unit: Unit, samples: list[Sample], fault: str) -> pa.Table:
    first = [None] * (len(samples) - 1)
    columns = [
        [unit.to_json(marks=False), *first],
        [fault, *first],
        [s.sample_id for s in samples],
        [s.label for s in samples],
        [s.pixels.shape[0] if s.pixels is not None else 0 for s in samples],
        [s.pixels.shape[1] if s.pixels is not None else 0 for s in samples],
        [s.pixels.tobytes() if s.pixels is not None else b"" for s in samples],
        [s.thumbnail for s in samples],
        [s.reason for s in samples],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, DECODED)], schema=DECODED)


def _unpack(decoded: pa.Table) -> list[Sample]:
    samples = []
    columns = (decoded[c].to_pylist() for c in ("sample_id", "label", "height", "width", "thumbnail", "reason"))
    for row, (sample_id, label, height, width, thumbnail, reason) in enumerate(zip(*columns)):
        pixels = None if reason else np.frombuffer(decoded["pixels"][row].as_buffer(), np.uint8).reshape(height, width, 3)
        samples.append(Sample(sample_id, label, pixels, thumbnail, reason))
    return samples
