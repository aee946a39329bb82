"""`faultline prune`: figure 3 of the paper. Filters of every misclassified sample are turned off, a few of the network's at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import charts
from jobs.experiment import Request, carry_out, standards
from pipeline.errors import BadRequest, printable
from pipeline.experiment import Rows, batches, images_of, network_of
from pipeline.filters import FilterLayout
from pipeline.intervals import CHANGE, FEW, Interval, bootstrap_mean, bootstrap_means, paired_shares, wilson
from pipeline.samples import Sample
from pipeline.statistics import Reference
from pipeline.store import Store, saliency_of

GRID = (1, 2, 5, 10, 20, 50, 100)
STRATEGIES = {"salient": "most salient", "random": "random", "random_live": "random, live alone", "least": "least salient, live alone"}
MODES = ("map", "weights-and-bias")
SCHEMA = pa.schema([("sample_id", pa.string()), ("strategy", pa.string()), ("k", pa.int32()), ("wrong_confidence_change", pa.float64()), ("true_confidence_change", pa.float64()), ("corrected", pa.bool_())])
PAIRS = (("salient", "random_live"), ("random_live", "least"))  # whose difference on the same samples the sentence is about
NEAR = 20  # filters that the sentence is about, or the grid's nearest


@dataclass(frozen=True)
class Pruning:
    """The experiment. grid: how many filters; mode: see `pipeline/interventions/pruning.py`; layers: `FIRST..LAST`, whose filters may be chosen; `reference` standardises."""

    reference: str
    grid: tuple[int, ...]
    mode: str
    layers: str | None
    seed: int
    name: str = "prune"
    images: bool = True
    columns: tuple[str, ...] = ("saliency",)
    schema: pa.Schema = SCHEMA

    @property
    def weight(self) -> float:
        return len(STRATEGIES) * len(self.grid) / 3  # an extraction is worth three forwards

    def settings(self) -> dict[str, object]:
        return {"strategies": list(STRATEGIES), "k": list(self.grid), "mode": self.mode, "layers": self.layers}

    def start(self, run: Path, device: str) -> Rows:
        from pipeline.interventions.pruning import Pruner, effects

        manifest, network = network_of(run, device)
        standard = Reference.read(run / "statistics" / f"{self.reference}.parquet", manifest.layers)
        among = manifest.layers.columns(self.layers) if self.layers is not None else slice(None)
        pruners: dict[tuple[int, ...], Pruner] = {}

        def rows(samples, profiles):
            parts = []
            for at in batches(samples, 1024):
                images = images_of([samples[i] for i in at], manifest.preprocessing, device)
                shape = tuple(images.shape[1:])
                if shape not in pruners:
                    pruners[shape] = Pruner(network, manifest.layers, images[:3], self.mode)
                facts = profiles.take(pa.array(at))
                ids, labels, predictions = facts["sample_id"].to_pylist(), facts["label"].to_numpy(), facts["prediction"].to_numpy()
                parts.append(effects(pruners[shape], images, labels, predictions, standard.standardise(saliency_of(facts)), standard.live, ids, self.grid, tuple(STRATEGIES), self.seed, among))
            return pa.concat_tables(parts)

        return rows


@dataclass(frozen=True)
class Prune:
    """The verb."""

    experiment: Pruning
    subset: str = "errors"
    figures: tuple[str, ...] = ("wrong_confidence", "true_confidence", "corrected")
    also: tuple[str, ...] = ()

    def check(self, store: Store, samples: list[Sample]) -> None:
        """Raises BadRequest if what a filter's map is cannot be told."""
        from pipeline.interventions.pruning import Pruner

        manifest, network = network_of(store.run, "cpu")
        for at in islice(batches(samples, 3), 1):
            Pruner(network, manifest.layers, images_of([samples[i] for i in at], manifest.preprocessing, "cpu"), self.experiment.mode)

    def cost(self, samples: int) -> str:
        pairs = samples * len(STRATEGIES) * len(self.experiment.grid)
        return f"{samples:,} misclassified samples x {len(STRATEGIES)} strategies x {len(self.experiment.grid)} sizes = {pairs:,} prunings, each a forward of one image or less"

    def summarise(self, store: Store, dataset: str, reference: Reference, rows: pa.Table) -> dict:
        """Of every strategy and k the mean changes with bootstrap intervals over samples, and the share corrected with Wilson's; `paired` and `paired_wrong`: of the shares
        corrected and of the changes of the wrong class's confidence the differences on the same samples, at the k that the sentence is about."""
        curves: dict[str, dict] = {}
        grid, seed = self.experiment.grid, self.experiment.seed
        at = int(np.argmin(np.abs(np.array(grid) - NEAR)))
        corrected, wrong = {}, {}
        for strategy in STRATEGIES:
            table = rows.filter(pc.equal(rows["strategy"], strategy))
            by = {column: table[column].to_numpy().reshape(-1, len(grid)).astype(np.float64) for column in SCHEMA.names[3:]}
            curves[strategy] = {column: dict(zip(("mean", "low", "high"), (v.tolist() for v in bootstrap_means(by[column], seed, ends=CHANGE)))) for column in SCHEMA.names[3:5]}
            shares = [wilson(int(column.sum()), len(column)) for column in by["corrected"].T]
            curves[strategy]["corrected"] = {"mean": [s.estimate for s in shares], "low": [s.low for s in shares], "high": [s.high for s in shares]}
            corrected[strategy], wrong[strategy] = by["corrected"][:, at], by["wrong_confidence_change"][:, at]
        samples = rows.num_rows // (len(STRATEGIES) * len(grid))
        summary = {"dataset": dataset, "samples": samples, "k": list(grid), "mode": self.experiment.mode, "layers": self.experiment.layers, "dead_filters": int((~reference.live).sum()), "curves": curves}
        summary["paired"] = {f"{a}_minus_{b}": paired_shares(corrected[a], corrected[b]).to_json() for a, b in PAIRS}
        summary["paired_wrong"] = {f"{a}_minus_{b}": bootstrap_mean(wrong[a] - wrong[b], seed, ends=CHANGE).to_json() for a, b in PAIRS}
        result = {"samples": samples, "dead_filters": summary["dead_filters"], "k": grid[at]}
        result |= {f"{column}_{strategy}": curves[strategy][column]["mean"][at] for column in SCHEMA.names[3:] for strategy in STRATEGIES}
        return summary | {"result": result, "found": found(summary, at)}

    def draw(self, store: Store, summary: dict, folder: Path) -> None:
        asked = f"{summary['samples']:,} misclassified samples of data set {summary['dataset']}"
        for figure, column, up in (("wrong_confidence", "wrong_confidence_change", "change of the wrong class's confidence"), ("true_confidence", "true_confidence_change", "change of the true class's confidence"), ("corrected", "corrected", "share corrected")):
            bands = {name: tuple(summary["curves"][strategy][column][key] for key in ("mean", "low", "high")) for strategy, name in STRATEGIES.items()}
            dead = f"{summary['dead_filters']:,} dead filter{' is' if summary['dead_filters'] == 1 else 's are'}"
            way = "" if summary["mode"] == MODES[0] else "weights and bias alone; "
            note = f"{way}bands: 95% intervals over samples; {dead} chosen by 'random' alone"
            charts.curves(folder / figure, summary["k"], bands, charts.Words(f"Filters turned off in {asked}", f"filters{of_layers(summary)} turned off", up, note), log=True)


def prune(request: Request, ks: str | None, mode: str, layers: str | None) -> dict:
    """Do it. Raises BadRequest for a grid, a mode or layers that do not exist."""
    store = Store(request.run.expanduser().absolute())
    if mode not in MODES:
        raise BadRequest(f"--mode: '{printable(mode)}' is not one of {', '.join(MODES)}")
    reference = request.reference_of(store, request.dataset_of(store))
    manifest = store.manifest()
    total = filters_of(manifest.layers, layers, standards(store, reference, manifest.aggregation))
    return carry_out(Prune(Pruning(reference, grid_of(ks, GRID, total), mode, layers, request.seed)), request)


def filters_of(layout: FilterLayout, layers: str | None, reference: Reference) -> int:
    """How many may be chosen: the live ones. Raises BadRequest for layers that the network does not have, or whose filters are all dead."""
    live = int(reference.live[layout.columns(layers) if layers is not None else slice(0, layout.total)].sum())
    if not live:
        raise BadRequest(f"--layers: all filters of {printable(layers or 'the network')} are dead in the reference (sigma is 0): there is nothing to choose from")
    return live


def of_layers(summary: dict) -> str:
    """` of layer1..layer2`, where only some layers were asked for."""
    return f" of {summary['layers']}" if summary.get("layers") else ""


def grid_of(text: str | None, default: tuple[int, ...], most: int) -> tuple[int, ...]:
    """`1,5,20` as numbers, ascending; the default as far as there are filters. Raises BadRequest naming -k."""
    try:
        grid = tuple(sorted({int(part) for part in text.split(",")})) if text is not None else tuple(k for k in default if k <= most)
    except ValueError:
        grid = (0,)
    if not 1 <= grid[0] <= grid[-1] <= most:
        raise BadRequest(f"-k: '{printable(text)}' is no list of numbers from 1 to {most}, the live filters that there are, such as 1,5,20")
    return grid


def found(summary: dict, at: int) -> str:
    """Figure 3 in one sentence, at one k."""
    curves, n = summary["curves"], summary["samples"]

    def interval(strategy: str, column: str) -> Interval:
        return Interval(*(curves[strategy][column][key][at] for key in ("mean", "low", "high")), n)

    share = {s: interval(s, "corrected") for s in STRATEGIES}
    drop = {s: interval(s, "wrong_confidence_change") for s in STRATEGIES}
    apart, fall = ([Interval(**summary[of][f"{a}_minus_{b}"]) for a, b in PAIRS] for of in ("paired", "paired_wrong"))
    few = f"; {'1 is' if n == 1 else f'{n:,} are'} too few to conclude anything from"
    doubt = few if n < FEW else "" if all(gap.low > 0 for gap in apart) else ", the reverse of what the paper found" if any(gap.high < 0 for gap in apart) else " (not all clearly apart)"
    way = "" if summary["mode"] == MODES[0] else ", weights and bias alone,"
    return (
        f"turning off the {summary['k'][at]} most salient filters{of_layers(summary)}{way} corrects {share['salient'].text(3)} of {n:,} misclassified samples, random live ones {share['random_live'].text(3)}, the least salient {share['least'].text(3)}"
        f", on the same samples differences of {apart[0].text(3, '+')} and {apart[1].text(3, '+')}{doubt}; the wrong class's confidence changes by {drop['salient'].text(3, '+')}, {drop['random_live'].text(3, '+')} and {drop['least'].text(3, '+')}"
        f", differences of {fall[0].text(3, '+')} and {fall[1].text(3, '+')}"
    )
