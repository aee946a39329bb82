"""A function in a process of its own, which may die alone: an image that kills the network must not take the job with it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pipeline.errors import Broken, Fault


class Died(Exception):
    """The process ended without an answer; str: of what."""


def apart(function: Callable, *args: object) -> Any:
    """`function(*args)`; all three travel as pickles, and the process imports from the same folders as this one.

    What it prints goes to stderr. Raises Died if it ends without an answer, what it raised if that is a Fault, and RuntimeError for anything else.
    """
    folders = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    child = subprocess.Popen([sys.executable, "-c", "from jobs.apart import _answer; _answer()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": folders})
    try:
        with suppress(BrokenPipeError), child.stdin as call:
            pickle.dump((function, args), call, 5)  # streamed: images are not copied
        answer = child.stdout.read()
    except BaseException:
        child.kill()  # this process is told to stop
        raise
    finally:
        child.wait()
        child.stdout.close()
    if not answer:
        raise Died(signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit code {child.returncode}")
    ended_well, value = pickle.loads(answer)
    if ended_well:
        return value
    raise value if isinstance(value, Fault) else RuntimeError(value)


def _answer() -> None:
    """The other process: a call from stdin, its answer to what was stdout."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        function, args = pickle.load(sys.stdin.buffer)
        answer = True, function(*args)
    except KeyboardInterrupt:  # a terminal's Ctrl-C reaches both: the first process says so
        os._exit(130)
    except Broken:  # this process is dead to its GPU
        os.kill(os.getpid(), signal.SIGKILL)
    except Fault as fault:
        answer = False, fault
    except Exception:
        answer = False, traceback.format_exc()
    with suppress(BrokenPipeError):  # nobody is left to hear it
        out.write(pickle.dumps(answer))
        out.close()
