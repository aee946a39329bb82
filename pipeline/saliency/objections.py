"""Why the fused engine would not be exact for a network: what that does with a few images, in a batch and alone, held against autograd.

It looks at what a network does, never at its class, and any doubt is an objection: the network goes to the definition (`vmap.py`), which takes longer and is right.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch

from pipeline.filters import FilterLayout
from pipeline.saliency import is_memory
from pipeline.saliency.fused import FusedEngine, frozen, sound_rows
from pipeline.saliency.layouts import PlainLayouts
from pipeline.saliency.loss import cross_entropy

TOLERANCE = 1e-3  # relative, between one image's s̄ here and by autograd, over all filters; in float64 over any layer's
COARSE = 1e-2  # over any layer's in float32
NOTHING = 1e-10  # of all of s̄: a layer with less has rounding alone
ROWS = 2  # images that are held against autograd


def objection(network: torch.nn.Module, images: torch.Tensor) -> str | None:
    """Why the fused engine would not be exact for this network, or None. images: float32 [B, 3, H, W], two or more.

    It looks at what the network does: whether its weights are used in one plain convolution each, whether an image's answer depends on who shares its batch,
    and whether s̄ of images in a batch, in either order, is what autograd gives for each alone, layer by layer: in float32, and where they differ there in float64,
    since two ways to compute an activation may put it on two sides of a ReLU's kink, in a large network by a per cent of s̄.
    """
    if parametrised := [name for name, _ in network.named_modules() if name.endswith("parametrizations")]:
        return f"{parametrised[0].rpartition('.')[0]} computes its weight from others"
    layout = FilterLayout.of(network)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    try:
        with _exactly(images.device.type):
            got = FusedEngine(network, layout, "abs").once(images, labels)
            sound = sound_rows(got.logits)
            if not sound.any():
                return "its output for the trial images is not finite"
            order = sound.int().argsort(descending=True, stable=True)
            images, logits = images[order], got.logits[order]
            alone = FusedEngine(network, layout, "abs").once(images[:1], labels[:1])
            if not torch.allclose(logits[:1], alone.logits, rtol=1e-2, atol=1e-3 * float(logits[: int(sound.sum())].abs().max())):
                return "an image's logits depend on which images share its batch"
            error, of_layer = _errors(network, layout, images[:ROWS], labels[:ROWS])
            if not (error <= TOLERANCE and of_layer <= COARSE):
                error = max(_errors(copy.deepcopy(network).double(), layout, images[:ROWS].double(), labels[:ROWS]))
    except RuntimeError as fault:
        if is_memory(fault):
            raise
        return str(fault).splitlines()[0].removeprefix("the fused engine is not exact here: ").removesuffix("; use --engine vmap")
    if not error <= TOLERANCE:
        return f"its filter saliency differs from autograd's by {error:.1e} on a trial image"
    return None


def _errors(network, layout, images, labels) -> tuple[float, float]:
    """Largest relative differences of any image's s̄ from autograd's, over all filters and over any layer's, in the network's own precision: of the batch, and of the batch in the other order."""
    truth = torch.cat([_by_autograd(network, images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]).double()
    engine = FusedEngine(network, layout, "abs")
    found = torch.stack([engine.once(images, labels).saliency, engine.once(images.flip(0), labels.flip(0)).saliency.flip(0)]).double()
    sound = sound_rows(truth)
    if not sound.any():
        return torch.inf, torch.inf
    found, truth = found[:, sound], truth[sound]
    least = NOTHING * truth.norm(dim=-1) + 1e-300
    apart = lambda at: float(((found - truth)[..., at].norm(dim=-1) / torch.maximum(truth[:, at].norm(dim=-1), least)).nan_to_num(torch.inf).max())  # noqa: E731
    return apart(slice(None)), max(map(apart, layout.slices.values()))


def _by_autograd(network, images, labels) -> torch.Tensor:
    """s̄ [1, F] of one image by plain reverse mode, for `objection`."""
    weights = [p for p in network.parameters() if p.dim() == 4]
    with frozen(network), torch.enable_grad(), PlainLayouts():
        for weight in weights:
            weight.requires_grad_(True)
        loss = cross_entropy(network(images.clone()).float(), labels).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g)[None].flatten(2).abs().mean(2) for w, g in zip(weights, gradients)], 1)


@contextmanager
def _exactly(device: str):
    """No TF32 and no autocast inside, whatever the run's precision: a trial looks at what a network does, not at how it is rounded."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
