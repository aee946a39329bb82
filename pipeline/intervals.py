"""95% intervals: of means over samples, of differences of means, and of shares.

What several rows say of one sample must be averaged first: samples are independent, rows are not. A bootstrap draws samples with replacement. Of
few samples it is far too sure (two of them cover half the time), and of an event that none of them shows it is certain: below `SMALL` samples an
interval is Student's, shares have intervals of their own, which have a length even where none or all of the samples have a property, and below
`FEW` samples no verdict should rest on any of them. Coverage is simulated in tests/test_intervals.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

LEVEL = 0.95
SMALL = 20  # samples below which an interval is Student's
FEW = 10  # samples below which nothing is concluded
UNSEEN = 0.25  # of a sample at either end, when the spread of shares is estimated: see `share_means`
CHANGE = (-1.0, 1.0)  # what a change of a share or of a confidence, or a difference of two, cannot leave
RESAMPLES = 2000
BLOCK = 2**22  # draws held at once: 32 MiB


@dataclass(frozen=True)
class Interval:
    """An estimate from n samples, and the bounds of its interval."""

    estimate: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict:
        return asdict(self)

    def text(self, digits: int = 2, sign: str = "") -> str:
        """`1.62 (1.58 to 1.66)`; where so few samples have no interval of any length, that."""
        if self.n <= 2 and self.low == self.high:
            return f"{self.estimate:{sign}.{digits}f} ({'one sample' if self.n == 1 else 'two samples'}: no interval)"
        return f"{self.estimate:{sign}.{digits}f} ({self.low:{sign}.{digits}f} to {self.high:{sign}.{digits}f})"


def bootstrap_means(
    values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL, ends: tuple[float, float] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high), float64 [M], of values [N, M] over N samples: BCa intervals (Efron, 1987), every column with the same draws; of fewer than
    `SMALL` samples Student's.

    ends: what no value can leave. The intervals then stay inside, and of few samples, or of a column without spread, they are those of `_with_ends`.
    Without ends Student's may leave the range of the values, and a column without spread, or a single sample, has an interval of length 0, which says
    nothing (`Interval.text` has it so of one sample). Raises ValueError for no sample.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one sample")
    mean = values.mean(0)
    if len(values) < SMALL:
        return (mean, *_with_ends(values, ends, level)) if ends else (mean, *(mean + sign * _student(values, level) for sign in (-1, 1)))
    centred = values - mean  # so that sums of large numbers do not hide small spreads
    drawn = np.concatenate([counts @ centred for counts in _draws(len(values), seed, resamples)]) / len(values)  # [R, M]
    below = ((drawn < 0).mean(0) + (drawn <= 0).mean(0)) / 2
    bias = ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples))
    spread = np.square(centred).sum(0)
    acceleration = np.divide(np.power(centred, 3).sum(0), 6 * np.power(spread, 1.5), out=np.zeros_like(spread), where=spread > 0)
    bounds = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + ndtri(tail)
        share = ndtr(bias + z / (1 - acceleration * z))
        bound = mean + np.array([np.quantile(column, q) for column, q in zip(drawn.T, share)])
        bounds.append(np.clip(bound, values.min(0), values.max(0)))  # rounding would put the least of shares just below 0
    if ends:
        same = values.min(0) == values.max(0)
        bounds = [np.where(same, wide, bound) for wide, bound in zip(_with_ends(values, ends, level), bounds)]
    return mean, bounds[0], bounds[1]


def bootstrap_mean(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL, ends: tuple[float, float] | None = None) -> Interval:
    """Of values [N]."""
    return _only(bootstrap_means(np.asarray(values)[:, None], seed, resamples, level, ends), len(values))


def bootstrap_difference(a: np.ndarray, b: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Of mean(a) - mean(b), two independent groups of samples [N], [M]: percentile interval, each group drawn by itself; Student's (Welch, 1947) where
    a group has fewer than `SMALL`. A single sample says nothing of its group's spread: it is then taken to be the other's (Student's, pooled), and is not known, with length 0,
    where both have a single one. n is that of both."""
    if 1 <= min(len(a), len(b)) < SMALL:
        difference = float(np.mean(a) - np.mean(b))
        if min(len(a), len(b)) == 1:
            more = max(a, b, key=len)
            half = float(margin(np.std(more, ddof=1), len(more), level)) * (len(more) + 1) ** 0.5 if len(more) > 1 else 0.0
            return Interval(difference, difference - half, difference + half, len(a) + len(b))
        errors = [float(np.var(part, ddof=1)) / len(part) for part in (a, b)]
        freedom = sum(errors) ** 2 / sum(e**2 / (len(part) - 1) for e, part in zip(errors, (a, b)) if e) if any(errors) else 1.0
        half = float(stdtrit(freedom, (1 + level) / 2)) * sum(errors) ** 0.5
        return Interval(difference, difference - half, difference + half, len(a) + len(b))
    drawn = []
    for part, stream in ((a, 0), (b, 1)):
        part = np.asarray(part, np.float64)
        if not len(part):
            raise ValueError("an interval needs at least one sample of each group")
        drawn.append(np.concatenate([counts @ part for counts in _draws(len(part), [seed, stream], resamples)]) / len(part))
    low, high = np.quantile(drawn[0] - drawn[1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(a) - np.mean(b)), float(low), float(high), len(a) + len(b))


def share_means(values: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high), float64 [M], of shares [N, M], each sample's own (of its 10 neighbours, say) or any number in 0..1: Wilson's interval of as many
    plain trials as the samples are worth.

    n samples with the mean m and the spread s are worth n m (1 - m) / s^2 trials: n where a sample has all or nothing, when this is `wilson` but for
    Student's quantile in the place of the normal one, and more the more alike they are. A few samples say little of s, and none at all where every share
    is 0, so s^2 and m are taken in that number as if `UNSEEN` of a further sample had nothing, and as much of another had all. The interval never leaves
    0..1, always has a length, and is that of n trials where none or all of the samples have the property. A bootstrap cannot draw what was not seen, and
    covers a rare share of few samples half the time; Student's interval leaves 0..1. A single sample has 0..1. Raises ValueError for no sample.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if not n:
        raise ValueError("an interval needs at least one sample")
    mean = values.mean(0)
    if n == 1:
        return mean, np.zeros_like(mean), np.ones_like(mean)
    about = (values.sum(0) + UNSEEN) / (n + 2 * UNSEEN)
    spread = (np.square(values - about).sum(0) + UNSEEN * (np.square(about) + np.square(1 - about))) / (n + 2 * UNSEEN)
    return (mean, *_score(mean, n * about * (1 - about) / spread, float(stdtrit(n - 1, (1 + level) / 2))))


def share_mean(values: np.ndarray, level: float = LEVEL) -> Interval:
    """Of shares [N], a sample's each; of all or nothing `wilson` is the plain interval."""
    return _only(share_means(np.asarray(values)[:, None], level), len(values))


def paired_shares(a: np.ndarray, b: np.ndarray, level: float = LEVEL) -> Interval:
    """Of mean(a - b), shares [N] or all or nothing (0 and 1) of the same N samples: Student's of the differences, as if some more had been seen that differ by 1 and
    as many by -1. Of all or nothing that is a whole sample each, as Bonett and Price (2012) do it; of shares, which rarely differ by so much, `UNSEEN` of one.

    Stays within -1..1, and has a length even where no sample differs. Raises ValueError for no sample.
    """
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if not len(differences):
        raise ValueError("an interval needs at least one sample")
    more = 1.0 if np.isin(differences, (-1, 0, 1)).all() else UNSEEN
    return _only((differences[:, None].mean(0), *_with_ends(differences[:, None], CHANGE, level, more)), len(differences))


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Of a share of n independent samples (Wilson, 1927): has a length even at 0 and at n, where a bootstrap has none. Raises ValueError for no sample."""
    if n < 1:
        raise ValueError("an interval needs at least one sample")
    mean = np.array([successes / n])
    return _only((mean, *_score(mean, np.array([float(n)]), float(ndtri((1 + level) / 2)))), n)


def margin(spread: np.ndarray, n: int, level: float = LEVEL) -> np.ndarray:
    """Half the length of Student's interval of a mean over n samples, in the shape of their standard deviations `spread` (n - 1); 0 for a single sample."""
    return stdtrit(n - 1, (1 + level) / 2) * spread / np.sqrt(n) if n > 1 else np.zeros_like(spread)


def _score(share: np.ndarray, trials: np.ndarray, quantile: float) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of Wilson's interval [M] of shares seen in so many trials [M]."""
    square = quantile * quantile / trials
    middle = (share + square / 2) / (1 + square)
    half = quantile / (1 + square) * np.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return np.minimum(share, np.maximum(0.0, middle - half)), np.maximum(share, np.minimum(1.0, middle + half))


def _with_ends(values: np.ndarray, ends: tuple[float, float], level: float, more: float = UNSEEN) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of Student's interval [M] of the mean of values [N, M], N >= 1, as if so much `more` of a sample had been seen at either end of what they can be; within the ends."""
    n = len(values)
    if n == 1:
        return tuple(np.full(values.shape[1], float(end)) for end in ends)
    about = (values.sum(0) + more * sum(ends)) / (n + 2 * more)
    spread = np.square(values - about).sum(0) + more * sum(np.square(end - about) for end in ends)
    half = margin(np.sqrt(spread / (n + 2 * more - 1)), n, level) * np.sqrt(n / (n + 2 * more))
    return np.clip(about - half, *ends), np.clip(about + half, *ends)


def _only(bounds: tuple[np.ndarray, np.ndarray, np.ndarray], n: int) -> Interval:
    """The interval of a single column."""
    return Interval(*(float(bound[0]) for bound in bounds), n)


def _student(values: np.ndarray, level: float) -> np.ndarray:
    """Half the length [M] of Student's interval of the mean of values [N, M]; 0 for a single sample."""
    return margin(values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1]), len(values), level)


def _draws(n: int, seed, resamples: int) -> Iterator[np.ndarray]:
    """float64 [r, N]: how often each of N samples is drawn, for `resamples` resamples, some at once."""
    random = np.random.default_rng(seed)
    step = max(1, BLOCK // n)
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        drawn = random.integers(0, n, (count, n))
        yield np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)
