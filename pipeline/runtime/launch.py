"""Read the environment variables by which torchrun, or a script in its place, tells a
process who it is and where the processes of its run meet."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from cache.errors import MealError

PORTS = 65_535  # the largest number of a TCP port


class LaunchError(MealError):
    """An environment variable of torchrun that is missing, or is no sensible number."""


@dataclass(frozen=True)
class Launch:
    """This process's number ``rank``, from 0, among the ``world`` processes of its
    run."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Launch:
        """Read RANK and WORLD_SIZE; without them the process is alone. Raises
        LaunchError if a value is no number, or if the two don't fit together."""
        world = number("WORLD_SIZE", 1, "the number of processes, or unset it for one", least=1)
        rank = number("RANK", 0, f"this process's number, 0 to {world - 1}")
        if world > 1 and "RANK" not in os.environ:
            raise LaunchError(
                f"WORLD_SIZE is {world}, and RANK is not set; start the processes with torchrun, "
                f"set RANK to this process's number, 0 to {world - 1}, or unset WORLD_SIZE"
            )
        if rank >= world:
            said = (
                f"WORLD_SIZE is {world}" if "WORLD_SIZE" in os.environ else "no WORLD_SIZE is set"
            )
            raise LaunchError(
                f"RANK is {rank}, and {said}; ranks count from 0 to WORLD_SIZE - 1: set both, or "
                f"unset both"
            )
        return cls(rank, world)


@dataclass(frozen=True)
class MeetingPoint:
    """The place where the processes of a run meet: process 0's machine, and a free port
    there."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def here(cls) -> MeetingPoint:
        """Read MASTER_ADDR and MASTER_PORT. Raises LaunchError."""
        host = os.environ.get("MASTER_ADDR", "").strip()
        if not host:
            raise LaunchError(
                "WORLD_SIZE asks for several processes, and MASTER_ADDR is "
                f"{'empty' if 'MASTER_ADDR' in os.environ else 'not set'}; start them with "
                "torchrun, or set it to the name of the machine where process 0 runs"
            )
        what = "a free port of the machine where process 0 runs"
        if "MASTER_PORT" not in os.environ:
            raise LaunchError(
                f"WORLD_SIZE asks for several processes, and MASTER_PORT is not set; start them "
                f"with torchrun, or set it to {what}"
            )
        port = number("MASTER_PORT", 0, what, least=1)
        if port > PORTS:
            raise LaunchError(f"MASTER_PORT is {port}, and ports end at {PORTS}; set it to {what}")
        return cls(host, port)


def number(name: str, default: int, what: str, *, least: int = 0) -> int:
    """Read a whole number of at least ``least`` from an environment variable; the
    default if the variable isn't set. what: names the number in the error. Raises
    LaunchError."""
    text = os.environ.get(name)
    if text is None:
        return default
    digits = text.strip()
    if re.fullmatch("[0-9]{1,9}", digits) and int(digits) >= least:
        return int(digits)
    raise LaunchError(
        f"{name} is {text!r}, which is no number from {least} on; set it to {what}"
        if digits
        else f"{name} is set and empty; set it to {what}"
    )
