"""Results on stdout: as a table for people, or as JSON or Parquet for programs. Foreign text is made safe in tables, and kept in the others."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from jobs.progress import duration, results
from pipeline.errors import BadRequest, printable

if TYPE_CHECKING:
    from jobs.bench.measure import Measure
    from jobs.check import Report
    from jobs.claims import Claim, Finding

FORMATS = ("table", "json", "parquet")


def check_format(format: str, known: tuple[str, ...] = FORMATS) -> None:
    """Raises BadRequest for a format that the verb does not have, or Parquet onto a terminal."""
    if format not in known:
        raise BadRequest(f"--format: '{printable(format)}' is not one of {', '.join(known)}")
    if format == "parquet" and results().isatty():
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
        results().buffer.write(sink.getvalue())
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
        table(["figure", "value"], [[key, _figure(value)] for key, value in values.items()])


def _figure(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items())
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def explained(found: dict, format: str) -> None:
    """What `faultline explain` found."""
    if format == "json":
        _json(found)
        return
    table(["filter", "layer", "channel", "standardised saliency"], [[at, f["layer"], f["filter"], f"{f['standardised']:+.2f}"] for at, f in enumerate(found["filters"], 1)])


def masked(found: dict, format: str) -> None:
    """What `faultline mask` found of one image."""
    if format == "json":
        _json(found)
        return
    head = ["masked", "predicted", "true confidence", "wrong confidence", "the filters' standardised saliency"]
    table(head, [[s["what"], named(s, "prediction"), f"{s['true_confidence']:.3f}", f"{s['wrong_confidence']:.3f}", f"{s['filters_standardised']:+.2f}"] for s in found["steps"]])


def claims(found: list[tuple[Claim, Finding]], page: str, format: str) -> None:
    """What `faultline reproduce` found of each claim, and where its page lies."""
    if format == "json":
        fields = [{"name": claim.name, "short": claim.short, "place": claim.place, "claim": claim.text, "verb": claim.verb, "of_the_paper": not claim.own} | finding.to_json() for claim, finding in found]
        _json({"claims": fields, "page": page})
        return
    table(["place", "claim", "here", "95% interval", "verdict", "why"], [[claim.place, claim.short, finding.ours, finding.interval, finding.verdict, finding.why] for claim, finding in found])


def check(report: Report, format: str) -> None:
    """What the doctor found."""
    r = report
    if format == "json":
        _json(asdict(r) | {"verdict": r.verdict})
        return
    about = f"{'' if r.samples_exact else 'about '}{r.samples:,} samples{'' if r.samples_exact else ' (estimated from the shards that there was time to count)'}"
    promise = f"; the weights promise {r.promised:.3f}" if r.promised is not None else "; nobody promises anything for these weights"
    undone = [["explained by", f"{r.mistake}: {r.top1_undone:.3f} with that undone"]] if r.mistake else []
    rows = [
        ["source", f"{r.kind}, {r.shards:,} shard{'s' * (r.shards != 1)}, {about}"],
        ["labels", f"{r.label_range[0]}..{r.label_range[1]}, {r.labels_seen:,} of {r.classes:,} classes seen; class order {r.class_order}"],
        ["network", f"{r.filters:,} filters in {r.layers} layer{'s' * (r.layers != 1)}, engine {r.engine} on {r.device}"],
        ["top-1", f"{r.top1:.3f} ({r.top1_low:.3f} to {r.top1_high:.3f}) on {r.seen} images spread over the source{promise}"],
        *undone,
        ["cost", f"{r.images_per_s:,.1f} images/s on this machine: {duration(3600 * r.hours)} and {_size(r.bytes)} for all"],
        *(["warning", line] for line in r.warnings),
        *(["remedy" if at else "fault", line] for fault in r.faults for at, line in enumerate(fault.splitlines())),
        ["verdict", r.verdict],
    ]
    table(None, rows)


def _size(count: float) -> str:
    """`14 MB`."""
    unit, size = next(((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if count >= s), ("kB", 1e3))
    return f"{count / size:.3g} {unit}"


def timings(rows: list[dict], format: str) -> None:
    """Rows of `bench`."""
    if format == "json":
        _json(rows)
        return
    shown = [[r["model"], r["engine"], str(r["batch_size"]), f"{r['images_per_s']:,.1f}", f"{r['ratio_to_step']:.2f}", "" if r["peak_bytes"] is None else _size(r["peak_bytes"]), "" if r["relative_error"] is None else f"{r['relative_error']:.1e}"] for r in rows]
    table(["network", "engine", "batch", "images/s", "ratio to the step", "memory", "error"], shown)


def measures(rows: list[Measure], format: str) -> None:
    """Rows of `bench index` and `bench pipeline`."""
    if format == "json":
        _json([asdict(row) for row in rows])
        return
    table(["what", "measured", "beside", "", "ratio"], [[r.what, _number(r.value, r.unit), r.beside or "", "" if r.floor is None else _number(r.floor, r.unit), "" if r.ratio is None else f"{r.ratio:.2f}"] for r in rows])


def _number(value: float, unit: str) -> str:
    return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def table(head: list[str] | None, rows: list[list]) -> None:
    """A plain table, as wide as its content where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(box=None, pad_edge=False, header_style="bold", show_header=head is not None)
    for name in head or [""] * len(rows[0]):
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(file=results(), width=None if results().isatty() else 400, highlight=False)
    console.on_broken_pipe = _nobody_reads
    console.print(out)


def _nobody_reads() -> None:
    raise BrokenPipeError  # for the command to end quietly, as with JSON; rich would exit with code 1


def _json(value) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=True), file=results())
