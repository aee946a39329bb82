"""The command `faultline`: one thin function a verb. stdout carries results alone; everything else goes to stderr.

Nothing heavy is imported here, so that `--help` answers at once and a query loads neither torch nor Ray.
Exit codes: 0 complete, 2 wrong request, 3 complete but more set aside than --max-rejects, 4 stopped and resumable, 1 a defect of ours.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Optional

import typer

from jobs import evidence, signals
from jobs.bench import command as benchmarks
from jobs.environment import settle, spare_pandas
from jobs.options import Actors, Address, Device, Format, Layers, Name, Record, RunOption, Seed, engines, said
from jobs.progress import own_stdout, say, settle_streams, stages
from pipeline.errors import BadRequest, Fault, Stopped, printable
from pipeline.locks import IN_THE_WAY

app = typer.Typer(name="faultline", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help="Which filters made an image classifier err, and which other images fail for the same reason.")
statistics_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Statistics (mu and sigma of every filter) that runs are standardised by.")
app.add_typer(statistics_app, name="statistics")
app.add_typer(benchmarks.app, name="bench")
ASKING = ("check", "status", "query", "bench")  # verbs that write nothing but their answer


@app.command()
def demo(run: RunOption = Path("runs/demo")) -> None:
    """The whole line on embedded data (handwritten digits, a network trained on the spot), then what to try next."""
    from jobs.demo import demo as job

    job(run)


@app.command()
def check(
    source: Annotated[str, typer.Option(help="As of extract.")],
    model: Annotated[str, typer.Option(help="As of extract.")],
    weights: Annotated[Optional[str], typer.Option(help="As of extract.")] = None,
    preprocess: Annotated[Optional[str], typer.Option(help="As of extract.")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda. Default: a GPU if there is one.")] = None,
    devkit: Annotated[Optional[str], typer.Option(help="ILSVRC2012_devkit_t12, the folder or its tar.gz, to look for labels in the devkit's order. Default: the one in or beside the source.")] = None,
    format: Annotated[str, typer.Option("--format", help="table or json, on stdout.")] = "table",
) -> None:
    """The doctor, before hours are spent: labels, preprocessing, top-1 against what the weights promise, and what a run would cost. Exit code 2 if it would be garbage."""
    from jobs import output
    from jobs.check import check as job

    output.check_format(format, ("table", "json"))
    report = job(source, model, weights, preprocess, device, devkit)
    output.check(report, format)
    if report.faults:
        raise BadRequest(f"--{'weights' if 'are these its weights' in report.faults[0] else 'source'}: {report.faults[0]}")


@app.command()
def extract(
    run: RunOption,
    dataset: Annotated[str, typer.Option(help="What this data set is called in the run, for example val.")],
    source: Annotated[str, typer.Option(help="Tar shards (a file, a folder, a pattern such as 'val-{00..63}.tar'), Parquet files, a folder of class folders, ImageNet's flat validation folder, ImageNet-v2's release, CIFAR's python batches, or .npy and .npz arrays.")],
    model: Annotated[str, typer.Option(help="A torchvision classifier, resnet20|32|44|56|110 or cifar_resnet18, or module:factory.")],
    weights: Annotated[Optional[str], typer.Option(help="A .safetensors or .pth file, or the name of torchvision weights. Default: torchvision's best.")] = None,
    preprocess: Annotated[Optional[str], typer.Option(help="imagenet, cifar, pytorch-cifar, or parts: resize=256,crop=224,interpolation=bilinear,mean=0.5/0.5/0.5,std=0.5/0.5/0.5. Default: the model's own.")] = None,
    engine: Annotated[str, typer.Option(help="auto, fused or vmap.")] = "auto",
    precision: Annotated[Optional[str], typer.Option(help="fp32, tf32 or bf16. Default: fp32.")] = None,
    aggregation: Annotated[str, typer.Option(help="abs: mean |gradient| of a filter's weights; signed: |mean gradient|, as the authors' earlier code.")] = "abs",
    batch_size: Annotated[Optional[int], typer.Option(help="Images of one forward. Default: 128 on a GPU; on a CPU 8, or 32 for small images, or the next multiple of the threads, to which any other is filled up.")] = None,
    device: Device = None,
    actors: Actors = None,
    max_samples: Annotated[Optional[int], typer.Option(help="Only the first N samples, for a first try; the rest can follow later.")] = None,
    shards: Annotated[Optional[int], typer.Option(help="Only the first N shards, for a first try.")] = None,
    max_rejects: Annotated[Optional[int], typer.Option(help="More samples set aside than this end in exit code 3. Default: 1% of the samples.")] = None,
    address: Address = None,
    devkit: Annotated[Optional[str], typer.Option(help="ILSVRC2012_devkit_t12, the folder or its tar.gz, for ImageNet's flat validation folder. Default: the one in or beside it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on although the check of a few samples says that the result would be garbage.")] = False,
) -> None:
    """Shards to filter saliency profiles. The same command again resumes, and is free when all is there."""
    from jobs.extract import Settings, extract as job

    bounds = engines(actors)
    result = job(Settings(run, dataset, source, model, weights, preprocess, engine, precision, aggregation, batch_size, device, bounds, max_samples, shards, max_rejects, address, devkit, force))
    p = result.progress
    done = "nothing to do" if not result.units_run else f"{result.units_run} unit{'s' * (result.units_run != 1)}"
    say(f"{dataset}: {p.done:,} profiles, {p.rejected:,} set aside, top-1 {result.top1:.4f}, {result.errors:,} misclassified ({done})")
    if p.rejected:
        say(f"why they were set aside: {printable(run)}/rejects/{dataset}/*.parquet")
    if result.too_many_rejects:
        say(f"that is more than --max-rejects {result.allowed_rejects}")
        raise typer.Exit(3)


@app.command()
def index(
    run: RunOption,
    datasets: Annotated[Optional[str], typer.Option(**said("--datasets", str, "<str>"), help="Data sets to search in, for example val,v2. Default: all of the run.")] = None,
    reference: Annotated[Optional[str], typer.Option(**said("--reference", str, "<str>"), help="Whose mu and sigma standardise: a data set of the run, or imported statistics. Default: val, or the first of --datasets.")] = None,
    subset: Annotated[str, typer.Option(help="errors: misclassified samples alone; all: every sample.")] = "errors",
    name: Annotated[Optional[str], typer.Option("--name", help="What the index is called. Default: the subset.")] = None,
) -> None:
    """Profiles to a FAISS cosine index. Refuses while an extraction is unfinished."""
    from index.build import SUBSETS, build
    from jobs.extract import DATASET
    from pipeline.store import Store

    spare_pandas()
    store = Store(run)
    store.manifest()
    known = store.datasets()
    chosen = list(dict.fromkeys(filter(None, (d.strip() for d in datasets.split(","))))) if datasets else known
    if subset not in SUBSETS:
        raise BadRequest(f"--subset: '{printable(subset)}' is not one of {', '.join(SUBSETS)}")
    if name is not None and not DATASET.fullmatch(name):
        raise BadRequest(f"--name: '{printable(name)}' cannot name a folder; use letters, digits, '.', '_' and '-'")
    if datasets and not chosen:
        raise BadRequest("--datasets: names nothing")
    if not chosen:
        raise BadRequest(f"{printable(run)} has no data set yet: faultline extract makes one")
    reference = reference or ("val" if "val" in known else chosen[0])
    built = build(store, chosen, reference, subset, name or subset, stages())
    say(f"{printable(built.folder)}: {sum(built.rows.values()):,} vectors ({', '.join(f'{d} {n:,}' for d, n in built.rows.items())}); {built.dead:,} filter{' is' if built.dead == 1 else 's are'} dead and count{'s' * (built.dead == 1)} 0")
    if built.dead == store.manifest().layers.total:
        say(f"no filter tells the samples of {printable(reference)} apart, so that every similarity is 0: are these the network's weights, or are there too few samples?")


@statistics_app.command("import")
def statistics_import(
    file: Annotated[Path, typer.Argument(help="A torch file: a dict of two vectors, mean and std, in the order of the network's filters.", show_default=False)],
    run: RunOption,
    name: Annotated[str, typer.Option("--name", help="What the statistics are called in the run; index --reference NAME uses them.")],
    aggregation: Annotated[str, typer.Option(help="How they were aggregated, abs or signed. It must be the run's.")],
) -> None:
    """Somebody else's mean and std, such as the authors' published ones, as a reference."""
    from jobs.extract import AGGREGATIONS, DATASET
    from pipeline.atomic import replace_file
    from pipeline.statistics import import_published
    from pipeline.store import Store

    store = Store(run)
    manifest = store.manifest()
    if not DATASET.fullmatch(name):
        raise BadRequest(f"--name: '{printable(name)}' cannot name a file; use letters, digits, '.', '_' and '-'")
    if name in store.datasets():
        raise BadRequest(f"--name: '{printable(name)}' is a data set of this run; choose another name, for example published")
    if aggregation not in AGGREGATIONS:
        raise BadRequest(f"--aggregation: '{printable(aggregation)}' is not one of {', '.join(AGGREGATIONS)}")
    if aggregation != manifest.aggregation:
        raise BadRequest(f"--aggregation: these statistics are '{aggregation}', the run {printable(run)} is '{manifest.aggregation}'; extract a run with --aggregation {aggregation} to use them")
    reference = import_published(file, aggregation, manifest.layers)
    replace_file(store.run / "statistics" / f"{name}.parquet", lambda partial: reference.write(manifest.layers, partial))
    say(f"{printable(store.run / 'statistics' / name)}.parquet: {manifest.layers.total:,} filters, {int((~reference.live).sum()):,} dead; use them with faultline index --reference {name}")


@app.command()
def query(
    sample: Annotated[str, typer.Argument(metavar="ID", help="sample_id, or dataset:sample_id. A correctly classified image may ask too.", show_default=False)],
    run: RunOption,
    k: Annotated[int, typer.Option("-k", help="How many neighbours.")] = 10,
    within: Annotated[Optional[str], typer.Option("--in", help="Only neighbours of this data set.")] = None,
    layers: Layers = None,
    name: Name = None,
    gallery: Annotated[Optional[Path], typer.Option(help="Draw the images into this file (.png, .svg or .pdf).")] = None,
    format: Format = "table",
) -> None:
    """The images that fail for the same reason as one image."""
    from jobs import output

    output.check_format(format)
    if gallery:
        from jobs.figures import check_gallery

        check_gallery(gallery)
    spare_pandas()
    from index import Run

    opened = Run.open(run)
    found = opened.neighbors(sample, k, within, layers, name)
    if found.num_rows < k:
        say(f"only {found.num_rows} neighbours exist")
    if gallery:
        from jobs.query import draw

        draw(opened, sample, found, gallery, name)
        say(f"gallery: {printable(gallery)}")
    output.neighbours(found, format)


@app.command()
def neighbors(
    run: RunOption,
    source: Annotated[str, typer.Option("--from", help="The data set whose misclassified samples ask.")],
    out: Annotated[Path, typer.Option(help="The Parquet file to write.", show_default=False)],
    within: Annotated[Optional[str], typer.Option("--in", help="Only neighbours of this data set.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many neighbours.")] = 10,
    layers: Layers = None,
    name: Name = None,
    everyone: Annotated[bool, typer.Option("--all", help="Correctly classified samples ask too.")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Print how often neighbours share the (true, predicted) pair, beside chance, and write section 3.2 of the paper whole into experiments/neighbors.")] = False,
    split: Annotated[Optional[str], typer.Option(help="Of --evaluate: compare the layers up to this one with those after it. Default: the first third of the filters with the last. The paper's split of VGG-19, after relu4_1, is features.19.")] = None,
    max_samples: Annotated[Optional[int], typer.Option(help="Of --evaluate: only N errors, chosen by --seed. Default: all.")] = None,
    seed: Seed = 0,
    actors: Actors = None,
    address: Address = None,
    format: Annotated[str, typer.Option("--format", help="table or json, of --evaluate.")] = "table",
) -> None:
    """The neighbours of all images of a data set, as one batch job."""
    from index import Run
    from index.evaluate import ends
    from jobs import neighbors as job, output
    from jobs.evaluation import evaluate as whole
    from jobs.experiment import Request

    output.check_format(format, ("table", "json"))
    opened = Run.open(run)
    request = Request(run, source, None, max_samples, seed, None, None, engines(actors), address, "--from")
    if evaluate:
        request.check()
        request.dataset_of(opened.store)
        ends(opened.manifest.layers, split)
        job.refuse_empty(opened, source, within, name)
    asked = job.neighbors(opened, source, within, k, out, layers, name, everyone)
    say(f"{printable(out)}: neighbours of {asked:,} images")
    if evaluate:
        agreement = job.evaluate(opened, out, within, name)
        summary = whole(opened, source, within, name, split, request)
        output.record(agreement.__dict__ | summary["result"], format)
        say(summary["found"])


for verb in evidence.VERBS:
    app.command()(verb)


@app.command()
def status(run: RunOption, format: Record = "table") -> None:
    """Per data set: done, pending, set aside, rate."""
    from index import Run
    from jobs import output

    output.check_format(format, ("table", "json"))
    output.status({name: p.__dict__ for name, p in Run.open(run).status().items()}, format)


@app.command()
def chaos(
    rounds: Annotated[int, typer.Option(help="How many rounds of faults.")] = 10,
    seed: Seed = 0,
    run: Annotated[Path, typer.Option("--run", help="A folder for the rounds alone; the same command goes on where it stopped.")] = Path("runs/chaos"),
    kinds: Annotated[Optional[str], typer.Option(help="Faults to choose from, separated by commas. Default: all.")] = None,
    format: Record = "table",
) -> None:
    """Kills, stops and starves real jobs, one a round, and counts what they left against an undisturbed one. Exit code 1 if anything is lost, doubled or wrong."""
    from jobs import output
    from jobs.chaos.campaign import chaos as job

    output.check_format(format, ("table", "json"))
    found = job(run, rounds, seed, [k.strip() for k in kinds.split(",") if k.strip()] if kinds else None)
    output.record(found, format)
    if any(found[key] for key in ("lost", "doubled", "wrong", "beyond_the_bound", "foul")):
        say(f"not as it should be: {printable(run)}/rounds.jsonl says what, and the folders of those rounds are kept")
        raise typer.Exit(1)


def main() -> None:
    """The console script: runs the command and turns every ending into its exit code and a message of one to three lines."""
    settle()
    settle_streams()
    signals.hear(writes=sys.argv[1:2] not in ([verb] for verb in ASKING))
    try:
        with nullcontext() if "--help" in sys.argv else own_stdout():
            code = _run()
        with suppress(ValueError, AttributeError):  # a network may have closed it
            sys.stdout.flush()
    except Fault as fault:
        code = _end(str(fault), fault.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _end(f"stopped; {signals.left}", Stopped.exit_code)
    except typer.exceptions.TyperException as fault:
        text = fault.format_message()
        code = _end(printable(text) + " (--help of the verb lists what it takes)", 2) if not text.startswith("Usage:") else say(text) or 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as defect:
        if os.environ.get("FAULTLINE_DEBUG"):
            raise
        code = _unforeseen(defect)
    except BaseException as end:  # sys.exit, most likely, in code that --model names: nobody else here raises it
        code = _end(f"--model: its code ended the program ({type(end).__name__}: {printable(end)[:200]}), which no network may: take that out of it\nwhat is done is kept", BadRequest.exit_code)
    if "jobs.servers" in sys.modules:
        sys.modules["jobs.servers"].leave(code)
    sys.exit(code)


def _run() -> int:
    """The verb that was asked for. Not `app()`, which has endings of its own for Ctrl-C and for a reader that has gone."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("faultline", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _unforeseen(defect: Exception) -> int:
    """A disk that refuses is the user's to mend; everything else is a defect of ours."""
    if isinstance(defect, OSError) and defect.errno in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR):
        code = Stopped.exit_code if defect.errno in (errno.ENOSPC, errno.EDQUOT) else BadRequest.exit_code
        return _end(f"{printable(defect.filename or 'a file')} cannot be used ({defect.strerror}): {'remove what lies there' if defect.errno in IN_THE_WAY else 'put that right'} and give the same command again", code)
    text = str(defect).strip().splitlines()
    return _end(f"a defect of faultline: {type(defect).__name__}: {printable(text[0] if text else '')[:300]}\nFAULTLINE_DEBUG=1 shows where; what is done is kept", 1)


def _end(message: str, code: int) -> int:
    say(f"faultline: {message}")
    return code
