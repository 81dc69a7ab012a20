"""Tell processes apart: by the machine where they run, and by the time at which they
started.

Process numbers mean something only where they were given: in one boot of one kernel, in
one namespace of process numbers. Containers on a cluster may share a host name and all
be process 7.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"  # start time of a process that exists and can't be looked at


@cache
def place() -> dict[str, Any]:
    """Return where a process number means something: host, boot and namespace."""
    boot = namespace = None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def alive(process: int) -> bool:
    """Return whether a process of this host is running."""
    return started(process) is not None


def started(process: int) -> str | None:
    """Return the kernel's start time of a process, which tells the process from a later
    one with the same number. None if the process is gone; UNKNOWN if it can't be looked
    at."""
    try:
        with open(f"/proc/{process}/stat", "rb") as f:  # a name of any bytes is in it
            state = f.read().rpartition(b")")[2].decode("ascii").split()
    except OSError:  # the process is gone, or another user's and hidden by the system
        return _signalled(process)
    # A process that was killed, but not collected by its parent, does nothing any more.
    return None if state[0] in "ZX" else state[19]


def _signalled(process: int) -> str | None:
    """Return UNKNOWN if the process exists, None if it doesn't."""
    try:
        if type(process) is int and process > 0:
            os.kill(process, 0)
            return UNKNOWN
    except PermissionError:
        return UNKNOWN
    except (OSError, OverflowError):
        pass
    return None
