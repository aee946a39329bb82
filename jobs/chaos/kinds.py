"""THE list of faults: what is done to a job, and how much of its work may be done again for it. A kind starts the job, hurts it, and waits for its end.

Kinds whose names begin with `cluster` run on a cluster of two nodes, `server killed` with Ray of its own; the others in one process, as small jobs do.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from jobs.chaos.ground import EACH, SHARDS, SMALL_DISK, SmallDisk, index_words, prune_words, turned
from jobs.chaos.processes import Job
from jobs.chaos.rounds import Round, sample_of

KILLED, ENGINES = -signal.SIGKILL, 2
UNIT = ("decode", "profile", "profiled", "rejects.written", "rejects.renamed", "profiles.written", "profiles.renamed")
BEGIN = ("manifest.written", "manifest.renamed", "census.written", "census.renamed")
INDEX = ("statistics.written", "statistics.renamed", "index.written", "index.renamed")
ROWS = ("rows.written", "rows.renamed")


def killed_at_a_point(r: Round) -> None:
    """SIGKILL at a named point of the commit, or of the beginning of a run."""
    point = r.chance.choice(UNIT + BEGIN)
    shard = r.shard() if point in UNIT else None
    r.detail, r.bound = f"{point}{f' of {shard}' if shard else ''}", int(point in UNIT)
    r.plant(point, "kill", shard=shard)
    r.start()
    r.end(KILLED)


def killed(r: Round) -> None:
    """SIGKILL at any moment after the first unit."""
    r.bound = 1
    r.slow()
    r.start()
    r.detail = f"after {r.after_some()} units"
    r.job.kill()
    r.end(KILLED, 0)


def interrupted(r: Round) -> None:
    """SIGINT or SIGTERM, as terminals and schedulers end a job."""
    what, r.bound = r.chance.choice([signal.SIGINT, signal.SIGTERM]), 1
    r.slow()
    r.start()
    r.detail = f"{what.name} after {r.after_some()} units"
    r.job.process.send_signal(what)
    r.end(4, 0)


def stopped_twice(r: Round) -> None:
    """SIGINT, and SIGTERM before the job has taken leave."""
    r.bound = 1
    r.slow()
    r.start()
    r.detail = f"after {r.after_some()} units"
    r.job.process.send_signal(signal.SIGINT)
    time.sleep(r.chance.uniform(0, 0.3))
    with suppress(psutil.NoSuchProcess):
        r.job.process.send_signal(signal.SIGTERM)
    r.end(4, 0)


def paused(r: Round) -> None:
    """SIGSTOP at a point, and SIGCONT a while later."""
    point, seconds = r.chance.choice(UNIT), r.chance.uniform(0.5, 2)
    r.detail = f"{seconds:.1f} s at {point}"
    r.plant(point, "stop", shard=r.shard())
    r.start()
    r.job.until(lambda: r.job.process.status() == "stopped", 120)
    time.sleep(seconds)
    r.job.process.send_signal(signal.SIGCONT)
    r.end(0)


def disk_full(r: Round) -> None:
    """A small file system that fills up; where none can be mounted, a write that is refused. Then there is room."""
    disk = SmallDisk(r.folder / "disk", SMALL_DISK + r.chance.randrange(400))
    try:
        if disk.mounted:
            r.run, r.detail = disk.at / "run", "a file system without room"
        else:
            point = r.chance.choice(("rejects.written", "profiles.written"))
            r.detail = f"ENOSPC at {point}"
            r.plant(point, "error", errno="ENOSPC", shard=r.shard())
        r.bound = 1
        r.start()
        r.end(4, 0)
        if disk.mounted:
            disk.free()
        r.complete()
        if disk.mounted:
            shutil.copytree(r.run, r.folder / "run")
    finally:
        disk.close()
        r.run = r.folder / "run"


def source_errors(r: Round) -> None:
    """A read that fails, once or three times, in different shards."""
    shards = r.chance.sample(range(SHARDS), r.chance.choice([1, 3]))
    r.detail = f"EIO in {len(shards)} shards"
    for shard in shards:
        r.plant("decode", "error", errno=r.chance.choice(["EIO", "ESTALE", "ETIMEDOUT"]), shard=f"val-{shard:03d}.tar")
    r.start()
    r.end(4)


def source_stalls(r: Round) -> None:
    """A read that takes some seconds."""
    seconds = r.chance.uniform(1, 4)
    r.detail = f"{seconds:.1f} s"
    r.plant("decode", "sleep", seconds=seconds, shard=r.shard())
    r.start()
    r.end(0)


def source_cut(r: Round) -> None:
    """A shard that is cut off after it was counted, and put back."""
    name = r.shard()
    whole = (r.ground.source / name).stat().st_size
    length = r.chance.randrange(whole)
    r.detail = f"{name} at byte {length} of {whole}"
    r.plant("census.renamed", "stop")
    r.start()
    with r.ground.altered(name) as shard:
        r.job.until(lambda: r.job.process.status() == "stopped", 120)
        os.truncate(shard, length)
        r.job.process.send_signal(signal.SIGCONT)
        r.end(4, 0)  # what was cut may have been padding


def source_changed(r: Round) -> None:
    """A shard whose samples change places after it was counted, size and times as before, and then back."""
    name, point = r.shard(), r.chance.choice(["census.renamed", "decode"])
    r.detail = f"{name} at {point}"
    r.plant(point, "stop", shard=name if point == "decode" else None)
    r.start()
    with r.ground.altered(name) as shard:
        r.job.until(lambda: r.job.process.status() == "stopped", 120)
        times = shard.stat()
        shard.write_bytes(turned(shard.read_bytes(), r.chance.randrange(1, EACH)))
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        r.job.process.send_signal(signal.SIGCONT)
        r.end(4)


def second_job(r: Round) -> None:
    """The same command twice at once: one does it, the other is told so."""
    r.slow()
    first = r.start()
    r.after_some()
    second = Job(r.folder, *r.ground.words(r.run), *r.more)
    r.job = second
    r.end(2)
    r.job = first
    r.end(0)


def poison(r: Round) -> None:
    """A sample that no process survives."""
    shard, position = r.shard(), r.chance.randrange(EACH)
    r.poison = sample_of(r.ground.reference, shard, position)
    r.detail, r.bound = f"position {position} of {shard}", EACH
    r.plant("profile", "kill", shard=shard, position=position, times=None)
    r.start()
    r.end(KILLED if not r.more else 0)


def index_killed(r: Round) -> None:
    """SIGKILL at a point of `faultline index`; afterwards it is built, and is that of the undisturbed run."""
    _other_verb(r, INDEX, index_words, ["index/errors/index.faiss", "index/errors/rows.parquet", "statistics/val.parquet"])


def experiment_killed(r: Round) -> None:
    """SIGKILL at a point of an experiment; afterwards its rows are those of the undisturbed run."""
    _other_verb(r, ROWS, prune_words, ["experiments/prune/*.parquet"])


def _other_verb(r: Round, points: tuple[str, ...], words: Callable, results: list[str]) -> None:
    r.ground.begun(r.run, SHARDS)
    point = r.chance.choice(points)
    r.detail = point
    r.plant(point, "kill")
    for expected in ((KILLED,), (0,)):
        r.job = Job(r.folder, *words(r.run))
        code = r.job.wait(120)
        r.codes.append(code)
        if code not in expected:
            r.foul.append(f"exit code {code}: {r.job.stderr()[-300:]}")
        r.job.clear()
    for pattern in results:
        for file in sorted(r.ground.reference.glob(pattern)):
            mine = r.run / file.relative_to(r.ground.reference)
            if not mine.exists() or mine.read_bytes() != file.read_bytes():
                r.foul.append(f"{mine.name} is not that of the undisturbed run")


def server_killed(r: Round) -> None:
    """SIGKILL to the raylet or the control server that a job with Ray has started beside itself."""
    r.ground.begun(r.run)
    r.more, r.bound = ["--address", "local", "--actors", 1], 1
    r.slow()
    r.start()
    name = r.chance.choice(["raylet", "gcs_server"])
    r.detail = f"{name} after {r.after_some()} units"
    next(p for p in r.job.family() if p.name() == name).kill()
    r.end(4, 0)


# ---- on a cluster --------------------------------------------------------------------------------------------------------


def cluster_driver(r: Round) -> None:
    """SIGKILL to the driver."""
    r.bound = ENGINES
    _begin_on_cluster(r)
    r.job.kill()
    r.end(KILLED, 0)


def cluster_engine(r: Round) -> None:
    """SIGKILL to an engine at any moment."""
    r.bound = 1
    _begin_on_cluster(r)
    _hurt(r, "_Writer")
    r.end(0)


def cluster_engine_at_a_point(r: Round) -> None:
    """SIGKILL to an engine at a named point."""
    r.on_cluster()
    point = r.chance.choice(UNIT[1:])
    r.detail, r.bound = point, 1
    r.plant(point, "kill", shard=r.shard())
    r.start()
    r.end(0)


def cluster_decoder(r: Round) -> None:
    """SIGKILL to a decode worker, at work or idle."""
    _begin_on_cluster(r)
    _hurt(r, "_decode", "ray::IDLE")
    r.end(0)


def cluster_node(r: Round) -> None:
    """SIGKILL to a raylet and all of its workers; another node joins some seconds later."""
    r.bound = ENGINES
    _begin_on_cluster(r)
    r.ground.kill_node()
    time.sleep(r.chance.uniform(0, 4))
    r.ground.add_node()
    r.end(0)


def cluster_paused(r: Round) -> None:
    """SIGSTOP to an engine or a decode worker, and SIGCONT a while later."""
    _begin_on_cluster(r)
    process, seconds = r.ground.worker(*r.chance.choice([("_Writer",), ("_decode", "ray::IDLE")])), r.chance.uniform(1, 5)
    r.detail += f", {seconds:.1f} s"
    if process is not None:
        process.suspend()
        time.sleep(seconds)
        process.resume()
    r.end(0)


def cluster_hung(r: Round) -> None:
    """SIGSTOP to an engine, and no SIGCONT: the job waits, and begins its units again with new workers."""
    r.bound, r.patience = ENGINES, 10
    _begin_on_cluster(r)
    process = r.job.until(lambda: r.ground.worker("_Writer"), 60)
    process.suspend()
    try:
        r.end(0)
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def cluster_source_errors(r: Round) -> None:
    """Reads that fail, on the cluster."""
    r.on_cluster()
    source_errors(r)


def cluster_poison(r: Round) -> None:
    """A sample that no engine survives."""
    r.on_cluster()
    poison(r)


def _begin_on_cluster(r: Round) -> None:
    r.on_cluster()
    r.slow()
    r.start()
    r.detail = f"after {r.after_some()} units"


def _hurt(r: Round, *words: str) -> None:
    process = r.job.until(lambda: r.ground.worker(*words), 60)
    r.detail += f", {words[0]}"
    process.kill()


KINDS: dict[str, Callable[[Round], None]] = {
    function.__name__.replace("_", " "): function
    for function in (
        killed_at_a_point, killed, interrupted, stopped_twice, paused, disk_full, source_errors, source_stalls, source_cut, source_changed, second_job, poison, index_killed, experiment_killed,
        server_killed,
        cluster_driver, cluster_engine, cluster_engine_at_a_point, cluster_decoder, cluster_node, cluster_paused, cluster_hung, cluster_source_errors, cluster_poison,
    )
}  # fmt: skip
