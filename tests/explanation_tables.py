"""The tables of docs/results.md about explanations: `faultline mask` and `faultline sanity`. kept, table, cell: what reads a summary, draws a table, writes an interval."""

from __future__ import annotations

NETWORKS = {"resnet56": "ResNet-56", "squeezenet1_1": "SqueezeNet 1.1"}
MASKED = {"corrected": "share corrected", "wrong_confidence_change": "wrong class's confidence", "true_confidence_change": "true class's confidence"}
STRATEGIES = {"salient": "most salient", "moved": "the same shape elsewhere", "random": "random", "least": "least salient"}
SHARES = (0.01, 0.05)  # of the pixels
PASTED = {"rises": "images in which it rises", "change": "mean change"}
SIMILAR = {"profile_cosine": "ŝ, cosine", "profile_cosine_lively": "ŝ, cosine, without filters hardly alive", "profile_rank": "s̄, rank within layers", "map_rank": "heat map, rank"}


def masked(kept, table, cell) -> str:
    """What becomes of errors when 1% or 5% of the pixels are masked: a row a network, share and strategy."""
    found = []
    for name, network in NETWORKS.items():
        summary = kept(f"{name}-mask")
        for at in map(summary["shares"].index, SHARES):
            found += [[f"{network}, {summary['shares'][at]:.0%} {words}", *(cell(_point(summary["curves"][strategy][column], at)) for column in MASKED)] for strategy, words in STRATEGIES.items()]
    return table(["pixels masked", *MASKED.values()], found)


def masked_apart(kept, table, cell) -> str:
    """How many more errors come right where the most salient pixels are masked, on the same samples."""
    found = []
    for name, network in NETWORKS.items():
        summary = kept(f"{name}-mask")
        found += [[f"{network}, {summary['shares'][at]:.0%}", *(cell(_point(curve, at), 3, "+") for curve in summary["paired_curves"].values())] for at in map(summary["shares"].index, SHARES)]
    return table(["share corrected, most salient less", *(STRATEGIES[name.removeprefix("salient_minus_")] for name in summary["paired_curves"])], found)


def pasted(kept, table, cell) -> str:
    """What salient and random pixels do to the wrong class's confidence in other images of the class."""
    summary = kept("resnet56-mask")["transplant"]
    rows = [[f"{words} ({summary['pairs']:,} images)", *(cell(summary[f"{measure}{end}"]) for measure in PASTED)] for words, end in (("5% most salient", ""), ("5% random", "_random"), ("difference, same samples", "_minus_random"))]
    return table(["ResNet-56, pasted", *PASTED.values()], rows)


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
