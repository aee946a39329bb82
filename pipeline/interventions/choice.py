"""Which filters of a sample an intervention is about. numpy alone; nothing here depends on batch, unit or order of samples.

A strategy is a ranking of filters, and the k chosen are its first k: they are nested, the 5 of k = 5 among the 20 of k = 20.
Equal filters are ranked by column. Dead filters (sigma <= 1e-12) have no ŝ to speak of: only `random` may choose them.
"""

from __future__ import annotations

import hashlib

import numpy as np

STRATEGIES = ("salient", "random", "random_live", "least")


def ranking(strategy: str, standardised: np.ndarray, live: np.ndarray, seed: int, sample_id: str) -> np.ndarray:
    """Columns int64, first chosen first: [F] for `random`, [number of live filters] for the others.

    standardised: ŝ float32 [F] of the sample; live: bool [F]. `salient`: highest ŝ; `least`: lowest signed ŝ; `random`: an order of
    all F drawn for (seed, sample_id); `random_live`: the same order without the dead. Raises ValueError for another strategy.
    """
    if strategy in ("salient", "least"):
        columns = np.flatnonzero(live)
        keys = standardised[columns].astype(np.float64)
        return columns[np.argsort(-keys if strategy == "salient" else keys, kind="stable")]
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is '{strategy}'; there are {', '.join(STRATEGIES)}")
    order = np.argsort(draws(len(live), seed, sample_id), kind="stable")
    return order if strategy == "random" else order[live[order]]


def choose(strategy: str, k: int, standardised: np.ndarray, live: np.ndarray, seed: int, sample_id: str) -> np.ndarray:
    """The first k of `ranking`, int64 [k]; all of it where it has fewer (k above F, or above the number of live filters)."""
    return ranking(strategy, standardised, live, seed, sample_id)[:k]


def draws(count: int, seed: int, sample_id: str) -> np.ndarray:
    """uint64 [count] from Philox, whose raw words are the same in every version of numpy and on every machine."""
    digest = hashlib.sha256(f"{seed}\0".encode() + sample_id.encode("utf-8", "surrogateescape")).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], "<u8")).random_raw(count)
