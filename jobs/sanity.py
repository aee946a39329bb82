"""`faultline sanity`: whether profiles and heat maps depend on what the network has learnt (Adebayo et al., 2018). Its layers are randomised from the top down, and what explained
a misclassified sample is compared with what these networks give for it, and with what another sample has.

All of it in float64. Shuffling wakes filters that hardly ever answered, by 1e5 sigma and more, whichever of them a map is about: what is left of the distance is then 1e-6, of
which float32 has two digits at best, and a map in it is largely rounding. A network that cannot run in float64 is asked in float32, and that is said."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import charts
from jobs.experiment import Request, carry_out, refuse_changed_source, standards
from jobs.progress import say
from pipeline.errors import BadRequest, printable
from pipeline.experiment import Choice, Rows, batches, gathered, images_of, network_of, units_of
from pipeline.interventions.choice import choose
from pipeline.intervals import FEW, Interval, bootstrap_mean, bootstrap_means
from pipeline.manifest import Manifest
from pipeline.samples import Sample
from pipeline.statistics import Reference
from pipeline.store import Store, saliency_of

if TYPE_CHECKING:
    import torch

OTHERS = 8  # samples that every sample is compared with, and on which BatchNorms are measured
AT_MOST = 9  # networks: the trained one, its head randomised, and the stages below
OTHER = -1  # the stage of the rows that are about other samples
TOGETHER = 32  # samples
LIVELY = 0.01  # of the median sigma: a filter that differed less than that hardly ever answered, and outweighs all others once shuffling wakes it
ALIKE = (-1.0, 1.0)  # what a cosine or a correlation cannot leave
MEASURES = {"profile_cosine": "the profile's cosine", "profile_cosine_lively": "the same without", "profile_rank": "the order of filters within a layer", "map_rank": "the order of a map's pixels"}
MEANING = {
    "profile_cosine": "any weights give {}",
    "profile_cosine_lively": "any weights give {}",
    "profile_rank": "{} is the architecture's",
    "map_rank": "{} is the image's, as in an edge detector, and not what was learnt",
}
SCHEMA = pa.schema([("sample_id", pa.string()), ("stage", pa.int32()), ("layer", pa.string()), *((name, pa.float64()) for name in MEASURES), ("silent", pa.bool_()), ("float64", pa.bool_())])


@dataclass(frozen=True)
class Randomising:
    """The experiment. k: how many of a sample's most salient filters its maps are about; boost: see `pipeline/explanation/input_saliency.py`; `reference` standardises; seed: of the shuffles."""

    dataset: str
    reference: str
    k: int
    boost: float
    seed: int
    name: str = "sanity"
    images: bool = True
    columns: tuple[str, ...] = ("saliency",)
    weight: float = AT_MOST * 4  # a map is worth some three extractions
    schema: pa.Schema = SCHEMA

    def settings(self) -> dict[str, object]:
        return {"k": self.k, "boost": self.boost, "others": OTHERS, "precision": "float64"}

    def others(self, store: Store) -> Choice:
        """The first of the errors in the order of the seeded hash, so that units and --max-samples change nothing."""
        return Choice.smallest(store, self.dataset, "errors", OTHERS, self.seed)

    def start(self, run: Path, device: str) -> Rows:
        from pipeline.explanation.sanity import stages

        manifest, network = network_of(run, device)
        standard = Reference.read(run / "statistics" / f"{self.reference}.parquet", manifest.layers)
        store = Store(run)
        theirs = [part for part in gathered(store, self.dataset, self.others(store), ("saliency",)) if part[0]]
        if not theirs:
            raise BadRequest(f"none of the images of {printable(self.dataset)} that others are compared with can be read any more: put its source back")
        network, precise = exactly(network, images_of(theirs[0][0][:1], manifest.preprocessing, device))
        explainer = Explainer(manifest, standard, self.k, self.boost, device, precise)
        parts = [explainer.prepare(samples, facts, at) for samples, facts in theirs for at in batches(samples, TOGETHER)]
        others = [(asked, explainer.heats(network, asked)) for asked in parts]
        measured = _of_one_shape([asked.images for asked in parts])
        plan = stages(network, measured[:1])

        def rows(samples, profiles):
            found = []
            for at in batches(samples, TOGETHER):
                asked = explainer.prepare(samples, profiles, at)
                found += explainer.compare(network, plan, self.seed, measured, asked, others)
            return pa.concat_tables(found)

        return rows


@dataclass(frozen=True)
class Asked:
    """Samples of one shape. images float64 [B, 3, H, W], or float32 where the network takes no other; labels int64 [B]; saliency: s̄ of the trained network, float32 [B, F]; filters: columns of each sample's map."""

    ids: list[str]
    images: torch.Tensor
    labels: torch.Tensor
    saliency: np.ndarray
    filters: list[np.ndarray]


@dataclass(frozen=True)
class Explainer:
    """Profiles and heat maps of samples, by any network of one architecture, and how similar they are."""

    manifest: Manifest
    reference: Reference
    k: int
    boost: float
    device: str
    precise: bool

    def prepare(self, samples: list[Sample], profiles: pa.Table, at: list[int]) -> Asked:
        """Of the samples at these places; their filters are the trained network's most salient ones."""
        import torch

        facts = profiles.take(pa.array(at))
        saliency = saliency_of(facts)
        filters = [choose("salient", self.k, row, self.reference.live, 0, "") for row in self.reference.standardise(saliency)]
        labels = torch.from_numpy(facts["label"].to_numpy().astype(np.int64)).to(self.device)
        images = images_of([samples[i] for i in at], self.manifest.preprocessing, self.device)
        return Asked(facts["sample_id"].to_pylist(), images.double() if self.precise else images, labels, saliency, filters)

    def profiles(self, network: torch.nn.Module, asked: Asked) -> np.ndarray:
        """s̄ [B, F] by a network."""
        from pipeline.saliency import make_engine

        engine, step = make_engine(self.manifest.engine, network, self.manifest.aggregation), self.manifest.batch_size
        return np.concatenate([engine(asked.images[i : i + step], asked.labels[i : i + step]).saliency.float().cpu().numpy() for i in range(0, len(asked.ids), step)])

    def heats(self, network: torch.nn.Module, asked: Asked) -> np.ndarray:
        """Heat [B, H * W], in the images' dtype, of each sample's filters by a network."""
        from pipeline.explanation.heat import heat
        from pipeline.explanation.input_saliency import InputSaliency

        maps = InputSaliency(network, self.reference, self.manifest.aggregation)(asked.images, asked.labels, asked.filters, self.boost).maps
        return heat(maps).flatten(1).cpu().numpy()

    def compare(self, network: torch.nn.Module, plan: list, seed: int, measured: torch.Tensor, asked: Asked, others: list[tuple[Asked, np.ndarray]]) -> list[pa.Table]:
        """Rows of all stages, of the untouched network as stage 0, and of other samples: the mean over those that are not the sample itself."""
        from pipeline.explanation.sanity import cascade

        heats = self.heats(network, asked)
        found = [self._rows(asked, 0, None, self._similar(asked, heats, self.profiles(network, asked), heats), ~_spread(heats))]
        for stage, (step, randomised) in enumerate(zip(plan, cascade(network, plan, seed, measured)), 1):
            maps = self.heats(randomised, asked)
            found.append(self._rows(asked, stage, step.layer, self._similar(asked, heats, self.profiles(randomised, asked), maps), ~_spread(maps)))
        beside = []
        for other, theirs in others:
            for at, own in enumerate(other.ids):
                alike = theirs[at : at + 1].repeat(len(heats), 0) if theirs.shape[1] == heats.shape[1] and other.images.shape[1:] == asked.images.shape[1:] else None
                values = self._similar(asked, heats, other.saliency[at : at + 1].repeat(len(heats), 0), alike)
                beside.append(np.where([sample == own for sample in asked.ids], np.nan, values))
        counted = ~np.isnan(beside)
        means = np.divide(np.nansum(beside, 0), counted.sum(0), out=np.full(counted.shape[1:], np.nan), where=counted.any(0))
        return [*found, self._rows(asked, OTHER, None, means, np.zeros(len(heats), bool))]

    def _similar(self, asked: Asked, heats: np.ndarray, saliency: np.ndarray, maps: np.ndarray | None) -> np.ndarray:
        """float64 [4, B], as in `MEASURES`; NaN of maps where there are none."""
        from pipeline.explanation.sanity import cosine, rank_within_layers, spearman

        profiles = [self.reference.standardise(rows) for rows in (asked.saliency, saliency)]
        ranks = rank_within_layers(asked.saliency, saliency, self.manifest.layers, self.reference.live)
        lively = self.reference.std >= LIVELY * np.median(self.reference.std[self.reference.live])
        return np.stack([cosine(*profiles), cosine(*(rows[:, lively] for rows in profiles)), ranks, np.full(len(heats), np.nan) if maps is None else spearman(heats, maps)])

    def _rows(self, asked: Asked, stage: int, layer: str | None, similar: np.ndarray, silent: np.ndarray) -> pa.Table:
        count = len(asked.ids)
        measures = [pa.array(values, pa.float64(), from_pandas=True) for values in similar]  # NaN: null
        return pa.table([pa.array(asked.ids, pa.string()), pa.array([stage] * count, pa.int32()), pa.array([layer] * count, pa.string()), *measures, pa.array(silent), pa.array([self.precise] * count)], schema=SCHEMA)


@dataclass(frozen=True)
class Sanity:
    """The verb."""

    experiment: Randomising
    subset: str = "errors"
    figures: tuple[str, ...] = ("profile", "map")
    also: tuple[str, ...] = ()

    def check(self, store: Store, samples: list[Sample]) -> None:
        """Raises BadRequest if the network cannot be copied, keeps gradients from its input, or if the images to compare with have changed; says where it cannot run in float64."""
        import torch

        from pipeline.explanation.input_saliency import InputSaliency
        from pipeline.explanation.sanity import cascade, stages

        others = self.experiment.others(store)
        refuse_changed_source(store, self.experiment.dataset, {unit.shard for unit, _ in units_of(store, self.experiment.dataset, others)})
        manifest, network = network_of(store.run, "cpu")
        standard = standards(store, self.experiment.reference, manifest.aggregation)
        for at in islice(batches(samples, 1), 1):
            images = images_of([samples[i] for i in at], manifest.preprocessing, "cpu")
            InputSaliency(network, standard, manifest.aggregation)(images, torch.tensor([samples[at[0]].label]), [np.flatnonzero(standard.live)[:1]])
            next(cascade(network, stages(network, images), self.experiment.seed, images))
            if not exactly(network, images)[1]:
                say("sanity: the network does not run in float64, so that its maps are made in float32, and those of a shuffled network may be largely rounding")

    def cost(self, samples: int) -> str:
        return f"{samples:,} misclassified samples x {AT_MOST} networks at most, the trained one and copies with ever more layers randomised = {samples * AT_MOST:,} profiles and maps, each about four passes forward and back"

    def summarise(self, store: Store, dataset: str, reference: Reference, rows: pa.Table) -> dict:
        """Of every measure the mean over samples at every stage with bootstrap intervals, and of `other` samples; `apart`: after the last stage less another sample's, on the same
        samples; `silent`: how many maps have no spread at all at a stage, which count 0."""
        live = reference.std[reference.live]
        rows = rows.sort_by([("sample_id", "ascending"), ("stage", "ascending")])
        count = pc.max(rows["stage"]).as_py() + 1
        by = {stage: rows.filter(pc.equal(rows["stage"], stage)) for stage in range(OTHER, count)}
        summary = {"dataset": dataset, "samples": by[0].num_rows, "k": self.experiment.k, "boost": self.experiment.boost, "dead_filters": int((~reference.live).sum()), "hardly_alive": int((live < LIVELY * np.median(live)).sum()), "stages": [by[stage]["layer"][0].as_py() for stage in range(count)], "float64": pc.all(rows["float64"]).as_py()}
        other, apart = {}, {}
        for name in MEASURES:
            values = np.stack([by[stage][name].to_numpy() for stage in range(count)], 1)
            known = ~np.isnan(values).any(1)
            if not known.any():
                raise BadRequest(f"of {by[0].num_rows:,} samples none has {'a map' if name == 'map_rank' else 'a profile'} with any spread by the trained network: there is nothing that randomising could change")
            summary[name] = dict(zip(("mean", "low", "high"), (v.tolist() for v in self._curve(values[known]))))
            level = by[OTHER][name].to_numpy()
            both = known & ~np.isnan(level)
            other[name] = bootstrap_mean(level[both], self.experiment.seed, ends=ALIKE).to_json() if both.any() else None
            apart[name] = bootstrap_mean(values[both, -1] - level[both], self.experiment.seed, ends=(2 * ALIKE[0], 2 * ALIKE[1])).to_json() if both.any() else None
        summary |= {"other": other, "apart": apart, "silent": [int(by[stage]["silent"].to_numpy().sum()) for stage in range(count)]}
        result = {"samples": summary["samples"], "stages": count - 1}
        for name in MEASURES:
            result |= {f"{name}_head": summary[name]["mean"][1], f"{name}_all": summary[name]["mean"][-1]} | ({f"{name}_other": other[name]["estimate"]} if other[name] else {})
        return summary | {"result": result, "found": found(summary)}

    def _curve(self, values: np.ndarray) -> tuple[np.ndarray, ...]:
        """(mean, low, high) of likenesses [N, stages]: the first is what a network is like to itself, which no other sample could change."""
        own, others = bootstrap_means(values[:, :1], self.experiment.seed), bootstrap_means(values[:, 1:], self.experiment.seed, ends=ALIKE)
        return tuple(np.concatenate(parts) for parts in zip(own, others))

    def draw(self, store: Store, summary: dict, folder: Path) -> None:
        asked = f"{summary['samples']:,} misclassified sample{'s' * (summary['samples'] != 1)} of data set {summary['dataset']}"
        stages = ["nothing", *summary["stages"][1:]]
        note = "bands: 95% intervals over samples, one draw of the shuffles; other samples: each with up to 8 others, by the trained network"
        cosines = {"profile_cosine": "ŝ, cosine"} | ({"profile_cosine_lively": f"ŝ, cosine, without {summary['hardly_alive']:,} hardly alive"} if summary["hardly_alive"] else {})
        for figure, title, up, names in (
            ("profile", f"Profiles of {asked}", "similarity to the trained network's", cosines | {"profile_rank": "s̄, rank correlation within layers"}),
            ("map", f"Heat maps of {asked}", "rank correlation with the trained network's", {"map_rank": f"map of the {summary['k']} most salient filters"}),
        ):
            bands = {shown: tuple(summary[name][key] for key in ("mean", "low", "high")) for name, shown in names.items()}
            bands |= {f"{shown}: other samples": tuple([level[key]] * len(stages) for key in ("estimate", "low", "high")) for name, shown in names.items() if name != "profile_cosine_lively" and (level := summary["other"][name])}
            charts.by_layer(folder / figure, bands, stages, charts.Words(title, "randomised, from the output down to", up, note))


def sanity(request: Request, k: int, boost: float) -> dict:
    """Do it. Raises BadRequest for a k or a boost that cannot be."""
    store = Store(request.run.expanduser().absolute())
    dataset = request.dataset_of(store)
    reference = request.reference_of(store, dataset)
    live = int(standards(store, reference, store.manifest().aggregation).live.sum())
    faults = [f"-k: {k} is not a number from 1 to {live}, the live filters that there are"] if not 1 <= k <= live else []
    faults += [f"--boost: {boost:g} boosts nothing: give a number above 1"] if not 1 < boost < float("inf") else []
    if faults:
        raise BadRequest("\n".join(faults))
    return carry_out(Sanity(Randomising(dataset, reference, k, boost, request.seed)), request)


def found(summary: dict) -> str:
    """What randomising does to profiles and maps, in one sentence."""
    n = summary["samples"]
    quiet = summary["hardly_alive"]
    without = f"{MEASURES['profile_cosine_lively']} {quiet:,} filter{'s' * (quiet != 1)} that hardly ever answered (sigma below a hundredth of the median)"
    shown = MEASURES | {"profile_cosine_lively": without} if quiet else {name: words for name, words in MEASURES.items() if name != "profile_cosine_lively"}
    parts = [f"{words} {_fall(summary, name)}" for name, words in shown.items()]
    silent = summary["silent"][-1]
    doubt = f"; {'1 is' if n == 1 else f'{n:,} are'} too few to conclude anything from" if n < FEW else ""
    dead = f"; {silent:,} map{'s are' if silent > 1 else ' is'} then blank and count{'s' * (silent == 1)} 0" if silent else ""
    rounded = "" if summary["float64"] else "; in float32, since the network does not run in float64: maps of shuffled networks may be largely rounding"
    return f"with the head ({printable(summary['stages'][1])}) shuffled, and then every layer, of {n:,} misclassified sample{'s' * (n != 1)} {'; '.join(parts)}{dead}{rounded}{doubt}"


def _fall(summary: dict, name: str) -> str:
    """`falls from 1.000 to .. and to .., another sample's is ..`, and what it means where it does not fall as far."""
    head, last = (Interval(*(summary[name][key][at] for key in ("mean", "low", "high")), summary["samples"]) for at in (1, -1))
    start, level, gap = summary[name]["mean"][0], summary["other"][name], summary["apart"][name]
    if last.high >= start - 1e-6:
        return f"does not fall: it is {start:.3f} before, {head.text(3)} and {last.text(3)} ({MEANING[name].format('all of it')})"
    falls = f"falls from {start:.3f} to {head.text(3)} and {last.text(3)}"
    if level is None:
        return f"{falls}, with no other sample to compare with"
    falls += f", where another sample's is {Interval(**level).text(3)}"
    return f"{falls}: it stays above that ({MEANING[name].format('part of it')})" if gap["low"] > 0 else f"{falls}: it goes below that" if gap["high"] < 0 else f"{falls}: not clearly apart from it"


def exactly(network: torch.nn.Module, images: torch.Tensor) -> tuple[torch.nn.Module, bool]:
    """(the network as a copy in float64, true); (itself, false) where it cannot run in that. images: float32 [B, 3, H, W], to try it with."""
    from pipeline.explanation.input_saliency import in_float64

    double = in_float64(network, images)
    return (network, False) if double is None else (double, True)


def _spread(heats: np.ndarray) -> np.ndarray:
    """bool [B]: whether a map has any, and is finite."""
    return np.isfinite(heats).all(1) & (np.ptp(heats, 1) > 0)


def _of_one_shape(parts: list[torch.Tensor]) -> torch.Tensor:
    """All images of the first one's shape."""
    import torch

    return torch.cat([images for images in parts if images.shape[1:] == parts[0].shape[1:]])
