"""Pixels masked by how salient they are, and pasted elsewhere, and what that does to confidences (section 3.4, figure 8). Mathematics alone.

Everything is done to the pixels that the network is shown, uint8 [H, W, 3] after resizing and cropping, so that a picture of it is exactly what was computed.
Pixels are ranked by a heat [H, W], larger where the failing filters are more sensitive (`explanation.heat.heat` of eq. 4); a strategy's masks are nested in the
share that is masked, and depend on neither batch, unit nor order of samples.

The paper does not say what masked pixels are filled with. `mean`: the image's own mean colour; `blur`: the image itself, blurred until its details are gone;
`noise`: normal noise with the mean and spread of each of the image's channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from pipeline.interventions.choice import draws

STRATEGIES = ("salient", "moved", "random", "least")
FILLS = ("mean", "blur", "noise")
BLUR = 10  # the shorter side in standard deviations of the blur
TOGETHER = 2**19  # pixels classified at once on a CPU: 10 images of 224 x 224

EFFECTS = pa.schema(
    [("sample_id", pa.string()), ("strategy", pa.string()), ("share", pa.float64()), ("wrong_confidence_change", pa.float64()), ("true_confidence_change", pa.float64()),
     ("corrected", pa.bool_()), ("hosts", pa.int32()), ("rises", pa.float64())]
)  # fmt: skip

Classify = Callable[[np.ndarray], np.ndarray]  # uint8 [B, H, W, 3] -> softmax probabilities float64 [B, C]


def mask(strategy: str, heat: np.ndarray, share: float, seed: int, sample_id: str, among: np.ndarray | None = None) -> np.ndarray:
    """bool [H, W], true where a pixel is masked: round(share H W) of them, at least one, or all of `among` where those are fewer.

    heat: float [H, W]; among: bool [H, W], the pixels that may be masked (None: all). `salient`: the largest heat; `least`: the smallest; `next`: those that follow
    the salient ones; `random`: drawn for (seed, sample_id); `moved`: the salient mask moved as a whole, around the edges, as far as drawn, so that its shape is
    the same and its place is not (without `among` alone). Of equal heat the first in reading order. Raises ValueError for another strategy.
    """
    ranking, most = _ranking(strategy, heat, seed, sample_id, among), max(1, round(share * heat.size))
    first = most if strategy == "next" else 0
    chosen = np.zeros(heat.size, bool)
    chosen[ranking[first : first + most]] = True
    chosen = chosen.reshape(heat.shape)
    if strategy != "moved":
        return chosen
    return np.roll(chosen, [int(draw % side) for draw, side in zip(draws(2, seed, sample_id), heat.shape)], (0, 1))


def _ranking(strategy: str, heat: np.ndarray, seed: int, sample_id: str, among: np.ndarray | None) -> np.ndarray:
    """Positions int64 in reading order, first masked first."""
    positions = np.arange(heat.size) if among is None else np.flatnonzero(among)
    if strategy == "random":
        return positions[np.argsort(draws(heat.size, seed, sample_id)[positions], kind="stable")]
    if strategy not in (*STRATEGIES, "next") or (strategy == "moved" and among is not None):
        raise ValueError(f"strategy is '{strategy}'; there are {', '.join((*STRATEGIES, 'next'))}, and moved has no `among`")
    keys = heat.astype(np.float64).ravel()[positions]
    return positions[np.argsort(keys if strategy == "least" else -keys, kind="stable")]


def filling(pixels: np.ndarray, fill: str, seed: int, sample_id: str) -> np.ndarray:
    """What masked pixels of an image uint8 [H, W, 3] are given, uint8 [H, W, 3]. Noise is drawn for (seed, sample_id). Raises ValueError for another fill."""
    values = pixels.astype(np.float64)
    mean = values.mean((0, 1))
    if fill == "mean":
        found = np.broadcast_to(mean, pixels.shape)
    elif fill == "blur":
        from scipy.ndimage import gaussian_filter

        spread = max(1.0, min(pixels.shape[:2]) / BLUR)
        found = gaussian_filter(values, (spread, spread, 0), mode="nearest")
    elif fill == "noise":
        random = np.random.default_rng(draws(4, seed, sample_id).tolist())
        found = mean + values.std((0, 1)) * random.standard_normal(pixels.shape)
    else:
        raise ValueError(f"fill is '{fill}'; there are {', '.join(FILLS)}")
    return np.clip(np.rint(found), 0, 255).astype(np.uint8)


def paste(mask: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`target` with the pixels of `source` where `mask` [H, W] is true; both uint8 [..., H, W, 3]."""
    return np.where(mask[..., None], source, target)


def effects(
    classify: Classify, pixels: np.ndarray, heats: np.ndarray, labels: np.ndarray, predictions: np.ndarray, sample_ids: Sequence[str], shares: Sequence[float],
    fill: str, seed: int, outside: Sequence[np.ndarray | None],
) -> pa.Table:  # fmt: skip
    """`EFFECTS`: a row for every sample, strategy and share, in that order.

    pixels: uint8 [N, H, W, 3]; heats: float [N, H, W]; labels, predictions: int [N]; outside: of each sample bool [H, W], the pixels outside its object's boxes, or
    None; where it is there, `salient_outside` and `random_outside` follow, which mask there alone. Changes are of softmax probabilities, after less before: wrong_
    of the class `predictions`, true_ of `labels`. corrected: the new prediction is the label. hosts and rises are null.
    """
    rows: list[dict] = []
    for i, sample_id in enumerate(sample_ids):
        filled = filling(pixels[i], fill, seed, sample_id)
        settings = [(s, s, share, None) for s in STRATEGIES for share in shares]
        if outside[i] is not None and outside[i].any():
            settings += [(f"{s}_outside", s, share, outside[i]) for s in ("salient", "random") for share in shares]
        masks = [mask(strategy, heats[i], share, seed, sample_id, among) for _, strategy, share, among in settings]
        after = classify(np.stack([pixels[i], *(paste(m, filled, pixels[i]) for m in masks)]))
        change, right = after[1:] - after[0], after[1:].argmax(1) == labels[i]
        rows += [
            _row(sample_id, name, share, float(change[at, predictions[i]]), float(change[at, labels[i]]), bool(right[at]))
            for at, (name, _, share, _) in enumerate(settings)
        ]
    return pa.Table.from_pylist(rows, EFFECTS)


def transplants(
    classify: Classify, pixels: np.ndarray, heats: np.ndarray, labels: np.ndarray, predictions: np.ndarray, sample_ids: Sequence[str], share: float, seed: int,
    hosts: Callable[[int, str], tuple[np.ndarray, np.ndarray]],
) -> pa.Table:  # fmt: skip
    """`EFFECTS`: a row for every sample and each of two regions of it that are pasted, at their place, into other images of its class: `transplant`, its `share` most
    salient pixels, and `transplant_random`, as many drawn ones.

    hosts(label, sample_id) -> (uint8 [T, H, W, 3], their probabilities [T, C]): images of that class and this size that the network is right about, not the sample
    itself; a sample without any has no row. hosts: T; rises: the share of them in which the confidence of the wrong class, the sample's own prediction, rises;
    changes are means over them, corrected is null. Other arguments as in `effects`.
    """
    rows = []
    for i, sample_id in enumerate(sample_ids):
        others, before = hosts(int(labels[i]), sample_id)
        for name, strategy in (("transplant", "salient"), ("transplant_random", "random")) if len(others) else ():
            change = classify(paste(mask(strategy, heats[i], share, seed, sample_id), pixels[i], others)) - before
            wrong = change[:, predictions[i]]
            rows.append(_row(sample_id, name, share, float(wrong.mean()), float(change[:, labels[i]].mean()), None, len(others), float((wrong > 0).mean())))
    return pa.Table.from_pylist(rows, EFFECTS)


def _row(*values: object) -> dict:
    return dict(zip(EFFECTS.names, (*values, *[None] * (len(EFFECTS) - len(values)))))
