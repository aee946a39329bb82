"""Masked and pasted pixels against plain loops: which ones, what they become, and what the network makes of the picture, one picture at a time in float64."""

from __future__ import annotations

import intervention_oracles as naive
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, strategies as st

from pipeline.interventions import masking

SHAPE = (12, 10)
SHARES = (0.02, 0.1, 0.5)


@pytest.fixture(scope="module")
def network():
    return tiny.Net().double().eval()


@pytest.fixture(scope="module")
def case():
    """(pixels uint8 [3, H, W, 3], heats [3, H, W], labels, predictions, IDs)."""
    random = np.random.default_rng(3)
    return random.integers(0, 256, (3, *SHAPE, 3), dtype=np.uint8), random.random((3, *SHAPE)), np.array([0, 3, 4]), np.array([1, 2, 0]), ["a", "b", "c"]


def prepared(pixels: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pixels.astype(np.float64)) / 255 - 0.5).permute(2, 0, 1) / 0.25


def answer(network, pixels: np.ndarray) -> np.ndarray:
    """Probabilities of one picture."""
    return naive.softmax(naive.alone(network, prepared(pixels)))


def classifier(network):
    return lambda many: np.stack([answer(network, one) for one in many])


def by_hand(heat: np.ndarray, count: int, hottest: bool, start: int = 0, allowed=None) -> set[tuple[int, int]]:
    """Places of the `count` hottest or coldest pixels, in reading order where they are equal."""
    places = [(r, c) for r in range(heat.shape[0]) for c in range(heat.shape[1]) if allowed is None or allowed[r, c]]
    return set(sorted(places, key=lambda p: -heat[p] if hottest else heat[p])[start : start + count])


def places(mask: np.ndarray) -> set[tuple[int, int]]:
    return {tuple(p) for p in np.argwhere(mask).tolist()}


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.001, 0.5), st.integers(0, 50))
def test_which_pixels(height, width, share, seed):
    """As many as asked; the hottest, those after them, the coldest, with ties in reading order; the same shape elsewhere; drawn ones by seed and ID alone."""
    heat = np.random.default_rng(seed).integers(0, 4, (height, width)).astype(float)
    count = max(1, round(share * heat.size))
    one = {s: masking.mask(s, heat, share, seed, "x") for s in (*masking.STRATEGIES, "next")}
    assert places(one["salient"]) == by_hand(heat, count, True) and places(one["least"]) == by_hand(heat, count, False)
    assert places(one["next"]) == by_hand(heat, count, True, count)
    assert one["random"].sum() == one["moved"].sum() == count
    down, right = next((d, r) for d in range(height) for r in range(width) if (np.roll(one["salient"], (d, r), (0, 1)) == one["moved"]).all())
    assert 0 <= down < height and 0 <= right < width
    assert (one["random"] == masking.mask("random", heat[::-1].copy(), share, seed, "x")).all(), "the heat does not matter"
    more = {s: masking.mask(s, heat, min(0.5, 2 * share), seed, "x") for s in ("salient", "random", "least")}
    assert all((more[s] >= one[s]).all() for s in more), "masks are nested"


def test_random_pixels_differ_by_sample_and_seed():
    heat = np.zeros((20, 20))
    drawn = {masking.mask("random", heat, 0.1, seed, sample).tobytes() for seed in (0, 1) for sample in ("a", "b")}
    assert len(drawn) == 4


def test_among_some_pixels_alone():
    heat, among = np.random.default_rng(0).random((6, 6)), np.zeros((6, 6), bool)
    among[2:5, 1:3] = True  # six pixels
    assert places(masking.mask("salient", heat, 0.1, 0, "x", among)) == by_hand(heat, 4, True, allowed=among)
    assert (masking.mask("random", heat, 0.5, 0, "x", among) == among).all(), "all there are, where fewer than asked"
    for strategy, where in (("moved", among), ("other", None)):
        with pytest.raises(ValueError, match="strategy is"):
            masking.mask(strategy, heat, 0.1, 0, "x", where)


def test_what_masked_pixels_become():
    random = np.random.default_rng(1)
    pixels = np.concatenate([random.integers(0, 60, (40, 20, 3)), random.integers(190, 256, (40, 20, 3))], 1).astype(np.uint8)
    mean = masking.filling(pixels, "mean", 0, "a")
    assert (mean == np.rint(pixels.mean((0, 1)))).all()
    blur = masking.filling(pixels, "blur", 0, "a").astype(float)
    assert blur[:, :6].mean() < 60 and blur[:, -6:].mean() > 190, "a blurred image keeps what is large"
    assert np.abs(np.diff(blur, axis=0)).max() < 12 < np.abs(np.diff(pixels.astype(float), axis=0)).max(), "and loses what is small"
    noise = masking.filling(np.full((60, 60, 3), (100, 120, 140), np.uint8) + (np.indices((60, 60)).sum(0) % 2 * 40).astype(np.uint8)[..., None], "noise", 0, "a").astype(float)
    assert noise.mean((0, 1)) == pytest.approx([120, 140, 160], abs=3) and noise.std((0, 1)) == pytest.approx([20, 20, 20], abs=1.5)
    assert (masking.filling(pixels, "noise", 0, "a") == masking.filling(pixels, "noise", 0, "a")).all()
    assert (masking.filling(pixels, "noise", 0, "a") != masking.filling(pixels, "noise", 0, "b")).any()
    with pytest.raises(ValueError, match="fill is 'black'"):
        masking.filling(pixels, "black", 0, "a")


@pytest.mark.parametrize("fill", masking.FILLS)
def test_effects_are_those_of_pictures_masked_by_hand(network, case, fill):
    pixels, heats, labels, predictions, ids = case
    free = np.zeros(SHAPE, bool)
    free[:, 6:] = True
    rows = masking.effects(classifier(network), pixels, heats, labels, predictions, ids, SHARES, fill, 7, [None, free, np.zeros(SHAPE, bool)]).to_pylist()
    settings = [(s, share) for s in masking.STRATEGIES for share in SHARES]
    outside = [(s, share) for s in ("salient_outside", "random_outside") for share in SHARES]
    assert [(r["sample_id"], r["strategy"], r["share"]) for r in rows] == [(i, *s) for i in ids for s in settings + (outside if i == "b" else [])]
    for row in rows:
        i = ids.index(row["sample_id"])
        strategy, _, where = row["strategy"].partition("_")
        picture, filled = pixels[i].copy(), masking.filling(pixels[i], fill, 7, ids[i])
        for place in places(masking.mask(strategy, heats[i], row["share"], 7, ids[i], free if where else None)):
            assert not where or place[1] >= 6
            picture[place] = filled[place]
        before, after = answer(network, pixels[i]), answer(network, picture)
        assert row["wrong_confidence_change"] == pytest.approx(after[predictions[i]] - before[predictions[i]], abs=1e-12)
        assert row["true_confidence_change"] == pytest.approx(after[labels[i]] - before[labels[i]], abs=1e-12)
        assert row["corrected"] == (after.argmax() == labels[i]) and row["hosts"] is row["rises"] is None


def test_transplants_are_those_of_pictures_pasted_by_hand(network, case):
    pixels, heats, labels, predictions, ids = case
    others = np.random.default_rng(8).integers(0, 256, (4, *SHAPE, 3), dtype=np.uint8)
    before = classifier(network)(others)
    asked = []

    def hosts(label, sample_id):
        asked.append((label, sample_id))
        return (others, before) if label else (others[:0], before[:0])

    rows = masking.transplants(classifier(network), pixels, heats, labels, predictions, ids, 0.1, 7, hosts).to_pylist()
    assert asked == list(zip(labels, ids)) and [(r["sample_id"], r["strategy"]) for r in rows] == [(i, s) for i in "bc" for s in ("transplant", "transplant_random")]
    for row in rows:
        i = ids.index(row["sample_id"])
        changes = []
        for other in others:
            picture = other.copy()
            for place in places(masking.mask("random" if row["strategy"].endswith("random") else "salient", heats[i], 0.1, 7, ids[i])):
                picture[place] = pixels[i][place]
            changes.append(answer(network, picture) - answer(network, other))
        wrong = [c[predictions[i]] for c in changes]
        assert row["wrong_confidence_change"] == pytest.approx(np.mean(wrong), abs=1e-12) and row["rises"] == np.mean([w > 0 for w in wrong])
        assert row["true_confidence_change"] == pytest.approx(np.mean([c[labels[i]] for c in changes]), abs=1e-12)
        assert row["hosts"] == 4 and row["corrected"] is None and row["share"] == 0.1
