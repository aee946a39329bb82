"""Options that several verbs of the command take. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from pipeline.errors import BadRequest, printable


def said(option: str, kind: type, metavar: str) -> dict:
    """What typer needs for an option whose empty text, an unset variable in a script, is not taken for none. Raises BadRequest for it."""

    def parse(text: str) -> object:
        if not str(text):
            raise BadRequest(f"{option}: names nothing")
        return kind(text)

    return {"parser": parse, "metavar": metavar}


RunOption = Annotated[Path, typer.Option("--run", help="The run directory.", show_default=False, **said("--run", Path, "<path>"))]
Format = Annotated[str, typer.Option("--format", help="table, json or parquet, on stdout.")]
Name = Annotated[Optional[str], typer.Option("--name", help="Which index. Default: errors, or the only one.")]
Dataset = Annotated[Optional[str], typer.Option(help="Which data set of the run. Default: val, or the only one.")]
Reference = Annotated[Optional[str], typer.Option(**said("--reference", str, "<str>"), help="Whose mu and sigma standardise: a data set of the run, or imported statistics. Default: val, or the data set itself.")]
MaxSamples = Annotated[Optional[int], typer.Option(help="Only N samples, chosen by --seed. Default: all.")]
Seed = Annotated[int, typer.Option(help="Decides every random choice.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard this verb's earlier results, made with other settings.")]
Device = Annotated[Optional[str], typer.Option(help="cpu or cuda. Default: GPUs where there are any now; say cuda for a cluster that starts its GPU nodes on demand.")]
Actors = Annotated[Optional[str], typer.Option(help="How many engines, N or MIN-MAX. Default: one a GPU, or one for every 4 CPUs.")]
Address = Annotated[Optional[str], typer.Option(**said("--address", str, "<str>"), help="local: start Ray here; HOST: join that cluster. Default: RAY_ADDRESS, or this process for small work and Ray here otherwise.")]
Record = Annotated[str, typer.Option("--format", help="table or json, on stdout.")]
Layers = Annotated[Optional[str], typer.Option("--layers", help="A range of layers, FIRST..LAST, both included, or one layer.")]
Chosen = Annotated[Optional[str], typer.Option("--layers", help="Choose filters of these layers alone: FIRST..LAST, both included, or one layer.")]

FileLabel = Annotated[Optional[int], typer.Option(help="Of a FILE: its true class, as a number.")]
FileModel = Annotated[Optional[str], typer.Option(help="Of a FILE without a run: the network, as in extract.")]
FileWeights = Annotated[Optional[str], typer.Option(help="Its weights, as in extract.")]
FilePreprocess = Annotated[Optional[str], typer.Option(help="Its preprocessing, as in extract.")]
Statistics = Annotated[Optional[Path], typer.Option(help="Of a FILE without a run: mu and sigma, a run's statistics/NAME.parquet or published ones (.pth).")]
Aggregation = Annotated[Optional[str], typer.Option(help="abs or signed: how published statistics were aggregated.")]
AnyRun = Annotated[Optional[Path], typer.Option("--run", **said("--run", Path, "<path>"), help="The run directory. A FILE needs none where --model and --statistics are given.", show_default=False)]


def engines(text: str | None) -> tuple[int, int] | None:
    """`N` or `MIN-MAX`."""
    if text is None:
        return None
    least, dash, most = text.partition("-")
    try:
        bounds = int(least), int(most if dash else least)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1]:
        raise BadRequest(f"--actors: '{printable(text)}' is neither a number N from 1 nor a range MIN-MAX")
    return bounds
