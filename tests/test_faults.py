"""Jobs that are killed, interrupted, poisoned, starved of disk or robbed of their input, as real processes: what a user sees, and that nothing is lost, doubled or wrong."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import digits
from pipeline.store import Store
from jobs.chaos.processes import Job, ending, finished, running, strangers
from shards import encoded, picture, write_tar

pytestmark = pytest.mark.processes
SEED = 7  # of the moments at which processes are killed
NAP = 0.3  # seconds that a batch takes longer, so that there is a moment to kill in

NETWORKS = '''
import os, signal, time
import torch
from torch import nn
from jobs.digits import DigitsNet
from pipeline.samples import Preprocessing

class Slow(DigitsNet):
    """The digits' network, which dawdles for NAP seconds a batch."""
    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", 0)))
        return super().forward(x)

class Touchy(nn.Module):
    """Kills its process at an image whose first pixel is pure red; raises at one whose first pixel is pure green."""
    preprocessing = Preprocessing(resize=None, crop=None, mean=(0, 0, 0), std=(1, 1, 1))
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", 0)))
        red, green, blue = x[:, :, 0, 0].T
        if ((red == 1) & (green == 0) & (blue == 0)).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if ((red == 0) & (green == 1) & (blue == 0)).any():
            raise ValueError("green is too much")
        return self.linear(self.conv(x).relu().mean((2, 3)))
'''
RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the jobs run: `networks.py` is importable here, as a user's own module is."""
    made = tmp_path_factory.mktemp("jobs")
    (made / "networks.py").write_text(NETWORKS)
    return made


def touchy(path: Path, count: int, first: int = 0, **marked: tuple[int, int, int]) -> Path:
    """A shard of `count` small images `00000`, ... from `first` on; `at_2=RED` paints the first pixel of the third."""
    members = []
    for i in range(count):
        image = picture(first + i)
        image.putpixel((0, 0), marked.get(f"at_{i}", (9, 9, 9)))
        members += [(f"{first + i:05d}.png", encoded(image, "PNG")), (f"{first + i:05d}.cls", b"1")]
    return write_tar(path, members)


def rows(run: Path, dataset: str = "val") -> dict[str, list]:
    """Every column of all profiles as Parquet readers see them, in the order of the IDs; floats as the bits they are."""
    table = pq.read_table(run / "profiles" / dataset).sort_by("sample_id")
    columns = {name: table[name].to_pylist() for name in table.column_names if name != "saliency"}
    for name in ("label_confidence", "prediction_confidence", "loss"):
        columns[name] = table[name].to_numpy().view(np.uint32).tolist()
    saliency = np.stack(table["saliency"].to_numpy())
    return columns | {"saliency": saliency.view(np.uint32).tolist()}


def rejects(run: Path, dataset: str = "val") -> dict[str, str]:
    """sample_id -> reason."""
    table = pq.read_table(run / "rejects" / dataset)
    assert len(set(table["sample_id"].to_pylist())) == table.num_rows
    return dict(zip(table["sample_id"].to_pylist(), table["reason"].to_pylist()))


def committed(run: Path) -> dict[str, tuple[int, int]]:
    """Unit -> the identity of its file: a unit that is done again gets another."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (run / "profiles" / "val").glob("*.parquet")}


# ---- killed and interrupted at random moments ------------------------------------------------------------------------


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


@pytest.mark.parametrize("pause", [0.0, 0.4])
def test_who_stops_a_job_twice_does_not_wait_for_it(folder, story, pause):
    """The second signal ends it where it is, in one line and with the same exit code; what is committed stays."""
    run = folder / f"twice-{pause}"
    with running(folder, "extract", "--run", run, "--dataset", "val", "--source", folder / "small", "--model", "networks:Slow", "--weights", folder / "digits/weights.safetensors", "--address", "local", env={"NAP": str(NAP)}) as job:
        job.until(lambda: len(committed(run)) >= 1)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(job.process.pid, number)
            time.sleep(pause)
        assert job.wait(5) == 4, job.stderr()
        said = [line for line in job.stderr().splitlines() if "stopped" in line]
        assert said and all(line.startswith("faultline: stopped") and line.endswith("what is done is kept, and the same command resumes") for line in said)
        assert strangers(job.stderr(), "val") == [] and [title for title in job.left_over(60) if "Agent" not in title] == []
    assert committed(run)


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


# ---- samples and shards that do harm ---------------------------------------------------------------------------------


def test_a_sample_that_kills_and_one_that_raises_are_set_aside_alone(folder):
    """Even the very first, on which the network would be tried. The job ends, all others are done, and a later look with --max-rejects 0 says so by its exit code at no cost."""
    source, run = folder / "touchy", folder / "touchy-run"
    touchy(source / "a.tar", 2, at_0=RED)
    touchy(source / "b.tar", 4, 2)
    touchy(source / "c.tar", 4, 6, at_1=GREEN)
    command = ["extract", "--run", run, "--dataset", "val", "--source", source, "--model", "networks:Touchy", "--address", "local", "--max-rejects"]
    with running(folder, *command, 2) as job:
        code, stderr = job.wait(360), job.stderr()
        assert code == 0, stderr
        assert job.stdout() == "" and strangers(stderr, "val") == []
    assert "check: the network's process ended (SIGKILL) on one of the images that were looked at: nothing is said about top-1" in stderr
    reasons = rejects(run)
    assert reasons.keys() == {"00000", "00007"}
    assert reasons["00000"] == "it killed its worker process 3 times"
    assert "green is too much" in reasons["00007"]
    assert rows(run)["sample_id"] == [f"{i:05d}" for i in range(10) if i not in (0, 7)]
    code, stderr = finished(folder, *command, 0)
    assert code == 3 and "nothing to do" in stderr and "more than --max-rejects 0" in stderr


def test_a_network_that_dies_on_every_image_is_refused(folder):
    """Tried on others than those it died on, and told when it dies on these too; nothing is written."""
    touchy(folder / "every" / "a.tar", 6, **{f"at_{i}": RED for i in range(6)})
    code, stderr = finished(folder, "extract", "--run", folder / "every-run", "--dataset", "val", "--source", folder / "every", "--model", "networks:Touchy", "--address", "local")
    assert code == 2 and strangers(stderr, "val") == [], stderr
    assert "--model: the process of networks:Touchy ends (SIGKILL)" in ending(stderr)
    assert not (folder / "every-run").exists()


def test_a_shard_that_breaks_during_the_job_stops_it_after_the_rest(folder):
    """One truncated, one gone after the census: exit code 4, a message that names one, the rest done; put back, the same command completes. Two engines share the work."""
    source, run = folder / "breaking", folder / "breaking-run"
    for i, name in enumerate("abcd"):
        touchy(source / f"{name}.tar", 6, 6 * i)
    command = ["extract", "--run", run, "--dataset", "val", "--source", source, "--model", "networks:Touchy"]
    with running(folder, *command, "--address", "local", "--actors", 2) as job:
        job.until(lambda: (run / "datasets" / "val.json").exists())
        for name in "bc":
            shutil.copy2(source / f"{name}.tar", folder / f"{name}.kept")
        (source / "b.tar").write_bytes((folder / "b.kept").read_bytes()[:3000])
        (source / "c.tar").unlink()
        assert job.wait() == 4, job.stderr()
        stderr = job.stderr()
    assert strangers(stderr, "val") == []
    message = ending(stderr).strip().splitlines()
    assert 1 <= len(message) <= 3 and message[0].startswith("faultline: 2 units of val were not done: ")
    assert re.search(r"\b[bc]\.tar\b", message[0]) and message[-1] == "what is done is kept; the same command resumes"
    assert rows(run)["sample_id"] == [f"{i:05d}" for i in [*range(6), *range(18, 24)]]
    for name in "bc":
        shutil.copy2(folder / f"{name}.kept", source / f"{name}.tar")
    code, stderr = finished(folder, *command)
    assert code == 0 and "(2 units)" in stderr, stderr
    assert rows(run)["sample_id"] == [f"{i:05d}" for i in range(24)]


def test_an_engine_that_cannot_start_ends_the_job(folder):
    """Weights of the run that were damaged: said in one to three lines, in bounded time."""
    source, run = folder / "plain", folder / "plain-run"
    touchy(source / "a.tar", 6)
    touchy(source / "b.tar", 6, 6)
    command = ["extract", "--run", run, "--dataset", "val", "--source", source, "--model", "networks:Touchy"]
    assert finished(folder, *command, "--max-samples", 1)[0] == 0
    (run / "weights.safetensors").write_bytes(b"no weights")
    code, stderr = finished(folder, *command, "--address", "local", seconds=180)
    assert code == 4, stderr
    assert strangers(stderr, "val") == []
    assert len(ending(stderr).strip().splitlines()) <= 3 and "weights.safetensors" in ending(stderr), stderr


# ---- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture()
def small_disk(tmp_path):
    """A file system of 600 KiB."""
    at = tmp_path / "disk"
    at.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(at)], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here (that needs root)")
    yield at
    subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_full_disk_stops_the_job_and_leaves_nothing_half(folder, small_disk):
    """Exit code 4 and the run's folder in the message; every file a reader sees is whole; after space is made the same command completes."""
    source, run, ballast = folder / "many", small_disk / "run", small_disk / "ballast"
    for i in range(12):
        touchy(source / f"{i:02d}.tar", 8, 8 * i)
    command = ["extract", "--run", run, "--dataset", "val", "--source", source, "--model", "networks:Touchy"]
    assert finished(folder, *command, "--max-samples", 8)[0] == 0
    ballast.write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 40_000))
    code, stderr = finished(folder, *command)
    assert code == 4, stderr
    assert str(run) in ending(stderr) and "No space left on device" in ending(stderr)
    assert len(ending(stderr).strip().splitlines()) <= 3
    half = rows(run)["sample_id"]
    assert 8 <= len(half) < 96 and not list(run.glob("*/val/.*.tmp"))
    ballast.unlink()
    assert finished(folder, *command)[0] == 0
    assert rows(run)["sample_id"] == [f"{i:05d}" for i in range(96)]
    assert Store(run).progress("val").done == 96
