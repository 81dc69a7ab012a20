"""Talk to the Hugging Face hub, and say what failed in one line.

Only this file knows huggingface_hub, which it imports when a store of the hub is
opened.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from cache.hub.address import HubError
from cache.system.signals import check

T = TypeVar("T")
PATIENCE = 180.0  # seconds without a byte after which the hub counts as gone
FIRST, LONGEST = 0.5, 10.0  # seconds between two tries: the first pause, and the longest
SMALL = 1 << 26  # bytes, more than any index
PARTIAL = 206  # the status of an answer that holds a part of a file
TRUE = {"1", "ON", "YES", "TRUE"}
LOG_IN = "log in with: hf auth login, or set HF_TOKEN"
tell: Callable[[str], object] = lambda line: None  # noqa: E731  prints a line for people


def library() -> Any:
    """Import huggingface_hub."""
    try:
        import huggingface_hub
        from huggingface_hub import constants, utils
    except ImportError:
        raise HubError(
            "hf:// needs huggingface_hub, which is not installed; pip install huggingface_hub"
        ) from None
    # Imported whole here: another thread might else see half of them.
    assert constants and utils
    # What the library warns of while it tries again is told by Patience.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    return huggingface_hub


def offline() -> bool:
    """Return whether the user forbids requests ($HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE


def endpoint() -> str:
    """Return the address of the hub: $HF_ENDPOINT, otherwise the public hub's."""
    named = str(os.environ.get("HF_ENDPOINT") or library().constants.ENDPOINT)
    if not named.startswith(("http://", "https://")):
        raise HubError(f"HF_ENDPOINT is {named}, no address of a hub; begin it with https://")
    return named.rstrip("/")


def api() -> Any:
    """Return the hub's interface, with the user's token."""
    return library().HfApi(endpoint=endpoint())


class Patience:
    """The patience with one request, which every byte renews. about: what is asked for,
    for messages. seconds: without a byte; None: PATIENCE."""

    def __init__(self, about: str, seconds: float | None = None) -> None:
        self.about, self.seconds = about, PATIENCE if seconds is None else seconds
        self.renew()

    def renew(self) -> None:
        """Begin anew, since something came."""
        self.since, self.pause = time.monotonic(), FIRST

    def bear(self, error: Exception) -> None:
        """Wait before the next try. Raises HubError if no try can help or patience has
        ended, and the error itself if it isn't the hub's."""
        line, why = _told(error, self.about)
        if line:
            raise HubError(line) from None
        waited = time.monotonic() - self.since
        if waited >= self.seconds:
            raise Unreachable(
                f"{self.about} can't be reached ({why}, for {waited:,.0f} s); mend the network and "
                f"run the same command again, which goes on from what is here"
            ) from None
        tell(f"{self.about}: {why}; trying again for up to {self.seconds - waited:,.0f} s")
        pause = max(self.pause, _retry_after(error))
        until = time.monotonic() + min(pause, max(self.seconds, FIRST))
        self.pause = min(2 * self.pause, LONGEST)
        while (left := until - time.monotonic()) > 0:
            check()
            time.sleep(min(left, 0.2))


class Unreachable(HubError):
    """An error about a hub that doesn't answer."""


def persistently(request: Callable[[], T], about: str, seconds: float | None = None) -> T:
    """Return ``request()``, and try again after an error that may pass. Raises HubError
    if the error stays."""
    patience = Patience(about, seconds)
    while True:
        try:
            return request()
        except Exception as error:
            patience.bear(error)


def _told(error: Exception, about: str) -> tuple[str | None, str]:
    """Return (the line about an error that stays, "") or (None, why) for an error that
    may pass. Raises the error again if it isn't the hub's."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, HubError):
        raise error
    if "OfflineModeIsEnabled" in kinds:
        return f"{about} isn't here, and HF_HUB_OFFLINE forbids to fetch it; unset it", ""
    if "LocalTokenNotFoundError" in kinds:
        return f"{about} needs a token of the hub, and there is none; {LOG_IN}", ""
    if "GatedRepoError" in kinds:
        return (
            f"{about} is gated, and this token was not let in; ask for access on its page, and "
            f"{LOG_IN}",
            "",
        )
    if "RevisionNotFoundError" in kinds:
        return f"{about} doesn't exist there; check the revision after the @", ""
    if "EntryNotFoundError" in kinds:
        return f"{about} is not in its repository; ask its owner to share it again", ""
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{about}: there is no such repository, or this token may not see it; check the "
            f"name, or {LOG_IN}",
            "",
        )
    if "HfHubHTTPError" in kinds:
        said = " ".join(str(getattr(error, "server_message", None) or "").split())[:160]
        said = f" ({said})" if said else ""
        if status == 401:
            return f"{about}: the hub doesn't know this token; {LOG_IN} with another one", ""
        if status == 403:
            return (
                f"{about}: this token may not do that{said}; take a token that may write there, "
                f"or another name",
                "",
            )
        if status in (408, 429) or status >= 500:
            return None, "too many requests" if status == 429 else f"the hub answers {status}"
        return f"{about}: the hub refuses with status {status}{said}; mend that", ""
    if kinds & {"RequestError", "ConnectionError", "RequestException"}:
        return None, " ".join(str(error).split())[:100] or type(error).__name__
    if isinstance(error, OSError) and error.errno is None:  # fewer bytes came than were told
        return None, str(error)[:100] or "the connection broke"
    if isinstance(error.__cause__, Exception):  # uploads wrap the hub's errors
        return _told(error.__cause__, about)
    if isinstance(error, RuntimeError):  # of Xet, which knows no kinds
        return None, " ".join(str(error).split())[:100] or type(error).__name__
    raise error


def _retry_after(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return min(float(headers.get("Retry-After", 0)), PATIENCE)
    except (TypeError, ValueError):
        return 0.0


def commit_of(repo: str, revision: str, seconds: float | None = None) -> str:
    """Ask for the commit of a revision of a dataset."""

    def ask() -> str:
        return str(api().dataset_info(repo, revision=revision).sha)

    return persistently(ask, f"hf://{repo}@{revision}", seconds)


def _address(repo: str, commit: str, file: str, kind: str = "dataset") -> str:
    place = f"datasets/{repo}" if kind == "dataset" else repo
    return f"{endpoint()}/{place}/resolve/{commit}/{quote(file)}"


def read(repo: str, commit: str, file: str, kind: str = "dataset") -> bytes:
    """Fetch a small file of a repository. kind: dataset or model."""

    def ask() -> bytes:
        content = b""
        for chunk in _stream(_address(repo, commit, file, kind), 0):
            content += chunk
            if len(content) > SMALL:
                raise HubError(f"hf://{repo}: {file} is too large to be what it says")
        return content

    return persistently(ask, f"hf://{repo}: {file}")


def _stream(address: str, first: int) -> Iterator[bytes]:
    """Yield the bytes of a file from ``first`` on, as they come. Raises NoRanges where
    the hub would send it from its beginning instead."""
    hub = library()
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    if first:
        headers["Range"] = f"bytes={first}-"
    timeout = hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
    session = hub.utils.get_session()
    with session.stream(
        "GET", address, headers=headers, timeout=timeout, follow_redirects=True
    ) as response:
        hub.utils.hf_raise_for_status(response)
        if first and response.status_code != PARTIAL:
            raise NoRanges("the whole file came in place of its end")
        for chunk in response.iter_bytes():
            check()
            yield chunk


class NoRanges(OSError):
    """A file that was to be gone on with comes from its beginning."""


class Wanted:
    """A file of a dataset, with its size and sha256 as its index says."""

    def __init__(self, repo: str, commit: str, file: str, size: int, sha256: str) -> None:
        self.repo, self.commit, self.file = repo, commit, file
        self.size, self.sha256 = size, sha256


def fetch(wanted: Wanted, part: Path) -> None:
    """Fetch a file to ``part``, going on from what is there, and compare it with its
    digest. Raises HubError; the part stays unless it is damaged."""
    for last in (False, True):
        _complete(wanted, part)
        if sha256_of(part) == wanted.sha256:
            return
        part.unlink()
        if last:
            raise HubError(
                f"hf://{wanted.repo}: {wanted.file} came twice with other bytes than its index "
                f"promises; it was damaged or changed by other hands: tell its owner, or name an "
                f"older revision"
            )


def _complete(wanted: Wanted, part: Path) -> None:
    """Fetch what a partial file lacks, however often the connection breaks."""
    address = _address(wanted.repo, wanted.commit, wanted.file)
    patience = Patience(f"hf://{wanted.repo}: {wanted.file}")
    part.touch()
    while (at := part.stat().st_size) != wanted.size:
        if at > wanted.size:
            os.truncate(part, at := 0)
        try:
            with open(part, "ab", buffering=0) as file:
                for chunk in _stream(address, at):
                    if file.tell() + len(chunk) > wanted.size:
                        raise _too_many(wanted, at)
                    _write(file, chunk)
                    patience.renew()
                if file.tell() < wanted.size:
                    raise OSError("the connection broke")
        except Exception as error:
            if isinstance(error, NoRanges):
                os.truncate(part, 0)
            patience.bear(error)


def _too_many(wanted: Wanted, first: int) -> Exception:
    """Return the error for more bytes than the index says. first: the byte from which
    on they were asked for. A whole file that is too long stays so."""
    if first:
        return NoRanges("more bytes came than its index says")
    return HubError(
        f"hf://{wanted.repo}: {wanted.file} is longer than its index says; tell its owner, or "
        f"name an older revision"
    )


def _write(file: io.RawIOBase, chunk: bytes) -> None:
    """Write bytes whole. A disk that fills up may take a part of them."""
    left = memoryview(chunk)
    while left:
        left = left[file.write(left) or 0 :]


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
