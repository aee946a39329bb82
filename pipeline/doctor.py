"""Before hours are spent: does the network know these images by these labels, and if not, which of the usual mistakes explains it?

A few samples spread over a data set are classified. Where that goes worse than it should, each mistake that people make with labels and
pixels is undone in turn; one is believed only if undoing it makes the network right on clearly more of the same images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pipeline.errors import Broken, is_device, printable, said
from pipeline.intervals import Interval, wilson
from pipeline.samples import PRESETS, Preprocessing, Sample, decode
from pipeline.sources import Shard, Source
from pipeline.wnids import IDS, LABEL, wnid_in

SURE = 1e-3  # p under which a mistake is believed to be there: about ten things are tried
GAIN = 0.03  # and what undoing it must gain in top-1 at least
PLAUSIBLE = 0.75  # and of the promise, or of the network's own mean confidence where nobody promises, what top-1 must then come up to
KINDS = 5  # and labels that must have been seen, or all: an error that leans to one class is no mistake of the source
CHANCE = 0.01  # p above which a network is no better than chance
FEW = 24  # samples below which nothing is said about top-1
HOLDOUT = "the method needs images held out from training, where errors mean something"
_TRAINING = re.compile(r"(?:.*/)?n\d{8}_\d+$")  # n01440764_10026; validation images are called otherwise


@dataclass(frozen=True)
class Look:
    """What was seen of a data set. `samples` could be decoded and have the source's label, even one that the network does not have;
    `folders`: the class folder of each, or ""; `reasons`: why others could not be."""

    samples: list[Sample]
    folders: list[str]
    reasons: list[str]

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], as the source has them."""
        return np.array([s.label for s in self.samples], np.int64)

    @property
    def order(self) -> np.ndarray:
        """int64 [N]: what ImageNet-1k calls the WordNet ID that a sample's folder or ID carries; -1 where there is none."""
        return np.array([LABEL.get(wnid_in(folder, s.sample_id) or "", -1) for folder, s in zip(self.folders, self.samples)], np.int64)


def look(source: Source, shards: Iterable[Shard], wanted: int, preprocessing: Preprocessing) -> Look:
    """About `wanted` samples spread over `shards`. Raises OSError or BadRequest as the reader does."""
    shards = [s for s in shards if s.samples]
    if len(shards) > wanted:
        shards = [shards[i * len(shards) // wanted] for i in range(wanted)]
    seen = Look([], [], [])
    for i, shard in enumerate(shards):
        for raw in source.pick(shard, wanted * (i + 1) // len(shards) - wanted * i // len(shards)):
            sample = decode(replace(raw, label=0), preprocessing, 1)
            if sample.reason:
                seen.reasons.append(sample.reason)
            else:
                seen.samples.append(replace(sample, label=raw.label if abs(raw.label) < 2**31 else -1))  # no network has such a class either way
                seen.folders.append(raw.folder)
    return seen


@dataclass(frozen=True)
class Mistake:
    """One of the usual mistakes. `text`: what it is; `remedy`: what to do; `labels` int64 [N] or (preprocessing, colours reversed): what undoes it."""

    name: str
    text: str
    remedy: str
    labels: np.ndarray | None = None
    preprocessing: Preprocessing | None = None
    reverse: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What was found. `correct` of `seen` samples, `low` to `high` the 95% interval of top-1 (Wilson); `promised`: what the weights promise, or None.

    `order`: whether labels follow the WordNet IDs that the source carries, None where it carries none. `faults`: why a run would be
    garbage; `doubts`: why it may be; `warnings`: what else should be known. `mistake`: the one that explains it, and `undone` its top-1.
    """

    seen: int
    correct: int
    low: float
    high: float
    promised: float | None
    confidence: float
    loss: float
    order: bool | None
    mistake: Mistake | None = None
    undone: float | None = None
    faults: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def puzzling(self) -> bool:
        """Whether it goes worse than it should, and nothing explains it: more samples may."""
        worse = self.promised is not None and self.high < self.promised
        return self.mistake is None and self.seen >= FEW and bool(self.doubts or self.faults or worse)

    @property
    def top1(self) -> float:
        return self.correct / self.seen if self.seen else 0.0


def examine(network: torch.nn.Module, preprocessing: Preprocessing, seen: Look, classes: int, promised: float | None, devkit: dict[int, str] | None = None, device: str = "cpu", batch: int = 8, tell: Callable[[str], None] = lambda text: None) -> Diagnosis:
    """What top-1 on the samples of a look says about labels and preprocessing.

    network: eval mode, on `device`; classes: C; promised: top-1 that the weights are known for, 0..1; devkit: ILSVRC2012_ID -> WordNet ID.
    Mistakes in the pixels, which cost a forward each, are looked for where top-1 is below the promise, or where there is none; `tell` hears of each.
    """
    def logits(recipe: Preprocessing = preprocessing, reverse: bool = False) -> tuple[torch.Tensor, dict[int, str]]:
        return _classify(network, recipe, [s.pixels for s in seen.samples], reverse, device, batch)

    seen, as_is = _answered(seen, *logits())
    labels, order = seen.labels, seen.order if classes == len(IDS) else np.full(len(seen.samples), -1)
    right = as_is.argmax(1).numpy() == labels
    bounds = wilson(int(right.sum()), len(right)) if len(right) else Interval(0.0, 0.0, 1.0, 0)
    inside = (labels >= 0) & (labels < classes)
    losses = torch.nn.functional.cross_entropy(as_is[inside], torch.from_numpy(labels[inside]), reduction="none") if inside.any() else torch.zeros(1)
    known = order >= 0
    found = Diagnosis(
        len(right), int(right.sum()), bounds.low, bounds.high, promised, float(as_is.softmax(1).amax(1).mean()) if len(right) else 0.0, float(losses.median()),
        bool((order[known] == labels[known]).all()) if known.any() else None,
    )  # fmt: skip
    _look_at_samples(found, seen, labels, classes)
    silent = _silence(seen, as_is)
    if len(right) < FEW:
        found.faults.extend(silent)
        found.warnings.append(f"only {len(right)} samples could be looked at: nothing is said about top-1")
        return found
    if len(set(labels.tolist())) >= min(KINDS, classes):
        found = _explained(found, right, ((m, as_is.argmax(1).numpy() == m.labels, found.confidence) for m in label_mistakes(labels, order, classes, devkit)))
        if not found.mistake and (promised is None or bounds.high < promised):
            tried = []
            for mistake in pixel_mistakes(preprocessing):
                tell(f"trying: {mistake.text}")
                answer, failures = logits(mistake.preprocessing, mistake.reverse)
                if not failures:  # what a network refuses is not what it wants
                    tried.append((mistake, answer.argmax(1).numpy() == labels, float(answer.softmax(1).amax(1).mean())))
            found = _explained(found, right, tried)
    if silent and not found.mistake:
        found.faults.extend(silent)
        return found
    _judge(found, right, as_is, classes, "; labels in the devkit's order were not tried, for want of the devkit (faultline check --devkit tries them)" if classes == len(IDS) and not devkit else "")
    return found


def label_mistakes(labels: np.ndarray, order: np.ndarray, classes: int, devkit: dict[int, str] | None) -> list[Mistake]:
    """Ways in which labels int64 [N] may be wrong, each with the labels that would then be right (-1: it says nothing about this sample)."""
    as_text = np.array(sorted(range(classes), key=str), np.int64)  # rank among names sorted as text -> the number that the name is
    mistakes = [
        Mistake("off by one", "the labels are one too high: they count from 1", "write labels that count from 0", labels - 1),
        Mistake("off by one", "the labels are one too low for this network, whose classes begin with one more (a background class?)", "write labels as the network counts them", labels + 1),
        Mistake("string-sorted folders", "the labels are the ranks of numbered folders sorted as text (0, 1, 10, 100, ...)", "the number of a folder is the label: give the folders themselves as --source, or write the number", _mapped(labels, as_text)),
    ]
    if devkit and classes == len(IDS):
        table = np.array([LABEL.get(devkit.get(i, ""), -1) for i in range(max(devkit) + 2)], np.int64)
        text, remedy = "the labels are the devkit's ILSVRC2012_IDs, whose order is its own", "map them through the devkit's meta.mat, or give the flat folder of images with the devkit beside it"
        mistakes += [Mistake("devkit order", text, remedy, _mapped(labels, table)), Mistake("devkit order", f"{text}, less 1", remedy, _mapped(labels + 1, table))]
    if (order >= 0).any():
        remedy = "the label is the rank among all 1,000 (with class folders: add the missing ones, empty, and take away what is no class)"
        mistakes.append(Mistake("WordNet IDs", "the labels are not the ranks of the WordNet IDs that the source itself carries", remedy, order))
    return [m for m in mistakes if (m.labels != labels).any()]


def pixel_mistakes(preprocessing: Preprocessing) -> list[Mistake]:
    """Ways in which pixels may have been prepared otherwise than in training, each with the recipe that would then be right."""
    reverse = Mistake("RGB/BGR", "red and blue are the wrong way round (images that OpenCV read, or a network that wants BGR)", "write the images as RGB; a network that wants BGR flips them in its forward", preprocessing=preprocessing, reverse=True)
    usual = PRESETS["imagenet"]
    recipes = {
        "missing normalisation": [("the network wants images normalised as on ImageNet", usual.mean, usual.std), ("the network wants images normalised to -1..1", (0.5,) * 3, (0.5,) * 3), ("the network wants pixels of 0..255", (0.0,) * 3, (1 / 255,) * 3)],
        "normalised twice": [("the network wants images of 0..1, not normalised (it does that itself?)", (0.0,) * 3, (1.0,) * 3)],
    }
    found = [reverse]
    for name, ways in recipes.items():
        for text, mean, std in ways:
            if (mean, std) != (preprocessing.mean, preprocessing.std):
                option = "/".join(f"{v:.6g}" for v in mean), "/".join(f"{v:.6g}" for v in std)
                found.append(Mistake(name, text, f"add --preprocess mean={option[0]},std={option[1]}", preprocessing=replace(preprocessing, mean=mean, std=std)))
    return found


def _mapped(labels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table[label]`, -1 where it has none."""
    inside = (labels >= 0) & (labels < len(table))
    return np.where(inside, table[np.where(inside, labels, 0)], -1)


def _classify(network: torch.nn.Module, preprocessing: Preprocessing, pixels: list[np.ndarray], reverse: bool, device: str, batch: int) -> tuple[torch.Tensor, dict[int, str]]:
    """Logits float32 [N, C] on the CPU, NaN for an image that the network raises on, and what it raised; images of one shape share a batch. `reverse`: blue, green, red."""
    rows: dict[int, torch.Tensor] = {}
    failures: dict[int, str] = {}
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(pixels):
        shapes.setdefault(image.shape, []).append(i)
    waiting = [alike[i : i + batch] for alike in shapes.values() for i in range(0, len(alike), batch)]
    with torch.inference_mode():
        while waiting:
            at = waiting.pop()
            images = torch.from_numpy(np.stack([pixels[i] for i in at])).to(device)
            try:
                rows.update(zip(at, network(preprocessing.normalise(images.flip(-1) if reverse else images)).float().cpu()))
            except KeyboardInterrupt:
                raise
            except BaseException as fault:  # whatever a network raises
                if is_device(fault):
                    raise Broken.by(fault) from None
                if len(at) > 1:
                    waiting.extend([i] for i in at)  # because of one of them
                else:
                    failures[at[0]] = f"the network fails on it: {said(fault)}"
    nothing = torch.full_like(next(iter(rows.values())), torch.nan) if rows else torch.full((2,), torch.nan)
    return torch.stack([rows.get(i, nothing) for i in range(len(pixels))]) if pixels else torch.zeros(0, 2), failures


def _answered(seen: Look, logits: torch.Tensor, failures: dict[int, str]) -> tuple[Look, torch.Tensor]:
    """Without the samples that the network raises on, or to which its answer is not finite; their reasons say so, as they will when they are set aside."""
    finite = logits.isfinite().all(1)
    keep = finite.nonzero().flatten().tolist()
    reasons = [failures.get(i, "the network's output for it is not finite") for i in (~finite).nonzero().flatten().tolist()]
    return Look([seen.samples[i] for i in keep], [seen.folders[i] for i in keep], [*seen.reasons, *reasons]), logits[finite]


def _look_at_samples(found: Diagnosis, seen: Look, labels: np.ndarray, classes: int) -> None:
    """Faults and doubts that need no network."""
    every = len(labels) + len(seen.reasons)
    if seen.reasons:
        reason, times = Counter(seen.reasons).most_common(1)[0]
        text = f"{len(seen.reasons)} of {every} samples would be set aside, {times} of them because: {printable(reason)}"
        (found.faults if 2 * len(seen.reasons) > every else found.warnings).append(text)
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        text = f"the label of {len(outside)} of {len(labels)} samples is outside the network's classes 0..{classes - 1} (for example {outside[0]}): they would be set aside"
        (found.faults if 2 * len(outside) > len(labels) else found.warnings).append(text)
    if len(labels) >= FEW and len(set(labels.tolist())) == 1:
        found.warnings.append(f"all {len(labels)} samples have the label {labels[0]}: is the source one class of the data set?")
    if len(labels) and np.mean([_TRAINING.match(s.sample_id) is not None for s in seen.samples]) > 0.5:
        found.warnings.append(f"the images are called as those of ImageNet's training set ({printable(seen.samples[0].sample_id)}): {HOLDOUT}")


def _silence(seen: Look, logits: torch.Tensor) -> list[str]:
    """A fault, if different images are all given the very same logits, as where all weights are 0: nothing of them reaches the output."""
    first = next(iter(seen.samples), None)
    if first is None or (logits != logits[0]).any() or all(np.array_equal(s.pixels, first.pixels) for s in seen.samples):
        return []
    return [f"the network gives the very same answer to all {len(logits)} images, whatever they show, so that a profile says nothing of its image: are these its weights?"]


def _explained(found: Diagnosis, right: np.ndarray, mistakes: Iterable[tuple[Mistake, np.ndarray, float]]) -> Diagnosis:
    """With the mistake whose undoing (right then, bool [N]; mean confidence then) gains most, if it is beyond doubt: McNemar's exact test on
    the same images, and a top-1 such as the network then should have."""
    from scipy.stats import binomtest

    mistake, then, confidence = max(mistakes, key=lambda found: found[1].sum(), default=(None, right, 0.0))
    won, lost, undone = int((then & ~right).sum()), int((right & ~then).sum()), float(then.mean())
    if mistake is None or won - lost < GAIN * len(right) or binomtest(won, won + lost, alternative="greater").pvalue > SURE:
        return found
    if undone < PLAUSIBLE * (confidence if found.promised is None else found.promised):
        return found
    text = f"{mistake.text}: with that undone, top-1 on the same {len(right)} images is {undone:.3f}, not {right.mean():.3f}\n{mistake.remedy}"
    return replace(found, mistake=mistake, undone=undone, faults=[*found.faults, text])


def _judge(found: Diagnosis, right: np.ndarray, logits: torch.Tensor, classes: int, untried: str) -> None:
    """What top-1 alone says, where no mistake explains it. `untried`: which mistake could not be looked for, and why."""
    from scipy.stats import binomtest

    n, top1 = len(right), found.top1
    if not found.mistake and binomtest(found.correct, n, 1 / classes, alternative="greater").pvalue > CHANCE:
        counts = np.bincount(logits.argmax(1).numpy(), minlength=classes)
        same = f"it gives class {counts.argmax()} to {counts.max()} of them: are these its weights?"
        sure = f"with a mean confidence of {found.confidence:.2f}: the labels, or the images, are not those of its training, and no usual mistake explains it{untried}"
        unsure = f"it is sure of nothing (mean confidence {found.confidence:.3f}): are these its weights?"
        text = f"the network is right on {found.correct} of {n} images, no more often than chance (1 of {classes} classes); {same if 2 * counts.max() > n else unsure if found.confidence < 2 / classes else sure}"
        knows = found.promised is not None and 2 * counts.max() <= n  # an untrained network on purpose is not refused
        (found.faults if knows else found.doubts).append(text)
    elif not found.mistake and found.promised is not None and found.high < found.promised:
        found.warnings.append(f"top-1 is below the {found.promised:.3f} that the weights promise, and no usual mistake explains it: harder images (ImageNet-v2 costs a good ten points), or another preprocessing?")
    elif not found.mistake and found.order is False:
        found.warnings.append("some labels are not the ranks of the WordNet IDs that the source itself carries")
    errors = 1 - found.promised if found.promised is not None else 0.04
    if found.high > 0 and 1 - found.low < errors / 2 and found.loss < 0.05:
        found.warnings.append(f"top-1 {top1:.3f} with a median loss of {found.loss:.4f} looks like images that the network was trained on: {HOLDOUT}")
