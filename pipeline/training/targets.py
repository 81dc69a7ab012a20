"""Make the goals that a student is trained towards: stored labels or live teachers'
labels, mixed, tempered, with or without the class folder's hard label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cache.format.codec import CODECS
from pipeline.config import Config
from pipeline.loading.decoder import Decoder
from pipeline.models.model import Model, ensemble
from pipeline.runtime.execution import Execution
from pipeline.training import losses
from pipeline.training.batches import Batch
from pipeline.training.discriminator import log_floored
from pipeline.training.source import Source


@dataclass
class Goal:
    """The goal of a batch: the labels of its crops, on the training device."""

    # float32 [n, classes], soft labels p̂ of the crops as shown; None without teachers
    soft: torch.Tensor | None
    # float32 [n, classes], hard labels, mixed by area where crops are mixed; None where
    # no loss asks for hard labels
    hard: torch.Tensor | None
    mean_logits: torch.Tensor | None  # float32 [n, classes], of live teachers only

    def take(self, span: slice) -> Goal:
        """Return the goal of some of the crops."""
        parts = (self.soft, self.hard, self.mean_logits)
        return Goal(*(None if part is None else part[span] for part in parts))


class Targets:
    """Makes the goals of batches, and computes the student's loss towards them.

    The batches must be on the training device.
    """

    def __init__(
        self, config: Config, source: Source, teachers: list[Model], execution: Execution
    ) -> None:
        self.recipe, self.classes, self.teachers = (
            config.train,
            len(source.data.class_names),
            teachers,
        )
        # Batch size and precision of live teachers' forward passes. Smaller batches are
        # padded to this size, so it is at most the size of a process's part of a batch.
        self.pieces, self.precision = (
            min(config.store.batch_size, -(-config.train.batch_size // execution.processes.world)),
            config.store.precision,
        )
        codec = source.codec or CODECS[config.store.codec]
        self.floor = codec.floor
        self.soft = self.recipe.labels == "soft"
        self.decode = Decoder(CODECS["float32"] if teachers else codec, execution.device)

    def __call__(self, batch: Batch) -> Goal:
        mixed = batch.mixed
        area = None if mixed is None else mixed.area[:, None]
        hard = None
        if not self.soft or self.recipe.hard_weight:
            hard = nn.functional.one_hot(batch.class_index, self.classes).float()
            if mixed is not None:
                hard = torch.lerp(
                    hard, nn.functional.one_hot(mixed.class_index, self.classes).float(), area
                )
        if not self.soft:
            return Goal(None, hard, None)
        if self.teachers:
            live, mean_logits = ensemble(
                self.teachers, batch.pixels, self.precision, batch_size=self.pieces
            )
            # Cloned, since autograd can't keep the ensemble's inference tensors.
            return Goal(self.decode(live.clone()), hard, mean_logits.clone())
        soft = self.decode(batch.labels)
        if mixed is not None and mixed.labels is not None:
            soft = torch.lerp(soft, self.decode(mixed.labels), area)
        return Goal(soft, hard, None)

    def loss(self, logits: torch.Tensor, goal: Goal) -> torch.Tensor:
        """Return the loss of each row, float32 [n], in nats.

        The loss is (1 − w) · CE(p̂ tempered, softmax(logits / t)) + w · CE(hard,
        softmax(logits)), with the hard label's weight w and the student's temperature
        t. Without soft labels it is CE(hard, softmax(logits)).
        """
        recipe = self.recipe
        if goal.soft is None:
            return losses.soft_cross_entropy(logits, goal.hard)
        loss = losses.soft_cross_entropy(
            logits / recipe.student_temperature, losses.temper(goal.soft, recipe.label_temperature)
        )
        if recipe.hard_weight:
            loss = torch.lerp(
                loss, losses.soft_cross_entropy(logits, goal.hard), recipe.hard_weight
            )
        return loss

    def judged(self, logits: torch.Tensor, goal: Goal) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the discriminator's inputs: float32 [n, classes] of the student and of
        the teachers."""
        seen = self.recipe.discriminator.seen
        if seen == "mean_logits":
            return logits, goal.mean_logits
        student = logits.softmax(dim=1)
        if seen == "softmax":
            return student, goal.soft
        return log_floored(student, self.floor), log_floored(goal.soft, self.floor)
