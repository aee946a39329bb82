"""A run as a notebook sees it: its data sets, profiles and statistics, and neighbours by image ID."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from difflib import SequenceMatcher
from os.path import commonprefix
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import BadRequest, printable
from pipeline.manifest import Manifest
from pipeline.statistics import Reference
from pipeline.store import Progress, Store, read_table, saliency_of

NEIGHBOURS = pa.schema(
    [("rank", pa.int32()), ("sample_id", pa.string()), ("dataset", pa.string()), ("similarity", pa.float32()), ("label", pa.int32()), ("prediction", pa.int32()),
     ("label_name", pa.string()), ("prediction_name", pa.string()), ("confidence", pa.float32()), ("pair", pa.string())]
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a sample's profile lies: the row `position` of `file`."""

    dataset: str
    sample_id: str
    file: Path
    position: int


class Run:
    """A run directory, opened for reading. Files are looked at when asked for, so it may be open while a job writes."""

    def __init__(self, store: Store, manifest: Manifest):
        self.store, self.manifest = store, manifest
        self._indexes: dict[str | None, object] = {}

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Raises BadRequest if there is no run at `path`."""
        store = Store(path)
        return cls(store, store.manifest())

    @property
    def datasets(self) -> list[str]:
        return self.store.datasets()

    @property
    def layers(self) -> list[tuple[str, int]]:
        """(module name, filters) in vector order."""
        return list(self.manifest.layers.layers)

    def status(self) -> dict[str, Progress]:
        """Per data set: samples, done, pending, rejected, images_per_s."""
        return {dataset: self.store.progress(dataset) for dataset in self.datasets}

    def profiles(self, dataset: str):
        """The profiles of a data set as a pyarrow dataset: filter and project before `to_table()`, it may be larger than memory."""
        return self.store.profiles(dataset)

    def statistics(self, name: str) -> pa.Table:
        """layer, filter, mean, std, count; one row a filter. Raises BadRequest if there are none under that name."""
        path = self.store.run / "statistics" / f"{name}.parquet"
        if not path.exists():
            raise BadRequest(f"there are no statistics '{printable(name)}' in {printable(self.store.run)}: faultline index makes those of its --reference")
        return read_table(path)

    def index(self, name: str | None = None):
        """The index of that name (see `index.search.Index`); stays open. Raises BadRequest if it is absent or stale."""
        from index.search import Index

        if name not in self._indexes or not self._indexes[name].is_current(self.store):
            self._indexes[name] = Index(self.store, name)
        return self._indexes[name]

    def neighbors(self, sample: str, k: int = 10, within: str | None = None, layers: str | None = None, name: str | None = None) -> pa.Table:
        """The k samples whose filters failed most alike, best first; never the sample itself.

        sample: `sample_id` or `dataset:sample_id`, correctly classified ones too; within: a data set; layers: `FIRST..LAST`, both included.
        Columns: rank (from 1), sample_id, dataset, similarity (cosine of ŝ), label, prediction, label_name, prediction_name, confidence (of the
        prediction), pair (`same`, `reverse` or `other`: the neighbour's (label, prediction) against the sample's). Raises BadRequest.
        """
        if k < 1:
            raise BadRequest(f"-k: {k} neighbours cannot be given; ask for 1 or more")
        index, place = self.index(name), self.find(sample)
        columns = self.manifest.layers.columns(layers) if layers else None
        own = np.array([index.row_of(place.dataset, place.sample_id)])
        similarity, rows = index.search(self.standardised(place, index.about["reference"]), k, within, columns, own)
        facts = self.record(place, ["label", "prediction"])
        return self.table_of(index, similarity[0], rows[0], facts["label"], facts["prediction"])

    def table_of(self, index, similarity: np.ndarray, rows: np.ndarray, label: int, prediction: int) -> pa.Table:
        """Search results [k] of one sample with that label and prediction, as `NEIGHBOURS`."""
        hits = index.rows.take(rows)
        labels, predictions = hits["label"].to_numpy(), hits["prediction"].to_numpy()
        pair = pair_of(labels, predictions, label, prediction)
        names = [pa.array([self.manifest.name_of(c) for c in column.tolist()], pa.string()) for column in (labels, predictions)]
        rank = pa.array(range(1, len(rows) + 1), pa.int32())
        return pa.table([rank, hits["sample_id"], hits["dataset"], pa.array(similarity, pa.float32()), hits["label"], hits["prediction"], *names, hits["prediction_confidence"], pa.array(pair, pa.string())], schema=NEIGHBOURS)

    def standardised(self, place: Place, reference: str) -> np.ndarray:
        """ŝ float32 [1, F] of one sample."""
        standard = Reference.read(self.store.run / "statistics" / f"{reference}.parquet", self.manifest.layers)
        return standard.standardise(saliency_of(self._read(place, ["saliency"])))

    def record(self, place: Place, columns: list[str]) -> dict:
        """Columns of one sample's profile as Python values."""
        return self._read(place, columns).to_pylist()[0]

    def _read(self, place: Place, columns: list[str]) -> pa.Table:
        return read_table(place.file, columns=columns).slice(place.position, 1)

    def find(self, sample: str) -> Place:
        """Where `sample_id` or `dataset:sample_id` lies. Raises BadRequest, with the closest IDs, if it is in no data set, or in two."""
        sample = sample.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # as IDs are kept whose bytes are no text
        dataset, colon, rest = sample.partition(":")
        explicit = [(dataset, rest)] if colon and dataset in self.datasets else []
        if explicit and (place := self._scan(dataset, rest)):
            return place  # so that every sample can be named, whatever colons are in the IDs
        candidates = [(d, sample) for d in self.datasets] + explicit
        places = [place for d, sample_id in candidates if (place := self._scan(d, sample_id))]
        if len(places) == 1:
            return places[0]
        if places:
            choices = " or ".join(f"{printable(p.dataset)}:{printable(p.sample_id)}" for p in places[:3])
            raise BadRequest(f"the ID '{printable(sample)}' is in more than one data set: write {choices}")
        for d, sample_id in candidates:
            aside = self.store.rejects(d)
            reasons = aside.filter(pc.equal(aside["sample_id"], sample_id))["reason"].to_pylist()
            if reasons:
                raise BadRequest(f"'{printable(sample)}' was set aside when {printable(d)} was extracted: {printable(reasons[0])}")
        named = explicit or candidates
        near = [f"{d}:{i}" for d, sample_id in named for i in self._close(d, sample_id)]
        raise BadRequest(f"there is no sample '{printable(sample)}' in this run; close to it: {', '.join(map(printable, near)) or 'none, it has no samples'}")

    def indexed(self, dataset: str, sample_id: str, name: str | None = None) -> Place:
        """Where the profile of a sample of an index lies, from the index alone. Raises KeyError for one that is not indexed."""
        index = self.index(name)
        row = index.row_of(dataset, sample_id)
        if row < 0:
            raise KeyError(f"{dataset}:{sample_id}")
        facts = index.rows.slice(row, 1).select(["profile", "position"]).to_pylist()[0]
        return Place(dataset, sample_id, self.store.run / "profiles" / dataset / facts["profile"], facts["position"])

    def _scan(self, dataset: str, sample_id: str) -> Place | None:
        for file in self.store.files(dataset):
            position = pc.index(read_table(file, columns=["sample_id"])["sample_id"], sample_id).as_py()
            if position >= 0:
                return Place(dataset, sample_id, file, position)
        return None

    def _close(self, dataset: str, sample_id: str, window: int = 50) -> list[str]:
        """The two most similar IDs of a data set, misclassified ones first among equals: they are what is asked for most.

        Only a few dozen that begin or end alike are compared, so this is quick in a data set of any size.
        """
        wrong: dict[str, bool] = {}
        for _, _, batch in self.store.blocks(dataset, ["sample_id", "label", "prediction"], 65536):
            wrong.update(zip(batch["sample_id"].to_pylist(), (batch["label"].to_numpy() != batch["prediction"].to_numpy()).tolist()))
        near = set()
        for turn in (lambda s: s, lambda s: s[::-1]):
            ordered = sorted(map(turn, wrong))
            at = bisect_left(ordered, turn(sample_id))
            near.update(map(turn, ordered[max(0, at - window) : at + window]))
        likeness = {i: (SequenceMatcher(None, i, sample_id).ratio(), len(commonprefix([i, sample_id])), wrong[i]) for i in near}
        return sorted(sorted(near), key=likeness.get, reverse=True)[:2]


def pair_of(labels: np.ndarray, predictions: np.ndarray, label: int, prediction: int) -> np.ndarray:
    """`same` where (label, prediction) are the sample's, `reverse` where they are swapped, `other` elsewhere."""
    same = (labels == label) & (predictions == prediction)
    reverse = (labels == prediction) & (predictions == label)
    return np.where(same, "same", np.where(reverse, "reverse", "other"))
