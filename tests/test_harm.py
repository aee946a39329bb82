"""Jobs that are poisoned, starved of disk or robbed of their input, as real processes: the rest is done, and it is said what was not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harmful import GREEN, RED, rejects, rows, touchy, write_networks
from jobs.chaos.processes import ending, finished, running, strangers
from pipeline.store import Store

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the jobs run: `networks.py` is importable here, as a user's own module is."""
    return write_networks(tmp_path_factory.mktemp("jobs"))


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


def test_shards_that_break_during_the_job_and_a_slow_engine_hold_up_nobody(folder):
    """Two engines share the work. One holds its unit until all others are done: a unit that Ray had given to it in advance would never be. One shard is truncated and one gone
    after the census: exit code 4, a message that names one, the rest done; put back, the same command completes."""
    source, run = folder / "breaking", folder / "breaking-run"
    for i, name in enumerate("abcdefgh"):
        touchy(source / f"{name}.tar", 2, 2 * i)
    command = ["extract", "--run", run, "--dataset", "val", "--source", source, "--model", "networks:Straggler"]
    assert finished(folder, *command, "--max-samples", 2)[0] == 0
    with running(folder, *command, "--address", "local", "--actors", 2, env={"STRAGGLER": str(run), "ENOUGH": "5"}) as job:  # all but its own and the two
        job.until(lambda: "waiting for the first unit" in job.stderr())
        for name in "bc":
            shutil.copy2(source / f"{name}.tar", folder / f"{name}.kept")
        (source / "b.tar").write_bytes((folder / "b.kept").read_bytes()[:3000])
        (source / "c.tar").unlink()
        assert job.wait() == 4, job.stderr()
        stderr = job.stderr()
    assert (run / "first").exists() and not (run / "in-vain").exists()
    assert strangers(stderr, "val") == []
    message = ending(stderr).strip().splitlines()
    assert 1 <= len(message) <= 3 and message[0].startswith("faultline: 2 units of val were not done: ")
    assert re.search(r"\b[bc]\.tar\b", message[0]) and message[-1] == "what is done is kept; the same command resumes"
    assert rows(run)["sample_id"] == [f"{i:05d}" for i in [0, 1, *range(6, 16)]]
    for name in "bc":
        shutil.copy2(folder / f"{name}.kept", source / f"{name}.tar")
    code, stderr = finished(folder, *command)
    assert code == 0 and "(2 units)" in stderr, stderr
    assert rows(run)["sample_id"] == [f"{i:05d}" for i in range(16)]


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
