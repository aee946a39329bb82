"""The unit of work: at most a few hundred consecutive samples of one shard; the unit of decoding, retry, commit and progress.

A unit's name follows from data set, shard and position alone, so a unit that runs twice overwrites itself, and what is done
is what exists. Planning is a set difference: what is asked for, less the intervals that are committed.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from pipeline.errors import BadRequest, printable
from pipeline.sources import Shard

MOST = 1024  # samples of a unit


@dataclass(frozen=True)
class Unit:
    """Samples [start, stop) of a shard of a data set; `marks` tell the reader where to begin. version: of the shard, as the census has it."""

    dataset: str
    shard: str
    start: int
    stop: int
    marks: tuple[tuple[int, object], ...] = ()
    version: str = ""

    @property
    def samples(self) -> int:
        return self.stop - self.start

    @property
    def stem(self) -> str:
        """The file name of its profiles and rejects, without `.parquet`."""
        return f"{shard_stem(self.shard)}-{self.start:08d}-{self.stop:08d}"

    def halves(self) -> list[Unit]:
        """Two units that cover the same samples; a unit of one sample has none."""
        middle = (self.start + self.stop) // 2
        return [replace(self, start=a, stop=b) for a, b in ((self.start, middle), (middle, self.stop)) if b > a and self.samples > 1]

    def to_json(self, marks: bool = True) -> str:
        return json.dumps(asdict(self) if marks else asdict(self) | {"marks": ()})

    @classmethod
    def from_json(cls, text: str) -> Unit:
        fields = json.loads(text)
        return cls(**fields | {"marks": tuple(map(tuple, fields["marks"]))})


def shard_stem(shard: str) -> str:
    """A shard's path as a file name that every reader lists (no leading `.` or `_`) and that no other shard of a data set has (see `refuse_twins`)."""
    plain = re.sub(r"[^A-Za-z0-9.=-]+", "-", shard.removesuffix(".tar"))[-120:].strip(".-")
    return plain if plain and plain + ".tar" == shard else f"{plain or 'shard'}-{hashlib.sha256(shard.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def refuse_twins(shards: Iterable[str]) -> None:
    """Raises BadRequest for two shards whose units would have the same names: where a name is not plain, eight digits of a digest tell it apart, which are the same by chance for two of four billion."""
    names: dict[str, str] = {}
    for shard in shards:
        if (twin := names.setdefault(shard_stem(shard), shard)) != shard:
            raise BadRequest(f"--source: {printable(twin)} and {printable(shard)} would go by one name in the run ({shard_stem(shard)}): rename one of them")


def interval_of(stem: str) -> tuple[str, int, int] | None:
    """(shard stem, start, stop) of a unit's file name without `.parquet`; None for any other name."""
    match = re.fullmatch(r"(.+)-(\d{8,})-(\d{8,})", stem)
    return (match[1], int(match[2]), int(match[3])) if match else None


def apart(stems: Iterable[str]) -> list[str]:
    """Of the files of units, those that count: so that no sample stands in two of them, and as many samples as can be stand in one; of equal choices the one with the fewest files.

    Units overlap only where a worker that was given up, or whose job died, comes back to life and commits a unit that has been cut differently
    since. Its rows are the same, bit by bit; they are only there twice. A further file never makes fewer samples count.
    """
    shards: dict[str, list[tuple[int, int, str]]] = {}
    for stem in set(stems):
        name, start, stop = interval_of(stem)
        shards.setdefault(name, []).append((stop, start, stem))
    return sorted(stem for units in shards.values() for stem in _most(sorted(units)))


def _most(units: list[tuple[int, int, str]]) -> list[str]:
    """Weighted interval scheduling over one shard. units: (stop, start, stem), sorted."""
    stops = [stop for stop, _, _ in units]
    best: list[tuple[int, int]] = [(0, 0)]  # (samples, - files) of the best choice among the first i units
    before = [bisect_right(stops, start, hi=i) for i, (_, start, _) in enumerate(units)]  # how many of the first end where this one begins, or earlier
    for (stop, start, _), places in zip(units, before):
        samples, files = best[places]
        best.append(max(best[-1], (samples + stop - start, files - 1)))
    chosen, i = [], len(units)
    while i:
        if best[i] == best[i - 1]:
            i -= 1
        else:
            chosen.append(units[i - 1][2])
            i = before[i - 1]
    return chosen


def plan(dataset: str, shards: Iterable[Shard], committed: Iterable[str], most: int, limit: int | None) -> list[Unit]:
    """The units that are still to do, in order: the first `limit` samples of `shards` less the `committed` stems.

    A unit begins at a multiple of `most` or where a committed one ends, so a try with a small `limit` is never computed again.
    """
    done: dict[str, list[tuple[int, int]]] = {}
    for stem in committed:
        if interval := interval_of(stem):
            done.setdefault(interval[0], []).append(interval[1:])
    units, left = [], float("inf") if limit is None else limit
    for shard in shards:
        stop = int(min(shard.samples, left))
        left -= stop
        position = 0
        for a, b in [*sorted(done.get(shard_stem(shard.name), [])), (stop, stop)]:
            while position < min(a, stop):
                end = min(a, stop, (position // most + 1) * most)
                units.append(Unit(dataset, shard.name, position, end, shard.marks_for(position, end), shard.version))
                position = end
            position = max(position, b)
    return units
