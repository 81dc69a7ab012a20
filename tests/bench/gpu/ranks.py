"""Train a student in the processes that torchrun starts: RECIPE DATA STORE OUT DEVICE.
On a machine with one GPU all processes are on this GPU, and speak by gloo."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from support.stages import train

from pipeline import config_file
from pipeline.runtime import distributed


def main() -> None:
    recipe, data, store, out = map(Path, sys.argv[1:5])
    device = torch.device(sys.argv[5])
    real = torch.distributed.init_process_group
    alone = device.type == "cpu" or torch.cuda.device_count() < 2
    if device.type == "cuda":
        torch.cuda.set_device(0 if alone else int(os.environ["LOCAL_RANK"]))
    with (
        mock.patch.object(
            torch.distributed,
            "init_process_group",
            lambda by, **how: real("gloo" if alone else by, **how),
        ),
        distributed.joining(device) as several,
    ):
        train(config_file.load(recipe), data, out, store=store, device=device, processes=several)


if __name__ == "__main__":
    main()
