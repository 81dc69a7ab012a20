"""What labels are made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.config import Config
from pipeline.images.folders import DataFolder
from pipeline.models.model import Model
from pipeline.runtime.execution import Execution


@dataclass(frozen=True)
class Labelling:
    """A recipe, the images that are labelled, the teachers that label them, and where
    they run."""

    config: Config
    data: DataFolder
    teachers: list[Model]
    execution: Execution

    @property
    def device(self) -> torch.device:
        """The teachers' device."""
        return self.execution.device
