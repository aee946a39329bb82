"""The commit as a game that hypothesis plays: jobs that begin, die and begin again, workers that stop anywhere and may wake at any later time, and observers that see files late.

The code under test is the store's own, on a real folder. A worker is a thread that waits at each named point of the commit until the game lets it
go on: one that is never let go on has been killed, one that goes on after its job has died is a straggler. Who looks at the folder may not see
the newest files yet, as on a network file system; only their writer's rename is immediate.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pipeline.atomic
from pipeline.census import Census
from pipeline.sources import Shard
from pipeline.store import Store
from pipeline.units import Unit, interval_of
from test_store import MANIFEST, commit

SHARDS = (Shard("a.tar", 10, "v", ((0, 0),)), Shard("b.tar", 6, "v", ((0, 0),)))
SAMPLES = {f"{shard.name}/{i:04d}" for shard in SHARDS for i in range(shard.samples)}
MOST = 4  # samples of a unit
POINTS = 4  # of a commit: rejects and profiles, each written and renamed
BAD = 1  # samples of each unit that are set aside

local = threading.local()


class Late(Store):
    """A store whose reader does not see the files in `hidden` yet."""

    hidden: frozenset[str] = frozenset()

    def _names(self, folder: str, dataset: str) -> set[str]:
        return super()._names(folder, dataset) - self.hidden

    def is_committed(self, unit: Unit) -> bool:
        return super().is_committed(unit) and unit.stem not in self.hidden


class Worker:
    """Commits one unit, in steps. `step` lets it go on to its next point; returns False once it has ended."""

    def __init__(self, run: Path, unit: Unit):
        self.unit, self.go, self.paused, self.ended = unit, threading.Semaphore(0), threading.Semaphore(0), False
        self.thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self.thread.start()

    def _work(self, run: Path) -> None:
        local.worker = self
        self.go.acquire()
        try:
            commit(Store(run), self.unit, BAD)
        except OSError:
            pass  # a sweep took its file away: it commits nothing
        self.ended = True
        self.paused.release()

    def pause(self) -> None:
        self.paused.release()
        self.go.acquire()

    def step(self) -> bool:
        if not self.ended:
            self.go.release()
            self.paused.acquire()
        return not self.ended


class Game(RuleBasedStateMachine):
    """At most one job holds the data set; any number of stragglers may be left of those that died."""

    @initialize()
    def begin(self):
        self.run = Path(tempfile.mkdtemp(prefix="commit-"))
        MANIFEST.write(self.run)
        Store(self.run).write_census("val", Census("/data", "webdataset", "/data", SHARDS, None))
        self.todo: list[Unit] | None = None  # of the living job, None: there is none
        self.workers: list[Worker] = []  # of the living job
        self.stragglers: list[Worker] = []
        self.fsync, os.fsync = os.fsync, lambda *_: None  # no power is lost in this game, and it takes most of the time
        self.original, pipeline.atomic.failpoints.reach = pipeline.atomic.failpoints.reach, lambda *_: getattr(local, "worker", None) and local.worker.pause()

    def teardown(self):
        """Whatever has happened, one undisturbed run of the command ends with every sample once, for every reader."""
        if not hasattr(self, "run"):
            return
        try:
            self.job_dies()
            self.job_begins(None, frozenset())
            while self.todo or self.workers:
                self._finish_workers()
                self._take()
            self.job_ends()
            profiles, rejects = self._plain("profiles"), self._plain("rejects")
            assert sorted(profiles + rejects) == sorted(SAMPLES), "every sample once, in profiles or in rejects"
            for worker in self.stragglers:  # the last of them wake when all is done
                while worker.step():
                    pass
            assert sorted(self._ours()) == sorted(SAMPLES)
        finally:
            os.fsync, pipeline.atomic.failpoints.reach = self.fsync, self.original
            shutil.rmtree(self.run)

    # ---- what happens ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.todo is None)
    @rule(limit=st.one_of(st.none(), st.integers(1, 16)), late=st.frozensets(st.integers(0, 7), max_size=3))
    def job_begins(self, limit, late):
        """It holds the data set, sweeps, and plans what it does not see."""
        store = self._seen(late)
        store.write_census("val", Census("/data", "webdataset", "/data", SHARDS, limit))
        store.sweep("val")
        self.todo = store.todo("val", MOST)

    @precondition(lambda self: self.todo)
    @rule()
    def a_worker_begins(self):
        self._take()

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, 7), points=st.integers(1, POINTS + 1))
    def a_worker_goes_on(self, which, points):
        worker = self.workers[which % len(self.workers)]
        if not all(worker.step() for _ in range(points)):
            self.workers.remove(worker)

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, 7), late=st.frozensets(st.integers(0, 7), max_size=3))
    def a_worker_is_given_up(self, which, late):
        """The job believes that it is dead, and cuts its unit, unless it sees it committed."""
        worker = self.workers.pop(which % len(self.workers))
        self.stragglers.append(worker)
        if not self._seen(late).is_committed(worker.unit):
            self.todo += worker.unit.halves() or [worker.unit]

    @precondition(lambda self: self.stragglers)
    @rule(which=st.integers(0, 7), points=st.integers(1, POINTS + 1))
    def a_straggler_wakes(self, which, points):
        worker = self.stragglers[which % len(self.stragglers)]
        if not all(worker.step() for _ in range(points)):
            self.stragglers.remove(worker)

    @precondition(lambda self: self.todo is not None)
    @rule()
    def job_dies(self):
        self.stragglers += self.workers
        self.todo, self.workers = None, []

    @precondition(lambda self: self.todo == [] and not self.workers)
    @rule()
    def job_ends(self):
        """It sweeps, and what it was asked for is there."""
        store = Store(self.run)
        store.sweep("val")
        assert not store.progress("val").pending or self.stragglers
        self.todo = None

    # ---- what is true at every moment ----------------------------------------------------------------------------------

    @invariant()
    def every_file_is_whole_and_no_sample_is_read_twice(self):
        if not hasattr(self, "run"):
            return
        for folder in ("profiles", "rejects"):
            for file in (self.run / folder / "val").glob("*.parquet"):
                _, start, stop = interval_of(file.stem)
                assert pq.ParquetFile(file).metadata.num_rows == (BAD if folder == "rejects" else stop - start - BAD)
        ours = self._ours()
        assert len(ours) == len(set(ours))

    # ---- how it is looked at -------------------------------------------------------------------------------------------

    def _seen(self, late: frozenset[int]) -> Store:
        """The store of an observer who does not see some of the units yet."""
        store, stems = Late(self.run), sorted(p.stem for p in (self.run / "profiles/val").glob("*.parquet"))
        store.hidden = frozenset(stems[i] for i in late if i < len(stems))
        return store

    def _take(self) -> None:
        if self.todo:
            self.workers.append(Worker(self.run, self.todo.pop(0)))

    def _finish_workers(self) -> None:
        for worker in self.workers:
            while worker.step():
                pass
        self.workers = []

    def _ours(self) -> list[str]:
        """Sample IDs as the store gives them: profiles, then rejects."""
        store = Store(self.run)
        return [i for _, _, batch in store.blocks("val", ["sample_id"]) for i in batch["sample_id"].to_pylist()] + store.rejects("val")["sample_id"].to_pylist()

    def _plain(self, folder: str) -> list[str]:
        """Sample IDs as any Parquet reader sees them."""
        return [i for file in (self.run / folder / "val").glob("*.parquet") for i in pq.read_table(file)["sample_id"].to_pylist()]


TestGame = Game.TestCase
TestGame.settings = settings(max_examples=30, stateful_step_count=35, deadline=None)


@pytest.mark.parametrize("broken", ["apart", "sweep"])
def test_the_game_finds_what_is_wrong(broken, monkeypatch):
    """Without the rule for units that overlap, and without the sweep, it does not take long to lose it."""
    from hypothesis.stateful import run_state_machine_as_test

    if broken == "apart":
        monkeypatch.setattr("pipeline.store.apart", lambda stems: list(stems))
    else:
        monkeypatch.setattr(Store, "sweep", lambda *_: None)
    with pytest.raises(BaseException):
        run_state_machine_as_test(Game, settings=settings(max_examples=200, stateful_step_count=40, deadline=None, print_blob=False, report_multiple_bugs=False, phases=[Phase.generate]))
