"""What a process that computes asks of its system. OpenMP may promise threads and not give them, by which torch's convolutions come out wrong: they are had, or nothing is computed. Memory is got once."""

import platform
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny

from pipeline.store import Store

ANOTHER_THREAD = """
import ctypes, sys, threading
from pathlib import Path
import numpy as np
from pipeline.profiler import Profiler
from pipeline.samples import Sample
profiler = Profiler.restore(Path(sys.argv[1]), "cpu")
samples = [Sample(str(i), 0, pixels) for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8))]
openmp = ctypes.CDLL(None)
def compute():
    print("before", openmp.omp_get_dynamic())
    list(profiler.parts(samples, "a.tar", 0))
    print("after", openmp.omp_get_dynamic(), openmp.omp_get_max_threads() == profiler.manifest.threads)
thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""
GRADIENTS = """
import torch
from pipeline.errors import Stopped
from pipeline.saliency import prepare_process
try:
    prepare_process(2, "fp32")
    from pipeline.saliency.products import by_products
    torch.manual_seed(0)
    saw, gave = torch.randn(8, 16, 32, 32), torch.randn(8, 16, 32, 32)
    how = torch.Size((16, 16, 3, 3)), (1, 1), (1, 1), (1, 1), 1, "abs"
    found, truth = by_products(saw, gave, *how), by_products(saw.double(), gave.double(), *how)
    print("right" if torch.allclose(found.double(), truth, rtol=1e-4) else f"wrong by {float((found - truth).abs().max()):.1e}")
except Stopped as fault:
    print(fault)
"""


@pytest.mark.parametrize(
    "told, said",
    [({"OMP_DYNAMIC": "true", "OMP_MAX_ACTIVE_LEVELS": "0", "OMP_NUM_THREADS": "1"}, "right"), ({"OMP_THREAD_LIMIT": "1"}, "OpenMP grants this process 1 of the 2 threads that this run computes with")],
    ids=["changed", "refused"],
)
def test_gradients_are_right_or_refused(told, said):
    """What can be had otherwise is; a limit holds for a process's whole life."""
    done = subprocess.run([sys.executable, "-c", GRADIENTS], capture_output=True, text=True, env=tiny.surroundings(**told), timeout=120)
    assert done.stdout.startswith(said), done.stdout + done.stderr


def test_whoever_computes_in_another_thread_has_them_too(small):
    """As Ray's actors do: they are made in one thread and called in another, and OpenMP keeps its settings for each."""
    done = subprocess.run([sys.executable, "-c", ANOTHER_THREAD, small.run], capture_output=True, text=True, env=tiny.surroundings(OMP_DYNAMIC="true"), timeout=120)
    assert done.stdout == "before 1\nafter 0 True\n", done.stdout + done.stderr


def test_the_command_gives_the_same_bits_whatever_openmp_is_told(small, tmp_path):
    ended = tiny.process("extract", "--run", tmp_path / "run", "--dataset", "val", "--source", small.sources / "val", "--model", tiny.MODEL, OMP_DYNAMIC="true", OMP_THREAD_LIMIT="1", OMP_MAX_ACTIVE_LEVELS="0")
    assert ended.code == 0, ended.err
    for file in Store(small.run).files("val"):
        assert pq.read_table(file).equals(pq.read_table(tmp_path / "run/profiles/val" / file.name))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc")
@pytest.mark.parametrize("prepared", [True, False])
def test_a_process_that_computes_gets_its_memory_from_the_system_once(prepared):
    """As it does not by itself, where three maps of 30 MiB are freed last to first: their 23,040 pages come and go."""
    script = """
import ctypes, resource, sys
from pipeline.saliency import prepare_process
libc, size = ctypes.CDLL(None), 30 << 20
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1:]:
    prepare_process(1, "fp32")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(20):
    if i == 10:
        before = faults()
    maps = [ctypes.c_void_p(libc.malloc(size)) for _ in range(3)]
    for place in maps:
        ctypes.memset(place, 1, size)
    for place in reversed(maps):
        libc.free(place)
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", script, *["prepare"] * prepared], check=True, cwd=Path(__file__).parents[1], timeout=120, capture_output=True, text=True)
    assert int(done.stdout) < 100 if prepared else int(done.stdout) > 50_000
