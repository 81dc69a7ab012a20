"""The student's loss: soft cross-entropy, and the discriminator that is trained together with the student."""

from __future__ import annotations

import torch
from torch import nn


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eq. 3 of MEAL V2: −Σ_c p̂_c · log softmax(logits)_c per row.

    logits: float [n, classes]; targets: float32 [n, classes], rows summing to one. Returns float32 [n], in nats.
    """
    return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1)


def entropy(targets: torch.Tensor) -> torch.Tensor:
    """−Σ_c p̂_c · log p̂_c per row, in nats: the least that ``soft_cross_entropy`` can become. Their difference is KL(p̂‖student)."""
    return -torch.xlogy(targets, targets).sum(dim=1)


class Discriminator(nn.Module):
    """Tells the teachers' outputs from the student's (MEAL V2, Eqs. 4 and 5, Sec. 4): three fully connected layers, logits out.

    Widths are max(classes / 8, 32) and max(classes / 64, 16). There is no activation on the output (the authors' code ends in a ReLU, which
    makes half of the answers impossible to say).
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        wide, narrow = max(classes // 8, 32), max(classes // 64, 16)
        self.layers = nn.Sequential(nn.Linear(classes, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 1))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Binary cross-entropy of "this is the teachers'", and how often that is answered rightly.

        logits: float [n, classes], the student's; targets: float32 [n, classes], the stored labels; floor: the smallest probability that the store
        tells from zero (``Codec.smallest``). Both sides come in as log max(p, floor): raw logits would be known by their offset, and
        coded labels by their smallest value. Returns two scalars: the mean over both sides, in nats, and the share of right answers (0 … 1).
        """
        student = logits.float().softmax(dim=1).clamp_min(floor).log()
        answers = self.layers(torch.cat([targets.clamp_min(floor).log(), student])).squeeze(1)
        truth = torch.cat([torch.ones(len(targets)), torch.zeros(len(logits))]).to(answers.device)
        loss = nn.functional.binary_cross_entropy_with_logits(answers, truth)
        return loss, ((answers > 0) == (truth > 0)).float().mean()
