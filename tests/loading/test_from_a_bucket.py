"""StoredCrops reads images from a web server or a bucket: whole files of the cache in
every worker, and parts of other files in workers that weren't forked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.containers import as_shards
from support.web_server import WebServer
from torch.utils.data import DataLoader

from pipeline.exchange.share import share
from pipeline.images.patience import DataError
from pipeline.images.sources.remote import persistence, store
from pipeline.loading import StoredCrops

SHARDS = "photos-train-{000000..000002}.tar"


@pytest.fixture
def address(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the photographs in shards on a web server, with an empty cache."""
    monkeypatch.setenv("OFFLINE_MEAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(persistence, "PATIENCE", 20.0)
    store._answered.clear()
    shards = as_shards(photos / "train", tmp_path / "shards")
    server = WebServer({f"/data/{file.name}": file.read_bytes() for file in shards.iterdir()})
    server.start()
    yield f"{server.url}/data/{SHARDS}"
    server.stop()


def first_batch(dataset: StoredCrops, start: str) -> tuple[torch.Tensor, torch.Tensor]:
    loader = DataLoader(dataset, 8, num_workers=1, multiprocessing_context=start)
    return next(iter(loader))


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_files_in_the_cache_are_read_by_every_kind_of_worker(photos, store_path, address, start):
    plain = StoredCrops(store_path, photos, image_size=8)
    pixels, labels = first_batch(StoredCrops(store_path, address, image_size=8), start)
    for item in range(8):
        assert torch.equal(pixels[item], plain[item][0])
        assert torch.equal(labels[item], plain[item][1])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_parts_of_files_are_not_read_by_forked_workers_which_say_so(
    photos, store_path, address, monkeypatch, start
):
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", "800kB")
    plain = StoredCrops(store_path, photos, image_size=8)
    dataset = StoredCrops(store_path, address, image_size=8)
    assert dataset.data.source.files.parts
    if start == "fork":
        with pytest.raises(DataError, match="multiprocessing_context='spawn'"):
            list(DataLoader(dataset, 8, num_workers=1, multiprocessing_context=start))
    else:
        pixels, _ = first_batch(dataset, start)
        assert all(torch.equal(pixels[item], plain[item][0]) for item in range(8))


# Not forkserver: its server keeps the variables of the test that started it.
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_store_of_the_hub_is_fetched_by_every_kind_of_worker(hub, photos, store_path, start):
    share(store_path, "lab/labels")
    plain = StoredCrops(store_path, photos, image_size=8)
    dataset = StoredCrops("hf://lab/labels", photos, image_size=8)
    loader = DataLoader(dataset, 8, num_workers=2, multiprocessing_context=start)
    for epoch in range(2):
        plain.set_epoch(epoch)
        dataset.set_epoch(epoch)
        labels = torch.cat([label for _, label in loader])
        assert torch.equal(labels, torch.stack([plain[item][1] for item in range(90)]))
