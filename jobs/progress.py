"""How a job shows where it is, on stderr: a bar with rate and time left on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from pipeline.errors import printable

PLAIN_EVERY = 5.0  # seconds between two lines where there is no terminal


def say(text: str) -> None:
    """One line to stderr; stdout belongs to results. Where nobody can read it, the job goes on unheard."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Unheard:
    """A stderr on which no job fails: what cannot be written, since its reader, its terminal or the room on its disk is gone, is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def settle_streams() -> None:
    """Standard streams that were closed lead to nowhere, and not to the next file that is opened; stderr never ends a job."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free; of a process that is started, too
    sys.__stdout__ = sys.__stdout__ or open(1, "w", encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or sys.__stdout__
    sys.__stderr__ = sys.__stderr__ or open(2, "w", encoding="utf-8", closefd=False)
    sys.stderr = Unheard(sys.stderr or sys.__stderr__)


_results: TextIO | None = None  # stdout, while `own_stdout` keeps it


@contextmanager
def own_stdout() -> Iterator[None]:
    """stdout for results alone, which `results` gives: whatever else is written, by the code of a network say, in C or by a process that it starts, goes to stderr.

    The process's own descriptor 1 is not given back: what threads, C and other processes still have to say is no result either. Raises OSError if the results cannot be written.
    """
    global _results
    before, own = (_results, sys.stdout), sys.stdout is sys.__stdout__
    if own:
        sys.stdout.flush()
        _results = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # which no other process inherits
        os.dup2(2, 1)
        sys.stdout = Unheard(open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False))  # which may be closed
    else:
        _results, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
        _results.flush()
    except BrokenPipeError:
        raise
    except OSError as fault:
        if fault.filename or _flushes(_results):
            raise
        raise OSError(fault.errno, fault.strerror, "stdout") from None
    finally:
        if own:
            with suppress(OSError):
                _results.close()
        _results, sys.stdout = before


def _flushes(stream: TextIO) -> bool:
    """Whether what it was given reaches its file."""
    try:
        stream.flush()
    except OSError:
        return False
    return True


def results() -> TextIO:
    """Where a verb's results go."""
    return _results or sys.stdout


def last_words(text: str) -> None:
    """As `say`, where the process ends at once, whatever bar is being drawn: below it, and with the cursor that a bar hides."""
    with suppress(OSError):
        print(("\n\x1b[?25h" if sys.__stderr__.isatty() else "") + text, file=sys.__stderr__, flush=True)  # a bar has put itself in the place of sys.stderr


class ProgressBar:
    """`with ProgressBar("val", 8000, done=256) as bar: bar.advance(256)`. `done` samples were there before and count for no rate."""

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "images"):
        self.label, self.total, self.before, self.unit = printable(label), total, done, unit
        self.count, self.bar = 0, None
        self.start = self.last = time.monotonic()
        self.first: tuple[float, int] | None = None  # when the first result came, and how many it was

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn(escape(self.label)), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
            self.bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.before, rate="waiting")
        return self

    def advance(self, samples: int) -> None:
        """`samples` more are done."""
        self.to(self.count + samples)

    def to(self, count: int) -> None:
        """`count` samples are done since this bar began."""
        self.count, now = count, time.monotonic()
        self.first = self.first or (now, count)
        if self.bar:
            self.bar.update(self.task, completed=self.before + count, rate=f"{self.rate:,.1f} {self.unit}/s" if self.rate else "")
        elif now - self.last >= PLAIN_EVERY or self.before + count >= self.total:
            self.last = now
            rate = f", {self.rate:,.1f}/s" if self.rate else ""
            left = (self.total - self.before - count) / self.rate if self.rate else 0
            say(f"{self.label}: {self.before + count:,} of {self.total:,} {self.unit}{rate}" + (f", {duration(left)} left" if left else ""))

    @property
    def rate(self) -> float:
        """Samples a second since the first result, so that waiting for workers counts for nothing; 0 before there are two results."""
        if self.first is None or self.count == self.first[1]:
            return 0.0
        seconds = time.monotonic() - self.first[0]
        return (self.count - self.first[1]) / seconds if seconds > 0.2 else 0.0

    def waiting(self, text: str) -> None:
        """Nothing has come yet, and why: shown where the rate will be."""
        if self.bar:
            self.bar.update(self.task, rate=text)
        else:
            say(f"{self.label}: {text}")

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()


def stages() -> Callable[[str, int, int], None]:
    """`tick(stage, done, total)` for work of several stages: each has a bar, from its first tick until it is whole."""
    bars: dict[str, ProgressBar] = {}

    def tick(stage: str, done: int, total: int) -> None:
        bar = bars[stage] = bars.get(stage) or ProgressBar(stage, total).__enter__()
        bar.to(done)
        if done >= total:
            bar.__exit__()

    return tick


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
