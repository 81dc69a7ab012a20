"""Several processes that train one student under torchrun: who they are, and what they
tell each other. For one process nothing of it happens.

Whatever only one may do, or needs to do, process 0 does (``first``). Whatever may fail
in one of them is agreed upon (``together``), so that one line says what went wrong and
nobody waits for a process that has given up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from textwrap import shorten
from typing import TypeVar

import torch
from torch import distributed, nn

from cache.errors import MealError
from cache.system.signals import check
from pipeline.runtime import progress
from pipeline.runtime.malloc import keep_freed_memory

T = TypeVar("T")
# with process 0, which may decode a whole data set meanwhile; a process that dies is
# noticed at once
PATIENCE = timedelta(days=1)
STALL = timedelta(minutes=30)  # with the others in a step, while one's disk doesn't answer
# DistributedDataParallel is to leave buffers alone: BatchNorm's are averaged at an
# epoch's end. Of two names for that, a newer torch warns of the old one.
_KNOWN = signature(nn.parallel.DistributedDataParallel).parameters
_ALONE = {
    next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _KNOWN): False
}


class DeviceError(MealError):
    """A device that this machine doesn't have."""


def own_device(name: str | None = None) -> torch.device:
    """Return the device that this process is to work on: "cpu", or "cuda", which is
    this process's GPU under torchrun; by default a GPU if there is one.

    Has the C library keep freed memory too (``keep_freed_memory``), since loader and
    models work in large blocks. Raises DeviceError.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda: torch finds no GPU here; use --device cpu, or check nvidia-smi"
        )
    keep_freed_memory()
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if place >= count:
        raise DeviceError(
            f"torchrun starts process {place} on a machine with {count} GPUs; use --nproc-per-node "
            f"{count}"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda")


class Elsewhere(MealError):
    """Another process failed, and says itself what is wrong; so the message is often
    empty, and then nothing is printed."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together: number ``rank`` of ``world``,
    counted from 0."""

    rank: int = 0
    world: int = 1
    talk: distributed.ProcessGroup | None = None  # for what isn't tensors

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def first(self, do: Callable[[], T]) -> T:
        """What process 0 finds, for all. Its error is raised there, and Elsewhere in
        the others."""
        if self.world == 1:
            return do()
        told: list = [None, False]
        if self.leads:
            try:
                told = [do(), True]
            except BaseException:
                with suppress(MealError):
                    self._tell(told)
                raise
        self._tell(told)
        if not told[1]:
            raise Elsewhere
        return told[0]

    def together(self, do: Callable[[], T]) -> T:
        """What this process finds, once all have found something. An error is raised
        where it came, and Elsewhere in the others, also in those where the very same
        came. ``do`` must not speak to the others."""
        if self.world == 1:
            return do()
        try:
            found = do()
        except BaseException as error:
            same = False
            with suppress(MealError):
                same = str(error) in self._hear(str(error) or type(error).__name__)[: self.rank]
            if same and isinstance(error, MealError):
                raise Elsewhere from None
            raise
        if any(self._hear("")):
            raise Elsewhere
        return found

    def _tell(self, told: list) -> None:
        with _naming_the_dead():
            distributed.broadcast_object_list(told, group=self.talk)

    def _hear(self, mine: str) -> list[str]:
        """What each has to say."""
        heard = [""] * self.world
        with _naming_the_dead():
            distributed.all_gather_object(heard, mine, group=self.talk)
        return heard

    def sum(self, figures: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of tensors of one shape, on the tensors' device;
        in each the same to the last bit."""
        if self.world > 1:
            figures = figures.clone()
            with _naming_the_dead():
                distributed.all_reduce(figures)
        return figures

    def joined(self, module: nn.Module) -> nn.Module:
        """The module with process 0's weights in all of them, whose gradients become
        the mean over all after each backward pass."""
        if self.world == 1:
            return module
        with _naming_the_dead():
            return nn.parallel.DistributedDataParallel(
                module, gradient_as_bucket_view=True, **_ALONE
            )

    def average_batchnorm(self, module: nn.Module) -> None:
        """Give all the mean of what each one's BatchNorm layers have seen: they
        normalise with the images of their own process, as in the paper."""
        if self.world > 1:
            for layer in module.modules():
                own = isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(
                    layer, nn.SyncBatchNorm
                )
                if own and layer.track_running_stats:
                    for seen in (layer.running_mean, layer.running_var):
                        seen.copy_(self.sum(seen) / self.world)

    def in_step(self) -> AbstractContextManager:
        """For a block in which the processes speak to each other by themselves, as in a
        backward pass."""
        return _naming_the_dead() if self.world > 1 else nullcontext()


ALONE = Processes()


@contextmanager
def joining(device: torch.device) -> Iterator[Processes]:
    """This process among those that torchrun has started with it, by torchrun's
    environment variables; on CPUs they speak by gloo, on GPUs by NCCL."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield ALONE
        return
    with _naming_the_dead():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=STALL
        )
        processes = Processes(
            distributed.get_rank(), world, distributed.new_group(backend="gloo", timeout=PATIENCE)
        )
    if not processes.leads:
        progress.silence()
    yield processes
    # not after an error: others may still be waiting, and are told by this process's
    # end
    distributed.destroy_process_group()


@contextmanager
def _naming_the_dead() -> Iterator[None]:
    """Say in a line that another process is gone, which the libraries say in many
    ways."""
    try:
        yield
    except RuntimeError as error:
        check()  # asked to stop like the others, this one was waiting for them
        text = " ".join(str(error).split())
        if "Expected to have finished reduction" in text:
            raise MealError(
                "a part of this student takes no part in its output, which DistributedDataParallel "
                "can't do; train it in one process"
            ) from None
        if re.search(r"Connection (closed|reset)|closed by peer", text):
            lines = (
                "another process of this run has ended; what it said, or torchrun below, says "
                "why. Run the same command again to go on"
            )
            raise Elsewhere(lines if progress.speaks() else "") from None
        if isinstance(error, distributed.DistError) or re.search("gloo|NCCL|nccl", text):
            raise MealError(
                f"the processes of this run can't speak to each other "
                f"({shorten(text, 200, placeholder=' …')})"
            ) from None
        raise
