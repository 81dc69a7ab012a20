"""The learning rate over a run."""

from __future__ import annotations

import math

from pipeline.config import Train


def factor(recipe: Train, epoch: float, end: float) -> float:
    """What the base learning rates are multiplied with, 0 … 1, in a step that begins
    after ``epoch`` epochs (a fraction within one; an epoch shows one crop of each
    image) and finishes at ``end``.

    step: gamma for each milestone that has passed (MEAL V2, Sec. 4). cosine: (1 + cos(π
    · epoch / epochs)) / 2 (Loshchilov and Hutter, arXiv 1608.03983). In the first
    ``warmup_epochs`` either is multiplied with a rise to one, by where the step
    finishes (Goyal et al., arXiv 1706.02677).
    """
    if recipe.schedule == "cosine":
        decay = (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    else:
        decay = recipe.gamma ** sum(epoch >= milestone for milestone in recipe.milestones)
    return decay * min(1.0, end / recipe.warmup_epochs) if recipe.warmup_epochs else decay
