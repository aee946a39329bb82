"""Layer by layer: a kernel's filter saliency beside the summed weight gradient that a training step takes of the same maps.

    python tests/bench_layers.py > layers.json          on a GPU: about two minutes, most of it compiling
    python tests/bench_layers.py cpu > layers-cpu.json  on a CPU, in one thread: about a minute

A benchmark, not a test: what it found is the `layers` of docs/data/performance/gpu.json, and docs/data/performance/layers-cpu.json. Noise for maps, channels-last.
On a GPU: medians of CUDA events around replayed graphs, in the three precisions; every time is of the kernel as the engine takes it: its own tile, and of float32 the halving of both maps.
On a CPU: medians of interleaved turns, each with maps of its own turn in cache as the layer before would leave them; and torch's own products, which serve where the kernel does not.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

from pipeline.saliency import kernels, microkernels, prepare_process, products

BATCH, ROUNDS, EACH = 128, 7, 8  # images of a layer; turns, and calls in each
COMPILERS = 12
LAYERS = {  # network, layer -> inputs, outputs, kernel, stride, side of the input
    ("resnet50", "stem"): (3, 64, 7, 2, 224),
    ("resnet50", "3x3 64 56"): (64, 64, 3, 1, 56),
    ("resnet50", "3x3 128 28"): (128, 128, 3, 1, 28),
    ("resnet50", "3x3 256 14"): (256, 256, 3, 1, 14),
    ("resnet50", "3x3 512 7"): (512, 512, 3, 1, 7),
    ("resnet50", "1x1 64-256 56"): (64, 256, 1, 1, 56),
    ("resnet50", "1x1 1024-256 14"): (1024, 256, 1, 1, 14),
    ("resnet50", "1x1 512-2048 7"): (512, 2048, 1, 1, 7),
    ("vgg19", "64 224"): (64, 64, 3, 1, 224),
    ("vgg19", "256 56"): (256, 256, 3, 1, 56),
    ("vgg19", "512 28"): (512, 512, 3, 1, 28),
    ("densenet121", "1x1 192-128 56"): (192, 128, 1, 1, 56),
    ("densenet121", "3x3 128-32 28"): (128, 32, 3, 1, 28),
    ("mobilenet_v2", "1x1 96-24 56"): (96, 24, 1, 1, 56),
    ("resnet56", "16 32"): (16, 16, 3, 1, 32),
    ("resnet56", "32 16"): (32, 32, 3, 1, 16),
    ("resnet56", "64 8"): (64, 64, 3, 1, 8),
}
FEW_IMAGES, TURNS = 4, 15  # of a layer on a CPU: a team's half of a batch
DEPTHWISE = {("mobilenet_v2", "depthwise 144 56"): (144, 144, 3, 1, 56), ("mobilenet_v2", "depthwise 384 14"): (384, 384, 3, 1, 14)}


def turns(key: tuple[str, str], precision: str) -> dict[str, Callable[[], object]]:
    ins, outs, kernel, stride, side = LAYERS[key]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    padding, wide = kernel // 2, (side - 1) // stride + 1
    torch.manual_seed(0)
    images, gradient = (torch.randn(BATCH, *shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last) for shape in ((ins, side, side), (outs, wide, wide)))
    weight = torch.randn(outs, ins, kernel, kernel, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    where = ([stride] * 2, [padding] * 2, [1] * 2)
    return {
        "summed_gradient_us": lambda: torch.ops.aten.convolution_backward(gradient, images, weight, None, *where, False, [0, 0], 1, [False, True, False]),
        "filter_saliency_us": lambda: kernels.filter_saliency(images, gradient, weight.shape, *where, 1, "abs"),
    }


def compiled(task: tuple[tuple[str, str], str]) -> None:
    """Triton keeps what it has compiled on disk, for every process."""
    prepare_process(1, task[1])
    turns(*task)["filter_saliency_us"]()
    torch.cuda.synchronize()


def recorded(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`EACH` calls as one CUDA graph, as the engine and the step replay theirs: a small layer is done sooner than Python can ask for it."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(EACH):
            run()
    graph.replay()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one of its calls."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / EACH


def on_a_cpu() -> list[dict]:
    prepare_process(1, "fp32")
    found = []
    for (network, layer), (ins, outs, kernel, stride, side) in (LAYERS | DEPTHWISE).items():
        groups, padding, wide = ins if layer.startswith("depthwise") else 1, kernel // 2, (side - 1) // stride + 1
        torch.manual_seed(0)
        images, gradient = (torch.randn(FEW_IMAGES, *shape).contiguous(memory_format=torch.channels_last) for shape in ((ins, side, side), (outs, wide, wide)))
        weight = torch.randn(outs, ins // groups, kernel, kernel).contiguous(memory_format=torch.channels_last)
        where = ((stride,) * 2, (padding,) * 2, (1, 1))
        each = {
            "forward": lambda: torch.conv2d(images, weight, None, *where, groups),
            "input_gradient": lambda: torch.ops.aten.convolution_backward(gradient, images, weight, None, *where, False, [0, 0], groups, [True, False, False]),
            "summed_gradient": lambda: torch.ops.aten.convolution_backward(gradient, images, weight, None, *where, False, [0, 0], groups, [False, True, False]),
            "products": lambda: products.by_products(images, gradient, weight.shape, *where, groups, "abs"),
            "filter_saliency": lambda: microkernels.filter_saliency(images, gradient, weight.shape, *where, groups, "abs"),
        }
        times = {name: [] for name in each}
        for _ in range(TURNS + 1):
            for name, run in each.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        operations = 2 * FEW_IMAGES * weight.numel() * wide**2
        found.append({"network": network, "layer": layer, "batch_size": FEW_IMAGES} | {f"{name}_gflop_per_s": round(operations / statistics.median(of[1:]) / 1e9, 1) for name, of in times.items()})
        print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    print(json.dumps(on_a_cpu() if sys.argv[1:] == ["cpu"] else on_a_gpu()))


def on_a_gpu() -> list[dict]:
    tasks = [(key, precision) for key in LAYERS for precision in ("bf16", "tf32", "fp32")]
    with multiprocessing.get_context("spawn").Pool(min(COMPILERS, os.cpu_count() or 1)) as pool:
        pool.map(compiled, tasks, chunksize=1)
    found = []
    for key, precision in tasks:
        prepare_process(1, precision)
        each = {name: recorded(run) for name, run in turns(key, precision).items()}
        times = {name: [] for name in each}
        for _ in range(ROUNDS):
            for name, graph in each.items():
                times[name].append(microseconds(graph))
        network, layer = key
        found.append({"network": network, "layer": layer, "precision": precision, "batch_size": BATCH} | {name: round(statistics.median(of), 1) for name, of in times.items()})
        print(found[-1], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
