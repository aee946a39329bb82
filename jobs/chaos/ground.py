"""What a campaign stands on: images in small shards, the undisturbed run that all others are held to, and a cluster of two nodes that lives through many rounds."""

from __future__ import annotations

import io
import logging
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from jobs import digits
from jobs.chaos.processes import finished, forget_rays, rays_folder
from jobs.progress import say
from jobs.servers import STARTS, own_sigterm
from pipeline import failpoints
from pipeline.errors import Stopped, printable
from pipeline.store import Store

SHARDS, EACH = 32, 8  # shards of a data set, each a unit, and the samples of one
BEGUN = 4  # units that are done when a round on the cluster begins: as a job that was resumed
NODE = {"num_cpus": 2, "object_store_memory": 100 * 2**20}  # what each node of the cluster believes to have
SMALL_DISK = 700  # KiB beyond what a begun run takes


@dataclass
class Ground:
    """A folder of its own: `digits/`, `shards/`, `reference/`, `failpoints/` and a folder a round; `kept/` has a shard as it was while another stands in its place."""

    folder: Path
    _cluster: object = None
    _nodes: list = field(default_factory=list)

    @property
    def failpoints(self) -> Path:
        return self.folder / "failpoints"

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    @property
    def source(self) -> Path:
        return self.folder / "shards"

    def words(self, run: Path) -> list[object]:
        """The command of every round."""
        return ["extract", "--run", run, "--dataset", "val", "--source", self.source, "--model", digits.MODEL, "--weights", self.folder / "digits/weights.safetensors"]

    def prepare(self) -> None:
        """Images, shards, and the run that nothing disturbs, indexed and with one experiment. Raises Stopped if that does not succeed."""
        os.environ[failpoints.VARIABLE] = str(self.failpoints)  # of this process, and so of all that it starts
        self.failpoints.mkdir(parents=True, exist_ok=True)
        self.clear()
        self.sweep()
        if (self.reference / "experiments/prune/summary.json").exists():
            return
        made = digits.write(self.folder / "digits")
        cut(made.shards("val"), self.source)
        say("first the undisturbed run that all others are held to (a minute or so)")
        for words in (self.words(self.reference), index_words(self.reference), prune_words(self.reference)):
            code, stderr = finished(self.folder, *words)
            if code:
                raise Stopped(f"the undisturbed run of {printable(self.folder)} ended with exit code {code}: {printable(stderr.strip().splitlines()[-1] if stderr.strip() else '')}")

    def clear(self) -> None:
        """Nothing is planted any more."""
        for path in self.failpoints.iterdir():
            path.unlink()

    def sweep(self) -> None:
        """What a campaign that was killed left: shards as they were, no small disk, none of Ray's files."""
        for kept in (self.folder / "kept").glob("*.tar"):
            _put_back(kept, self.source / kept.name)
        for disk in self.folder.glob("round-*/disk"):
            SmallDisk.unmount(disk)
        for folder in (self.folder, *self.folder.glob("round-*")):
            forget_rays(folder)

    @contextmanager
    def altered(self, name: str) -> Iterator[Path]:
        """A shard that the block may write to. Afterwards it is as it was, to its times; where this process does not live to see to it, `sweep` does."""
        shard, kept = self.source / name, self.folder / "kept" / name
        kept.parent.mkdir(exist_ok=True)
        shutil.copy2(shard, kept.with_suffix(".part"))
        os.replace(kept.with_suffix(".part"), kept)
        try:
            yield shard
        finally:
            _put_back(kept, shard)

    def begun(self, run: Path, units: int = BEGUN) -> None:
        """A copy of the undisturbed run in which only the first `units` are done."""
        shutil.copytree(self.reference, run, ignore=shutil.ignore_patterns("index", "experiments", "statistics", "*.lock"))
        for file in Store(run).files("val")[units:]:
            file.unlink()
            (run / "rejects/val" / file.name).unlink()

    # ---- the cluster ---------------------------------------------------------------------------------------------------

    def address(self) -> str:
        """Of a cluster of two nodes: the one that is there, or a new one."""
        if self._cluster is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            from ray.cluster_utils import Cluster

            logging.getLogger("ray").setLevel(logging.CRITICAL)
            files = rays_folder(self.folder, "cluster")
            self._cluster = _started(lambda: Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False, "temp_dir": str(files)}))
            self.add_node()
        return self._cluster.address

    def add_node(self) -> None:
        self._nodes.append(_started(lambda: self._cluster.add_node(**NODE)))

    def kill_node(self) -> None:
        """SIGKILL to everything of the node that is not the head: its raylet, and the workers that it started."""
        node = self._nodes.pop()
        family = [p for info in node.all_processes.get("raylet", []) for p in _family(info.process.pid)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._cluster.remove_node(node, allow_graceful=False)

    def worker(self, *words: str) -> psutil.Process | None:
        """A process below this one in whose title one of `words` stands, the first word first."""
        below = psutil.Process().children(recursive=True)
        return next((p for word in words for p in below if word in _title(p)), None)

    def leave(self) -> None:
        """No cluster any more; the next round that wants one starts it."""
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster, self._nodes = None, []
            forget_rays(self.folder)


def _started(start: Callable[[], object]):
    """What `start` gives. A busy machine does not always give Ray's servers the 30 seconds in which they must be up: it is tried again. Raises Stopped."""
    for left in reversed(range(STARTS)):
        try:
            with own_sigterm():
                return start()
        except Exception as fault:
            if not left:
                raise Stopped(f"no cluster came up ({printable(fault)[:160]}): this machine may be too busy\nthe same command goes on") from None
            say("no cluster came up; trying again")


def index_words(run: Path) -> list[object]:
    return ["index", "--run", run]


def prune_words(run: Path) -> list[object]:
    return ["prune", "--run", run, "-k", "1,4", "--max-samples", 24]


def cut(shards: list[Path], folder: Path) -> None:
    """`SHARDS` shards of `EACH` samples, two files a sample, from larger ones."""
    members = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            members += [(member, tar.extractfile(member).read()) for member in tar]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(SHARDS):
        with tarfile.open(folder / f"val-{i:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, content in members[2 * EACH * i : 2 * EACH * (i + 1)]:
                tar.addfile(member, io.BytesIO(content))


def turned(shard: bytes, by: int) -> bytes:
    """The same samples in another order, as many bytes."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in members[2 * by :] + members[: 2 * by]:
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


class SmallDisk:
    """A file system with little room, where this process may mount one; `free` makes room."""

    def __init__(self, at: Path, kib: int):
        at.mkdir(parents=True)
        self.at = at
        self.mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(at)], capture_output=True).returncode

    def free(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(self.at)], check=True, capture_output=True)

    def close(self) -> None:
        self.unmount(self.at)

    @staticmethod
    def unmount(at: Path) -> None:
        if at.is_mount():
            subprocess.run(["umount", "-l", str(at)], capture_output=True)


def _put_back(kept: Path, shard: Path) -> None:
    shutil.copy2(kept, shard)
    kept.unlink()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
