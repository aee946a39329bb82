"""The table of docs/results.md about `faultline sanity`."""

from __future__ import annotations

MEASURES = {"profile_cosine": "ŝ, cosine", "profile_cosine_lively": "ŝ, cosine, without filters hardly alive", "profile_rank": "s̄, rank within layers", "map_rank": "heat map, rank"}
NETWORKS = {"resnet56-sanity": "ResNet-56", "squeezenet1_1-sanity": "SqueezeNet 1.1"}


def rows(summary: dict, network: str, cell) -> list[list[str]]:
    """Of one network: a row a stage from its head on, then the other samples. cell: what writes an interval."""
    found = []
    for stage, layer in enumerate(summary["stages"]):
        if layer:
            points = ({"estimate": summary[name]["mean"][stage], "low": summary[name]["low"][stage], "high": summary[name]["high"][stage]} for name in MEASURES)
            found.append([f"{network}, down to {layer}", *map(cell, points)])
    return [*found, [f"{network}, {summary['samples']} errors: another sample", *(cell(summary["other"][name]) for name in MEASURES)]]
