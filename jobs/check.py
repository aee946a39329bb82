"""`faultline check`: the doctor, before hours are spent. A few hundred samples tell whether a run would be worth its hours, and how many those are."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs import begin, cluster
from jobs.progress import ProgressBar, say
from pipeline.errors import BadRequest, printable
from pipeline.sources import Shard, Source, open_source
from pipeline.sources.doubles import Ids
from pipeline.units import refuse_twins

if TYPE_CHECKING:  # torch is loaded where it is needed
    import torch

    from pipeline.doctor import Diagnosis, Look
    from pipeline.manifest import Manifest

LOOK = 400  # samples
COUNTING = 30.0  # seconds after which the rest of the shards are estimated
TIMING = 4.0  # seconds that the engine is timed for


@dataclass(frozen=True)
class Counted:
    """Shards that were counted, all of them if there was time; `samples` of the whole source, exact then, otherwise estimated by bytes."""

    shards: list[Shard]
    of: int
    samples: int

    @property
    def exact(self) -> bool:
        return len(self.shards) == self.of


@dataclass(frozen=True)
class Report:
    """What `check` found. images_per_s: of a whole run on this machine; hours and bytes: of a run over all samples."""

    kind: str
    shards: int
    samples: int
    samples_exact: bool
    label_range: tuple[int, int]
    labels_seen: int
    classes: int
    class_order: str
    filters: int
    layers: int
    engine: str
    device: str
    seen: int
    top1: float
    top1_low: float
    top1_high: float
    promised: float | None
    mistake: str | None
    top1_undone: float | None
    images_per_s: float
    hours: float
    bytes: int
    faults: list[str]
    warnings: list[str]

    @property
    def verdict(self) -> str:
        return "a run would be garbage" if self.faults else "ready, with warnings" if self.warnings else "ready"


def check(spec: str, model: str, weights: str | None = None, preprocess: str | None = None, device: str | None = None, devkit: str | None = None) -> Report:
    """Look at a source with a network's eyes. Raises BadRequest for what cannot even be looked at."""
    from pipeline import doctor
    from pipeline.sources.flat_imagenet import FlatImageNet, devkit_at

    source, names = open_source(spec)
    refuse_twins(names)
    if isinstance(source, FlatImageNet):
        source = replace(source, devkit=devkit)
    order = devkit_at(source.root, devkit)
    device = cluster.device_for(device, "local")
    classifier = begin.load_model(model, weights, preprocess, None, device)
    counted = count(source, names, COUNTING)
    if not counted.samples:
        raise BadRequest(f"--source: {printable(spec)} holds no sample")
    start = time.monotonic()
    seen = doctor.look(source, counted.shards, LOOK, classifier.preprocessing)
    decoding = (time.monotonic() - start) / max(1, len(seen.samples))
    manifest = begin.describe(begin.Asked(model, weights, preprocess, device=device), seen, classifier)
    say(f"classifying {len(seen.samples)} images")
    found = begin.examine(seen, classifier.network, manifest, order, say)
    rate, row_bytes, lost = cost(seen, classifier.network, manifest, device, decoding)
    warnings = [*source.advice(names), *filter(None, [lost]), *found.warnings]
    labels = [s.label for s in seen.samples]
    return Report(
        source.kind, len(names), counted.samples, counted.exact, (min(labels), max(labels)), len(set(labels)), manifest.classes, "follows the WordNet IDs, by the devkit" if isinstance(source, FlatImageNet) else _order(found), manifest.layers.total, len(manifest.layers.layers),
        manifest.engine, device, found.seen, found.top1, found.low, found.high, found.promised, found.mistake.name if found.mistake else None, found.undone,
        rate, counted.samples / rate / 3600, int(counted.samples * row_bytes), [*found.faults, *found.doubts], warnings,
    )  # fmt: skip


def count(source: Source, names: list[str], seconds: float) -> Counted:
    """Count shards, spread over the list, for as long as there is time. Raises BadRequest naming the first that is damaged, or an ID that stands twice."""
    deadline = time.monotonic() + seconds
    order = sorted(range(len(names)), key=lambda i: i * 0.6180339887 % 1)  # any first part of it is spread over the whole
    done: dict[int, Shard] = {}
    ids = Ids(source)

    def one(i: int) -> Shard | None:
        return ids.census(names[i]) if i == order[0] or time.monotonic() < deadline else None

    with ThreadPoolExecutor(min(16, len(names))) as pool, ProgressBar("counting shards", len(names), unit="shards") as bar:
        for i, shard in zip(order, pool.map(one, order)):
            if shard:
                done[i] = shard
                bar.advance(1)
    ids.refuse_doubles()
    shards = [done[i] for i in sorted(done)]
    samples = sum(shard.samples for shard in shards)
    if len(done) < len(names):
        samples = round(samples * _bytes(source.root, names) / max(1, _bytes(source.root, (names[i] for i in done))))
    return Counted(shards, len(names), samples)


def _bytes(root: str, names: Iterable[str]) -> int:
    return sum(os.path.getsize(os.path.join(root, name)) for name in names)


def cost(seen: Look, network: torch.nn.Module, manifest: Manifest, device: str, decoding: float) -> tuple[float, float, str | None]:
    """(images a second of a whole run on this machine, bytes of a profile, what was set aside), measured on the samples of a look; `decoding`: seconds an image on one CPU."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.profiler import Profiler

    profiler = Profiler(manifest, network, device)
    shape = Counter(s.pixels.shape for s in seen.samples).most_common(1)[0][0]
    alike = [s for s in seen.samples if s.pixels.shape == shape]
    samples = [s for s in alike if 0 <= s.label < manifest.classes] or [replace(alike[0], label=0)]
    batches = [samples[i : i + manifest.batch_size] for i in range(0, len(samples), manifest.batch_size)]
    for _ in range(2):  # the first is slower, and on a GPU the second is recorded
        profiler.profile(batches[0], "", 0)
    written, images, aside, start = 0, 0, [], time.monotonic()
    for batch in batches:
        table, rejects = profiler.profile(batch, "", 0)
        aside += rejects["reason"].to_pylist()
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        written, images = written + sink.tell(), images + len(batch)
        if time.monotonic() - start > TIMING:
            break
    engine = (time.monotonic() - start) / images
    cpus = cluster.cpus_here()
    engines = cluster.engines_here(device, manifest.threads)
    seconds = max(engine / engines, decoding / cpus) if device == "cuda" else engine / engines + decoding / cpus
    lost = f"{len(aside)} of {images} samples that were profiled would be set aside: {printable(aside[0])}" if aside else None
    return 1 / seconds, written / images, lost


def _order(found: Diagnosis) -> str:
    """Whether labels follow the WordNet IDs, in a word."""
    return {None: "not known", True: "follows the WordNet IDs", False: "differs from the WordNet IDs"}[found.order]
