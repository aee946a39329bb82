"""IDs that stand twice in a data set, told while its shards are counted: an ID is the only identity that a sample has.

Of every ID 8 bytes are kept. Where two of those are equal, the shards that hold them are counted once more, and the IDs themselves compared.
"""

from __future__ import annotations

from array import array
from itertools import count

import numpy as np

from pipeline.errors import BadRequest, printable
from pipeline.sources import Shard, Source
from pipeline.sources.tars import key_of


class Ids:
    """Counts shards, in several threads at once, and remembers their IDs."""

    def __init__(self, source: Source):
        self.source = source
        self.hashes: dict[str, array] = {}  # int64, one a sample, by shard

    def census(self, name: str) -> Shard:
        """As the source's."""
        hashes = array("q")
        shard = self.source.census(name, lambda sample_id, _: hashes.append(hash(sample_id)))
        self.hashes[name] = hashes
        return shard

    def refuse_doubles(self) -> None:
        """Raises BadRequest naming an ID that stands twice, and both places, the earlier shard first."""
        every = np.sort(np.concatenate([np.frombuffer(h, np.int64) for h in self.hashes.values() if h] or [np.zeros(0, np.int64)]))
        suspects = set(every[1:][every[1:] == every[:-1]].tolist())
        found: dict[str, tuple[str, int]] = {}  # place, and which sample of its shard
        for name in sorted(self.hashes) if suspects else ():
            if suspects.isdisjoint(self.hashes[name]):
                continue
            doubles: list[tuple[str, str, str]] = []
            positions = count(1)

            def note(sample_id: str, place: str, name: str = name, doubles: list = doubles, positions: count = positions) -> None:
                position = next(positions)
                if hash(sample_id) not in suspects:
                    return
                place = place if name == "." else f"{name} ({place})"
                if sample_id not in found:
                    found[sample_id] = place, position
                    return
                one, first = found[sample_id]
                same = one == place  # a member of that name twice in one archive
                doubles.append((sample_id, f"{one}, sample {first}" if same else one, f"{place}, sample {position}" if same else place))

            self.source.census(name, note)
            if doubles:
                sample_id, one, other = doubles[0]
                raise BadRequest(f"--source: the ID '{printable(sample_id)}' stands twice, in {printable(one)} and in {printable(other)}: {self._remedy(one, other)}")

    def _remedy(self, one: str, other: str) -> str:
        if key_of(one)[0] != key_of(other)[0] or other.startswith(one.partition(")")[0]):
            return "remove or rename one of them, or extract them as data sets of their own"
        if self.source.kind == "webdataset":
            return "the members of a sample must follow each other (tar --sort=name), and no two samples be called the same"
        return "rename one of them (an ID ends at the first dot of a file name)"
