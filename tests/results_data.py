"""What the verbs of the evidence wrote, as docs/data/results and docs/images/results keep it: the numbers to six digits, and the pictures that docs/results.md shows."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / "docs/data/results"
IMAGES = ROOT / "docs/images/results"
LEFT_OUT = ("examples", "result")  # of summary.json: lists of images, and what stands there twice
SHOWN = {
    "resnet56-profile": ("saliency", "standardised", "depth"), "squeezenet1_1-profile": ("depth",), "resnet56-prune": ("corrected", "wrong_confidence"), "resnet56-prune-weights-and-bias": (),
    "squeezenet1_1-prune": ("corrected", "wrong_confidence"), "squeezenet1_1-prune-features": ("corrected",), "resnet56-neighbors": ("agreement", "errors", "neighbours", "colours", "ends"), "resnet56-v2-neighbors": (), "squeezenet1_1-neighbors": (),
    "resnet56-v2-finetune": (), "resnet56-v2-frontier": ("neighbours", "broken", "frontier"), "resnet56-v2-frontier-small": ("frontier",), "squeezenet1_1-halves-finetune": (),
    "resnet56-mask": ("corrected",), "squeezenet1_1-mask": (), "resnet56-sanity": ("profile", "map"), "squeezenet1_1-sanity": ("map",),
}  # fmt: skip


def keep(run: Path, verb: str, name: str) -> None:
    """The numbers of an experiment, to six digits, and its pictures that the page shows."""
    folder = run / "experiments" / verb
    summary = {key: value for key, value in json.loads((folder / "summary.json").read_text(encoding="utf-8")).items() if key not in LEFT_OUT}
    DATA.mkdir(parents=True, exist_ok=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(_short(value))}" for key, value in summary.items())
    (DATA / f"{name}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    for figure in SHOWN[name]:
        (IMAGES / f"{name}-{figure}.png").write_bytes((folder / f"{figure}.png").read_bytes())


def most(run: Path, dataset: str, name: str, count: int = 20) -> None:
    """Of the `count` filters with the largest ŝ of each sample, the share that lies in each third of the layers, beside the third's share of the live filters."""
    import numpy as np
    import pyarrow.dataset

    profiles = pyarrow.dataset.dataset(run / "profiles" / dataset, format="parquet").to_table(columns=["label", "prediction", "saliency"])
    vectors = profiles["saliency"].combine_chunks().flatten().to_numpy().reshape(profiles.num_rows, -1).astype(np.float64)
    wrong = profiles["label"].to_numpy() != profiles["prediction"].to_numpy()
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    layers = [layer["filters"] for layer in manifest["layers"]]
    third, depth = max(1, len(layers) // 3), np.repeat(np.arange(len(layers)), layers)
    part = np.where(depth < third, 0, np.where(depth < len(layers) - third, 1, 2))
    std = vectors.std(0, ddof=1)
    live = std > 1e-12
    salient = np.argsort(-np.where(live, (vectors - vectors.mean(0)) / np.where(live, std, 1), -np.inf), axis=1)[:, :count]
    shares = {group: np.bincount(part[salient[which]].reshape(-1), minlength=3) / (which.sum() * count) for group, which in (("misclassified", wrong), ("correct", ~wrong))}
    shares["filters"] = np.bincount(part[live], minlength=3) / live.sum()
    found = {"count": count} | {key: dict(zip(("early", "middle", "deep"), _short(values.tolist()))) for key, values in shares.items()}
    if layers[-1] == len(manifest["class_names"]):  # the last convolution makes the logits
        true, predicted = (sum(layers[:-1]) + profiles[column].to_numpy()[wrong] for column in ("label", "prediction"))
        found["true_class_first"] = _short(float((salient[wrong, 0] == true).mean()))
        found["predicted_class_among"] = _short(float((salient[wrong] == predicted[:, None]).any(1).mean()))
    (DATA / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _short(value):
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def kept(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
