"""Share a label store as a dataset of the Hugging Face hub.

A view is shared once it is finished. Its shards are read, compared with their digests
and packed, one pack at a time, so that the disk needs room for a few packs only. Packs
have names that tell their content: what the hub has is not sent again, after an
interruption or when the store has grown.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache import LabelStore
from cache.errors import StoreError
from cache.format.schema import RECORD_MAGIC
from cache.format.seal import read_metadata
from cache.hub import client, packs
from cache.hub.address import HubError, is_hub
from cache.hub.packs import INDEX, NAME, Index, Pack
from cache.system.claims import claim
from cache.system.durable import make_folder
from cache.system.folders import cache_folder
from pipeline.exchange.hub_upload import Repository, still_needed
from pipeline.exchange.store_card import LICENCE, store_card
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.wording import counted

CARD, OWN = "README.md", ".gitattributes"
AT_ONCE = 20  # packs in a commit: an interruption costs no more, and the hub takes 100
GONE = 50  # packs that are taken away in a commit
FOLDER_LIMIT = 10_000  # entries of a folder that the hub advises at most


@dataclass
class Shared:
    """The result of ``share``. left: views that are not finished, and were left out."""

    repo: str
    address: str
    commit: str
    views: int
    left: list[int]
    packs: int
    sent: int
    bytes_sent: int
    licence: str | None
    store: str = ""

    def document(self) -> dict[str, Any]:
        """Return the result as a document for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the result as lines to print."""
        return [
            f"{self.address}: {counted(self.views, 'view')} in {counted(self.packs, 'pack')}, of "
            f"which {self.sent} ({self.bytes_sent / 1e6:,.1f} MB) were sent now",
            f'  LabelStore.open("hf://{self.repo}"), or --store hf://{self.repo}; at this very '
            f"state: hf://{self.repo}@{self.commit}",
            "  README.md is the card; it says what the images' and teachers' licences mean for "
            "the labels" + ("" if self.licence else ", and that no licence was chosen (--licence)"),
        ]


def share(path: Path, to: str, *, licence: str | None = None, private: bool = False) -> Shared:
    """Upload the finished views of a label store to the dataset ``to`` of the hub.

    licence: of the labels, as the hub names licences; None: the one that was chosen
    before, or none. private: hide the dataset if it is made now. Raises StoreError for
    a store with a damaged shard, HubError for a name, token or repository that won't
    do.
    """
    repo = Repository(to, "dataset")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise HubError(
            f"{licence!r} is no licence as the hub names them; write for example cc-by-nc-4.0, "
            f"apache-2.0 or other"
        )
    if is_hub(path):
        raise HubError(f"{path} is on the hub already; name a local store")
    store = LabelStore.open(path)
    records = store.finished_records()
    done = (records["magic"] == RECORD_MAGIC).all(axis=1)
    if store.elsewhere:
        raise HubError(
            f"{path} is a copy of a shared store, and has nothing new; name its original"
        )
    if not done.any():
        raise StoreError(
            f"no view of {path} is finished, and only whole views are shared; run the same "
            f"{store.made_by} command again to finish one"
        )
    repo.require_token()
    say(
        f"{path}: {counted(int(done.sum()), 'view')} of {counted(len(store.images), 'image')} "
        f"to share"
    )
    repo.create(private)
    folder = cache_folder() / "hub"
    name = f"share-{hashlib.sha256(repo.name.encode()).hexdigest()[:16]}"
    make_folder(folder)
    with claim(folder / "claims", name) as mine:
        if not mine:
            raise HubError(
                f"another process is sharing to {repo.name}; wait for it, and run this again"
            )
        scratch = folder / name
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        make_folder(scratch)
        try:
            return _Sharing(store, records, repo, scratch).run(np.flatnonzero(done), licence)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@dataclass
class _Sharing:
    """The sharing of one store. there: what the hub has: size and sha256 by path."""

    store: LabelStore
    records: np.ndarray
    repo: Repository
    scratch: Path
    there: dict[str, tuple[int, str]] = field(default_factory=dict)
    waiting: list[Any] = field(default_factory=list)  # operations to commit
    sent: list[int] = field(default_factory=list)  # bytes of packs that were sent

    def run(self, views: np.ndarray, licence: str | None) -> Shared:
        self.there = self.repo.files()
        before = self._before(views)
        licence = licence or (before.licence if before else None)
        left = np.setdiff1d(np.arange(self.store.views), views).tolist()
        if left:
            say(
                f"{counted(len(left), 'view')} of {self.store.path} not finished, and left out "
                f"(the first is {left[0]}); share again once it is finished"
            )
        found = []
        plan = [
            (int(view), first, stop)
            for view in views
            for first, stop in packs.groups(self._sizes(int(view)))
        ]
        if len(plan) + 1 > FOLDER_LIMIT:
            raise HubError(
                f"{self.store.path} would take {len(plan):,} packs, and a folder of the hub "
                f"should have fewer than {FOLDER_LIMIT:,}; share fewer views"
            )
        with Progress("sharing", len(plan), "packs") as progress:
            for view, first, stop in plan:
                found.append(self._pack(view, first, stop))
                progress.advance(1)
                if len(self.waiting) >= AT_ONCE:
                    self._commit(f"Labels up to view {view}")
        commit = self._finish(tuple(found), views, licence)
        return Shared(
            self.repo.name,
            self.repo.address,
            commit,
            len(views),
            left,
            len(found),
            len(self.sent),
            sum(self.sent),
            licence,
            str(self.store.path),
        )

    def _before(self, views: np.ndarray) -> Index | None:
        """Return the index of what was shared before. Raises HubError if the repository
        is no place for this store."""
        strange = [
            name
            for name in self.there
            if name not in (CARD, OWN, INDEX) and not NAME.fullmatch(name)
        ]
        if strange:
            raise HubError(
                f"{self.repo.name} holds other files ({strange[0]}), which sharing must not mix "
                f"with; choose another name"
            )
        if INDEX not in self.there:
            return None
        head = self.repo.head()
        before = Index.decode(client.read(self.repo.name, head, INDEX), self.repo.name)
        if before.identity != self.store.identity.hex():
            raise HubError(
                f"{self.repo.name} holds another store (of other images, crops, teachers or "
                f"codec) than {self.store.path}; choose another name"
            )
        lacking = sorted({pack.view for pack in before.packs} - set(views.tolist()))
        if lacking:
            raise HubError(
                f"{self.repo.name} has view {lacking[0]}, which is not finished in "
                f"{self.store.path}; merge the two stores first, and share the result"
            )
        return before

    def _sizes(self, view: int) -> list[int]:
        names = self.store.shard_arrays
        return [
            sum(self.store.size(name, view, shard) for name in names)
            for shard in range(self.store.shards)
        ]

    def _pack(self, view: int, first: int, stop: int) -> Pack:
        """Send a pack of shards, unless the hub has it."""
        told = hashlib.sha256(self.records[view, first:stop].tobytes()).digest()
        name = packs.name_of(f"packs/view-{view:04d}-{first:03d}", told)
        size, digest = self.there.get(name, (0, ""))
        if digest:  # a pack that the hub doesn't keep as a large file has none there
            return Pack(name, size, digest, view, first, stop)
        for shard in range(first, stop):
            self.store.require_sound(view, shard)
        target = self.scratch / name.rpartition("/")[2]
        size, digest = packs.write(target, self._files(view, first, stop))
        self._send(target, name)
        self.sent.append(size)
        return Pack(name, size, digest, view, first, stop)

    def _send(self, target: Path, name: str) -> None:
        operation = self.repo.send(target, name)
        self.waiting.append(operation)
        if not still_needed(operation):
            target.unlink()

    def _files(self, view: int, first: int, stop: int) -> Iterator[tuple[str, Path]]:
        for shard in range(first, stop):
            for name in self.store.shard_arrays:
                path = self.store.file(name, view, shard)
                yield path.relative_to(self.store.path).as_posix(), path

    def _description(self, views: np.ndarray) -> Iterator[tuple[str, Path]]:
        """Yield the files that say what the store is, and which shards it has."""
        names = [*read_metadata(self.store.path, self.store.shard_arrays[1:])]
        for name in sorted([*names, *self.store.manifest_files()]):
            yield name, self.store.path / name
        for view in views.tolist():
            for shard in range(self.store.shards):
                path = self.store.file("records", view, shard)
                yield path.relative_to(self.store.path).as_posix(), path

    def _finish(self, found: tuple[Pack, ...], views: np.ndarray, licence: str | None) -> str:
        """Commit what makes the packs a store: description, index and card."""
        target = self.scratch / "description.tar"
        size, digest = packs.write(target, self._description(views))
        name = packs.name_of("description", bytes.fromhex(digest))
        if name not in self.there:
            self._send(target, name)
        index = Index(self.store.identity.hex(), Pack(name, size, digest), found, licence)
        card = store_card(self.repo.name, self.store, len(views), licence)
        self.waiting += [
            self.repo.send(index.encode(), INDEX),
            self.repo.send(card.encode(), CARD),
        ]
        kept = {name, *(pack.file for pack in found)}
        gone = [old for old in self.there if NAME.fullmatch(old) and old not in kept]
        return self._commit(f"Labels of {counted(len(views), 'view')}", gone[:GONE])

    def _commit(self, message: str, gone: list[str] | None = None) -> str:
        commit = self.repo.commit(self.waiting, message, gone or ())
        self.waiting = []
        for left in self.scratch.iterdir():
            left.unlink()
        return commit
