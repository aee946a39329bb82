"""A measured figure beside its floor, and the fair way to take several: each has its turn in every round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from jobs.progress import say


@dataclass(frozen=True)
class Measure:
    """what: was measured; value: the median, in `unit`; floor: of `beside`, in the same unit and the same run, where there is one;
    ratio: value / floor; where each round has a floor of its own, the median of theirs."""

    what: str
    value: float
    unit: str
    beside: str | None = None
    floor: float | None = None
    ratio: float | None = None

    @classmethod
    def over(cls, what: str, value: float, unit: str, beside: str, floor: float) -> Measure:
        return cls(what, value, unit, beside, floor, value / floor)


def now(device: str) -> float:
    """Seconds on a clock, once all that was asked of the device (cpu or cuda) is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(turns: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one call that warms it."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds + 1):
        order = list(turns)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.perf_counter()
            turns[name]()
            seconds[name].append(time.perf_counter() - start)
        if turn:
            say(f"round {turn} of {rounds}: " + ", ".join(f"{name} {seconds[name][-1]:.3g} s" for name in order))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}
