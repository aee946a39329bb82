"""Results on stdout: as a table for people, or as JSON or Parquet for programs. Foreign text is made safe in tables, and kept in the others."""

from __future__ import annotations

import json
import sys

from pipeline.errors import BadRequest, printable

FORMATS = ("table", "json", "parquet")


def check(format: str, known: tuple[str, ...] = FORMATS) -> None:
    """Raises BadRequest for a format that the verb does not have, or Parquet onto a terminal."""
    if format not in known:
        raise BadRequest(f"--format: '{printable(format)}' is not one of {', '.join(known)}")
    if format == "parquet" and sys.stdout.isatty():
        raise BadRequest("--format: parquet is no text; send it into a file with > FILE.parquet")


def neighbours(found, format: str) -> None:
    """A `NEIGHBOURS` table."""
    if format == "json":
        _json(found.to_pylist())
    elif format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(found, sink)
        sys.stdout.buffer.write(sink.getvalue())
    else:
        rows = [
            [row["rank"], f"{row['dataset']}:{row['sample_id']}", f"{row['similarity']:.4f}", named(row, "label"), named(row, "prediction"), f"{row['confidence']:.3f}", row["pair"]]
            for row in found.to_pylist()
        ]
        table(["rank", "image", "similarity", "true", "predicted", "confidence", "pair"], rows)


def named(row: dict, key: str) -> str:
    """`7 seven`, or the number alone where the run has no names."""
    name = row.get(f"{key}_name")
    return str(row[key]) if name is None or name == str(row[key]) else f"{row[key]} {name}"


def status(datasets: dict[str, dict], format: str) -> None:
    """Progress of every data set, as in `Progress`."""
    if format == "json":
        _json({"datasets": datasets})
    else:
        keys = ["samples", "done", "pending", "rejected", "images_per_s"]
        table(["data set", *keys[:-1], "images/s"], [[name, *("" if p[key] is None else f"{p[key]:,}" for key in keys)] for name, p in datasets.items()])


def record(values: dict, format: str) -> None:
    """One result of named values."""
    if format == "json":
        _json(values)
    else:
        table(["figure", "value"], [[key, f"{value:.4f}" if isinstance(value, float) else f"{value:,}"] for key, value in values.items()])


def table(head: list[str], rows: list[list]) -> None:
    """A plain table, as wide as its content where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False)
    console.on_broken_pipe = _nobody_reads
    console.print(out)


def _nobody_reads() -> None:
    raise BrokenPipeError  # for the command to end quietly, as with JSON; rich would exit with code 1


def _json(value) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=True))
