"""`faultline finetune`: figure 6 of the paper, and what it leaves out. One normalised step on one misclassified sample, for few or for all of the network's
filters: what it repairs of the nearest misclassified samples of a held-out set, and what it breaks of those that were right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index import Run
from jobs import charts
from jobs.experiment import Request, carry_out
from jobs.neighbors import own_rows
from jobs.prune import filters_of, grid_of, of_layers
from pipeline.errors import BadRequest, printable
from pipeline.experiment import Choice, Rows, batches, gathered, images_of, network_of
from pipeline.intervals import CHANGE, FEW, Interval, bootstrap_mean, paired_shares, share_mean, wilson
from pipeline.manifest import Manifest
from pipeline.samples import Sample
from pipeline.statistics import Reference
from pipeline.store import Store, saliency_of

RATES = (0.5,)
NEIGHBOURS, CONTROLS, POOL = 10, 40, 2000  # of each sample; controls are drawn from so many correctly classified held-out samples
STRATEGIES = {"salient": "most salient", "random_live": "random, live alone", "least": "least salient, live alone", "all": "whole network", "conv": "all conv weights"}
WHOLES = ("all", "conv")  # which have no number of filters
SCOPES = ("global", "filter")
TOGETHER = 8  # samples whose images are on the device at once
SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("strategy", pa.string()), ("k", pa.int32()), ("rate", pa.float64()), ("corrected", pa.bool_()), ("confidence_change", pa.float64()),
     ("neighbors_corrected", pa.float64()), ("neighbors_confidence_change", pa.float64()), ("broken", pa.float64()), ("unmoved", pa.int32())]
)  # fmt: skip
EFFECTS = ("corrected", "neighbors_corrected", "neighbors_confidence_change", "broken")
NEAR = 20  # filters that the sentence is about, or the grid's nearest
BUDGETS = (0.02, 0.05, 0.1, 0.2)  # shares broken within which strategies are compared, where there are several rates; the sentence is about `BUDGET`
BUDGET = 0.05


@dataclass(frozen=True)
class FineTuning:
    """The experiment: samples of `source`, tried on `within`; the index `index` of the run says who is near. grid: how many filters; layers: `FIRST..LAST`, whose filters may be chosen; see `pipeline/interventions/`."""

    source: str
    within: str
    index: str
    reference: str
    grid: tuple[int, ...]
    rates: tuple[float, ...]
    scope: str
    layers: str | None
    seed: int
    name: str = "finetune"
    images: bool = True
    columns: tuple[str, ...] = ("saliency",)
    schema: pa.Schema = SCHEMA

    @property
    def weight(self) -> float:
        return self.steps * (NEIGHBOURS + CONTROLS) / 3  # an extraction is worth three forwards

    @property
    def steps(self) -> int:
        """Of one sample."""
        return (3 * len(self.grid) + 2) * len(self.rates)

    def settings(self) -> dict[str, object]:
        return {"datasets": [self.within], "index": self.index, "strategies": list(STRATEGIES), "k": list(self.grid), "rates": list(self.rates), "scope": self.scope, "layers": self.layers, "neighbors": NEIGHBOURS, "controls": CONTROLS}

    def start(self, run: Path, device: str) -> Rows:
        bench = Bench(self, run, device)
        return bench.rows


class Bench:
    """One worker's network, and the held-out images that steps are tried on."""

    def __init__(self, experiment: FineTuning, run: Path, device: str):
        self.experiment, self.device, self.tuner = experiment, device, None
        self.manifest, self.network = network_of(run, device)
        self.run = Run(Store(run), Manifest.read(run))
        self.standard = Reference.read(run / "statistics" / f"{experiment.reference}.parquet", self.manifest.layers)
        asked = self.manifest.layers.columns(experiment.layers) if experiment.layers is not None else slice(None)
        self.may_move = np.zeros(self.manifest.layers.total, bool)
        self.may_move[asked] = self.standard.live[asked]
        store = self.run.store
        self.errors = {s.sample_id: s for samples, _ in gathered(store, experiment.within, Choice("errors", 0)) for s in samples}
        pool = Choice.smallest(store, experiment.within, "correct", POOL, experiment.seed)
        self.pool = [s for samples, _ in gathered(store, experiment.within, pool) for s in samples]

    def rows(self, samples: list[Sample], profiles: pa.Table) -> pa.Table:
        standardised = self.standard.standardise(saliency_of(profiles))
        near = self._near(profiles["sample_id"].to_pylist(), standardised)
        return pa.concat_tables(self._some(samples[i : i + TOGETHER], standardised[i : i + TOGETHER], near[i : i + TOGETHER]) for i in range(0, len(samples), TOGETHER))

    def _near(self, ids: list[str], standardised: np.ndarray) -> list[list[Sample]]:
        """The nearest held-out errors of each sample, as far as their images can be had."""
        index = self.run.index(self.experiment.index)
        _, rows = index.search(standardised, NEIGHBOURS, self.experiment.within, None, own_rows(index, self.experiment.source, ids))
        names = index.rows["sample_id"]
        return [[self.errors[i] for i in (names[row].as_py() for row in found.tolist()) if i in self.errors] for found in rows]

    def _controls(self, sample: Sample) -> list[Sample]:
        """Correctly classified held-out samples, drawn for this one by the seed."""
        others = [s for s in self.pool if self.experiment.source != self.experiment.within or s.sample_id != sample.sample_id]
        drawn = np.random.default_rng([self.experiment.seed, *Choice("all", self.experiment.seed).hashes([sample.sample_id]).tolist()]).permutation(len(others))
        return [others[i] for i in drawn[:CONTROLS].tolist()]

    def _some(self, samples: Sequence[Sample], standardised: np.ndarray, near: list[list[Sample]]) -> pa.Table:
        from pipeline.interventions.finetuning import Tuner
        from pipeline.interventions.transfer import Case, transfers

        place: dict[int, int] = {}
        needed: list[Sample] = []

        def put(sample: Sample) -> int:
            if id(sample) not in place:
                place[id(sample)] = len(needed)
                needed.append(sample)
            return place[id(sample)]

        cases = [Case(s.sample_id, put(s), z, np.array([put(n) for n in neighbours], np.int64), np.array([put(c) for c in self._controls(s)], np.int64)) for s, z, neighbours in zip(samples, standardised, near)]
        if len({s.pixels.shape for s in needed}) > 1:
            raise ValueError("its images have several sizes; finetune needs a run whose preprocessing gives one (crop)")
        images = images_of(needed, self.manifest.preprocessing, self.device)
        self.tuner = self.tuner or Tuner(self.network, self.manifest.layers, images[:3])
        e = self.experiment
        return transfers(self.tuner, images, np.array([s.label for s in needed]), cases, self.may_move, e.grid, e.rates, tuple(STRATEGIES), e.scope, e.seed)


@dataclass(frozen=True)
class FineTune:
    """The verb."""

    experiment: FineTuning
    subset: str = "errors"
    figures: tuple[str, ...] = ("neighbours", "broken", "frontier")

    @property
    def also(self) -> tuple[str, ...]:
        return (self.experiment.within,)

    def check(self, store: Store, samples: list[Sample]) -> None:
        """Raises BadRequest if an image's logits depend on its batch, or if images have several sizes."""
        from pipeline.interventions.finetuning import Tuner

        manifest, network = network_of(store.run, "cpu")
        if len({s.pixels.shape for s in samples}) > 1:
            raise BadRequest("the images of this run have several sizes; finetune needs a run whose preprocessing gives one: extract with --preprocess crop=N")
        for at in islice(batches(samples, 3), 1):
            Tuner(network, manifest.layers, images_of([samples[i] for i in at], manifest.preprocessing, "cpu"))

    def cost(self, samples: int) -> str:
        steps = samples * self.experiment.steps
        return f"{samples:,} misclassified samples x {self.experiment.steps} steps, each tried on {NEIGHBOURS} neighbours and {CONTROLS} correctly classified samples of {self.experiment.within} = {steps * (1 + NEIGHBOURS + CONTROLS):,} forwards of one image or less"

    def summarise(self, store: Store, dataset: str, reference: Reference, rows: pa.Table) -> dict:
        """Means of every strategy, k and rate with 95% intervals over samples: Wilson's for `corrected`, `share_mean` for the neighbours' and controls' shares, over those samples
        that have any, a bootstrap for changes of confidence; `paired`: differences from the most salient filters' step on the same samples."""
        effects = []
        for strategy in STRATEGIES:
            of = rows.filter(pc.equal(rows["strategy"], strategy))
            for rate in self.experiment.rates:
                for k in sorted(set(of["k"].to_pylist())):
                    table = of.filter(pc.and_(pc.equal(of["rate"], rate), pc.equal(of["k"], k)))
                    columns = {column: table[column].cast(pa.float64()).drop_null().to_numpy() for column in EFFECTS}
                    known = {column: share_mean(values) for column, values in columns.items() if len(values)}
                    known["corrected"] = wilson(int(columns["corrected"].sum()), len(columns["corrected"]))
                    if len(changes := columns["neighbors_confidence_change"]):
                        known["neighbors_confidence_change"] = bootstrap_mean(changes, self.experiment.seed, ends=CHANGE)
                    effects.append({"strategy": strategy, "k": k, "rate": rate} | {column: known[column].to_json() for column in EFFECTS if column in known})
        steps = len(effects)
        summary = {"scope": self.experiment.scope, "paired": self._paired(rows), "dataset": dataset, "within": self.experiment.within, "samples": rows.num_rows // steps, "dead_filters": int((~reference.live).sum()), "k": list(self.experiment.grid), "rates": list(self.experiment.rates), "layers": self.experiment.layers, "effects": effects}
        summary["bargains"] = bargains(rows, effects) if len(self.experiment.rates) > 1 else []
        return summary | {"result": _result(summary), "found": found(summary)}

    def _paired(self, rows: pa.Table) -> list[dict]:
        """Of every strategy the difference from the most salient filters' step, at the k and rate that the sentence is about, on the same samples."""
        e = self.experiment
        rate, k = min(e.rates, key=lambda rate: abs(rate - RATES[0])), min(e.grid, key=lambda k: abs(k - NEAR))
        salient = of_setting(rows, "salient", k, rate)
        return [{"strategy": s, "minus": "salient", "k": k, "rate": rate} | less(of_setting(rows, s, k, rate), salient) for s in STRATEGIES if s != "salient"]

    def draw(self, store: Store, summary: dict, folder: Path) -> None:
        asked = f"one step on one of {summary['samples']:,} errors of {summary['dataset']}, tried on {summary['within']}"
        rate = _rate(summary)
        names = {s: name for s, name in STRATEGIES.items() if any(e["strategy"] == s for e in summary["effects"])}
        for figure, column, up in (("neighbours", "neighbors_corrected", f"share of the {NEIGHBOURS} nearest errors corrected"), ("broken", "broken", "share of correctly classified samples broken")):
            bands = {}
            for strategy, name in names.items():
                points = [e[column] for e in summary["effects"] if e["strategy"] == strategy and e["rate"] == rate and column in e]
                points = points * len(summary["k"]) if len(points) == 1 else points
                if points:
                    bands[name] = tuple([p[key] for p in points] for key in ("estimate", "low", "high"))
            words = charts.Words(f"Fine-tuning: {asked}", f"filters{of_layers(summary)} that take the step", up, f"rate {rate:g}; bands: 95% intervals over samples")
            charts.curves(folder / figure, summary["k"], bands, words, log=True)
        lines = {name: _lines(summary, strategy) for strategy, name in names.items()}
        what = f"a line: so many filters, at rates {', '.join(f'{r:g}' for r in summary['rates'])}" if len(summary["rates"]) > 1 else f"beside each point: filters; rate {rate:g}"
        words = charts.Words(f"Repaired against broken: {asked}", "share of correctly classified samples broken", f"share of the {NEIGHBOURS} nearest errors corrected", f"{what}; bars: 95% intervals over samples")
        charts.plane(folder / "frontier", {name: of for name, of in lines.items() if of}, words)


def of_setting(rows: pa.Table, strategy: str, k: int, rate: float) -> pa.Table:
    """The rows of one setting, by sample; of the whole network's steps there is one k alone."""
    asked = pc.and_(pc.equal(rows["strategy"], strategy), pc.equal(rows["rate"], rate))
    return rows.filter(asked if strategy in WHOLES else pc.and_(asked, pc.equal(rows["k"], k))).sort_by("sample_id")


def less(one: pa.Table, other: pa.Table) -> dict[str, dict]:
    """Differences of the shares repaired and broken between two settings, on the same samples, those that have both."""
    found = {}
    for column in ("neighbors_corrected", "broken"):
        a, b = (table[column].to_numpy(zero_copy_only=False).astype(np.float64) for table in (one, other))
        known = np.isfinite(a) & np.isfinite(b)
        found |= {column: paired_shares(a[known], b[known]).to_json()} if known.any() else {}
    return found


def bargains(rows: pa.Table, effects: list[dict]) -> list[dict]:
    """Of every budget and strategy the setting that repairs most among those that break no more; `less_salient`: its differences from the most salient filters' best, on the same samples.

    The best of several is a little flattered, and the more so the more there are.
    """
    found = []
    for budget in BUDGETS:
        best = {}
        for strategy in STRATEGIES:
            within = [e for e in effects if e["strategy"] == strategy and "neighbors_corrected" in e and e.get("broken", {"estimate": 2})["estimate"] <= budget]
            best |= {strategy: max(within, key=lambda e: e["neighbors_corrected"]["estimate"])} if within else {}
        for strategy, e in best.items():
            one = {"budget": budget} | {key: e[key] for key in ("strategy", "k", "rate", "neighbors_corrected", "broken")}
            if strategy != "salient" and "salient" in best:
                one["less_salient"] = less(*(of_setting(rows, s, best[s]["k"], best[s]["rate"]) for s in (strategy, "salient")))
            found.append(one)
    return found


def finetune(request: Request, within: str, ks: str | None, rates: str | None, scope: str, layers: str | None, index_name: str | None) -> dict:
    """Do it. Raises BadRequest for what cannot be asked: a grid, a rate, a scope, layers or a data set that does not exist."""
    run = Run.open(request.run)
    index = run.index(index_name)
    index.range_of(within)
    if index.about["subset"] != "errors":
        raise BadRequest(f"--name: the index {printable(index.folder.name)} holds correctly classified samples too, and a step is tried on the nearest errors: name an index of errors (faultline index --run {printable(request.run)})")
    held = np.concatenate([b["label"].to_numpy() != b["prediction"].to_numpy() for _, _, b in run.store.blocks(within, ["label", "prediction"], 65536)] or [np.zeros(0, bool)])
    if held.all() or not held.any():
        raise BadRequest(f"--in: {printable(within)} has no {'correctly classified' if len(held) and held.all() else 'misclassified'} sample to try a step on: name another data set")
    if int(held.sum()) < NEIGHBOURS:
        raise BadRequest(f"--in: {printable(within)} has {int(held.sum())} misclassified samples, and a step is tried on the {NEIGHBOURS} nearest: name a larger data set")
    if scope not in SCOPES:
        raise BadRequest(f"--scope: '{printable(scope)}' is not one of {', '.join(SCOPES)}")
    total = filters_of(run.manifest.layers, layers, Reference.read(run.store.run / "statistics" / f"{index.about['reference']}.parquet", run.manifest.layers))
    grid = grid_of(ks, tuple(sorted({1, 2, 5, 10, max(1, total // 100)} | ({20} if total >= 2000 else set()))), total)
    source = request.dataset_of(run.store)
    experiment = FineTuning(source, within, index.folder.name, index.about["reference"], grid, rates_of(rates), scope, layers, request.seed)
    return carry_out(FineTune(experiment), replace(request, reference=index.about["reference"]))


def rates_of(text: str | None) -> tuple[float, ...]:
    """`0.1,0.5` as numbers, ascending. Raises BadRequest naming --rates."""
    try:
        rates = tuple(sorted({float(part) for part in text.split(",")})) if text is not None else RATES
    except ValueError:
        rates = (0.0,)
    if not all(1e-6 <= rate <= 1e6 for rate in rates):
        raise BadRequest(f"--rates: '{printable(text)}' is no list of numbers above 0 (1e-6 to 1e6), such as 0.1,0.5")
    return rates


def _lines(summary: dict, strategy: str) -> list[list[tuple[dict, dict, str]]]:
    """(broken, repaired, text) as they are joined: of several rates a line for each k, which stands at its end; of one rate a line over all k."""
    known = [e for e in summary["effects"] if e["strategy"] == strategy and "broken" in e and "neighbors_corrected" in e]
    few = strategy not in WHOLES
    points = [(e["k"], e["rate"], (e["broken"], e["neighbors_corrected"])) for e in known]
    if len(summary["rates"]) == 1:
        return [[(*point, str(k) if few else "") for k, _, point in points]] if points else []
    return [[(*point, str(k) if few and rate == summary["rates"][-1] else "") for each, rate, point in points if each == k] for k in dict.fromkeys(k for k, _, _ in points)]


def _rate(summary: dict) -> float:
    """The rate that single numbers are about: the default one, or the nearest to it."""
    return min(summary["rates"], key=lambda rate: abs(rate - RATES[0]))


def _of(summary: dict, strategy: str) -> dict:
    """The effect of a strategy at `_rate`, at k nearest to `NEAR`."""
    chosen = [e for e in summary["effects"] if e["strategy"] == strategy and e["rate"] == _rate(summary)]
    return min(chosen, key=lambda e: abs(e["k"] - NEAR))


def _result(summary: dict) -> dict[str, float]:
    """Plain numbers for stdout."""
    flat = {"samples": summary["samples"], "dead_filters": summary["dead_filters"], "k": _of(summary, "salient")["k"], "rate": _rate(summary)}
    return flat | {f"{column}_{strategy}": _of(summary, strategy)[column]["estimate"] for column in EFFECTS for strategy in STRATEGIES if column in _of(summary, strategy)}


def found(summary: dict) -> str:
    """Figure 6, and its other side, in one sentence."""
    effects = {strategy: {column: Interval(**_of(summary, strategy)[column]) for column in EFFECTS if column in _of(summary, strategy)} for strategy in STRATEGIES}
    if not all("neighbors_corrected" in e and "broken" in e for e in effects.values()):
        return f"{summary['within']} has no misclassified, or no correctly classified sample to try a step on"
    words = [f"{name} {effects[s]['neighbors_corrected'].text(3)} and {effects[s]['broken'].text(3)}" for s, name in STRATEGIES.items() if s != "conv"]
    apart = [f"{STRATEGIES[p['strategy']]} {_gap(p['neighbors_corrected'])} and {_gap(p['broken'])}" for p in summary["paired"] if p["strategy"] != "conv"]
    k = _of(summary, "salient")["k"]
    way = "" if summary.get("scope", SCOPES[0]) == SCOPES[0] else f", each by its own norm and so {k**0.5:.3g} times as long in all,"
    few = f"; {summary['samples']:,} are too few to conclude anything from" if summary["samples"] < FEW else ""
    return f"{summary['samples']:,} error{'s' * (summary['samples'] != 1)} of {summary['dataset']}: a step of {k} filter{'s' * (k != 1)}{of_layers(summary)}{way} at rate {_rate(summary):g} on one error, share of its {NEIGHBOURS} nearest errors of {summary['within']} corrected, and of correctly classified samples broken: {'; '.join(words)}; on the same errors, less the most salient: {'; '.join(apart)}{_within(summary)}{few}"


def _within(summary: dict) -> str:
    """What is repaired at equal damage, where there are several rates."""
    best = {b["strategy"]: b for b in summary.get("bargains", ()) if b["budget"] == BUDGET}
    if missing := [STRATEGIES[s] for s in ("salient", "all") if s not in best]:
        return f"; no step of the {' and none of the '.join(missing)} breaks {BUDGET:g} or less, so that they are not compared at equal damage: try smaller --rates" if len(summary["rates"]) > 1 else ""
    few, whole = best["salient"], best["all"]
    return (
        f"; breaking no more than {BUDGET:g}, the most salient {few['k']} at rate {few['rate']:g} repair {Interval(**few['neighbors_corrected']).text(3)}, the whole network at rate {whole['rate']:g} "
        f"{Interval(**whole['neighbors_corrected']).text(3)}, on the same errors {_gap(whole['less_salient']['neighbors_corrected'])}"
    )


def _gap(difference: dict) -> str:
    """A paired difference, and whether it might be none."""
    gap = Interval(**difference)
    return gap.text(3, "+") + ("" if gap.low > 0 or gap.high < 0 else " (not clearly apart)")
