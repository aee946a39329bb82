"""The roofline of docs/performance.md: what a step, naive per-sample gradients and the fused way must compute and move, and what that predicts.

`python tests/roofline.py machine` measures the matrix rate and the copy bandwidth here, into docs/data/performance/machine.json;
`python tests/roofline.py` counts every network's operations and bytes, predicts ratios from that machine, and writes the page's tables beside what
`faultline bench engine --format json` measured (docs/data/performance/engine.json), between its markers.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/performance.md"
DATA = ROOT / "docs/data/performance"
NETWORKS = {"resnet50": 224, "vgg19": 224, "densenet121": 224, "mobilenet_v2": 224, "resnet56": 32}
WAYS = ("step", "step-plain", "naive", "fused-unfolded", "fused")
NUMBER = 4  # bytes


def machine() -> dict:
    """Operations a second of a large matrix product and bytes a second of a large copy, on the threads of one engine; medians of 7."""
    import torch

    sys.path.insert(0, str(ROOT))
    from jobs import cluster

    torch.set_num_threads(cluster.threads_of_an_engine())
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = torch.randn(2**26), torch.empty(2**26)
    matrix = _median(lambda: torch.mm(a, b))
    copy = _median(lambda: target.copy_(source))
    return {"threads": torch.get_num_threads(), "processor": _processor(), "torch": torch.__version__, "operations_per_s": 2 * 2048**3 / matrix, "bytes_per_s": 2 * NUMBER * 2**26 / copy}


def _median(run) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def operations(name: str, side: int) -> dict[str, list[tuple[float, float]]]:
    """way -> (operations, bytes) of each operation of one image's forward and backward pass; weights are shared by a batch and not counted."""
    import torch
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode

    sys.path.insert(0, str(ROOT))
    from pipeline import models
    from pipeline.saliency.folding import CONVOLUTIONS, NORMS, Norm, folds

    network = models.build(name).eval().requires_grad_(False)
    image = torch.randn(1, 3, side, side)
    weights = [p for p in network.parameters() if p.dim() == 4]
    folded = {id(fold.norm.mean) for fold in folds(network, weights, image).values()}
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def note(ways, ops, numbers):
        for way in ways:
            found[way].append((ops, NUMBER * numbers))

    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            if not isinstance(out, torch.Tensor) or out.dim() < 2 or not out.is_floating_point() or func.__name__ == "__get__":
                return out
            x = next((a for a in args if isinstance(a, torch.Tensor)), out)
            given, made = sum(a.numel() for a in args if isinstance(a, torch.Tensor) and a.dim() == x.dim() and a.shape[0] == 1), out.numel()
            if func in CONVOLUTIONS:
                w = args[1]
                ops = 2 * made * w[0].numel()
                note(WAYS, ops, x.numel() + made)  # forward
                if x is not image:
                    note(WAYS, ops, x.numel() + made)  # gradient of the input
                unfolded = w[0].numel() * made // w.shape[0] if w.shape[2] * w.shape[3] > 1 and w.shape[1] > 1 else 0
                note(("step", "step-plain", "fused-unfolded", "fused"), ops, x.numel() + made)  # gradient of the weight, summed, or a sample's and reduced in cache
                note(("step-plain",) * (2 + (x is not image)), 0, 2 * (x.numel() + made))  # each of the three has its maps turned into oneDNN's own layout, and back
                note(("naive",), 0, x.numel() + unfolded)  # im2col
                note(("naive",), ops, (unfolded or x.numel()) + made + w.numel())  # a sample's, written to memory
                note(("naive",), 0, w.numel())  # and read again, to be reduced
            elif func in (F.linear, torch._C._nn.linear):
                note(WAYS, 4 * made * x.shape[-1], given + made)
                note(("step", "step-plain", "naive"), 2 * made * x.shape[-1], given + made)
            elif func in NORMS:
                ways = [way for way in WAYS if way != "fused" or id(Norm.of(func, args, kwargs).mean) not in folded]
                note(ways, 0, 2 * made)
                note([way for way in ways if way.startswith("fused")], 0, 2 * made)  # g in, g out
                note([way for way in ways if not way.startswith("fused")], 0, 3 * made)  # and x, for gamma
            elif func.__name__ not in ("flatten", "view", "reshape", "dropout", "size", "permute", "_is_view"):
                note(WAYS, 0, given + made)
                note(WAYS, 0, given + 2 * made)
            return out

    with torch.no_grad(), Count():
        network(image)
    return dict(found)


def seconds(parts: list[tuple[float, float]], rates: dict) -> float:
    """The roofline: each operation takes as long as its arithmetic or its memory does, whichever is longer."""
    return sum(max(ops / rates["operations_per_s"], size / rates["bytes_per_s"]) for ops, size in parts)


def count() -> dict:
    """Per network and way: operations and bytes of an image."""
    return {name: {way: [sum(p[0] for p in parts), sum(p[1] for p in parts)] for way, parts in operations(name, side).items()} for name, side in NETWORKS.items()}


def predicted(rates: dict) -> dict[str, dict[str, float]]:
    """network -> way -> predicted time over the step's."""
    found = {}
    for name, side in NETWORKS.items():
        parts = operations(name, side)
        step = seconds(parts["step"], rates)
        found[name] = {way: seconds(parts[way], rates) / step for way in WAYS} | {"images_per_s": 1 / step}
    return found


def tables() -> dict[str, str]:
    """Marker -> table."""
    rates = json.loads((DATA / "machine.json").read_text(encoding="utf-8"))
    rows = json.loads((DATA / "engine.json").read_text(encoding="utf-8"))
    ratios = {(row["model"], row["engine"]): row for row in rows}
    peers = [e for e in ("opacus-hooks", "opacus-functorch", "opacus-ew", "backpack") if any(row["engine"] == e for row in rows)]
    guess, sizes = predicted(rates), count()

    def got(name, engine, form="{:.2f}", key="ratio_to_step"):
        row = ratios.get((name, engine))
        return form.format(row[key]) if row and row[key] is not None else "cannot"

    roofline = ["| network | operations of a step | bytes: step | of plain maps | naive | fused, unfolded | fused |", "|---|---:|---:|---:|---:|---:|---:|"]
    for name in NETWORKS:
        s = sizes[name]
        roofline.append(f"| {name} | {s['step'][0] / 1e9:.2f} G | " + " | ".join(f"{s[way][1] / 1e6:,.0f} MB" for way in WAYS) + " |")
    gains = ["| network | plain maps: predicted | measured | naive: predicted | measured (best peer) | fused, unfolded: predicted | measured | fused: predicted | measured |", "|---|" + "---:|" * 8]
    for name in NETWORKS:
        best = min((ratios[name, e]["ratio_to_step"] for e in peers if (name, e) in ratios), default=None)
        g = guess[name]
        gains.append(f"| {name} | {g['step-plain']:.2f} | {got(name, 'step-plain')} | {g['naive']:.2f} | {'' if best is None else f'{best:.2f}'} | {g['fused-unfolded']:.2f} | {got(name, 'fused-unfolded')} | {g['fused']:.2f} | {got(name, 'fused')} |")
    shown = ["step-plain", "step-folded", "step-teams", "fused", "vmap", *peers, "loop"]
    measured = ["| network, batch | step, images/s | " + " | ".join(shown) + " |", "|---|---:|" + "---:|" * len(shown)]
    for name in NETWORKS:
        step = ratios.get((name, "step"))
        if step:
            measured.append(f"| {name}, {step['batch_size']} | {step['images_per_s']:,.1f} | " + " | ".join(got(name, e) for e in shown) + " |")
    memory = ["| network | step | " + " | ".join(shown) + " | error of fused |", "|---|---:|" + "---:|" * (len(shown) + 1)]
    for name in NETWORKS:
        floor = ratios[name, "step"]["peak_bytes"]
        over = [f"{ratios[name, e]['peak_bytes'] / floor:.2f}" if (name, e) in ratios else "cannot" for e in shown]
        memory.append(f"| {name} | {floor / 1e6:,.0f} MB | " + " | ".join(over) + f" | {got(name, 'fused', '{:.0e}', 'relative_error')} |")
    line = ["| what | measured | beside | | ratio |", "|---|---:|---|---:|---:|"]
    for file in sorted(DATA.glob("index*.json")) + sorted(DATA.glob("pipeline*.json")) + sorted(DATA.glob("maps*.json")):
        title = {"index": "index of 10,000 x 2,032"}.get(file.stem, file.stem.replace("-", ", "))
        for row in json.loads(file.read_text(encoding="utf-8")):
            floor = f"{row['beside']} | {_short(row['floor'])} {row['unit']} | {row['ratio']:.2f}" if row["floor"] is not None else " | | "
            line.append(f"| {title}: {row['what']} | {_short(row['value'])} {row['unit']} | {floor} |")
    return gpu() | {"line": "\n".join(line), "roofline": "\n".join(roofline), "gains": "\n".join(gains), "measured": "\n".join(measured), "memory": "\n".join(memory), "layers": layers(), "process": process(), "small": small(), "runs": runs()}


def gpu() -> dict[str, str]:
    """The tables of docs/data/performance/gpu.json: beside the step and peers, of some layers, and what each precision does to neighbours."""
    data = json.loads((DATA / "gpu.json").read_text(encoding="utf-8"))
    rows = {(row["precision"], row["model"], row["engine"]): row for row in data["engine"]}
    beside = ["| network | precision, batch | step, images/s | step-folded | fused: predicted | fused | fused, images/s | its memory over the step's |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    rates = data["machine"]
    guesses = {p: predicted({"operations_per_s": rates["operations_per_s"][p], "bytes_per_s": rates["bytes_per_s"] * (2 if p == "bf16" else 1)}) for p in rates["operations_per_s"]}
    for precision, guess in guesses.items():
        for name in NETWORKS:
            step, folded, fused = (rows[precision, name, engine] for engine in ("step", "step-folded", "fused"))
            peak = f"{fused['peak_bytes'] / step['peak_bytes']:.2f}" if fused["peak_bytes"] else ""
            beside.append(f"| {name} | {precision}, {step['batch_size']} | {step['images_per_s']:,.0f} | {folded['ratio_to_step']:.2f} | {guess[name]['fused']:.2f} | {fused['ratio_to_step']:.2f} | {fused['images_per_s']:,.0f} | {peak} |")
    layers = ["| layer, 128 images | bf16: its summed gradient | filter saliency | tf32 | | fp32 | |", "|---|---:|---:|---:|---:|---:|---:|"]
    for network, layer in dict.fromkeys((row["network"], row["layer"]) for row in data["layers"]):
        cells = [cell for row in data["layers"] if (row["network"], row["layer"]) == (network, layer) for cell in (f"{row['summed_gradient_us']:,.0f} us", f"{row['filter_saliency_us']:,.0f} us")]
        layers.append(f"| {network}: {layer} | " + " | ".join(cells) + " |")
    recall = ["| network, images (errors) | precision | recall of 10 neighbours | error of a sample's s̄: median | 90% | predictions changed | images/s |", "|---|---|---:|---:|---:|---:|---:|"]
    for row in data["recall"]:
        recall.append(f"| {row['network']}, {row['images']:,} ({row['errors']:,}) | {row['precision']} | {row['recall']:.3f} | {row['median_error']:.0e} | {row['error_90']:.0e} | {row['predictions_changed']} | {row['images_per_s']:,.0f} |")
    timed = {(row["model"], row["batch_size"], row["engine"]): row for row in data["peers"]}
    shown = [e for e in dict.fromkeys(row["engine"] for row in data["peers"]) if e != "step"]
    peers = ["| network, batch | step, images/s | " + " | ".join(shown) + " | memory of fused over the step's | of the leanest peer in a batch |", "|---|---:|" + "---:|" * (len(shown) + 2)]
    for name, size in dict.fromkeys((row["model"], row["batch_size"]) for row in data["peers"]):
        own = {e: timed[name, size, e] for e in ("step", *shown) if (name, size, e) in timed}
        memory = [f"{peak / own['step']['peak_bytes']:.2f}" for peak in (own["fused"]["peak_bytes"], min(row["peak_bytes"] for e, row in own.items() if e not in ("step", "fused", "loop")))]
        peers.append(f"| {name}, {size} | {own['step']['images_per_s']:,.0f} | " + " | ".join([*(f"{own[e]['ratio_to_step']:.2f}" if e in own else "not tried" for e in shown), *memory]) + " |")
    batches = list(dict.fromkeys(row["batch_size"] for row in data["sizes"]))
    sizes = ["| network | precision | " + " | ".join(f"batch of {size}" for size in batches) + " |", "|---|---|" + "---:|" * len(batches)]
    for name, precision in dict.fromkeys((row["model"], row["precision"]) for row in data["sizes"]):
        cells = [f"{row['ratio_to_step']:.2f} ({row['images_per_s']:,.0f})" for row in data["sizes"] if (row["model"], row["precision"], row["engine"]) == (name, precision, "fused")]
        sizes.append(f"| {name} | {precision} | " + " | ".join(cells) + " |")
    line = ["| what | measured | beside | | ratio |", "|---|---:|---|---:|---:|"]
    for row in data["line"]:
        floor = f"{row['beside']} | {_short(row['floor'])} {row['unit']} | {row['ratio']:.2f}" if row["floor"] is not None else " | | "
        line.append(f"| {row['what']} | {_short(row['value'])} {row['unit']} | {floor} |")
    tables = {"gpu-sizes": sizes, "gpu-line": line}
    return {name: "\n".join(rows) for name, rows in tables.items()} | {"gpu": "\n".join(beside), "gpu-peers": "\n".join(peers), "gpu-layers": "\n".join(layers), "gpu-recall": "\n".join(recall)}


def layers() -> str:
    """What each layer's passes reach on a CPU, in GFLOP/s."""
    ways = {"forward": "forward", "input's gradient": "input_gradient", "weight's, summed": "summed_gradient", "filter saliency by torch's products": "products", "in machine code": "filter_saliency"}
    lines = ["| layer, 4 images, one thread | " + " | ".join(ways) + " |", "|---|" + "---:|" * len(ways)]
    for row in json.loads((DATA / "layers-cpu.json").read_text(encoding="utf-8")):
        lines.append(f"| {row['network']}: {row['layer']} | " + " | ".join(f"{row[f'{way}_gflop_per_s']:.0f}" for way in ways.values()) + " |")
    return "\n".join(lines)


def process() -> str:
    """What the settings of a process are worth, from docs/data/performance/process.json (tests/bench_process.py): rates over those of the settings as they are, alone."""
    rows = json.loads((DATA / "process.json").read_text(encoding="utf-8"))
    ways = {(True, "1000", False): "memory given back", (False, "1000", True): "whole batches", (False, "0", True): "and threads sleep at once", (False, "10000", True): "and 10,000 turns", (False, "", True): "and libgomp's own"}
    lines = ["| network | | as set, images/s | " + " | ".join(ways.values()) + " |", "|---|---|---:|" + "---:|" * len(ways)]
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {(row["beside"], row["teams"], row["turns"], row["kept"]): row["images_per_s"] for row in rows if row["model"] == model}
        for beside in (False, True):
            unit = found[beside, True, "1000", True]
            lines.append(f"| {model} | {'beside a busy process' if beside else 'alone'} | {unit:,.0f} | " + " | ".join(f"{found[(beside, *way)] / unit:.2f}" for way in ways) + " |")
    return "\n".join(lines)


def small() -> str:
    """The engine and the loop in batches smaller than a run's, over the step in as many: time, and the engine's memory."""
    rows = [row for file in sorted(DATA.glob("small-*.json")) for row in json.loads(file.read_text(encoding="utf-8"))]
    found = {(row["model"], row["batch_size"], row["engine"]): row for row in rows}
    lines = ["| network, batch | step, images/s | fused | loop | memory of fused over the step's |", "|---|---:|---:|---:|---:|"]
    for model, size in dict.fromkeys((row["model"], row["batch_size"]) for row in sorted(rows, key=lambda row: row["model"])):
        step, fused, loop = (found[model, size, engine] for engine in ("step", "fused", "loop"))
        lines.append(f"| {model}, {size} | {step['images_per_s']:,.1f} | {fused['ratio_to_step']:.2f} | {loop['ratio_to_step']:.2f} | {fused['peak_bytes'] / step['peak_bytes']:.2f} |")
    return "\n".join(lines)


def runs() -> str:
    """What each file of docs/data/performance was made by, from runs.json."""
    lines = ["| file | command | commit, day | |", "|---|---|---|---|"]
    for run in json.loads((DATA / "runs.json").read_text(encoding="utf-8")):
        lines.append(f"| {run['file']} | `{run['command']}` | {run['commit']}, {run['day']} | {run['machine']}{run['note'] and '; '}{run['note']} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def draw() -> None:
    """docs/images/performance.png: the time of every way, over the step's, by network."""
    sys.path.insert(0, str(ROOT))
    from jobs.charts import STYLES
    from matplotlib.figure import Figure

    rows = json.loads((DATA / "engine.json").read_text(encoding="utf-8"))
    ways = {"fused": "faultline, fused", "vmap": "vmap(grad), best chunk", "opacus-hooks": "Opacus, hooks", "opacus-functorch": "Opacus, functorch", "opacus-ew": "Opacus, ExpandedWeights", "loop": "one image at a time"}
    figure = Figure((7.2, 3.6), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for (way, name), (colour, _, marker) in zip(ways.items(), STYLES):
        found = {row["model"]: row["ratio_to_step"] for row in rows if row["engine"] == way}
        axes.plot([found.get(model, float("nan")) for model in NETWORKS], range(len(NETWORKS)), linestyle="none", marker=marker, markersize=9 if way == "fused" else 6, color=colour, label=name)
    axes.axvline(1, color="#1a1a1a", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([0.8, 1, 1.5, 2, 3, 5, 9], ["0.8", "1", "1.5", "2", "3", "5", "9"])
    axes.minorticks_off()
    axes.set_yticks(range(len(NETWORKS)), [f"{name}, {side} x {side}" for name, side in NETWORKS.items()])
    axes.invert_yaxis()
    axes.set_xlabel("time over that of a plain training step (line at 1)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7.5, frameon=False, loc="upper right")
    figure.savefig(ROOT / "docs/images/performance.png")


def page() -> str:
    """docs/performance.md with its tables; the words around them are the page's own."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert begin and end, f"docs/performance.md has no place for '{name}'"
        text = f"{before}{begin}\n{table}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["machine"]:
        DATA.mkdir(parents=True, exist_ok=True)
        (DATA / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    else:
        PAGE.write_text(page(), encoding="utf-8")
        draw()
