"""Memory is bounded by the settings and not by the input: after eight times the shards the peak of the driver and of every worker is what it was."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.chaos.processes import Job, running, strangers
from shards import encoded, write_tar

pytestmark = pytest.mark.processes
SIDE, EACH = 512, 24  # a unit is EACH images of SIDE x SIDE pixels
UNIT = EACH * SIDE * SIDE * 3 / 1e6  # MB decoded: 18.9
SHARDS = 3
STORE = 80 * 2**20  # bytes of Ray's object store: four units

NETWORK = '''
from torch import nn, manual_seed
from pipeline.samples import Preprocessing

class Tiny(nn.Module):
    """One convolution, of large steps."""
    preprocessing = Preprocessing(resize=None, crop=None)
    def __init__(self):
        super().__init__()
        manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 10)
        self.linear.bias.data[1] += 3  # right on every sample, so that the doctor looks at no more of many than of few
    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight times SHARDS shards of plain pictures, small as files and large as pixels; `network.py` beside them."""
    made = tmp_path_factory.mktemp("memory")
    (made / "network.py").write_text(NETWORK)
    for shard in range(8 * SHARDS):
        members = []
        for i in range(EACH):
            grey = np.full((SIDE, SIDE, 3), (shard * EACH + i) % 256, np.uint8)
            members += [(f"{shard:02d}/{i:02d}.jpg", encoded(Image.fromarray(grey))), (f"{shard:02d}/{i:02d}.cls", b"1")]
        write_tar(made / "shards" / f"{shard:02d}.tar", members)
    return made


def peaks(folder: Path) -> tuple[dict[str, float], dict[str, float], Path]:
    """MB at the highest of the driver, of the largest engine and of the largest decode worker, until SHARDS shards were done and until all were; and the run."""
    run, highest = folder / "run", {"driver": 0.0, "engine": 0.0, "decode worker": 0.0}
    early = dict(highest)
    words = ["extract", "--run", run, "--dataset", "val", "--source", folder / "shards", "--model", "network:Tiny", "--batch-size", 8, "--address", "local"]
    with running(folder, *words, env={"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE)}) as job:
        limit, listed, family = time.monotonic() + 240, 0.0, []
        while job.process.poll() is None and time.monotonic() < limit:
            if time.monotonic() > listed + 0.5:  # to list them takes longer than a decode worker is at its peak
                family, listed = [job.process, *job.family()], time.monotonic()
            look(job, family, highest)
            if len(list((run / "profiles" / "val").glob("*.parquet"))) <= SHARDS:
                early = dict(highest)
            time.sleep(0.01)
        assert job.wait(1) == 0, job.stderr()
        assert strangers(job.stderr(), "val") == []
    return early, highest, run


def look(job: Job, family: list[psutil.Process], highest: dict[str, float]) -> None:
    """Raise `highest` to what the job's processes hold now: private memory, since the object store is mapped into all of them."""
    for process in family:
        try:
            title = " ".join(process.cmdline())
            kind = "driver" if process.pid == job.process.pid else "engine" if "_Writer" in title else "decode worker" if "_decode" in title else None
            if kind:
                memory = process.memory_info()
                highest[kind] = max(highest[kind], (memory.rss - getattr(memory, "shared", 0)) / 1e6)
        except psutil.Error:
            continue


def test_eight_times_the_shards_need_the_same_memory(folder):
    """453 MB of decoded units go through an object store of 84 MB: no process holds more than when it was 57 MB, but for noise."""
    few, many, run = peaks(folder)
    assert pq.read_table(run / "profiles" / "val", columns=["sample_id"]).num_rows == 8 * SHARDS * EACH
    assert 8 * SHARDS * EACH * SIDE * SIDE * 3 > 5 * STORE
    for kind in few:
        assert few[kind] > 20, "each of them was seen at work"
        assert many[kind] <= 1.15 * few[kind] + 2 * UNIT, (kind, few, many)  # what is kept of each unit would be ten of them or more
