"""Replay: every image comes once an epoch, in the same order for any number of
processes, with the stored crops and labels of the epoch's view."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small import CPU
from support.stages import make_replay, stored_labels

from cache import LabelStore
from cache.format.codec import CODECS
from pipeline.config import Render
from pipeline.loading.decoder import Decoder
from pipeline.runtime.threads import ahead
from pipeline.sampling.epoch_order import WINDOW_BLOCKS, batch_sizes, epoch_windows
from pipeline.training.batches import Batch

UNUSABLE = [0, 5, 6, 7, 40, 41, 42, 43, 89]


def order(usable: np.ndarray, block_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.concatenate([*epoch_windows(usable, block_rows, seed, epoch)])


def batches(
    store_path: Path, photos: Path, epoch: int, *, hard: bool = False, **how: int
) -> list[Batch]:
    source = stored_labels(LabelStore.open(store_path), 2, hard=hard)
    options = {"sizes": [32], "batch_size": 16, "seed": 5} | how
    with make_replay(source, photos / "train", rendering=Render(threads=2), **options).epoch(
        epoch
    ) as made:
        return list(made)


@pytest.mark.parametrize("rows", [1, 2, 63, 1000, 5000])
@pytest.mark.parametrize("block_rows", [1, 8, 64, 4096])
def test_an_epoch_shows_every_usable_row_once(rows, block_rows):
    usable = np.setdiff1d(np.arange(rows + len(UNUSABLE)), UNUSABLE)[:rows]
    for epoch in (0, 1, 7):
        assert np.array_equal(np.sort(order(usable, block_rows, 0, epoch)), usable)


def test_the_order_is_a_function_of_seed_and_epoch():
    usable = np.arange(3000)
    first = order(usable, 16, 0, 4)
    assert np.array_equal(first, order(usable, 16, 0, 4))
    for other in (order(usable, 16, 0, 5), order(usable, 16, 1, 4), order(usable, 16, 1 << 32, 4)):
        assert (first == other).mean() < 0.01


def test_the_order_reads_whole_blocks_and_no_block_twice():
    windows = [*epoch_windows(np.arange(10_000), 32, 0, 0)]
    assert len(windows) == -(-10_000 // 32 // WINDOW_BLOCKS)
    blocks = [np.unique(window // 32) for window in windows]
    assert len(np.concatenate(blocks)) == len(np.unique(np.concatenate(blocks)))


@pytest.mark.parametrize(("rows", "block_rows"), [(4000, 4096), (60_000, 16)])
def test_the_order_is_a_good_shuffle(rows, block_rows):
    position = np.arange(rows)
    for epoch in range(3):
        row = order(position, block_rows, 0, epoch)
        assert abs(np.corrcoef(position, row)[0, 1]) < 0.06
        assert np.abs(position - row).mean() == pytest.approx(rows / 3, rel=0.06)
        # Neighbours in the store are no neighbours in the epoch.
        assert (np.abs(np.diff(row)) == 1).mean() < 0.01


@pytest.mark.parametrize("world", [2, 3, 4])
def test_no_process_has_a_single_image_of_a_batch_and_together_they_have_it_once_or_each_whole(
    store_path, photos, world
):
    """BatchNorm needs two images."""
    source = stored_labels(LabelStore.open(store_path), 2)
    each = [
        make_replay(
            source,
            photos / "train",
            sizes=[32],
            batch_size=16,
            seed=5,
            rendering=Render(threads=1),
            rank=rank,
            world=world,
        )
        for rank in range(world)
    ]
    for size in range(2, 20):
        parts = [replay._mine(size) for replay in each]
        assert min(map(len, parts)) >= 2
        whole = np.arange(size)
        assert (
            all(np.array_equal(part, whole) for part in parts)
            if size < 2 * world
            else np.array_equal(np.concatenate(parts), whole)
        )


def test_another_epoch_than_was_begun_is_the_one_that_was_asked_for(store_path, photos):
    source = stored_labels(LabelStore.open(store_path), 2)
    replay = make_replay(
        source, photos / "train", sizes=[32], batch_size=16, seed=5, rendering=Render(threads=2)
    )
    for begun in (0, 1):
        replay.begin(begun)
        with replay.epoch(0) as made:
            rows = np.concatenate([batch.rows for batch in made])
        assert np.array_equal(
            rows, np.concatenate([batch.rows for batch in batches(store_path, photos, 0)])
        )
    replay.close()


def test_batch_sizes_add_up_and_leave_no_row_alone():
    for rows in range(1, 70):
        for batch_size in range(2, 20):
            sizes = batch_sizes(rows, batch_size)
            assert sum(sizes) == rows
            assert min(sizes) > 1 or rows == 1
            assert set(sizes[:-1]) <= {batch_size} and sizes[-1] <= batch_size + 1
    assert batch_sizes(0, 4) == []


@pytest.mark.parametrize("batch_size", [16, 89, 90, 500])
def test_every_number_of_processes_sees_the_same_global_batches(store_path, photos, batch_size):
    alone = batches(store_path, photos, 1, batch_size=batch_size)
    assert [len(batch.rows) for batch in alone] == batch_sizes(90, batch_size)
    for world in (2, 3, 4):
        ranks = [
            batches(store_path, photos, 1, batch_size=batch_size, rank=rank, world=world)
            for rank in range(world)
        ]
        for whole, *parts in zip(alone, *ranks, strict=True):
            assert np.array_equal(whole.rows, np.concatenate([part.rows for part in parts]))
            assert torch.equal(whole.pixels[32], torch.cat([part.pixels[32] for part in parts]))
            assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
            assert {whole.total, len(whole.rows)} == {part.total for part in parts}
            assert (
                max(len(part.rows) for part in parts) - min(len(part.rows) for part in parts) <= 1
            )


def test_a_batch_without_two_images_for_each_process_is_whole_in_all_of_them(store_path, photos):
    # 90 = 11 × 8 + 2
    ranks = [batches(store_path, photos, 0, batch_size=8, rank=rank, world=4) for rank in range(4)]
    last = [rank[-1] for rank in ranks]
    assert [(len(batch), batch.total, batch.copies, batch.weight) for batch in last] == [
        (2, 2, 4, 1.0)
    ] * 4
    assert len({batch.rows.tobytes() for batch in last}) == 1
    assert [
        (len(batch), batch.total, batch.copies, batch.weight)
        for rank in ranks
        for batch in rank[:1]
    ] == [(2, 8, 1, 1.0)] * 4
    uneven = [
        batches(store_path, photos, 0, batch_size=10, rank=rank, world=4)[0] for rank in range(4)
    ]
    assert [batch.weight for batch in uneven] == pytest.approx([1.2, 1.2, 0.8, 0.8])


@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_an_epoch_replays_the_labels_of_view_epoch_mod_views(store_path, photos, epoch):
    store = LabelStore.open(store_path)
    assert not np.array_equal(store.codes(0, slice(None)), store.codes(1, slice(None)))
    made = batches(store_path, photos, epoch)
    rows = np.concatenate([batch.rows for batch in made])
    assert np.array_equal(np.sort(rows), store.usable)
    assert np.array_equal(
        torch.cat([batch.labels for batch in made]).numpy(), store.codes(epoch % 2, rows)
    )


def test_hard_labels_are_the_class_folders_on_the_same_pixels(store_path, photos):
    store = LabelStore.open(store_path)
    for soft, hard in zip(
        batches(store_path, photos, 1), batches(store_path, photos, 1, hard=True), strict=True
    ):
        assert (
            hard.labels is None
            and hard.class_index.tolist() == store.images.class_index[hard.rows].tolist()
        )
        assert torch.equal(soft.pixels[32], hard.pixels[32]) and np.array_equal(
            soft.rows, hard.rows
        )


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_students_decoder_is_the_stores(codec, classes):
    logits = np.random.default_rng(0).normal(0, 6, (200, classes)).astype(np.float32)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    codes = codec.encode(p / p.sum(axis=1, keepdims=True))
    decoded = Decoder(codec, CPU)(torch.from_numpy(codes))
    assert decoded.dtype == torch.float32 and (decoded > 0).all()
    np.testing.assert_allclose(decoded.numpy(), codec.decode(codes), rtol=1e-6, atol=0)


def test_work_ahead_keeps_the_order_and_stays_within_its_depth():
    produced = []

    def items() -> Iterator[int]:
        for i in range(20):
            produced.append(i)
            yield i

    with ahead(items(), depth=3) as made:
        for i in range(20):
            deadline = time.monotonic() + 10
            while i == 10 and len(produced) < 14 and time.monotonic() < deadline:
                time.sleep(0.01)
            if i == 10:
                assert len(produced) == 14  # the thread works ahead
            assert len(produced) <= i + 3 + 1  # three waiting, and one being made
            assert next(made) == i
        assert next(made, "end") == "end"


def test_an_error_in_work_ahead_comes_in_its_place():
    def items() -> Iterator[int]:
        yield from (0, 1, 2)
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"), ahead(items()) as made:
        for item in made:
            seen.append(item)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("how", ["early", "by an error", "unused"])
def test_leaving_work_ahead_stops_its_thread(how):
    before, closed = threading.active_count(), []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    def leave() -> None:
        with ahead(items()) as made:
            assert threading.active_count() == before + 1
            if how != "unused":
                next(made)
            if how == "by an error":
                raise KeyError("in the consumer")

    if how == "by an error":
        with pytest.raises(KeyError, match="in the consumer"):
            leave()
    else:
        leave()
    assert threading.active_count() == before and closed == [True]
