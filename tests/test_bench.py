"""`faultline bench`: what is measured stands beside its floor from the same run, and what cannot be measured is told before anything is."""

import subprocess
import sys

import psutil
import pytest
import tiny

from jobs.bench import engine
from jobs.bench import pipeline as line


def bench(*more):
    return tiny.call("bench", "engine", "--batch-size", 4, "--rounds", 2, "--format", "json", *more)


def test_every_contender_has_its_row():
    ended = bench("--models", "resnet20")
    rows = {row["engine"]: row for row in ended.json}
    assert ended.code == 0 and set(rows) == {"step", "step-folded", "fused", "vmap", "loop"}
    assert rows["step"]["ratio_to_step"] == 1 and all(row["images_per_s"] > 0 and row["batch_size"] == 4 and row["device"] == "cpu" for row in rows.values())
    for row in rows.values():
        assert row["ratio_to_step"] == pytest.approx(rows["step"]["images_per_s"] / row["images_per_s"])
    assert all(rows[engine]["relative_error"] < 1e-4 for engine in ("fused", "vmap")) and rows["step"]["relative_error"] is None


def test_who_is_far_behind_has_three_turns():
    """By what they took in the middle of them; and who dropped out stays out, whatever the step takes later."""
    assert engine.contending({"step": [1.0, 1.0], "loop": [9.0, 9.0]}) == ["step", "loop"]
    assert engine.contending({"step": [1.0, 1.0, 1.0], "fused": [9.0, 0.9, 0.9], "loop": [2.1, 1.0, 2.1]}) == ["step", "fused"]
    assert engine.contending({"step": [1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0], "fused": [0.9] * 7, "loop": [2.1] * 3}) == ["step", "fused"]
    assert engine.contending({"step": [1.0] * 4, "loop": [1.0, 1.0, 2.1, 2.1]}) == ["step", "loop"]


def test_the_loop_is_left_out_of_the_rounds_after_its_three(monkeypatch):
    """Its row stays. What counts as far is set so near here that the loop is beyond it on a busy machine too."""
    monkeypatch.setattr(engine, "FAR", 1.1)
    ended = bench("--models", "resnet20", "--batch-size", 16, "--rounds", 5, "--engines", "loop")
    rounds = [line.partition(", ")[2] for line in ended.err.splitlines() if "resnet20: round" in line]
    assert [("step" in r, "loop" in r) for r in rounds] == [(True, True)] * 3 + [(True, False)] * 2
    assert [row["engine"] for row in ended.json] == ["step", "loop"] and ended.json[1]["ratio_to_step"] > 1.1


def test_the_memory_of_a_step_has_its_gradients_in_it():
    """A batch of one needs little else: AlexNet has 61 million weights, and its filter saliency needs no gradient of them."""
    step, fused = (row["peak_bytes"] for row in bench("--models", "alexnet", "--batch-size", 1, "--engines", "fused").json)
    assert step > 0.9 * 4 * 61_100_840 > fused


def test_the_step_is_always_there_and_a_network_without_a_fused_engine_says_why():
    ended = bench("--models", "tiny:twice", "--engines", "fused,vmap")
    assert [row["engine"] for row in ended.json] == ["step", "vmap"] and "tiny:twice: fused cannot do it (" in ended.err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--models", " ,"), "--models: names nothing; leave it out for resnet50,"),
        (("--models", "resnet5"), "--models: there is no 'resnet5'"),
        (("--models", "resnet20", "--engines", "fast"), "--engines: 'fast' is not one of step"),
        (("--models", "resnet20", "--precision", "fp8"), "--precision: 'fp8'"),
        (("--models", "resnet20", "--precision", "tf32"), "tf32 exists on CUDA"),
        (("--models", "resnet20", "--rounds", "0"), "--rounds: 0 is less than 1"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is(words, message):
    assert message in bench(*words).refused()


def test_a_peer_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    assert "opacus-ew is not installed: pip install 'faultline[bench]'" in bench("--models", "resnet20", "--engines", "opacus-ew").refused()


@pytest.mark.parametrize("name", ["opacus-hooks", "opacus-functorch", "opacus-ew", "backpack"])
def test_peers_give_the_same_filter_saliency(name):
    """Where they are installed: their per-sample gradients, reduced, are ours."""
    pytest.importorskip(name.partition("-")[0], reason="pip install 'faultline[bench]'")
    rows = bench("--models", "tiny:Palette", "--engines", name).json
    assert [row["engine"] for row in rows] == ["step", name] and rows[1]["relative_error"] < 1e-4


def test_an_index_is_measured_beside_its_floors():
    ended = tiny.call("bench", "index", "--rows", 300, "--filters", 16, "--rounds", 1, "--format", "json")
    assert ended.code == 0
    rows = {row["what"]: row for row in ended.json}
    assert list(rows) == ["build: statistics and index", "batch search of 10 neighbours", "one query by ID in a warm process", "one query as a cold command"]
    for row in rows.values():
        assert row["value"] > 0 and (row["floor"] is None or row["ratio"] == pytest.approx(row["value"] / row["floor"]))
    assert "--rows: 3 is less than 11" in tiny.call("bench", "index", "--rows", 3).refused()


def test_the_line_is_measured_beside_the_engine_and_stage_by_stage():
    ended = tiny.call("bench", "pipeline", "--max-samples", 300, "--actors", "", "--rounds", 2, "--format", "json")
    assert ended.code == 0 and "round 2 of 2" in ended.err, ended.err
    rows = {row["what"]: row for row in ended.json}
    stages = [rows[f"{stage}, of one image"] for stage in ("read", "decode", "engine", "write")]
    assert sum(row["ratio"] for row in stages) == pytest.approx(1) and all(row["value"] > 0 for row in stages)
    assert rows["transfer, of one image"]["floor"] == stages[2]["value"] > rows["transfer, of one image"]["value"] > 0, "a part of the engine's"
    assert rows["engine"]["value"] == pytest.approx(1000 / stages[2]["value"])
    assert rows["whole line in one process"]["floor"] > 0 and ended.err.count("the stages\n") == 3, "before and after each line"


def test_a_line_is_compared_with_the_engine_of_its_own_minutes():
    """A machine that was twice as fast for a round, the line and its engine alike, changes no ratio."""
    stages = {"read": 1.0, "decode": 2.0, "transfer": 0.5, "engine": 5.0, "write": 2.0}
    *_, engine, one, two = line._measures(stages, {"in one process": [(90, 100), (180, 200), (80, 100)], "with 1 engine on Ray": [(100, 100)]})
    assert engine.value == 200
    assert (one.what, one.value, one.floor, one.ratio) == ("whole line in one process", 90, 100, 0.9)
    assert (two.what, two.ratio) == ("whole line with 1 engine on Ray", 1.0)


def test_a_line_of_too_few_units_has_no_rate():
    """Two units that end at once would seem to take no time."""
    ended = tiny.call("bench", "pipeline", "--max-samples", 60, "--actors", "", "--format", "json")
    assert ended.code == 0 and "no rate of 1 engine from 1 unit, but from 2 on: more --max-samples" in ended.err
    assert not [row for row in ended.json if row["what"].startswith("whole line")]


def test_nobody_begins_before_those_of_the_turn_before_are_at_rest(monkeypatch):
    """Seen by what they take of a core, and not waited for without end."""
    spin = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass\ntime.sleep(60)"
    for seconds, patience, at_rest in ((1.5, 60, True), (60, 1, False)):
        monkeypatch.setattr(line, "PATIENCE", patience)
        with subprocess.Popen([sys.executable, "-c", spin.format(seconds)]) as process:
            line._rest()
            spent = sum(psutil.Process(process.pid).cpu_times()[:2])
            assert (spent > 1.4) == at_rest and process.poll() is None
            process.kill()


@pytest.mark.parametrize("words, message", [(("--source", "x.tar"), "--source and --model go together"), (("--weights", "x.pth"), "--weights and --preprocess are of a network that --model names"), (("--actors", "1,no"), "--actors: 'no' is no number"), (("--max-samples", "0"), "--max-samples: 0 is less than 1"), (("--max-samples", "4097"), "--max-samples: 4,097 is more than the 4,096 that go through a line in one process"), (("--rounds", "0"), "--rounds: 0 is less than 1")])
def test_a_line_that_cannot_be_measured_is_refused(words, message):
    assert message in tiny.call("bench", "pipeline", *words).refused()


def test_a_map_is_measured_beside_plain_passes_of_the_same_images():
    rows = tiny.call("bench", "maps", "--models", "resnet20", "--rounds", "1", "--format", "json").json
    assert [row["beside"] for row in rows] == ["forward and backward, together", "forward and backward, one by one"]
    assert all(row["ratio"] == pytest.approx(row["floor"] / row["value"]) and row["ratio"] > 1 for row in rows), "a map is made of more than one pass"
