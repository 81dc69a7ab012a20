"""Keep the moving average of a student's weights, which often is the better student."""

from __future__ import annotations

from dataclasses import replace

from timm.utils import ModelEmaV3
from torch import nn

from pipeline.models.model import Model


class Average:
    """The exponential moving average (EMA) of a student's weights.

    After each step a ← d · a + (1 − d) · w. BatchNorm's running statistics are averaged
    like weights, and counters are copied. The decay d rises with the steps t as timm's
    ModelEmaV3 has it, d = min(decay, 1 − t^(−2/3)), so that a short run's average isn't
    made of its first weights.

    model: the averaged student. steps: number of updates so far. It takes as much
    memory as the student's weights.
    """

    def __init__(self, student: Model, decay: float) -> None:
        self.ema = ModelEmaV3(student.module, decay=decay, use_warmup=True)
        self.model, self.steps = replace(student, module=self.ema.module), 0

    def update(self, module: nn.Module) -> None:
        """Add the weights of a step."""
        self.steps += 1
        self.ema.update(module, step=self.steps)

    def state(self) -> dict:
        """Return what ``restore`` takes."""
        return {"model": self.model.module.state_dict(), "steps": self.steps}

    def restore(self, state: dict) -> None:
        """Go on from a state."""
        self.model.module.load_state_dict(state["model"])
        self.steps = state["steps"]
