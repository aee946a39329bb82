"""Intervals: what they are, held to naive loops, and how often they cover the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.intervals import CHANGE, bootstrap_difference, bootstrap_mean, bootstrap_means, paired_shares, share_mean, share_means, wilson

TRIALS = 400  # of a coverage of 0.95: standard error 0.011


def covered(interval_of, truth: float) -> float:
    """The share of simulated data sets whose interval holds the truth."""
    inside = 0
    for trial in range(TRIALS):
        interval = interval_of(np.random.default_rng([7, trial]))
        inside += interval.low <= truth <= interval.high
    return inside / TRIALS


@pytest.mark.parametrize(
    "draw, truth",
    [
        (lambda r: r.normal(3, 2, 80), 3),
        (lambda r: r.exponential(1, 120), 1),
        (lambda r: r.uniform(-1, 1, 60), 0),
        (lambda r: (r.random(150) < 0.2).astype(float), 0.2),
        (lambda r: np.round(r.beta(0.5, 0.5, 100) * 10) / 10, 0.5),
    ],
    ids=["normal", "exponential", "uniform", "share", "shares of ten"],
)
def test_a_bootstrap_interval_covers_the_mean(draw, truth):
    assert 0.92 <= covered(lambda r: bootstrap_mean(draw(r), seed=int(r.integers(1 << 30)), resamples=600), truth) <= 0.98


def test_a_bootstrap_interval_of_a_difference_covers_it():
    def interval(r):
        return bootstrap_difference(r.exponential(2, 90), r.normal(1, 1, 140), seed=int(r.integers(1 << 30)), resamples=600)

    assert 0.92 <= covered(interval, 1) <= 0.98


@pytest.mark.parametrize("share, n", [(0.02, 120), (0.3, 60), (0.5, 25), (0.98, 200)])
def test_wilsons_interval_covers_the_share(share, n):
    assert 0.91 <= covered(lambda r: wilson(int(r.binomial(n, share)), n), share) <= 0.99


def test_a_bootstrap_interval_is_scipys():
    """BCa bounds differ by the draws alone: within a tenth of the interval's length."""
    from scipy.stats import bootstrap

    values = np.random.default_rng(0).lognormal(0, 1, 200)
    ours = bootstrap_mean(values, resamples=20_000)
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, random_state=1).confidence_interval
    length = ours.high - ours.low
    assert ours.estimate == pytest.approx(values.mean()) and ours.n == 200
    assert abs(ours.low - theirs.low) < 0.05 * length and abs(ours.high - theirs.high) < 0.05 * length


def test_columns_are_what_each_is_alone():
    values = np.random.default_rng(1).normal([0, 5, -3], [1, 0.1, 4], (50, 3))
    mean, low, high = bootstrap_means(values, seed=4)
    for at in range(3):
        alone = bootstrap_mean(values[:, at], seed=4)
        assert (mean[at], low[at], high[at]) == pytest.approx((alone.estimate, alone.low, alone.high))


def test_draws_cut_into_blocks_are_the_same_draws(monkeypatch):
    """What memory allows at once decides nothing."""
    values = np.random.default_rng(2).normal(0, 1, 40)
    whole = bootstrap_mean(values)
    monkeypatch.setattr("pipeline.intervals.BLOCK", 200)
    assert bootstrap_mean(values) == whole


def test_wilson_is_the_formula():
    """The roots of (share - p)^2 = z^2 p (1 - p) / n."""
    for successes, n in ((0, 10), (3, 17), (17, 17)):
        interval, z = wilson(successes, n), 1.959963984540054
        for bound in (interval.low, interval.high):
            assert math.isclose((successes / n - bound) ** 2, z * z * bound * (1 - bound) / n, abs_tol=1e-12)
        assert interval.low <= successes / n <= interval.high


@pytest.mark.parametrize("values", [[2.5], [1.0] * 30])
def test_without_spread_an_interval_has_no_length(values):
    interval = bootstrap_mean(np.array(values))
    assert interval.low == interval.estimate == interval.high == values[0]


def test_no_sample_has_no_interval():
    for make in (lambda: bootstrap_mean(np.zeros(0)), lambda: bootstrap_difference(np.zeros(0), np.ones(3)), lambda: wilson(0, 0), lambda: share_mean(np.zeros(0)), lambda: paired_shares(np.zeros(0), np.zeros(0))):
        with pytest.raises(ValueError, match="at least one sample"):
            make()


def test_an_interval_of_shares_does_not_leave_them():
    """Rounding put the lower bound of a rare share at -1e-19, which is written as -0.000."""
    for n in (354, 1680):
        for ones in (1, 2, 3):
            shares = np.zeros(n)
            shares[:ones] = 0.1
            mean, low, high = bootstrap_means(np.stack([shares, 1 - shares], 1))
            assert (low >= 0).all() and (high <= 1).all() and (low <= mean).all() and (mean <= high).all()


@pytest.mark.parametrize("n", [2, 4, 6, 12, 19])
def test_an_interval_of_few_samples_is_honest_about_it(n):
    """A bootstrap of two samples covers half the time; Student's covers as often as it says, or nearly."""
    assert covered(lambda r: bootstrap_mean(r.beta(2, 2, n), seed=1), 0.5) >= 0.92


@pytest.mark.parametrize("sizes", [(3, 20), (5, 5), (12, 200)])
def test_an_interval_of_a_difference_of_few_samples_is_honest_too(sizes):
    assert covered(lambda r: bootstrap_difference(r.normal(1, 2, sizes[0]), r.normal(0, 1, sizes[1]), seed=1, resamples=300), 1) >= 0.92


def test_an_interval_of_few_samples_is_scipys():
    from scipy.stats import ttest_1samp, ttest_ind

    a, b = np.random.default_rng(3).normal(0, 1, 7), np.random.default_rng(4).normal(1, 3, 11)
    ours, theirs = bootstrap_mean(a), ttest_1samp(a, 0).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    ours, theirs = bootstrap_difference(a, b), ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def shares_of(r, n, k, mean, alike):
    """n samples' shares of k neighbours that have a property: how often a sample's have it differs between samples, the more the more `alike` they are."""
    scale = 1 / alike - 1
    return r.binomial(k, r.beta(mean * scale, (1 - mean) * scale, n)) / k


@pytest.mark.parametrize("n", [2, 8, 15, 30, 60, 200])
@pytest.mark.parametrize("k, mean, alike", [(10, 0.04, 0.2), (10, 0.3, 0.3), (10, 0.97, 0.3), (10, 0.5, 0.7), (40, 0.005, 0.05), (40, 0.005, 0.4), (10, 0.03, 0.999)], ids=str)
def test_an_interval_of_a_mean_of_shares_covers_it(n, k, mean, alike):
    """Rare or common, alone or in heaps, of few samples or many; a bootstrap covers the rare ones half the time. Where the truth is seldom seen it covers more than it says."""
    assert covered(lambda r: share_mean(shares_of(r, n, k, mean, alike)), mean) >= 0.925


@pytest.mark.parametrize("n", [60, 200, 600])
def test_an_interval_of_common_shares_is_no_longer_than_a_bootstraps(n):
    """What it adds for what was not seen is next to nothing where much was seen."""
    for trial in range(5):
        values = shares_of(np.random.default_rng([3, trial]), n, 10, 0.4, 0.3)
        ours, theirs = share_mean(values), bootstrap_mean(values)
        assert (ours.high - ours.low) == pytest.approx(theirs.high - theirs.low, rel=0.12)


@pytest.mark.parametrize("n", [1, 2, 7, 19, 20, 354])
@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_an_interval_of_shares_has_a_length_and_stays_inside(n, share):
    """None of n, all of n, half of each: nothing is certain."""
    interval = share_mean(np.full(n, share))
    assert 0 <= interval.low <= share <= interval.high <= 1 and interval.high - interval.low > 1 / (n + 2) ** 2
    if share != 0.5:
        assert interval.high - interval.low >= wilson(round(n * share), n).high - wilson(round(n * share), n).low, "what no sample shows is as uncertain as one trial a sample"


def test_shares_of_all_or_nothing_have_wilsons_interval_with_students_quantile():
    for successes, n in ((0, 40), (3, 57), (12, 12), (30, 400)):
        ours, plain = share_mean(np.repeat([1.0, 0.0], [successes, n - successes])), wilson(successes, n)
        assert ours.estimate == plain.estimate and ours.low == pytest.approx(plain.low, abs=0.05) and ours.high == pytest.approx(plain.high, abs=0.05)
        assert ours.low <= plain.low + 1e-12 and ours.high >= plain.high - 1e-12


def test_columns_of_shares_are_what_each_is_alone():
    values = np.random.default_rng(1).integers(0, 11, (30, 4)) / 10 * [1, 0, 0.3, 1]
    mean, low, high = share_means(values)
    for at in range(4):
        alone = share_mean(values[:, at])
        assert (mean[at], low[at], high[at]) == pytest.approx((alone.estimate, alone.low, alone.high))


@pytest.mark.parametrize("n", [5, 15, 40, 200])
@pytest.mark.parametrize("up, down", [(0.02, 0.0), (0.3, 0.1), (0.0, 0.06), (0.45, 0.45), (0.97, 0.01)])
def test_an_interval_of_a_paired_difference_covers_it(n, up, down):
    """Of the same samples one strategy mends so many that the other does not, and the other way round."""

    def interval(r):
        drawn = r.random(n)
        return paired_shares(drawn < up, (drawn >= up) & (drawn < up + down))

    assert covered(interval, up - down) >= 0.92


@pytest.mark.parametrize("n", [8, 15, 60, 200])
@pytest.mark.parametrize("a, b", [((10, 0.05, 0.4), (10, 0.0001, 0.2)), ((10, 0.5, 0.3), (10, 0.25, 0.3)), ((40, 0.02, 0.2), (40, 0.001, 0.2)), ((10, 0.97, 0.3), (10, 0.3, 0.3))], ids=str)
def test_an_interval_of_a_paired_difference_of_shares_covers_it(n, a, b):
    assert covered(lambda r: paired_shares(shares_of(r, n, *a), shares_of(r, n, *b)), a[1] - b[1]) >= 0.93


def test_rare_shares_are_told_apart_where_they_are_apart():
    """60 samples with 600 neighbours: 29 of them against 3 is no matter of chance."""
    order = np.random.default_rng(0).permutation(60)
    a, b = np.where(order < 29, 0.1, 0.0), np.where(np.arange(60) < 3, 0.1, 0.0)
    interval = paired_shares(a, b)
    assert 0 < interval.low < interval.estimate == pytest.approx(26 / 600)


@pytest.mark.parametrize("n", [1, 2, 9, 30, 354])
@pytest.mark.parametrize("a, b", [(0, 0), (1, 1), (1, 0), (0, 1), (0.3, 0.3)])
def test_a_paired_difference_has_a_length_and_stays_inside(n, a, b):
    interval = paired_shares(np.full(n, a), np.full(n, b))
    assert -1 <= interval.low <= interval.estimate == a - b <= interval.high <= 1 and interval.high - interval.low > 1 / (n + 2)


def test_a_paired_difference_is_of_the_same_samples():
    """Two strategies that mend the same samples but for a few are told apart where each alone is uncertain."""
    a = np.repeat([1.0, 0.0], [60, 60])
    b = a.copy()
    b[:12] = 0
    interval = paired_shares(a, b)
    assert interval.low > 0 and share_mean(a).low < share_mean(b).high


@pytest.mark.parametrize("n", [1, 2, 5, 19, 20, 200])
@pytest.mark.parametrize("value", [-1.0, 0.0, 0.9])
def test_an_interval_of_changes_has_a_length_and_stays_inside(n, value):
    for values in (np.full(n, value), np.where(np.arange(n) < n / 4, -value, value)):
        interval = bootstrap_mean(values, ends=CHANGE)
        assert -1 <= interval.low <= interval.estimate <= interval.high <= 1 and interval.high > interval.low


@pytest.mark.parametrize("n", [3, 12, 60])
def test_an_interval_of_changes_covers_their_mean(n):
    assert covered(lambda r: bootstrap_mean(-r.beta(0.3, 2, n), seed=1, resamples=400, ends=CHANGE), -0.3 / 2.3) >= 0.91


def test_one_sample_has_no_interval_and_says_so():
    """Length 0 is not certainty."""
    assert bootstrap_mean(np.array([1.5])).text() == "1.50 (one sample: no interval)" and bootstrap_mean(np.array([1.0, 1.0])).text(1, "+") == "+1.0 (two samples: no interval)"
    assert bootstrap_mean(np.array([1.0, 2.0])).text() == "1.50 (-4.85 to 7.85)" and bootstrap_mean(np.ones(30)).text() == "1.00 (1.00 to 1.00)"
    assert share_mean(np.array([1.0])).text() == "1.00 (0.00 to 1.00)" and bootstrap_difference(np.ones(1), np.zeros(1)).text() == "1.00 (two samples: no interval)"


@pytest.mark.parametrize("others", [2, 5, 40])
def test_a_single_sample_against_a_group_is_as_uncertain_as_the_group_is_spread(others):
    random = np.random.default_rng(0)
    group = random.normal(0, 2, others)
    for a, b, sign in ((np.array([3.0]), group, 1), (group, np.array([3.0]), -1)):
        found = bootstrap_difference(a, b)
        assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, others - 1) * group.std(ddof=1) * (1 + 1 / others) ** 0.5)
        assert found.estimate == pytest.approx(sign * (3 - group.mean())) and found.n == others + 1
    assert covered(lambda r: bootstrap_difference(r.normal(1, 2, 1), r.normal(0, 2, others)), 1) >= 0.92
