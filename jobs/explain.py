"""`faultline explain`: what in an image made its filters fail. Sections 2.2 and 3.3 of the paper, for an image of a run or for a file.

One image, in this process: its profile, its most salient filters (or chosen ones), the pixels that decide them, and its neighbours where there is an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from index.run import Run
from jobs.case import Case, Target, opened, picture_of
from jobs.progress import say
from pipeline.errors import BadRequest, closest, printable
from pipeline.experiment import images_of, network_of
from pipeline.filters import FilterLayout
from pipeline.samples import Sample
from pipeline.statistics import Reference
from pipeline.store import Store

NEIGHBOURS = 5  # that are drawn


@dataclass(frozen=True)
class Wanted:
    """What is asked of an image. filters: `layer:channel`, several with commas, in place of the k most salient (of some layers, FIRST..LAST); copies: noisy ones to average over (0: none), of which noise is `share`."""

    k: int = 10
    filters: str | None = None
    layers: str | None = None
    boost: float = 100.0
    copies: int = 0
    share: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Raises BadRequest with every fault of the settings together."""
        faults = []
        for option, value, least in (("-k", self.k, 1), ("--smooth", self.copies, 0), ("--seed", self.seed, 0)):
            if value < least:
                faults.append(f"{option}: {value} is less than {least}")
        if not 1 < self.boost < float("inf"):
            faults.append(f"--boost: {self.boost:g} boosts nothing: give a number above 1")
        if not 0 < self.share < 1:
            faults.append(f"--noise: {self.share:g} is not a share between 0 and 1")
        if self.filters and self.layers:
            faults.append("--filters and --layers: the filters are named, or the most salient of some layers are taken; give one of them")
        if faults:
            raise BadRequest("\n".join(faults))


def explain(target: Target, wanted: Wanted, out: Path | None) -> dict:
    """Compute and draw; the numbers, with `figure` and `neighbours`. Raises BadRequest before anything is written."""
    from jobs import heatmaps

    wanted.check()
    run, case, device = opened(target, out)
    found = compute(case, wanted, device)
    neighbours = neighbours_of(run, case, found, target.name) if run else None
    path = out or picture_of(case, run, "explain", "explained")
    profile = [(layer, found["standardised"][span]) for layer, span in case.layout.slices.items()]
    true, predicted = (found[f"{key}_name"] or found[key] for key in ("label", "prediction"))
    title = f"Why {true} was taken for {predicted}" if found["label"] != found["prediction"] else f"{true}, rightly predicted"
    heatmaps.draw(path, found, case.sample.pixels, profile, neighbours, title)
    say(f"figure: {printable(path)}")
    shown = [{key: value for key, value in row.items() if key != "thumbnail"} for row in neighbours or []]
    return {key: value for key, value in found.items() if key not in ("heat", "map", "standardised")} | {"neighbours": shown, "figure": str(path)}


def check_explainable(store: Store, reference: str, samples: list[Sample]) -> None:
    """Raises BadRequest if which pixels matter cannot be asked of a run's network, with the first of some samples."""
    import torch

    from pipeline.explanation.input_saliency import InputSaliency

    manifest, network = network_of(store.run, "cpu")
    standard = Reference.read(store.run / "statistics" / f"{reference}.parquet", manifest.layers)
    for sample in samples[:1]:
        InputSaliency(network, standard, manifest.aggregation)(images_of([sample], manifest.preprocessing, "cpu"), torch.tensor([sample.label]), [np.flatnonzero(standard.live)[:1]])


def compute(case: Case, wanted: Wanted, device: str) -> dict:
    """The numbers of one image: what is said on stdout, and under `heat` (float32 [H, W], 0..1, as drawn), `map` (float32 [3, H, W]) and `standardised` (float32 [F]) what is drawn."""
    import torch

    from pipeline.explanation.heat import display, heat
    from pipeline.explanation.input_saliency import InputSaliency

    images = case.preprocessing.normalise(torch.from_numpy(case.sample.pixels[None].copy()).to(device))
    labels = torch.tensor([case.sample.label], device=device)
    engine = InputSaliency(case.network, case.reference, case.reference.aggregation)
    standardised = engine.standardised(images, labels)[0].float().cpu().numpy()
    columns = chosen(case, wanted, standardised)
    ask = (images, labels, [columns], wanted.boost)
    found = engine.smooth(*ask, wanted.copies, wanted.share, wanted.seed) if wanted.copies else engine(*ask)
    if not (found.logits.isfinite().all() and found.maps.isfinite().all()):
        raise BadRequest(f"{printable(case.sample.sample_id)}: the network's output, or its gradient, is not finite (NaN or infinity) for this image: nothing can be explained")
    if found.coarse.any():
        say(f"the map is largely rounding: a few filters outweigh all others (the cosine distance is {float(found.distance[0]):.1e}), and the network does not run in float64; other --filters or --statistics can tell more")
    confidence = found.logits[0].double().softmax(0)
    prediction = int(confidence.argmax())
    hot = heat(found.maps)
    return {
        "sample_id": case.sample.sample_id, "dataset": case.dataset or None,
        "label": case.sample.label, "label_name": case.name(case.sample.label), "label_confidence": float(confidence[case.sample.label]),
        "prediction": prediction, "prediction_name": case.name(prediction), "confidence": float(confidence[prediction]),
        "filters": [dict(zip(("layer", "filter", "standardised"), (*case.layout.locate(int(c)), float(standardised[c])))) for c in columns],
        "dead_filters": int((~case.reference.live).sum()), "boost": wanted.boost, "distance": float(found.distance[0]), "coarse": bool(found.coarse.any()),
        "heat": display(hot)[0], "map": found.maps[0].float().cpu().numpy(), "standardised": standardised,
    }  # fmt: skip


def chosen(case: Case, wanted: Wanted, standardised: np.ndarray) -> np.ndarray:
    """F as columns, most salient first. Raises BadRequest for filters or layers that the network does not have, or that are dead."""
    live = case.reference.live
    if wanted.filters:
        columns = [_column(case.layout, text.strip()) for text in wanted.filters.split(",")]
        dead = [text for text, column in zip(wanted.filters.split(","), columns) if not live[column]]
        if dead:
            raise BadRequest(f"--filters: {printable(', '.join(dead))} never differed in the reference (sigma is 0), so that nothing can be said of it")
        return np.array(sorted(dict.fromkeys(columns), key=lambda c: -standardised[c]))
    span = case.layout.columns(wanted.layers) if wanted.layers else slice(0, case.layout.total)
    columns = np.flatnonzero(live[span]) + span.start
    if not len(columns):
        raise BadRequest("--layers: all filters of these layers are dead in the reference (sigma is 0)")
    if len(columns) < wanted.k:
        say(f"only {len(columns)} filters are live there")
    return columns[np.argsort(-standardised[columns], kind="stable")][: wanted.k]


def _column(layout: FilterLayout, text: str) -> int:
    layer, _, channel = text.rpartition(":")
    if layer not in layout.slices:
        raise BadRequest(f"--filters: '{printable(text)}' is not LAYER:CHANNEL of a layer of this network; close to it: {closest(layer or text, layout.slices)}")
    span = layout.slices[layer]
    if not channel.isdecimal() or not channel.isascii() or int(channel) >= span.stop - span.start:
        raise BadRequest(f"--filters: {printable(layer)} has the filters 0..{span.stop - span.start - 1}, not '{printable(channel)}'")
    return span.start + int(channel)


def neighbours_of(run: Run, case: Case, found: dict, name: str | None) -> list[dict] | None:
    """Its neighbours in the run's index, with thumbnails, as `figures` draws them; None, and a word why, where no index can be asked. Raises BadRequest for a `name` that cannot."""
    try:
        index = run.index(name)
    except BadRequest as fault:
        if name:
            raise
        say(f"no neighbours are drawn: {printable(str(fault).splitlines()[0])}")
        return None
    reference = index.about["reference"]
    if not np.array_equal(Reference.read(run.store.run / "statistics" / f"{reference}.parquet", case.layout).mean, case.reference.mean):
        say(f"no neighbours are drawn: the index was made with the statistics of {printable(reference)}, not those asked for")
        return None
    own = index.row_of(case.dataset, case.sample.sample_id) if case.dataset else -1
    similarity, rows = index.search(found["standardised"][None], NEIGHBOURS, None, None, np.array([own]))
    table = run.table_of(index, similarity[0], rows[0], found["label"], found["prediction"])
    return [row | run.record(run.indexed(row["dataset"], row["sample_id"], name), ["thumbnail"]) for row in table.to_pylist()]
