"""Make the optimizer of a run: which weights it has, at which rate, and which of them
decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config import Train
from pipeline.models.model import Model


def make_optimizer(
    recipe: Train, student: Model, discriminator: nn.Module | None, *, fused: bool
) -> torch.optim.Optimizer:
    """Make the optimizer of student and discriminator.

    Every group has its learning rate at the start in ``base_lr``. The discriminator has
    a group and a rate of its own, and decays as the student does. fused: one kernel
    updates all weights. On a CPU fusing would only round differently from earlier
    versions.
    """
    groups = _groups_of_student(recipe, student)
    if discriminator is not None:
        judge = recipe.discriminator
        groups.append(
            {
                "params": list(discriminator.parameters()),
                # The authors' programs overwrite their own d_lr in every epoch.
                "base_lr": recipe.lr if judge.authors else judge.lr,
            }
        )
    common: dict[str, Any] = {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "fused": fused or None,
    }
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=recipe.betas, **common)
    return torch.optim.SGD(groups, momentum=recipe.momentum, **common)


def _groups_of_student(recipe: Train, student: Model) -> list[dict]:
    if recipe.decay_norm_and_bias:
        return [{"params": list(student.module.parameters()), "base_lr": recipe.lr}]
    decaying, others = student.by_decay()
    return [
        {"params": decaying, "base_lr": recipe.lr},
        {"params": others, "base_lr": recipe.lr, "weight_decay": 0.0},
    ]


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state, for this device, whatever device it was saved on."""
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        # Set before loading, since a fused AdamW keeps its count of steps on the GPU.
        saved["fused"] = own["fused"]
    optimizer.load_state_dict(state)
