"""What every case of bad input is held to, whatever it is: the message, the samples beside it, what was there before, and time.

The cases are tables: `bad_input_sources.py`, `bad_input_images.py`, `bad_input_files.py` (weights and statistics) and `bad_input_runs.py` (a run's own
files). Each is given to the command, called in this process on a tiny network.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiny

PATIENCE = 20.0  # seconds after which a command counts as hanging
REMEDY = re.compile(
    r"(: |; |, or |\) |\n)(and )?(add|append|ask|begin|build|choose|copy|extract|fetch|give|index|leave|make|merely|move|name|pack|put|remove|rename|repack|restore|run|save|say|transpose|unpack|write|use|rerun|wait|free)\b"
    r"|--force goes on|the same command resumes|what is( read here)?: |are needed|is needed|want their channel|give the same command|transpose\(|they are|must follow each other|: tar xf|; it has: | is not one of "
)


def message(ended: tiny.Ended, *codes: int) -> str:
    """What a command that did not do what was asked said: one to three lines, a remedy among them, nothing on stdout, safe to print."""
    lines = ended.err.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("faultline: ")), None)
    assert ended.code in codes and begin is not None, (ended.code, ended.err)
    text = "\n".join(lines[begin:])
    assert not ended.raw and len(lines) - begin <= 3, text
    assert "Traceback" not in ended.err and "a defect of faultline" not in text and " object at 0x" not in text
    assert all(c == "\n" or c.isprintable() for c in ended.err), ended.err
    assert not re.search(r"(?<!\w)(None|nan|\[\]|\(\)|'')(?!\w)", text.replace("(NaN", "")), text
    assert REMEDY.search(text), f"no remedy: {text}"
    return text


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too: path -> digest of what it holds."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(run: Path, dataset: str) -> dict[str, tuple]:
    """Every profile, each once: sample_id -> (label, prediction, the bits of its loss and vector)."""
    table = pq.read_table(run / "profiles" / dataset)
    found = {}
    for row in table.to_pylist():
        assert row["sample_id"] not in found, f"{row['sample_id']} stands twice"
        found[row["sample_id"]] = row["label"], row["prediction"], np.float32(row["loss"]).tobytes(), np.array(row["saliency"], np.float32).tobytes()
    return found


def aside(run: Path, dataset: str) -> dict[str, str]:
    """Every sample that was set aside, each once: sample_id -> reason."""
    table = pq.read_table(run / "rejects" / dataset)
    ids = table["sample_id"].to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, table["reason"].to_pylist()))


@contextmanager
def no_hanging(folder: Path):
    """Fails if what runs inside takes longer than PATIENCE. A pipe below `folder` on which it waits is opened and closed then, so that it ends."""

    def wake() -> None:
        for path in folder.rglob("*"):
            with suppress(OSError):
                if stat.S_ISFIFO(os.stat(path).st_mode):
                    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    def stop(*_: object) -> None:
        wake()
        raise AssertionError("it hung")

    start, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < PATIENCE, "it hung"


def forget(run: Path, dataset: str) -> None:
    """Take a data set away again."""
    for folder in ("profiles", "rejects"):
        shutil.rmtree(run / folder / dataset, ignore_errors=True)
    for file in (f"{dataset}.json", f".{dataset}.lock"):
        (run / "datasets" / file).unlink(missing_ok=True)
