"""Units that kill their workers: each is found, and nothing else is lost with it."""

from contextlib import contextmanager

import pytest

from jobs import cluster, work
from pipeline.errors import Stopped
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
        job = work.Work("val", None, None, lambda unit: unit.stem in self.done, self.give_up, 1, "cpu", None, None)
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
