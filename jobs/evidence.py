"""The command's verbs that give the paper's evidence: one thin function a verb. stdout gets the numbers, the last line of stderr what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from jobs.options import Actors, Address, Chosen, Dataset, Device, Fresh, MaxSamples, Name, Record, Reference, RunOption, Seed, engines
from jobs.progress import say


def profile(
    run: RunOption,
    sample: Annotated[Optional[str], typer.Argument(metavar="[ID]", help="sample_id, or dataset:sample_id: its own profile is drawn too.", show_default=False)] = None,
    dataset: Dataset = None,
    reference: Reference = None,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    actors: Actors = None,
    address: Address = None,
    format: Record = "table",
) -> None:
    """How salient errors are, and where in the network: figures 1 and 2 of the paper."""
    from jobs import output
    from jobs.experiment import Request
    from jobs.profile import profile as job

    output.check_format(format, ("table", "json"))
    _told(job(Request(run, dataset, reference, max_samples, seed, fresh, None, engines(actors), address), sample), format)


def prune(
    run: RunOption,
    dataset: Dataset = None,
    ks: Annotated[Optional[str], typer.Option("-k", help="How many filters are turned off, for example 1,5,20. Default: 1,2,5,10,20,50,100.")] = None,
    mode: Annotated[str, typer.Option(help="map: a filter's map after its BatchNorm is zero; weights-and-bias: its weights and the BatchNorm's bias are, as in the paper, which leaves a constant.")] = "map",
    layers: Chosen = None,
    reference: Reference = None,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    device: Device = None,
    actors: Actors = None,
    address: Address = None,
    format: Record = "table",
) -> None:
    """Turn filters of every misclassified sample off, and see whether it comes right: figure 3 of the paper."""
    from jobs import output
    from jobs.experiment import Request
    from jobs.prune import prune as job

    output.check_format(format, ("table", "json"))
    _told(job(Request(run, dataset, reference, max_samples, seed, fresh, device, engines(actors), address), ks, mode, layers), format)


def finetune(
    run: RunOption,
    source: Annotated[str, typer.Option("--from", help="The data set whose misclassified samples are fine-tuned on.")],
    within: Annotated[str, typer.Option("--in", help="The data set that the steps are tried on.")],
    ks: Annotated[Optional[str], typer.Option("-k", help="How many filters take the step, for example 1,5,20. Default: 1 to 1% of the filters.")] = None,
    rates: Annotated[Optional[str], typer.Option(help="Lengths of the step, for example 0.1,0.5. Default: 0.5.")] = None,
    scope: Annotated[str, typer.Option(help="global: one norm over all chosen filters; filter: each filter's gradient by its own norm.")] = "global",
    layers: Chosen = None,
    name: Name = None,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    device: Device = None,
    actors: Actors = None,
    address: Address = None,
    format: Record = "table",
) -> None:
    """One step on one error: what it repairs and what it breaks of a held-out set. Figure 6 of the paper, and its other side."""
    from jobs import output
    from jobs.experiment import Request
    from jobs.finetune import finetune as job

    output.check_format(format, ("table", "json"))
    request = Request(run, source, None, max_samples, seed, fresh, device, engines(actors), address, "--from")
    _told(job(request, within, ks, rates, scope, layers, name), format)


def explain(
    target: Annotated[str, typer.Argument(metavar="ID|FILE", help="sample_id, or dataset:sample_id, of --run; or an image file, with --label.", show_default=False)],
    run: Annotated[Optional[Path], typer.Option("--run", help="The run directory. A FILE needs none where --model and --statistics are given.", show_default=False)] = None,
    label: Annotated[Optional[int], typer.Option(help="Of a FILE: its true class, as a number.")] = None,
    model: Annotated[Optional[str], typer.Option(help="Of a FILE without a run: the network, as in extract.")] = None,
    weights: Annotated[Optional[str], typer.Option(help="Its weights, as in extract.")] = None,
    preprocess: Annotated[Optional[str], typer.Option(help="Its preprocessing, as in extract.")] = None,
    statistics: Annotated[Optional[Path], typer.Option(help="Of a FILE without a run: mu and sigma, a run's statistics/NAME.parquet or published ones (.pth).")] = None,
    aggregation: Annotated[Optional[str], typer.Option(help="abs or signed: how published statistics were aggregated.")] = None,
    reference: Reference = None,
    k: Annotated[int, typer.Option("-k", help="How many of the most salient filters are explained.")] = 10,
    filters: Annotated[Optional[str], typer.Option(help="These filters instead: LAYER:CHANNEL, several with commas.")] = None,
    layers: Chosen = None,
    boost: Annotated[float, typer.Option(help="What the filters' entries of the profile are multiplied by.")] = 100.0,
    smooth: Annotated[int, typer.Option(help="Average the map over N noisy copies of the image.")] = 0,
    noise: Annotated[float, typer.Option(help="Of --smooth: the share of noise in a copy.")] = 0.1,
    seed: Seed = 0,
    name: Name = None,
    out: Annotated[Optional[Path], typer.Option(help="The picture, .png, .svg or .pdf. Default: in experiments/explain of the run, or beside you for a FILE.")] = None,
    device: Device = None,
    format: Record = "table",
) -> None:
    """What in one image made its filters fail: input saliency, beside its filters, its profile and its neighbours."""
    from jobs import output
    from jobs.explain import Target, Wanted, explain as job

    output.check_format(format, ("table", "json"))
    found = job(Target(target, run, label, model, weights, preprocess, statistics, aggregation, reference, name, device), Wanted(k, filters, layers, boost, smooth, noise, seed), out)
    output.explained(found, format)


def _told(summary: dict, format: str) -> None:
    """An experiment's numbers on stdout, and what they mean as the last line of stderr."""
    from jobs import output

    output.record(summary["result"], format)
    say(summary["found"])


VERBS = (profile, prune, finetune, explain)
