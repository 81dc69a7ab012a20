"""Keep a local copy of a label store of the hub, which is filled as it is read.

A copy lies in hub/ORG--NAME/COMMIT/ of the cache folder: labels.zarr, an ordinary label
store that lacks shards, and labels.zarr.packs.json, the index of the packs that hold
them. A copy belongs to one commit, so it never changes its content.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from cache.errors import BESIDE
from cache.hub import client, packs
from cache.hub.address import COMMIT, Address, HubError, is_hub
from cache.hub.packs import Index, Pack
from cache.system.claims import claim, held
from cache.system.durable import make_folder, replace_file, whole_folder
from cache.system.folders import VARIABLE, cache_folder
from cache.system.signals import check

STORE = "labels.zarr"
# The files of a description; what they must be is checked when the store is opened.
DESCRIPTION = re.compile(
    r"(?:(?:[a-z_]+/){0,2}zarr\.json|images/[a-z_]+/c/[0-9]+(?:/[0-9]+)?"
    r"|records/c/[0-9]+/[0-9]+/0)"
)


def here(path: str | Path) -> Path:
    """Return a path itself; of an address on the hub, the path of its local copy."""
    return opened(Address.parse(path)) if is_hub(path) else Path(path)


def announced(path: str | Path) -> Path:
    """Return the path of ``here``, and tell the user which commit of a store on the hub
    is read."""
    found = here(path)
    if is_hub(path):
        client.tell(f"{path} is read at commit {found.parent.name[:12]}, through {found}")
    return found


def opened(address: Address) -> Path:
    """Return the path of the local copy of a store of the hub, made if need be. Only
    the store's description is fetched. Raises HubError."""
    folder = cache_folder() / "hub" / address.repo.replace("/", "--")
    commit = _commit(address, folder)
    path = folder / commit / STORE
    beside = path.with_name(STORE + BESIDE)
    with _said(folder):
        _once(
            folder / "claims",
            f"open-{commit}",
            lambda: path.exists() and beside.exists(),
            lambda: _make(address, commit, path),
        )
    return path


def _commit(address: Address, folder: Path) -> str:
    """Return the commit of an address: as the hub says, or, where the hub can't be
    asked, as it said last."""
    if COMMIT.fullmatch(address.revision) and (folder / address.revision / STORE).exists():
        return address.revision
    ref = folder / "refs" / quote(address.revision, safe="")
    try:
        last = ref.read_text().strip()
    except OSError:
        last = ""
    if not (COMMIT.fullmatch(last) and (folder / last / STORE).exists()):
        last = ""
    if client.offline():
        if not last:
            raise HubError(
                f"{address} isn't here, and HF_HUB_OFFLINE forbids to fetch it; unset it once"
            )
        return last
    try:
        commit = client.commit_of(address.repo, address.revision, 0.0 if last else None)
    except client.Unreachable as error:
        if not last:
            raise
        client.tell(f"{error}; meanwhile commit {last[:12]} is read, the last that was seen")
        return last
    if not COMMIT.fullmatch(commit):
        raise HubError(f"{address} has no commit ({commit[:60]!r}); check HF_ENDPOINT")
    with _said(folder):
        if commit != last:
            make_folder(ref.parent)
            replace_file(ref, commit.encode())
    return commit


def _make(address: Address, commit: str, path: Path) -> None:
    """Fetch the description of a store, and make the copy of it."""
    try:
        content = client.read(address.repo, commit, packs.INDEX)
    except HubError as error:
        if "is not in its repository" not in str(error):
            raise
        raise HubError(
            f"{address} holds no label store (it has no {packs.INDEX}); check the address, or "
            f"finish its sharing: share STORE --to {address.repo}"
        ) from None
    index = Index.decode(content, str(address))
    make_folder(path.parent)
    about = {"repo": address.repo, "commit": commit, "index": json.loads(content)}
    replace_file(path.with_name(STORE + BESIDE), json.dumps(about).encode())
    part = path.with_name(f"{index.description.sha256}.part")
    _require_room(path.parent, index.description, str(address))
    client.fetch(_wanted(address.repo, commit, index.description), part)
    where = f"{address}: {index.description.file}"
    with whole_folder(path) as scratch:
        packs.unpack(part, scratch, _described, where=where, sync=False)
    part.unlink(missing_ok=True)


def _described(name: str) -> bool:
    return DESCRIPTION.fullmatch(name) is not None


def _wanted(repo: str, commit: str, pack: Pack) -> client.Wanted:
    return client.Wanted(repo, commit, pack.file, pack.size, pack.sha256)


@dataclass
class Copy:
    """The shards of a store of the hub, which come when they are read.

    path: the local copy. files: gives the files of a shard of a view.
    """

    path: Path
    repo: str
    commit: str
    index: Index
    files: Callable[[int, int], list[Path]]
    _healing: threading.Lock = field(default_factory=threading.Lock)
    _healed: set[tuple[int, int]] = field(default_factory=set)
    _ahead: set[int] = field(default_factory=set)  # views whose next view was begun

    @classmethod
    def of(cls, path: Path, files: Callable[[int, int], list[Path]]) -> Copy | None:
        """Return the shards that the store at ``path`` may fetch; None for a store that
        is no copy of another."""
        try:
            about = json.loads((path.parent / (path.name + BESIDE)).read_bytes())
            where = f"hf://{about['repo']}"
            index = Index.decode(json.dumps(about["index"]).encode(), where)
            return cls(path, str(about["repo"]), str(about["commit"]), index, files)
        except OSError:  # there is none
            return None
        except (ValueError, KeyError, TypeError):
            raise HubError(
                f"{path.name + BESIDE} beside {path} is damaged; remove the folder {path.parent}, "
                f"which is fetched again"
            ) from None

    @property
    def remedy(self) -> str:
        """Return what to do about a fault of the store."""
        return f"hf://{self.repo} was shared with this fault at {self.commit[:12]}: tell its owner"

    @property
    def absent(self) -> str:
        """Return what to do about shards that the store lacks."""
        return f"hf://{self.repo} has no more at {self.commit[:12]}; ask its owner to share more"

    def has(self, view: int, shard: int) -> bool:
        """Return whether a shard can be fetched."""
        return self._pack(view, shard) is not None

    def fetch(self, view: int, shard: int, *, anew: bool = False) -> None:
        """Fetch the pack of a shard, unless the shard's files are here. anew: fetch it
        even so, since a file is damaged. Raises HubError."""
        pack = self._pack(view, shard)
        if pack is not None:
            self._fetch(pack, view, shard, anew)
            self._look_ahead(view)

    def _fetch(self, pack: Pack, view: int, shard: int, anew: bool = False) -> None:
        with _said(self.path), self._healing if anew else nullcontext():
            if anew and (view, shard) not in self._healed:
                self._healed.add((view, shard))  # another thread may have found it, too
                for path in self.files(view, shard):
                    path.unlink(missing_ok=True)
            _once(
                self.path.with_name("claims"),
                f"pack-{pack.sha256}",
                lambda: all(map(_filled, self.files(view, shard))),
                lambda: self._fill(pack),
            )

    def _look_ahead(self, view: int) -> None:
        """Fetch the next view in the background, once all of this view is here: an
        epoch replays a view, and the next epoch the next."""
        more = self._packs.get(view + 1)
        if not more or view in self._ahead or not all(map(self._is_here, self._packs[view])):
            return
        self._ahead.add(view)

        def work() -> None:
            # Whoever reads the view meets the same error, and tells it.
            with suppress(BaseException):
                for pack in more:
                    self._fetch(pack, pack.view, pack.first)

        if not all(map(self._is_here, more)):
            threading.Thread(target=work, daemon=True, name="fetching").start()

    def _is_here(self, pack: Pack) -> bool:
        return all(
            _filled(path)
            for shard in range(pack.first, pack.stop)
            for path in self.files(pack.view, shard)
        )

    def _pack(self, view: int, shard: int) -> Pack | None:
        for pack in self._packs.get(view, ()):
            if pack.first <= shard < pack.stop:
                return pack
        return None

    @cached_property
    def _packs(self) -> dict[int, list[Pack]]:
        """Return the packs of each view."""
        found: dict[int, list[Pack]] = {}
        for pack in self.index.packs:
            found.setdefault(pack.view, []).append(pack)
        return found

    def _fill(self, pack: Pack) -> None:
        """Fetch a pack, and put its files into the copy."""
        wanted = {
            path.relative_to(self.path).as_posix()
            for shard in range(pack.first, pack.stop)
            for path in self.files(pack.view, shard)
        }
        _require_room(self.path.parent, pack, f"hf://{self.repo}")
        client.tell(f"hf://{self.repo}: fetching {pack.file} ({pack.size / 1e6:,.1f} MB)")
        part = self.path.with_name(f"{pack.sha256}.part")
        client.fetch(_wanted(self.repo, self.commit, pack), part)
        where = f"hf://{self.repo}: {pack.file}"
        packs.unpack(part, self.path, wanted.__contains__, where=where)
        for name in sorted(wanted):
            if not _filled(self.path / name):
                raise HubError(f"{where} lacks {name}; {self.remedy}")
        part.unlink(missing_ok=True)


def _require_room(folder: Path, pack: Pack, where: str) -> None:
    """Raise HubError if a pack doesn't fit into a folder beside its own files."""
    free = shutil.disk_usage(folder).free
    if free < 2 * pack.size:
        raise HubError(
            f"{pack.file} of {where} takes {2 * pack.size:,} bytes while it is unpacked, and "
            f"{folder} has {free:,} free; make room, or name a folder on a larger disk in "
            f"{VARIABLE}"
        )


def _filled(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


class _said:
    """Turns an error of the disk into a line that names the cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise HubError(
                f"nothing can be fetched into {self.folder} ({error.strerror or error}); mend "
                f"that, or name another folder in the variable {VARIABLE}"
            ) from None


def _once(claims: Path, name: str, there: Callable[[], bool], make: Callable[[], None]) -> None:
    """Let one process of this machine ``make`` something, and return when it is
    ``there``. The others wait; if that process dies, another makes it."""
    while not there():
        make_folder(claims.parent)
        with claim(claims, name) as mine:
            if mine:
                if not there():
                    make()
                return
        while not there() and held(claims, name):
            time.sleep(0.1)
            check()
