"""Where a job's words go: a stderr that is full, closed or gone ends no job, and a closed terminal is a Ctrl-C."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny

from pipeline import failpoints
from pipeline.store import Store


@pytest.fixture
def mine(small, tmp_path):
    return tiny.Small(tmp_path / "run", shutil.copytree(small.sources, tmp_path / "sources"))


def words(mine: tiny.Small) -> list[str]:
    return [str(w) for w in (tiny.COMMAND, "extract", "--run", mine.run, "--dataset", "val", "--source", mine.sources / "val", "--model", tiny.MODEL)]


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>&- >&-", ">&- <&-"])
def test_a_job_ends_well_though_its_words_cannot_be_written(mine, redirection):
    """A log disk that is full, and streams that were closed before it began: every sample is there, and no word is where results belong."""
    done = subprocess.run(["/bin/bash", "-c", f'exec "$@" {redirection}', "bash", *words(mine)], capture_output=True, env=tiny.surroundings(), timeout=120)
    assert done.returncode == 0 and done.stdout == b"", done.stderr.decode()
    assert Store(mine.run).progress("val").done == 60


def test_what_a_network_prints_is_no_result(mine):
    """Programs that read stdout get the answer alone; what was printed can be seen on stderr."""
    ended = mine.extract(model="tiny:noisy")
    assert ended.code == 0 and ended.out == "" and "so many: " in ended.err
    assert tiny.call("index", "--run", mine.run).code == 0
    ended = tiny.call("explain", "val:00001", "--run", mine.run, "--format", "json", "--device", "cpu", "--out", mine.run.parent / "map.png")
    assert ended.code == 0 and ended.json["sample_id"] == "00001" and "so many: " in ended.err, ended.err


def test_what_a_network_writes_past_python_is_no_result_either(mine):
    """A descriptor, C and a process that it starts know nothing of `sys.stdout`."""
    assert mine.extract(model="tiny:shouting").code == 0
    assert tiny.call("index", "--run", mine.run).code == 0
    ended = tiny.process("explain", "val:00001", "--run", mine.run, "--format", "json", "--device", "cpu", "--out", mine.run.parent / "map.png")
    assert ended.code == 0 and ended.json["sample_id"] == "00001", ended.err
    assert {"printed", "underscored", "described", "formatted", "echoed", "threaded"} <= set(ended.err.split())


def test_a_network_that_closes_stdout_closes_only_its_own(mine):
    """What it has left to say is lost, what the job has to say is not."""
    ended = tiny.process("extract", "--run", mine.run, "--dataset", "val", "--source", mine.sources / "val", "--model", "tiny:slamming", "--force")
    assert ended.code == 0 and ended.out == "" and "60 of 60 images" in ended.err and "Traceback" not in ended.err, ended.err
    assert Store(mine.run).progress("val").done == 60


@pytest.mark.processes
def test_a_network_of_somebody_works_in_the_thread_that_made_it(mine):
    """It may want it, for signals or for what it keeps for a thread; an engine that is alone on Ray could have others."""
    ended = tiny.process("extract", "--run", mine.run, "--dataset", "val", "--source", mine.sources / "val", "--model", "tiny:bound", "--force", "--actors", 1)
    assert ended.code == 0 and Store(mine.run).progress("val").done == 60, ended.err


@pytest.mark.parametrize("words", [["query", "val:00001"], ["status", "--format", "json"]])
def test_results_that_find_no_room_are_said_to_be_lost(small, words):
    done = subprocess.run(["/bin/bash", "-c", 'exec "$@" >/dev/full', "bash", tiny.COMMAND, *words, "--run", str(small.run)], capture_output=True, text=True, env=tiny.surroundings(), timeout=60)
    assert done.returncode == 4 and done.stderr == "faultline: stdout cannot be used (No space left on device): put that right and give the same command again\n"


@pytest.mark.parametrize("redirection", ["2>&-", "2>&- <&-"])
def test_what_is_asked_of_another_process_is_answered_though_stderr_is_closed(redirection):
    """Its words do not get among its answer."""
    code = "from jobs.progress import settle_streams; settle_streams(); from jobs.apart import apart; print(apart(eval, '(print(1), 2)'))"
    done = subprocess.run(["/bin/bash", "-c", f'exec "$@" {redirection}', "bash", sys.executable, "-c", code], capture_output=True, text=True, env=tiny.surroundings(), timeout=60)
    assert (done.returncode, done.stdout) == (0, "(None, 2)\n")


def on_a_terminal(mine: tiny.Small, ignore: bool) -> tuple[subprocess.Popen, int]:
    """The job with a terminal of its own as stderr, and our end of that. ignore: SIGHUP, as under nohup."""
    ours, theirs = pty.openpty()
    (mine.run.parent / "slow").mkdir()
    (mine.run.parent / "slow" / "00.json").write_text('{"point": "decode", "action": "sleep", "seconds": 0.7, "times": null}')

    def begin() -> None:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignore else signal.SIG_DFL)

    job = subprocess.Popen(words(mine), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, preexec_fn=begin, env=tiny.surroundings(**{failpoints.VARIABLE: str(mine.run.parent / "slow")}))
    os.close(theirs)
    limit = time.monotonic() + 100
    while not list(mine.run.glob("profiles/val/*.parquet")):
        assert time.monotonic() < limit and job.poll() is None
        time.sleep(0.02)
    return job, ours


def test_a_job_outlives_its_terminal_where_it_was_told_to(mine):
    """Under nohup: the bar has nowhere to be drawn any more, and all is done."""
    job, ours = on_a_terminal(mine, ignore=True)
    os.close(ours)
    assert job.wait(100) == 0
    assert Store(mine.run).progress("val").done == 60


def test_the_end_of_its_terminal_stops_a_job_like_a_ctrl_c(mine):
    job, ours = on_a_terminal(mine, ignore=False)
    os.close(ours)
    job.send_signal(signal.SIGHUP)  # as the system sends to whoever is in front on that terminal
    assert job.wait(20) == 4
    assert 0 < Store(mine.run).progress("val").done < 60
    assert subprocess.run(words(mine), capture_output=True, env=tiny.surroundings(), timeout=100).returncode == 0
