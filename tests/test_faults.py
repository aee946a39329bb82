"""Jobs that are killed and interrupted at random moments, as real processes: what a user sees, and that nothing is lost, doubled or wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from harmful import rejects, rows, write_networks
from jobs import digits
from jobs.chaos.processes import Job, ending, finished, running, strangers
from jobs.servers import SERVERS
from shards import write_tar

pytestmark = pytest.mark.processes
SEED = 7  # of the moments at which processes are killed
NAP = 0.3  # seconds that a batch takes longer, so that there is a moment to kill in


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the jobs run: `networks.py` is importable here, as a user's own module is."""
    return write_networks(tmp_path_factory.mktemp("jobs"))


def committed(run: Path) -> dict[str, tuple[int, int]]:
    """Unit -> the identity of its file: a unit that is done again gets another."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (run / "profiles" / "val").glob("*.parquet")}


@dataclass
class Round:
    """One start of the command. `before`: files when it was last hurt; `after`: when it had ended."""

    hurt: list[str]
    code: int
    stderr: str
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]
    seconds: float  # from the last hurt to the end
    left_over: list[str]


@dataclass
class Story:
    """The same command, again and again, until it ends by itself."""

    rounds: list[Round]
    run: Path
    reference: Path
    units: int
    second: tuple[int, str]  # another job on the same data set, while the first round runs


@pytest.fixture(scope="module")
def story(folder) -> Story:
    """Four starts, in which five processes are killed: actor, decode worker and driver, twice each but for the driver; one start is interrupted, one terminated while Ray's workers start."""
    made = digits.write(folder / "digits")
    units = in_small_shards(made, folder / "small")
    words = ["--dataset", "val", "--source", folder / "small", "--model", "networks:Slow", "--weights", made.weights]
    assert finished(folder, "extract", "--run", folder / "reference", *words)[0] == 0
    run, chance, second = folder / "run", random.Random(SEED), None
    command = ["extract", "--run", run, *words, "--address", "local"]
    rounds = []
    for hurts in (["actor", "SIGINT"], ["SIGTERM"], ["decode worker", "driver"], ["decode worker", "actor"]):
        with running(folder, *command, env={"NAP": str(NAP)}) as job:
            if second is None:
                job.until(lambda: (run / "datasets" / "val.json").exists())
                second = finished(folder, *command)
            for what in hurts:
                before = hurt(job, what, run, chance)
            start = time.monotonic()
            code, seconds, left_over = job.wait(), time.monotonic() - start, job.left_over(90)
            rounds.append(Round(hurts, code, job.stderr(), before, committed(run), seconds, left_over))
    return Story(rounds, run, folder / "reference", units, second)


def in_small_shards(made: digits.Digits, folder: Path, each: int = 32) -> int:
    """The digits' `val` in shards of `each` samples, two files a sample; returns how many shards, each of which is one unit."""
    members = []
    for shard in made.shards("val"):
        with tarfile.open(shard) as tar:
            members += [(member.name, tar.extractfile(member).read()) for member in tar]
    parts = [members[i : i + 2 * each] for i in range(0, len(members), 2 * each)]
    for i, part in enumerate(parts):
        write_tar(folder / f"val-{i:03d}.tar", part)
    return len(parts)


def hurt(job: Job, what: str, run: Path, chance: random.Random) -> dict[str, tuple[int, int]]:
    """Do it at a random moment after a few more units, SIGTERM before the first; returns the files that were committed then."""
    if what == "SIGTERM":
        job.until(lambda: "waiting for the first unit" in job.stderr())
        job.process.terminate()  # as a scheduler does
        return committed(run)
    enough = len(committed(run)) + chance.randint(1, 4)
    job.until(lambda: len(committed(run)) >= enough)
    time.sleep(chance.uniform(0, NAP))
    before = committed(run)
    if what == "driver":
        job.kill()
    elif what == "SIGINT":
        os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does
    else:
        title = {"actor": ("_Writer",), "decode worker": ("_decode", "ray::IDLE")}[what]
        job.until(lambda: next((p for word in title if (p := job.find(word))), None)).kill()
    return before


def test_rows_are_bit_equal_to_an_undisturbed_run(story):
    """After five kills and two interruptions: every ID once, every bit of every column."""
    expected, got = rows(story.reference), rows(story.run)
    assert len(got["sample_id"]) == len(set(got["sample_id"])) == 1098
    for name, values in expected.items():
        assert got[name] == values, name
    assert rejects(story.run) == {}


def test_only_units_in_flight_are_repeated(story):
    """A committed unit's file is never written again, but for the one whose receipt died with its actor; a resumed job runs the others alone."""
    for number, r in enumerate(story.rounds):
        again = [name for name, identity in r.before.items() if r.after[name] != identity]
        assert len(again) <= r.hurt.count("actor"), (number, r.hurt, again)
    done = len(story.rounds[-2].after)
    assert 0 < done < story.units
    assert f"({story.units - done} units)" in story.rounds[-1].stderr
    assert not list(story.run.glob("*/val/.*.tmp")), "what killed attempts left behind is swept"


def test_a_killed_actor_or_decode_worker_does_not_end_the_job(story):
    """The last round lost one of each, and ended with exit code 0 all the same."""
    assert story.rounds[-1].hurt == ["decode worker", "actor"]
    assert story.rounds[-1].code == 0, story.rounds[-1].stderr


@pytest.mark.parametrize("number", [0, 1], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_job_ends_soon_and_in_one_line(story, number):
    r = story.rounds[number]
    assert r.code == 4, r.stderr
    assert r.seconds < 10
    assert ending(r.stderr).strip() == "faultline: stopped; what is done is kept, and the same command resumes"


def test_who_stops_a_job_twice_does_not_wait_for_it(folder, story):
    """The second signal ends it where it is, in one line and with the same exit code; what is committed stays. Of a group that is told, Ray's servers may be told first: that they are told ends nothing."""
    run = folder / "twice"
    with running(folder, "extract", "--run", run, "--dataset", "val", "--source", folder / "small", "--model", "networks:Slow", "--weights", folder / "digits/weights.safetensors", "--address", "local", env={"NAP": str(NAP)}) as job:
        job.until(lambda: len(committed(run)) >= 1)
        servers = [p for p in job.family() if p.name() in SERVERS]
        assert len(servers) == 2
        for number in (signal.SIGTERM, signal.SIGHUP):
            for server in servers:
                server.send_signal(number)
        time.sleep(1)
        before = len(committed(run))
        job.until(lambda: len(committed(run)) > before)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(job.process.pid, number)
        assert job.wait(5) == 4, job.stderr()
        said = [line for line in job.stderr().splitlines() if "stopped" in line]
        assert said and all(line.startswith("faultline: stopped") and line.endswith("what is done is kept, and the same command resumes") for line in said)
        assert strangers(job.stderr(), "val") == [] and [title for title in job.left_over(60) if "Agent" not in title] == []
    assert committed(run)


AS_RAY_STARTS = """
import os, signal, sys
from ray._private.node import Node
from jobs.cli import main

theirs = Node.start_head_processes
Node.start_head_processes = lambda node: (theirs(node), os.kill(os.getpid(), signal.SIGTERM))
sys.argv[0] = "faultline"
main()
"""


def test_a_job_that_is_told_to_stop_while_ray_starts_stops_in_its_own_words(folder, story):
    """Ray has put its own answer to SIGTERM there by then, which would end the process with an exit code of its own."""
    words = ["extract", "--run", folder / "early", "--dataset", "val", "--source", folder / "small", "--model", "networks:Slow", "--weights", folder / "digits/weights.safetensors", "--address", "local"]
    r = subprocess.run([sys.executable, "-c", AS_RAY_STARTS, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=120)
    assert r.returncode == 4, r.stderr
    assert ending(r.stderr).strip() == "faultline: stopped; what is done is kept, and the same command resumes"


def test_nothing_on_stderr_is_rays(story):
    """Whatever happens to the job, each line is one that faultline means to say."""
    for r in story.rounds:
        assert strangers(r.stderr, "val") == []


def test_no_process_outlives_its_job(story):
    """Engines, decode workers and Ray's own servers go with the driver, however it ends; a worker that was just starting, and two idle agents of Ray, may take a minute to notice."""
    assert [[title for title in r.left_over if "Agent" not in title] for r in story.rounds] == [[]] * len(story.rounds)


def test_a_second_job_on_the_same_data_set_is_refused(story):
    """While the first runs. After the first was killed nothing is in the way: the later rounds of the story are the proof."""
    code, stderr = story.second
    assert code == 2
    assert "another job is writing val" in ending(stderr) and str(story.run) in ending(stderr)
