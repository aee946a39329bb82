"""An experiment over a run: which samples it looks at, what is gathered for them, and how a unit's rows are committed.

Its unit is a committed profiles file of the data set, and its rows are a file of the same name below `experiments/<name>/`. Again two steps that can
run on different machines: a `Gatherer` reads the wanted profile rows, and their images from the source; a `ResultWriter` computes and commits. An experiment
says what is computed, and knows neither files nor who calls it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.atomic import at
from pipeline.census import Census
from pipeline.errors import BadRequest, Broken, Fault, is_device, printable
from pipeline.manifest import Manifest
from pipeline.samples import Preprocessing, Sample, decode
from pipeline.sources import Shard, reader
from pipeline.store import Store, read_table, whole, write_table
from pipeline.units import Unit, interval_of, shard_stem
from pipeline.worker import Receipt

if TYPE_CHECKING:
    import torch

FACTS = ("sample_id", "label", "prediction")  # of every gathered row
PIXELS = (("height", pa.int32()), ("width", pa.int32()), ("whole_height", pa.int32()), ("whole_width", pa.int32()), ("pixels", pa.binary()), ("reason", pa.string()))  # beside them, where images are asked for
ASIDE = b"set_aside"  # in the metadata of a results file: JSON, [[sample_id, reason], ...]
MADE_WITH = b"settings"  # beside it: the digest of the settings.json that its rows were made with

Rows = Callable[[list[Sample], pa.Table], pa.Table]


class Experiment(Protocol):
    """What is computed of samples. Picklable; equal settings give equal numbers."""

    name: str  # the verb: results lie in experiments/<name>
    images: bool  # whether it needs pixels and the network; if not, nothing but profiles is read
    columns: tuple[str, ...]  # of the profiles, beside `FACTS`
    weight: float  # what one sample is worth in images of an extraction: it decides whether a cluster is started

    @property
    def schema(self) -> pa.Schema:
        """Of its rows; the first column is sample_id."""

    def settings(self) -> dict[str, object]:
        """All that decides its numbers beside run, data set, reference and choice of samples; survives JSON."""

    def start(self, run: Path, device: str) -> Rows:
        """Once a worker: what turns samples, one or more, with the profile rows they belong to, into rows. Samples is empty where no images are asked for."""


@dataclass(frozen=True)
class Choice:
    """Which samples of a data set: misclassified ones (`errors`), `correct` ones, or `all`; of those, whose seeded hash is at most `highest` (None: every one)."""

    subset: str
    seed: int
    highest: int | None = None

    def rows(self, facts: pa.Table | pa.RecordBatch) -> np.ndarray:
        """int64 positions of the chosen among profile rows with `FACTS`."""
        at = self._eligible(facts)
        return at if self.highest is None else at[self.hashes([facts["sample_id"][i].as_py() for i in at]) <= np.uint64(self.highest)]

    def hashes(self, ids: list[str]) -> np.ndarray:
        """uint64 [N]: of seed and ID alone, so that a choice depends on neither order nor units."""
        return np.array([int.from_bytes(hashlib.blake2b(f"{self.seed}:{i}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") for i in ids], np.uint64)

    def _eligible(self, facts: pa.Table | pa.RecordBatch) -> np.ndarray:
        if self.subset == "all":
            return np.arange(facts.num_rows)
        wrong = facts["label"].to_numpy() != facts["prediction"].to_numpy()
        return np.flatnonzero(wrong if self.subset == "errors" else ~wrong)

    @classmethod
    def smallest(cls, store: Store, dataset: str, subset: str, most: int | None, seed: int) -> Choice:
        """All of a subset, or the `most` of it with the smallest hashes over the whole data set."""
        choice = cls(subset, seed)
        if most is None:
            return choice
        hashes = [choice.hashes(batch["sample_id"].take(pa.array(choice._eligible(batch))).to_pylist()) for _, _, batch in store.blocks(dataset, list(FACTS), 65536)]
        values = np.sort(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)
        return cls(subset, seed, int(values[most - 1]) if most < len(values) else None)


@dataclass(frozen=True)
class Named:
    """The samples of these IDs alone, wherever a `Choice` is asked for its rows."""

    sample_ids: frozenset[str]

    def rows(self, facts: pa.Table | pa.RecordBatch) -> np.ndarray:
        """int64 positions of those that are among them."""
        return np.flatnonzero(pc.is_in(facts["sample_id"], pa.array(sorted(self.sample_ids), pa.string())).to_numpy(zero_copy_only=False))

    @classmethod
    def of_each_class(cls, store: Store, dataset: str, subset: str, most: int, seed: int, only: int | None = None) -> Named:
        """Of every label, or of one alone, the `most` samples of a subset with the smallest seeded hashes, or all."""
        choice, nearest = Choice(subset, seed), {}
        for _, _, batch in store.blocks(dataset, list(FACTS), 65536):
            facts = batch.take(pa.array(choice._eligible(batch)))
            ids = facts["sample_id"].to_pylist()
            for label, value, sample_id in zip(facts["label"].to_pylist(), choice.hashes(ids).tolist(), ids):
                if only in (None, label):
                    nearest.setdefault(label, []).append((value, sample_id))
            nearest = {label: sorted(found)[:most] for label, found in nearest.items()}
        return cls(frozenset(sample_id for found in nearest.values() for _, sample_id in found))


def units_of(store: Store, dataset: str, choice: Choice | Named) -> list[tuple[Unit, int]]:
    """(unit, chosen samples in it) for every profiles file that holds any, in the order of the files."""
    shards = {shard_stem(shard.name): shard for shard in store.census(dataset).shards}
    counts: dict[Path, int] = {}
    for file, _, batch in store.blocks(dataset, list(FACTS), 65536):
        counts[file] = counts.get(file, 0) + len(choice.rows(batch))
    found = []
    for file, count in counts.items():
        stem, start, stop = interval_of(file.stem)
        if count and stem not in shards:
            raise BadRequest(f"{printable(file)} belongs to no shard of {printable(dataset)}: extract the data set again with the same command")
        found += [(Unit(dataset, shards[stem].name, start, stop, shards[stem].marks_for(start, stop), shards[stem].version), count)] if count else []
    return found


@dataclass(frozen=True)
class Gatherer:
    """The first step: a unit -> its chosen profile rows, with pixels if `images`. Source, recipe and C as the census and run.json have them."""

    run: Path
    choice: Choice | Named
    columns: tuple[str, ...]
    images: bool
    kind: str
    root: str
    preprocessing: Preprocessing
    classes: int

    @classmethod
    def of(cls, store: Store, dataset: str, choice: Choice | Named, columns: tuple[str, ...], images: bool) -> Gatherer:
        census, manifest = store.census(dataset), store.manifest()
        return cls(store.run, choice, columns, images, census.kind, census.root, manifest.preprocessing, manifest.classes)

    def __call__(self, unit: Unit) -> pa.Table:
        """A row a chosen sample: `FACTS`, `columns`, and `PIXELS`. Metadata: `unit` (JSON), and `fault`, why there is no row at all, or empty. Never raises."""
        table, fault = pa.table({}), ""
        try:
            table = self.gather(unit)
        except (Fault, OSError) as error:
            fault = printable(error)
        except Exception as error:
            fault = f"{printable(unit.shard)} cannot be read at {unit.start}..{unit.stop}: {type(error).__name__}: {printable(error)}"
        return table.replace_schema_metadata({"unit": unit.to_json(marks=False), "fault": fault})

    def gather(self, unit: Unit) -> pa.Table:
        """The same, raising what goes wrong."""
        rows = read_table(self.run / "profiles" / unit.dataset / f"{unit.stem}.parquet", list(dict.fromkeys([*FACTS, *self.columns])))
        rows = rows.take(pa.array(self.choice.rows(rows)))
        if not self.images:
            return rows
        samples = self._read(unit, dict(zip(rows["sample_id"].to_pylist(), rows["label"].to_pylist())))
        shapes = [(*s.pixels.shape[:2], *s.whole) if s.pixels is not None else (0, 0, 0, 0) for s in samples]
        columns = [*map(list, zip(*shapes)), [s.pixels.tobytes() if s.pixels is not None else b"" for s in samples], [s.reason for s in samples]]
        for (name, kind), column in zip(PIXELS, columns):
            rows = rows.append_column(name, pa.array(column, kind))
        return rows

    def _read(self, unit: Unit, wanted: dict[str, int]) -> list[Sample]:
        """The samples with these IDs and labels, in that order; one that is not what it was comes with its reason. Reads no further than the last."""
        found: dict[str, Sample] = {}
        for raw in reader(self.kind, self.root).read(unit.marks, unit.shard, unit.start, unit.stop) if wanted else ():
            if raw.sample_id in wanted and raw.sample_id not in found:
                changed = raw.fault is None and raw.label != wanted[raw.sample_id]
                found[raw.sample_id] = Sample(raw.sample_id, reason=f"its label is {raw.label} now") if changed else decode(raw, self.preprocessing, self.classes)
                if len(found) == len(wanted):
                    break
        return [found.get(i) or Sample(i, reason=f"it is not in {printable(unit.shard)} any more") for i in wanted]


class ResultWriter:
    """The second step: gathered units -> rows, computed on one device and committed."""

    def __init__(self, run: Path, experiment: Experiment, device: str, made_with: str):
        """made_with: the `settings_digest` that the job began with; a worker that outlives its job must not write among the rows of another's."""
        self.run, self.experiment, self.made_with = run, experiment, made_with
        self.rows = experiment.start(run, device)
        self.threads = Store(run).manifest().threads

    def __call__(self, gathered: pa.Table) -> Receipt:
        """The unit's file is there when this returns, or the receipt's fault says why not. Its samples are those that were chosen. Raises Broken."""
        start = time.monotonic()
        about = {key.decode(): value.decode() for key, value in gathered.schema.metadata.items()}
        unit, fault, aside, refused = Unit.from_json(about["unit"]), about["fault"], [], False
        if not fault:
            try:
                if self.experiment.images:  # which a network is to see
                    from pipeline.saliency.threads import have_threads

                    have_threads(self.threads)
                samples, profiles, aside = unpack(gathered)
                schema = self.experiment.schema
                rows = self.rows(samples, profiles).select(schema.names).cast(schema) if profiles.num_rows else schema.empty_table()
                if settings_digest(self.run, self.experiment.name) != self.made_with:
                    raise OSError("its results were discarded for others meanwhile")
                about_rows = {ASIDE: json.dumps(aside), MADE_WITH: self.made_with}
                write_table(results_folder(self.run, self.experiment.name) / f"{unit.stem}.parquet", rows.replace_schema_metadata(about_rows), at("rows", unit))
            except OSError as error:
                fault, refused = f"{printable(self.run)} cannot be written: {printable(error)}", True
            except Exception as error:
                if is_device(error):
                    raise Broken.by(error) from None
                text = str(error).strip().splitlines()
                fault = f"{printable(unit.shard)} {unit.start}..{unit.stop}: {type(error).__name__}: {printable(text[0] if text else '')[:300]}"
        return Receipt(unit.stem, gathered.num_rows, len(aside), time.monotonic() - start, fault, refused)


def unpack(gathered: pa.Table) -> tuple[list[Sample], pa.Table, list[list[str]]]:
    """(samples with pixels, the profile rows they belong to, [sample_id, reason] of those whose image cannot be had any more) of a gathered unit.

    Samples is empty where no images were asked for; the rows are then all of them.
    """
    if "pixels" not in gathered.column_names:
        return [], gathered, []
    reasons = gathered["reason"].to_pylist()
    good = [i for i, reason in enumerate(reasons) if reason is None]
    rows = gathered.take(pa.array(good, pa.int64()))
    shapes = zip(*(rows[name].to_pylist() for name in ("height", "width", "whole_height", "whole_width")))
    samples = [
        Sample(sample_id, label, np.frombuffer(pixels.as_buffer(), np.uint8).reshape(*shape[:2], 3), whole=shape[2:])
        for sample_id, label, pixels, shape in zip(rows["sample_id"].to_pylist(), rows["label"].to_pylist(), rows["pixels"], shapes)
    ]
    return samples, rows.drop_columns([name for name, _ in PIXELS]), [[i, r] for i, r in zip(gathered["sample_id"].to_pylist(), reasons) if r is not None]


def gathered(store: Store, dataset: str, choice: Choice | Named, columns: tuple[str, ...] = ()) -> Iterator[tuple[list[Sample], pa.Table]]:
    """(samples, their profile rows) of a data set, a unit at a time, here: for an experiment that needs images of a second data set. Those that cannot be had are left out."""
    gatherer = Gatherer.of(store, dataset, choice, columns, True)
    for unit, _ in units_of(store, dataset, choice):
        samples, rows, _ = unpack(gatherer.gather(unit))
        yield samples, rows


def batches(samples: list[Sample], most: int) -> Iterator[list[int]]:
    """Positions of samples that share a shape, at most `most` at once."""
    for shape in dict.fromkeys(s.pixels.shape for s in samples):
        alike = [i for i, s in enumerate(samples) if s.pixels.shape == shape]
        yield from (alike[first : first + most] for first in range(0, len(alike), most))


def images_of(samples: list[Sample], preprocessing: Preprocessing, device: str) -> torch.Tensor:
    """float32 [B, 3, H, W] of samples of one shape, as the network takes them."""
    import torch

    return preprocessing.normalise(torch.from_numpy(np.stack([s.pixels for s in samples])).to(device))


def network_of(run: Path, device: str) -> tuple[Manifest, torch.nn.Module]:
    """A run's network on a device, from the run directory alone. Sets the process's threads and precision, as run.json says."""
    from pipeline import models
    from pipeline.saliency import prepare_process

    manifest = Manifest.read(run)
    models.reach(manifest.import_root)
    prepare_process(manifest.threads, manifest.precision)
    return manifest, models.restore(manifest.model, run / "weights.safetensors", manifest.saved_sha256).to(device)


# ---- results -------------------------------------------------------------------------------------------------------


def results_folder(run: Path, name: str) -> Path:
    return run / "experiments" / name


def results(run: Path, name: str) -> list[Path]:
    """The files of an experiment's committed units, sorted; of those alone that were made with the settings that lie beside them."""
    now = settings_digest(run, name)
    return sorted(p for p in results_folder(run, name).glob("*.parquet") if interval_of(p.stem) and _metadata(p).get(MADE_WITH) == now.encode())


def settings_digest(run: Path, name: str) -> str:
    """Of an experiment's settings.json, or of nothing where there is none."""
    path = results_folder(run, name) / "settings.json"
    return hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()[:16]


def _metadata(path: Path) -> dict[bytes, bytes]:
    with whole(path) as parquet:
        return parquet.schema_arrow.metadata or {}


def read_results(run: Path, name: str, schema: pa.Schema) -> pa.Table:
    """All rows of an experiment."""
    tables = [read_table(file).replace_schema_metadata(None) for file in results(run, name)]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def set_aside(run: Path, name: str) -> list[list[str]]:
    """[sample_id, reason] of every sample that an experiment had to leave out."""
    found = []
    for file in results(run, name):
        found += json.loads(_metadata(file).get(ASIDE, b"[]"))
    return found


def changed_shards(census: Census, names: set[str]) -> Iterator[tuple[str, str]]:
    """(shard, what is wrong) for each of `names` that is not what the census saw. Reads headers, no image."""
    source, known = reader(census.kind, census.root), {shard.name: shard for shard in census.shards}
    for name in sorted(names):
        try:
            now: Shard = source.census(name)
        except (BadRequest, OSError) as fault:
            yield name, printable(fault)
            continue
        if (now.version, now.samples) != (known[name].version, known[name].samples):
            yield name, "it has changed since it was extracted"
