"""How a command is told to stop, by Ctrl-C, by SIGTERM as schedulers do, or by the end of its terminal: once, and it takes leave; twice, and it ends where it is."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable
from contextlib import suppress

from pipeline.errors import Stopped

WRITES, ASKS = "what is done is kept, and the same command resumes", "nothing was written, and the same command begins again"
told = False  # whether this process was told to stop
left = WRITES  # what the command of this process leaves when it is stopped


def hear(writes: bool) -> None:
    """From now on a signal raises KeyboardInterrupt in the main thread, and a second one ends the process. writes: whether the command writes anything but its answer."""
    global left, told
    told = False
    left = WRITES if writes else ASKS
    _answer(_stop)
    atexit.register(_answer, signal.SIG_IGN)  # what is registered first comes last: Python is being taken down, without handlers, and the exit code is decided


def _answer(handler: Callable[..., None] | signal.Handlers) -> None:
    signal.signal(signal.SIGTERM, handler)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a shell's background, and under nohup
            signal.signal(number, handler)


def _stop(*_: object) -> None:
    """The first time, a job takes leave of its files, its processes and Ray."""
    global told
    told = True
    _answer(_at_once)
    raise KeyboardInterrupt


def heed() -> None:
    """Raises KeyboardInterrupt where this process was told to stop, and what it was in at that moment (a callback of a C library, a module that was being imported) swallowed it."""
    if told:
        raise KeyboardInterrupt


def _at_once(*_: object) -> None:
    """The second time it does not wait for that."""
    with suppress(OSError):
        os.write(2, f"\nfaultline: stopped at once; {left}\n".encode())
    os._exit(Stopped.exit_code)
