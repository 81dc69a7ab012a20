"""Copy tensors to the device and back, through pinned memory, while the device
computes.

If the device is the CPU, nothing is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from cache.system.signals import check

T = TypeVar("T")


@dataclass
class Sent(Generic[T]):
    """A tensor, or a nested structure of tensors, whose copy to the device may not have
    finished. Call ``received()`` before use.

    what: a tensor, or nested lists, tuples, dicts and dataclasses; only their tensors
    are copied. arrival: the event after the copies; None on a CPU.
    """

    what: T
    arrival: torch.cuda.Event | None = None

    def received(self) -> T:
        """Return the tensors on the device. Work that is started on the current stream
        from now on waits for the copies."""
        if self.arrival:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.arrival)
            # The allocator may reuse the tensors' memory only after this stream is done
            # with it.

            def kept(tensor: torch.Tensor) -> torch.Tensor:
                tensor.record_stream(stream)
                return tensor

            _each(kept, self.what)
        return self.what


class Returning:
    """Tensors whose copy from the device to the CPU may not have finished.

    Each tensor is copied to pinned memory on the current stream, right behind the work
    that makes the tensor. ``arrived`` waits for this work alone, and not for work that
    the device was given later.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors: tuple[torch.Tensor, ...] = tensors
        self.arrival: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self.tensors = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            )
            # A blocking event: a thread that waits for it leaves its core to the
            # decoders.
            self.arrival = torch.cuda.Event(blocking=True)
            self.arrival.record(torch.cuda.current_stream(tensors[0].device))

    def arrived(self) -> tuple[torch.Tensor, ...]:
        """Wait for the tensors, and return them on the CPU."""
        if self.arrival:
            self.arrival.synchronize()
        return self.tensors


class Sender:
    """Copies tensors to one device, on a stream of its own. Threads call it inside
    ``with sender.beside():``."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        # Taken here, since torch's current device may differ in another thread.
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else device
        self.stream = torch.cuda.Stream(self.device) if cuda else None

    def beside(self) -> AbstractContextManager:
        """Return a context in which the thread's work goes to the sender's stream,
        beside the work on other streams."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def __call__(self, what: T) -> Sent[T]:
        if not self.stream:
            return Sent(_each(lambda tensor: tensor.to(self.device), what))
        moved = _each(
            lambda tensor: (
                tensor if tensor.is_cuda else tensor.pin_memory().to(self.device, non_blocking=True)
            ),
            what,
        )
        return Sent(moved, self.stream.record_event())


def fetched(tensor: torch.Tensor) -> torch.Tensor:
    """Wait until the device has computed a tensor, and return it on the CPU.

    Signals are checked meanwhile, since the tensor never arrives if another process has
    failed.
    """
    if tensor.is_cuda:
        made = torch.cuda.current_stream().record_event()
        while not made.query():
            check()
            time.sleep(1e-4)
    return tensor.cpu()


def _each(change: Callable[[torch.Tensor], torch.Tensor], what: Any) -> Any:
    if isinstance(what, torch.Tensor):
        return change(what)
    if isinstance(what, dict):
        return {key: _each(change, value) for key, value in what.items()}
    if isinstance(what, list | tuple):
        several = [_each(change, value) for value in what]
        return several if isinstance(what, list) else tuple(several)
    if is_dataclass(what) and not isinstance(what, type):
        return replace(
            what, **{field.name: _each(change, getattr(what, field.name)) for field in fields(what)}
        )
    return what
