"""Which filters are chosen: nested in k, ties by column, dead ones left out, and a sample's random ones its own wherever it is asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.interventions.choice import STRATEGIES, choose, ranking

CASES = st.integers(1, 60).flatmap(lambda f: st.tuples(st.lists(st.sampled_from([-3.0, -1.5, 0.0, 0.0, 2.0, 7.5]), min_size=f, max_size=f), st.lists(st.booleans(), min_size=f, max_size=f)))


@given(case=CASES, seed=st.integers(-5, 5), sample_id=st.text(max_size=8))
def test_rankings(case, seed, sample_id):
    standardised, live = np.array(case[0], dtype=np.float32), np.array(case[1])
    alive = [i for i in range(len(live)) if live[i]]
    order = {s: ranking(s, standardised, live, seed, sample_id).tolist() for s in STRATEGIES}
    assert order["salient"] == sorted(alive, key=lambda i: (-standardised[i], i))
    assert order["least"] == sorted(alive, key=lambda i: (standardised[i], i))
    assert sorted(order["random"]) == list(range(len(live))) and order["random_live"] == [i for i in order["random"] if live[i]]
    for strategy in STRATEGIES:
        for k in (0, 1, 5, 100):
            chosen = choose(strategy, k, standardised, live, seed, sample_id)
            assert chosen.dtype == np.int64 and chosen.tolist() == order[strategy][:k]


def test_random_is_the_sample_s_own():
    """Known values: the same on every machine and in every version, whatever was drawn before."""
    live = np.ones(10, bool)
    draw = lambda seed, sample_id: choose("random", 10, np.zeros(10, np.float32), live, seed, sample_id).tolist()  # noqa: E731
    first = draw(0, "cat_0001")
    assert draw(1, "cat_0001") != first != draw(0, "cat_0002") and draw(0, "cat_0001") == first
    assert first == [2, 4, 3, 5, 1, 7, 0, 8, 9, 6]


def test_random_is_uniform():
    """Over 4,000 samples each of 20 filters is among the first 5 a quarter of the time, and pairs are as likely as each other."""
    live = np.ones(20, bool)
    counts = np.zeros((20, 20))
    for i in range(4000):
        chosen = choose("random", 5, np.zeros(20, np.float32), live, 0, f"s{i}")
        counts[np.ix_(chosen, chosen)] += 1
    alone, together = counts.diagonal(), counts[~np.eye(20, dtype=bool)]
    assert abs(alone - 1000).max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
    share = 5 * 4 / (20 * 19)
    assert abs(together - 4000 * share).max() < 5.5 * (4000 * share * (1 - share)) ** 0.5


def test_ids_of_any_bytes():
    assert len(choose("random", 3, np.zeros(5, np.float32), np.ones(5, bool), 0, "caf\udce9/\U0001f600")) == 3


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategy is 'best'; there are salient, random, random_live, least"):
        ranking("best", np.zeros(3, np.float32), np.ones(3, bool), 0, "a")
