"""The units of a job, done: streamed through workers, tried again where workers died, and listed. What is done is what exists.

`extract` and every experiment are such a job: they differ in what decodes a unit, what writes it, and what becomes of one that no worker survives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
import pyarrow as pa

from jobs import cluster, signals
from jobs.crumb import Crumb
from jobs.progress import ProgressBar, say
from pipeline.errors import Broken, Stopped, printable
from pipeline.units import Unit
from pipeline.worker import Receipt

ATTEMPTS = 3  # times a sample by itself may kill its worker before it is given up
HANGS = 3  # times that workers hang before the job is given up
FIRST = 2  # times a unit is tried beside the others, before it is cut


@dataclass(frozen=True)
class Work:
    """A job. `decoder` and `writer` travel to other machines; what `writer()` gives takes a decoded unit and returns its receipt. Neither raises."""

    name: str  # on its bar and in messages
    decoder: Callable[[Unit], pa.Table]
    writer: Callable[[], Callable[[pa.Table], Receipt]]
    is_committed: Callable[[Unit], bool]
    give_up: Callable[[Unit], list[Unit]]  # smaller units to try instead, or none once it is dealt with
    threads: int  # of one engine
    device: str
    address: str | None
    actors: tuple[int, int] | None
    crumb: Path  # what it is at, where it is done in one process
    overlaps: bool = False  # whether what `writer()` gives may be called for a second unit while it is at the first


def run_units(work: Work, todo: list[Unit], samples: int, total: int, cost: int | None = None) -> int:
    """Do every unit of `todo`, `samples` of the job's `total`; returns how many were run.

    A unit that is left is cut by `give_up`; one sample by itself is given up only when it has had the workers to itself, so that none is blamed for
    another. cost: what the samples are worth in images of an extraction, where that is not their number. Raises Stopped if units fail with a reason, at
    once where it is that nothing can be written or that this process has lost its GPU, if many of them kill their workers, or if workers hang again and again.
    """
    faults: dict[str, str] = {}
    units_run, barren, hangs = 0, 0, 0
    crumb, worth, address = Crumb(work.crumb), samples if cost is None else cost, work.address
    if crumb.deadly and cluster.in_this_process(address, work.actors, worth):
        say(f"{work.name}: this job has died {crumb.deaths} times at {printable(crumb.last)}: now Ray's processes do the work, and may die alone")
        address = "local"
    workers = cluster.workers(work.decoder, work.writer, work.threads, work.device, address, work.actors, worth, crumb.at, work.overlaps)
    with workers as stream, ProgressBar(work.name, total, total - samples) as bar:
        bar.waiting(stream.waiting)
        alone: list[Unit] = []

        def receive(units: list[Unit], attempts: int) -> None:
            nonlocal units_run
            for receipt in stream(units, attempts) if units else ():
                units_run += 1
                signals.heed()
                if receipt.refused:
                    raise undone(work.name, sum(not work.is_committed(unit) for unit in todo), receipt.fault)
                if receipt.fault:
                    faults[receipt.stem] = receipt.fault
                else:
                    bar.advance(receipt.samples)

        while todo:
            try:
                receive([unit for unit in todo if unit not in alone], 1 if barren or units_run else FIRST)
                for unit in alone:
                    receive([unit], ATTEMPTS)
            except Broken as fault:
                raise undone(work.name, sum(not work.is_committed(unit) for unit in todo), str(fault).splitlines()[0]) from None
            except cluster.Hung:
                todo, hangs = [unit for unit in todo if not work.is_committed(unit)], hangs + 1
                if todo and hangs == HANGS:
                    raise undone(work.name, len(todo), f"nothing came back {HANGS} times: a worker hangs, or what it reads or writes does") from None
                say(f"{work.name}: nothing came back for long: {len(todo)} unit{'s' * (len(todo) != 1)} begin again with new workers")
                continue
            left = [unit for unit in todo if not work.is_committed(unit)]
            barren = barren + 1 if len(left) == len(todo) else 0
            if any(unit.stem in faults for unit in left) or (barren and len(left) > 8) or barren > 3 and todo[0].samples > 1:
                raise undone(work.name, len(left), next(iter(faults.values()), "their workers died without a word (out of memory?)"))
            todo = []
            for unit in left:
                suspect = unit.samples == 1 and unit not in alone  # it may only have waited where another killed the worker
                parts = [unit] if suspect else work.give_up(unit)
                todo += parts
                bar.advance(0 if parts else unit.samples)
            alone = [unit for unit in todo if unit.samples == 1]
    crumb.forget()
    return units_run


def undone(name: str, units: int, reason: str) -> Stopped:
    return Stopped(f"{units} unit{'s' * (units != 1)} of {printable(name)} {'were' if units != 1 else 'was'} not done: {reason}\nwhat is done is kept; the same command resumes")
