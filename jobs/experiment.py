"""A verb of the paper's evidence as a job over a run: what it costs, rows of every unit, then the numbers, the figures and one sentence.

What is done is what exists below `experiments/<verb>/`: settings.json says what the rows were computed with, and other settings are refused; a file a unit;
summary.json, written once all units are there, holds the numbers behind the figures. The same command again resumes, and is free when all is there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from index.build import ensure_reference, profiles_digest
from jobs import cluster
from jobs.progress import say, stages
from jobs.work import Work, run_units, undone
from pipeline.atomic import write_json
from pipeline.errors import BadRequest, printable
from pipeline.experiment import Choice, Experiment, Gatherer, ResultWriter, changed_shards, read_results, results, results_folder, set_aside, settings_digest, units_of, unpack
from pipeline.locks import hold
from pipeline.manifest import read_json
from pipeline.samples import Sample
from pipeline.statistics import Reference
from pipeline.store import Store
from pipeline.units import Unit


@dataclass(frozen=True)
class Request:
    """What every verb can be told. dataset None: `val`, or the only one; reference None: `val`, or the data set itself; max_samples None: all."""

    run: Path
    dataset: str | None = None
    reference: str | None = None
    max_samples: int | None = None
    seed: int = 0
    fresh: bool | None = False  # None: earlier results are replaced where they were made with other settings
    device: str | None = None
    actors: tuple[int, int] | None = None
    address: str | None = None
    option: str = "--dataset"  # the one that `dataset` was given with
    rehearsed: bool = False  # nothing is done: `carry_out` gives a `Rehearsal` of it

    def check(self) -> None:
        """Raises BadRequest with every fault of the settings together."""
        faults = []
        if self.max_samples is not None and self.max_samples < 1:
            faults.append(f"--max-samples: {self.max_samples} is less than 1")
        if self.seed < 0:
            faults.append(f"--seed: {self.seed} is less than 0")
        if self.device not in (None, "cpu", "cuda"):
            faults.append(f"--device: '{printable(self.device)}' is not one of cpu, cuda")
        if faults:
            raise BadRequest("\n".join(faults))

    def dataset_of(self, store: Store) -> str:
        """The data set that is meant, finished. Raises BadRequest if it is not."""
        known = store.datasets()
        dataset = self.dataset or ("val" if "val" in known else known[0] if len(known) == 1 else None)
        if dataset is None:
            raise BadRequest(f"--dataset: say which of {', '.join(map(printable, known)) or 'none yet (faultline extract makes one)'}")
        progress = store.progress(dataset)
        if progress.pending:
            raise BadRequest(f"{printable(dataset)} is unfinished: {progress.pending:,} of {progress.samples:,} samples are still to do; run its faultline extract command again first")
        return dataset

    def reference_of(self, store: Store, dataset: str) -> str:
        return self.reference or ("val" if "val" in store.datasets() else dataset)


class OtherSettings(BadRequest):
    """What lies there was computed with other settings. `differences`: which, as text."""

    def __init__(self, message: str, differences: str):
        super().__init__(message)
        self.differences = differences


@dataclass(frozen=True)
class Rehearsal:
    """What a verb would do: its cost in words, and how many of its units are left; with none left its numbers are there, or can be made at once."""

    cost: str
    left: int
    units: int


class Verb(Protocol):
    """One experiment, and what is made of its rows."""

    experiment: Experiment
    subset: str  # of the data set: errors, correct or all
    figures: tuple[str, ...]  # their names, without .png and .svg
    also: tuple[str, ...]  # further data sets whose profiles it reads, and their images where it needs images

    def check(self, store: Store, samples: list[Sample]) -> None:
        """Where it needs images, with a few of them, before anything is done. Raises BadRequest if it cannot be done with this network."""

    def cost(self, samples: int) -> str:
        """Said before anything is computed: how much work it is."""

    def summarise(self, store: Store, dataset: str, reference: Reference, rows: pa.Table) -> dict:
        """The numbers behind the figures, for JSON; under `found` the sentence that says what was found, under `result` what goes to stdout."""

    def draw(self, store: Store, summary: dict, folder: Path) -> None:
        """Draw all figures of a summary into `folder`, each as .png and .svg."""


def carry_out(verb: Verb, request: Request) -> dict | Rehearsal:
    """Do what is left to do and return the summary; of a rehearsed request a `Rehearsal`. Raises BadRequest before anything is done (`OtherSettings` where earlier results stand in the
    way), Stopped once something is (the same command resumes)."""
    request.check()
    store = Store(request.run.expanduser().absolute())
    manifest = store.manifest()
    dataset = request.dataset_of(store)
    name, experiment = verb.experiment.name, verb.experiment
    reference_name = request.reference_of(store, dataset)
    reference = standards(store, reference_name, manifest.aggregation)
    choice = Choice.smallest(store, dataset, verb.subset, request.max_samples, request.seed)
    chosen = units_of(store, dataset, choice)
    samples = sum(count for _, count in chosen)
    if not samples:
        raise BadRequest(f"{request.option}: {printable(dataset)} has no {'misclassified sample' if verb.subset == 'errors' else 'sample'}: there is nothing to look at; name another data set")
    settings = _settings(store, experiment, verb, request, dataset, reference_name)
    fresh = _discards(store, name, settings, request.fresh, request.rehearsed)
    folder = results_folder(store.run, name)
    if request.rehearsed:
        there = set() if fresh or not (folder / "settings.json").exists() else {file.stem for file in results(store.run, name)}
        return Rehearsal(verb.cost(samples), sum(unit.stem not in there for unit, _ in chosen), len(chosen))
    with hold(folder / ".lock", store.run, f"another job is writing {printable(folder)}: wait for it"):
        fresh = fresh or not (folder / "settings.json").exists()
        done = set() if fresh else {file.stem for file in results(store.run, name)}
        todo = [(unit, count) for unit, count in chosen if unit.stem not in done]
        if experiment.images and todo:
            refuse_changed_source(store, dataset, {unit.shard for unit, _ in todo})
            for other in verb.also:
                refuse_changed_source(store, other, {shard.name for shard in store.census(other).asked})
            verb.check(store, unpack(Gatherer.of(store, dataset, choice, (), True).gather(todo[0][0]))[0][:3])
        device = cluster.device_for(request.device if experiment.images else "cpu", request.address) if todo else "cpu"
        if fresh:  # nothing is left that could be refused
            _discard(folder, verb.figures)
        if todo:
            say(f"{name}: {verb.cost(samples)}" + (f"; {len(done)} of {len(chosen)} units are done" if done else ""))
            _do(store, experiment, request, dataset, choice, todo, samples, settings, device)
        summary = _summary(verb, store, dataset, reference, settings, {unit.stem for unit, _ in chosen})
    for sample_id, reason in summary["set_aside"][:3]:
        say(f"{printable(sample_id)} was set aside: {printable(reason)}")
    if len(summary["set_aside"]) > 3:
        say(f"and {len(summary['set_aside']) - 3:,} more (summary.json lists them all)")
    return summary


def standards(store: Store, name: str, aggregation: str) -> Reference:
    """mu and sigma under that name, made where they are missing. Raises BadRequest for an unknown name or another aggregation."""
    reference = ensure_reference(store, name, stages())
    if reference.aggregation != aggregation:
        raise BadRequest(f"--reference: {printable(name)} was aggregated as '{reference.aggregation}', this run as '{aggregation}'; the two are never mixed")
    return reference


def _settings(store: Store, experiment: Experiment, verb: Verb, request: Request, dataset: str, reference: str) -> dict:
    """Everything that decides the rows, as settings.json has it."""
    statistics = (store.run / "statistics" / f"{reference}.parquet").read_bytes()
    asked = {"dataset": dataset, "reference": reference, "subset": verb.subset, "max_samples": request.max_samples, "seed": request.seed} | experiment.settings()
    found = {"run": store.manifest().fingerprint, "profiles": [profiles_digest(store, d) for d in (dataset, *verb.also)], "statistics_sha256": hashlib.sha256(statistics).hexdigest()}
    return json.loads(json.dumps(asked | found))


def _discards(store: Store, name: str, settings: dict, fresh: bool | None, quiet: bool = False) -> bool:
    """Whether what lies there is to be discarded. Raises OtherSettings, naming the difference, if it was computed with other settings and nobody said so."""
    path = results_folder(store.run, name) / "settings.json"
    if fresh or not path.exists():
        return bool(fresh)
    before = read_json(path, "add --fresh to discard what lies there, and compute it anew")
    words = {"run": "the run itself has changed", "profiles": f"the profiles of {' or '.join(map(printable, (settings['dataset'], *settings.get('datasets', ()))))} have changed", "annotations": "the annotations have changed", "statistics_sha256": f"the statistics of {printable(settings['reference'])} have changed"}
    faults = [words.get(key) or f"{key.replace('_', ' ')} {_short(before.get(key))}, not {_short(settings.get(key))}" for key in dict.fromkeys([*settings, *before]) if before.get(key) != settings.get(key)]
    if faults and fresh is False:
        raise OtherSettings(f"{printable(path.parent)} was made with other settings: {'; '.join(faults)}. Ask for the same again, or add --fresh to discard what is there", "; ".join(faults))
    if faults and not quiet:
        say(f"{printable(path.parent)} is made anew: {'; '.join(faults)}")
    return bool(faults)


def _short(value: object) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _discard(folder: Path, figures: tuple[str, ...]) -> None:
    """Results of this verb alone, and its figures; the settings last, so that rows never lie under others."""
    drawn = [folder / f"{figure}{end}" for figure in figures for end in (".png", ".svg")]
    _sweep(folder)
    for path in [*folder.glob("*.parquet"), *drawn, folder / "summary.json", folder / "settings.json"]:
        path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """What a job left half written that died here. Call while this one holds the experiment."""
    for stale in folder.glob(".*.tmp"):
        stale.unlink(missing_ok=True)


def refuse_changed_source(store: Store, dataset: str, shards: set[str]) -> None:
    """Raises BadRequest naming a shard that is not what was extracted."""
    census = store.census(dataset)
    for shard, reason in changed_shards(census, shards):
        raise BadRequest(f"the images of {printable(dataset)} are read again, and {printable(Path(census.root) / shard)} is not what was extracted: {reason}; put it back, or extract {printable(census.spec)} into another --run")


def _do(store: Store, experiment: Experiment, request: Request, dataset: str, choice: Choice, todo: list[tuple[Unit, int]], total: int, settings: dict, device: str) -> None:
    folder = results_folder(store.run, experiment.name)
    (folder / "summary.json").unlink(missing_ok=True)
    write_json(folder / "settings.json", settings)
    _sweep(folder)

    def give_up(unit: Unit) -> list[Unit]:
        raise undone(experiment.name, 1, f"{unit.stem}: its workers died without a word (out of memory?)")

    work = Work(
        experiment.name, Gatherer.of(store, dataset, choice, experiment.columns, experiment.images), partial(ResultWriter, store.run, experiment, device, settings_digest(store.run, experiment.name)),
        lambda unit: (folder / f"{unit.stem}.parquet").exists(), give_up, store.manifest().threads, device, request.address, request.actors, folder / ".at",
    )  # fmt: skip
    samples = sum(count for _, count in todo)
    run_units(work, [unit for unit, _ in todo], samples, total, round(samples * experiment.weight))


def _summary(verb: Verb, store: Store, dataset: str, reference: Reference, settings: dict, stems: set[str]) -> dict:
    """As it was written, or made now from the rows; figures that are not there are drawn."""
    name = verb.experiment.name
    folder = results_folder(store.run, name)
    figures = [folder / f"{figure}{suffix}" for figure in verb.figures for suffix in (".png", ".svg")]
    path, remedy = folder / "summary.json", "remove it, and give the same command again, which makes it anew"
    if not path.exists() or read_json(path, remedy).get("settings") != settings:  # or another run's
        missing = stems - {file.stem for file in results(store.run, name)}
        if missing:
            raise undone(name, len(missing), f"{sorted(missing)[0]} is not there")
        rows = read_results(store.run, name, verb.experiment.schema)
        aside = set_aside(store.run, name)
        if not rows.num_rows:
            raise BadRequest(f"none of the images that {name} needs can be read any more: {printable(aside[0][0])}: {printable(aside[0][1])}")
        summary = verb.summarise(store, dataset, reference, rows) | {"set_aside": aside, "settings": settings}
        for figure in figures:
            figure.unlink(missing_ok=True)
        write_json(folder / "summary.json", summary)
    summary = read_json(path, remedy)
    if not all(figure.exists() for figure in figures):
        _sweep(folder)
        verb.draw(store, summary, folder)
    say(f"figures: {printable(folder)}/{{{','.join(verb.figures)}}}.{{png,svg}}")
    return summary
