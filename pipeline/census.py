"""What a data set of a run is made of, as it was counted: `datasets/<dataset>.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pipeline.sources import Shard

PLACE = ("spec", "root")  # where the source lies, which whoever moves it may change


@dataclass(frozen=True)
class Census:
    """What a data set of a run is made of: the source, every shard that was ever asked for, and how much the last request
    asks for: the first `asked_shards` of them, the first `limit` samples of those (None: all)."""

    spec: str
    kind: str
    root: str
    shards: tuple[Shard, ...]
    limit: int | None
    asked_shards: int | None = None

    @property
    def asked(self) -> tuple[Shard, ...]:
        return self.shards[: self.asked_shards]

    @property
    def samples(self) -> int:
        """Samples asked for."""
        total = sum(shard.samples for shard in self.asked)
        return total if self.limit is None else min(self.limit, total)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> Census:
        shards = tuple(Shard(**s | {"marks": tuple(map(tuple, s["marks"]))}) for s in fields["shards"])
        return cls(**fields | {"shards": shards})
