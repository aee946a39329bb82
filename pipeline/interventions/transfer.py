"""What a step on one misclassified sample does to the sample, to its neighbours, and to samples that were right (figure 6).

Neighbours are repaired where the step turns their errors right; controls, correctly classified before, are broken where it turns them
wrong, which the paper leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline.interventions import choice
from pipeline.interventions.finetuning import NOTHING, WHOLES, Gradient, Group, Step, Tuner
from pipeline.interventions.pruning import batch_size

STRATEGIES = ("salient", "random_live", "least", *WHOLES)

TRANSFERS = pa.schema(
    [("sample_id", pa.string()), ("strategy", pa.string()), ("k", pa.int32()), ("rate", pa.float64()), ("corrected", pa.bool_()), ("confidence_change", pa.float64()),
     ("neighbors_corrected", pa.float64()), ("neighbors_confidence_change", pa.float64()), ("broken", pa.float64()), ("unmoved", pa.int32())]
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A misclassified sample and those that its steps are tried on, all as positions in one set of images: place; neighbours int64 [K];
    controls int64 [M], correctly classified ones. standardised: ŝ float32 [F] of the sample."""

    sample_id: str
    place: int
    standardised: np.ndarray
    neighbours: np.ndarray
    controls: np.ndarray

    @property
    def everyone(self) -> np.ndarray:
        """int64 [1 + K + M]: the sample, its neighbours, the controls."""
        return np.concatenate([[self.place], self.neighbours, self.controls]).astype(np.int64)


def transfers(
    tuner: Tuner, images: torch.Tensor, labels: np.ndarray, cases: Sequence[Case], live: np.ndarray, ks: Sequence[int], rates: Sequence[float],
    strategies: Sequence[str] = STRATEGIES, scope: str = "global", seed: int = 0,
) -> pa.Table:  # fmt: skip
    """`TRANSFERS`: a row for every case, strategy, k and rate, in that order.

    images: float32 [S, 3, H, W]; labels: int [S]; live: bool [F]. `all` (every parameter, always one norm) and `conv` (every conv weight) have
    one k, F. corrected: the sample's new prediction is its label; confidence_change: of its label, after less before, softmax probabilities in
    float64; neighbors_: the share corrected and the mean change of each one's own label; broken: the share of the controls whose new
    prediction is not their label; null where there are none. unmoved: chosen filters whose gradient is 0.
    """
    labels, rows = np.asarray(labels), []
    settings = [(s, k) for s in strategies for k in ([tuner.layout.total] if s in WHOLES else ks)]
    before = _confidences(tuner, images, labels, cases)
    width = max((len(c.everyone) for c in cases), default=1) * len(settings) * len(rates)
    together = max(1, 16 * batch_size(images) // max(1, width))  # cases of which the groups fill some batches
    for start in range(0, len(cases), together):
        chosen = cases[start : start + together]
        steps = [_steps(tuner, images[case.place], int(labels[case.place]), case, live, settings, scope, seed) for case in chosen]
        groups = [Group(step, rate, torch.from_numpy(case.everyone)) for case, taken in zip(chosen, steps) for step in taken for rate in rates]
        probabilities = iter([logits.double().softmax(1).cpu().numpy() for logits in tuner.logits(images, groups)])
        for case, taken in zip(chosen, steps):
            rows += [(case.sample_id, *setting, rate, *_effect(next(probabilities), before, labels, case), step.unmoved) for setting, step in zip(settings, taken) for rate in rates]
    return pa.table([pa.array(column, f.type) for column, f in zip(zip(*rows), TRANSFERS)] if rows else [[]] * len(TRANSFERS), schema=TRANSFERS)


def _confidences(tuner: Tuner, images: torch.Tensor, labels: np.ndarray, cases: Sequence[Case]) -> np.ndarray:
    """float64 [S]: the network's confidence in the label of every sample and neighbour before any step; NaN elsewhere."""
    asked = np.unique(np.concatenate([case.everyone[: len(case.everyone) - len(case.controls)] for case in cases])) if cases else np.empty(0, np.int64)
    (logits,) = tuner.logits(images, [Group(NOTHING, 0.0, torch.from_numpy(asked))])
    before = np.full(len(labels), np.nan)
    before[asked] = logits.double().softmax(1).cpu().numpy()[np.arange(len(asked)), labels[asked]]
    return before


def _steps(tuner: Tuner, image: torch.Tensor, label: int, case: Case, live: np.ndarray, settings: list[tuple[str, int]], scope: str, seed: int) -> list[Step]:
    gradient = Gradient(tuner.network, tuner.layout, image, label)
    rankings = {s: choice.ranking(s, case.standardised, live, seed, case.sample_id) for s, _ in settings if s not in WHOLES}
    return [gradient.whole(s, "global" if s == "all" else scope) if s in WHOLES else gradient.step(rankings[s][:k], scope) for s, k in settings]


def _effect(after: np.ndarray, before: np.ndarray, labels: np.ndarray, case: Case) -> tuple:
    """The columns from `corrected` to `broken`. after: probabilities [1 + K + M, C] of `case.everyone`; before: of `_confidences`."""
    own, end = labels[case.everyone], 1 + len(case.neighbours)
    right = after.argmax(1) == own
    change = after[np.arange(len(own)), own] - before[case.everyone]
    mean = lambda values: float(np.mean(values)) if len(values) else None  # noqa: E731
    return bool(right[0]), float(change[0]), mean(right[1:end]), mean(change[1:end]), mean(~right[end:])
