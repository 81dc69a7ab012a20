"""Compute the learning rate over a run."""

from __future__ import annotations

import math

from pipeline.config import Train


def factor(recipe: Train, epoch: float, end: float) -> float:
    """Return the factor, 0 … 1, of the base learning rates in one step.

    epoch: the epochs done when the step begins, with a fraction inside an epoch. end:
    the epochs done when the step finishes. An epoch shows one crop of each image.

    ``schedule: step`` multiplies by gamma for each milestone that has passed (MEAL V2,
    Sec. 4). ``schedule: cosine`` gives (1 + cos(π · epoch / epochs)) / 2 (Loshchilov
    and Hutter, arXiv 1608.03983). In the first ``warmup_epochs`` the factor is also
    multiplied by end / warmup_epochs, which rises to one (Goyal et al.,
    arXiv 1706.02677).
    """
    if recipe.schedule == "cosine":
        decay = (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    else:
        decay = recipe.gamma ** sum(epoch >= milestone for milestone in recipe.milestones)
    return decay * min(1.0, end / recipe.warmup_epochs) if recipe.warmup_epochs else decay
