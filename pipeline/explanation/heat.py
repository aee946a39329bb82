"""An input saliency map as one number a pixel, and as it is drawn."""

from __future__ import annotations

import numpy as np
import torch

LOW, HIGH = 0.90, 0.99  # quantiles of a map that are drawn as nothing and as all


def heat(maps: torch.Tensor) -> torch.Tensor:
    """M_F [B, 3, H, W] -> one number a pixel, [B, H, W]: the largest of its channels, as the authors draw it."""
    return maps.amax(1)


def display(heats: torch.Tensor) -> np.ndarray:
    """Heat [B, H, W] -> float32 0..1 for drawing, by the authors' recipe: clipped to its 90th and 99th percentile, scaled, blurred 3 x 3. A map without any spread is 0."""
    flat = heats.flatten(1).double()
    low, high = (torch.quantile(flat, q, dim=1)[:, None, None] for q in (LOW, HIGH))
    scaled = torch.where(high > low, (heats.double().clamp(low, high) - low) / torch.where(high > low, high - low, 1.0), 0.0)
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64, device=heats.device)
    padded = torch.nn.functional.pad(scaled[:, None], (1, 1, 1, 1), "replicate")
    return torch.nn.functional.conv2d(padded, torch.outer(kernel, kernel)[None, None])[:, 0].float().cpu().numpy()
