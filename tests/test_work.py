"""Units that kill their workers: each is found, and nothing else is lost with it."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from jobs import cluster, work
from pipeline.errors import Broken, Stopped
from pipeline.units import Unit
from pipeline.worker import Receipt


class Crowd:
    """Workers that one poisoned sample kills, and with them every unit that waits behind it, as often as it is tried."""

    def __init__(self, poison: set[int], fragile: bool = False):
        self.poison, self.fragile, self.done, self.aside, self.asked = poison, fragile, set(), [], []

    @contextmanager
    def workers(self, *_):
        yield cluster.Stream(self.stream, "waiting")

    def stream(self, units, attempts):
        self.asked.append(([u.stem for u in units], attempts))
        for unit in units:
            if self.fragile or self.poison & set(range(unit.start, unit.stop)):
                return
            self.done.add(unit.stem)
            yield Receipt(unit.stem, unit.samples, 0, 0.0, "")

    def give_up(self, unit):
        if unit.samples == 1:
            self.aside.append(unit.start)
            self.done.add(unit.stem)
        return unit.halves()

    def run(self, monkeypatch, units):
        monkeypatch.setattr(cluster, "workers", self.workers)
        job = work.Work("val", None, None, lambda unit: unit.stem in self.done, self.give_up, 1, "cpu", None, None, Path("/nonexistent"))
        return work.run_units(job, units, sum(u.samples for u in units), sum(u.samples for u in units))


def units(*bounds: tuple[int, int]) -> list[Unit]:
    return [Unit("val", "a.tar", start, stop) for start, stop in bounds]


@pytest.mark.parametrize("bounds", [[(0, 2)], [(0, 8)], [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 3), (3, 6), (6, 7), (7, 8)]])
@pytest.mark.parametrize("poison", [{0}, {1}, {0, 1}])
def test_only_the_sample_that_kills_is_set_aside(monkeypatch, bounds, poison):
    """Not those that waited where it killed the worker, however often they waited there."""
    crowd = Crowd(poison)
    crowd.run(monkeypatch, units(*bounds))
    assert sorted(crowd.aside) == sorted(poison)
    for start in poison:
        stem = Unit("val", "a.tar", start, start + 1).stem
        assert ([stem], work.ATTEMPTS) in crowd.asked, "it had the workers to itself, and all its attempts"


def test_workers_that_always_die_stop_the_job_and_blame_no_sample(monkeypatch):
    crowd = Crowd(set(), fragile=True)
    with pytest.raises(Stopped, match="their workers died without a word"):
        crowd.run(monkeypatch, units(*((i, i + 1) for i in range(20))))
    assert crowd.aside == []


def test_a_run_that_cannot_be_written_stops_the_job_at_once(monkeypatch):
    """What is computed after that is computed in vain."""
    asked = []

    def stream(units, attempts):
        for unit in units:
            asked.append(unit)
            yield Receipt(unit.stem, unit.samples, 0, 0.0, "the disk is full", refused=True)

    crowd = Crowd(set())
    crowd.stream = stream
    with pytest.raises(Stopped, match="9 units of val were not done: the disk is full"):
        crowd.run(monkeypatch, units(*((i, i + 1) for i in range(9))))
    assert len(asked) == 1


def test_a_job_that_died_twice_at_the_same_unit_is_done_by_processes_of_their_own(monkeypatch, tmp_path):
    """A process that works by itself leaves word of what it was at; whatever else ends it takes the word away."""
    crumb, where = tmp_path / "run/datasets/.val.at", []
    for deaths, address in ((0, None), (1, None), (2, "local"), (0, None)):
        if deaths:
            crumb.parent.mkdir(parents=True, exist_ok=True)
            crumb.write_text(json.dumps({"at": "a-00000000-00000001", "deaths": deaths}))

        @contextmanager
        def workers(decoder, writer, threads, device, address, actors, samples, at, overlaps):
            where.append(address)
            with at("a-00000000-00000001"):
                assert json.loads(crumb.read_text())["deaths"] == deaths + 1
            yield cluster.Stream(Crowd.stream.__get__(crowd), "waiting")

        crowd = Crowd(set())
        monkeypatch.setattr(cluster, "workers", workers)
        job = work.Work("val", None, None, lambda unit: unit.stem in crowd.done, crowd.give_up, 1, "cpu", None, None, crumb)
        work.run_units(job, units((0, 1)), 1, 1)
        assert where[-1] == address and not crumb.exists()


def test_a_job_that_was_told_to_stop_does(monkeypatch):
    """Also where the exception was swallowed by what it was in."""
    crowd = Crowd(set())
    monkeypatch.setattr(work.signals, "told", True)
    with pytest.raises(KeyboardInterrupt):
        crowd.run(monkeypatch, units((0, 1), (1, 2), (2, 3)))
    assert len(crowd.done) == 1


def test_a_gpu_that_fails_ends_this_process_and_leaves_word(monkeypatch, tmp_path):
    """As a death does: the second time the work is given to processes of their own, where it is seen which sample did it, if one did."""
    crumb, asked = tmp_path / "run/datasets/.val.at", []

    def write(unit):
        asked.append(unit)
        raise Broken("the GPU failed (CUDA error: unspecified launch failure)")

    job = work.Work("val", lambda unit: unit, lambda: write, lambda unit: False, list, 1, "cpu", None, None, crumb)
    for deaths in (1, 2):
        with pytest.raises(Stopped, match=r"2 units of val were not done: the GPU failed \(CUDA error: unspecified launch failure\)"):
            work.run_units(job, units((0, 1), (1, 2)), 2, 2)
        assert len(asked) == deaths and json.loads(crumb.read_text())["deaths"] == deaths
    monkeypatch.setattr(cluster, "workers", lambda *given: (_ for _ in ()).throw(KeyError(given[4])))
    with pytest.raises(KeyError, match="local"):
        work.run_units(job, units((0, 1), (1, 2)), 2, 2)


def test_an_engine_whose_gpu_fails_dies_of_it():
    """Ray starts it anew, and gives its unit to another."""
    code = "import pyarrow as pa; from jobs import cluster; from pipeline.errors import Broken\ndef write(table): raise Broken('the GPU failed (CUDA error: x)')\ntable = cluster._decode(pa.table({'unit': [%r]}), lambda unit: pa.table({'a': [1]}))\ncluster._Writer(lambda: write)(table)"
    ended = subprocess.run([sys.executable, "-c", code % units((0, 1))[0].to_json()], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL and "an engine ends: the GPU failed (CUDA error: x)" in ended.stderr


def test_word_of_a_job_that_was_refused_leaves_no_folder(tmp_path):
    from jobs.crumb import Crumb

    with pytest.raises(ValueError), Crumb(tmp_path / "run/datasets/.val.at").at("the first look"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "torn").write_text("{")
    assert Crumb(tmp_path / "torn").deaths == 0


@pytest.mark.parametrize("hangs, ends", [(1, True), (2, True), (3, False)])
def test_workers_that_hang_are_replaced_and_no_unit_is_blamed(monkeypatch, hangs, ends):
    """Units that nothing came back of are begun again as they are, neither cut nor set aside; again and again is too often."""
    crowd, left = Crowd(set()), [hangs]

    def stream(these, attempts):
        yield from crowd.honest(these[:2], attempts)
        if left[0]:
            left[0] -= 1
            raise cluster.Hung
        yield from crowd.honest(these[2:], attempts)

    crowd.honest, crowd.stream = crowd.stream, stream
    with nullcontext() if ends else pytest.raises(Stopped, match="4 units of val were not done: nothing came back 3 times"):
        crowd.run(monkeypatch, units(*((2 * i, 2 * i + 2) for i in range(10))))
    assert crowd.aside == [] and all(stem.endswith(tuple(f"{i:08d}" for i in range(2, 21, 2))) for stem in crowd.done)
    assert (len(crowd.done) == 10) is ends


def test_the_alarm_rings_where_nothing_comes_back(monkeypatch):
    """Not before the first receipt, and not while receipts come; afterwards what rang before rings again."""
    monkeypatch.setenv(cluster.PATIENCE, "0.2")
    before = signal.getsignal(signal.SIGALRM)
    with cluster._alarm() as wait_again:
        time.sleep(0.3)
        for _ in range(3):
            wait_again()
            time.sleep(0.1)
    time.sleep(0.3)
    start = time.monotonic()
    with pytest.raises(cluster.Hung), cluster._alarm() as wait_again:
        wait_again()
        time.sleep(5)
    assert time.monotonic() - start < 2 and signal.getsignal(signal.SIGALRM) is before
