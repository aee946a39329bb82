"""What the settings of a process that computes are worth, as images/s of the fused engine: `python tests/bench_process.py [ROUNDS]` prints JSON.

Each measurement is a process of its own, since threads and memory are settled when it begins: with the memory that it frees kept or given back (`prepare_process`), a batch done by teams
or whole (`pipeline/saliency/teams.py`), then with threads that spin for more or fewer turns before they sleep (`jobs/environment.py`), alone and beside a process that keeps one
core busy. They take turns, round after round; medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = ("resnet56", "squeezenet1_1")
TURNS = ("1000", "0", "10000", "")  # as set, asleep at once, ten times as long, libgomp's own
BATCHES = 7


def ways() -> list[dict]:
    """What differs: whether a batch is done by `teams`, `turns` of spinning, whether freed memory is `kept`, whether there is a busy process `beside`."""
    settings = [(True, "1000", True), (True, "1000", False), *((False, turns, True) for turns in TURNS)]
    return [{"model": m, "teams": teams, "turns": turns, "kept": kept, "beside": beside} for m in MODELS for beside in (False, True) for teams, turns, kept in settings]


def rate(way: dict) -> float:
    """Images/s of one process."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | ({"GOMP_SPINCOUNT": way["turns"]} if way["turns"] else {})
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if way["beside"] else None
    try:
        return float(subprocess.run([sys.executable, __file__, "--one", way["model"], *(["kept"] if way["kept"] else []), *(["teams"] if way["teams"] else [])], env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    finally:
        if busy:
            busy.kill()
            busy.wait()


def one(model: str, *settings: str) -> float:
    sys.path.insert(0, str(ROOT))
    import torch

    from jobs import cluster
    from jobs.bench.engine import subject
    from pipeline import models
    from pipeline.saliency import make_engine, prepare_process

    if "kept" in settings:
        prepare_process(cluster.threads_of_an_engine(), "fp32")
    else:
        torch.set_num_threads(cluster.threads_of_an_engine())
    images, labels, network = subject(model, models.build(model), None, "cpu")
    engine, seconds = make_engine("fused", network, "abs"), []
    compute = engine if "teams" in settings else engine.once
    for _ in range(BATCHES + 1):
        start = time.perf_counter()
        compute(images, labels)
        seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds[1:])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(one(*sys.argv[2:]))
    else:
        rounds = [[rate(way) for way in ways()] for _ in range(int(sys.argv[1]) if sys.argv[1:] else 3)]
        print(json.dumps([way | {"images_per_s": round(statistics.median(values), 1)} for way, values in zip(ways(), zip(*rounds))], indent=1))
