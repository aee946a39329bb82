"""Archives, tables and folders that are whole, and hold what they should not, as a user meets them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import bad_input
import bad_input_archives as table
import bad_input_folders as folders
import bad_input_tables as tables
import pytest
import shards
import tiny


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """A finished run, to which every case would add a data set."""
    return shutil.copytree(small.run, tmp_path_factory.mktemp("bad") / "run")


@dataclass(frozen=True)
class Outcome:
    """What became of a shard of strange samples."""

    ended: tiny.Ended
    rows: dict[str, tuple]
    aside: dict[str, str]


@pytest.fixture(scope="module")
def strange(small, tmp_path_factory) -> Outcome:
    """All samples of the table in one shard, among good ones."""
    folder = tmp_path_factory.mktemp("strange")
    run = shutil.copytree(small.run, folder / "run")
    before = bad_input.digests(run)
    with bad_input.no_hanging(folder):
        ended = tiny.call("extract", "--run", run, "--dataset", "strange", "--source", table.one_shard(folder), "--model", tiny.MODEL)
    assert before.items() <= bad_input.digests(run).items()
    return Outcome(ended, bad_input.rows(run, "strange"), bad_input.aside(run, "strange"))


@pytest.mark.parametrize("sample", table.SAMPLES, ids=lambda sample: sample.id.replace(" ", "-"))
def test_a_strange_sample(strange, sample):
    """Set aside with the reason, safe to print; or profiled, under its own name."""
    if sample.reason:
        assert sample.sample_id not in strange.rows and sample.reason in strange.aside[sample.sample_id]
        assert strange.aside[sample.sample_id].isprintable() and len(strange.aside[sample.sample_id]) < 250
    else:
        assert sample.sample_id in strange.rows and sample.sample_id not in strange.aside


def test_good_samples_among_strange_ones(strange, small, tmp_path):
    """Nothing but what is in the shard, and each as it would be without the others but for its place in the batch; nothing was unpacked."""
    assert strange.ended.code == 3 and not strange.ended.raw and all(c == "\n" or c.isprintable() for c in strange.ended.err)
    assert strange.rows.keys() | strange.aside.keys() == table.GOOD.keys() | {s.sample_id for s in table.SAMPLES}
    run = shutil.copytree(small.run, tmp_path / "run")
    members = [(f"{key}.{end}", content) for key, label in table.GOOD.items() for end, content in (("jpg", shards.photo(500 + int(key[4:]))), ("cls", b"%d" % label))]
    assert tiny.call("extract", "--run", run, "--dataset", "clean", "--source", shards.write_tar(tmp_path / "clean.tar", members), "--model", tiny.MODEL).code == 0
    clean = bad_input.rows(run, "clean")
    assert all(strange.rows[key][:2] == clean[key][:2] for key in table.GOOD)
    assert not Path("/etc/absolute.jpg").exists() and not Path("/tmp/climbing.jpg").exists()


CASES = [*table.TARS, *tables.PARQUET, *tables.ARRAYS, *tables.PICKLES, *folders.FOLDERS, *folders.RELEASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id.replace(" ", "-"))
def test_a_source_of_another_kind_than_its_name_or_layout_says(run, tmp_path, case):
    """Refused, and nothing written; or the bad samples aside alone, by their names, and all others profiled. Nothing that a pickle asks for is called."""
    spec, before = case.make(tmp_path), bad_input.digests(run)
    try:
        with bad_input.no_hanging(tmp_path):
            ended = tiny.call("extract", "--run", run, "--dataset", "bad", "--source", spec, "--model", tiny.MODEL)
        after = bad_input.digests(run)
        assert not (tmp_path / "ran").exists()
        if isinstance(case, table.Refused):
            assert re.search(case.says, bad_input.message(ended, 2), re.DOTALL) and after == before
            return
        got, lost = bad_input.rows(run, "bad"), bad_input.aside(run, "bad")
        assert ended.code == (3 if case.aside else 0) and before.items() <= after.items() and len(got) == case.profiled
        assert lost.keys() == case.aside.keys() and all(reason in lost[sample_id] for sample_id, reason in case.aside.items())
    finally:
        bad_input.forget(run, "bad")
