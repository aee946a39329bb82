"""Units in, receipts out: on this process, this machine or a cluster. With `servers.py`, the one place that knows Ray.

Ray Data streams and retries: one row is one unit, decoded by CPU tasks, then computed and committed by a pool of actors (a GPU each where there are any).
What decodes and what writes is the caller's: both travel as they are, a writer as what makes one, so that each actor makes its own.
Only receipts come back. Its settings here keep a unit whole and its retries bounded; each was measured.
Small work runs in this process instead: the same units, the same two steps, the same files, without the seconds that a cluster takes to start.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial

import numpy as np
import pyarrow as pa

from jobs import servers
from jobs.environment import settle, spare_pandas
from pipeline.errors import BadRequest, Broken, Stopped, printable
from pipeline.units import Unit
from pipeline.worker import Receipt

Decode = Callable[[Unit], pa.Table]  # picklable
MakeWriter = Callable[[], Callable[[pa.Table], Receipt]]  # picklable; called once a worker

At = Callable[[str], AbstractContextManager]

SMALL = 4096  # samples: up to here a cluster costs more than it gives, unless one is asked for
DECODE_CPUS = 0.5  # that a decode task reserves
PATIENCE = "FAULTLINE_PATIENCE"  # seconds without a finished unit, once there was one, after which the workers are believed to hang
SLOWEST = 20  # and never fewer than so many times the longest pause so far
UNITS = 2  # that an engine has at a time: one is written, and the next sent and unpacked, while it computes the other
ENGINE_THREADS = 4  # most threads of a CPU engine; beyond, more actors give more


class Hung(Exception):
    """Workers are there, and nothing comes back of them: one hangs, or what it reads or writes does."""


class Stream:
    """`stream(units, attempts)` yields a receipt a unit, in any order. `waiting`: what the first receipt waits for."""

    def __init__(self, run: Callable[[list[Unit], int], Iterator[Receipt]], waiting: str):
        self._run, self.waiting = run, waiting

    def __call__(self, units: list[Unit], attempts: int) -> Iterator[Receipt]:
        return self._run(units, attempts)


def device_for(asked: str | None, address: str | None) -> str:
    """`cuda` or `cpu`: what was asked for, otherwise GPUs where this machine, or the cluster that is joined, has any now.

    A cluster that starts its GPU nodes on demand has none yet: there it must be asked for. Raises BadRequest for a GPU or a cluster that is not there.
    """
    if servers.joins(address):
        ray = servers.start(address)  # whatever was asked: a cluster that cannot be reached is told here, before anything is done
        return asked or ("cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise BadRequest("--device: torch sees no CUDA GPU on this machine; use cpu, or --address to join a cluster that has some")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def threads_of_an_engine() -> int:
    """Threads of one CPU engine on this machine, for a new run."""
    return max(1, min(ENGINE_THREADS, cpus_here()))


def cpus_here() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def engines_here(device: str, threads: int) -> int:
    """Engines that a job has on this machine by default."""
    import torch

    return torch.cuda.device_count() if device == "cuda" else max(1, cpus_here() // max(ENGINE_THREADS, threads))


def cpus_of_an_engine(threads: int, engines: int, cpus: int) -> float:
    """CPUs that each of `engines` reserves of `cpus`: its threads but one, and always so few that a decode task fits beside them all; otherwise nothing would ever begin.

    Never what a decode task reserves: stages that reserve the same are fused by Ray, and decode in the engine's actor.
    """
    if not cpus:
        return 1  # a cluster that starts its nodes on demand has none yet
    share = min(max(1, threads - 1), max(cpus - DECODE_CPUS, DECODE_CPUS) / max(1, engines))
    return int(share) if share >= 1 else max(0.01, int(100 * share) / 100 - (0.01 if int(100 * share) == 100 * DECODE_CPUS else 0))


def in_this_process(address: str | None, actors: tuple[int, int] | None, samples: int) -> bool:
    """Whether a job of about `samples` samples is done without Ray: it is little, and nothing else was asked for."""
    return address is None and actors is None and not servers.joins(None) and samples <= SMALL


@contextmanager
def workers(decoder: Decode, make_writer: MakeWriter, threads: int, device: str, address: str | None, actors: tuple[int, int] | None, samples: int, at: At = nullcontext, overlaps: bool = False) -> Iterator[Stream]:
    """Workers for about `samples` samples, engines of `threads` threads: this process, or Ray's.

    at: entered with the stem of each unit that this process works on. overlaps: whether a writer may be called for a second unit while it is at the first, in another thread, as it is then on a GPU, or where it is the only one.
    """
    if in_this_process(address, actors, samples):
        yield Stream(partial(_here, decoder, make_writer(), at), "starting in this process (small work; --address local starts Ray)")
        return
    ray = servers.start(address)
    yield Stream(lambda units, attempts: _stream(ray, decoder, make_writer, threads, device, actors, overlaps, units, attempts), "waiting for the first unit: Ray's workers are starting (half a minute or so)")


def _here(decoder: Decode, write: Callable[[pa.Table], Receipt], at: At, units: list[Unit], attempts: int) -> Iterator[Receipt]:
    spare_pandas()
    for unit in units:
        with at(unit.stem):
            receipt = write(decoder(unit))
        yield receipt


def _stream(ray, decoder: Decode, make_writer: MakeWriter, threads: int, device: str, actors: tuple[int, int] | None, overlaps: bool, units: list[Unit], attempts: int) -> Iterator[Receipt]:
    """Receipts of `units` from Ray Data. An engine on a GPU has `UNITS` at a time, and so has one that is alone and can overlap them; any other has one. A unit that kills its worker `attempts` times gives none; neither does an error of Ray's own.

    Raises Stopped if no worker can be started at all, Hung if none comes back for long.
    """
    from ray.data import ActorPoolStrategy

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    least, most = actors or (max(1, gpus if device == "cuda" else cpus // max(ENGINE_THREADS, threads)),) * 2
    most = min(most, len(units))
    each = UNITS if device == "cuda" or overlaps and most == 1 else 1
    pool = ActorPoolStrategy(
        min_size=min(least, most), max_size=most, max_tasks_in_flight_per_actor=each, max_concurrent_calls_per_actor=each if overlaps else 1, enable_true_multi_threading=True
    )  # of several on CPUs none waits behind another: at the end of a job it would wait there for the slowest engine, while others are done
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    where = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": cpus_of_an_engine(min(threads, largest), most, cpus)}

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a unit stays one block, however large
    context.enable_progress_bars = False
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # all that are there are busy
    context.max_errored_blocks = -1  # a unit that is given up is seen by its missing file
    context.log_internal_stack_trace_to_stdout = False
    line = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=len(units))
    line = line.map_batches(_decode, fn_args=(decoder,), batch_size=1, batch_format="pyarrow", num_cpus=DECODE_CPUS, max_retries=attempts - 1)
    line = line.map_batches(
        _Writer, fn_constructor_args=(make_writer,), batch_size=1, batch_format="pyarrow", zero_copy_batch=True, compute=pool, max_task_retries=attempts - 1, **where
    )  # fmt: skip
    try:
        with _alarm() as wait_again:
            for row in line.iter_rows():
                wait_again()
                yield Receipt(**row)
    except (ray.exceptions.RayError, RuntimeError) as fault:
        servers.leaving = True  # it is told here
        text = str(fault).strip().splitlines()
        said = re.sub(r"^pipeline\.errors\.\w+: ", "", text[-1]) if text else type(fault).__name__
        raise Stopped(f"Ray stopped the job: {printable(said)[:300]}\nwhat is done is kept; the same command resumes") from None


@contextmanager
def _alarm() -> Iterator[Callable[[], None]]:
    """What is given is called at each receipt; if it is not called for long after the first time, Hung is raised here, as Ctrl-C would be. Only a main thread can be told so."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    patience, last, longest = float(os.environ.get(PATIENCE, "600")), None, 0.0

    def ring(*_) -> None:
        raise Hung

    def wait_again() -> None:
        nonlocal last, longest
        now = time.monotonic()
        longest = max(longest, now - last if last else 0)
        last = now
        signal.setitimer(signal.ITIMER_REAL, max(patience, SLOWEST * longest))

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield wait_again
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _decode(batch: pa.Table, decoder: Decode) -> pa.Table:
    """One row with a unit -> one row with its decoded samples. One row a unit, all along the line, is what keeps units whole."""
    sink = pa.BufferOutputStream()
    decoded = decoder(Unit.from_json(batch["unit"][0].as_py()))
    with pa.ipc.new_stream(sink, decoded.schema) as stream:
        stream.write_table(decoded)
    content = sink.getvalue()
    ends = pa.py_buffer(np.array([0, content.size], np.int64))
    return pa.table({"decoded": pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, content])})


class _Writer:
    """The actor: a writer from decoded units to receipts, a row each. Where its GPU is broken it dies, and Ray gives the unit to another."""

    def __init__(self, make_writer: MakeWriter):
        settle()  # on another machine, before torch comes
        signal.pthread_sigmask(signal.SIG_UNBLOCK, servers.TOLD)  # Ray's servers are deaf to them, and what a network starts would inherit it
        self.write = make_writer()

    def __call__(self, batch: pa.Table) -> pa.Table:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, servers.TOLD)  # in this thread too
        with pa.ipc.open_stream(batch["decoded"][0].as_buffer()) as stream:
            decoded = stream.read_all()
        try:
            return pa.Table.from_pylist([asdict(self.write(decoded))])
        except Broken as fault:
            print(f"an engine ends: {str(fault).splitlines()[0]}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
