"""`faultline bench pipeline`: real shards through the whole line, as a share of the engine's own rate; where the time goes; growth with engines.

The engine's own rate is that of the same network, threads and batch on images that are decoded already. Stages are timed one after the other in
one process, so that their sum is the work of an image, whoever does it. The transfer of pixels to the device is a part of the engine's, and told beside it.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from jobs import cluster, digits
from jobs.bench.measure import Measure, now
from jobs.extract import Settings, extract
from jobs.progress import say
from pipeline.errors import BadRequest, printable
from pipeline.profiler import Profiler
from pipeline.samples import Sample, decode
from pipeline.sources import reader
from pipeline.store import Store
from pipeline.units import interval_of, plan


def bench_pipeline(source: str | None, model: str | None, weights: str | None, preprocess: str | None, max_samples: int, device: str | None, actors: str) -> list[Measure]:
    """Raises BadRequest for what cannot be measured."""
    if (source is None) != (model is None):
        raise BadRequest("--source and --model go together; without both, the demo's digits are measured")
    if max_samples < 1:
        raise BadRequest(f"--max-samples: {max_samples} is less than 1")
    engines = [_number(word) for word in actors.split(",") if word.strip()]
    device = cluster.device_for(device, "local")
    with tempfile.TemporaryDirectory(prefix="faultline-bench-") as folder:
        if source is None:
            made = digits.write(Path(folder) / "digits")
            source, model, weights = made.source("val"), digits.MODEL, str(made.weights)
        settings = Settings(Path(folder) / "run", "val", source, model, weights, preprocess, device=device, max_samples=max_samples, force=True)
        extract(settings)
        found = _stages(Store(settings.run), device)
        engine = next(m for m in found if m.what == "engine").value
        whole = _rate(replace(settings, run=Path(folder) / "here", actors=None))
        if whole:
            found.append(Measure.over("whole line in one process", whole, "images/s", "the engine alone", engine))
        for count in engines:
            say(f"{count} engine{'s' * (count != 1)} on Ray")
            rate = _rate(replace(settings, run=Path(folder) / f"on-{count}", actors=(count, count), address="local"))
            if rate:
                found.append(Measure.over(f"whole line with {count} engine{'s' * (count != 1)} on Ray", rate, "images/s", "the engine alone", engine))
    return found


def _number(word: str) -> int:
    if not word.strip().isdigit() or not int(word):
        raise BadRequest(f"--actors: '{printable(word)}' is no number of engines; give for example 1,2,4")
    return int(word)


def _stages(store: Store, device: str) -> list[Measure]:
    """Milliseconds of an image in each stage, one after the other, over the units of a run that is there; `transfer` once more alone, beside the engine whose part it is; `engine` as a rate too."""
    manifest, census = store.manifest(), store.census("val")
    units = plan("val", census.asked, [], manifest.unit_samples, census.limit)
    profiler = Profiler.restore(store.run, device)
    own = reader(census.kind, census.root)
    seconds = dict.fromkeys(("read", "decode", "engine", "write"), 0.0)
    images, transfer = 0, 0.0
    again = Store(store.run.with_name("stages"))
    for turn, unit in enumerate([units[0], *units]):  # the first is done twice: once to warm
        marks = [time.perf_counter()]
        raw = list(own.read(unit.marks, unit.shard, unit.start, unit.stop))
        marks.append(time.perf_counter())
        samples = [decode(r, manifest.preprocessing, manifest.classes) for r in raw]
        marks.append(time.perf_counter())
        parts = list(profiler.parts(samples, unit.shard, unit.start))
        marks.append(time.perf_counter())
        again.commit(unit, parts)
        marks.append(time.perf_counter())
        if turn:
            images += unit.samples
            for name, a, b in zip(seconds, marks, marks[1:]):
                seconds[name] += b - a
            transfer += _transfer(profiler, samples, device)
            say(f"stages: {images:,} of {census.samples:,} images")
    total = sum(seconds.values())
    found = [Measure.over(f"{name}, of one image", 1000 * spent / images, "ms", "all stages", 1000 * total / images) for name, spent in seconds.items()]
    found.insert(2, Measure.over("transfer, of one image", 1000 * transfer / images, "ms", "the engine, whose part it is", 1000 * seconds["engine"] / images))
    return [*found, Measure("engine", images / seconds["engine"], "images/s")]


def _transfer(profiler: Profiler, samples: list[Sample], device: str) -> float:
    """Seconds that pixels take into a batch and onto the device, batch by batch."""
    good = [s for s in samples if not s.reason]
    alike = [s for s in good if s.pixels.shape == good[0].pixels.shape]
    start = now(device)
    for first in range(0, len(alike), profiler.most):
        profiler.transfer(dict(enumerate(alike[first : first + profiler.most])))
    return now(device) - start


def _rate(settings: Settings) -> float | None:
    """Images a second of an extraction once every engine has committed a unit, so that starting counts for nothing; None where there are no more units."""
    extract(settings)
    stamps = sorted((f.stat().st_mtime, interval_of(f.stem)[2] - interval_of(f.stem)[1]) for f in Store(settings.run).files("val"))
    first = settings.actors[1] if settings.actors else 1
    if len(stamps) <= first:
        say(f"{len(stamps)} units are too few to tell the start from the rest, and nothing is said: more --max-samples")
        return None
    return sum(images for _, images in stamps[first:]) / max(stamps[-1][0] - stamps[first - 1][0], 1e-9)
