"""Bundle the device, the processes and the clock of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pipeline.runtime.distributed import ALONE, Processes
from pipeline.runtime.engine import NOBODY, Worker
from pipeline.runtime.profiling import Clock

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Execution:
    """The device, the processes and the clock of a stage.

    device: of the models. processes: the processes that work together, each on its part
    of every batch; process 0 writes. clock: adds up where the time goes; with an exact
    clock the stage reports the times at its end (--profile). worker: who this process
    is for the engine that started it. track: the experiment trackers that the stage's
    figures are told to, as --track names them.
    """

    device: torch.device = CPU
    processes: Processes = ALONE
    clock: Clock = field(default_factory=Clock)
    worker: Worker = NOBODY
    track: tuple[str, ...] = ()

    @classmethod
    def on(
        cls,
        device: torch.device,
        processes: Processes = ALONE,
        *,
        profile: bool = False,
        worker: Worker = NOBODY,
        track: tuple[str, ...] = (),
    ) -> Execution:
        """Return an Execution on a device. With ``profile``, the stage reports at its
        end where the time went and what to change. worker: who this process is for the
        engine that started it. track: experiment trackers to tell the figures to."""
        return cls(device, processes, Clock(device, exact=profile), worker, track)

    @property
    def on_gpu(self) -> bool:
        """True if the models run on a GPU."""
        return self.device.type == "cuda"
