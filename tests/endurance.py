"""Two long runs, watched: four nodes whose object stores are far smaller than the data while nodes and engines come and go, and hundreds of thousands of small images on one.

    python tests/endurance.py nodes       a quarter of an hour on 2 cores
    python tests/endurance.py soak
    python tests/endurance.py draw        the figures and tables of docs/reliability.md from what lies in docs/data/reliability: what the other two have left,
                                          and chaos.json and rounds.jsonl of a `faultline chaos`

Benchmarks, not tests: what they found is committed. Nodes are processes of this machine (`ray.cluster_utils.Cluster`); they share its cores, its disk and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from PIL import Image

from test_memory import NETWORK

ROOT = Path(__file__).parents[1]
DATA, IMAGES = ROOT / "docs/data/reliability", ROOT / "docs/images"
NODES, STORE_MIB = 4, 80
SIDE, EACH, SHARDS = 512, 64, 120  # a unit is EACH images of SIDE x SIDE pixels
SOAK, SOAK_SHARD = 300_000, 10_000  # images of 32 x 32, and of a shard
PAUSE = 2.0  # seconds between two looks
NAP = 0.3  # seconds that a batch of the nodes' network takes at least: engines are what the job waits for, as with a network that is worth it


def tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def held(processes: list[psutil.Process]) -> tuple[float, int]:
    """(MiB of memory that nobody else shares, open file handles) of some processes together."""
    memory, handles = 0.0, 0
    for process in processes:
        try:
            info = process.memory_info()
            memory += (info.rss - info.shared) / 2**20
            handles += process.num_fds()
        except psutil.Error:
            continue
    return memory, handles


def nodes() -> None:
    """`SHARDS` units, 50 MB each when decoded, over four stores of 80 MiB; a node with an engine is killed at a third, another joins at half, an engine is killed at two thirds."""
    from ray.cluster_utils import Cluster

    from jobs.chaos.ground import _family
    from jobs.chaos.processes import Job
    from shards import encoded, write_tar

    work = Path(tempfile.mkdtemp(prefix="fl-"))
    (work / "network.py").write_text(NETWORK + f"\n\nclass Slow(Tiny):\n    def forward(self, x):\n        __import__('time').sleep({NAP})\n        return super().forward(x)\n")
    for shard in range(SHARDS):
        members = []
        for i in range(EACH):
            grey = np.full((SIDE, SIDE, 3), (shard * EACH + i) % 256, np.uint8)
            members += [(f"{shard:03d}/{i:02d}.jpg", encoded(Image.fromarray(grey))), (f"{shard:03d}/{i:02d}.cls", b"1")]
        write_tar(work / "shards" / f"{shard:03d}.tar", members)
    os.environ["PYTHONPATH"] = f"{work}:{os.environ.get('PYTHONPATH', '')}"
    args = {"num_cpus": 2, "object_store_memory": STORE_MIB * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=args | {"include_dashboard": False, "temp_dir": str(work / "ray")})
    alive = {"head": cluster.head_node} | {f"node {i}": cluster.add_node(**args) for i in range(2, NODES + 1)}
    run, looks, events, start = work / "run", [], [], time.monotonic()
    committed = lambda: len(list((run / "profiles/val").glob("*.parquet")))  # noqa: E731
    job = Job(work, "extract", "--run", run, "--dataset", "val", "--source", work / "shards", "--model", "network:Slow", "--batch-size", 8, "--address", cluster.address, "--actors", f"2-{NODES}")
    try:
        while job.process.poll() is None:
            done, now = committed(), time.monotonic() - start
            look, families = {"seconds": round(now, 1), "units": done, "driver": round(held([job.process])[0], 1)}, {}
            for name, node in alive.items():
                families[name] = [p for info in node.all_processes.get("raylet", []) for p in _family(info.process.pid)]
                look[name] = round(held(families[name])[0], 1)
            engines = {name: titled(family, "_Writer") for name, family in families.items()}
            looks.append(look | {"engines": sum(map(len, engines.values()))})
            if done >= SHARDS // 3 and not events and (name := next((n for n in reversed(engines) if n != "head" and engines[n]), None)):
                node = alive.pop(name)
                for p in families[name]:
                    p.kill()
                cluster.remove_node(node, allow_graceful=False)
                events.append({"seconds": round(now, 1), "what": f"{name} killed"})
            elif done >= SHARDS // 2 and len(events) == 1:
                alive["node 5"] = cluster.add_node(**args)
                events.append({"seconds": round(now, 1), "what": "node 5 joins"})
            elif done >= 2 * SHARDS // 3 and len(events) == 2:
                if engine := next((e for family in engines.values() for e in family), None):
                    engine.kill()
                    events.append({"seconds": round(now, 1), "what": "an engine killed"})
            time.sleep(PAUSE)
        ids = [i for folder in ("profiles", "rejects") for file in (run / folder / "val").glob("*.parquet") for i in pq.ParquetFile(file).read(["sample_id"])["sample_id"].to_pylist()]
        assert sorted(ids) == sorted(f"{shard:03d}/{i:02d}" for shard in range(SHARDS) for i in range(EACH)), "not every sample is there exactly once"
        found = {
            "nodes": NODES, "store_mib": STORE_MIB, "decoded_mib": round(SHARDS * EACH * SIDE * SIDE * 3 / 2**20), "samples": SHARDS * EACH, "exit_code": job.process.poll(),
            "seconds": round(time.monotonic() - start, 1), "said": job.stderr().strip().splitlines()[-1], "events": events, "looks": looks,
        }  # fmt: skip
    finally:
        job.clear()
        cluster.shutdown()
    write("nodes.json", found)
    shutil.rmtree(work)


def soak() -> None:
    """`SOAK` images of 32 x 32 through one engine, real ones where FAULTLINE_DATA has CIFAR-10's, each many times under IDs of its own."""
    from jobs.chaos.processes import Job

    work = Path(tempfile.mkdtemp(prefix="fl-"))
    (work / "network.py").write_text(NETWORK)
    os.environ["PYTHONPATH"] = f"{work}:{os.environ.get('PYTHONPATH', '')}"
    chance = np.random.default_rng(0)
    (work / "images").mkdir()
    for shard in range(SOAK // SOAK_SHARD):
        np.savez(work / "images" / f"{shard:03d}.npz", images=chance.integers(0, 256, (SOAK_SHARD, 32, 32, 3), np.uint8), labels=chance.integers(0, 10, SOAK_SHARD))
    run, looks, start = work / "run", [], time.monotonic()
    job = Job(work, "extract", "--run", run, "--dataset", "val", "--source", work / "images", "--model", "network:Tiny", "--address", "local", "--force")
    try:
        while job.process.poll() is None:
            family = job.family()
            groups = {"driver": [job.process], "engine": titled(family, "_Writer"), "decode workers": titled(family, "_decode", "ray::IDLE")}
            look = {"seconds": round(time.monotonic() - start, 1), "units": len(list((run / "profiles/val").glob("*.parquet")))}
            for name, processes in groups.items():
                memory, handles = held(processes)
                look |= {name: round(memory, 1), f"{name}, handles": handles}
            looks.append(look)
            time.sleep(PAUSE)
        found = {"samples": SOAK, "exit_code": job.process.poll(), "seconds": round(time.monotonic() - start, 1), "said": job.stderr().strip().splitlines()[-1], "looks": looks}
    finally:
        job.clear()
    write("soak.json", found)
    shutil.rmtree(work)


def titled(processes: list[psutil.Process], *words: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(word in title for word in words):
            found.append(process)
    return found


def write(name: str, found: dict) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / name).write_text(json.dumps(found) + "\n")
    print({key: value for key, value in found.items() if key != "looks"})


def draw() -> None:
    """Memory over time, a line a node or a process; what happened is written where it happened."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "endurance"
    from matplotlib import pyplot

    for name, title in (("nodes", "memory of each node's processes"), ("soak", "memory of each kind of process")):
        if not (DATA / f"{name}.json").exists():
            continue
        found = json.loads((DATA / f"{name}.json").read_text())
        figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
        lines = dict.fromkeys(key for look in found["looks"] for key in look if key not in ("seconds", "units", "engines") and "handles" not in key)
        for i, key in enumerate(lines):
            looks = [look for look in found["looks"] if key in look]
            axes.plot([look["seconds"] for look in looks], [look[key] for look in looks], label=key, color=str(0.12 * i), linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))][i % 5])
        for event in found.get("events", []):
            axes.axvline(event["seconds"], color="0.7", linewidth=1, zorder=0)
            axes.text(event["seconds"], 1.01, event["what"], transform=axes.get_xaxis_transform(), rotation=20, ha="left", va="bottom", fontsize=7)
        axes.set(xlabel="seconds", ylabel=f"MiB, not shared\n({title})", ylim=(0, None))
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
        print(IMAGES / f"{name}.svg")


def tables() -> dict[str, str]:
    """The tables of docs/reliability.md, by name: rounds by kind, and what the two long runs came to."""
    from jobs.chaos.campaign import read_records
    from jobs.chaos.kinds import KINDS

    records, found = read_records(DATA), {}
    rows = ["| fault | rounds | samples lost | doubled | wrong | units repeated (most that is allowed) | foul endings | seconds, median |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for kind, function in KINDS.items():
        of = [r for r in records if r.kind == kind]
        if of:
            counts = [sum(getattr(r, name) for r in of) for name in ("lost", "doubled", "wrong", "repeated", "bound")]
            rows.append(f"| **{kind}**: {function.__doc__.strip().rstrip('.')} | {len(of)} | {counts[0]} | {counts[1]} | {counts[2]} | {counts[3]} ({counts[4]}) | {sum(bool(r.foul) for r in of)} | {np.median([r.seconds for r in of]):.0f} |")
    total = [sum(getattr(r, name) for r in records) for name in ("lost", "doubled", "wrong", "repeated", "bound")]
    rows.append(f"| **all** | {len(records)} | {total[0]} | {total[1]} | {total[2]} | {total[3]} ({total[4]}) | {sum(bool(r.foul) for r in records)} | {np.median([r.seconds for r in records]):.0f} |")
    found["rounds"] = "\n".join(rows)
    for name in ("nodes", "soak"):
        run = json.loads((DATA / f"{name}.json").read_text())
        lines = dict.fromkeys(key for look in run["looks"] for key in look if key not in ("seconds", "units"))
        rows = ["| | after a quarter of the units | half | three quarters | highest |", "|---|---:|---:|---:|---:|"]
        for key in lines:
            looks = [look for look in run["looks"] if key in look]
            most = max(look["units"] for look in run["looks"])
            at = [next(look for look in run["looks"] if look["units"] >= share * most) for share in (0.25, 0.5, 0.75)]
            unit = "" if "handles" in key or key == "engines" else " MiB"
            rows.append(f"| {key} | " + " | ".join(f"{look[key]:.0f}{unit}" if key in look else "" for look in at) + f" | {max(look[key] for look in looks):.0f}{unit} |")
        found[name] = "\n".join(rows)
    return found


def page() -> str:
    """docs/reliability.md with its tables as the data have them."""
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    for name, table in tables().items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert begin and end, name
        text = f"{before}{begin}\n{table}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    {"nodes": nodes, "soak": soak, "draw": draw}[sys.argv[1]]()
    if sys.argv[1] == "draw":
        (ROOT / "docs/reliability.md").write_text(page(), encoding="utf-8")
