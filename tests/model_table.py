"""The table of docs/models.md: what the engines give for every network that has a name, against the slow float64 loop.

A benchmark, not a test. `FAULTLINE_DATA=... python tests/model_table.py [MODEL ...]` computes the rows that docs/data/models.jsonl
does not hold yet (an hour on two cores for all of them; it goes on where it was stopped) and writes the table into the page.
MODEL may be a `module:factory`; such rows stand in a second table. To compute a row anew, delete its line.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / "docs/data/models.jsonl"
PAGE = ROOT / "docs/models.md"
REAL = {"squeezenet1_1": "imagenet-sample/squeezenet1_1.safetensors", "resnet20": "cifar10/resnet20.safetensors", "resnet56": "cifar10/resnet56.safetensors"}
SETTLING = 8  # images that set the BatchNorm statistics of a random network, the measured ones among them
LARGE = 250_000_000  # parameters from which one image is measured; from a fifth of it, or for large images, two


# ---- measuring -----------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Every name that `--model` knows, small networks first."""
    import torchvision.models

    from pipeline import cifar

    photographs = torchvision.models.list_models(module=torchvision.models)
    return [*cifar.NETWORKS, *sorted(photographs, key=lambda name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])]


def network_of(name: str, data: Path):
    """(network, preprocessing, "trained" or "random"): the seeded initialisation where the data folder has no weights."""
    import torch
    import torchvision.models

    from pipeline import cifar, models
    from pipeline.samples import PRESETS

    torch.manual_seed(0)
    if name in REAL or ":" in name:
        classifier = models.load(name, str(data / REAL[name]) if name in REAL else None, None)
        return classifier.network, classifier.preprocessing, "trained" if name in REAL else "random"
    network = models.build(name)
    if name in cifar.NETWORKS:
        preprocessing = PRESETS["cifar"]
    else:
        preprocessing = models._torchvision_preprocessing(torchvision.models.get_model_weights(name).DEFAULT)
    return network.float().eval().requires_grad_(False), preprocessing, "random"


def photographs(data: Path, shard: str, start: int, stop: int, preprocessing):
    """(images float32 [stop - start, 3, H, W], labels int64) of a shard, read as a run reads them."""
    import numpy as np
    import torch

    from pipeline.samples import decode
    from pipeline.sources import open_source

    source, (name,) = open_source(str(data / shard))
    samples = [decode(raw, preprocessing, 1000) for raw in source.read(source.census(name).marks_for(start, stop), name, start, stop)]
    return preprocessing.normalise(torch.from_numpy(np.stack([s.pixels for s in samples]))), torch.tensor([s.label for s in samples])


def settle(network, images) -> None:
    """Make a random network's activations of ordinary size: BatchNorm statistics from `images`, and a weight (or gain) that its
    initialisation leaves at zero, so that nothing below it would have a gradient, drawn from N(0, 0.02^2)."""
    import torch

    for name, parameter in network.named_parameters():
        if not name.endswith("bias") and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the statistics of one batch, as they are
        norm.train()
    if norms:
        with torch.no_grad():
            network(images)
    network.eval()


def measure(name: str, data: Path) -> dict:
    """One row of the table."""
    import numpy as np
    import oracles
    import torch
    import torch.nn.functional as F

    from pipeline.filters import FilterLayout
    from pipeline.saliency import check_network, choose_engine, make_engine
    from pipeline.saliency.loss import cross_entropy

    network, preprocessing, weights = network_of(name, data)
    shard = "cifar10/val-{}.tar" if preprocessing.crop is None else "imagenet-sample/sample-{}.tar"
    parameters = sum(p.numel() for p in network.parameters())
    count = 16 if preprocessing.crop is None else 1 if parameters > LARGE else 2 if parameters > LARGE / 5 or preprocessing.crop > 300 else 3
    images, labels = photographs(data, shard.format("00000"), 0, count, preprocessing)
    if weights == "random":
        settle(network, photographs(data, shard.format("00000"), 0, max(SETTLING, count), preprocessing)[0])
    layout = FilterLayout.of(network)
    check_network(network, images)
    engine, why = choose_engine(network, images)
    got = make_engine(engine, network, "abs")(images, labels)
    loss = cross_entropy(got.logits.double(), labels)
    truth = oracles.saliency(network, images, labels, "abs")
    true_loss = F.cross_entropy(torch.from_numpy(oracles.logits(network, images)), labels, reduction="none")
    exact = make_engine(engine, network.double(), "abs")(images.double(), labels).saliency
    errors = oracles.relative_errors(got.saliency, truth)
    saliency = got.saliency.double().numpy()
    live = [columns for columns in layout.slices.values() if truth[:, columns].any(1).all()]
    assert not saliency[:, [i for i in range(layout.total) if not truth[:, i].any()]].any(), "a dead filter has a saliency"
    return {
        "model": name,
        "filters": layout.total,
        "layers": len(layout.layers),
        "share": round(sum(p.numel() for p in network.parameters() if p.dim() == 4) / parameters, 5),
        "engine": engine,
        "why": why,
        "weights": weights,
        "input": images.shape[-1],
        "images": count,
        "batch": count,
        "largest": float(f"{errors.max():.2e}"),
        "median": float(f"{np.median(errors):.2e}"),
        "largest_of_a_layer": float(f"{max(oracles.relative_errors(saliency[:, c], truth[:, c]).max() for c in live):.2e}"),
        "in_float64": float(f"{oracles.relative_errors(exact, truth).max():.2e}"),
        "layers_without_gradient": len(layout.layers) - len(live),
        "loss": float(f"{float(((loss - true_loss).abs() / true_loss).max()):.2e}"),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "torchvision", *(("timm",) if ":" in name else ()))},
    }


def main(asked: list[str]) -> None:
    """Compute what is missing, a row at a time."""
    sys.path.insert(0, str(ROOT))
    import torch

    from pipeline.saliency import prepare_process

    prepare_process(torch.get_num_threads(), "fp32")
    data = Path(os.environ["FAULTLINE_DATA"])
    done = {row["model"] for row in rows()}
    for name in asked or names():
        if name in done:
            continue
        began = time.monotonic()
        row = measure(name, data)
        with open(DATA, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}: {row['engine']}, {row['largest']:.1e}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        gc.collect()


def rows() -> list[dict]:
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()] if DATA.exists() else []


# ---- the page ------------------------------------------------------------------------------------------------------

HEAD = """| model | F | layers | share | engine | s̄: largest | median | of one layer | in float64 | loss | input, images |
|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---|"""


def page() -> str:
    """docs/models.md with its tables as the data file has them; the words around them are the page's own."""
    text = PAGE.read_text(encoding="utf-8")
    for title, chosen in (("by name", [r for r in rows() if ":" not in r["model"]]), ("by factory", [r for r in rows() if ":" in r["model"]])):
        before, begin, rest = text.partition(f"<!-- {title} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = before + begin + table(chosen) + end + after
    return text


def table(chosen: list[dict]) -> str:
    versions = {" ".join(f"{package} {version}" for package, version in row["versions"].items()): None for row in chosen}
    lines = [HEAD, *(line(row) for row in sorted(chosen, key=lambda row: _natural(row["model"])))]
    reasons = [f"`{row['model']}` goes to `vmap`: {row['why']}." for row in chosen if row["engine"] == "vmap"]
    return "\n".join([f"\n{len(chosen)} networks, {', '.join(versions)}.\n", *lines, *(["", *(f"- {reason}" for reason in reasons)] if reasons else []), "", ""])


def line(row: dict) -> str:
    few = " †" if row["layers"] == 1 else " ‡" if row["share"] < 0.1 else ""
    dead = f" ({row['layers_without_gradient']} dead)" if row["layers_without_gradient"] else ""
    errors = [f"{row[key]:.0e}".replace("e-0", "e-") for key in ("largest", "median", "largest_of_a_layer", "in_float64", "loss")]
    trained = ", trained" if row["weights"] == "trained" else ""
    cells = [row["model"], f"{row['filters']:,}", f"{row['layers']}{dead}", f"{row['share']:.1%}{few}", row["engine"], *errors, f"{row['input']}, {row['images']}{trained}"]
    return f"| {' | '.join(cells)} |"


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


if __name__ == "__main__":
    main(sys.argv[1:])
    PAGE.write_text(page(), encoding="utf-8")
