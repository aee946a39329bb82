"""The boxes of `faultline mask`: which samples have an annotation that can be used, and why the others have none. Nothing is dropped without a word."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.progress import say
from pipeline import boxes
from pipeline.errors import BadRequest, printable
from pipeline.experiment import FACTS, Choice, Named, gathered
from pipeline.manifest import Manifest
from pipeline.samples import Sample
from pipeline.store import Store

NONE = "there is no annotation of it"
FIRST = 8  # samples whose images are looked at for pixels outside a box, before all are


@dataclass(frozen=True)
class Boxes:
    """The annotations below a folder, called by their stems, and the network that looks at the images."""

    folder: Path
    files: dict[str, Path]
    manifest: Manifest

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> Boxes:
        """Raises BadRequest for a folder without annotations."""
        return cls(folder, boxes.find(folder), manifest)

    def outside(self, sample: Sample) -> np.ndarray | str:
        """bool [H, W], the pixels outside the boxes of a sample's class; or why it has none."""
        file = boxes.annotation_of(sample.sample_id, self.files)
        if file is None:
            return NONE
        try:
            return boxes.outside(boxes.read(file), sample.label, self.manifest.classes, self.manifest.preprocessing, sample.pixels.shape[:2], sample.whole)
        except boxes.Unusable as fault:
            return fault.reason

    def survey(self, store: Store, dataset: str, choice: Choice) -> Survey:
        """What the files say before any image is read. Raises BadRequest if none of the chosen samples has a box of its class."""
        usable, unusable, digest = [], Counter(), hashlib.sha256()
        for _, _, batch in store.blocks(dataset, list(FACTS), 65536):
            facts = batch.take(choice.rows(batch))
            for sample_id, label in zip(facts["sample_id"].to_pylist(), facts["label"].to_pylist()):
                file = boxes.annotation_of(sample_id, self.files)
                try:
                    if file is None:
                        raise boxes.Unusable(NONE)
                    annotation = boxes.read(file)
                    digest.update(f"{sample_id}\0{annotation}".encode("utf-8", "surrogateescape"))
                    boxes.of_class(annotation, label, self.manifest.classes)
                    usable.append(sample_id)
                except boxes.Unusable as fault:
                    digest.update(f"{sample_id}\0{fault}".encode("utf-8", "surrogateescape"))
                    unusable[fault.reason] += 1
        if unusable and not usable:
            raise self._nothing(unusable)
        return Survey(tuple(usable), unusable, digest.hexdigest())

    def refuse_covered(self, store: Store, dataset: str, survey: Survey) -> None:
        """Raises BadRequest if the boxes of all samples that have some cover whatever the network sees of them. Reads as few images as will tell."""
        found = Counter(survey.unusable)
        for some in (survey.usable[:FIRST], survey.usable[FIRST:]):
            for samples, _ in gathered(store, dataset, Named(frozenset(some))) if some else ():
                for sample in samples:
                    reason = self.outside(sample)
                    if not isinstance(reason, str):
                        return
                    found[reason] += 1
        if found:
            raise self._nothing(found)

    def _nothing(self, unusable: Counter) -> BadRequest:
        (reason, count), total = unusable.most_common(1)[0], sum(unusable.values())
        most = f"all {total:,}" if count == total else f"{count:,} of {total:,}"
        return BadRequest(f"--boxes: no annotation below {printable(self.folder)} can be used for any of these samples ({most}: {reason}); give the folder of this data set's annotations, or leave --boxes out")


@dataclass(frozen=True)
class Survey:
    """usable: IDs of samples that have a box of their class; unusable: reason -> of how many; digest: of all that was read."""

    usable: tuple[str, ...]
    unusable: Counter
    digest: str


def told(found: dict) -> None:
    """Say how many samples had no box, and why. found: `boxes` of a summary of mask, {"used": N, "unused": {reason: N}}."""
    unused = found["unused"]
    if unused:
        say(f"--boxes: {found['used']:,} of {found['used'] + sum(unused.values()):,} samples have an annotation that can be used; the others not: {'; '.join(f'{reason} ({count:,})' for reason, count in unused.items())}")
