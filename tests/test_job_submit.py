"""`ray job submit` end to end against a local head: the code that is shipped is the code that runs, in every process; a job that is stopped goes on by the same command.

    FAULTLINE_SUBMIT=1 pytest -n 0 tests/test_job_submit.py      two minutes on 2 cores that have nothing else to do

Skipped otherwise: beside other tests on few cores Ray's dashboard and the job's workers do not come up in any time that could be set.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from harmful import rows
from jobs.chaos.processes import finished
from pipeline.store import Store
from shards import write_shard

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not os.environ.get("FAULTLINE_SUBMIT"), reason="FAULTLINE_SUBMIT is not set: two minutes of free cores are wanted")]
ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
STARTS = 3  # of the head
PATIENCE = 240  # seconds that a dashboard and its agent may take to come up on busy cores
SHARDS, EACH = 12, 5
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef0123", "RAY_USAGE_STATS_ENABLED": "0"}

NETWORK = '''
import time
import torch
from pipeline.samples import Preprocessing

class Net(torch.nn.Sequential):
    """Known nowhere but in what is shipped; it takes its time."""
    preprocessing = Preprocessing(resize=16, crop=16)
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    def forward(self, x):
        time.sleep(0.3)
        return super().forward(x)
'''
NOTE = """
import os, pathlib, sys
pathlib.Path({folder!r}, f"{{os.getpid()}}-{{pathlib.Path(sys.argv[0]).name}}").write_text(__file__)
"""


@pytest.fixture(scope="module")
def head():
    """The address of a head's job server, as `ray start --head` of the docs starts it; all of it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fl-", dir="/tmp" if os.path.isdir("/tmp") else None, ignore_cleanup_errors=True) as own:
        try:
            yield started(Path(own))
        finally:
            for process in psutil.process_iter(["cmdline"]):
                if any(own in word for word in process.info["cmdline"] or ()):
                    process.kill()


def started(folder: Path) -> str:
    """On busy cores a head ends before its servers have come up: it is started again."""
    for _ in range(STARTS):
        port, agent = free_port(), free_port()
        words = ["--head", "--block", "--port", "0", "--dashboard-port", port, "--dashboard-agent-listen-port", agent, "--num-cpus", "2", "--include-dashboard", "true", "--temp-dir", folder]
        with open(folder / "said", "wb") as said:
            process = subprocess.Popen([RAY, "start", *map(str, words)], cwd=folder, env=elsewhere(), stdout=said, stderr=said, start_new_session=True)
        limit = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < limit:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return f"http://127.0.0.1:{port}"
            time.sleep(0.5)
    pytest.skip(f"no head of Ray came up here: {(folder / 'said').read_text()[-500:]}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """The code as a user ships it, and in it a network that is nowhere else. Every process that imports it leaves a note in `notes/`."""
    made = tmp_path_factory.mktemp("submitted")
    (made / "notes").mkdir()
    for package in ("pipeline", "index", "jobs"):
        shutil.copytree(ROOT / package, made / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    (made / "code" / "shipped.py").write_text(NETWORK)
    with open(made / "code" / "pipeline" / "worker.py", "a") as file:
        file.write(NOTE.format(folder=str(made / "notes")))
    for i in range(SHARDS):
        write_shard(made / "shards" / f"{i:02d}.tar", [0, 1, 2, 0, 1], EACH * i, (16, 16))
    return made


def elsewhere() -> dict[str, str]:
    """Surroundings in which nothing of this folder can be imported but what is installed."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")} | TOKEN


def words(folder: Path, run: Path) -> list[str]:
    return ["extract", "--run", str(run), "--dataset", "val", "--source", str(folder / "shards"), "--model", "shipped:Net"]


def job(head: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    """`ray job submit` as the docs give it, again while the head is still starting."""
    limit = time.monotonic() + PATIENCE
    while True:
        command = [RAY, "job", "submit", "--address", head, *more, "--working-dir", folder / "code", "--", "faultline", *words(folder, folder / "run"), "--address", "auto"]
        done = subprocess.run(command, cwd=folder, env=elsewhere(), capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode == 0 or not re.search("No available agent|Failed to connect to Ray", done.stdout + done.stderr):
            return done
        if time.monotonic() > limit:
            pytest.skip(f"Ray's job server did not come up in {PATIENCE} seconds")
        time.sleep(3)


def until(wanted: Callable[[], object]) -> None:
    limit = time.monotonic() + PATIENCE
    while not wanted():
        assert time.monotonic() < limit
        time.sleep(0.2)


def test_a_submitted_job_is_stopped_and_goes_on_with_the_shipped_code_alone(head, shipped):
    """Stopped by `ray job stop` after a few units; the same command does the others, shows its progress, and ends with the rows of an undisturbed run."""
    run, done = shipped / "run", lambda: sorted(p.name for p in (shipped / "run/profiles/val").glob("*.parquet"))
    first = job(head, shipped, "--no-wait", "--submission-id", "first")
    assert first.returncode == 0, first.stdout + first.stderr
    until(lambda: len(done()) >= 2)
    stopped = subprocess.run([RAY, "job", "stop", "--address", head, "first"], cwd=shipped, env=elsewhere(), capture_output=True, text=True, timeout=PATIENCE)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    kept = {name: (run / "profiles/val" / name).stat().st_mtime_ns for name in done()}
    assert 2 <= len(kept) < SHARDS

    second = job(head, shipped)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"val: {SHARDS * EACH} of {SHARDS * EACH} images" in second.stdout, second.stdout
    assert int(re.search(r"\((\d+) units\)", second.stdout)[1]) <= SHARDS - len(kept)
    assert {name: (run / "profiles/val" / name).stat().st_mtime_ns for name in kept} == kept
    assert Store(run).progress("val").done == SHARDS * EACH

    notes = {note.name: note.read_text() for note in (shipped / "notes").iterdir()}  # process-PROGRAM -> the file that it imported
    assert sum(name.endswith("-faultline") for name in notes) >= 2 and sum(name.endswith("-default_worker.py") for name in notes) >= 2, notes
    assert all("working_dir_files" in place for place in notes.values()), notes
    code, stderr = finished(shipped, *words(shipped, shipped / "alone"), env={"PYTHONPATH": str(shipped / "code")})
    assert code == 0, stderr
    assert rows(run) == rows(shipped / "alone")
