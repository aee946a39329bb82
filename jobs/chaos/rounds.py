"""One round: a job is hurt, the same command is given again until it completes, and what lies there is counted against the undisturbed run."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from jobs.chaos.ground import EACH, SHARDS, Ground
from jobs.chaos.processes import Job, ending, strangers
from jobs.cluster import PATIENCE
from pipeline.store import Store

AGAIN = 4  # times that the command is given again before the job is believed lost
LONGEST = 600.0  # seconds that one job may take
PACE = 0.08  # seconds that a unit takes longer where a moment between two units is wanted


@dataclass(frozen=True)
class Record:
    """What a round came to, a line of `rounds.jsonl`. codes: exit codes in order; lost, doubled, wrong: samples; repeated: units computed again, `bound` the most that
    the contract allows; foul: what a user should not have seen."""

    round: int
    kind: str
    detail: str
    codes: list[int]
    lost: int
    doubled: int
    wrong: int
    repeated: int
    bound: int
    seconds: float
    foul: list[str]

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.foul or self.repeated > self.bound)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Round:
    """The job of a round, as a fault sees it. `kinds.py` says what is done to it."""

    def __init__(self, ground: Ground, number: int, seed: int):
        self.ground, self.number = ground, number
        self.chance = random.Random(f"{seed}:{number}")
        self.folder = ground.folder / f"round-{number:05d}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.run = self.folder / "run"
        self.more: list[object] = []  # options of the job
        self.job: Job | None = None
        self.codes: list[int] = []
        self.foul: list[str] = []
        self.detail, self.bound = "", 0
        self.patience: int | None = None  # seconds after which workers are believed to hang, where not the usual ones
        self.poison: str | None = None  # the sample that no process survives
        ground.clear()
        (ground.failpoints / "trace").touch()

    # ---- what a fault may do -------------------------------------------------------------------------------------------

    def on_cluster(self) -> None:
        """The job is a resumed one, with two engines on the cluster of two nodes."""
        self.ground.begun(self.run)
        self.more = ["--address", self.ground.address(), "--actors", 2]

    def plant(self, point: str, action: str, **more: object) -> None:
        fault = {"point": point, "action": action} | more
        (self.ground.failpoints / f"{len(list(self.ground.failpoints.iterdir())):02d}.json").write_text(json.dumps(fault))

    def slow(self) -> None:
        """Units take a while, so that there are moments between them."""
        self.plant("profile", "sleep", seconds=PACE, times=None)

    def shard(self) -> str:
        """Of a unit that is still to do."""
        return f"val-{self.chance.randrange(4, SHARDS):03d}.tar"

    def start(self) -> Job:
        self.job = Job(self.folder, *self.ground.words(self.run), *self.more, env={PATIENCE: str(self.patience)} if self.patience else None)
        return self.job

    def after_some(self) -> int:
        """Waits until a few more units are committed, and a little longer; returns how many."""
        wanted = len(self.committed()) + self.chance.randint(1, 10)
        self.job.until(lambda: len(self.committed()) >= wanted)
        time.sleep(self.chance.uniform(0, 2 * PACE))
        return wanted

    def committed(self) -> set[str]:
        return {p.stem for p in (self.run / "profiles/val").glob("*.parquet")}

    def end(self, *expected: int) -> int:
        """Waits for the job; another exit code than `expected`, or words that are not ours, are foul."""
        try:
            code = self.job.wait(LONGEST)
        except AssertionError:
            code, expected = -1000, (*expected, -1000)
            self.foul.append(f"still at work after {LONGEST:.0f} s")
        self.codes.append(code)
        stderr = self.job.stderr()
        if code not in expected:
            self.foul.append(f"exit code {code}: {ending(stderr).strip()[:300]}")
        self.foul += [f"on stderr: {line[:200]}" for line in strangers(stderr, "val")[:3]]
        if "a defect of faultline" in stderr:
            self.foul.append(ending(stderr).strip()[:300])
        self.job.clear()
        return code

    # ---- the end of a round --------------------------------------------------------------------------------------------

    def complete(self) -> None:
        """The same command, until it is done. What stays planted for ever stays: it is part of the data."""
        for _ in range(AGAIN):
            if self.codes[-1] in (0, 3):
                return
            self.start()
            self.end(0, 3, 4, *([-9] if self.poison else []))
        if self.codes[-1] not in (0, 3):
            self.foul.append(f"not done after {AGAIN} more times of the same command")

    def record(self, kind: str, seconds: float) -> Record:
        """Counted from the files as any Parquet reader sees them."""
        expected, reasons = rows(self.ground.reference), {}
        got = rows(self.run)
        for row in tables(self.run / "rejects/val"):
            reasons |= dict(zip(row["sample_id"].to_pylist(), row["reason"].to_pylist()))
        places = Counter(sample_id for folder in ("profiles", "rejects") for table in tables(self.run / folder / "val") for sample_id in table["sample_id"].to_pylist())
        lost = sum(sample_id not in places for sample_id in expected)
        doubled = sum(count > 1 for count in places.values())
        wrong = sum(got[sample_id] != bits for sample_id, bits in expected.items() if sample_id in got)
        wrong += sum(sample_id not in expected for sample_id in places)
        wrong += sum(sample_id != self.poison or not reason.startswith("it killed its worker process") for sample_id, reason in reasons.items())
        return Record(self.number, kind, self.detail, self.codes, lost, doubled, wrong, self.repeated(), self.bound, round(seconds, 1), self.foul)

    def repeated(self) -> int:
        """Units whose vectors were computed although a sample of theirs had been before: by the trace of every process."""
        done, again = set(), 0
        for line in (self.ground.failpoints / "trace").read_text().splitlines():
            point, shard, start, stop, _ = line.split("\t")
            if point == "profiled":
                places = {(shard, position) for position in range(int(start), int(stop))}
                again += bool(places & done)
                done |= places
        return again

    def forget(self) -> None:
        """Nothing of a clean round stays."""
        shutil.rmtree(self.folder, ignore_errors=True)


def rows(run: Path) -> dict[str, bytes]:
    """sample_id -> every bit of its profile."""
    found = {}
    for table in tables(run / "profiles/val"):
        saliency = np.stack(table["saliency"].to_numpy()) if table.num_rows else []
        others = [table[name].to_pylist() for name in ("label", "prediction", "thumbnail", "shard")]
        floats = [table[name].to_numpy().tobytes() for name in ("label_confidence", "prediction_confidence", "loss")]
        for i, sample_id in enumerate(table["sample_id"].to_pylist()):
            found[sample_id] = saliency[i].tobytes() + b"".join(f[4 * i : 4 * i + 4] for f in floats) + repr([o[i] for o in others]).encode()
    return found


def tables(folder: Path):
    """Every file that a reader of `*.parquet` finds."""
    return [pq.read_table(file) for file in sorted(folder.glob("*.parquet"))]


def sample_of(reference: Path, shard: str, position: int) -> str:
    """The ID at a position of a shard."""
    stem = next(f for f in Store(reference).files("val") if re.match(re.escape(shard.removesuffix(".tar")) + "-", f.name))
    return pq.read_table(stem)["sample_id"][position % EACH].as_py()
