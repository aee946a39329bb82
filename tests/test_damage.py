"""What is damaged, replaced or grown behind the back of a run is told by name, with the remedy, and never answered from."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import shards
import tiny

from index import Run
from pipeline.errors import BadRequest
from pipeline.store import Store


def first_file(copied):
    return Store(copied.run).files("val")[0]


@pytest.fixture
def mine(small, tmp_path):
    """A finished run of its own, with sources of its own."""
    mine = tiny.Small(tmp_path / "run", shutil.copytree(small.sources, tmp_path / "sources"))
    assert mine.extract("val").code == 0 and tiny.call("index", "--run", mine.run).code == 0
    return mine


def test_an_open_run_never_mixes_an_old_index_with_new_statistics(mine):
    """It refuses while the index is older than its profiles, and afterwards answers as a run that is opened anew."""
    run = Run.open(mine.run)
    sample = f"val:{run.index().rows['sample_id'][0].as_py()}"
    run.neighbors(sample)
    shards.write_shard(mine.sources / "val/val-00009.tar", [0, 1, 2, 3] * 5, first=5000)
    assert mine.extract("val").code == 0
    with pytest.raises(BadRequest, match="stale"):
        run.neighbors(sample)
    assert tiny.call("index", "--run", mine.run).code == 0
    assert run.neighbors(sample).equals(Run.open(mine.run).neighbors(sample))


@pytest.mark.parametrize("verb", [("status",), ("index",)])
def test_a_truncated_profiles_file_is_named_and_removing_it_mends_the_run(mine, verb):
    file = first_file(mine)
    os.truncate(file, 500)
    assert file.name in (message := tiny.call(*verb, "--run", mine.run).refused()) and "remove it" in message
    file.unlink()
    assert mine.extract("val").code == 0 and tiny.call("index", "--run", mine.run).code == 0


def test_a_profiles_file_with_flipped_bits_is_named(mine):
    """Checksums find what a reader would take for numbers."""
    file = first_file(mine)
    content = bytearray(file.read_bytes())
    for i in range(len(content) // 4, len(content) // 4 + 64):
        content[i] ^= 0xFF
    file.write_bytes(content)
    assert file.name in tiny.call("index", "--run", mine.run, "--name", "again").refused()


def test_a_unit_without_its_rejects_file_is_not_done(mine):
    file = first_file(mine)
    (mine.run / "rejects/val" / file.name).unlink()
    assert Store(mine.run).progress("val").pending > 0
    assert mine.extract("val").code == 0 and Store(mine.run).progress("val").pending == 0


@pytest.mark.parametrize("place", ["profiles/val/x.parquet", "statistics/val.parquet", "index/errors/rows.parquet"])
def test_a_result_never_lands_among_the_runs_own_files(mine, place):
    path = mine.run / place
    before = path.read_bytes() if path.exists() else None
    assert "--out" in tiny.call("neighbors", "--run", mine.run, "--from", "val", "--out", path).refused()
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_refused_device_leaves_no_data_set_behind(mine):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, and nothing to refuse")
    assert "--device" in mine.extract("v2", "--device", "cuda").refused()
    assert Store(mine.run).datasets() == ["val"] and tiny.call("index", "--run", mine.run).code == 0


def test_a_data_set_never_takes_the_name_of_imported_statistics(mine):
    import torch

    table = Run.open(mine.run).statistics("val")
    torch.save({"mean": torch.tensor(table["mean"].to_numpy()), "std": torch.tensor(table["std"].to_numpy())}, mine.run.parent / "pub.pth")
    assert tiny.call("statistics", "import", mine.run.parent / "pub.pth", "--run", mine.run, "--name", "v2", "--aggregation", "abs").code == 0
    assert "imported statistics" in mine.extract("v2").refused()


def test_sigterm_ends_a_job_whose_sigint_is_ignored(mine):
    """As a shell's `&` starts it."""
    code = (
        "import os, signal, threading, jobs.extract as e; from jobs.cli import main; import sys\n"
        "def slow(settings):\n    print('begun', flush=True)\n    import time\n    time.sleep(60)\n"
        "e.extract = slow\n"
        f"sys.argv = ['faultline', 'extract', '--run', {str(mine.run)!r}, '--dataset', 'val', '--source', 'x', '--model', 'y']\nmain()"
    )
    job = subprocess.Popen([sys.executable, "-c", code], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stderr.readline() == "begun\n"
    start = time.monotonic()
    job.terminate()
    assert job.wait(30) == 4 and time.monotonic() - start < 20 and "same command resumes" in job.stderr.read()


def test_an_index_is_never_built_of_profiles_that_change_meanwhile(mine, monkeypatch):
    """An extraction adds a shard while vectors are written: refused, and the old index is still there, and answers once the extraction is undone."""
    import index.build

    before = (mine.run / "index/errors/index.faiss").read_bytes()
    rows = index.build._rows

    def interrupted(*words):
        shards.write_shard(mine.sources / "val/val-00009.tar", [0, 1, 2, 3], first=5000)
        assert mine.extract("val").code == 0
        yield from rows(*words)

    monkeypatch.setattr(index.build, "_rows", interrupted)
    ended = tiny.call("index", "--run", mine.run)
    assert ended.code == 2 and "the profiles of val changed while they were read" in ended.err
    monkeypatch.undo()
    assert (mine.run / "index/errors/index.faiss").read_bytes() == before and not list((mine.run / "index/errors").glob(".*.tmp"))
    assert tiny.call("index", "--run", mine.run).code == 0


def test_two_jobs_never_build_one_index(mine):
    """The second is refused; a lock file without a process is in nobody's way."""
    from pipeline.locks import hold

    with hold(mine.run / "index/.errors.lock", mine.run, ""):
        assert "another job is building the index" in tiny.call("index", "--run", mine.run).refused()
    assert (mine.run / "index/.errors.lock").exists() and tiny.call("index", "--run", mine.run).code == 0
