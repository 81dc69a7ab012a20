"""Compute the soft cross-entropy of the student, and what belongs to it."""

from __future__ import annotations

import torch


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the soft cross-entropy −Σ_c p̂_c · log softmax(logits)_c of each row (MEAL
    V2, Eq. 3).

    logits: float [n, classes]. targets: float32 [n, classes], rows summing to one.
    Returns float32 [n], in nats.
    """
    return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1)


def entropy(targets: torch.Tensor) -> torch.Tensor:
    """Return the entropy −Σ_c p̂_c · log p̂_c of each row, in nats.

    The entropy is the least value of ``soft_cross_entropy``. Their difference is
    KL(p̂‖student).
    """
    return -torch.xlogy(targets, targets).sum(dim=1)


def temper(targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return p^(1/t) / Σ p^(1/t) of probabilities p [n, classes] at temperature t.

    The result is softmax(log p / t): softer than p for t above 1, sharper for t below
    1.
    """
    return targets if temperature == 1 else (targets.log() / temperature).softmax(dim=1)
