"""Faults that are planted on purpose: carried out once, by one process, where they say; and nothing at all in normal use."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import failpoints
from pipeline.units import Unit

UNIT = Unit("val", "a.tar", 10, 20)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(failpoints.VARIABLE, str(tmp_path))
    return tmp_path


def plant(folder: Path, **fault) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"point": "profile", "action": "error", "errno": "EIO"} | fault))
    return path


def fires(unit: Unit | None = UNIT, point: str = "profile") -> bool:
    try:
        failpoints.reach(point, unit)
    except OSError:
        return True
    return False


def test_nothing_happens_without_the_variable(folder, monkeypatch):
    plant(folder)
    monkeypatch.delenv(failpoints.VARIABLE)
    assert not fires()


def test_a_fault_is_carried_out_once_or_for_ever(folder):
    plant(folder)
    assert fires() and not fires()
    plant(folder, times=None)
    assert fires() and fires()


@pytest.mark.parametrize(
    "where, here",
    [({"point": "decode"}, False), ({"shard": "a.tar"}, True), ({"shard": "b.tar"}, False), ({"shard": "a.tar", "position": 10}, True), ({"shard": "a.tar", "position": 19}, True), ({"shard": "a.tar", "position": 20}, False), ({"shard": "a.tar", "position": 9}, False)],
)
def test_it_waits_for_its_place(folder, where, here):
    path = plant(folder, **where)
    assert fires() is here and path.exists() is not here


def test_of_many_processes_one_carries_it_out(folder):
    plant(folder)
    code = "from pipeline import failpoints\ntry:\n    failpoints.reach('profile')\nexcept OSError as fault:\n    print(fault.errno)"
    racers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(6)]
    assert sorted(racer.communicate()[0] for racer in racers) == [b""] * 5 + [b"5\n"]


@pytest.mark.parametrize("action, end", [("kill", signal.SIGKILL), ("stop", None)])
def test_a_process_ends_or_stops_there(folder, action, end):
    plant(folder, action=action)
    process = subprocess.Popen([sys.executable, "-c", "from pipeline import failpoints; failpoints.reach('profile'); print('beyond')"], stdout=subprocess.PIPE)
    if end is None:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        process.send_signal(signal.SIGCONT)
    out = process.communicate(timeout=30)[0]
    assert (process.returncode, out) == ((0, b"beyond\n") if end is None else (-end, b""))


def test_a_delay_is_a_delay(folder):
    plant(folder, action="sleep", seconds=0.2)
    start = time.monotonic()
    failpoints.reach("profile")
    assert time.monotonic() - start >= 0.2


def test_what_is_reached_is_traced_where_a_trace_lies(folder):
    failpoints.reach("profile", UNIT)
    (folder / "trace").touch()
    failpoints.reach("profiled", UNIT)
    assert (folder / "trace").read_text() == f"profiled\ta.tar\t10\t20\t{os.getpid()}\n"


def test_every_point_of_the_code_is_listed_and_every_listed_one_is_in_the_code():
    """`reach("x")` as it stands, and `at("x")` and `write_json(..., "x")` as `x.written` and `x.renamed`."""
    root, found = Path(failpoints.__file__).parents[1], set()
    for path in [p for package in ("pipeline", "index", "jobs") for p in (root / package).rglob("*.py")]:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", "")
            texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if name == "reach" and texts and path.name != "atomic.py":
                found.add(texts[0])
            elif name in ("at", "write_json") and texts and path.name != "atomic.py":
                found |= {f"{texts[0]}.written", f"{texts[0]}.renamed"}
    assert found == set(failpoints.POINTS)
