"""`faultline extract`: shards to profiles. The same command again resumes, and is free when all is there.

Settings are checked and the run is described (run.json, weights, census) before any image is profiled. Then units that are not committed
are streamed through `jobs/work.py`, in this process or on Ray, and the files are listed again: the truth is what exists.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import begin, cluster, servers
from jobs.crumb import Crumb
from jobs.progress import ProgressBar, say
from jobs.work import ATTEMPTS, Work, run_units
from pipeline.census import Census
from pipeline.errors import BadRequest, Stopped, printable
from pipeline.locks import hold
from pipeline.manifest import Manifest, holds_profiles
from pipeline.sources import Shard, Source, open_source
from pipeline.sources.doubles import Ids
from pipeline.statistics import IMPORTED, Reference
from pipeline.store import Progress, Store
from pipeline.units import MOST, Unit, refuse_twins, shard_stem
from pipeline.worker import Decoder, UnitWriter

if TYPE_CHECKING:  # torch is loaded for new runs alone
    from pipeline.models import Classifier

DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
ENGINES, PRECISIONS, AGGREGATIONS = ("auto", "fused", "vmap"), ("fp32", "tf32", "bf16"), ("abs", "signed")


@dataclass(frozen=True)
class Settings:
    """Everything `faultline extract` can be told. None: the run's own value, or the default if the run is new."""

    run: Path
    dataset: str
    source: str
    model: str
    weights: str | None = None
    preprocess: str | None = None
    engine: str = "auto"
    precision: str | None = None
    aggregation: str = "abs"
    batch_size: int | None = None
    device: str | None = None
    actors: tuple[int, int] | None = None
    max_samples: int | None = None
    shards: int | None = None
    max_rejects: int | None = None
    address: str | None = None
    devkit: str | None = None
    force: bool = False

    def check(self) -> None:
        """Raises BadRequest with every fault of the settings together."""
        faults = []
        if not DATASET.fullmatch(self.dataset):
            faults.append(f"--dataset: '{printable(self.dataset)}' cannot name files; use letters, digits, '.', '_' and '-'")
        for name, value, known in (("engine", self.engine, ENGINES), ("precision", self.precision, (None, *PRECISIONS)), ("aggregation", self.aggregation, AGGREGATIONS), ("device", self.device, (None, "cpu", "cuda"))):
            if value not in known:
                faults.append(f"--{name}: '{printable(value)}' is not one of {', '.join(k for k in known if k)}")
        for name, value, least in (("batch-size", self.batch_size, 1), ("max-samples", self.max_samples, 1), ("shards", self.shards, 1), ("max-rejects", self.max_rejects, 0)):
            if value is not None and value < least:
                faults.append(f"--{name}: {value} is less than {least}")
        if self.batch_size and self.batch_size > MOST:
            faults.append(f"--batch-size: {self.batch_size} is more than a unit of work, {MOST} samples")
        if self.run.exists() and not self.run.is_dir():
            faults.append(f"--run: {printable(self.run)} is a file; name a folder")
        try:
            str(self.run).encode()
        except UnicodeEncodeError:
            faults.append(f"--run: the name of {printable(self.run)} is not UTF-8, and the formats of a run take no other; name another folder")
        if faults:
            raise BadRequest(("\n" if len(faults) <= 3 else "; ").join(faults))


@dataclass(frozen=True)
class Outcome:
    """What an extraction ended with. `too_many_rejects`: more samples were set aside than --max-rejects (exit code 3)."""

    progress: Progress
    top1: float
    errors: int
    allowed_rejects: int
    units_run: int

    @property
    def too_many_rejects(self) -> bool:
        return self.progress.rejected > self.allowed_rejects


def extract(settings: Settings) -> Outcome:
    """Run it. Raises BadRequest before anything is done, Stopped once something is (the same command resumes)."""
    settings.check()
    store = Store(settings.run.expanduser().absolute())
    if settings.device == "cuda" or servers.joins(settings.address):
        cluster.device_for(settings.device, settings.address)  # refused before anything is written
    refuse_imported(store, settings.dataset)
    source, names = open_source(settings.source, settings.devkit)
    for line in source.advice(names[: settings.shards]):
        say(line)
    manifest = matching(store, settings)
    classifier = None if manifest else begin.load_model(settings.model, settings.weights, settings.preprocess, settings.precision, settings.device, settings.address)
    before = store.census(settings.dataset) if store.is_counted(settings.dataset) else None
    census = take_census(store, settings, source, names)
    if manifest is None or not store.committed(settings.dataset):
        manifest = admitted(store, settings, source, census, manifest, classifier)
    with only_writer(store, settings.dataset):
        if store.is_counted(settings.dataset) and store.census(settings.dataset) != before:
            census = take_census(store, settings, source, names)  # another job has been here since, and this one is held against what it counted
        store.refuse_others(settings.dataset, census)
        store.write_census(settings.dataset, census)
        store.sweep(settings.dataset)
        todo = store.todo(settings.dataset, manifest.unit_samples)
        units_run = do(store, settings, manifest, census, todo) if todo else 0
        store.sweep(settings.dataset)
    return outcome(store, settings, units_run)


def admitted(store: Store, settings: Settings, source: Source, census: Census, manifest: Manifest | None, classifier: Classifier | None) -> Manifest:
    """A few samples decide what a new run is, and whether a new data set is worth its hours. Raises BadRequest, and then nothing is written."""
    from pipeline.doctor import look

    again = partial(look, source, census.asked, preprocessing=manifest.preprocessing if manifest else classifier.preprocessing)
    device = cluster.device_for(settings.device, settings.address)
    asked = begin.Asked(settings.model, settings.weights, settings.preprocess, settings.engine, settings.precision, settings.aggregation, settings.batch_size, device, store.run if manifest else None, _devkit(source, settings.devkit))
    crumb = Crumb(crumb_of(store, settings.dataset))
    alone = crumb.deaths > 0 or not cluster.in_this_process(settings.address, settings.actors, census.samples)
    with nullcontext() if alone else crumb.at("the first look"):
        admitted = begin.admit(asked, again(begin.LOOK), again, manifest, classifier, alone, settings.force)
    if manifest is not None:
        return admitted
    with begin.alone(store):
        if (begun := matching(store, settings)) is None:  # or another job has begun it in the meantime, and what it wrote stays
            begin.write(store, admitted, classifier.network)
    return begun or admitted


def crumb_of(store: Store, dataset: str) -> Path:
    return store.run / "datasets" / f".{dataset}.at"


def _devkit(source: Source, given: str | None) -> dict[int, str] | None:
    """What the doctor may need of a devkit that lies with the source; a bad one is no fault of a source that does without."""
    from pipeline.sources.flat_imagenet import devkit_at

    try:
        return devkit_at(source.root, given)
    except BadRequest:
        return None


def refuse_imported(store: Store, dataset: str) -> None:
    """Raises BadRequest for a data set that is called like imported statistics: its own would replace them."""
    path = store.run / "statistics" / f"{dataset}.parquet"
    if dataset not in store.datasets() and path.exists() and Reference.read(path, store.manifest().layers).origin.startswith(IMPORTED):
        raise BadRequest(f"--dataset: '{printable(dataset)}' names imported statistics of this run; call the data set something else")


def take_census(store: Store, settings: Settings, source: Source, every: list[str]) -> Census:
    """Count the shards that are asked for of `every`, and those that were before. Raises BadRequest if a shard is damaged or not what this data set was made from, or if an ID stands twice."""
    known: dict[str, Shard] = {}
    if store.is_counted(settings.dataset):
        before = store.census(settings.dataset)
        if (before.kind, before.root) != (source.kind, source.root):
            raise BadRequest(f"--source: data set '{printable(settings.dataset)}' of this run comes from {printable(before.spec)} ({before.kind} in {printable(before.root)}), not {printable(settings.source)}; give another --dataset or --run")
        known = {shard.name: shard for shard in before.shards}
    asked = every[: settings.shards]
    begun = store.begun(settings.dataset)  # without a census, which may have been lost, that is what says so
    names = asked + [name for name in every[len(asked) :] if name in known or shard_stem(name) in begun]  # not asked for now, and still part of the data set
    refuse_twins(names)
    ids = Ids(source)
    with ThreadPoolExecutor(min(16, len(names))) as pool, ProgressBar("counting shards", len(names), unit="shards") as bar:
        shards, faults = [], []
        for counted in pool.map(lambda name: _count(ids, name), names):
            bar.advance(1)
            if isinstance(counted, BadRequest):
                faults.append(str(counted))
                continue
            shards.append(counted)
    if faults:
        raise BadRequest("\n".join(faults[:3]) + (f" (and {len(faults) - 3} more shards)" if len(faults) > 3 else ""))
    changed = [s.name for s in shards if s.name in known and (known[s.name].version, known[s.name].samples) != (s.version, s.samples)]
    there = set(names)
    lost = [name for name in known if name not in there]
    for what, which in (("changed since this data set was begun", changed), ("part of this data set, but not in --source", lost)):
        if which:
            raise BadRequest(f"--source: {printable(', '.join(which[:3]))} {'is' if what[0] == 'p' else 'has'} {what}; put it back, or extract into another --dataset")
    if not any(shard.samples for shard in shards[: len(asked)]):
        raise BadRequest(f"--source: {printable(settings.source)} holds no sample: give shards that hold some")
    ids.refuse_doubles()
    return Census(settings.source, source.kind, source.root, tuple(shards), settings.max_samples, len(asked))


def _count(ids: Ids, name: str) -> Shard | BadRequest:
    try:
        return ids.census(name)
    except BadRequest as fault:
        return fault


def matching(store: Store, settings: Settings) -> Manifest | None:
    """The run as it was begun, or None if it is new. Raises BadRequest, naming the difference, if other settings are asked for."""
    if not (store.run / "run.json").exists() and not holds_profiles(store.run):
        return None
    manifest = store.manifest()
    engine = None if settings.engine == "auto" else settings.engine
    asked = {"model": settings.model, "aggregation": settings.aggregation, "precision": settings.precision, "engine": engine, "batch_size": settings.batch_size}
    manifest.must_match(asked, store.run)
    lost = not (store.run / "weights.safetensors").exists()
    if settings.preprocess or lost or not _is_same_file(settings.weights, manifest.weights_sha256):
        from pipeline import models

        again = models.load(settings.model, settings.weights, settings.preprocess)
        manifest.must_match({"weights_sha256": again.weights_sha256, "preprocessing": again.preprocessing}, store.run)
        if lost:
            begin.save_weights(store, again.network)
    return manifest


def _is_same_file(weights: str | None, digest: str) -> bool:
    from hashlib import file_digest

    if not weights or not os.path.isfile(weights):
        return False
    with open(weights, "rb") as file:
        return file_digest(file, "sha256").hexdigest() == digest


def only_writer(store: Store, dataset: str):
    """Hold the data set against a second job. Raises BadRequest if another job holds it."""
    return hold(store.run / "datasets" / f".{dataset}.lock", store.run, f"another job is writing {printable(dataset)} of {printable(store.run)}: wait for it, or extract into another --dataset")


def do(store: Store, settings: Settings, manifest: Manifest, census: Census, todo: list[Unit]) -> int:
    """Do every unit of `todo`; returns how many were run. A unit that keeps killing its workers is cut in halves until its cause is alone, and set aside."""
    from pipeline import models

    models.refuse_damaged(store.run / "weights.safetensors", manifest.saved_sha256)  # once, before many engines meet it
    device = cluster.device_for(settings.device, settings.address)

    def give_up(unit: Unit) -> list[Unit]:
        if unit.samples == 1:
            _set_aside(store, source_id(census, unit), unit)
        return unit.halves()

    work = Work(
        settings.dataset, Decoder(census.kind, census.root, manifest.preprocessing, manifest.classes), partial(UnitWriter, store.run, device), store.is_committed, give_up,
        manifest.threads, device, settings.address, settings.actors, crumb_of(store, settings.dataset),
        overlaps=manifest.import_root is None,  # somebody's own code has the thread that made it, which it may want (for signals, or what it keeps for a thread)
    )  # fmt: skip
    return run_units(work, todo, sum(unit.samples for unit in todo), census.samples)


def source_id(census: Census, unit: Unit) -> str:
    """The ID of the only sample of a unit, or its place where even that cannot be read here."""
    from pipeline.sources import reader

    try:
        return next(iter(reader(census.kind, census.root).read(unit.marks, unit.shard, unit.start, unit.stop))).sample_id
    except (OSError, BadRequest, StopIteration):
        return f"{unit.shard}#{unit.start}"


def _set_aside(store: Store, sample_id: str, unit: Unit) -> None:
    """Commit a unit of one sample that cannot be survived: no profile, one reject."""
    import pyarrow as pa

    from pipeline.store import REJECTS, profiles_schema

    reason = f"it killed its worker process {ATTEMPTS} times"
    store.commit(unit, [(profiles_schema(store.manifest().layers.total).empty_table(), pa.table([[sample_id], [unit.shard], [reason]], schema=REJECTS))])


def outcome(store: Store, settings: Settings, units_run: int) -> Outcome:
    """Counted from the files. Raises Stopped if something is missing all the same."""
    progress = store.progress(settings.dataset)
    if progress.pending:
        raise Stopped(f"{progress.pending:,} of {progress.samples:,} samples of {printable(settings.dataset)} are still to do; the same command resumes")
    errors = sum(int((b["label"].to_numpy() != b["prediction"].to_numpy()).sum()) for _, _, b in store.blocks(settings.dataset, ["label", "prediction"], 65536))
    allowed = settings.max_rejects if settings.max_rejects is not None else progress.samples // 100
    return Outcome(progress, 1 - errors / progress.done if progress.done else 0.0, errors, allowed, units_run)

