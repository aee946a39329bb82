"""`faultline neighbors --evaluate`: section 3.2 of the paper as numbers with intervals, and its figures 4 and 5.

Every query counts once: what its neighbours say is averaged first, then intervals are over queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index import Run
from index.evaluate import Evaluation, Search, chances, ends
from jobs import charts, sheet
from jobs.experiment import Request, carry_out
from pipeline.experiment import Choice
from pipeline.intervals import CHANGE, FEW, Interval, bootstrap_mean, share_mean, share_means
from pipeline.statistics import Reference
from pipeline.store import Store, read_table

NEAR = 10  # neighbours that single numbers are about, as in the paper
EXAMPLES, SHOWN = 4, 6  # queries on a sheet, and neighbours of each
KINDS = ("same", "reverse", "either")
NAMES = {"standardised": "all layers", "unstandardised": "all layers, not standardised", "first": "first layers", "last": "last layers", "random": "random errors"}


@dataclass(frozen=True)
class Evaluate:
    """The verb."""

    experiment: Evaluation
    subset: str = "errors"
    figures: tuple[str, ...] = ("agreement", "errors", "colours", "neighbours", "ends")

    @property
    def also(self) -> tuple[str, ...]:
        return self.experiment.datasets

    def cost(self, samples: int) -> str:
        among = self.experiment.datasets
        return f"the {self.experiment.k} nearest of {samples:,} errors of {self.experiment.source} in {' and '.join(among)}, five ways; one pass over their profiles a unit, no image"

    def summarise(self, store: Store, dataset: str, reference: Reference, rows: pa.Table) -> dict:
        seed = self.experiment.seed
        by = {setting: _Queries(rows.filter(pc.equal(rows["setting"], setting))) for setting in dict.fromkeys(rows["setting"].to_pylist())}
        shares = {setting: {kind: _curve(queries.running(kind)) for kind in KINDS} for setting, queries in by.items()}
        wrong = by["all_samples"].running("misclassified")
        search = Search(self.experiment, store)
        label, prediction = (values[search.errors] for values in search.classes)
        queries = by["standardised"]
        inside = np.array([i in search.place for i in queries.ids], bool)
        near = {setting: q.table.filter(pc.less_equal(q.table["rank"], NEAR)) for setting, q in by.items()}
        colour = {setting: _mean_colour(near[setting], queries.ids) for setting in ("standardised", "first", "last", "random")}
        known = np.all([np.isfinite(values) for values in colour.values()], axis=0)
        first, last = ends(self.experiment.layout, self.experiment.split)
        summary = {
            "queries": len(queries.ids), "near": min(NEAR, queries.k), "pair_shares": shares, "error_shares": _curve(wrong), "dataset": dataset, "datasets": list(self.experiment.datasets),
            "chance": float(chances(label, prediction, queries.label, queries.prediction, inside).mean()),
            "base_rate": len(search.errors) / max(1, search.facts.num_rows), "first_filters": [first.start, first.stop], "last_filters": [last.start, last.stop],
            "colour_distance": {setting: share_mean(values[known]).to_json() for setting, values in colour.items()} if known.any() else {},
            "colour_differences": {f"first_minus_{other}": bootstrap_mean((colour["first"] - colour[other])[known], seed, ends=CHANGE).to_json() for other in ("last", "random")} if known.any() else {},
            "examples": _examples(by, dataset, seed),
        }  # fmt: skip
        return summary | {"result": _result(summary), "found": found(summary)}

    def draw(self, store: Store, summary: dict, folder: Path) -> None:
        alone, asked = summary["datasets"] == [summary["dataset"]], f"{summary['queries']:,} errors of {summary['dataset']}"
        among = "among themselves" if alone else f"in {' and '.join(summary['datasets'])}"
        bands = {name: _band(summary["pair_shares"][setting]["either"]) for setting, name in NAMES.items() if setting != "random"}
        words = charts.Words(f"Neighbours with the same two classes: {asked} {among}", "k nearest errors", "share with the same pair or its reverse", "bands: 95% intervals over queries")
        most = max(len(mean) for mean, _, _ in bands.values())
        charts.curves(folder / "agreement", range(1, most + 1), bands, words, {"by chance": summary["chance"]})
        band = _band(summary["error_shares"])
        words = charts.Words(f"Errors among the neighbours of errors: {summary['queries']:,} of data set {summary['dataset']}", f"k nearest among the samples of {' and '.join(summary['datasets'])}", "share that is misclassified", "band: 95% interval over queries")
        charts.curves(folder / "errors", range(1, len(band[0]) + 1), {"nearest by all layers": band}, words, {"base rate": summary["base_rate"]})
        words = charts.Words(f"Colours of neighbours: {asked}, {summary['near']} nearest", "distance of colour histograms (0: the same colours, 1: none in common)", "", "bars: 95% intervals over queries")
        points = {NAMES[setting]: tuple(interval[key] for key in ("estimate", "low", "high")) for setting, interval in summary["colour_distance"].items()}
        charts.bars(folder / "colours", points, words)
        pictures = _Pictures(store, summary)
        sheet.draw(folder / "neighbours", [pictures.strip(example, "standardised", "") for example in summary["examples"]], f"Errors of {summary['dataset']}, drawn at random, and the {'other errors nearest to them' if alone else f'errors nearest to them {among}'}")
        strips = [pictures.strip(example, setting, NAMES[setting]) for example in summary["examples"] for setting in ("first", "last")]
        sheet.draw(folder / "ends", strips, f"The same errors: nearest by the first and by the last layers {among}")


def evaluate(run: Run, source: str, within: str | None, name: str | None, split: str | None, request: Request) -> dict:
    """Do it, in the data sets of an index and by its reference. Raises BadRequest for what cannot be asked."""
    index = run.index(name)
    index.range_of(within)
    ends(run.manifest.layers, split)
    experiment = Evaluation(run.manifest.layers, source, (within,) if within else tuple(index.datasets), index.about["reference"], split, request.seed)
    return carry_out(Evaluate(experiment), replace(request, reference=index.about["reference"]))


class _Queries:
    """The rows of one setting as arrays: query by rank."""

    def __init__(self, table: pa.Table):
        self.table = table
        ranks = table["rank"].to_numpy()
        first = table.filter(pc.equal(table["rank"], 1))
        self.ids = first["sample_id"].to_pylist()
        self.label, self.prediction = (first[c].to_numpy() for c in ("label", "prediction"))
        starts = np.flatnonzero(ranks == 1)
        self.k = int(np.diff(np.append(starts, len(ranks))).min(initial=len(ranks)))
        at = starts[:, None] + np.arange(self.k)
        pair = np.array(table["pair"].to_pylist(), object)
        self._is = {"same": (pair == "same")[at], "reverse": (pair == "reverse")[at], "misclassified": (table["neighbor_label"].to_numpy() != table["neighbor_prediction"].to_numpy())[at]}
        self._is["either"] = self._is["same"] | self._is["reverse"]

    def running(self, what: str) -> np.ndarray:
        """float64 [Q, k]: of the first 1, 2, ... k neighbours the share for which it holds."""
        return self._is[what].cumsum(1) / np.arange(1, self.k + 1)


def _curve(values: np.ndarray) -> dict[str, list[float]]:
    """Of shares [Q, k], a query's of its 1, 2, ... k neighbours: mean and interval [k] each."""
    mean, low, high = share_means(values)
    return {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}


def _band(curve: dict) -> charts.Band:
    return curve["mean"], curve["low"], curve["high"]


def _mean_colour(table: pa.Table, ids: list[str]) -> np.ndarray:
    """float64 [Q]: the mean colour distance of each query's neighbours, NaN where none is known."""
    means = table.group_by("sample_id").aggregate([("colour_distance", "mean")])
    known = dict(zip(means["sample_id"].to_pylist(), means["colour_distance_mean"].to_pylist()))
    return np.array([np.nan if known.get(i) is None else known[i] for i in ids], float)


def _at(curve: dict, k: int, n: int) -> Interval:
    return Interval(*(curve[key][k - 1] for key in ("mean", "low", "high")), n)


def _result(summary: dict) -> dict[str, float]:
    """Plain numbers for stdout, at the `near` nearest."""
    k, n = summary["near"], summary["queries"]
    flat = {"evaluated": n}
    for name, curve in {**{f"either_{s}": summary["pair_shares"][s]["either"] for s in ("standardised", "unstandardised", "first", "last")}, "errors_among_all": summary["error_shares"]}.items():
        interval = _at(curve, min(k, len(curve["mean"])), n)
        flat |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
    flat |= {"base_rate": summary["base_rate"]}
    return flat | {f"colour_distance_{setting}": interval["estimate"] for setting, interval in summary["colour_distance"].items()}


def found(summary: dict) -> str:
    """Section 3.2 in one sentence, as these samples have it."""
    k, n = summary["near"], summary["queries"]
    share = {setting: _at(summary["pair_shares"][setting]["either"], min(k, len(summary["pair_shares"][setting]["either"]["mean"])), n) for setting in ("standardised", "unstandardised", "first", "last")}
    wrong = _at(summary["error_shares"], min(k, len(summary["error_shares"]["mean"])), n)
    text = (
        f"{n:,} error{'s' * (n != 1)} of {summary['dataset']} asked; of the {k} nearest errors {share['standardised'].text(3)} confuse the same two classes, by chance {summary['chance']:.3f}, without standardisation {share['unstandardised'].text(3)}, "
        f"by the first layers {share['first'].text(3)}, by the last {share['last'].text(3)}; of the {k} nearest of all samples {wrong.text(3)} are errors (base rate {summary['base_rate']:.3f})"
    )
    if n < FEW:
        return f"{text}; {n:,} are too few to conclude anything from"
    if not summary["colour_differences"]:
        return text
    gap, chance = (Interval(**summary["colour_differences"][f"first_minus_{other}"]) for other in ("last", "random"))
    closer = "closer in colour than" if gap.high < 0 else "further apart in colour than" if gap.low > 0 else "not clearly closer in colour than"
    return f"{text}; neighbours by the first layers are {closer} those by the last ({gap.text(3, '+')}), {'closer' if chance.high < 0 else 'not clearly closer'} than random errors ({chance.text(3, '+')})"


def _examples(by: dict[str, _Queries], dataset: str, seed: int) -> list[dict]:
    """A few queries, drawn by the seed, with their nearest."""
    ids = by["standardised"].ids
    order = np.argsort(Choice("errors", seed).hashes(ids), kind="stable")[:EXAMPLES]
    examples = []
    for i in order:
        hits = {}
        for setting in ("standardised", "first", "last"):
            table = by[setting].table
            mine = table.filter(pc.and_(pc.equal(table["sample_id"], ids[i]), pc.less_equal(table["rank"], SHOWN)))
            hits[setting] = mine.select(["neighbor_dataset", "neighbor_id", "similarity", "pair"]).to_pylist()
        examples.append({"dataset": dataset, "sample_id": ids[i], "neighbors": hits})
    return examples


class _Pictures:
    """The facts and thumbnails of all images on the sheets, each file read once."""

    def __init__(self, store: Store, summary: dict):
        self.manifest = store.manifest()
        wanted = {(e["dataset"], e["sample_id"]) for e in summary["examples"]}
        wanted |= {(hit["neighbor_dataset"], hit["neighbor_id"]) for e in summary["examples"] for hits in e["neighbors"].values() for hit in hits}
        self.known: dict[tuple[str, str], dict] = {}
        for dataset in sorted({d for d, _ in wanted}):
            for file in store.files(dataset):
                at = [row for row, i in enumerate(read_table(file, ["sample_id"])["sample_id"].to_pylist()) if (dataset, i) in wanted]
                for row in read_table(file, ["sample_id", "label", "prediction", "prediction_confidence", "thumbnail"]).take(at).to_pylist() if at else ():
                    names = {f"{key}_name": self.manifest.name_of(row[key]) for key in ("label", "prediction")}
                    self.known[dataset, row["sample_id"]] = row | names | {"dataset": dataset, "confidence": row["prediction_confidence"]}

    def strip(self, example: dict, setting: str, heading: str) -> sheet.Strip:
        neighbours = [self.known[hit["neighbor_dataset"], hit["neighbor_id"]] | {"similarity": hit["similarity"], "pair": hit["pair"]} for hit in example["neighbors"][setting]]
        return sheet.Strip(self.known[example["dataset"], example["sample_id"]], neighbours, heading)
