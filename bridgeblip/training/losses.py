"""The loss of choices."""

import torch
from torch.nn import functional as F


def choice_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of logits (B, choices) at ``labels`` (B,); minus infinity marks a choice
    that isn't there.

    Label smoothing (Szegedy et al. 2016) spreads over the choices that are: torch's own would give
    infinity.
    """
    logs = logits.log_softmax(-1)
    right = F.nll_loss(logs, labels)
    if not smoothing:
        return right
    there = logits.isfinite()
    even = (logs.masked_fill(~there, 0.0).sum(-1) / there.sum(-1)).mean()
    return (1 - smoothing) * right - smoothing * even
