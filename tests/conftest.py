"""Fixtures that every test may ask for."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}.items():  # before torch comes: tests share their cores, and what they start inherits it
    os.environ.setdefault(name, value)
EVERY = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
OWN = {sorted(EVERY)[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(EVERY)]} if EVERY and "PYTEST_XDIST_WORKER" in os.environ else EVERY
if OWN:
    os.sched_setaffinity(0, OWN)  # a team of threads whose cores are shared waits for the slowest of them at every step: a worker computes on a core of its own

# The same examples on every run, so that what passes here passes everywhere; `make fuzz` looks for others.
settings.register_profile("house", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", settings.get_profile("house"), derandomize=False, max_examples=200)
settings.load_profile("house")


PROCESSES = ["test_faults.py", "test_harm.py", "test_cluster.py", "test_chaos.py", "test_memory.py"]  # they start jobs with several processes each, and take longest


def pytest_collection_modifyitems(items) -> None:
    """Files that take longest begin first, in this order."""
    items.sort(key=lambda item: PROCESSES.index(item.path.name) if item.path.name in PROCESSES else len(PROCESSES))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files are shared out whole, but for those that start jobs: one worker does them, one after the other, while the others compute."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "processes" if Path(file).name in PROCESSES else file

    return Files(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """What a test starts has every core where it is made of real processes."""
    if OWN:
        os.sched_setaffinity(0, EVERY if item.get_closest_marker("processes") else OWN)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real photographs and trained networks; the test is skipped where there is none."""
    folder = os.environ.get("FAULTLINE_DATA")
    if not folder:
        pytest.skip("FAULTLINE_DATA is not set: no real photographs and trained networks here")
    return Path(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A finished and indexed run of a tiny network, for reading alone."""
    import tiny

    return tiny.make(tmp_path_factory.mktemp("small"))


@pytest.fixture
def copied(small, tmp_path):
    """The same run, to be changed."""
    import tiny

    shutil.copytree(small.run, tmp_path / "run")
    return tiny.Small(tmp_path / "run", small.sources)
