"""Connect the processes that train one student together under torchrun. A single
process sends nothing.

Work that only one process may do, or needs to do, is done by process 0 (``first``).
Work that may fail in one process is agreed upon by all (``together``), so that one line
says what went wrong and no process waits for another that has given up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from cache.errors import MealError
from cache.system.signals import check
from pipeline.runtime import progress
from pipeline.runtime.launch import Launch, MeetingPoint, number
from pipeline.runtime.malloc import keep_freed_memory
from pipeline.runtime.rendezvous import meet

T = TypeVar("T")
# Longest wait for process 0, which may be decoding a whole data set. A process that
# dies is noticed at once.
PATIENCE = timedelta(days=1)
STALL = timedelta(minutes=30)  # longest wait within a step, while a process's disk hangs
# DistributedDataParallel must not synchronise buffers, since BatchNorm's buffers are
# averaged at the end of an epoch. The option has two names, and a newer torch warns
# about the older name.
_KNOWN = signature(nn.parallel.DistributedDataParallel).parameters
_ALONE: dict[str, Any] = {
    next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _KNOWN): False
}


class DeviceError(MealError):
    """A device that this machine doesn't have."""


def own_device(name: str | None = None) -> torch.device:
    """Return the device that this process works on.

    name: "cpu", or "cuda", which under torchrun is this process's own GPU; None: a GPU
    if there is one. The C library is told to keep freed memory (``keep_freed_memory``),
    since the loader and the models work in large blocks. Raises DeviceError, or
    LaunchError if torchrun's LOCAL_RANK is no number.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda: torch finds no GPU here; use --device cpu, or check nvidia-smi"
        )
    keep_freed_memory()
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = number("LOCAL_RANK", 0, "this process's number on its machine, from 0")
    count = torch.cuda.device_count()
    if place >= count:
        raise DeviceError(
            f"torchrun starts process {place} on a machine with {count} GPUs; use --nproc-per-node "
            f"{count}"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda")


class Elsewhere(MealError):
    """A failure of another process, which reports the failure itself. The message here
    is often empty; an empty message is not printed."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


@dataclass(frozen=True)
class Processes:
    """This process among the processes that train together: number ``rank`` of
    ``world``, counted from 0."""

    rank: int = 0
    world: int = 1
    talk: distributed.ProcessGroup | None = None  # for Python objects, not tensors

    @property
    def leads(self) -> bool:
        """True for process 0, which writes files and prints."""
        return self.rank == 0

    def first(self, do: Callable[[], T]) -> T:
        """Call ``do`` in process 0, and return its result in all processes. An error is
        raised in process 0, and Elsewhere in the others."""
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
        """Call ``do`` in every process, and return this process's result once all have
        succeeded.

        An error is raised in the process where it occurred, and Elsewhere in the
        others. If several processes have the same MealError, only the first of them
        raises it, and the others raise Elsewhere. ``do`` must not communicate with
        other processes.
        """
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
        """Gather one message from every process, in the order of their ranks."""
        heard = [""] * self.world
        with _naming_the_dead():
            distributed.all_gather_object(heard, mine, group=self.talk)
        return heard

    def sum(self, figures: torch.Tensor) -> torch.Tensor:
        """Return the sum of the processes' tensors, on the tensors' device. All tensors
        must have the same shape. The sum is the same in all processes, to the last
        bit."""
        if self.world > 1:
            figures = figures.clone()
            with _naming_the_dead():
                distributed.all_reduce(figures)
        return figures

    def joined(self, module: nn.Module) -> nn.Module:
        """Wrap a module in DistributedDataParallel: it has process 0's weights in all
        processes, and after each backward pass its gradients are the mean over all
        processes."""
        if self.world == 1:
            return module
        with _naming_the_dead():
            return nn.parallel.DistributedDataParallel(
                module, gradient_as_bucket_view=True, **_ALONE
            )

    def average_batchnorm(self, module: nn.Module) -> None:
        """Average the running statistics of BatchNorm layers over all processes. Each
        process normalises with its own images, as in the paper."""
        if self.world > 1:
            layer: Any
            for layer in module.modules():
                own = isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(
                    layer, nn.SyncBatchNorm
                )
                if own and layer.track_running_stats:
                    for seen in (layer.running_mean, layer.running_var):
                        seen.copy_(self.sum(seen) / self.world)

    def in_step(self) -> AbstractContextManager:
        """Return a context for code in which torch itself communicates between
        processes, such as a backward pass. If another process is gone, the context
        raises an error of one line."""
        return _naming_the_dead() if self.world > 1 else nullcontext()


ALONE = Processes()


@contextmanager
def joining(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun has started with this process, and yield this
    process's ``Processes``.

    Rank and number of processes come from torchrun's environment variables. Processes
    communicate by gloo on CPUs, and by NCCL on GPUs. Raises MealError if the variables
    are wrong, or if a process doesn't come.
    """
    me = Launch.here()
    if me.world == 1:
        yield ALONE
        return
    store = meet(me, MeetingPoint.here(), STALL)
    with _naming_the_dead():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=me.rank,
            world_size=me.world,
            timeout=STALL,
        )
        talk: Any = distributed.new_group(backend="gloo", timeout=PATIENCE)
        processes = Processes(me.rank, me.world, talk)
    yield processes
    # Skipped after an error: other processes may still be waiting, and notice that this
    # process ends.
    distributed.destroy_process_group()


@contextmanager
def _naming_the_dead() -> Iterator[None]:
    """Raise an error of one line if another process is gone; the libraries report a
    lost process in many ways."""
    try:
        yield
    except RuntimeError as error:
        check()  # raises Stopped: a signal to all processes breaks connections, too
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
