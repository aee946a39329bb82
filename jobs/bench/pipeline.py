"""`faultline bench pipeline`: real shards through the whole line, as a share of the engine's own rate; where the time goes; growth with engines.

The engine's own rate is that of the same network, threads and batch on images that are decoded already. Stages are timed one after the other in
one process, so that their sum is the work of an image, whoever does it. The transfer of pixels to the device is a part of the engine's, and told beside it. Rates drift on a shared machine, by a fifth within minutes: each line
stands between two turns of the stages, is compared with the engine of these two, and of the ratios the median is told. Nobody begins before those who had the turn before are at rest: Ray's processes take a quarter of a core for some seconds after their line is done.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

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

AT_REST, PATIENCE = 0.1, 30  # CPU seconds a second; seconds
UNITS = 2  # of each engine at least, of which the first does not count


def bench_pipeline(source: str | None, model: str | None, weights: str | None, preprocess: str | None, max_samples: int, device: str | None, actors: str, rounds: int) -> list[Measure]:
    """Medians over rounds in which the line in one process and the lines on Ray have their turn each, the stages before and after each of them. Raises BadRequest for what cannot be measured."""
    if (source is None) != (model is None):
        raise BadRequest("--source and --model go together; without both, the demo's digits are measured")
    if source is None and (weights or preprocess):
        raise BadRequest("--weights and --preprocess are of a network that --model names, with --source; without both, the demo's digits are measured")
    for value, option in ((max_samples, "--max-samples"), (rounds, "--rounds")):
        if value < 1:
            raise BadRequest(f"{option}: {value} is less than 1")
    if max_samples > cluster.SMALL:
        raise BadRequest(f"--max-samples: {max_samples:,} is more than the {cluster.SMALL:,} that go through a line in one process")
    engines = [_number(word) for word in actors.split(",") if word.strip()]
    device = cluster.device_for(device, "local")
    with tempfile.TemporaryDirectory(prefix="faultline-bench-") as folder:
        if source is None:
            made = digits.write(Path(folder) / "digits")
            source, model, weights = made.source("val"), digits.MODEL, str(made.weights)
        settings = Settings(Path(folder) / "run", "val", source, model, weights, preprocess, device=device, max_samples=max_samples, force=True)
        extract(settings)
        lines = {"in one process": replace(settings, actors=None)}
        lines |= {f"with {count} engine{'s' * (count != 1)} on Ray": replace(settings, actors=(count, count), address="local") for count in dict.fromkeys(engines)}
        units = len(Store(settings.run).files("val"))
        lines = {name: line for name, line in lines.items() if _is_long_enough(line, units)}
        stages = [_stages_at_rest(settings.run, device)]
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in lines}  # (images a second of a line, of the engine alone before and after it)
        order = deque(lines)
        for turn in range(rounds):
            for number, name in enumerate(order):
                _rest()
                say(f"round {turn + 1} of {rounds}: the line {name}")
                rate = _rate(replace(lines[name], run=Path(folder) / f"{turn}-{number}"))
                stages.append(_stages_at_rest(settings.run, device))
                pairs[name].append((rate, statistics.mean(1000 / taken["engine"] for taken in stages[-2:])))
            order.rotate(-1)
    return _measures({stage: statistics.median(taken[stage] for taken in stages) for stage in stages[0]}, pairs)


def _measures(stages: dict[str, float], pairs: dict[str, list[tuple[float, float]]]) -> list[Measure]:
    """stages: milliseconds of an image in each; pairs: images a second of a whole line and of the engine beside it, one pair a round."""
    total = sum(spent for stage, spent in stages.items() if stage != "transfer")  # which is a part of the engine's
    found = []
    for stage, spent in stages.items():
        beside = ("the engine, whose part it is", stages["engine"]) if stage == "transfer" else ("all stages", total)
        found.append(Measure.over(f"{stage}, of one image", spent, "ms", *beside))
    found.append(Measure("engine", 1000 / stages["engine"], "images/s"))
    for name, pair in pairs.items():
        rate, alone = map(statistics.median, zip(*pair))
        found.append(Measure(f"whole line {name}", rate, "images/s", "the engine alone, before and after", alone, statistics.median(line / engine for line, engine in pair)))
    return found


def _number(word: str) -> int:
    if not word.strip().isdigit() or not int(word):
        raise BadRequest(f"--actors: '{printable(word)}' is no number of engines; give for example 1,2,4")
    return int(word)


def _rest() -> None:
    """Returns once the processes that this one has started take less than `AT_REST` of a core, or after `PATIENCE` seconds."""
    for _ in range(PATIENCE):
        before = _spent()
        time.sleep(1)
        if sum(spent - before.get(process, 0) for process, spent in _spent().items()) < AT_REST:
            return


def _spent() -> dict[psutil.Process, float]:
    """CPU seconds of every process that this one, or one of those, has started."""
    spent = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            spent[process] = sum(process.cpu_times()[:2])
    return spent


def _stages_at_rest(run: Path, device: str) -> dict[str, float]:
    _rest()
    say("the stages")
    return _stages(Store(run), device)


def _stages(store: Store, device: str) -> dict[str, float]:
    """Milliseconds of an image in each stage, one after the other, over the units of a run that is there. `transfer` is done once more, alone: it is a part of the engine's."""
    manifest, census = store.manifest(), store.census("val")
    units = plan("val", census.asked, [], manifest.unit_samples, census.limit)
    profiler = Profiler.restore(store.run, device)
    own = reader(census.kind, census.root)
    seconds = dict.fromkeys(("read", "decode", "transfer", "engine", "write"), 0.0)
    images = 0
    again = Store(store.run.with_name("stages"))
    for turn, unit in enumerate([units[0], *units]):  # the first is done twice: once to warm
        marks = [now(device)]
        raw = list(own.read(unit.marks, unit.shard, unit.start, unit.stop))
        marks.append(now(device))
        samples = [decode(r, manifest.preprocessing, manifest.classes) for r in raw]
        marks.append(now(device))
        _transfer(profiler, samples)
        marks.append(now(device))
        parts = list(profiler.parts(samples, unit.shard, unit.start))
        marks.append(now(device))
        again.commit(unit, parts)
        marks.append(now(device))
        if turn:
            images += unit.samples
            for name, a, b in zip(seconds, marks, marks[1:]):
                seconds[name] += b - a
            say(f"stages: {images:,} of {census.samples:,} images")
    return {name: 1000 * spent / images for name, spent in seconds.items()}


def _transfer(profiler: Profiler, samples: list[Sample]) -> None:
    """Pixels into batches, and those onto the device."""
    good = [s for s in samples if not s.reason]
    alike = [s for s in good if s.pixels.shape == good[0].pixels.shape]
    for first in range(0, len(alike), profiler.most):
        profiler.transfer(dict(enumerate(alike[first : first + profiler.most])))


def _is_long_enough(line: Settings, units: int) -> bool:
    """Whether so many units give it a rate: two that are committed at once would seem to take no time."""
    engines = _engines(line)
    if units < UNITS * engines:
        say(f"no rate of {engines} engine{'s' * (engines != 1)} from {units} unit{'s' * (units != 1)}, but from {UNITS * engines} on: more --max-samples")
    return units >= UNITS * engines


def _engines(line: Settings) -> int:
    return line.actors[1] if line.actors else 1


def _rate(line: Settings) -> float:
    """Images a second of an extraction once every engine has committed a unit, so that starting counts for nothing."""
    extract(line)
    stamps = sorted((f.stat().st_mtime, interval_of(f.stem)[2] - interval_of(f.stem)[1]) for f in Store(line.run).files("val"))
    first = _engines(line)
    return sum(images for _, images in stamps[first:]) / max(stamps[-1][0] - stamps[first - 1][0], 1e-9)
