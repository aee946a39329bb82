"""Ray's servers: started here or joined, watched while they are needed, and left.

Where Ray loses a server it ends the process from within, with exit code 1 and no word, seconds or a minute later, be it in the midst of its own start or of its own goodbyes.
Here this process is first: it says what has happened, and the exit code is its own.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from jobs.environment import WAITING, settle
from jobs.progress import last_words, say
from pipeline.errors import BadRequest, Stopped, printable

QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
ANSWER = 10.0  # seconds in which a cluster's head accepts a connection
STARTS = 3  # times that Ray is started on this machine before it is given up
SERVERS = {"gcs_server": ("control server", 3.0), "raylet": ("raylet", 45.0)}  # by the names of their processes; seconds that Ray has, while it starts, to notice the end of one by itself, and to be tried again
LONGEST = 107 - len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")  # bytes of the folder that Ray puts its own into: a socket's whole name has 107
ROOM = 32 << 20  # bytes without which Ray does not start there
LOOK = 0.1  # seconds between two looks at them while they start
FAMILY = 2.0  # seconds between two looks at what Ray has started here
GOODBYE = 10.0  # seconds that a cluster has to take leave of this process
TOLD = {signal.SIGTERM, signal.SIGHUP}  # signals by which schedulers and terminals tell all processes of a job to stop; Ray itself sees to SIGINT

family: set[psutil.Process] = set()  # what Ray has started here, as far as it was seen
leaving = False  # whether this process does without Ray from now on, whose servers may end


def joins(address: str | None) -> bool:
    """Whether an existing cluster is joined: only when told, by --address or RAY_ADDRESS."""
    return (address or os.environ.get("RAY_ADDRESS", "local")) != "local"


def start(address: str | None):
    """ray, initialised and silent. Raises BadRequest if the cluster at `address` cannot be joined, Stopped if none starts here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray._private.utils
    import ray._private.worker
    import ray.data

    ray._private.worker.print_to_stdstream = lambda *_, **__: None  # what raylets have to say of dead workers goes to stdout, whatever is asked; here it is seen by what is missing
    ray._private.utils.set_sigterm_handler = lambda _: None  # Ray's own ends this process with 1 or 15, in the midst of its start
    warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)  # bounded retries have no other spelling in this Ray
    warnings.filterwarnings("ignore", module=r"ray\.data\.")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    log = logging.getLogger("ray.data")
    for handler in [h for h in log.handlers if isinstance(h, logging.StreamHandler)]:
        log.removeHandler(handler)  # the terminal; its file in Ray's session folder stays
    if not ray.is_initialized():
        _join(ray, address or os.environ["RAY_ADDRESS"]) if joins(address) else _start_here(ray)
        _watch(ray)
    return ray


def _join(ray, address: str) -> None:
    """Raises BadRequest if there is no cluster, at once where nothing listens: Ray itself tries for half a minute, and hears no signal meanwhile."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
        with _muted(), own_sigterm():
            ray.init(address=address, runtime_env={"env_vars": WAITING}, **QUIET)
    except Exception as fault:
        raise BadRequest(f"--address: no Ray cluster can be joined at {printable(address)} ({_reason(fault)}); start one with ray start --head, or use --address local") from None


def _start_here(ray) -> None:
    """Ray on this machine. Its servers have 30 seconds to come up, which a busy machine does not always give them: it is tried again. Raises Stopped."""
    settle()  # by inheritance: a runtime_env would leave the workers unused that Ray starts ahead, which takes seconds
    _have_token()
    _look_at_place()
    for left in reversed(range(STARTS)):
        try:
            with _muted() as terminal, own_sigterm(), _watched_start(terminal), _deaf():
                ray.init(address="local", include_dashboard=False, **QUIET)
            return
        except Exception as fault:
            ray.shutdown()
            _look_at_place()
            if not left:
                raise Stopped(f"Ray did not start on this machine ({_reason(fault)}): it may be too busy, or short of memory\nthe same command goes on") from None
            say(f"Ray did not start ({_reason(fault)}); trying again")


def _have_token() -> None:
    """Ray writes the key of a cluster into the home folder, which cannot be written in many containers: there the environment holds it, for this process and what it starts."""
    folder = Path(os.path.expanduser("~")) / ".ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _look_at_place() -> None:
    """Raises Stopped where Ray's files cannot lie, or have no room."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    place = Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")))  # as Ray chooses it
    if len(os.fsencode(place)) > LONGEST:
        raise Stopped(f"{name}: {printable(place)} has {len(os.fsencode(place))} bytes; Ray keeps sockets there, whose names have room for {LONGEST}: set RAY_TMPDIR to a shorter folder, such as /tmp\nthe same command goes on")
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())  # Ray makes what is missing
    if not os.access(there, os.W_OK | os.X_OK):
        raise Stopped(f"{name}: {printable(place)}, where Ray keeps its files, cannot be written; set RAY_TMPDIR to a folder that can\nthe same command goes on")
    if (free := shutil.disk_usage(there).free) < ROOM:
        raise Stopped(f"{name}: {printable(place)}, where Ray keeps its files, has {free >> 20} MiB left: make room, or set RAY_TMPDIR to another folder\nthe same command goes on")


@contextmanager
def _watched_start(terminal: int) -> Iterator[None]:
    """While Ray starts here: a server that has ended, and whose end Ray does not notice, ends this process, which says so on `terminal`."""
    done = threading.Event()

    def watch() -> None:
        seen: dict[psutil.Process, tuple[str, float]] = {}
        while not done.wait(LOOK):
            with suppress(psutil.Error):
                seen |= {child: SERVERS[child.name()] for child in psutil.Process().children() if child.name() in SERVERS}
            for name, seconds in [known for child, known in seen.items() if not _alive(child)]:
                if not done.wait(seconds):
                    os.dup2(terminal, 2)
                    _end_of_a_server(name)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _watch(ray) -> None:
    """From now on, where one of Ray's servers beside this process ends while it is needed, this process says so and ends with exit code 4: what is committed stays.

    Ray's core would end it too, but later: without the raylet, in which the object store lives, when it next has something to write there; without the control server,
    which is looked at where it was started here, after a minute.
    """
    node = ray._private.worker.global_worker.node
    if node is None:
        return  # a client of a cluster elsewhere has no raylet beside it
    if node.is_head():
        _see_family()

    def raylet() -> None:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(node.plasma_store_socket_name)
            line.settimeout(FAMILY)
            while True:
                with suppress(TimeoutError):
                    line.recv(1)  # nothing is ever said here: it returns when the other end is gone
                    return
                if node.is_head():
                    _see_family()

    def watch(name: str, wait: Callable[[], object]) -> None:
        with suppress(OSError):
            wait()
            if ray.is_initialized() and ray._private.worker.global_worker.node is node and not leaving:
                _end_of_a_server(name)

    threading.Thread(target=watch, args=("raylet", raylet), daemon=True).start()
    for control in node.all_processes.get("gcs_server", []):
        threading.Thread(target=watch, args=("control server", control.process.wait), daemon=True).start()


def _end_of_a_server(name: str) -> None:
    global leaving
    leaving = True  # the others end with it, and are not told
    last_words(f"faultline: Ray's server on this machine (its {name}) has ended: was it killed, or is memory short?\nwhat is done is kept; the same command resumes")
    _end_family()
    os._exit(Stopped.exit_code)


def leave(code: int) -> None:
    """Ends this process with `code` if it has begun with Ray, and everything that Ray has started here. Does nothing otherwise.

    Ray's own goodbyes take seconds, and on a busy machine, or where a server is gone, they end the process with another code. A cluster that was joined is told, in bounded time.
    """
    global leaving
    ray = sys.modules.get("ray")
    node = ray and ray._private.worker._global_node
    if not node:
        return
    leaving = True
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if node.is_head():
        with suppress(Exception):
            node.destroy_external_storage()  # what did not fit into the object store
        _end_family()
    else:
        goodbye = threading.Thread(target=ray.shutdown, daemon=True)
        goodbye.start()
        goodbye.join(GOODBYE)
    os._exit(code)


def _see_family() -> None:
    with suppress(psutil.Error):
        family.update(psutil.Process().children(recursive=True))


def _end_family() -> None:
    """SIGKILL to all that this process has started, and to what lost its parent, a raylet, before.

    To servers last and all at once: Ray's core ends this process with 1 as soon as it misses one, and the caller ends it first.
    """
    _see_family()
    workers, servers = [], []
    for process in list(family):  # another thread may still be looking
        with suppress(psutil.Error):
            if process.is_running():  # psutil knows a process by its time of birth too, and takes no other for it
                (servers if process.name() in SERVERS else workers).append(process.pid)
    for pid in [*workers, *servers]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _reason(fault: Exception) -> str:
    return printable((str(fault).strip().splitlines() or [type(fault).__name__])[0])[:160]


@contextmanager
def own_sigterm() -> Iterator[None]:
    """SIGTERM means afterwards what it meant before: Ray puts a handler of its own there, which dumps a stack and aborts."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _deaf() -> Iterator[None]:
    """What is started inside never hears those signals: where they reach all of a job's processes, its servers would be gone before this one has taken leave. This one hears them, by its other threads."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _muted() -> Iterator[int]:
    """No stderr inside, but where the file that is given leads: Ray's C++ core announces its log level there. Exceptions come through; what it finds later is fatal or comes back as one."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield kept
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
