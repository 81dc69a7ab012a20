"""Compute the student's loss: soft cross-entropy, and the loss of the discriminator
that is trained with the student."""

from __future__ import annotations

import torch
from torch import nn


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


class _Reverse(torch.autograd.Function):
    """Passes a tensor on, and the gradient back with the opposite sign."""

    @staticmethod
    def forward(context: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


def reverse_gradient(x: torch.Tensor) -> torch.Tensor:
    """Return x unchanged; its gradient comes back with the opposite sign (Ganin and
    Lempitsky, arXiv 1409.7495)."""
    return _Reverse.apply(x)


class Discriminator(nn.Module):
    """Tells the teachers' outputs from the student's (MEAL V2, Eqs. 4 and 5, Sec. 4).

    Three fully connected layers give a logit. The hidden layers have max(classes / 8,
    32) and max(classes / 64, 16) units. The output has no activation; the authors' code
    ends in a ReLU, with which half of the answers are impossible. reversal: the student
    gets the opposite gradient, and learns to deceive the discriminator.
    """

    def __init__(self, classes: int, *, reversal: bool = False) -> None:
        super().__init__()
        wide, narrow = max(classes // 8, 32), max(classes // 64, 16)
        self.reversal = reversal
        self.layers = nn.Sequential(
            nn.Linear(classes, wide),
            nn.ReLU(),
            nn.Linear(wide, narrow),
            nn.ReLU(),
            nn.Linear(narrow, 1),
        )

    def forward(
        self, student: torch.Tensor, teachers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the binary cross-entropy of "these are the teachers' outputs", and the
        shares of right answers.

        student, teachers: float [n, classes] each, either ``log_floored`` probabilities
        or logits. Returns a scalar, the mean over both sides in nats, and float [2],
        the shares of right answers (0 … 1) on the student's side and on the teachers'
        side.
        """
        if self.reversal:
            student = reverse_gradient(student)
        answers = self.layers(torch.cat([teachers, student])).squeeze(1)
        truth = torch.cat(
            [
                torch.ones(len(teachers), device=answers.device),
                torch.zeros(len(student), device=answers.device),
            ]
        )
        loss = nn.functional.binary_cross_entropy_with_logits(answers, truth)
        right = (answers > 0) == (truth > 0)
        return loss, torch.stack(
            [right[len(teachers) :].float().mean(), right[: len(teachers)].float().mean()]
        )


def log_floored(probabilities: torch.Tensor, floor: float) -> torch.Tensor:
    """Return log max(p, floor), which the discriminator sees of student and teachers.
    floor: ``Codec.floor`` of the store.

    Raw logits would give the student away by their offset, and decoded labels without a
    floor would give the teachers away by their smallest values.
    """
    return probabilities.clamp_min(floor).log()
