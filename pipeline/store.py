"""The files of a run: how profiles and rejects are written, listed and read back. `docs/format.md` is this file in prose.

A unit is committed by one rename. Its rejects are written first, its profiles file, even one without rows, last; that rename is
the commit. Names that no reader matches are used until then, so every `*.parquet` is whole and final at every moment. Rows are
written beside what computes the next ones: a GPU does not wait for the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.atomic import at, regular, replace_file, replacing, write_json
from pipeline.census import PLACE, Census
from pipeline.errors import BadRequest, printable
from pipeline.manifest import Manifest, read_json
from pipeline.units import Unit, apart, interval_of, plan, shard_stem

REJECTS = pa.schema([("sample_id", pa.string()), ("shard", pa.string()), ("reason", pa.string())])

FORMAT = {"compression": "zstd", "write_page_checksum": True}
SALIENCY = {"use_dictionary": ["label", "prediction", "shard"], "use_byte_stream_split": ["saliency.list.element"]}  # of floats no two are the same: split into streams of their first bytes, their second ones and so on, they pack smaller, and sooner
ROW_GROUP = 8 << 20  # bytes of profiles that are written at a time, while the next are computed
MADE_BY, MADE_OF = b"run", b"shard"  # in the metadata of a profiles file: the fingerprint of the run that made it, and the version of the shard that it was made of


def profiles_schema(filters: int) -> pa.Schema:
    """One row a sample. saliency is s̄, float32 [F], not standardised; thumbnail a JPEG, longest side at most 128."""
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("label", pa.int32()),
            ("prediction", pa.int32()),
            ("label_confidence", pa.float32()),
            ("prediction_confidence", pa.float32()),
            ("loss", pa.float32()),
            ("saliency", pa.list_(pa.field("element", pa.float32()), filters)),
            ("thumbnail", pa.binary()),
            ("shard", pa.string()),
        ]
    )


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file. (`pq.read_table` would load pyarrow's dataset machinery, and pandas with it.)"""
    with whole(path) as parquet:
        return parquet.read(columns)


@contextmanager
def whole(path: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file, its checksums verified as it is read. Raises BadRequest naming it if it is damaged, with the remedy."""
    try:
        with pq.ParquetFile(regular(path), page_checksum_verification=True) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as fault:
        reason = str(fault).splitlines()[0][:120] if str(fault) else type(fault).__name__
        raise BadRequest(f"{printable(path)} is damaged ({printable(reason)}): remove it, and give the command that made it again") from None


def saliency_of(table: pa.Table | pa.RecordBatch) -> np.ndarray:
    """The saliency column as float32 [N, F]."""
    column = table.column(table.schema.get_field_index("saliency"))
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, column.type.list_size)


@dataclass(frozen=True)
class Progress:
    """samples = done + pending + rejected; images_per_s of the last stretch of work, None before two units are done."""

    samples: int
    done: int
    pending: int
    rejected: int
    images_per_s: float | None


class Store:
    """A run directory. Holds paths alone; every answer is read from the files as they are now."""

    def __init__(self, run: str | Path):
        self.run = Path(run)

    def manifest(self) -> Manifest:
        return Manifest.read(self.run)

    # ---- data sets ---------------------------------------------------------------------------------------------

    def datasets(self) -> list[str]:
        """Names, sorted; of those, too, whose census is gone, while their profiles are there."""
        known = {p.stem for p in (self.run / "datasets").glob("*.json") if not p.name.startswith(".")}
        return sorted(known | {p.name for p in (self.run / "profiles").glob("*") if any(p.glob("*.parquet"))})

    def is_counted(self, dataset: str) -> bool:
        """Whether it has a census."""
        return (self.run / "datasets" / f"{dataset}.json").exists()

    def census(self, dataset: str) -> Census:
        """Raises BadRequest if the run has no such data set."""
        path = self.run / "datasets" / f"{dataset}.json"
        if not path.exists() and dataset in self.datasets():
            raise BadRequest(f"{printable(path)} is gone, which says what {printable(dataset)} is made of: give its faultline extract command again, which counts its shards anew")
        if not path.exists():
            raise BadRequest(f"there is no data set '{printable(dataset)}' in {printable(self.run)}; it has: {', '.join(self.datasets()) or 'none yet (faultline extract makes one)'}")
        remedy = f"remove it, and give the faultline extract command of {printable(dataset)} again, which counts its shards anew"
        fields = read_json(path, remedy, PLACE)
        try:
            return Census.from_json(fields)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BadRequest(f"{printable(path)} cannot be read (it is no census): {remedy}") from None

    def write_census(self, dataset: str, census: Census) -> None:
        write_json(self.run / "datasets" / f"{dataset}.json", census.to_json(), "census", PLACE)

    def todo(self, dataset: str, unit_samples: int) -> list[Unit]:
        """The units that are not committed, in order."""
        census, files = self._listed(dataset)
        return plan(dataset, census.asked, [f.stem for f in files], unit_samples, census.limit)

    def progress(self, dataset: str) -> Progress:
        """Counted from the footers of the files that exist. Raises BadRequest for those that are no unit's."""
        census, files = self._listed(dataset)
        pending = sum(unit.samples for unit in plan(dataset, census.asked, [f.stem for f in files], 1 << 30, census.limit))
        rows, rejected = self._rows(dataset, census, files), [rows_of(self.run / "rejects" / dataset / f.name) for f in files]
        for file, done, aside in zip(files, rows, rejected):
            _, start, stop = interval_of(file.stem)
            if done + aside != stop - start:
                raise BadRequest(f"{printable(file)} and its rejects hold {done} and {aside} samples, not {stop - start} together: one of them is another run's; remove both, and give the faultline extract command of {printable(dataset)} again")
        return Progress(sum(rows) + sum(rejected) + pending, sum(rows), pending, sum(rejected), _rate(files))

    # ---- units -------------------------------------------------------------------------------------------------

    def files(self, dataset: str) -> list[Path]:
        """Profile files of the committed units, in the order of their names. No sample is in two of them.

        Without its rejects file a unit is not whole, and of units that overlap (see `units.apart`) the others do not count. Raises BadRequest for a unit that is none of
        this data set, whose census, where it has one, must know its shard.
        """
        return self._listed(dataset, self.is_counted(dataset))[1]

    def _listed(self, dataset: str, counted: bool = True) -> tuple[Census | None, list[Path]]:
        """(census, `files`). Raises BadRequest where there is no census, unless that is known."""
        names = self._names("profiles", dataset) & self._names("rejects", dataset)
        census = self.census(dataset) if counted else None  # read after the names: a shard is counted before a unit of it is committed
        if census:
            self.refuse_strangers(dataset, census, names)
        return census, [self.run / "profiles" / dataset / f"{stem}.parquet" for stem in sorted(apart(names))]

    def refuse_strangers(self, dataset: str, census: Census, stems: Iterable[str] | None = None) -> None:
        """Raises BadRequest for a unit, of those committed or of `stems`, that lies in no shard of the census: somebody has put it there, or the census in its place."""
        known = {shard_stem(shard.name): shard.samples for shard in census.shards}
        stems = self._names("profiles", dataset) if stems is None else stems
        strangers = [(stem, shard) for stem in stems for shard, _, stop in [interval_of(stem)] if stop > known.get(shard, -1)]
        if strangers:
            stem, shard = min(strangers)
            what = f"the shard that it is part of has {known[shard]:,} samples" if shard in known else "none of the shards is its own"
            raise BadRequest(f"{printable(self.run / 'profiles' / dataset / stem)}.parquet is no unit of {printable(census.spec)}, of which {printable(dataset)} is made: {what}; remove it, and the file of that name in rejects, or extract into another --dataset")

    def refuse_others(self, dataset: str, census: Census) -> None:
        """The same, and for profiles that were not made of the census' shards, or by this run, and for what lies where their folders should. Reads the footer of every file."""
        for folder in ("profiles", "rejects"):
            for path in (self.run / folder, self.run / folder / dataset):
                if path.exists() and not path.is_dir():
                    raise BadRequest(f"{printable(path)} is no folder, and {folder} belong into one: remove it, and give the same command again")
        self.refuse_strangers(dataset, census)
        self._rows(dataset, census, [self.run / "profiles" / dataset / f"{stem}.parquet" for stem in sorted(self._names("profiles", dataset))])

    def _rows(self, dataset: str, census: Census, files: list[Path]) -> list[int]:
        """Rows of profiles files. Raises BadRequest for one that is not this data set's."""
        must_be_ours, rows = self._judge(dataset, census), []
        for file in files:
            with whole(file) as parquet:
                must_be_ours(file, parquet.schema_arrow)
                rows.append(parquet.metadata.num_rows)
        return rows

    def begun(self, dataset: str) -> set[str]:
        """Stems of the shards of which a unit is there."""
        return {interval_of(stem)[0] for stem in self._names("profiles", dataset)}

    def _names(self, folder: str, dataset: str) -> set[str]:
        """Stems of the files of units that are visible now."""
        return {p.stem for p in (self.run / folder / dataset).glob("*.parquet") if interval_of(p.stem)}

    def committed(self, dataset: str) -> list[str]:
        """Stems of the committed units."""
        return [p.stem for p in self.files(dataset)]

    def is_committed(self, unit: Unit) -> bool:
        return all((self.run / folder / unit.dataset / f"{unit.stem}.parquet").exists() for folder in ("profiles", "rejects"))

    def commit(self, unit: Unit, parts: Iterable[tuple[pa.Table, pa.Table]]) -> int:
        """Write a unit as (profiles, rejects) of one stretch of it after the other, the one written while the next is computed; how many rejects there are.

        Raises OSError (no space, read-only) and what `parts` raises, and then nothing of the unit is visible.
        """
        profiles, rejects = (self.run / folder / unit.dataset / f"{unit.stem}.parquet" for folder in ("profiles", "rejects"))
        aside = []
        with replacing(profiles, at("profiles", unit)) as partial:
            _write_rows(partial, _noting(parts, aside, unit.version))
            partial.stat()  # a folder that was moved away meanwhile is not begun anew at its old place
            write_table(rejects, pa.concat_tables(aside), at("rejects", unit))
        return sum(map(len, aside))

    def sweep(self, dataset: str) -> None:
        """Remove what is no part of a committed unit: what attempts that died left behind, rejects whose profiles never came, and units that overlap others.

        Call while this job holds the data set and none of its own units is at work. A straggler of a job that died may lose a file to it, and then commits nothing.
        """
        counted = {file.stem for file in self.files(dataset)}
        for stale in (self.run / "datasets").glob(f".{dataset}.json.{'[0-9a-f]' * 8}.tmp"):
            stale.unlink(missing_ok=True)
        for folder in ("profiles", "rejects"):  # in this order: a unit whose profiles are gone is not whole, at any moment in between
            for stale in (self.run / folder / dataset).glob(".*.tmp"):
                stale.unlink(missing_ok=True)
            for stem in self._names(folder, dataset) - counted:
                (self.run / folder / dataset / f"{stem}.parquet").unlink(missing_ok=True)

    # ---- reading -----------------------------------------------------------------------------------------------

    def blocks(self, dataset: str, columns: list[str], rows: int = 256) -> Iterator[tuple[Path, int, pa.RecordBatch]]:
        """(file, position of its first row in the file, batch of at most `rows`) over all profiles, in a fixed order."""
        census, files = self._listed(dataset, self.is_counted(dataset))
        must_be_ours = self._judge(dataset, census)
        for file in files:
            position = 0
            with whole(file) as parquet:
                must_be_ours(file, parquet.schema_arrow)
                for batch in parquet.iter_batches(rows, columns=columns):
                    if hole := next((name for name, column in zip(batch.schema.names, batch.columns) if column.null_count), None):
                        raise BadRequest(f"{printable(file)} is no file of profiles: a {hole} is missing in row {position + batch.column(hole).is_null().index(True).as_py()}; {self._again(dataset)}")
                    yield file, position, batch
                    position += batch.num_rows

    def _judge(self, dataset: str, census: Census | None) -> Callable[[Path, pa.Schema], None]:
        """What raises BadRequest for profiles of other settings or another source, and for columns that are no profile's."""
        manifest, again = self.manifest(), self._again(dataset)
        own, schema = manifest.fingerprint, profiles_schema(manifest.layers.total)
        versions = {shard_stem(shard.name): shard.version for shard in census.shards} if census else {}

        def must_be_ours(file: Path, found: pa.Schema) -> None:
            made = {key: value.decode() for key, value in (found.metadata or {}).items() if key in (MADE_BY, MADE_OF)}
            if made.get(MADE_BY, own) != own:
                raise BadRequest(f"{printable(file)} was made with other settings than run.json states: it, or run.json, is another run's; put the right one back, or {again}")
            version = versions.get(interval_of(file.stem)[0])
            if made.get(MADE_OF, version) != version and version is not None:
                raise BadRequest(f"{printable(file)} was made of another shard than {printable(census.spec)} holds now: give the --source that {printable(dataset)} was begun with, or another --dataset; or {again}")
            for field in schema:
                column = found.get_field_index(field.name)
                if column < 0 or found.field(column).type != field.type:
                    raise BadRequest(f"{printable(file)} is no file of profiles: its column {field.name} {'is missing' if column < 0 else f'is of {found.field(column).type}, not of {field.type}'}; {again}")

        return must_be_ours

    @staticmethod
    def _again(dataset: str) -> str:
        return f"remove this one and give the faultline extract command of {printable(dataset)} again"

    def profiles(self, dataset: str):
        """The profiles as a pyarrow dataset."""
        import pyarrow.dataset as ds  # brings pandas along, a second that a query need not pay

        self.census(dataset)
        return ds.dataset([str(f) for f in self.files(dataset)], schema=profiles_schema(self.manifest().layers.total), format="parquet")

    def rejects(self, dataset: str) -> pa.Table:
        """sample_id, shard, reason of every sample set aside by a committed unit."""
        tables = [read_table(self.run / "rejects" / dataset / f.name) for f in self.files(dataset)]
        return pa.concat_tables(tables) if tables else REJECTS.empty_table()


def rows_of(path: Path) -> int:
    """Rows of a Parquet file, from its footer."""
    with whole(path) as parquet:
        return parquet.metadata.num_rows


def _noting(parts: Iterable[tuple[pa.Table, pa.Table]], aside: list[pa.Table], version: str) -> Iterator[pa.Table]:
    """Profiles of the parts, which say what they were made of; their rejects go to `aside`."""
    for profiles, rejects in parts:
        aside.append(rejects)
        yield profiles.replace_schema_metadata({**(profiles.schema.metadata or {}), **({MADE_OF: version.encode()} if version else {})})


def _write_rows(path: Path, tables: Iterable[pa.Table]) -> None:
    """One Parquet file of tables, one after the other as they come, at least one. `ROW_GROUP` bytes of them at a time are written beside the caller, who makes the next meanwhile and does not wait."""
    waiting, writes, file = [], [], None
    try:
        with ThreadPoolExecutor(1) as beside:
            try:
                for table in tables:
                    file = file or pq.ParquetWriter(path, table.schema, **FORMAT, **SALIENCY)
                    waiting.append(table)
                    if sum(t.nbytes for t in waiting) >= ROW_GROUP:
                        [write.result() for write in writes if write.done()]
                        writes.append(beside.submit(file.write_table, pa.concat_tables(waiting), 1024))
                        waiting = []
                [write.result() for write in writes]
                if waiting and (not writes or any(map(len, waiting))):
                    file.write_table(pa.concat_tables(waiting), 1024)
            except BaseException:
                [write.cancel() for write in writes]
                raise
        file.close()
    except BaseException:
        if file:
            file.is_open = False  # it is left as it is: closed while the other thread still writes, which a signal makes possible, it would end the process
        raise


def write_table(path: Path, table: pa.Table, reach: Callable[[str], None] | None = None) -> None:
    """A Parquet file with checksums, whole or not at all. reach: as of `replace_file`. Raises OSError."""
    replace_file(path, lambda partial: pq.write_table(table, partial, row_group_size=1024, **FORMAT), reach)


def _rate(files: list[Path]) -> float | None:
    """Images a second over the last stretch of commits: the times of the files, long pauses between jobs left out."""
    stamps = sorted((f.stat().st_mtime, interval_of(f.stem)) for f in files)
    steps = [(b - a, stop - start) for (a, _), (b, (_, start, stop)) in zip(stamps, stamps[1:])]
    if not steps:
        return None
    pause = 10 * sorted(gap for gap, _ in steps)[len(steps) // 2] + 1
    steady = [(gap, samples) for gap, samples in steps if gap <= pause]
    seconds = sum(gap for gap, _ in steady)
    return round(sum(samples for _, samples in steady) / seconds, 2) if seconds > 0.5 else None  # less: copied, or too short to tell
