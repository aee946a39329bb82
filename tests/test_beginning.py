"""Two jobs that begin one run at once, and a run that goes away: what is there afterwards is of one network, and nobody is answered with another's numbers. And what a run is when it begins."""

from __future__ import annotations

import json
import os
import shutil
import signal

import bad_input
import pytest
import tiny

from jobs import begin
from pipeline import failpoints
from pipeline.locks import Busy, hold
from pipeline.profiler import Profiler
from pipeline.store import Store


@pytest.fixture
def mine(small, tmp_path):
    """Sources of its own, and a run not yet begun."""
    return tiny.Small(tmp_path / "run", shutil.copytree(small.sources, tmp_path / "sources"))


@pytest.fixture
def meanwhile(monkeypatch):
    """`meanwhile(job)`: another job is done from beginning to end when the next one has looked at its images, and is about to begin the run."""
    admit = begin.admit

    def plan(job):
        def slow(*args, **kwargs):
            monkeypatch.setattr(begin, "admit", admit)
            admitted = admit(*args, **kwargs)
            job()
            return admitted

        monkeypatch.setattr(begin, "admit", slow)

    return plan


def contents(run):
    return {p.name: p.read_bytes() for p in (run / "run.json", run / "weights.safetensors", *Store(run).files("val"))}


@pytest.mark.parametrize(
    "dataset, words, model, says",
    [("val", [], "tiny:other_weights", "weights"), ("v2", [], "tiny:other_weights", "weights"), ("val", ["--batch-size", 7], tiny.MODEL, "batch_size"), ("v2", ["--aggregation", "signed"], tiny.MODEL, "aggregation")],
)
def test_who_begins_second_with_other_settings_is_refused_and_changes_nothing(mine, meanwhile, dataset, words, model, says):
    """Whether it is the same data set or another: run.json and the weights are those that the first one's profiles were made with."""
    before = {}

    def other():
        assert mine.extract("val").code == 0
        before.update(contents(mine.run))

    meanwhile(other)
    ended = mine.extract(dataset, *words, model=model)
    assert says in ended.refused()
    assert contents(mine.run) == before and mine.extract("v2").code == 0


def test_who_begins_second_with_the_same_settings_goes_on(mine, meanwhile, small):
    meanwhile(lambda: mine.extract("val"))
    ended = mine.extract("v2")
    assert ended.code == 0, ended.err
    for dataset in ("val", "v2"):
        theirs, ours = (sorted(p.name for p in Store(run).files(dataset)) for run in (small.run, mine.run))
        assert ours == theirs and Store(mine.run).progress(dataset).pending == 0
    assert tiny.call("index", "--run", mine.run, "--datasets", "val,v2", "--reference", "val").code == 0


@pytest.mark.parametrize("names", ["as theirs", "of its own"])
def test_who_begins_a_data_set_from_another_source_is_refused_and_changes_nothing(mine, meanwhile, names):
    """Though both had counted before either held the data set: its rows and its census are of one source."""
    theirs = shutil.copytree(mine.sources / "val", mine.sources / "theirs")
    for shard in theirs.glob("*.tar"):
        shard.rename(theirs / (shard.name if names == "as theirs" else f"x-{shard.name}"))
    before = {}

    def other():
        assert tiny.call("extract", "--run", mine.run, "--dataset", "val", "--source", theirs, "--model", tiny.MODEL).code == 0
        before.update(contents(mine.run), census=(mine.run / "datasets/val.json").read_bytes())

    meanwhile(other)
    assert f"comes from {theirs}" in mine.extract("val").refused()
    assert contents(mine.run) | {"census": (mine.run / "datasets/val.json").read_bytes()} == before
    assert len(Store(mine.run).files("val")) == len(before) - 3 and Store(mine.run).progress("val").done == 60


def test_who_finds_another_at_the_beginning_waits_for_it_and_not_for_ever(mine, monkeypatch):
    monkeypatch.setattr(begin, "PATIENCE", 0.2)
    with hold(mine.run / ".begin.lock", mine.run, "held"):
        assert "another job is beginning" in mine.extract().refused()
    assert not (mine.run / "run.json").exists() and mine.extract().code == 0
    with hold(mine.run / ".begin.lock", mine.run, "held"), pytest.raises(Busy, match="mine"), hold(mine.run / ".begin.lock", mine.run, "mine", 0.3):
        pass


def test_a_run_that_is_moved_away_during_a_job_is_not_begun_anew(mine, monkeypatch):
    """Exit code 4 at the next commit, and nothing at the old place; where it is now, the same command resumes."""
    parts = Profiler.parts

    def moved(self, samples, shard, start):
        if shard == "val-00001.tar":
            mine.run.rename(mine.run.with_name("elsewhere"))
        return parts(self, samples, shard, start)

    monkeypatch.setattr(Profiler, "parts", moved)
    ended = mine.extract()
    assert ended.code == 4 and "run.json cannot be written: No such file" in ended.err and not mine.run.exists(), ended.err
    monkeypatch.setattr(Profiler, "parts", parts)
    assert mine.extract(run=mine.run.with_name("elsewhere")).code == 0
    assert Store(mine.run.with_name("elsewhere")).progress("val").done == 60


# ---- shards that are asked for by and by ------------------------------------------------------------------------------


def test_an_id_that_stands_in_an_earlier_shard_is_refused_though_that_is_not_asked_for(mine):
    """With --shards, too, every shard of the data set is counted: the earlier ones are part of it."""
    shutil.copy(mine.sources / "v2/v2-00000.tar", mine.sources / "v2/v2-00001.tar")
    assert mine.extract("v2", "--shards", 1).code == 0
    assert "stands twice" in mine.extract("v2", "--shards", 2).refused()
    (mine.sources / "v2/v2-00001.tar").rename(mine.sources / "v2/a.tar")
    assert "stands twice" in mine.extract("v2", "--shards", 1).refused()


def test_shards_of_another_source_are_not_added_to_a_data_set(mine):
    """Under --shards as without it: what is part of the data set must be in --source."""
    (mine.sources / "v2/v2-00000.tar").rename(mine.sources / "val/z.tar")
    words = ["extract", "--run", mine.run, "--dataset", "val", "--model", tiny.MODEL, "--shards", 1, "--source"]
    assert tiny.call(*words, mine.sources / "val/val-00000.tar").code == 0
    assert "val-00000.tar is part of this data set, but not in --source" in tiny.call(*words, mine.sources / "val/z.tar").refused()


def test_a_source_may_be_a_link_to_a_folder(mine, small):
    """As mounted data often are; of archives, and of images."""
    (mine.sources / "link").symlink_to("val")
    ended = tiny.call("extract", "--run", mine.run, "--dataset", "val", "--source", mine.sources / "link", "--model", tiny.MODEL)
    assert ended.code == 0 and Store(mine.run).progress("val").done == 60, ended.err


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(mine):
    """Nor a device: it is said which folder cannot be written."""
    mine.run.mkdir()
    os.mkfifo(mine.run / ".begin.lock")
    assert str(mine.run / ".begin.lock") in (text := mine.extract().refused()) and "cannot be written" in text and text.endswith(": remove what lies there")


def test_a_pipe_in_the_place_of_what_a_job_is_at_is_not_waited_for(mine):
    (mine.run / "datasets").mkdir(parents=True)
    os.mkfifo(mine.run / "datasets" / ".val.at")
    with bad_input.no_hanging(mine.run):
        assert mine.extract().code == 0
    assert Store(mine.run).progress("val").done == 60


@pytest.mark.parametrize("folder", ["profiles", "rejects", "profiles/val", "rejects/val"])
def test_what_lies_where_a_folder_should_is_said_before_anything_is_computed(mine, folder):
    """And not by the first unit that cannot be written."""
    assert mine.extract().code == 0
    shutil.rmtree(mine.run / folder)
    os.mkfifo(mine.run / folder)
    text = mine.extract().refused()
    assert f"{mine.run / folder} is no folder" in text and "remove it" in text
    (mine.run / folder).unlink()
    assert mine.extract().code == 0 and Store(mine.run).progress("val").done == 60


@pytest.mark.parametrize("words", [(), ("--actors", 2)])
def test_weights_that_a_run_lost_are_said_before_anything_is_computed(mine, words):
    """Once, by the command itself, and not by every engine of its."""
    assert mine.extract().code == 0
    shutil.rmtree(mine.run / "profiles/val")
    (mine.run / "weights.safetensors").unlink()
    os.mkfifo(mine.run / "weights.safetensors")
    with bad_input.no_hanging(mine.run):
        text = mine.extract("val", *words).refused()
    assert "weights.safetensors, the run's own weights, cannot be used (it is not a regular file): remove it" in text
    (mine.run / "weights.safetensors").unlink()
    assert mine.extract().code == 0 and Store(mine.run).progress("val").done == 60


def test_an_index_that_was_killed_leaves_nothing_behind(mine, tmp_path):
    """The same command removes what it had half written of its statistics, and of itself."""
    assert mine.extract().code == 0
    for point in ("statistics.written", "index.written"):
        (tmp_path / "plan").mkdir()
        (tmp_path / "plan" / "0.json").write_text(json.dumps({"point": point, "action": "kill"}))
        assert tiny.process("index", "--run", mine.run, **{failpoints.VARIABLE: str(tmp_path / "plan")}).code == -signal.SIGKILL
        assert list(mine.run.rglob("*.tmp")), point
        shutil.rmtree(tmp_path / "plan")
    assert tiny.call("index", "--run", mine.run).code == 0
    assert not list(mine.run.rglob("*.tmp"))


def test_a_batch_is_a_multiple_of_the_threads_and_a_unit_of_the_batch():
    """To either it would be filled up: by others of the same batch, or by what two units of it compute."""
    assert [[begin.default_batch("cpu", side * side, threads) for threads in (1, 2, 3, 4)] for side in (224, 32)] == [[8, 8, 9, 8], [32, 32, 33, 32]]
    assert [begin.whole_batches(256, batch_size) for batch_size in (1, 7, 8, 33, 256, 300, 1024)] == [256, 252, 256, 231, 256, 300, 1024]
    assert begin.whole_batches(1024, begin.default_batch("cuda", 224 * 224, 3)) == 1024


def test_the_fused_engine_is_refused_where_it_is_not_exact(mine):
    """And the definition does it, as it does where no engine is named."""
    assert "--engine: fused is not exact for this network (" in mine.extract("val", "--engine", "fused", model="tiny:twice").refused() and not mine.run.exists()
    ended = mine.extract("val", "--engine", "vmap", model="tiny:twice")
    assert ended.code == 0 and "engine: vmap (as asked)" in ended.err


@pytest.mark.parametrize("engine", ["fused", "vmap"])
def test_network_that_cannot_be_used_in_the_precision_asked_for_is_refused(mine, engine):
    """Before every sample is set aside."""
    message = mine.extract("val", "--precision", "bf16", "--engine", engine, model="tiny:single").refused()
    assert f"by the engine {engine} in bf16 (float32 is wanted, not torch.bfloat16)" in message and not mine.run.exists()
    assert mine.extract("val", "--engine", engine, model="tiny:single").code == 0
