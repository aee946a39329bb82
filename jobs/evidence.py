"""The command's verbs that give the paper's evidence: one thin function a verb. stdout gets the numbers, the last line of stderr what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from jobs.options import Actors, Address, Aggregation, AnyRun, Chosen, Dataset, Device, FileLabel, FileModel, FilePreprocess, FileWeights, Fresh, MaxSamples, Name, Record, Reference, RunOption, Seed, Statistics, engines
from jobs.progress import say
from pipeline.errors import BadRequest, printable


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


def reproduce(
    run: RunOption,
    dataset: Dataset = None,
    source: Annotated[Optional[str], typer.Option("--from", help="The data set whose errors ask for neighbours and take the step. Default: --dataset.")] = None,
    within: Annotated[Optional[str], typer.Option("--in", help="The data set that neighbours are sought in and the step is tried on. Default: the other one of the run.")] = None,
    max_samples: Annotated[Optional[int], typer.Option(help="Only N errors of each verb, chosen by --seed; profile, which reads no image, takes all samples. Default: all, and 100 for sanity.")] = None,
    seed: Seed = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard earlier results of these verbs that were made with other settings.")] = False,
    device: Device = None,
    actors: Actors = None,
    address: Address = None,
    format: Record = "table",
) -> None:
    """The whole paper over a run: profile, prune, neighbors, finetune, mask and sanity, then each claim with its verdict on one page, experiments/report.html."""
    from jobs import output
    from jobs.experiment import Request
    from jobs.reproduce import reproduce as job
    from jobs.verdicts import headline

    output.check_format(format, ("table", "json"))
    found, page = job(Request(run, dataset, None, max_samples, seed, fresh, device, engines(actors), address), source, within)
    output.claims(found, str(page), format)
    say(f"{printable(headline(found))}: {printable(page)}")


def explain(
    target: Annotated[Optional[str], typer.Argument(metavar="[ID|FILE]", help="sample_id, or dataset:sample_id, of --run; or an image file, with --label.", show_default=False)] = None,
    run: AnyRun = None,
    label: FileLabel = None,
    model: FileModel = None,
    weights: FileWeights = None,
    preprocess: FilePreprocess = None,
    statistics: Statistics = None,
    aggregation: Aggregation = None,
    everyone: Annotated[bool, typer.Option("--all-errors", help="Maps of all misclassified samples of a data set instead, into experiments/explain of the run.")] = False,
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
    dataset: Dataset = None,
    max_samples: MaxSamples = None,
    fresh: Fresh = False,
    device: Device = None,
    actors: Actors = None,
    address: Address = None,
    format: Record = "table",
) -> None:
    """What in one image made its filters fail: input saliency, beside its filters, its profile and its neighbours."""
    from jobs import output
    from jobs.case import Target
    from jobs.experiment import Request
    from jobs.explain import Wanted, explain as job
    from jobs.maps import all_errors

    output.check_format(format, ("table", "json"))
    wanted = Wanted(k, filters, layers, boost, smooth, noise, seed)
    alone = {"ID or FILE": target, "--label": label, "--model": model, "--weights": weights, "--preprocess": preprocess, "--statistics": statistics, "--aggregation": aggregation, "--filters": filters, "--name": name, "--out": out}
    of_all = {"--dataset": dataset, "--max-samples": max_samples, "--fresh": fresh or None, "--actors": actors, "--address": address}
    _refuse_misplaced(alone if everyone else of_all, "--all-errors" if everyone else "one image", "" if everyone else ", or say --all-errors")
    if everyone:
        if run is None:
            raise BadRequest("--run: say which run's errors are explained")
        _told(all_errors(Request(run, dataset, reference, max_samples, seed, fresh, device, engines(actors), address), wanted), format)
        return
    if target is None:
        raise BadRequest("ID or FILE: name an image, or say --all-errors")
    output.explained(job(Target(target, run, label, model, weights, preprocess, statistics, aggregation, reference, name, device), wanted, out), format)


def mask(
    target: Annotated[Optional[str], typer.Argument(metavar="[ID|FILE]", help="One image, as in explain: its case study. Without it: all misclassified samples of a data set.", show_default=False)] = None,
    run: AnyRun = None,
    percent: Annotated[Optional[str], typer.Option(help="Percent of the pixels that are masked. Default: 1,2,5,10,20, and 5 for one image.")] = None,
    fill: Annotated[str, typer.Option(help="What masked pixels become: mean (the image's mean colour), blur, or noise. The paper does not say.")] = "mean",
    k: Annotated[int, typer.Option("-k", help="How many of the most salient filters decide which pixels are salient.")] = 10,
    boost: Annotated[float, typer.Option(help="What the filters' entries of the profile are multiplied by.")] = 100.0,
    layers: Chosen = None,
    hosts: Annotated[Optional[int], typer.Option(help="Paste the salient pixels into so many other images of the class that the network is right about (0: none). Default: 10, and 40 for one image.")] = None,
    annotations: Annotated[Optional[Path], typer.Option("--boxes", help="Of a data set: the folder of ImageNet's annotations (.xml); pixels outside the object are masked too.")] = None,
    region: Annotated[Optional[str], typer.Option(help="Of one image: a region of your own, LEFT,TOP,RIGHT,BOTTOM in pixels as the network sees it, or a PNG that is opaque there (bright, if it is opaque everywhere): as large as the image, and then resized and cropped as that is, or as what the network sees of it.")] = None,
    filters: Annotated[Optional[str], typer.Option(help="Of one image: these filters instead of the most salient, LAYER:CHANNEL, several with commas.")] = None,
    label: FileLabel = None,
    model: FileModel = None,
    weights: FileWeights = None,
    preprocess: FilePreprocess = None,
    statistics: Statistics = None,
    aggregation: Aggregation = None,
    out: Annotated[Optional[Path], typer.Option(help="Of one image: the picture, .png, .svg or .pdf. Default: in experiments/mask of the run, or beside you for a FILE.")] = None,
    dataset: Dataset = None,
    reference: Reference = None,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    device: Device = None,
    actors: Actors = None,
    address: Address = None,
    format: Record = "table",
) -> None:
    """Mask the pixels that the failing filters are sensitive to, and see whether the error goes: figures 7 and 8 of the paper."""
    from jobs import output
    from jobs.case import Target
    from jobs.case_study import OTHERS, study
    from jobs.explain import Wanted
    from jobs.experiment import Request
    from jobs.mask import HOSTS, mask as job, shares_of

    output.check_format(format, ("table", "json"))
    alone = {"--region": region, "--filters": filters, "--label": label, "--model": model, "--weights": weights, "--preprocess": preprocess, "--statistics": statistics, "--aggregation": aggregation, "--out": out}
    of_all = {"--boxes": annotations, "--max-samples": max_samples, "--fresh": fresh or None, "--actors": actors, "--address": address}
    _refuse_misplaced(of_all if target else alone, "one image" if target else "a whole data set", "" if target else ", or name an image")
    if target is None:
        if run is None:
            raise BadRequest("--run: say which run, or name an image file with --label, --model and --statistics")
        request = Request(run, dataset, reference, max_samples, seed, fresh, device, engines(actors), address)
        _told(job(request, percent, fill, k, boost, layers, HOSTS if hosts is None else hosts, annotations), format)
        return
    shares = shares_of(percent or "5")
    if len(shares) > 1:
        raise BadRequest(f"--percent: '{printable(percent)}' are several; one image is masked by one of them")
    asked = Target(target, run, label, model, weights, preprocess, statistics, aggregation, reference, None, device)
    output.masked(study(asked, Wanted(k, filters, layers, boost, seed=seed), dataset, shares[0], fill, region, OTHERS if hosts is None else hosts, out), format)


def sanity(
    run: RunOption,
    dataset: Dataset = None,
    k: Annotated[int, typer.Option("-k", help="How many of a sample's most salient filters its map is about.")] = 10,
    boost: Annotated[float, typer.Option(help="As of explain.")] = 100.0,
    reference: Reference = None,
    max_samples: Annotated[int, typer.Option(help="Only N samples, chosen by --seed. It is the method that is tested, not each sample, so that some are enough.")] = 100,
    seed: Seed = 0,
    fresh: Fresh = False,
    device: Device = None,
    actors: Actors = None,
    address: Address = None,
    format: Record = "table",
) -> None:
    """Do profiles and heat maps hang on what the network has learnt? Layers are randomised from the top down; similarity should fall."""
    from jobs import output
    from jobs.experiment import Request
    from jobs.sanity import sanity as job

    output.check_format(format, ("table", "json"))
    _told(job(Request(run, dataset, reference, max_samples, seed, fresh, device, engines(actors), address), k, boost), format)


def _refuse_misplaced(options: dict[str, object], what: str, instead: str) -> None:
    """Raises BadRequest for options that were given and mean nothing here."""
    if given := [option for option, value in options.items() if value is not None]:
        raise BadRequest(f"{', '.join(given)}: not for {what}; leave {'it' if len(given) == 1 else 'them'} out{instead}")


def _told(summary: dict, format: str) -> None:
    """An experiment's numbers on stdout, and what they mean as the last line of stderr."""
    from jobs import output

    output.record(summary["result"], format)
    say(summary["found"])


VERBS = (profile, prune, finetune, mask, sanity, reproduce, explain)
