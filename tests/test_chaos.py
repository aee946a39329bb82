"""Rounds of faults by the command: a few of them in real processes, that they can fail, that they go on where they stopped, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from jobs.chaos.campaign import figures, kind_of, one, read_records
from jobs.chaos.ground import Ground, SmallDisk, cut
from jobs.chaos.kinds import KINDS
from jobs.chaos.processes import SHORT
from jobs.chaos.rounds import Record, Round
from jobs.chaos import rounds as rounds_module
from pipeline import failpoints

ZEROS = {"lost": 0, "doubled": 0, "wrong": 0, "beyond_the_bound": 0, "foul": 0}
FEW = ["killed at a point", "index killed", "paused"]


@pytest.mark.processes
def test_a_handful_of_rounds_leaves_every_sample_once_and_right(tmp_path):
    """One, and then the others where it stopped; the figures are those of the interface."""
    words = ["chaos", "--run", tmp_path / "chaos", "--kinds", ",".join(FEW), "--seed", 3, "--format", "json"]
    ended = tiny.process(*words, "--rounds", 1, seconds=240)
    assert ended.code == 0, ended.err
    first = (tmp_path / "chaos/rounds.jsonl").read_text()
    ended = tiny.process(*words, "--rounds", 3, seconds=240)
    assert ended.code == 0 and ended.err.startswith("1 of 3 rounds are done"), ended.err
    assert (tmp_path / "chaos/rounds.jsonl").read_text().startswith(first)
    assert ended.json.keys() >= {"rounds", "faults", "lost", "doubled", "wrong", "repeated_units"}
    assert ended.json | ZEROS == ended.json and ended.json["rounds"] == 3 and ended.json["faults"] == dict.fromkeys(ended.json["faults"], 1) and set(ended.json["faults"]) == set(FEW)
    assert not list((tmp_path / "chaos").glob("round-*")), "nothing of a clean round stays"
    ended = tiny.process(*words, "--rounds", 2)
    assert ended.code == 0 and ended.err == "" and ended.json["rounds"] == 2, "what is done is free"
    assert "other" in tiny.process(*words, "--rounds", 5, "--seed", 4).refused()


def test_what_a_killed_campaign_left_is_put_right(tmp_path, monkeypatch):
    """A shard that was altered when it died, a small disk of a round, Ray's files of its jobs: none is in the way of the next, and no later round is told that samples are lost."""
    monkeypatch.setenv(failpoints.VARIABLE, str(tmp_path / "failpoints"))
    ground, ray = Ground(tmp_path), Path(tempfile.mkdtemp(prefix="fl-", dir=SHORT))
    for folder in ("shards", "failpoints", "reference/experiments/prune", "round-00003"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "reference/experiments/prune/summary.json").touch()  # the undisturbed run is there
    (tmp_path / "round-00003" / f"{ray.name}.err").touch()
    shard, disk = tmp_path / "shards/val-005.tar", SmallDisk(tmp_path / "round-00003/disk", 600)
    shard.write_bytes(b"whole")
    times = shard.stat()
    dies = "import os, sys, pathlib; from jobs.chaos.ground import Ground\nwith Ground(pathlib.Path(sys.argv[1])).altered('val-005.tar') as shard: shard.write_bytes(b'who'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", dies, tmp_path]).returncode == -9 and shard.read_bytes() == b"who"
    assert disk.mounted == disk.at.is_mount()
    ground.prepare()
    assert shard.read_bytes() == b"whole" and shard.stat().st_mtime_ns == times.st_mtime_ns and not list((tmp_path / "kept").iterdir())
    assert not disk.at.is_mount() and not ray.exists()
    assert Round(ground, 3, 0).folder.is_dir(), "the round that it died in begins again"
    with ground.altered(shard.name) as same:
        same.unlink()
    assert shard.read_bytes() == b"whole" and shard.stat().st_mtime_ns == times.st_mtime_ns


# ---- that it can fail ------------------------------------------------------------------------------------------------


def profiles(path, ids, value=1.0):
    count = len(ids)
    columns = {"sample_id": ids, "label": pa.array([0] * count, pa.int32()), "prediction": pa.array([1] * count, pa.int32()), "label_confidence": pa.array([0.25] * count, pa.float32())}
    columns |= {"prediction_confidence": pa.array([0.5] * count, pa.float32()), "loss": pa.array([1.5] * count, pa.float32())}
    columns |= {"saliency": pa.array([[value, 2.0]] * count, pa.list_(pa.float32(), 2)), "thumbnail": [b"J"] * count, "shard": ["a.tar"] * count}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def round_(tmp_path, monkeypatch):
    """A round whose undisturbed run holds a, b, c and d."""
    monkeypatch.setenv(failpoints.VARIABLE, str(tmp_path / "failpoints"))
    ground = Ground(tmp_path)
    ground.failpoints.mkdir()
    profiles(ground.reference / "profiles/val/a-00000000-00000004.parquet", list("abcd"))
    return Round(ground, 0, 0)


@pytest.mark.parametrize(
    "files, rejected, counts",
    [
        ([("abcd", 1.0)], {}, (0, 0, 0)),
        ([("abc", 1.0)], {}, (1, 0, 0)),
        ([("abcd", 1.0), ("d", 1.0)], {}, (0, 1, 0)),
        ([("abc", 1.0), ("d", 1.0000001)], {}, (0, 0, 1)),
        ([("abcde", 1.0)], {}, (0, 0, 1)),
        ([("abc", 1.0)], {"d": "it killed its worker process 3 times"}, (0, 0, 0)),
        ([("abcd", 1.0)], {"d": "it killed its worker process 3 times"}, (0, 1, 0)),
        ([("abd", 1.0)], {"c": "it killed its worker process 3 times"}, (0, 0, 1)),
        ([("abc", 1.0)], {"d": "label 4 is outside"}, (0, 0, 1)),
    ],
    ids=["right", "lost", "doubled", "other bits", "a stranger", "poison set aside", "set aside and profiled", "another set aside", "another reason"],
)
def test_what_is_lost_doubled_or_wrong_is_counted(round_, files, rejected, counts):
    """By the files alone, as any reader sees them; d is the sample that kills, where one does."""
    round_.poison, round_.codes = ("d" if rejected else None), [0]
    for i, (ids, value) in enumerate(files):
        profiles(round_.run / f"profiles/val/{i}-00000000-00000004.parquet", list(ids), value)
    (round_.run / "rejects/val").mkdir(parents=True)
    pq.write_table(pa.table({"sample_id": pa.array(list(rejected), pa.string()), "shard": ["a.tar"] * len(rejected), "reason": pa.array(list(rejected.values()), pa.string())}), round_.run / "rejects/val/0-00000000-00000004.parquet")
    record = round_.record("killed", 1.0)
    assert (record.lost, record.doubled, record.wrong) == counts
    assert record.clean is (counts == (0, 0, 0))


def test_vectors_that_are_computed_again_are_counted(round_):
    trace = round_.ground.failpoints / "trace"
    trace.write_text("profile\ta.tar\t0\t8\t1\nprofiled\ta.tar\t0\t8\t1\nprofiled\tb.tar\t0\t8\t1\nprofiled\ta.tar\t0\t8\t2\nprofiled\tb.tar\t4\t8\t2\nprofiled\ta.tar\t8\t16\t2\n")
    assert round_.repeated() == 2


def test_a_job_that_never_completes_is_foul(round_, monkeypatch):
    monkeypatch.setattr(Round, "start", lambda self: None)
    monkeypatch.setattr(Round, "end", lambda self, *expected: self.codes.append(4))
    round_.codes = [4]
    round_.complete()
    assert len(round_.codes) == 1 + rounds_module.AGAIN and "not done after" in round_.foul[0]


def test_what_was_waited_for_in_vain_is_foul_and_the_job_is_completed_like_any_other(tmp_path, monkeypatch):
    """What such a round lost is counted after the same command has been given again, not where it was broken off."""
    ended = []

    class Endless:
        def clear(self):
            ended.append(self)
            self.process = type("Process", (), {"wait": lambda self, seconds: -9})()

    def in_vain(r):
        r.job = Endless()
        raise AssertionError("did not happen in 120 s")

    def complete(self):
        assert self.codes == [-9] and len(ended) == 1
        self.codes.append(0)
        profiles(self.run / "profiles/val/a-00000000-00000004.parquet", list("abcd"))

    monkeypatch.setenv(failpoints.VARIABLE, str(tmp_path / "failpoints"))
    monkeypatch.setitem(KINDS, "in vain", in_vain)
    monkeypatch.setattr(Round, "complete", complete)
    ground = Ground(tmp_path)
    ground.failpoints.mkdir()
    profiles(ground.reference / "profiles/val/a-00000000-00000004.parquet", list("abcd"))
    record = one(ground, 0, 0, "in vain")
    assert record.foul == ["did not happen in 120 s"] and record.codes == [-9, 0] and (record.lost, record.doubled, record.wrong) == (0, 0, 0)


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_every_kind_comes_once_in_as_many_rounds_and_the_seed_decides_the_order():
    kinds = list(KINDS)
    for turn in range(3):
        assert sorted(kind_of(turn * len(kinds) + i, 5, kinds) for i in range(len(kinds))) == sorted(kinds)
    orders = {tuple(kind_of(i, seed, kinds) for i in range(len(kinds))) for seed in range(5)}
    assert len(orders) == 5 and tuple(kind_of(i, 3, kinds) for i in range(len(kinds))) in orders


def test_a_line_that_was_cut_off_counts_for_nothing(tmp_path):
    record = Record(0, "killed", "", [-9, 0], 0, 0, 0, 1, 1, 2.0, [])
    (tmp_path / "rounds.jsonl").write_text(record.to_json() + "\n" + record.to_json()[:40])
    assert read_records(tmp_path) == [record]
    assert figures([record, record])["repeated_units"] == 2


@pytest.mark.parametrize("words, says", [(["--rounds", 0], "--rounds: 0 is less than 1"), (["--kinds", "killed,flooded"], "--kinds: there is no 'flooded'"), ([], "holds something else")])
def test_what_cannot_be_is_refused(tmp_path, words, says):
    (tmp_path / "mine.txt").write_text("mine")
    assert says in tiny.call("chaos", "--run", tmp_path, *words).refused()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_shards_are_cut_as_webdataset_has_them(tmp_path):
    from jobs import digits
    from pipeline.sources import open_source

    images = digits._images()[:520]
    digits._write_shard(tmp_path / "all.tar", images)
    cut([tmp_path / "all.tar"], tmp_path / "cut")
    source, names = open_source(str(tmp_path / "cut"))
    ids = [s.sample_id for name in names for s in source.read(source.census(name).marks, name, 0, source.census(name).samples)]
    assert ids == [image.sample_id for image in images[: len(ids)]] and len(names) * 8 == len(ids) == 256


def test_the_tables_of_reliability_are_what_the_rounds_came_to():
    import endurance

    assert endurance.page() == (endurance.ROOT / "docs/reliability.md").read_text(encoding="utf-8"), "python tests/endurance.py draw writes them"
    records = read_records(endurance.DATA)
    assert [r.round for r in records] == list(range(len(records))) and json.loads((endurance.DATA / "chaos.json").read_text())["kinds"] == list(KINDS)
    text = " ".join((endurance.ROOT / "docs/reliability.md").read_text(encoding="utf-8").split())
    assert f"{len(records)} rounds" in text and not any(not r.clean for r in records)
