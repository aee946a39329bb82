"""Fixtures that every test may ask for."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}.items():  # before torch comes: tests share their cores, and what they start inherits it
    os.environ.setdefault(name, value)

if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # as in many containers: each of hundreds of processes would compile torch and all else anew, 3 seconds each
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")

# The same examples on every run, so that what passes here passes everywhere; `make fuzz` looks for others.
settings.register_profile("house", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", settings.get_profile("house"), derandomize=False, max_examples=200)
settings.load_profile("house")


LONGEST = ["test_faults.py", "test_harm.py", "test_cluster.py", "test_chaos.py", "test_memory.py"]  # they wait for processes more than they compute


def pytest_collection_modifyitems(items) -> None:
    """Files that take longest begin first: files are shared out whole, in this order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
