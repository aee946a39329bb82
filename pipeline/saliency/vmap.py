"""The definition: s(x, y)_i = |dL(x, y) / dtheta_i| by `vmap(grad(L))`, then the mean over each filter (eq. 1, section 2.1).

It holds the gradients of every 4-D weight for a chunk of samples at once, so the chunk is chosen to fit; it depends on the
network alone, never on the machine, since results are bit-equal only for equal chunks: those of a batch are, the last being filled up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value, vmap
from torch.overrides import TorchFunctionMode

from pipeline.filters import FilterLayout
from pipeline.saliency import Saliency
from pipeline.saliency.loss import cross_entropy
from pipeline.saliency.places import Places, filled_up

CHUNK_NUMBERS = 2**27  # gradient numbers held at once, at most: 512 MiB in float32
NORMS = {F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm, F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm}
CHUNK = 8  # samples at once, at most: on a CPU more of them only leave the cache


class VmapEngine:
    """See `pipeline.saliency.Engine`. `aggregation`: `abs` or `signed`."""

    def __init__(self, network: torch.nn.Module, layout: FilterLayout, aggregation: str):
        self.network, self.aggregation = network, aggregation
        self.names = [name for name, p in network.named_parameters() if p.dim() == 4]
        self.filters = layout.total
        fit = CHUNK_NUMBERS // sum(p.numel() for p in network.parameters() if p.dim() == 4)
        self.chunk = 2 ** (max(1, min(CHUNK, fit)).bit_length() - 1)

    def begin(self, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Saliency]:
        """See `pipeline.saliency.Engine`: all is done when this returns."""
        found = self(images, labels)
        return lambda: found

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> Saliency:
        frozen = {name: p.detach() for name, p in self.network.named_parameters()}
        weights = {name: frozen.pop(name) for name in self.names}

        def loss(weights, image, label):
            logits = functional_call(self.network, frozen | weights, (image[None],)).float()
            return cross_entropy(logits, label[None])[0], logits[0]

        def saliency(image, label):
            gradients, (_, logits) = grad_and_value(loss, has_aux=True)(weights, image, label)
            return torch.cat([reduce_filters(gradients[name][None], self.aggregation)[0] for name in self.names]), logits.detach()

        if not len(images):
            with torch.no_grad():
                return Saliency(images.new_zeros(0, self.filters), self.network(images.clone()).float())
        size = len(images)
        chunk = min(self.chunk, 2 ** ((size if images.is_cuda else filled_up(size, torch.get_num_threads())) - 1).bit_length())
        images, labels = (torch.cat([t, t[-1:].expand(-size % chunk, *t.shape[1:])]) for t in (images, labels))  # copies: a network may change its images in place
        with WideNorms(), Places(chunk):
            found = vmap(saliency, chunk_size=chunk)(images, labels)
        return Saliency(*(t[:size] for t in found))


class WideNorms(TorchFunctionMode):
    """While it is entered, a norm of maps in half precision whose parameters are float32, as autocast leaves them, is computed in float32 and rounded: as torch does on a CPU, but not inside `vmap`, where it raises."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in NORMS:
            return func(*args, **kwargs)
        maps = args[0] if args else kwargs["input"]
        others = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.Tensor) and value is not maps]
        if maps.device.type != "cpu" or maps.dtype not in (torch.bfloat16, torch.float16) or not any(value.dtype == torch.float32 for value in others):
            return func(*args, **kwargs)
        found = func(maps.float(), *args[1:], **kwargs) if args else func(**kwargs | {"input": maps.float()})
        return found.to(maps.dtype)


def reduce_filters(gradients: torch.Tensor, aggregation: str) -> torch.Tensor:
    """Per-sample gradients [B, O, ...] of one layer -> [B, O]: mean |g| over a filter's weights (`abs`), or |mean g| (`signed`)."""
    flat = gradients.flatten(2)
    return flat.abs().mean(2) if aggregation == "abs" else flat.mean(2).abs()
