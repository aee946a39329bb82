"""Bad sources, as a user meets them: refused by name with the remedy and nothing written, or set aside alone while every neighbour is profiled as ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import bad_input
import bad_input_sources as table
import pytest
import tiny

DATASET = "bad"


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """A finished run, to which every case adds, or would add, a data set."""
    return shutil.copytree(small.run, tmp_path_factory.mktemp("bad") / "run")


def extract(run: Path, spec: Path, *more: object) -> tuple[tiny.Ended, dict[str, str], dict[str, str]]:
    """(how it ended, the run's files before, the run's files after), within bounded time; what a data set left is taken away by `forget`."""
    before = bad_input.digests(run)
    with bad_input.no_hanging(spec.parent):
        ended = tiny.call("extract", "--run", run, "--dataset", DATASET, "--source", spec, "--model", tiny.MODEL, *more)
    return ended, before, bad_input.digests(run)


@pytest.fixture(scope="module")
def clean(run, tmp_path_factory):
    """kind -> the rows of a source of that kind as it should be."""
    known: dict[str, dict[str, tuple]] = {}

    def rows(kind: str) -> dict[str, tuple]:
        if kind not in known:
            ended, _, _ = extract(run, table.KINDS[kind](tmp_path_factory.mktemp("clean")).spec)
            assert ended.code == 0, ended.err
            known[kind] = bad_input.rows(run, DATASET)
            bad_input.forget(run, DATASET)
        return known[kind]

    return rows


@pytest.mark.parametrize("kind, damage", table.DAMAGED, ids=lambda word: word.replace(" ", "-"))
def test_a_damaged_file(run, clean, tmp_path, kind, damage):
    """Every kind of source under every damage to a file of it."""
    good = table.KINDS[kind](tmp_path)
    table.DAMAGES[damage](good.victim)
    outcome = table.becomes(kind, damage)
    whole = clean(kind) if outcome != "refused" else {}
    ended, before, after = extract(run, good.spec)
    if outcome == "refused":
        text = bad_input.message(ended, 2)
        place = good.spec.name if damage in table.NO_FILE and kind not in ("meta.mat", "ground truth") else good.victim.name
        assert place in text and after == before
        return
    try:
        assert ended.code == (3 if outcome == "aside" else 0), ended.err
        got, lost = bad_input.rows(run, DATASET), bad_input.aside(run, DATASET)
        assert before.items() <= after.items()
        if outcome == "profiled":
            assert not lost and got.keys() == whole.keys() and sum(got[i] != whole[i] for i in whole) <= (2 if damage == "zeros inside" else 0)
        else:
            missing = whole.keys() - got.keys()
            shifted = outcome == "passed over" and kind not in table.SHARDS  # what follows has another place in its batch, which may show in the last bit
            assert all(got[i][:2] == whole[i][:2] if shifted else got[i] == whole[i] for i in got)
            assert lost.keys() == (missing if outcome == "aside" else set())
            assert len(missing) == (table.COUNT if kind in table.SHARDS else 1)
    finally:
        bad_input.forget(run, DATASET)


@pytest.mark.parametrize("kind, damage", table.NAMED, ids=lambda word: word.replace(" ", "-"))
def test_what_is_no_file_is_refused_where_it_is_named(run, tmp_path, kind, damage):
    good = table.KINDS[kind](tmp_path)
    table.DAMAGES[damage](good.victim)
    ended, before, after = extract(run, good.victim)
    assert good.victim.name in bad_input.message(ended, 2) and after == before
