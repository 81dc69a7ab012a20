"""The student's loss: soft cross-entropy, and the discriminator that is trained
together with the student."""

from __future__ import annotations

import torch
from torch import nn


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eq. 3 of MEAL V2: −Σ_c p̂_c · log softmax(logits)_c per row.

    logits: float [n, classes]; targets: float32 [n, classes], rows summing to one.
    Returns float32 [n], in nats.
    """
    return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1)


def entropy(targets: torch.Tensor) -> torch.Tensor:
    """−Σ_c p̂_c · log p̂_c per row, in nats: the least that ``soft_cross_entropy`` can
    become. Their difference is KL(p̂‖student)."""
    return -torch.xlogy(targets, targets).sum(dim=1)


def temper(targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities [n, classes] → p^(1/t) / Σ p^(1/t): what softmax(log p / t) is;
    softer for t above 1, sharper below."""
    return targets if temperature == 1 else (targets.log() / temperature).softmax(dim=1)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(context: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


def reverse_gradient(x: torch.Tensor) -> torch.Tensor:
    """x itself, whose gradient comes back with the opposite sign (Ganin and Lempitsky,
    arXiv 1409.7495)."""
    return _Reverse.apply(x)


class Discriminator(nn.Module):
    """Tells the teachers' outputs from the student's (MEAL V2, Eqs. 4 and 5, Sec. 4):
    three fully connected layers, logits out.

    Widths are max(classes / 8, 32) and max(classes / 64, 16). There is no activation on
    the output (the authors' code ends in a ReLU, which makes half of the answers
    impossible to say). reversal: the student gets the opposite gradient, and learns to
    deceive.
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
        """Binary cross-entropy of "this is the teachers'", and how often that is
        answered rightly.

        student, teachers: float [n, classes] each, either ``log_floored`` probabilities
        or logits. Returns a scalar, the mean over both sides in nats, and float [2],
        the shares of right answers (0 … 1) on the student's side and on the teachers'.
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
    """log max(p, floor), what the discriminator sees of either side; floor:
    ``Codec.floor`` of the store.

    Raw logits would be known by their offset, and coded labels by their smallest
    values.
    """
    return probabilities.clamp_min(floor).log()
