"""The command's `bench` verbs: one thin function a benchmark. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Optional

import typer

from jobs.options import Device, Record
from pipeline.errors import BadRequest

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Timings, as ratios in one run.")


@app.command()
def engine(
    networks: Annotated[Optional[str], typer.Option("--models", help="Names of networks, separated by commas. Default: resnet50,vgg19,densenet121,mobilenet_v2,resnet56.")] = None,
    engines: Annotated[Optional[str], typer.Option(help="Of step, step-folded, fused, vmap, loop, step-teams, step-plain, fused-unfolded, and the peers opacus-hooks, opacus-functorch, opacus-ew, backpack (pip install 'faultline[bench]'). Default: the first five.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Images of one forward. Default: that of a run.")] = None,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "fp32",
    rounds: Annotated[int, typer.Option(help="Turns that each takes; who has taken twice as long as the step in 3 or more takes no more. Medians are compared, each to the step's of the same rounds.")] = 5,
    format: Record = "table",
) -> None:
    """What filter saliency costs beside one plain training step of the same network."""
    from jobs import output
    from jobs.bench import engine as bench

    output.check_format(format, ("table", "json"))
    rows = bench.bench_engine(_words("--models", networks, bench.MODELS), batch_size, device, precision, rounds, _words("--engines", engines, bench.CONTENDERS))
    output.timings(list(bench.records(rows)), format)


@app.command()
def index(
    rows: Annotated[int, typer.Option(help="Vectors.")] = 10_000,
    filters: Annotated[int, typer.Option(help="Numbers of a vector.")] = 2_032,
    rounds: Annotated[int, typer.Option(help="Turns that each takes; medians are compared.")] = 5,
    format: Record = "table",
) -> None:
    """What an index costs to build and to ask, in batches and by one ID, warm and as a cold command."""
    from jobs import output
    from jobs.bench.index import bench_index

    output.check_format(format, ("table", "json"))
    output.measures(bench_index(rows, filters, rounds), format)


@app.command()
def maps(
    networks: Annotated[Optional[str], typer.Option("--models", help="Names of networks, separated by commas. Default: resnet50,squeezenet1_1,resnet56.")] = None,
    device: Device = None,
    rounds: Annotated[int, typer.Option(help="Turns that each takes; medians are compared.")] = 3,
    format: Record = "table",
) -> None:
    """What an input saliency map costs beside a plain forward and backward pass of the same image; the ratio is how many passes a map takes."""
    from jobs import output
    from jobs.bench.maps import MODELS, bench_maps

    output.check_format(format, ("table", "json"))
    output.measures(bench_maps(_words("--models", networks, MODELS), device, rounds), format)


@app.command()
def pipeline(
    source: Annotated[Optional[str], typer.Option(help="Shards, as of extract. Default: the demo's digits.")] = None,
    model: Annotated[Optional[str], typer.Option(help="As of extract.")] = None,
    weights: Annotated[Optional[str], typer.Option(help="As of extract.")] = None,
    preprocess: Annotated[Optional[str], typer.Option(help="As of extract.")] = None,
    max_samples: Annotated[int, typer.Option(help="Images that go through the line each time.")] = 512,
    device: Device = None,
    actors: Annotated[str, typer.Option(help="Numbers of engines whose rates are compared on Ray, separated by commas; empty: none.")] = "1,2,4",
    rounds: Annotated[int, typer.Option(help="Turns that each takes; medians are compared.")] = 1,
    format: Record = "table",
) -> None:
    """The whole line on real shards: images a second as a share of the engine's own rate, where the time goes, and growth with engines."""
    from jobs import output
    from jobs.bench.pipeline import bench_pipeline

    output.check_format(format, ("table", "json"))
    output.measures(bench_pipeline(source, model, weights, preprocess, max_samples, device, actors, rounds), format)


def _words(option: str, text: str | None, default: Sequence[str]) -> list[str]:
    """Those of a list with commas, or the default ones. Raises BadRequest for a list of none."""
    if text is None:
        return list(default)
    if not (found := [word.strip() for word in text.split(",") if word.strip()]):
        raise BadRequest(f"{option}: names nothing; leave it out for {','.join(default)}")
    return found
