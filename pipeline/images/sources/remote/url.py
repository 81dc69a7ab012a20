"""Name what lies in a bucket or on a web server, and never show its secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, unquote

from pipeline.images.patience import DataError

WEB = ("http", "https")
SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", *WEB)
_URL = re.compile(rf"({'|'.join(SCHEMES)})://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
# Parameters of signed URLs, which change and tell nothing of the object.
SIGNING = re.compile(
    r"x-(amz|goog|oss)-.*|signature|expires|key-pair-id|policy|awsaccesskeyid|googleaccessid|"
    r"s[a-z]{1,2}|sk[a-z]+|(access_?)?token",
    re.IGNORECASE,
)


def is_url(text: object) -> bool:
    """Return whether a text is a URL that images can be fetched from. What pathlib
    makes of a URL, ``s3:/bucket``, is none."""
    return isinstance(text, str) and _URL.match(text) is not None


@dataclass(frozen=True)
class Url:
    """A URL, which has a path's ``name``, ``stem``, ``suffix`` and ``parent``.

    host: the bucket, or the server with its port. path: without a slash at its
    beginning or end; a web server's without percent signs for characters. user, query:
    secrets, which no text of a Url shows.
    """

    scheme: str
    host: str
    path: str = ""
    user: str = field(default="", repr=False)
    query: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Url:
        """Read a URL. Raises DataError, which shows no secrets."""
        found = _URL.match(text.strip())
        if not found:
            raise DataError(f"{text} is no URL that images can be fetched from")
        scheme, host, rest = found[1].lower(), found[2], found[3]
        user = query = ""
        if scheme in WEB:
            user, _, host = host.rpartition("@")
            rest, _, query = rest.partition("#")[0].partition("?")
            rest = unquote(rest)
        elif "@" in host and not scheme.startswith("abfs"):
            shown = cls(scheme, host.rpartition("@")[2], rest.strip("/"))
            raise DataError(
                f"{shown} was given with credentials in it, which would be printed and kept; "
                f"{credentials(scheme)}"
            )
        if not host:
            raise DataError(f"{scheme}:// is followed by no bucket; write {scheme}://BUCKET/FOLDER")
        return cls(scheme, host, re.sub("//+", "/", rest).strip("/"), user, query)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.path}".rstrip("/")

    def __truediv__(self, name: str) -> Url:
        return replace(self, path=f"{self.path}/{name}".strip("/"))

    @property
    def plain(self) -> PurePosixPath:
        """Return host and path as an absolute path, by which names are told apart."""
        return PurePosixPath("/", self.host, self.path)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> Url:
        """Return the folder that the object lies in."""
        return replace(self, path=self.path.rpartition("/")[0])

    @property
    def is_web(self) -> bool:
        """Return whether a web server has it, which can't list its files."""
        return self.scheme in WEB

    @property
    def identity(self) -> str:
        """Return what tells the object from others, whoever signed the URL and when. It
        is for digests only, since a query may hold secrets."""
        pairs = parse_qsl(self.query, keep_blank_values=True)
        return "\n".join([str(self), *sorted(f"{k}={v}" for k, v in pairs if not _signs(k))])


def _signs(key: str) -> bool:
    return SIGNING.fullmatch(key) is not None


def credentials(scheme: str) -> str:
    """Return the repair of a store that refuses: what gives credentials."""
    if scheme in ("s3", "s3a"):
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN; a profile: "
            'eval "$(aws configure export-credentials --format env)"), AWS_REGION, and '
            "AWS_ENDPOINT_URL for a store that isn't Amazon's, or AWS_SKIP_SIGNATURE=true for a "
            "public bucket"
        )
    if scheme == "gs":
        return (
            "name the key file in GOOGLE_APPLICATION_CREDENTIALS (gcloud auth application-default "
            "login makes one), or set GOOGLE_SKIP_SIGNATURE=true for a public bucket"
        )
    if scheme in WEB:
        return "write https://USER:PASSWORD@HOST/…, or a signed URL that hasn't expired"
    return (
        "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN"
    )
