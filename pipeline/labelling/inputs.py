"""Hold the inputs of labelling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.config import Config
from pipeline.images.data_set import DataSet
from pipeline.models.model import Model
from pipeline.runtime.execution import Execution


@dataclass(frozen=True)
class Labelling:
    """The inputs of labelling: a recipe, the images to label, the teachers, and the
    execution (device, processes, clock)."""

    config: Config
    data: DataSet
    teachers: list[Model]
    execution: Execution

    @property
    def device(self) -> torch.device:
        """Return the device of the teachers."""
        return self.execution.device
