"""What in the image made the filters fail: input saliency (section 2.2, eq. 3 and 4 of the paper). Mathematics alone.

The profile ŝ(x) of an image is boosted at a few filters F, s'_F = ŝ with the entries of F times `boost`, and held fixed as a target. The cosine distance of
ŝ(x) from it says how little the profile of x is already that of an image on which F alone failed, and its gradient says which pixels decide it:

    M_F = |d/dx D_cos(ŝ(x), s'_F)|        (eq. 4)

ŝ(x) is itself made of gradients, so that this is a second derivative. It is exact: autograd differentiates the backward pass. Images of a batch go through together
where the fused engine has no objection to the network (`pipeline.saliency.objections`), and one at a time where it has: whatever a network does that autograd can
differentiate twice is then right. Where the gradient of a weight is 0, |.| has no derivative, and contributes 0.

The nearer ŝ(x) is to its target, the less of a number's digits tell them apart: where one filter outweighs all others and F holds it, D_cos is near 0 and a map in
float32 is off by about 1e-7 / D_cos of its peak. Below `NEAR` an image is therefore done again in float64.
"""

from __future__ import annotations

import copy
import re
from typing import NamedTuple

import numpy as np
import torch

from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout
from pipeline.saliency.fused import FusedEngine, Objection
from pipeline.saliency.layouts import PlainLayouts
from pipeline.saliency.loss import cross_entropy
from pipeline.saliency.objections import objection
from pipeline.saliency.twice import twice_differentiable
from pipeline.saliency.vmap import reduce_filters
from pipeline.statistics import Reference

BOOST = 100.0  # k of the paper
NEAR = 1e-3  # D_cos below which float32 has less than some three digits of a map


class Explained(NamedTuple):
    """maps: M_F, [B, 3, H, W], by the network's normalised input; standardised: ŝ [B, F] of the images themselves; distance: D_cos [B]; logits [B, C]. All of the images' dtype.
    coarse: bool [B], a map that is largely rounding, since `NEAR` asked for float64 and the network cannot run in it."""

    maps: torch.Tensor
    standardised: torch.Tensor
    distance: torch.Tensor
    logits: torch.Tensor
    coarse: torch.Tensor


class InputSaliency:
    """Input saliency of one network in eval mode. `aggregation`: `abs` or `signed`, as the reference's.

    Raises ValueError in training mode, or if the reference is of another aggregation or number of filters.
    """

    def __init__(self, network: torch.nn.Module, reference: Reference, aggregation: str = "abs"):
        if any(module.training for module in network.modules()):
            raise ValueError("input saliency is defined in eval mode; call network.eval() first")
        if reference.aggregation != aggregation:
            raise ValueError(f"the reference was aggregated as '{reference.aggregation}', not '{aggregation}'")
        self.network, self.reference, self.aggregation = network, reference, aggregation
        self._fused: FusedEngine | None | bool = False  # once it is needed; None for a network to which it has an objection
        self._twin: InputSaliency | None | bool = False  # of the network in float64, once it is needed; None where there is none
        self.weights = [p for p in network.parameters() if p.dim() == 4]
        if FilterLayout.of(network).total != len(reference.mean):
            raise ValueError(f"the reference is of {len(reference.mean)} filters, the network has {FilterLayout.of(network).total}")
        sample = self.weights[0]
        self.mean = torch.as_tensor(np.array(reference.mean)).to(sample)
        self.scale = torch.as_tensor(np.where(reference.live, 1 / np.where(reference.live, reference.std, 1.0), 0.0)).to(sample)  # 1 / sigma; 0 where the filter is dead

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, filters: list[np.ndarray], boost: float = BOOST) -> Explained:
        """images: float [B, 3, H, W], B at least 1; labels: int64 [B]; filters: F of each image, columns. The network is left as it was.

        Raises BadRequest for a network that keeps gradients from its input, or that torch cannot differentiate twice.
        """
        if len(images) != len(filters):
            raise ValueError(f"{len(filters)} sets of filters for {len(images)} images")
        found = self._maps(images.detach(), labels, filters, boost)
        near = found[2].abs() < NEAR if images.dtype != torch.float64 else torch.zeros_like(labels, dtype=torch.bool)
        if near.any() and self._twin is False:
            double = in_float64(self.network, images[:1])
            self._twin = double and InputSaliency(double, self.reference, self.aggregation)
        if near.any() and self._twin:
            better = self._twin._maps(images[near].detach().double(), labels[near], [columns for columns, one in zip(filters, near) if one], boost)
            for part, rows in zip(found, better):
                part[near] = rows.to(part.dtype)
        return Explained(*found, near & (not self._twin))

    def smooth(self, images: torch.Tensor, labels: torch.Tensor, filters: list[np.ndarray], boost: float, draws: int, share: float, seed: int) -> Explained:
        """The same with maps averaged over `draws` noisy copies, (1 - share) x + share n, n standard normal, drawn for (seed, draw) alone; each copy has a target of its own."""
        explained = self(images, labels, filters, boost)
        total, coarse = torch.zeros_like(images), torch.zeros_like(explained.coarse)
        for draw in range(draws):
            noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed * 100_003 + draw), dtype=images.dtype).to(images.device)
            noisy = self((1 - share) * images + share * noise, labels, filters, boost)
            total, coarse = total + noisy.maps, coarse | noisy.coarse
        return explained._replace(maps=total / draws, coarse=coarse)

    def standardised(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """ŝ [B, F] of images, an image at a time, without any second derivative."""
        return torch.cat([self._profile(image[None], label[None], twice=False)[0].detach()[None] for image, label in zip(images, labels)])

    def _maps(self, images: torch.Tensor, labels: torch.Tensor, filters: list[np.ndarray], boost: float) -> tuple[torch.Tensor, ...]:
        """The first four of `Explained`, in the images' own precision."""
        if len(images) > 1 and self._fused is False:
            self._fused = None if objection(self.network, images[:2]) else FusedEngine(self.network, FilterLayout.of(self.network), self.aggregation)
        if len(images) > 1 and self._fused:
            try:
                return self._together(images, labels, filters, boost)
            except Objection:  # the network does something else with these images than with the first
                self._fused = None
        each = [self._together(images[row : row + 1], labels[row : row + 1], filters[row : row + 1], boost) for row in range(len(images))]
        return tuple(torch.cat(part) for part in zip(*each))

    def _together(self, images: torch.Tensor, labels: torch.Tensor, filters: list[np.ndarray], boost: float) -> tuple[torch.Tensor, ...]:
        """The same of images that go through at once: one by autograd alone, more by the fused engine."""
        images = images.clone().requires_grad_()
        if len(images) > 1:
            saliency, logits = self._fused.twice(images, labels)
            profiles = (saliency - self.mean) * self.scale
        else:
            profile, logits = self._profile(images, labels, twice=True)
            profiles = profile[None]
        targets = torch.stack([boosted(profile, columns, boost) for profile, columns in zip(profiles.detach(), filters)])
        distances = 1 - torch.nn.functional.cosine_similarity(profiles, targets, 1, eps=0)
        try:
            gradients = torch.autograd.grad(distances.sum(), images, allow_unused=True)[0]
        except RuntimeError as fault:
            if not (unknown := re.search(r"derivative for (\S+) is not implemented", str(fault))):
                raise
            raise BadRequest(f"torch cannot differentiate the network twice ({unknown[1]} has no derivative): which pixels matter cannot be asked of it") from None
        if gradients is None:
            raise BadRequest("the network keeps gradients from its input (torch.no_grad or detach inside): which pixels matter cannot be asked of it")
        gradients = torch.where(targets.any(1)[:, None, None, None], gradients, 0.0)
        return gradients.detach().abs(), profiles.detach(), distances.detach(), logits.detach()

    def _profile(self, image: torch.Tensor, label: torch.Tensor, twice: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """ŝ [F] of one image, differentiable by it if `twice`; its logits [1, C]."""
        wanted = [p.requires_grad for p in self.weights]
        try:
            for p in self.weights:
                p.requires_grad_()
            with torch.enable_grad(), PlainLayouts(), twice_differentiable():
                logits = self.network(image.clone())  # which it may change in place
                gradients = torch.autograd.grad(cross_entropy(logits, label)[0], self.weights, create_graph=twice, allow_unused=True)
                reduced = [reduce_filters((torch.zeros_like(p) if g is None else g)[None], self.aggregation)[0] for g, p in zip(gradients, self.weights)]
                return (torch.cat(reduced) - self.mean) * self.scale, logits
        finally:
            for p, before in zip(self.weights, wanted):
                p.requires_grad_(before)


def in_float64(network: torch.nn.Module, images: torch.Tensor) -> torch.nn.Module | None:
    """A copy of a network that computes in float64; None where it cannot be copied, or computes some of it in another type. images: [B, 3, H, W], to try it with."""
    try:
        double = copy.deepcopy(network).double()
        with torch.no_grad():
            return double if double(images.double()).dtype == torch.float64 else None
    except Exception:  # a network is anybody's code
        return None


def boosted(standardised: torch.Tensor, columns: np.ndarray, boost: float = BOOST) -> torch.Tensor:
    """s'_F: ŝ [F] with the entries of `columns` times `boost` (eq. 3)."""
    target = standardised.clone()
    target[torch.as_tensor(columns, device=target.device)] *= boost
    return target
