"""Bad images, as a user meets them: in one data set, of which every sample is a profile or has its reason, in bounded time and memory."""

from __future__ import annotations

import resource
import shutil
from dataclasses import dataclass

import bad_input
import bad_input_images as table
import pytest
import shards
import tiny


@dataclass(frozen=True)
class Outcome:
    """rows, aside: of the data set of bad images; plain: rows of the images that some of them must equal; grown: MiB that the process grew by."""

    ended: tiny.Ended
    rows: dict[str, tuple]
    aside: dict[str, str]
    plain: dict[str, tuple]
    good: dict[str, tuple]
    grown: float


GOOD = 70


def key(picture: table.Picture) -> str:
    return picture.id.replace(" ", "_").replace(".", "_").replace("/", "_")


@pytest.fixture(scope="module")
def outcome(small, tmp_path_factory) -> Outcome:
    """All pictures as .jpg, whatever they are, among good ones; and beside it a data set of the plain ones, each in the same place of its shard and so of its batch."""
    folder = tmp_path_factory.mktemp("images")
    run = shutil.copytree(small.run, folder / "run")
    members: dict[str, list] = {"bad": [], "plain": []}
    for at in range(max(GOOD, len(table.PICTURES))):
        for name in members:
            members[name] += [(f"good{at}.jpg", shards.photo(900 + at)), (f"good{at}.cls", b"1")]
        if at < len(table.PICTURES):
            picture = table.PICTURES[at]
            members["bad"] += [(f"{key(picture)}.jpg", picture.content), (f"{key(picture)}.cls", b"2")]
            members["plain"] += [(f"{key(picture)}.png", picture.same or table.DRAWING), (f"{key(picture)}.cls", b"2")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = {}
    for name, content in members.items():
        with bad_input.no_hanging(folder):
            ended[name] = tiny.call("extract", "--run", run, "--dataset", name, "--source", shards.write_tar(folder / f"{name}.tar", content), "--model", tiny.MODEL)
        if name == "bad":
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert ended["plain"].code == 0, ended["plain"].err
    rows, plain = (bad_input.rows(run, name) for name in ("bad", "plain"))
    good = {name: row for name, row in plain.items() if name.startswith("good")}
    return Outcome(ended["bad"], rows, bad_input.aside(run, "bad"), plain, good, grown)


@pytest.mark.parametrize("picture", table.PICTURES, ids=lambda picture: key(picture))
def test_a_picture(outcome, picture):
    """Set aside with its reason; or profiled as the plain image with the same pixels is, bit for bit."""
    name = key(picture)
    if picture.reason:
        assert name not in outcome.rows and picture.reason in outcome.aside[name]
        assert outcome.aside[name].isprintable() and len(outcome.aside[name]) < 250
    else:
        assert name not in outcome.aside and outcome.rows[name] == outcome.plain[name]


def test_good_images_beside_bad_ones(outcome):
    """All of them, bit for bit; the command says how many were set aside."""
    assert outcome.ended.code == 3 and "set aside" in outcome.ended.err and all(c == "\n" or c.isprintable() for c in outcome.ended.err)
    assert {name: row for name, row in outcome.rows.items() if name.startswith("good")} == outcome.good
    assert len(outcome.rows) + len(outcome.aside) == len(outcome.good) + len(table.PICTURES)


def test_memory_stays_bounded(outcome):
    """Bombs of 400 million and of 4 billion pixels are told by their headers; what is unpacked is at most a picture that is allowed."""
    assert outcome.grown < 700
