"""Tensors on their way to the device and back while that is at work: through pinned
memory. From CPU to CPU nothing moves."""

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
    """A tensor, or lists, tuples, dicts and dataclasses of them, which are copied as
    far as they hold tensors, that may still be under way."""

    what: T
    arrival: torch.cuda.Event | None = None

    def received(self) -> T:
        """The tensors on the device, for what is started on its current stream from now
        on."""
        if self.arrival:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.arrival)
            # Their memory isn't free before this stream is done with it.
            _each(lambda tensor: tensor.record_stream(stream) or tensor, self.what)
        return self.what


class Returning:
    """Tensors on their way from the device to the CPU.

    Each tensor is copied to pinned memory on the current stream, right behind the work
    that makes the tensor. ``arrived`` waits for this work alone, and not for what the
    device was told to do since.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors: tuple[torch.Tensor, ...] = tensors
        self.arrival: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self.tensors = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            )
            self.arrival = torch.cuda.Event(
                blocking=True
            )  # who waits for it leaves the core to the decoders
            self.arrival.record(torch.cuda.current_stream(tensors[0].device))

    def arrived(self) -> tuple[torch.Tensor, ...]:
        """Wait for the tensors, and return them on the CPU."""
        if self.arrival:
            self.arrival.synchronize()
        return self.tensors


class Sender:
    """Sends to one device, from threads that work in ``beside``."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"  # of this thread: another one would have another device
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else device
        self.stream = torch.cuda.Stream(self.device) if cuda else None

    def beside(self) -> AbstractContextManager:
        """For all that the thread has the device do."""
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
    """The tensor on the CPU, once the device has made it. Signals are heard meanwhile:
    where another process has failed, that may be never."""
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
    if is_dataclass(what):
        return replace(
            what, **{field.name: _each(change, getattr(what, field.name)) for field in fields(what)}
        )
    return what
