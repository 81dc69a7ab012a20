"""Ask buckets and web servers for objects: list, size, bytes. The only file that knows
obstore."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from cache.system.signals import Stopped
from pipeline.images.patience import DataError
from pipeline.images.sources.remote.network import wait_for
from pipeline.images.sources.remote.url import Url, credentials

CHUNK = 1 << 18  # bytes that a stream gives at once
SILENT = 20  # seconds without a byte after which a connection counts as broken
# Requests that fail are tried again here a few times, and by ``persistently`` for long.
RETRIES = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=2),
        "base": 2,
    },
}
LINKS = 1024  # stores that are held; each signed URL is a store of its own
_answered: set[str] = set()  # hosts that have answered this process


class RemoteError(DataError):
    """A request that failed. why: in a few words, without secrets. lasting: no later
    try can succeed. unreachable: nothing answered."""

    def __init__(self, message: str, why: str, *, lasting: bool, unreachable: bool = False) -> None:
        super().__init__(message)
        self.why, self.lasting, self.unreachable = why, lasting, unreachable


class Changed(RemoteError):
    """An object that is another one than it was when it was listed."""

    def __init__(self, url: Url) -> None:
        super().__init__(
            f"{url} was replaced by another object since it was listed; run the same command "
            f"again, which lists the objects anew",
            "the object was replaced",
            lasting=True,
        )


class NoRanges(RemoteError):
    """A server that gives no parts of a file."""

    def __init__(self, url: Url) -> None:
        super().__init__(
            f"the server of {url} gives no parts of a file, and the file isn't in the cache; "
            f"make room for all files (OFFLINE_MEAL_CACHE_SIZE), or take another server",
            "the server gives no parts of a file",
            lasting=True,
        )


@dataclass(frozen=True)
class Object:
    """An object of a store.

    size: bytes. etag: the store's tag of the contents, without quotation marks; empty
    if none is told. changed: time of the last change, ns since 1970; 0 if none is told.
    """

    url: Url
    size: int
    etag: str = ""
    changed: int = 0

    @property
    def weak(self) -> bool:
        """Return whether the tag is a weak one, which no server compares."""
        return self.etag.startswith("W/")


def require_obstore(url: object) -> None:
    """Raise DataError if obstore isn't installed."""
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise DataError(
            f"{url} is read with obstore, which isn't installed; install it: pip install "
            f"'offline-meal-v2[remote]', or pip install obstore"
        ) from None


def listed(folder: Url) -> tuple[list[Object], list[str]]:
    """List the objects that lie directly in a folder of a bucket, and the names of the
    folders in it. Raises RemoteError."""
    import obstore

    prefix = folder.path
    found = _asked(folder, obstore.list_with_delimiter_async, prefix or None)
    objects = [
        _object(Url(folder.scheme, folder.host, one["path"]), one)
        for one in found["objects"]
        if one["path"] != prefix
    ]
    return objects, [one.rstrip("/").rpartition("/")[2] for one in found["common_prefixes"]]


def head(url: Url) -> Object:
    """Ask for an object's size and tag. Raises RemoteError."""
    import obstore

    if not url.query:
        try:
            return _object(url, _asked(url, obstore.head_async, url.path))
        except RemoteError as error:
            if not (url.is_web and error.lasting):
                raise
    # A URL that is signed for reading refuses HEAD, as some servers do.
    try:
        result = _asked(url, obstore.get_async, url.path, options={"range": (0, 1)})
    except NoRanges:
        result = _asked(url, obstore.get_async, url.path)
    return _object(url, result.meta)


def read(one: Object, offset: int, size: int) -> bytes:
    """Read a part of an object. Raises RemoteError: Changed if the object is another
    one than it was."""

    async def request() -> bytes:
        result = await _get(one, (offset, offset + size))
        return bytes(await result.bytes_async())

    found = _waited(one.url, request())
    if len(found) != size:
        raise broken(one.url)
    return found


def stream(one: Object, offset: int, halted: Callable[[], bool]) -> Iterator[bytes]:
    """Yield the bytes of an object from an offset on. Raises RemoteError, and Stopped
    if ``halted`` says so."""

    async def begin() -> Any:
        result = await _get(one, {"offset": offset} if offset else None)
        return result.stream(min_chunk_size=CHUNK).__aiter__()

    async def following(chunks: Any) -> bytes | None:
        try:
            return await chunks.__anext__()
        except StopAsyncIteration:
            return None

    chunks = _waited(one.url, begin(), halted)
    while (chunk := _waited(one.url, following(chunks), halted)) is not None:
        yield bytes(chunk)


async def _get(one: Object, part: Any) -> Any:
    """Ask for an object that must be the one that was listed."""
    import obstore

    options: dict[str, Any] = {} if part is None else {"range": part}
    if one.etag and not one.weak:
        options["if_match"] = f'"{one.etag}"'
    elif one.changed:
        options["if_unmodified_since"] = datetime.fromtimestamp(one.changed // 10**9, tz=UTC)
    result = await obstore.get_async(_store(one.url), one.url.path, options=options)
    there = _object(one.url, result.meta)
    # Some servers don't know these conditions.
    if there.size != one.size or (one.etag and there.etag and there.etag != one.etag):
        raise Changed(one.url)
    if not one.etag and one.changed and there.changed not in (0, one.changed):
        raise Changed(one.url)
    return result


def _object(url: Url, meta: Any) -> Object:
    changed = meta["last_modified"]
    return Object(
        url,
        int(meta["size"]),
        _unquoted(meta["e_tag"] or ""),
        int(changed.timestamp()) * 10**9 if changed else 0,
    )


def _unquoted(tag: str) -> str:
    return tag if tag.startswith("W/") else tag.strip('"')


def _asked(url: Url, request: Any, *path: Any, **options: Any) -> Any:
    async def ask() -> Any:
        return await request(_store(url), *path, **options)

    return _waited(url, ask())


def _waited(url: Url, request: Any, halted: Callable[[], bool] = lambda: False) -> Any:
    """Wait for a request, and turn whatever it raises into a RemoteError."""
    try:
        found = wait_for(request, halted)
    except (Stopped, DataError):
        raise
    except Exception as error:  # obstore raises errors of several kinds
        raise _refusal(url, error) from None
    _answered.add(url.host)
    return found


def _store(url: Url) -> Any:
    """Return the connection to an object's store. Raises RemoteError if something lacks
    that a connection needs."""
    try:
        return _made(os.getpid(), url.scheme, url.host, url.user, url.query)
    except Exception as error:  # obstore raises errors of several kinds
        why = _scrubbed(str(error).partition("\n\nDebug source")[0])
        raise RemoteError(
            f"{url} can't be read ({why}); {credentials(url.scheme)}", why, lasting=True
        ) from None


@lru_cache(LINKS)
def _made(process: int, scheme: str, host: str, user: str, query: str) -> Any:
    """Return the connection to a bucket or a server. Credentials are read from the
    variables that obstore knows."""
    from obstore.store import HTTPStore, from_url

    options: dict[str, Any] = {
        "timeout": "30d",  # of a whole request: the largest file at the lowest speed
        "connect_timeout": f"{SILENT / 2}s",
        "read_timeout": f"{SILENT}s",
    }
    plain = scheme == "http" or any(
        os.environ.get(name, "").startswith("http://")
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
    )
    if plain:  # the user has named a server without TLS
        options["allow_http"] = True
    if user:
        from urllib.parse import unquote

        token = base64.b64encode(unquote(user).encode()).decode()
        options["default_headers"] = {"authorization": f"Basic {token}"}
    if certificates := os.environ.get("SSL_CERT_FILE"):
        with open(certificates, "rb") as file:
            options["root_certificate"] = file.read()
    if scheme in ("http", "https"):
        address = f"{scheme}://{host}/{'?' + query if query else ''}"
        return HTTPStore.from_url(address, client_options=options, retry_config=RETRIES)
    return from_url(f"{scheme}://{host}", client_options=options, retry_config=RETRIES)


def broken(url: Url) -> RemoteError:
    """Return the error of a connection that ended too early."""
    return RemoteError(f"{url}: the connection broke", "the connection broke", lasting=False)


def _refusal(url: Url, error: Exception) -> RemoteError:
    """Return what an error of obstore means, in a line. The error's own text is long,
    and holds signed URLs."""
    text = str(error)
    said = text.partition("\n\nDebug source")[0]
    status = re.search(r"status code: (\d{3}) ?([A-Za-z ]*)", said)
    code = re.search(r"<Code>(\w+)</Code>", said)
    number = int(status[1]) if status else 0
    why = f"{status[1]} {status[2]}".strip() if status else ""
    why = f"{why}, {code[1]}" if code and why else why
    kind = type(error).__name__
    what, amazon = "server" if url.is_web else "store", url.scheme in ("s3", "s3a")

    def lasting(message: str) -> RemoteError:
        _made.cache_clear()  # credentials may be set before the next try of a library's user
        return RemoteError(message, why or "refused", lasting=True)

    if code and code[1] == "NoSuchBucket":
        return lasting(
            f"there is no bucket {url.host} (of {url}); correct the name"
            + (", or the variables AWS_ENDPOINT_URL and AWS_REGION" if amazon else "")
        )
    if "169.254.169.254" in said or "metadata.google" in said or "token request" in said:
        why = "no credentials"
        return lasting(f"{url} can't be read: no credentials were found; {credentials(url.scheme)}")
    if kind == "PreconditionError" or number in (412, 416):
        return Changed(url)
    if "Range request not supported" in said:
        return NoRanges(url)
    if number in (401, 403) or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return lasting(f"{url} can't be read ({why or 'refused'}); {credentials(url.scheme)}")
    if number == 404 or isinstance(error, FileNotFoundError):
        why = why or "404 Not Found"
        return lasting(
            f"there is no {url}; correct the URL"
            + (", or the variables AWS_ENDPOINT_URL and AWS_REGION" if amazon else "")
        )
    if "region" in said.lower() or (code and code[1] == "AuthorizationHeaderMalformed"):
        return lasting(f"{url} lies in another region; name it in the variable AWS_REGION")
    if "BadScheme" in text:
        return lasting(f"{url} is on a {what} without TLS; set AWS_ALLOW_HTTP=true")
    if re.search(r"dns error|failed to lookup|Name or service not known", text):
        return RemoteError(
            f"{url} can't be reached: its host isn't known; correct the URL"
            + (" or AWS_ENDPOINT_URL" if amazon else "")
            + ", or mend the network",
            "its host isn't known",
            lasting=url.host not in _answered,
            unreachable=True,
        )
    if re.search(r"certificate|InvalidCertificate|UnknownIssuer", text):
        why = "its certificate isn't trusted"
        return lasting(
            f"{url} can't be read: {why}; name the file of the certificate that signed it in "
            f"SSL_CERT_FILE"
        )
    if number and number not in (408, 425, 429) and number < 500:
        return lasting(f"{url} can't be read: the {what} answered {why}")
    if re.search(r"[Hh]eader missing", said):
        return lasting(f"{url} can't be read: the {what} doesn't tell its size")
    if not number and kind in ("InvalidPathError", "ValueError", "UnknownConfigurationKeyError"):
        return lasting(f"{url} can't be read ({_scrubbed(said)}); correct the URL")
    reasons = {
        r"ConnectionRefused|onnection refused": "the connection was refused",
        r"TimedOut|timed out|deadline": f"no answer within {SILENT} s",
        r"IncompleteBody|Interrupted|ConnectionReset|BrokenPipe|closed": "the connection broke",
    }
    why = why or next((r for p, r in reasons.items() if re.search(p, text)), _scrubbed(said))
    return RemoteError(f"{url}: {why}", why, lasting=False, unreachable=not number)


def _scrubbed(said: str) -> str:
    """Return the end of an error's first line, without addresses."""
    line = re.sub(r"\S+://\S+", "…", " ".join(said.split()))
    return line.rpartition(" - ")[2][:120] or "no reason was given"
