"""The plan: every sample that was asked for, exactly once, whatever is there already; and names that cannot collide."""

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources import Shard
from pipeline.units import Unit, apart, interval_of, plan, shard_stem


def shard(name: str, samples: int, every: int = 16) -> Shard:
    return Shard(name, samples, "", tuple((i, [i, "handle"]) for i in range(0, max(samples, 1), every)))


def covered(units) -> list[tuple[str, int]]:
    return [(unit.shard, i) for unit in units for i in range(unit.start, unit.stop)]


COUNTS = st.lists(st.integers(0, 70), min_size=1, max_size=4)
INTERVALS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(1, 40)), max_size=8)
LIMIT = st.one_of(st.none(), st.integers(0, 300))


@given(counts=COUNTS, intervals=INTERVALS, most=st.integers(1, 33), limit=LIMIT)
def test_plan_is_what_is_asked_less_what_is_there(counts, intervals, most, limit):
    """Exactly once, in order, for any committed intervals (overlapping, beyond the limit, of other shards), in units of at most `most`."""
    names = [f"s{i}.tar" for i in range(len(counts))]
    committed = [Unit("val", f"s{i}.tar", start, start + length).stem for i, start, length in intervals]
    done = {(f"s{i}.tar", position) for i, start, length in intervals for position in range(start, start + length)}
    asked = [(name, i) for name, count in zip(names, counts) for i in range(count)][: limit if limit is not None else None]
    units = plan("val", [shard(name, count) for name, count in zip(names, counts)], committed, most, limit)
    assert covered(units) == [place for place in asked if place not in done]
    assert all(0 < unit.samples <= most and unit.start // most == (unit.stop - 1) // most for unit in units)


@given(counts=COUNTS, limits=st.lists(st.integers(0, 200), max_size=4), most=st.integers(1, 33))
def test_small_tries_first_and_then_everything(counts, limits, most):
    """Any sequence of limits, each run to its end, then no limit: no sample is computed twice and none is left."""
    parts = [shard(f"s{i}.tar", count) for i, count in enumerate(counts)]
    committed, places = [], []
    for limit in [*limits, None]:
        units = plan("val", parts, committed, most, limit)
        committed += [unit.stem for unit in units]
        places += covered(units)
    assert sorted(places) == [(f"s{i}.tar", j) for i, count in enumerate(counts) for j in range(count)]
    assert plan("val", parts, committed, most, None) == []


def test_foreign_files_count_for_nothing():
    assert covered(plan("val", [shard("a.tar", 4)], ["notes", "a-1-2", "a-00000000", "b-00000000-00000004", ""], 16, None)) == [("a.tar", i) for i in range(4)]


def test_unit_cut_by_a_limit_is_not_the_whole_one():
    """Their files have different names, so the one never stands for the other."""
    first, = plan("val", [shard("a.tar", 16)], [], 16, 10)
    whole, = plan("val", [shard("a.tar", 16)], [], 16, None)
    rest, = plan("val", [shard("a.tar", 16)], [first.stem], 16, None)
    assert (first.start, first.stop, rest.start, rest.stop) == (0, 10, 10, 16) and len({first.stem, whole.stem, rest.stem}) == 3


def test_unit_carries_the_marks_it_needs():
    units = plan("val", [shard("a.tar", 40)], [], 24, None)
    assert [[position for position, _ in unit.marks] for unit in units] == [[0, 16], [16, 32]]


@given(start=st.integers(0, 1000), length=st.integers(1, 50))
def test_halves_are_the_whole(start, length):
    """A unit that fails is cut in two until one sample is left, which cannot be cut."""
    unit = Unit("val", "a.tar", start, start + length, shard("a.tar", 1050).marks_for(start, start + length))
    halves = unit.halves()
    if length == 1:
        assert halves == []
    else:
        assert len(halves) == 2 and covered(halves) == covered([unit]) and abs(halves[0].samples - halves[1].samples) <= 1
        assert all((half.dataset, half.marks) == (unit.dataset, unit.marks) for half in halves)


NAMES = st.one_of(
    st.text(st.sampled_from("ab._-=/ 01\n\u202eé"), min_size=1, max_size=12),
    st.text(min_size=1, max_size=200).filter(lambda text: "\0" not in text),
    st.from_regex(r"[a-z]{1,3}-\d{8}-\d{8}", fullmatch=True),
).map(lambda name: f"{name}.tar")


@given(names=st.lists(NAMES, min_size=2, max_size=6, unique=True))
def test_stems_never_collide_and_every_reader_lists_them(names):
    """One file name a shard, short enough for a file system, of plain characters, not beginning with . or _, which readers skip."""
    stems = [shard_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    for stem in stems:
        assert stem[0] not in "._" and len(stem) <= 180 and all(c.isascii() and (c.isalnum() or c in ".=-") for c in stem)


@given(name=NAMES, start=st.integers(0, 10**9), length=st.integers(1, 1024))
def test_file_name_says_shard_and_position(name, start, length):
    unit = Unit("val", name, start, start + length)
    assert interval_of(unit.stem) == (shard_stem(name), start, start + length)


@pytest.mark.parametrize("name", ["val-00000.tar", "train=1/a.b.tar"])
def test_plain_name_is_kept(name):
    """A person finds the shard in the folder; a folder in the path is told from a dash in a name."""
    assert name.removesuffix(".tar").replace("/", "-") in shard_stem(name)
    assert shard_stem("val-00000.tar") == "val-00000" and shard_stem("a/b.tar") != shard_stem("a-b.tar")


def test_folders_and_undecodable_names_have_stems():
    assert shard_stem(".").startswith("shard-") and shard_stem("\udcff.tar") != shard_stem("\udcfe.tar")


@given(name=NAMES, start=st.integers(0, 99), length=st.integers(1, 50), every=st.integers(1, 60))
def test_unit_survives_json(name, start, length, every):
    unit = Unit("val", name, start, start + length, shard(name, 150, every).marks_for(start, start + length))
    assert Unit.from_json(unit.to_json()) == unit
    assert Unit.from_json(unit.to_json(marks=False)) == Unit("val", name, start, start + length) and json.loads(unit.to_json())["shard"] == name


@given(intervals=INTERVALS, most=st.integers(1, 33))
def test_units_that_count_share_no_sample_and_what_is_planned_beside_them_completes_them(intervals, most):
    """Whatever lies there, in whatever order: with the units that are planned then, every sample is there once."""
    units = [Unit("val", f"s{i}.tar", start, start + length) for i, start, length in intervals]
    counted = [unit for unit in units if unit.stem in set(apart(reversed([unit.stem for unit in units])))]
    places = covered({unit.stem: unit for unit in counted}.values())
    assert len(places) == len(set(places))
    shards = [shard(f"s{i}.tar", 120) for i in range(4)]
    rest = covered(plan("val", shards, apart([unit.stem for unit in units]), most, None))
    assert sorted(places + rest) == [(s.name, i) for s in shards for i in range(120)]
    assert apart([unit.stem for unit in counted]) == sorted({unit.stem for unit in counted})


@given(intervals=st.lists(st.tuples(st.just(0), st.integers(0, 12), st.integers(1, 8)), max_size=7))
def test_as_many_samples_count_as_any_choice_of_units_could_give(intervals):
    """Held to every choice there is; so another file never makes fewer count."""
    units = list({Unit("val", "s.tar", start, start + length).stem: Unit("val", "s.tar", start, start + length) for _, start, length in intervals}.values())
    choices = [some for size in range(len(units) + 1) for some in combinations(units, size) if len(set(places := covered(some))) == len(places)]
    best = max((sum(u.samples for u in some), -len(some)) for some in choices)
    got = [unit for unit in units if unit.stem in apart(u.stem for u in units)]
    assert (sum(u.samples for u in got), -len(got)) == best and len(set(covered(got))) == best[0]
