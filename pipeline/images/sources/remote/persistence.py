"""Try requests again, for as long as a network may be down, and say so."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from cache.system.signals import Stopped, asked
from pipeline.images.sources.remote.store import RemoteError
from pipeline.images.sources.remote.url import Url
from pipeline.runtime.progress import say

T = TypeVar("T")
PATIENCE = 180.0  # seconds without a byte after which a store counts as gone
FIRST, LONGEST = 0.2, 5.0  # seconds between two tries: the first pause, and the longest
SAY_AGAIN = 30.0  # seconds between two lines about stores that don't answer

_lock = Lock()
_said = -SAY_AGAIN


def never() -> bool:
    """Return that nothing has stopped the work."""
    return False


class Patience:
    """The patience with one object, which every byte renews.

    halted: says that the object isn't wanted any more. seconds: without a byte; None:
    PATIENCE.
    """

    def __init__(
        self, url: Url, halted: Callable[[], bool] = never, seconds: float | None = None
    ) -> None:
        self.url, self.halted = url, halted
        self.seconds = PATIENCE if seconds is None else min(seconds, PATIENCE)
        self.renew()

    def renew(self) -> None:
        """Begin anew, since something came."""
        self.since, self.pause = time.monotonic(), FIRST

    def bear(self, error: RemoteError) -> None:
        """Wait before the next try. Raises the error if no try can help, or if patience
        has ended; and Stopped."""
        if error.lasting:
            raise error
        waited = time.monotonic() - self.since
        if waited >= self.seconds:
            raise RemoteError(
                f"{self.url} can't be read: {error.why}, for {waited:,.0f} s; mend the network or "
                f"the server, and run the same command again, which goes on from the bytes that "
                f"are here",
                error.why,
                lasting=True,
                unreachable=error.unreachable,
            ) from None
        _tell(f"{self.url}: {error.why}; trying again for up to {self.seconds - waited:,.0f} s")
        until = time.monotonic() + min(self.pause, self.seconds)
        self.pause = min(2 * self.pause, LONGEST)
        while (left := until - time.monotonic()) > 0:
            if self.halted() or asked():
                raise Stopped("stopped while fetching")
            time.sleep(min(left, 0.2))


def _tell(line: str) -> None:
    """Print a line, unless one was printed a moment ago: many threads wait for one
    network."""
    global _said
    with _lock:
        if time.monotonic() - _said < SAY_AGAIN:
            return
        _said = time.monotonic()
    say(line)


def persistently(request: Callable[[], T], url: Url, seconds: float | None = None) -> T:
    """Return ``request()``, and try again after an error that may pass, for as long as
    ``Patience`` allows. Raises RemoteError, which names the URL, if the error stays."""
    patience = Patience(url, seconds=seconds)
    while True:
        try:
            return request()
        except RemoteError as error:
            patience.bear(error)
