"""The tables of docs/results.md about explanations: `faultline mask` and `faultline sanity`. kept, table, cell: what reads a summary, draws a table, writes an interval."""

from __future__ import annotations

NETWORKS = {"resnet56": "ResNet-56", "squeezenet1_1": "SqueezeNet 1.1"}
MASKED = {"corrected": "share corrected", "wrong_confidence_change": "wrong class's confidence", "true_confidence_change": "true class's confidence"}
STRATEGIES = {"salient": "most salient", "moved": "the same shape elsewhere", "random": "random", "least": "least salient"}
SHARE = 0.05  # of the pixels
SIMILAR = {"profile_cosine": "ŝ, cosine", "profile_cosine_lively": "ŝ, cosine, without filters hardly alive", "profile_rank": "s̄, rank within layers", "map_rank": "heat map, rank"}


def masked(kept, table, cell) -> str:
    """What becomes of errors when 5% of the pixels are masked: a row a network and strategy."""
    found = []
    for name, network in NETWORKS.items():
        summary = kept(f"{name}-mask")
        at = summary["shares"].index(SHARE)
        found += [[f"{network}, {words}", *(cell(_point(summary["curves"][strategy][column], at)) for column in MASKED)] for strategy, words in STRATEGIES.items()]
    return table(["pixels masked", *MASKED.values()], found)


def sanity(kept, table, cell) -> str:
    """How similar profiles and maps are as a network is randomised: a row a stage from its head on, then the other samples."""
    found = []
    for name, network in NETWORKS.items():
        summary = kept(f"{name}-sanity")
        found += [[f"{network}, down to {layer}", *(cell(_point(summary[measure], stage)) for measure in SIMILAR)] for stage, layer in enumerate(summary["stages"]) if layer]
        found.append([f"{network}, {summary['samples']} errors: another sample", *(cell(summary["other"][measure]) for measure in SIMILAR)])
    return table(["randomised", *SIMILAR.values()], found)


def _point(curve: dict, at: int) -> dict:
    return {"estimate": curve["mean"][at], "low": curve["low"][at], "high": curve["high"][at]}
