"""Cross-entropy whose gradient keeps its precision in float32.

With softmax(z) - onehot(y), the entry of the true class is p_y - 1: for a sample that the network is sure of, almost all of its
digits cancel, and every filter's saliency with them. Written through the margins z_j - z_y of the other classes,

    L = log(1 + sum_{j != y} exp(z_j - z_y)),

autograd's own rules give p_j at j != y and minus their sum at y: nothing cancels. The loss itself is as precise near zero.
"""

import torch


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """L of each sample, [B], no reduction. logits: float [B, C]; labels: int64 [B] in 0..C-1. Any number of derivatives."""
    true = logits.gather(1, labels[:, None])
    others = torch.arange(logits.shape[1], device=logits.device) != labels[:, None]
    margins = torch.where(others, logits - true, -torch.inf)
    return torch.logaddexp(margins.logsumexp(1), torch.zeros_like(true[:, 0]))
