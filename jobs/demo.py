"""`faultline demo`: the whole line on embedded data, by exactly the steps that a user's own data take, each shown as the command that does it."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from index import Run
from index.build import build
from jobs import digits, neighbors, output, query
from jobs.extract import Settings, extract
from jobs.progress import say
from pipeline.errors import printable
from pipeline.store import Store


def demo(folder: Path) -> None:
    """Make the digits, extract `val` and `v2`, build the index, ask for one error's neighbours; resumes like any run."""
    if (folder / "run.json").exists():
        Store(folder).manifest().must_match({"model": digits.MODEL}, folder)
    say("handwritten digits: training a small network on 150 of them (a few seconds)")
    made = digits.write(folder / "digits")
    say(f"it errs on {sum(made.errors.values())} of the other {sum(made.samples.values()):,}; why?")
    for dataset in made.samples:
        _show("extract", "--run", folder, "--dataset", dataset, "--source", made.source(dataset), "--model", digits.MODEL, "--weights", made.weights)
        extract(Settings(folder, dataset, made.source(dataset), digits.MODEL, str(made.weights)))
    _show("index", "--run", folder, "--datasets", "val,v2", "--reference", "val")
    build(Store(folder), ["val", "v2"], "val", "errors", "errors")
    run = Run.open(folder)
    out = folder / "neighbours.parquet"
    _show("neighbors", "--run", folder, "--from", "val", "-k", 10, "--out", out, "--evaluate")
    neighbors.neighbors(run, "val", None, 10, out, None, None, False)
    agreement = neighbors.evaluate(run, out, None, None)
    say(f"of the 10 nearest errors, {agreement.either:.0%} confuse the same two digits as the error that asked; by chance it would be {agreement.chance:.0%}")
    sample = example(run, out)
    gallery = folder / "gallery.png"
    _show("query", "--run", folder, sample, "--gallery", gallery)
    found = run.neighbors(sample)
    query.draw(run, sample, found, gallery)
    output.neighbours(found, "table")
    activate = "" if shutil.which("faultline") else f"first            export PATH={shlex.quote(str(Path(sys.argv[0]).absolute().parent))}:$PATH\n"
    say(f"""
{activate}the picture      {printable(gallery)}
the run          {printable(folder)} (profiles/, statistics/, index/: Parquet and FAISS files)
try next         faultline query --run {shlex.quote(str(folder))} {sample} --in v2 --layers conv7..conv8
                 faultline status --run {shlex.quote(str(folder))}
from Python      from index import Run; Run.open("{printable(folder)}").neighbors("{sample}").to_pandas()
your own data    faultline extract --run runs/mine --dataset val --source 'shards/val-*.tar' --model resnet50 --weights resnet50.pth""")


def example(run: Run, out: Path) -> str:
    """The misclassified `val` image whose neighbours in `out` agree most on why: `dataset:sample_id`."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(out, columns=["query_id", "similarity", "pair"])
    table = table.append_column("alike", pc.cast(pc.equal(table["pair"], "same"), "int32"))
    best = table.group_by("query_id").aggregate([("alike", "sum"), ("similarity", "mean")]).sort_by([("alike_sum", "descending"), ("similarity_mean", "descending"), ("query_id", "ascending")])
    return f"val:{best['query_id'][0].as_py()}"


def _show(*words: object) -> None:
    say("\n$ " + shlex.join(["faultline", *map(str, words)]))
