"""Train MEAL V2's discriminator beside the student, and bound what it does to the
student (arXiv 2009.08453, Eqs. 4 and 5, Sec. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Discriminator(nn.Module):
    """Tells the teachers' outputs from the student's.

    Three fully connected layers give a logit (Eq. 4). The hidden layers have
    max(classes / 8, 32) and max(classes / 64, 16) units. authors: the network of the
    authors' programs, whose last layer gives two outputs under a ReLU, 125 and 15 units
    wide for 1,000 classes. A ReLU lets no output fall below zero, so half of the
    answers are impossible, and an output at zero has no gradient.
    """

    def __init__(self, classes: int, *, authors: bool = False) -> None:
        super().__init__()
        wide, narrow = max(classes // 8, 32), max(classes // 64, 15 if authors else 16)
        self.authors = authors
        self.layers = nn.Sequential(
            nn.Linear(classes, wide),
            nn.ReLU(),
            nn.Linear(wide, narrow),
            nn.ReLU(),
            *((nn.Linear(narrow, 2), nn.ReLU()) if authors else (nn.Linear(narrow, 1),)),
        )

    def forward(
        self, student: torch.Tensor, teachers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the binary cross-entropy of "these are the teachers' outputs" (Eq. 5),
        and the shares of right answers.

        student, teachers: float [n, classes] each, as ``Targets.judged`` gives them.
        Returns a scalar, the mean over both sides in nats, and float [2], the shares of
        right answers (0 … 1) on the student's side and on the teachers' side. A tie,
        which two outputs at zero are, counts as half an answer.
        """
        answers = self.layers(torch.cat([teachers, student]))
        truth = torch.zeros_like(answers)
        truth[: len(teachers), -1] = 1
        if self.authors:
            truth[len(teachers) :, 0] = 1
        loss = nn.functional.binary_cross_entropy_with_logits(answers, truth)
        # Positive where the answer is "the teachers'".
        lead = answers[:, -1] - answers[:, 0] if self.authors else answers[:, 0]
        right = (1 + torch.where(truth[:, -1] > 0, lead, -lead).sign()) / 2
        return loss, torch.stack([right[len(teachers) :].mean(), right[: len(teachers)].mean()])


class Influence:
    """Joins the two gradients that reach the student's logits: the cross-entropy's and
    the discriminator's.

    bound: the largest ratio |∇L_D| / |∇CE| on the logits of a crop; None: no bound. A
    larger ∇L_D is shortened. So with a bound below 1 every crop's joined gradient on
    its logits still lowers its cross-entropy, at 1 − ``bound`` of its rate or more, and
    ceases with it. Crops share the student's weights, so a student that can't fit its
    labels may still end elsewhere, the farther the larger the bound. A crop's gradient
    depends on that crop alone, not on the batch. reversal: ∇L_D changes its sign, and
    the student learns to deceive the discriminator (Ganin and Lempitsky, arXiv
    1409.7495).

    The discriminator's own gradient isn't changed. sums: float64 [3] on the device, the
    sums of |∇CE|², of |∇L_D|², and of |∇L_D|² as it reached the student, over the crops
    so far.
    """

    def __init__(self, bound: float | None, reversal: bool, device: torch.device) -> None:
        self.bound, self.reversal = bound, reversal
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def fork(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits twice: for the cross-entropy, and for the discriminator.
        float [n, classes] each."""
        return _Fork.apply(logits, self)

    def join(self, of_ce: torch.Tensor, of_judge: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the logits, float [n, classes], of both losses'
        gradients."""
        theirs = torch.linalg.vector_norm(of_ce, dim=1, keepdim=True)
        ours = bounded = torch.linalg.vector_norm(of_judge, dim=1, keepdim=True)
        if self.bound is not None:
            least = torch.finfo(ours.dtype).tiny
            shortened = (self.bound * theirs / ours.clamp_min(least)).clamp_max(1)
            of_judge, bounded = of_judge * shortened, ours * shortened
        self.sums += torch.stack([theirs, ours, bounded]).double().square().sum(dim=(1, 2))
        return of_ce - of_judge if self.reversal else of_ce + of_judge


class _Fork(torch.autograd.Function):
    """Gives a tensor to two losses, and joins the gradients that come back."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, influence: Influence
    ) -> tuple[torch.Tensor, torch.Tensor]:
        context.influence = influence
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(
        context: Any, of_ce: torch.Tensor, of_judge: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return context.influence.join(of_ce, of_judge), None


def log_floored(probabilities: torch.Tensor, floor: float) -> torch.Tensor:
    """Return log max(p, floor), which the discriminator sees of student and teachers.
    floor: ``Codec.floor`` of the store.

    Raw logits would give the student away by their offset, and decoded labels without a
    floor would give the teachers away by their smallest values.
    """
    return probabilities.clamp_min(floor).log()
