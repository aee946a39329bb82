"""`faultline reproduce`: the whole paper over a run by one command. What is done is kept, what is in the way is not discarded, and a verb that cannot be done leaves the others alone."""

import io
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import shards
import tiny
import torch
from browser import Browser
from PIL import Image
from test_report import outside

from index import Run
from jobs import reproduce
from jobs.claims import CLAIMS, UNTESTABLE
from jobs.experiment import Request
from pipeline.errors import BadRequest, Stopped
from pipeline.locks import Busy

FEW = ("--max-samples", 10)  # errors of each verb: all in this process, in seconds
VERBS = set(reproduce.STEPS)


def only(monkeypatch, *verbs, **steps):
    """Let the command do these verbs alone, some of them otherwise."""
    monkeypatch.setattr(reproduce, "STEPS", {verb: step for verb, step in reproduce.STEPS.items() if verb in verbs} | steps)


def content(run):
    """Every file of the experiments that is a result."""
    return {p.relative_to(run): p.read_bytes() for p in (run / "experiments").rglob("*") if p.is_file() and p.suffix in (".json", ".parquet", ".png", ".svg")}


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """(the run, how the command ended) of all verbs."""
    run = tmp_path_factory.mktemp("reproduced") / "run"
    shutil.copytree(small.run, run)
    return run, tiny.call("reproduce", "--run", run, *FEW, "--format", "json")


def test_every_claim_is_told_and_the_page_is_there(done):
    run, ended = done
    assert ended.code == 0, ended.err
    claims = ended.json["claims"]
    assert [c["name"] for c in claims] == [claim.name for claim in CLAIMS] and {"place", "claim", "ours", "interval", "verdict", "why", "verb"} <= set(claims[0])
    assert all(c["ours"] or c["verdict"] == UNTESTABLE for c in claims) and sum(bool(c["ours"]) for c in claims) >= 11
    page = run / "experiments/report.html"
    counted = [c["verdict"] for c in claims if c["of_the_paper"]]
    counts = ", ".join(f"{counted.count(verdict)} {verdict}" for verdict in ("not reproduced", "undecided", "not testable here"))
    assert ended.err.splitlines()[-1] == f"{counted.count('reproduced')} of {len(counted)} claims reproduced, {counts}: {page}" and ended.json["page"] == str(page)
    text = page.read_text(encoding="utf-8")
    assert outside(text) == [] and len(text) < 5e6 and text.count("<img ") == sum(len(list((run / "experiments" / verb).glob("*.png"))) for verb in VERBS)
    assert str(run.parent) not in text, "no path of this machine"
    assert all(f"10 {what}" in text for what in ("errors of val asked", "misclassified samples"))


def test_profile_takes_all_samples_and_says_so(done):
    """Of ten samples of a good network hardly one would be an error."""
    run, ended = done
    summary = json.loads((run / "experiments/profile/summary.json").read_text())
    assert sum(group["samples"] for group in summary["groups"].values()) == Run.open(run).status()["val"].done > 10 and summary["settings"]["max_samples"] is None
    assert "; all samples, and not --max-samples of them" in next(line for line in ended.err.splitlines() if line.startswith("profile: "))
    text = (run / "experiments/report.html").read_text(encoding="utf-8")
    assert "faultline profile --run run --dataset val</code>" in text and "all samples for the profiles, which need no image" in text


def test_a_run_without_errors_says_that_nothing_can_be_tested(tmp_path):
    small = tiny.Small(tmp_path / "run", tmp_path / "sources")
    network = tiny.Level().eval()
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(shards.photo(i)))) for i in range(24)])
    predictions = network(((torch.from_numpy(decoded.astype(np.float32)) / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)).argmax(1).tolist()
    shards.write_shard(small.sources / "val/0.tar", predictions, first=0)
    assert small.extract("val", model="tiny:level").code == 0
    ended = tiny.call("reproduce", "--run", small.run, "--format", "json")
    assert ended.code == 0, ended.err
    why = "no sample of val is misclassified, and the claims are about errors: extract images that the network errs on"
    assert {(c["verdict"], c["why"]) for c in ended.json["claims"]} == {(UNTESTABLE, why)}
    assert ended.err.splitlines()[-1].startswith(f"none of the 14 claims can be tested here ({why}): ")
    text = (small.run / "experiments/report.html").read_text(encoding="utf-8")
    assert "<h1>None of the 14 claims can be tested here</h1>" in text and f"nothing can be said on this run: {why}." in text


def test_costs_are_said_before_anything_is_done(done):
    lines = done[1].err.splitlines()
    first = next(at for at, line in enumerate(lines) if "starting in this process" in line)
    assert {line.partition(":")[0] for line in lines[:first]} >= VERBS and any("200 prunings" in line for line in lines[:first])


def test_the_same_command_again_is_free(done):
    run, _ = done
    before = {p: p.stat().st_mtime_ns for p in (run / "experiments").rglob("*") if p.suffix in (".json", ".parquet", ".png", ".svg")}
    again = tiny.call("reproduce", "--run", run, *FEW)
    assert again.code == 0 and all(f"{verb}: done (" in again.err for verb in VERBS) and "starting" not in again.err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert all(claim.short in " ".join(again.out.split()) for claim in CLAIMS if len(claim.short) < 30)


def test_the_commands_of_the_page_make_the_same_again(done, tmp_path, monkeypatch):
    """Each as it stands there, beside the run: it finds its results, and they are the same."""
    run, _ = done
    commands = [line.replace("&#x27;", "'").split() for line in re.findall(r"<pre><code>faultline (.*?)</code></pre>", (run / "experiments/report.html").read_text(encoding="utf-8"))]
    assert {words[0] for words in commands} >= VERBS
    before = content(run)
    monkeypatch.chdir(run.parent)
    for words in commands:
        if words[0] in VERBS:
            ended = tiny.call(*words)
            assert ended.code == 0 and "starting" not in ended.err, (words, ended.err)
    assert content(run) == before


def test_the_page_opens_in_a_browser(done):
    page = done[0] / "experiments/report.html"
    with Browser() as browser:
        for width in (390, 1280):
            browser.open(page, width)
            assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()] and browser.evaluate("document.documentElement.scrollWidth") <= width
            seen = browser.evaluate("document.body.innerText")
            assert all(claim.text in seen for claim in CLAIMS) and browser.evaluate("[...document.images].every(i => i.naturalWidth)")


def test_earlier_results_with_other_settings_are_not_destroyed(copied, monkeypatch):
    """They are refused by name, before anything is computed; --fresh replaces these, and keeps what fits."""
    only(monkeypatch, "profile", "prune")
    assert tiny.call("prune", "--run", copied.run, "-k", "1", *FEW).code == 0
    before = content(copied.run)
    refused = tiny.call("reproduce", "--run", copied.run, *FEW).refused()
    assert "prune: k [1], not [1, 2, 5, 10, 20]" in refused and "--fresh" in refused and "profile" not in refused
    assert content(copied.run) == before and not (copied.run / "experiments/report.html").exists()
    assert tiny.call("profile", "--run", copied.run).code == 0
    kept = (copied.run / "experiments/profile/summary.json").stat().st_mtime_ns
    ended = tiny.call("reproduce", "--run", copied.run, *FEW, "--fresh")
    assert ended.code == 0 and "prune is made anew: k [1], not" in ended.err
    assert (copied.run / "experiments/profile/summary.json").stat().st_mtime_ns == kept
    assert json.loads((copied.run / "experiments/prune/summary.json").read_text())["k"] == [1, 2, 5, 10, 20]


def test_fresh_discards_nothing_for_a_gpu_that_is_not_there(copied, monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    only(monkeypatch, "profile")
    assert tiny.call("profile", "--run", copied.run, *FEW).code == 0
    before = content(copied.run)
    assert "no CUDA GPU" in tiny.call("reproduce", "--run", copied.run, "--fresh", "--device", "cuda").refused() and content(copied.run) == before


def test_a_verb_that_cannot_be_done_leaves_the_others_alone(copied, monkeypatch):
    def refuse(run, sets, index, request):
        if request.rehearsed:
            return reproduce.Rehearsal("much", 1, 1)
        raise BadRequest("its maps cannot be told apart:\nconv2 is <used> twice")

    only(monkeypatch, "profile", "prune", prune=reproduce.Step(refuse))
    ended = tiny.call("reproduce", "--run", copied.run, *FEW, "--format", "json")
    assert ended.code == 0
    of = {c["name"]: c for c in ended.json["claims"]}
    assert of["prune"]["verdict"] == UNTESTABLE and "conv2 is <used> twice" in of["prune"]["why"] and of["salience"]["ours"]
    assert "conv2 is &lt;used&gt; twice" in (copied.run / "experiments/report.html").read_text()


def test_a_verb_that_stops_is_told_and_resumes(copied, monkeypatch):
    """Exit code 4, with the page of the others; the same command then does what is missing."""
    usual, broken = reproduce.STEPS["prune"], [True]

    def stop(run, sets, index, request):
        if broken[0] and not request.rehearsed:
            raise Stopped("3 units of prune were not done: the disk is full\nwhat is done is kept; the same command resumes")
        return usual.run(run, sets, index, request)

    only(monkeypatch, "profile", prune=reproduce.Step(stop))
    ended = tiny.call("reproduce", "--run", copied.run, *FEW)
    assert ended.code == 4 and not ended.raw and "prune: 3 units of prune were not done" in ended.err and len(ended.err.partition("faultline: ")[2].splitlines()) <= 3
    assert "it was stopped before its end" in (copied.run / "experiments/report.html").read_text() and (copied.run / "experiments/profile/summary.json").exists()
    broken[0] = False
    again = tiny.call("reproduce", "--run", copied.run, *FEW)
    assert again.code == 0 and "profile: done (" in again.err and "stopped" not in (copied.run / "experiments/report.html").read_text()


def test_a_verb_that_another_job_holds_is_waited_for(copied, monkeypatch):
    def busy(run, sets, index, request):
        if request.rehearsed:
            return reproduce.Rehearsal("much", 1, 1)
        raise Busy("another job is writing experiments/prune: wait for it")

    only(monkeypatch, prune=reproduce.Step(busy))
    ended = tiny.call("reproduce", "--run", copied.run)
    assert ended.code == 4 and "wait for it" in ended.err and not (copied.run / "experiments/report.html").exists()


def test_a_run_of_one_data_set(small, tmp_path, monkeypatch):
    """Neighbours are sought within it, in an index that is built where there is none; a step that wants a held-out set is left out, and how to have one is said."""
    only(monkeypatch, "profile", "finetune")
    run = tmp_path / "run"
    shutil.copytree(small.run, run, ignore=shutil.ignore_patterns("v2", "v2.json", "index"))
    ended = tiny.call("reproduce", "--run", run, *FEW, "--format", "json")
    assert ended.code == 0 and "no index of errors held val: built" in ended.err and Run.open(run).index().datasets == ["val"]
    of = {c["name"]: c for c in ended.json["claims"]}
    assert of["salience"]["ours"] and of["step"]["verdict"] == UNTESTABLE and "extract a second" in of["step"]["why"] and "--in val" in of["step"]["why"]
    store = Run.open(run).store
    assert reproduce.Sets.of(store, Request(run), None, None) == reproduce.Sets("val", "val", "val", True)
    assert reproduce.Sets.of(store, Request(run), None, "val") == reproduce.Sets("val", "val", "val", False), "somebody who says so gets it"


def test_an_index_that_does_not_suit_is_not_replaced(copied):
    assert tiny.call("index", "--run", copied.run, "--subset", "all", "--name", "errors").code == 0
    before = {p: p.read_bytes() for p in (copied.run / "index/errors").iterdir()}
    run, sets = Run.open(copied.run), reproduce.Sets("val", "val", "v2", False)
    assert reproduce._suiting(run, sets) is None and reproduce._build(run, sets) == "reproduce" == reproduce._suiting(Run.open(copied.run), sets)
    assert {p: p.read_bytes() for p in (copied.run / "index/errors").iterdir()} == before
    assert "--name reproduce" in reproduce.command_of("finetune", run, sets, Request(copied.run), "reproduce")


@pytest.mark.parametrize(
    "words, says",
    [
        (["--dataset", "v3"], "--dataset: there is no data set 'v3' in this run; it has: v2, val"),
        (["--from", "v3"], "--from: there is no data set 'v3'"),
        (["--in", "\u202e"], "--in: there is no data set '\\u202e'"),
        (["--max-samples", "0"], "--max-samples: 0"),
        (["--format", "parquet"], "--format: 'parquet'"),
    ],
)
def test_what_does_not_exist_is_refused(copied, words, says):
    assert says in tiny.call("reproduce", "--run", copied.run, *words).refused() and not (copied.run / "experiments").exists()


def test_where_neighbours_are_sought_has_to_be_said_among_three(copied):
    shutil.copy(copied.run / "datasets/v2.json", copied.run / "datasets/v3.json")
    for folder in ("profiles", "rejects"):
        shutil.copytree(copied.run / folder / "v2", copied.run / folder / "v3")
    store, request = Run.open(copied.run).store, Request(copied.run)
    with pytest.raises(BadRequest, match="--in: say where the neighbours of val are sought: v2, v3, val"):
        reproduce.Sets.of(store, request, None, None)
    assert reproduce.Sets.of(store, request, "v2", "v3") == reproduce.Sets("val", "v2", "v3", False)
    assert reproduce.Sets.of(store, Request(copied.run, "v3"), None, "v3") == reproduce.Sets("v3", "v3", "v3", False)


@pytest.mark.parametrize("source, within", [("val", "v2"), ("val", "val")])
def test_how_many_errors_are_alike(small, source, within):
    """Counted by hand: of the errors that are sought those with an error's two classes, in either order, and with its class; not itself."""
    errors = {d: [(r["sample_id"], r["label"], r["prediction"]) for f in (small.run / "profiles" / d).glob("*.parquet") for r in pq.read_table(f).to_pylist() if r["label"] != r["prediction"]] for d in {source, within}}
    pairs = [sum({a, b} == {c, d} for j, c, d in errors[within] if (source, i) != (within, j)) for i, a, b in errors[source]]
    labels = [sum(a == c for j, c, _ in errors[within] if (source, i) != (within, j)) for i, a, _ in errors[source]]
    facts = reproduce.facts_of(Run.open(small.run), reproduce.Sets(source, source, within, False))
    assert facts["pair"] == pytest.approx(np.mean(pairs)) and facts["class"] == pytest.approx(np.mean(labels)) and facts["before_logits"] is None
