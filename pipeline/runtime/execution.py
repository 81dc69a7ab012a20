"""Where a stage runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pipeline.runtime.distributed import ALONE, Processes
from pipeline.runtime.profiling import Clock

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Execution:
    """Where a stage runs, and who takes the time.

    device: of the models. processes: those that work together, each with its part of
    every batch; the first one writes. clock: adds up where the time goes; an exact one
    has the stage say so at its end (--profile).
    """

    device: torch.device = CPU
    processes: Processes = ALONE
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def on(
        cls, device: torch.device, processes: Processes = ALONE, *, profile: bool = False
    ) -> Execution:
        """Run on a device, and with ``profile`` say at the end where the time went and
        what to change."""
        return cls(device, processes, Clock(device, exact=profile))

    @property
    def on_gpu(self) -> bool:
        """Whether models run on a GPU."""
        return self.device.type == "cuda"
