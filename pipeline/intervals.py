"""95% intervals: of means over samples, of differences of means, and of shares.

A bootstrap draws samples with replacement. What several rows say of one sample must be averaged first: samples are independent, rows are not.
Of few samples a bootstrap is far too sure (two of them cover half the time); below `SMALL` the interval is Student's, and below `FEW` no verdict
should rest on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

LEVEL = 0.95
SMALL = 20  # samples below which an interval is Student's
FEW = 10  # samples below which nothing is concluded
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
        """`1.62 (1.58 to 1.66)`."""
        return f"{self.estimate:{sign}.{digits}f} ({self.low:{sign}.{digits}f} to {self.high:{sign}.{digits}f})"


def bootstrap_means(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high), float64 [M], of values [N, M] over N samples: BCa intervals (Efron, 1987), every column with the same draws;
    of fewer than `SMALL` samples Student's, which may leave the range of the values.

    A column without spread, or a single sample, has an interval of length 0, which says nothing. Raises ValueError for no sample.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one sample")
    mean = values.mean(0)
    if len(values) < SMALL:
        half = _student(values, len(values) - 1, level)
        return mean, mean - half, mean + half
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
    return mean, bounds[0], bounds[1]


def bootstrap_mean(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Of values [N]."""
    mean, low, high = bootstrap_means(np.asarray(values)[:, None], seed, resamples, level)
    return Interval(float(mean[0]), float(low[0]), float(high[0]), len(values))


def bootstrap_difference(a: np.ndarray, b: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Of mean(a) - mean(b), two independent groups of samples [N], [M]: percentile interval, each group drawn by itself; Student's (Welch, 1947) where
    a group has fewer than `SMALL`, of length 0 where one has a single sample. n is that of both."""
    if 1 <= min(len(a), len(b)) < SMALL:
        difference = float(np.mean(a) - np.mean(b))
        errors = [float(np.var(part, ddof=1)) / len(part) if len(part) > 1 else 0.0 for part in (a, b)]
        freedom = sum(errors) ** 2 / sum(e**2 / (len(part) - 1) for e, part in zip(errors, (a, b)) if e) if any(errors) else 1.0
        half = float(stdtrit(freedom, (1 + level) / 2)) * sum(errors) ** 0.5 if min(len(a), len(b)) > 1 else 0.0
        return Interval(difference, difference - half, difference + half, len(a) + len(b))
    drawn = []
    for part, stream in ((a, 0), (b, 1)):
        part = np.asarray(part, np.float64)
        if not len(part):
            raise ValueError("an interval needs at least one sample of each group")
        drawn.append(np.concatenate([counts @ part for counts in _draws(len(part), [seed, stream], resamples)]) / len(part))
    low, high = np.quantile(drawn[0] - drawn[1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(a) - np.mean(b)), float(low), float(high), len(a) + len(b))


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Of a share of n independent samples (Wilson, 1927): has a length even at 0 and at n, where a bootstrap has none. Raises ValueError for no sample."""
    if n < 1:
        raise ValueError("an interval needs at least one sample")
    z = ndtri((1 + level) / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, float(max(0.0, middle - half)), float(min(1.0, middle + half)), n)


def _student(values: np.ndarray, freedom: int, level: float) -> np.ndarray:
    """Half the length [M] of Student's interval of the mean of values [N, M]; 0 for a single sample."""
    return stdtrit(freedom, (1 + level) / 2) * values.std(0, ddof=1) / np.sqrt(len(values)) if freedom else np.zeros(values.shape[1])


def _draws(n: int, seed, resamples: int) -> Iterator[np.ndarray]:
    """float64 [r, N]: how often each of N samples is drawn, for `resamples` resamples, some at once."""
    random = np.random.default_rng(seed)
    step = max(1, BLOCK // n)
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        drawn = random.integers(0, n, (count, n))
        yield np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)
