"""Fixtures that every test may ask for."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("house", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real photographs and trained networks; the test is skipped where there is none."""
    folder = os.environ.get("FAULTLINE_DATA")
    if not folder:
        pytest.skip("FAULTLINE_DATA is not set: no real photographs and trained networks here")
    return Path(folder)
