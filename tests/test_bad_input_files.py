"""Bad weights and bad statistics, as a user meets them: refused by name with the remedy, nothing written, and nothing that a pickle asks for called."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import bad_input
import bad_input_files as table
import pytest
import tiny


@pytest.mark.parametrize("case", table.WEIGHTS, ids=lambda case: case.id.replace(" ", "-"))
def test_bad_weights(small, tmp_path, case):
    file, run = tmp_path / case.name, tmp_path / "run"
    case.make(file)
    with bad_input.no_hanging(tmp_path):
        ended = tiny.call("extract", "--run", run, "--dataset", "val", "--source", small.sources / "v2", "--model", tiny.MODEL, "--weights", file)
    assert re.search(case.says.replace("{name}", case.name), bad_input.message(ended, 2)) and not run.exists() and not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """A finished run, into which every case would import."""
    return shutil.copytree(small.run, tmp_path_factory.mktemp("bad") / "run")


@pytest.mark.parametrize("case", table.STATISTICS, ids=lambda case: case.id.replace(" ", "-"))
def test_bad_statistics(run, tmp_path, case):
    file, before = tmp_path / case.name, bad_input.digests(run)
    case.make(file)
    options = dict(zip(case.options[::2], case.options[1::2]))
    words = [word for pair in ({"--name": "published", "--aggregation": "abs"} | options).items() for word in pair]
    with bad_input.no_hanging(tmp_path):
        ended = tiny.call("statistics", "import", file, "--run", run, *words)
    assert re.search(case.says, bad_input.message(ended, 2)) and bad_input.digests(run) == before and not (tmp_path / "ran").exists()
