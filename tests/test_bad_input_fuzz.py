"""Mutated shards through census and decoding by the command: bytes flipped, cut out, doubled, swapped, in places that hypothesis chooses.

Whatever is in a shard, the command ends in 0, 2, 3 or 4 with a message of one to three lines that has a remedy; every sample that the census counts is in
profiles or rejects exactly once; and samples whose bytes were not touched have the very bits they always have. The budget is fixed, and the same every
time; FAULTLINE_FUZZ=5000 tries so many mutations of each kind, other ones every time (`pytest -n 0 tests/test_bad_input_fuzz.py`).
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import bad_input
import bad_input_sources as sources
import pyarrow.parquet as pq
import pytest
import shards
import tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

MANY = int(os.environ.get("FAULTLINE_FUZZ", 0))
BUDGET = settings(max_examples=MANY or 12, derandomize=not MANY, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Seed:
    """A source of one kind: its victim's bytes, the command's rows of it, and which bytes of the file are which sample's alone."""

    run: Path
    good: sources.Good
    content: bytes
    rows: dict[str, tuple]


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["flip", "zero", "cut", "insert", "double", "swap"]), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(1, 700), st.integers(1, 255)), min_size=1, max_size=3
)


def mutated(content: bytes, mutations: list[tuple[str, float, float, int, int]]) -> bytes:
    """Each: what, where, where else, how many bytes, and with what."""
    for what, share, other, size, value in mutations:
        data = bytearray(content)
        at, elsewhere = int(share * len(data)), int(other * len(data))
        if what == "flip" and data:
            data[at] ^= value
        elif what == "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif what == "cut":
            del data[at : at + (size if value < 200 else len(data))]
        elif what == "insert":
            data[at:at] = bytes([value]) * size
        elif what == "double":
            data[elsewhere:elsewhere] = data[at : at + size]
        else:
            a, b = data[at : at + size], data[elsewhere : elsewhere + size]
            data[elsewhere : elsewhere + size], data[at : at + size] = a, b
        content = bytes(data)
    return content


KINDS = ("tar", "tar.gz", "parquet", "cifar", "npz", "npy images", "npy labels", "meta.mat", "ground truth", "v2 tar", "flat")


@pytest.fixture(scope="module")
def seeds(small, tmp_path_factory) -> dict[str, Seed]:
    run = shutil.copytree(small.run, tmp_path_factory.mktemp("fuzz") / "run")
    made = {}
    for kind in KINDS:
        good = sources.KINDS[kind](tmp_path_factory.mktemp("source"))
        assert extract(run, good.spec).code == 0
        made[kind] = Seed(run, good, good.victim.read_bytes(), bad_input.rows(run, "fuzz"))
        bad_input.forget(run, "fuzz")
    return made


def extract(run: Path, spec: Path, *more: object) -> tiny.Ended:
    with bad_input.no_hanging(spec.parent):
        return tiny.call("extract", "--run", run, "--dataset", "fuzz", "--source", spec, "--model", tiny.MODEL, *more)


def images_of(good: sources.Good, kind: str) -> dict[str, object]:
    """What each sample is made of, as somebody else's reader finds it in the mutated file; nothing where that cannot be told."""
    if kind in ("tar", "v2 tar"):
        found: dict[str, list] = {}
        with tarfile.open(good.victim) as tar:
            for member in tar:
                key = member.name.partition(".")[0].removeprefix("imagenetv2/")
                found.setdefault(key, []).append((member.name, tar.extractfile(member).read() if member.isfile() else b""))
        return {key: members for key, members in found.items()}
    if kind == "parquet":
        return {f"b/{at:06d}": row for at, row in enumerate(pq.read_table(good.victim).to_pylist())}
    return {}


def check(seed: Seed, kind: str, before: dict[str, object]) -> None:
    files = bad_input.digests(seed.run)
    try:
        ended = extract(seed.run, seed.good.spec, "--force")
        after = bad_input.digests(seed.run)
        assert files.items() <= after.items()
        if ended.code in (2, 4):
            bad_input.message(ended, 2, 4)
            assert ended.code == 4 or after == files
            return
        assert ended.code in (0, 3) and "Traceback" not in ended.err, ended.err
        rows, aside = bad_input.rows(seed.run, "fuzz"), bad_input.aside(seed.run, "fuzz")
        assert not rows.keys() & aside.keys()
        status = tiny.call("status", "--run", seed.run, "--format", "json").json["datasets"]["fuzz"]
        assert (status["samples"], status["pending"]) == (len(rows) + len(aside), 0)
        now = images_of(seed.good, kind)
        same_places = list(now) == list(before)
        for sample_id in seed.rows.keys() & now.keys():
            if now[sample_id] == before.get(sample_id) and same_places:
                assert rows[sample_id] == seed.rows[sample_id], f"{sample_id} was not touched, and has other numbers"
    finally:
        bad_input.forget(seed.run, "fuzz")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replace(" ", "-"))
def test_a_mutated_file(seeds, kind):
    """Flips, zeros, cuts, insertions, doublings and swaps anywhere in the file, headers and footers among them."""
    seed = seeds[kind]
    before = images_of(seed.good, kind)

    @BUDGET
    @given(MUTATIONS)
    def mutate(mutations):
        seed.good.victim.write_bytes(mutated(seed.content, mutations))
        try:
            check(seed, kind, before)
        finally:
            seed.good.victim.write_bytes(seed.content)

    mutate()


MEMBERS = st.lists(st.tuples(st.sampled_from(["swap", "drop", "double", "rename", "bytes", "kind"]), st.integers(0, 19), st.integers(0, 19), st.integers(0, 255)), min_size=1, max_size=4)


def test_mutated_members_of_a_tar(seeds):
    """A tar that is whole, whose members are swapped, dropped, doubled, renamed, damaged, or turned into links: samples that are as they were are profiled as they were."""
    seed = seeds["tar"]
    with tarfile.open(fileobj=io.BytesIO(seed.content)) as tar:
        whole = [(member.name, tar.extractfile(member).read()) for member in tar]
    keys = [name.partition(".")[0] for name, _ in whole[::2]]

    @BUDGET
    @given(MEMBERS)
    def mutate(mutations):
        members: list = list(whole)
        for what, at, other, value in mutations:
            at, other = at % len(members), other % len(members)
            name, content = members[at]
            if what == "swap":
                members[at], members[other] = members[other], members[at]
            elif what == "drop" and len(members) > 1:
                del members[at]
            elif what == "double":
                members.insert(other, members[at])
            elif what == "rename":
                members[at] = (f"{name}.{value}" if value % 2 else f"x{value}/{name}" if isinstance(name, str) else name), content
            elif what == "bytes":
                members[at] = name, mutated(content, [("flip", value / 256, 0.0, 1, 255)])
            elif isinstance(name, str):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"
                members[at] = info, b""
        shards.write_tar(seed.good.victim, members)
        files = bad_input.digests(seed.run)
        try:
            ended = extract(seed.run, seed.good.spec, "--force")
            if ended.code == 2:
                bad_input.message(ended, 2)
                assert bad_input.digests(seed.run) == files
                return
            rows, aside = bad_input.rows(seed.run, "fuzz"), bad_input.aside(seed.run, "fuzz")
            assert ended.code in (0, 3) and not rows.keys() & aside.keys()
            order = [name.partition(".")[0] for name, _ in members if isinstance(name, str)]
            if list(dict.fromkeys(order)) == keys:  # every sample has its place
                for at, key in enumerate(keys):
                    if [m for m in members if isinstance(m[0], str) and m[0].partition(".")[0] == key] == whole[2 * at : 2 * at + 2]:
                        assert rows[key] == seed.rows[key]
        finally:
            bad_input.forget(seed.run, "fuzz")
            seed.good.victim.write_bytes(seed.content)

    mutate()
