"""`faultline profile`: figures 1 and 2 of the paper, and the two claims of its section 2.1 as numbers with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from index import Run
from jobs import charts
from jobs.experiment import Request, carry_out
from jobs.progress import ProgressBar, say
from pipeline.depth import DepthProfile, parts, sorted_within_layers
from pipeline.errors import printable
from pipeline.experiment import Choice, results_folder
from pipeline.intervals import FEW, Interval, bootstrap_difference, bootstrap_mean, bootstrap_means, margin
from pipeline.statistics import Moments, Reference
from pipeline.store import Store, saliency_of

GROUPS = ("misclassified", "correct")


@dataclass(frozen=True)
class Profile:
    """The verb. `choice_of` repeats the choice of samples for the group means."""

    experiment: DepthProfile
    max_samples: int | None
    seed: int
    subset: str = "all"
    figures: tuple[str, ...] = ("saliency", "standardised", "depth")
    also: tuple[str, ...] = ()

    def cost(self, samples: int) -> str:
        return f"the profiles of {samples:,} samples are read twice, no image"

    def summarise(self, store: Store, dataset: str, reference: Reference, rows: pa.Table) -> dict:
        """Means and 95% intervals over samples: bootstrap, of the layers BCa, each layer by itself; Student's of every filter (`margins_within_layers`: half their lengths, in the
        order of `sorted_within_layers`), of which there are too many to draw."""
        wrong = rows["label"].to_numpy() != rows["prediction"].to_numpy()
        salient, contrast = rows["saliency"].to_numpy(), rows["deep"].to_numpy().astype(np.float64) - rows["early"].to_numpy()
        layers = rows["layers"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
        groups, summary = {}, {}
        for name, which in zip(GROUPS, (wrong, ~wrong)):
            if which.any():
                mean, low, high = bootstrap_means(layers[which], self.seed)
                groups[name] = {
                    "samples": int(which.sum()),
                    "saliency": bootstrap_mean(salient[which], self.seed).to_json(),
                    "deep_minus_early": bootstrap_mean(contrast[which], self.seed).to_json(),
                    "thirds": {part: bootstrap_mean(rows[part].to_numpy()[which], self.seed).to_json() for part in ("early", "middle", "deep")},
                    "layers": {"mean": _short(mean), "low": _short(low), "high": _short(high)},
                }
        if len(groups) == 2:
            summary["saliency_difference"] = bootstrap_difference(salient[wrong], salient[~wrong], self.seed).to_json()
        means = self._group_means(store, dataset, rows.num_rows)
        names = [name for name, _ in self.experiment.layout.layers]
        early, _, deep = parts(len(names))
        vectors = {"saliency": (means["all"].mean, margin(means["all"].std, means["all"].count))}
        vectors |= {name: (_standardise(means[name].mean, reference), _scale(margin(means[name].std, means[name].count), reference)) for name in groups}
        curves = {name: sorted_within_layers(mean, self.experiment.layout, half) for name, (mean, half) in vectors.items()}
        about = {
            "groups": groups, "dataset": dataset, "dead_filters": int((~reference.live).sum()), "layers": names,
            "early_layers": [names[early][0], names[early][-1]], "deep_layers": [names[deep][0], names[deep][-1]],
            "sorted_within_layers": {name: [_short(mean) for mean, _ in layers] for name, layers in curves.items()},
            "margins_within_layers": {name: [_short(half, 3) for _, half in layers] for name, layers in curves.items()},
        }  # fmt: skip
        return summary | about | {"result": _result(groups, summary), "found": found(groups, summary)}

    def _group_means(self, store: Store, dataset: str, total: int) -> dict[str, Moments]:
        """Moments of s̄ of all chosen samples, of the misclassified and of the correct ones: each divided by its own count."""
        filters = self.experiment.layout.total
        choice = Choice.smallest(store, dataset, self.subset, self.max_samples, self.seed)
        sums = {name: Moments(0, np.zeros(filters), np.zeros(filters)) for name in ("all", *GROUPS)}
        with ProgressBar("group means", total) as bar:
            for _, _, batch in store.blocks(dataset, ["sample_id", "label", "prediction", "saliency"]):
                at = choice.rows(batch)
                vectors = saliency_of(batch)[at]
                wrong = (batch["label"].to_numpy() != batch["prediction"].to_numpy())[at]
                for name, part in zip(sums, (vectors, vectors[wrong], vectors[~wrong])):
                    sums[name] = sums[name] + Moments.of(part)
                bar.advance(len(at))
        return sums

    def draw(self, store: Store, summary: dict, folder: Path) -> None:
        dataset, layers = summary["dataset"], summary["layers"]
        across, note = "layers, shallow to deep, each of the same width", "bands: 95% intervals of each filter's mean over samples"
        words = charts.Words(f"Filter saliency of data set {dataset}, mean over {sum(g['samples'] for g in summary['groups'].values()):,} samples", f"{across}; filters sorted within", "|gradient|", note)
        charts.within_layers(folder / "saliency", {"all samples": banded(summary, "saliency")}, layers, words, log=True)
        named = {f"{name} ({group['samples']:,})": name for name, group in summary["groups"].items()}
        words = charts.Words(f"Standardised filter saliency of data set {dataset}, means of the groups", f"{across}; filters sorted within", "standardised saliency", note)
        charts.within_layers(folder / "standardised", {shown: banded(summary, name) for shown, name in named.items()}, layers, words)
        bands = {shown: tuple(summary["groups"][name]["layers"][key] for key in ("mean", "low", "high")) for shown, name in named.items()}
        words = charts.Words(f"Where data set {dataset} is salient: mean over the filters of each layer", across, "standardised saliency")
        charts.by_layer(folder / "depth", bands, layers, words)


def banded(summary: dict, name: str) -> list[charts.Band]:
    """A curve of `sorted_within_layers` with its margins: (mean, low, high) of the filters of each layer."""
    layers = zip(summary["sorted_within_layers"][name], summary["margins_within_layers"][name])
    return [(mean, np.subtract(mean, half).tolist(), np.add(mean, half).tolist()) for mean, half in layers]


def profile(request: Request, sample: str | None) -> dict:
    """Do it; with `sample`, an ID, also draw that image's own profile into experiments/profile/sample.png and .svg. Raises BadRequest."""
    run = Run.open(request.run)
    place = run.find(sample) if sample else None
    dataset = request.dataset_of(run.store)
    reference = request.reference_of(run.store, dataset)
    summary = carry_out(Profile(DepthProfile(run.manifest.layers, reference), request.max_samples, request.seed), request)
    if place:
        vector = run.standardised(place, reference)[0]
        facts = run.record(place, ["label", "prediction"])
        names = [run.manifest.name_of(facts[key]) or str(facts[key]) for key in ("label", "prediction")]
        alone = [(values, values, values) for values, _ in sorted_within_layers(vector, run.manifest.layers)]  # one image is what it is
        curves = {f"{place.dataset}:{place.sample_id}": alone, **{f"{name}, mean": banded(summary, name) for name in summary["groups"]}}
        words = charts.Words(f"One image: true {printable(names[0])}, predicted {printable(names[1])}", "layers, shallow to deep, each of the same width; filters sorted within", "standardised saliency", "bands of the means: 95% intervals over samples")
        path = results_folder(run.store.run, "profile") / "sample"
        charts.within_layers(path, curves, summary["layers"], words)
        say(f"its own profile: {printable(path)}.{{png,svg}}")
    return summary


def found(groups: dict, summary: dict) -> str:
    """Section 2.1's two claims in one sentence, as these samples have them."""
    if len(groups) < 2:
        only = next(iter(groups))
        return f"all {groups[only]['samples']:,} samples are {only}: there are no two groups to compare"
    salience, gap = ({name: Interval(**groups[name][key]) for name in GROUPS} for key in ("saliency", "deep_minus_early"))
    difference = Interval(**summary["saliency_difference"])
    more = "more salient than" if difference.low > 0 else "less salient than" if difference.high < 0 else "not clearly more salient than"
    if min(groups[name]["samples"] for name in GROUPS) < FEW:
        return (
            f"{groups['misclassified']['samples']:,} misclassified and {groups['correct']['samples']:,} correct samples are too few to conclude anything from "
            f"(mean standardised saliency {salience['misclassified'].text()} against {salience['correct'].text()})"
        )
    where = {name: "the deep layers stand out" if gap[name].low > 0 else "the early layers stand out" if gap[name].high < 0 else "neither end of the network stands out" for name in GROUPS}
    return (
        f"misclassified samples are {more} correct ones (mean standardised saliency {salience['misclassified'].text()} against {salience['correct'].text()}); "
        f"for misclassified samples {where['misclassified']} (deep minus early {gap['misclassified'].text(sign='+')}), for correct ones {where['correct']} ({gap['correct'].text(sign='+')})"
    )


def _result(groups: dict, summary: dict) -> dict[str, float]:
    """Plain numbers for stdout."""
    flat = {"samples": sum(group["samples"] for group in groups.values()), "misclassified": groups.get("misclassified", {}).get("samples", 0)}
    intervals = {f"{key}_{name}": group[key] for key in ("saliency", "deep_minus_early") for name, group in groups.items()} | {key: value for key, value in summary.items() if key == "saliency_difference"}
    for name, interval in intervals.items():
        flat |= {name: interval["estimate"]}
        flat |= {f"{name}_low": interval["low"], f"{name}_high": interval["high"]} if interval["n"] > 2 or interval["low"] < interval["high"] else {}  # of one sample there is none
    return flat


def _standardise(mean: np.ndarray, reference: Reference) -> np.ndarray:
    """The mean of ŝ of a group from its mean of s̄, float64 [F]: standardising is affine."""
    return _scale(mean - reference.mean, reference)


def _scale(distance: np.ndarray, reference: Reference) -> np.ndarray:
    """What a distance of s̄, float64 [F], is of ŝ: over sigma, 0 for the dead."""
    return np.where(reference.live, distance / np.where(reference.live, reference.std, 1.0), 0.0)


def _short(values: np.ndarray, digits: int = 7) -> list[float]:
    """Seven digits are float32's own."""
    return [float(f"{value:.{digits}g}") for value in values]
