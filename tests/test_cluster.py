"""What `jobs/cluster.py` asks of Ray where there are GPUs, on a Ray that pretends to have two."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from jobs import cluster, servers
from jobs.chaos.processes import ending, finished, running, strangers
from jobs.extract import Settings, extract
from pipeline.errors import BadRequest, Stopped
from pipeline.samples import Preprocessing
from pipeline.sources import open_source
from pipeline.store import Store
from pipeline.units import Unit
from pipeline.worker import Decoder, Receipt, UnitWriter
from shards import write_shard
import tiny

UNITS = 6


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("engines", [1, 2, 3, 5, 16, 100])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_engines_always_leave_room_for_a_decode_task(threads, engines, cpus):
    """Otherwise a job would wait forever, in silence. What they reserve is a quantity that Ray takes, and not decode's own, which would fuse the two."""
    share = cluster.cpus_of_an_engine(threads, engines, cpus)
    assert engines * share + cluster.DECODE_CPUS <= cpus or share == 0.01
    assert 0 < share <= max(1, threads - 1) and share != cluster.DECODE_CPUS
    assert share < 1 or share == int(share)


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_a_start_of_ray_that_times_out_is_tried_again(monkeypatch, capsys, failing):
    """Twice, said each time; then the job is stopped, for the same command to go on."""
    import ray

    calls = []

    def init(**settings):
        calls.append(settings)
        if len(calls) <= failing:
            raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if failing < 3:
        assert servers.start(None) is ray
    else:
        with pytest.raises(Stopped, match="Ray did not start on this machine .The current node timed out during startup"):
            servers.start(None)
    assert len(calls) == min(failing + 1, 3) and capsys.readouterr().err.count("trying again") == min(failing, 2)


def test_an_address_where_nothing_listens_is_told_at_once(monkeypatch):
    """Ray itself tries for half a minute, in which no signal is heard."""
    import ray

    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail("Ray was asked"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(BadRequest, match=f"^--address: no Ray cluster can be joined at 127.0.0.1:{port} .*refused"):
        cluster.device_for("cpu", f"127.0.0.1:{port}")


RAY = """
import atexit, os, subprocess, sys, types
import ray._private.worker
from jobs import servers
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
atexit.register(os._exit, 1)
node = types.SimpleNamespace(is_head=lambda: True, destroy_external_storage=lambda: print("no spilled objects"))
"""


@pytest.mark.parametrize("begun, code", [(True, 4), (False, 1)])
def test_where_ray_was_begun_the_exit_code_is_ours_and_nothing_stays(begun, code):
    """Ray's own goodbyes may end the process with another; here something that is registered to be done at the end does."""
    script = RAY + f"ray._private.worker._global_node = node if {begun} else None\nprint('last words')\nservers.leave(4)\nchild.kill()\nsys.exit(4)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    pid, *said = done.stdout.split("\n")
    assert done.returncode == code and (not begun or said == ["last words", "no spilled objects", ""])
    limit = time.monotonic() + 5  # it was killed before the end of its parent, and is gone a moment later; by itself it would be there for a minute
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < limit
            time.sleep(0.05)


@pytest.mark.parametrize("name, shown", [("gcs_server", "control server"), ("raylet", "raylet")])
def test_a_server_that_ends_while_ray_starts_is_told(tmp_path, name, shown):
    """Ray's core would wait for a minute, and end the process with 1 and no word, which it could not say either: stderr is muted meanwhile."""
    server = shutil.copy(shutil.which("sleep"), tmp_path / name)
    script = f"""
import os, subprocess, sys, time
from jobs import servers
servers.SERVERS = {{name: (shown, 0.5) for name, (shown, _) in servers.SERVERS.items()}}
with servers._muted() as terminal, servers._watched_start(terminal):
    print("not shown", file=sys.stderr)
    server = subprocess.Popen([{str(server)!r}, "60"])
    time.sleep(1)
    server.kill()
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 4
    assert done.stderr == f"faultline: Ray's server on this machine (its {shown}) has ended: was it killed, or is memory short?\nwhat is done is kept; the same command resumes\n"


@pytest.mark.processes
@pytest.mark.parametrize("server, name", [("raylet", "raylet"), ("gcs_server", "control server")])
def test_a_job_whose_own_server_of_rays_is_killed_says_so_and_resumes(server, name, tmp_path):
    """Exit code 4 and a sentence, at once; Ray's core, left alone, ends the process seconds or a minute later with 1 and no word. Nothing of Ray stays, and the same command completes."""
    sources, here = tiny.make_sources(tmp_path / "sources"), {"PYTHONPATH": tiny.surroundings()["PYTHONPATH"]}
    command = ["extract", "--run", tmp_path / "run", "--dataset", "val", "--source", sources / "val", "--model", tiny.MODEL]
    with running(tmp_path, *command, "--address", "local", env=here) as job:
        job.until(lambda: "waiting for the first unit" in job.stderr())
        next(p for p in job.family() if p.name() == server).kill()
        assert job.wait(20) == 4, job.stderr()
        assert ending(job.stderr()) == f"faultline: Ray's server on this machine (its {name}) has ended: was it killed, or is memory short?\nwhat is done is kept; the same command resumes\n"
        assert job.stderr().count("has ended") == 1 and strangers(job.stderr(), "val") == [] and job.stdout() == "" and job.left_over(1) == []
    assert finished(tmp_path, *command, env=here)[0] == 0
    assert Store(tmp_path / "run").progress("val").done == 60


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_where_rays_files_cannot_lie_is_told_before_it_is_tried(tmp_path, monkeypatch, name):
    """Its sockets' names would be too long, it cannot be written, or it is full; and not that the machine is busy. What Ray does not look at does not matter."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TEMP", "/tmp/" + "x" * 60)
    monkeypatch.setenv(name, "/tmp/" + "x" * 60)
    with pytest.raises(Stopped, match=rf"^{name}: /tmp/x+ has 65 bytes; .* set RAY_TMPDIR to a shorter folder"):
        servers._look_at_place()
    monkeypatch.setenv(name, "/tmp/absent")
    servers._look_at_place()
    with monkeypatch.context() as unwritable, pytest.raises(Stopped, match=f"^{name}: /tmp/absent, where Ray keeps its files, cannot be written; set RAY_TMPDIR"):
        unwritable.setattr(os, "access", lambda folder, _: str(folder) != "/tmp")
        servers._look_at_place()
    monkeypatch.setattr(servers, "ROOM", 1 << 60)
    with pytest.raises(Stopped, match=f"^{name}: /tmp/absent, .* has .* MiB left: make room, or set RAY_TMPDIR"):
        servers._look_at_place()


@pytest.mark.processes
def test_ray_starts_where_the_home_folder_cannot_be_written():
    """As in many containers. Its key stays in the environment."""
    script = "from jobs import servers; print(servers.start('local').is_initialized(), flush=True); servers.leave(0)"
    done = subprocess.run([sys.executable, "-c", script], env=tiny.surroundings(HOME="/proc"), capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.fixture(scope="module")
def two_gpus():
    """Ray, started by this module's last tests, with two GPUs that nothing looks at and no CPU more than GPUs; gone afterwards."""
    import ray

    with tempfile.TemporaryDirectory(prefix="fl-", ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_ADDRESS", "local")
        ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.mark.processes
def test_units_go_through_a_pool_of_gpu_actors_one_receipt_each(tmp_path, two_gpus, monkeypatch):
    """Each engine has a GPU of its own, and each unit gives exactly one receipt and one file."""
    for i in range(UNITS):
        write_shard(tmp_path / "shards" / f"{i}.tar", [0, 1, 2], 3 * i, (16, 16))
    (tmp_path / "gpu_network.py").write_text(
        "import torch\n"
        "from pipeline.samples import Preprocessing\n"
        "class Net(torch.nn.Sequential):\n"
        "    preprocessing = Preprocessing(resize=16, crop=16)\n"
        "    def __init__(self):\n"
        "        torch.manual_seed(0)\n"
        "        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    extract(Settings(run, "val", str(tmp_path / "shards"), "gpu_network:Net", device="cpu", max_samples=3))  # one unit, in this process: the run exists

    class OnItsGpu(cluster._Writer):
        """The engine's actor, which notes the GPU it was given and computes on the CPU all the same."""

        def __init__(self, make_writer):
            (run, device) = make_writer.args
            Path(run, f"gpu-{os.getpid()}").write_text(f"{device} {os.environ['CUDA_VISIBLE_DEVICES']}")
            super().__init__(partial(UnitWriter, run, "cpu"))

    monkeypatch.setattr(cluster, "_Writer", OnItsGpu)
    store = Store(run)
    manifest, census = store.manifest(), store.census("val")
    store.write_census("val", type(census)(census.spec, census.kind, census.root, census.shards, None))
    todo = store.todo("val", manifest.unit_samples)
    assert len(todo) == UNITS - 1
    decoder = Decoder(census.kind, census.root, manifest.preprocessing, manifest.classes)
    with cluster.workers(decoder, partial(UnitWriter, run, "cuda"), manifest.threads, "cuda", "local", None, 3 * len(todo)) as stream:
        receipts = list(stream(todo, 3))
    assert sorted(r.stem for r in receipts) == sorted(unit.stem for unit in todo)
    assert not any(r.fault for r in receipts)
    assert store.progress("val").done == 3 * UNITS
    assert sorted(note.read_text() for note in run.glob("gpu-*")) == ["cuda 0", "cuda 1"]


@pytest.mark.processes
@pytest.mark.parametrize("engines, overlaps, together", [(1, True, 2), (1, False, 1), (2, True, 1)])
def test_an_engine_that_is_alone_has_its_next_unit_at_hand(tmp_path, two_gpus, engines, overlaps, together):
    """It does not wait while the last one is written and told of. Of several engines none has two units: at the end others would have none."""
    units = [Unit("val", f"{i}.tar", 0, 3, (), "") for i in range(UNITS)]

    def decode(unit):
        import pyarrow as pa

        return pa.table({"unit": [unit.to_json()]})

    def make_writer():
        def write(decoded):
            unit = Unit.from_json(decoded["unit"][0].as_py())
            begun = time.time()
            time.sleep(0.5)
            (tmp_path / unit.stem).write_text(json.dumps([os.getpid(), begun, time.time()]))
            return Receipt(unit.stem, 3, 0, 0.5, "")

        return write

    with cluster.workers(decode, make_writer, 1, "cpu", "local", (engines, engines), 3 * UNITS, overlaps=overlaps) as stream:
        assert sorted(receipt.stem for receipt in stream(units, 3)) == sorted(unit.stem for unit in units)
    noted = [json.loads((tmp_path / unit.stem).read_text()) for unit in units]
    assert max(sum(other == process and begins <= begun < ends for other, begins, ends in noted) for process, begun, _ in noted) == together


@pytest.mark.processes
def test_engines_that_cannot_start_end_the_job(tmp_path, two_gpus):
    """On a node that does not see the run's folder, say: told in bounded time, in their own words."""
    shard = write_shard(tmp_path / "0.tar", [0, 1, 2], 0, (16, 16))
    source = open_source(str(shard))[0]
    counted = source.census(shard.name)
    unit = Unit("val", counted.name, 0, 3, counted.marks, counted.version)
    decoder = Decoder(source.kind, source.root, Preprocessing(16, 16), 3)
    with cluster.workers(decoder, partial(UnitWriter, tmp_path / "not-mounted", "cpu"), 1, "cpu", "local", None, 3) as stream, pytest.raises(Stopped) as stopped:
        list(stream([unit], 3))
    said = str(stopped.value).splitlines()
    assert said[0].startswith(f"Ray stopped the job: --run: there is no run at {tmp_path / 'not-mounted'}") and said[1:] == ["what is done is kept; the same command resumes"]
