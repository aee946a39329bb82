"""`faultline mask` of one image: the paper's case study (section 3.4 and its appendix). The most salient pixels are masked, those that follow, drawn ones, the least
salient, a region of one's own; after each, what the network thinks and what has become of the filters that failed; and the salient region pasted into its like.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from index.run import Run
from jobs.case import Case, Target, opened, picture_of
from jobs.explain import Wanted, compute
from jobs.mask import check_settings, classifier
from jobs.progress import say
from jobs.region import region_of
from pipeline.errors import printable
from pipeline.experiment import Named, gathered
from pipeline.interventions.masking import Classify, filling, mask, paste
from pipeline.samples import Sample
from pipeline.store import Store

STEPS = {"salient": "the {p} most salient pixels", "next": "the next {p}", "random": "{p} at random", "least": "the {p} least salient"}
OTHERS = 40  # images that the region is pasted into, as in the paper


def study(target: Target, wanted: Wanted, dataset: str | None, share: float, fill: str, region: str | None, hosts: int, out: Path | None) -> dict:
    """Compute and draw; the numbers, with `figure`. dataset: of a run, whose images a region is pasted into where the target is a file; share: of the pixels.
    Raises BadRequest before anything is written."""
    from jobs import case_sheet

    wanted.check()
    check_settings(fill, wanted.k, wanted.boost, hosts)
    run, case, device = opened(target, out)
    own = region_of(region, case.sample, case.preprocessing) if region else None
    explained = compute(case, wanted, device)
    classify = classifier(case.network, case.preprocessing, device)
    heat = explained["map"].max(0)
    masks = {name: mask(name, heat, share, wanted.seed, case.sample.sample_id) for name in STEPS} | ({"region": own} if own is not None else {})
    found = {key: explained[key] for key in ("sample_id", "dataset", "label", "label_name", "filters")} | {"share": share, "fill": fill}
    found |= steps(case, explained, classify, masks, fill, wanted.seed, device)
    others = hosts_of(run, case, dataset, hosts, wanted.seed) if run and hosts else []
    found["transplant"] = pasted(case, classify, masks["salient"], others, found["wrong"])
    if hosts and not others:
        say("nothing to paste into: " + ("an image of a run is needed" if run is None else f"no other image of class {printable(case.name(case.sample.label) or case.sample.label)} that the network is right about, and of this size"))
    path = out or picture_of(case, run, "mask", "masked")
    drawn = [case.sample.pixels, *(paste(m, filling(case.sample.pixels, fill, wanted.seed, case.sample.sample_id), case.sample.pixels) for m in masks.values())]
    case_sheet.draw(path, found, drawn, [paste(masks["salient"], case.sample.pixels, other.pixels) for other in others])
    say(f"figure: {printable(path)}")
    return found | {"figure": str(path)}


def steps(case: Case, explained: dict, classify: Classify, masks: dict[str, np.ndarray], fill: str, seed: int, device: str) -> dict:
    """`wrong`: the class that the image was taken for, or of one that was rightly predicted the second; `steps`: a dict for the image as it is and for every mask:
    `name`, `what` in words, `share` masked, `prediction`, `true_confidence`, `wrong_confidence`, `filters_standardised` (mean ŝ of the filters chosen on the whole
    image: figure 7c), `all_standardised` (of all live filters)."""
    import torch

    from pipeline.explanation.input_saliency import InputSaliency

    sample = case.sample
    filled = filling(sample.pixels, fill, seed, sample.sample_id)
    pixels = np.stack([sample.pixels, *(paste(m, filled, sample.pixels) for m in masks.values())])
    probabilities = classify(pixels)
    order = np.argsort(-probabilities[0], kind="stable")
    wrong = int(order[0] if order[0] != sample.label else order[1])
    engine = InputSaliency(case.network, case.reference, case.reference.aggregation)
    images = case.preprocessing.normalise(torch.from_numpy(pixels).to(device))
    profiles = engine.standardised(images, torch.full((len(images),), sample.label, device=device)).float().cpu().numpy()
    columns = [case.layout.slices[f["layer"]].start + f["filter"] for f in explained["filters"]]
    rows = []
    for at, name in enumerate(("as it is", *masks)):
        masked = 0.0 if not at else float(masks[name].mean())
        what = "as it is" if not at else "a region of one's own" if name == "region" else STEPS[name].format(p=f"{100 * masked:.3g}%")
        prediction = int(probabilities[at].argmax())
        rows.append({
            "name": name, "what": what, "share": masked, "prediction": prediction, "prediction_name": case.name(prediction), "true_confidence": float(probabilities[at, sample.label]),
            "wrong_confidence": float(probabilities[at, wrong]), "filters_standardised": float(profiles[at, columns].mean()), "all_standardised": float(profiles[at, case.reference.live].mean()),
        })  # fmt: skip
    return {"wrong": wrong, "wrong_name": case.name(wrong), "steps": rows}


def hosts_of(run: Run, case: Case, dataset: str | None, most: int, seed: int) -> list[Sample]:
    """Images of the case's class and size that the network is right about, the case itself not among them, as they can be had."""
    name = case.dataset or dataset or next((d for d in run.datasets if d == "val"), run.datasets[0])
    store = Store(run.store.run)
    chosen = Named.of_each_class(store, name, "correct", most + 1, seed, case.sample.label)
    found = [s for samples, _ in gathered(store, name, chosen) for s in samples]
    return [s for s in found if s.pixels.shape == case.sample.pixels.shape and s.sample_id != case.sample.sample_id][:most]


def pasted(case: Case, classify: Classify, salient: np.ndarray, others: list[Sample], wrong: int) -> dict | None:
    """The salient region pasted into other images of its class, at its place: in how many of `hosts` the wrong class's confidence `rises`, its mean `change`, and before
    and after for each; None without any."""
    if not others:
        return None
    pixels = np.stack([s.pixels for s in others])
    before, after = (classify(p)[:, wrong] for p in (pixels, paste(salient, case.sample.pixels, pixels)))
    each = [{"sample_id": s.sample_id, "before": float(b), "after": float(a)} for s, b, a in zip(others, before, after)]
    return {"hosts": len(others), "rises": int((after > before).sum()), "change": float((after - before).mean()), "each": each}
