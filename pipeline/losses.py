"""The student's loss."""

from __future__ import annotations

import torch


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eq. 3 of MEAL V2: −Σ_c p̂_c · log softmax(logits)_c per row.

    logits: float [n, classes]; targets: float32 [n, classes], rows summing to one. Returns float32 [n], in nats.
    """
    return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1)


def entropy(targets: torch.Tensor) -> torch.Tensor:
    """−Σ_c p̂_c · log p̂_c per row, in nats: the least that ``soft_cross_entropy`` can become. Their difference is KL(p̂‖student)."""
    return -torch.xlogy(targets, targets).sum(dim=1)
