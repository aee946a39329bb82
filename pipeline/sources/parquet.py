"""Hugging Face Parquet: one row a sample, `image` = struct{bytes, path} and a whole number `label`, as in `ILSVRC/imagenet-1k`.

The ID is the file name in `path` by the rule of class folders (`ILSVRC2012_val_00000293_n01440764.JPEG` -> `ILSVRC2012_val_00000293`);
where `path` is null it is file and row, `validation-00000-of-00014/000042`. Rows are streamed page by page from the row group
in which a unit begins: no row group, whatever its size, is in memory as a whole (Arrow's pages end after 1,024 rows at the latest).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import BadRequest, printable
from pipeline.sources import Each, RawSample, Shard, Source
from pipeline.sources.classes import sample_id_of
from pipeline.wnids import wnid_in

IMAGE, LABEL = ("image", "img"), ("label", "fine_label")  # names that Hugging Face's own data sets use
ROWS = 16  # that are in memory at once
BUFFER = 1 << 20  # bytes of a column that are


@dataclass(frozen=True)
class HuggingFaceParquet(Source):
    """Reader of Parquet files below `root`."""

    root: str
    kind: ClassVar[str] = "parquet"
    together: ClassVar[int] = ROWS

    def census(self, name: str, each: Each | None = None) -> Shard:
        """Rows of one file from its footer. A handle is [row group, version]; the version is a digest of the footer, which has the size,
        place and bounds of every column chunk."""
        version, marks, samples = self._version(name), [], 0
        with self._open(name) as file:
            self._columns(name, file.schema_arrow)
            for group in range(file.num_row_groups):
                marks.append((samples, [group, version]))
                samples += file.metadata.row_group(group).num_rows
            if each:
                self._show(name, file, each)
        return Shard(name, samples, version, tuple(mark for i, mark in enumerate(marks) if i + 1 == len(marks) or marks[i + 1][0] > mark[0]))

    def _show(self, name: str, file: pq.ParquetFile, each: Each) -> None:
        """IDs of all rows, for which their paths alone are read."""
        image, _ = self._columns(name, file.schema_arrow)
        kind, row = file.schema_arrow.field(image).type, 0
        if not (pa.types.is_struct(kind) and kind.get_field_index("path") >= 0):
            for row in range(file.metadata.num_rows):
                each(self._place(name, row), f"row {row}")
            return
        try:
            for batch in file.iter_batches(1024, columns=[f"{image}.path"], use_threads=False):
                paths = _path_of(batch.column(0))
                for at in range(batch.num_rows):
                    path = _text(paths, at)
                    each((sample_id_of(path) if path else "") or self._place(name, row + at), f"row {row + at}")
                row += batch.num_rows
        except (pa.ArrowException, OSError) as fault:
            raise BadRequest(f"{printable(self._path(name))} cannot be read on from row {row} ({_first_line(fault)}): fetch it again") from None

    def read(self, marks: tuple[tuple[int, object], ...], name: str, start: int, stop: int) -> Iterator[RawSample]:
        position, (first, version) = marks[0]
        if self._version(name) != version:
            raise BadRequest(f"{printable(self._path(name))} is another file than when it was counted: put the old file back, or extract into another --dataset")
        with self._open(name) as file:
            image, label = self._columns(name, file.schema_arrow)
            groups = list(range(first, file.num_row_groups))
            try:
                for batch in file.iter_batches(ROWS, groups, [image, label], use_threads=False) if groups else ():
                    skip = max(0, start - position)
                    contents, paths = _bytes_of(batch.column(0)), _path_of(batch.column(0))
                    for row in range(skip, min(batch.num_rows, stop - position)):
                        path = _text(paths, row)
                        sample_id = (sample_id_of(path) if path else "") or self._place(name, position + row)
                        yield replace(_sample(sample_id, contents[row].as_py(), batch.column(1)[row].as_py(), path is not None), folder=wnid_in(path or "") or "")
                    position += batch.num_rows
                    if position >= stop:
                        return
            except (pa.ArrowException, OSError) as fault:
                raise BadRequest(f"{printable(self._path(name))} cannot be read on from row {position} ({_first_line(fault)}): fetch it again") from None

    def _place(self, name: str, row: int) -> str:
        """The ID of a row that has no path."""
        return f"{os.path.splitext(name)[0]}/{row:06d}"

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def _open(self, name: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._path(name), buffer_size=BUFFER, pre_buffer=False)
        except (pa.ArrowException, OSError) as fault:
            raise BadRequest(f"{printable(self._path(name))} cannot be read as Parquet ({_first_line(fault)}): fetch it again, or leave it out of --source") from None

    def _version(self, name: str) -> str:
        """A digest of the file's size and footer, whose length stands before the last 4 bytes."""
        try:
            with open(self._path(name), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 8))
                footer = int.from_bytes(file.read(4), "little") + 8
                file.seek(max(0, size - footer))
                return hashlib.sha256(b"%d" % size + file.read(min(footer, 64 << 20))).hexdigest()[:16]
        except OSError as fault:
            raise BadRequest(f"{printable(self._path(name))} cannot be read ({_first_line(fault)}): fetch it again, or leave it out of --source") from None

    def _columns(self, name: str, schema: pa.Schema) -> tuple[str, str]:
        """(image column, label column). Raises BadRequest saying in one sentence what is there instead."""
        where = f"{printable(self._path(name))}"
        image, label = (next((c for c in names if c in schema.names), None) for names in (IMAGE, LABEL))
        if image is None or label is None:
            has = printable(", ".join(schema.names[:8]) or "none")
            raise BadRequest(f"{where} has no column '{(LABEL if image else IMAGE)[0]}' (its columns: {has}); rename yours, image being struct{{bytes, path}} and label a whole number")
        if twice := next((c for c in (image, label) if schema.names.count(c) > 1), None):
            raise BadRequest(f"{where} has {schema.names.count(twice)} columns '{twice}': which one is meant? Write the file again with one of them")
        kind = schema.field(image).type
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise BadRequest(f"{where}: column '{image}' is {printable(kind)[:80]}, not struct{{bytes, path}} with the encoded image; write it with datasets' Image feature")
        if not pa.types.is_integer(schema.field(label).type):
            raise BadRequest(f"{where}: column '{label}' is {printable(schema.field(label).type)[:80]}, not a whole number; write it with datasets' ClassLabel feature")
        return image, label


def _bytes_of(images: pa.Array) -> pa.Array:
    """The encoded images of a column, null where it is."""
    return _field(images, "bytes") if pa.types.is_struct(images.type) else images


def _path_of(images: pa.Array) -> pa.Array | None:
    """Their paths as bytes, or None where the column has none."""
    path = _field(images, "path") if pa.types.is_struct(images.type) else None
    return path.cast(pa.binary()) if path is not None and (pa.types.is_string(path.type) or pa.types.is_large_string(path.type)) else None


def _field(images: pa.StructArray, name: str) -> pa.Array | None:
    at = images.type.get_field_index(name)
    return images.flatten()[at] if at >= 0 else None


def _text(paths: pa.Array | None, row: int) -> str | None:
    """The path of a row, None where it has none. Bytes that are no UTF-8 are written as their escapes, as everywhere."""
    path = paths[row].as_py() if paths is not None else None
    return None if path is None else os.fsdecode(path)


def _sample(sample_id: str, content: bytes | None, label: int | None, has_path: bool) -> RawSample:
    if content is None:
        return RawSample(sample_id, fault="the row holds no image bytes" + (", only the path of a file elsewhere" if has_path else ""))
    if label is None:
        return RawSample(sample_id, fault="the row's label is null")
    if label == -1:
        return RawSample(sample_id, fault="its label is -1: this split is published without labels")
    return RawSample(sample_id, content, label)


def _first_line(fault: Exception) -> str:
    return printable((str(fault).strip().splitlines() or [type(fault).__name__])[0][:200])
