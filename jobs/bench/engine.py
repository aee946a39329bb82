"""`faultline bench engine`: what filter saliency costs beside one plain training step of the same network, batch, device and precision.

Every contender takes its turn in every round of one process, so that whatever else the machine does meets them all; medians are compared. Who has taken FAR times as long as the step drops out after SURE rounds or a later one, and is compared with the step of its own rounds.
The floor, `step`, is one batched forward and backward with the gradients of all parameters, its maps channels-last as the engine's where the network takes them so. Advantages that the engine takes and no
training step has are given to it one by one: `step-folded`, BatchNorms folded into convolutions, and `step-teams`, the batch in parts that are computed side by side. `step-plain` has maps as they come.
`loop` is one image at a time, as the authors' code does it, and has the faster of both layouts, as `vmap` and the peers do (`peers.py`). What is not among the first is asked for by name.
A contender that cannot do a network is told, with its own words, and left out of that network.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from jobs import begin, cluster
from jobs.bench.measure import now
from jobs.bench.peers import PEERS, peer
from jobs.progress import say
from pipeline import models
from pipeline.errors import BadRequest, printable
from pipeline.saliency import make_engine, prepare_process
from pipeline.saliency.fused import takes_channels_last
from pipeline.saliency.loss import cross_entropy
from pipeline.saliency.objections import objection
from pipeline.saliency.replays import Replays
from pipeline.saliency.teams import Teams
from pipeline.saliency.vmap import reduce_filters

MODELS = ("resnet50", "vgg19", "densenet121", "mobilenet_v2", "resnet56")
SIZES = {"inception_v3": 299}  # pixels; CIFAR's networks have 32, all others 224
CONTENDERS = ("step", "step-folded", "fused", "vmap", "loop")
STEPS = ("step", "step-folded", "step-teams", "step-plain")
ASKED = ("step-teams", "step-plain", "fused-unfolded", *PEERS)  # for by name alone
CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)  # of vmap, of which the fastest is taken
SAME = 0.05  # |s̄ - s̄| / |s̄| of the two layouts of a peer, of which one may be misread
SURE = 3  # rounds of those that take FAR times as long as the step: more would take an hour and change nothing
FAR = 2.0
WITNESSES = 2  # images that the error is measured on

Contender = Callable[[torch.Tensor, torch.Tensor], object]


@dataclass(frozen=True)
class Row:
    """One contender on one network. images_per_s: by its median time; ratio_to_step: that time to the step's of the same rounds, so that the quotient of two rates is another where one dropped out; peak_bytes: of memory above what was held before, of one batch, gradients included,
    None where it cannot be told; relative_error: the largest over a few images of s̄ against float64, None where there is no s̄."""

    model: str
    engine: str
    device: str
    precision: str
    batch_size: int
    images_per_s: float
    ratio_to_step: float
    peak_bytes: int | None
    relative_error: float | None


def bench_engine(names: list[str], batch_size: int | None, device: str | None, precision: str, rounds: int, contenders: list[str]) -> list[Row]:
    """Rows of every network in turn. Raises BadRequest for what cannot be measured here."""
    device = cluster.device_for(device, "local")
    if precision not in ("fp32", "tf32", "bf16"):
        raise BadRequest(f"--precision: '{printable(precision)}' is not one of fp32, tf32, bf16")
    if precision == "tf32" and device == "cpu":
        raise BadRequest("--precision: tf32 exists on CUDA GPUs alone; use fp32")
    for value, option in ((batch_size, "--batch-size"), (rounds, "--rounds")):
        if value is not None and value < 1:
            raise BadRequest(f"{option}: {value} is less than 1")
    known = (*CONTENDERS, *ASKED)
    strange = [c for c in contenders if c not in known]
    if strange:
        raise BadRequest(f"--engines: '{printable(strange[0])}' is not one of {', '.join(known)}")
    if "step-teams" in contenders and device != "cpu":
        raise BadRequest("--engines: step-teams is for CPUs alone; leave it out")
    networks = {name: built(name) for name in names}  # a mistyped name is told before anything is measured
    prepare_process(cluster.threads_of_an_engine(), precision)
    return [row for name in names for row in _network(name, networks.pop(name), batch_size, device, precision, rounds, contenders)]


def _network(name: str, network: torch.nn.Module, batch_size: int | None, device: str, precision: str, rounds: int, contenders: list[str]) -> list[Row]:
    images, labels, network = subject(name, network, batch_size, device)
    autocast = torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    chosen: dict[str, Contender] = {}
    peaks: dict[str, int | None] = {}
    with autocast:
        for c in dict.fromkeys(["step", *contenders]):
            try:
                run = _contender(c, network, images, labels)
                run(images, labels)  # warm
                now(device)  # what goes wrong on a GPU is told here, and not by the next
                peaks[c] = _peak(lambda: run(images, labels), device)
                chosen[c] = run
            except BadRequest:
                raise
            except Exception as fault:  # whatever a peer raises, or a network in it
                if c in STEPS:
                    raise
                say(f"{name}: {c} cannot do it ({printable((str(fault).splitlines() or [type(fault).__name__])[0])[:160]})")
        seconds: dict[str, list[float]] = {c: [] for c in chosen}
        for turn in range(rounds):
            order = contending(seconds)
            for c in order[turn % len(order) :] + order[: turn % len(order)]:
                start = now(device)
                chosen[c](images, labels)
                seconds[c].append(now(device) - start)
            say(f"{name}: round {turn + 1} of {rounds}, " + ", ".join(f"{c} {len(images) / seconds[c][-1]:,.1f}/s" for c in order))
        found = {c: chosen[c](images, labels)[:WITNESSES] for c in chosen if c not in STEPS}
    errors = _errors(network, images[:WITNESSES], labels[:WITNESSES], found)
    return [Row(name, c, device, precision, len(images), len(images) / median(seconds[c]), median(seconds[c]) / median(seconds["step"][: len(seconds[c])]), peaks[c], errors.get(c)) for c in chosen]


def contending(seconds: dict[str, list[float]]) -> list[str]:
    """Who takes part in the next round, by the seconds that each took in the rounds before it: the step always, who once dropped out no more."""
    rounds = len(seconds["step"])
    return [c for c, taken in seconds.items() if c == "step" or rounds < SURE or len(taken) == rounds and median(taken) < FAR * median(seconds["step"])]


def built(name: str) -> torch.nn.Module:
    """The network of a name of --models, its weights seeded where its constructor draws them. Raises BadRequest."""
    torch.manual_seed(1)  # not the images' seed: they would be made of the same numbers
    try:
        return models.build(name)
    except BadRequest as fault:
        raise BadRequest(str(fault).replace("--model:", "--models:", 1)) from None


def subject(name: str, network: torch.nn.Module, batch_size: int | None, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    """(images, labels, network in eval mode): seeded noise, and the network's own initialisation with BatchNorm statistics of that noise."""
    torch.manual_seed(0)
    side = 32 if "cifar" in name or name in models.cifar.NETWORKS else SIZES.get(name, 224)
    size = batch_size or begin.default_batch(device, side * side)
    images = torch.randn(size, 3, side, side)
    network.train()
    with torch.no_grad():
        network(images[: max(2, min(size, 8))])
    network = network.eval().requires_grad_(False).to(device)
    images = images.to(device)
    with torch.no_grad():
        classes = network(images[:1]).shape[1]
    return images, torch.randint(classes, (size,), device=device), network


def _contender(name: str, network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Contender:
    """What takes (images, labels) and computes, s̄ [B, F] but for the steps. All but the engines have a copy of the network."""
    if name in ("fused", "fused-unfolded"):
        return _fused(network, images, name == "fused")
    if name == "vmap":
        return _in_the_faster_layout(lambda own: _vmap(own, images, labels), network, images, labels)
    if name in PEERS:
        return _in_the_faster_layout(lambda own: peer(name, own), network, images, labels)
    if name == "loop":
        return _in_the_faster_layout(lambda own: _loop(own.requires_grad_(True)), network, images, labels)
    own = copy.deepcopy(network)
    if name == "step-folded":
        own = folded(own)
    return _step(own, images, name)


def _in_the_faster_layout(make: Callable[[torch.nn.Module], Contender], network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Contender:
    """Made of a copy of the network with maps as they come, or channels-last, whichever takes less time for a batch, if it gives the same answer. On a GPU as they come."""
    plain = make(copy.deepcopy(network))
    if images.is_cuda or not takes_channels_last(network, images[:1]):
        return plain
    seconds: dict[Contender, float] = {}
    found = []
    try:
        inner = make(copy.deepcopy(network).to(memory_format=torch.channels_last))
        last = lambda images, labels: inner(images.contiguous(memory_format=torch.channels_last), labels)  # noqa: E731
        for run in (plain, last):
            run(images[:1], labels[:1])
            start = time.perf_counter()
            found.append(run(images, labels))
            seconds[run] = time.perf_counter() - start
    except Exception:  # what plain raises is told where it is run next
        return plain
    right = float((found[1] - found[0]).norm() / found[0].norm()) < SAME
    return min(seconds, key=seconds.get) if right else plain


def _step(network: torch.nn.Module, images: torch.Tensor, name: str) -> Contender:
    """With what the engine has: maps channels-last, and on a GPU one CUDA graph that is replayed. Makes the network's parameters ask for gradients."""
    if name != "step-plain" and takes_channels_last(network, images[:1]):
        layout = torch.channels_last
        network.to(memory_format=layout)
    else:
        layout = torch.contiguous_format
    network.requires_grad_(True)  # after the trial: autocast keeps what it casts of weights that do, with its graph, and a recording breaks off at it

    def compute(images: torch.Tensor, labels: torch.Tensor) -> tuple:
        step(network, images.contiguous(memory_format=layout), labels)
        return ()

    def gradients(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = cross_entropy(network(images.contiguous(memory_format=layout)).float(), labels).sum()
        return tuple(g[None] for g in torch.autograd.grad(loss, list(network.parameters())))

    if name == "step-teams":
        teams = Teams(network)
        return lambda images, labels: [g.sum(0) for g in teams(gradients, images, labels)]
    if not images.is_cuda:
        return lambda images, labels: (compute(images, labels), network.zero_grad(set_to_none=True))  # as an optimiser does: what is held before the next batch is the network alone
    replays = Replays()
    return lambda images, labels: replays(compute, images, labels)


def step(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    network.zero_grad(set_to_none=True)
    cross_entropy(network(images).float(), labels).sum().backward()


def _loop(network: torch.nn.Module) -> Contender:
    def run(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = []
        for image, label in zip(images, labels):
            step(network, image[None], label[None])
            rows.append(torch.cat([reduce_filters(p.grad[None], "abs")[0] if p.grad is not None else p.new_zeros(p.shape[0]) for p in network.parameters() if p.dim() == 4]))
        network.zero_grad(set_to_none=True)
        return torch.stack(rows)

    return run


def _fused(network: torch.nn.Module, images: torch.Tensor, fold: bool) -> Contender:
    """With BatchNorms folded or not. Raises RuntimeError where it would not be exact."""
    if reason := objection(network, images[:3]):
        raise RuntimeError(reason)
    engine = make_engine("fused", network, "abs")
    if not fold:
        engine(images[:1], images.new_zeros(1, dtype=torch.int64))
        layout = torch.channels_last if engine.channels_last else torch.contiguous_format
        engine.folds, engine.laid = {}, {i: weight.detach().contiguous(memory_format=layout) for i, weight in enumerate(engine.weights)}
    return lambda images, labels: engine(images, labels).saliency


def _vmap(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Contender:
    """`vmap(grad)` at the chunk that is fastest here."""
    engine = make_engine("vmap", network, "abs")

    def timed(chunk: int) -> float:
        engine.chunk = chunk
        start = now(images.device.type)
        try:
            engine(images, labels)
        except torch.OutOfMemoryError:
            return float("inf")
        return now(images.device.type) - start

    timed(1)  # warm
    engine.chunk = min((c for c in CHUNKS if c <= len(images)), key=timed)
    return lambda images, labels: engine(images, labels).saliency


def folded(network: torch.nn.Module) -> torch.nn.Module:
    """The same function in eval mode, its BatchNorms folded into the convolutions before them where torch.fx can follow it; otherwise as it is."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(network)
    except Exception:  # fx refuses control flow in many ways
        return network


def _errors(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, found: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest |s̄ - truth| / |truth| of each engine, truth being one image at a time in float64."""
    if not found:
        return {}
    exact = copy.deepcopy(network).double()
    truth = _loop(exact.requires_grad_(True))(images.double(), labels)
    return {c: float(((s.double() - truth).norm(dim=1) / truth.norm(dim=1)).max()) for c, s in found.items()}


def _peak(run: Callable[[], object], device: str) -> int | None:
    """Bytes that `run` holds at its highest, above what is held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that what is taken is seen
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    return None


def _status(key: str) -> int:
    """Bytes, from /proc/self/status. Raises OSError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def records(rows: list[Row]) -> Iterator[dict]:
    """As `--format json` gives them."""
    return map(asdict, rows)
