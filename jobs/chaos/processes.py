"""The real command in real processes: started, watched, killed, and cleared away. Touches no process but its own descendants."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

COMMAND = Path(sys.executable).with_name("faultline")  # as installed beside this Python
SHORT = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()  # Ray's socket paths must be short
OURS = ("counting shards:", "loading ", "check: ", "engine: ", "faultline: ", "Ray did not start (", "what is done is kept", "why they were set aside: ", "that is more than --max-rejects")


class Job:
    """One `faultline ...` in a session of its own, its Ray files in a folder of its own."""

    def __init__(self, folder: Path, *words: object, env: dict[str, str] | None = None):
        self.folder, self.ray = folder, rays_folder(folder, "out")
        self.out, self.err = folder / f"{self.ray.name}.out", folder / f"{self.ray.name}.err"
        self.seen: dict[int, psutil.Process] = {}
        self.start = time.monotonic()
        own = {"RAY_TMPDIR": str(self.ray), "RAY_ADDRESS": "local"}
        inherited = {k: v for k, v in os.environ.items() if k != "FAULTLINE_DEBUG"}
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = psutil.Popen([str(COMMAND), *map(str, words)], cwd=folder, env=inherited | own | (env or {}), stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, preexec_fn=_hear)

    def family(self) -> list[psutil.Process]:
        """Living descendants of the driver, those whose parent is gone included."""
        for known in [self.process, *self.seen.values()]:
            try:
                self.seen.update({p.pid: p for p in known.children(recursive=True)})
            except psutil.NoSuchProcess:
                continue
        return [p for p in self.seen.values() if _alive(p)]

    def find(self, word: str) -> psutil.Process | None:
        """A living descendant in whose title `word` stands: `_Writer` is an engine's actor, `_decode` a decode worker at work."""
        return next((p for p in self.family() if word in _title(p)), None)

    def until(self, wanted: Callable[[], object], seconds: float = 240, pause: float = 0.02):
        """What `wanted` gives, as soon as it gives anything while the job runs."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if found := wanted():
                return found
            if self.process.poll() is not None:
                break
            time.sleep(pause)
        raise AssertionError(f"did not happen in {seconds} s (exit code {self.process.poll()}):\n{self.stderr()}")

    def wait(self, seconds: float = 180) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            raise AssertionError(f"still running after {seconds} s:\n{self.stderr()}") from None

    def kill(self) -> None:
        """SIGKILL to the driver alone."""
        self.family()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stderr(self) -> str:
        return self.err.read_text(encoding="utf-8", errors="replace")

    def stdout(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace")

    def left_over(self, seconds: float) -> list[str]:
        """Titles of descendants that outlive the driver by more than `seconds`, or of Ray's agents where they alone are left."""
        limit = time.monotonic() + seconds
        while (titles := [t for t in map(_title, self.family()) if t]) and time.monotonic() < limit:
            if all("Agent" in title for title in titles):
                break
            time.sleep(0.1)
        return titles

    def clear(self) -> None:
        """Nothing of it stays: neither processes nor Ray's files."""
        for process in [*self.family(), self.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)
        shutil.rmtree(self.ray, ignore_errors=True)


def rays_folder(folder: Path, kind: str) -> Path:
    """A new folder for Ray's files. A file in `folder` bears its name first, for `forget_rays` to find it however this process ends."""
    name = f"fl-{secrets.token_hex(4)}"
    (folder / f"{name}.{kind}").touch()
    made = Path(SHORT, name)
    made.mkdir(0o700)
    return made


def forget_rays(folder: Path) -> None:
    """Nothing stays of jobs that nobody cleared away: of what they printed into `folder`, which bears their names, and of Ray's files."""
    for left in folder.glob("fl-*"):
        shutil.rmtree(Path(SHORT, left.stem), ignore_errors=True)
        left.unlink()


@contextmanager
def running(folder: Path, *words: object, env: dict[str, str] | None = None) -> Iterator[Job]:
    """`faultline WORDS` while the block runs; whatever is left of it afterwards is killed."""
    job = Job(folder, *words, env=env)
    try:
        yield job
    finally:
        job.clear()


def finished(folder: Path, *words: object, seconds: float = 180, env: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit code, stderr) of `faultline WORDS`."""
    with running(folder, *words, env=env) as job:
        return job.wait(seconds), job.stderr()


def strangers(stderr: str, dataset: str) -> list[str]:
    """Lines of stderr that are not faultline's own."""
    return [line for line in stderr.splitlines() if line.strip() and not line.startswith((*OURS, f"{dataset}: "))]


def ending(stderr: str) -> str:
    """The message that the command ended with."""
    return stderr[stderr.rfind("faultline: ") :] if "faultline: " in stderr else ""


def _hear() -> None:
    """Ctrl-C is heard, also where this process was started in a shell's background, which has it ignored by all below."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
