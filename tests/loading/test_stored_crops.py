"""StoredCrops: the pixels and labels that train-student shows, for any trainer, in any
worker of a DataLoader, of the view of the epoch."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.containers import as_shards
from support.paths import ROOT
from support.small import changed, write_photos
from support.stages import generate, make_replay, stored_labels
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler

from cache import LabelStore
from cache.errors import MealError, StoreError
from pipeline.config import Render
from pipeline.images.patience import DataError
from pipeline.loading import StoredCrops, stored_crops
from pipeline.loading.decoder import Decoder
from pipeline.loading.packed_texts import PackedTexts
from pipeline.render import one_crop
from pipeline.render.dali import Decoder as DaliDecoder
from pipeline.sampling.epoch_order import Layout, part_windows

STARTS = ("fork", "spawn", "forkserver")


def shown_by_train_student(
    path: Path, folder: Path, view: int, size: int = 32
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Return what train-student's loader shows of a view: row → pixels uint8 [3, size,
    size] and label float32 [classes]."""
    store = LabelStore.open(path)
    replay = make_replay(
        stored_labels(store, store.views),
        folder,
        sizes=[size],
        batch_size=16,
        seed=0,
        rendering=Render(threads=1),
    )
    decode, shown = Decoder(store.codec, "cpu"), {}
    with replay.epoch(view) as batches:
        for batch in batches:
            labels = decode(batch.labels)
            for i, row in enumerate(batch.rows.tolist()):
                shown[row] = batch.pixels[size][i].permute(2, 0, 1), labels[i]
    replay.close()
    return shown


def require_equal(dataset: StoredCrops, path: Path, folder: Path) -> None:
    for view in range(dataset.views):
        dataset.set_epoch(view)
        shown = shown_by_train_student(path, folder, view, dataset.image_size)
        assert sorted(shown) == dataset.rows.tolist()
        for item, row in enumerate(dataset.rows.tolist()):
            pixels, label = dataset[item]
            assert torch.equal(pixels, shown[row][0])
            assert torch.allclose(label, shown[row][1], atol=1e-7)


@pytest.mark.parametrize("size", [32, 49])
def test_pixels_and_labels_are_those_of_train_student(photos, store_path, size):
    dataset = StoredCrops(store_path, photos, image_size=size)
    require_equal(dataset, store_path, photos / "train")
    pixels, label = dataset[0]
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, size, size)
    assert pixels.is_contiguous()
    assert label.dtype == torch.float32
    assert label.shape == (3,)
    assert float(label.sum()) == pytest.approx(1)
    assert len(dataset) == 90
    assert torch.equal(dataset[-1][0], dataset[89][0])
    with pytest.raises(IndexError):
        dataset[90]


@pytest.mark.parametrize(
    "crops",
    [
        {"cutmix": {"prob": 0.7}, "views": 2},
        {"interpolation": "bicubic", "views": 1},
        {"exif": "apply", "views": 1},
    ],
    ids=["cutmix", "bicubic", "exif"],
)
def test_every_kind_of_store_has_the_pixels_of_train_student(
    photos, recipe, tmp_path, crops, monkeypatch
):
    folder = tmp_path / "data" / "train"
    shutil.copytree(photos / "train", folder)
    for i, file in enumerate(sorted(folder.rglob("*.jpg"))[:9]):
        exif = Image.Exif()
        exif[one_crop.ORIENTATION] = i
        Image.open(file).save(file, exif=exif.tobytes(), quality=90)
    path = tmp_path / "labels.zarr"
    generate(changed(recipe, crops=crops), folder.parent, path)
    monkeypatch.setattr(one_crop.OneCrop, "_by_dali", None)  # Pillow decodes all of these
    require_equal(StoredCrops(path, folder.parent, image_size=32), path, folder)


def test_the_partners_of_a_block_are_in_it(photos, recipe, tmp_path):
    path = tmp_path / "labels.zarr"
    generate(changed(recipe, crops={"cutmix": {"prob": 1.0}, "views": 1}), photos, path)
    dataset = StoredCrops(path, photos, image_size=8)
    assert dataset.layout.block_rows == 32  # a shard, of which a chunk may be a part
    partners = dataset.store.mixes(0, dataset.rows).partner
    assert (partners // 32 == dataset.rows // 32).all()


def png_of_16_bits(picture: Image.Image) -> bytes:
    """Return a colour PNG of 16 bits, which Pillow reads but can't write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    deep = (np.asarray(picture).astype(np.uint32) * 250 + 77).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in deep)
    header = struct.pack(">IIBBBBB", *picture.size, 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def odd_images(folder: Path) -> None:
    """Write the same picture in formats of which Pillow and DALI make other pixels, and
    in formats of which they make the same."""
    picture = Image.open(sorted(folder.rglob("*.jpg"))[0]).convert("RGB").resize((90, 60))
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 250 + 77
    place = folder / "ant"
    Image.fromarray(grey).save(place / "deep.png")
    (place / "deep_colour.png").write_bytes(png_of_16_bits(picture))
    picture.save(place / "moving.webp", save_all=True, append_images=[picture.rotate(90)])
    picture.convert("CMYK").save(place / "print.jpg")
    picture.convert("P").save(place / "palette.png", transparency=3)
    picture.convert("L").save(place / "grey.tif")
    picture.save(place / "plain.webp", lossless=True)
    picture.save(place / "plain.bmp")


@pytest.mark.parametrize("start", STARTS)
def test_what_pillow_decodes_in_another_way_is_decoded_by_dali_also_in_workers(
    recipe, tmp_path, start
):
    folder = write_photos(tmp_path / "data" / "train", 3)
    odd_images(folder)
    path = tmp_path / "labels.zarr"
    generate(changed(recipe, crops={"views": 1}), folder.parent, path)
    dataset = StoredCrops(path, folder.parent, image_size=32)
    names = [dataset.store.images.path[row] for row in dataset.rows.tolist()]
    by_dali = [
        name
        for name in names
        if one_crop.pixels_of((folder / name).read_bytes(), upright=False) is None
    ]
    others = ("deep.png", "deep_colour.png", "moving.webp", "grey.tif", "plain.bmp")
    assert sorted(by_dali) == sorted(f"ant/{name}" for name in others)
    require_equal(dataset, path, folder)
    shown = shown_by_train_student(path, folder, 0)
    assert dataset._own.render.dali is not None  # this process has used DALI, too
    dataset.set_epoch(0)
    loader = DataLoader(dataset, 4, num_workers=1, multiprocessing_context=start)
    pixels = torch.cat([batch for batch, _ in loader])
    for item, row in enumerate(dataset.rows.tolist()):
        assert torch.equal(pixels[item], shown[row][0]), names[item]


@pytest.mark.parametrize(
    ("format", "mode"),
    [*((f, m) for f in ("PNG", "WEBP") for m in ("RGB", "RGBA")), ("PNG", "P"), ("PNG", "LA"),
     ("PNG", "1"), ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK")],
)  # fmt: skip
def test_pillow_and_dali_decode_to_the_same_bytes(photos, format, mode):
    from pipeline.render.resample import SQUARE, resize_all
    from pipeline.render.settings import RenderSettings

    photo = Image.open(photos / "train" / "ant" / "000.jpg").resize((64, 64))
    photo = photo.convert("L").convert("LA") if mode == "LA" else photo.convert(mode)
    if mode == "RGBA":
        photo.putalpha(Image.linear_gradient("L").resize((64, 64)))
    file = io.BytesIO()
    photo.save(file, format, lossless=True, **({"transparency": b"\0\x80"} if mode == "P" else {}))
    with warnings.catch_warnings(action="error"):  # a user sees no warning for each image
        pillows = one_crop.pixels_of(file.getvalue(), upright=False)
    square = np.zeros((1, 1, len(SQUARE)), np.int64)
    square[..., 2:6] = 64  # the whole picture, as large as it is: the resize changes nothing
    made = np.empty((1, 1, 64, 64, 3), np.uint8)
    decoded = DaliDecoder(1, RenderSettings(threads=1), regions=False)([file.getvalue()])
    resize_all(decoded.table, square, False, (0, 1, 0), made)
    assert np.array_equal(made[0, 0], pillows)


def labels_of(dataset: StoredCrops, view: int) -> torch.Tensor:
    return torch.from_numpy(LabelStore.open(dataset.store.path).probabilities(view, dataset.rows))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("lasting", [True, False])
def test_every_worker_shows_the_view_of_the_epoch(photos, store_path, start, lasting):
    dataset = StoredCrops(store_path, photos, image_size=8)
    loader = DataLoader(
        dataset, 16, num_workers=2, persistent_workers=lasting, multiprocessing_context=start
    )
    assert not torch.allclose(labels_of(dataset, 0), labels_of(dataset, 1))
    for epoch in (0, 1, 3) if lasting else (3,):
        dataset.set_epoch(epoch)
        made = torch.cat([label for _, label in loader])
        assert torch.allclose(made, labels_of(dataset, epoch % 2), atol=1e-7)


def test_views_can_be_fewer(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8, views=1)
    dataset.set_epoch(1)
    assert dataset.view == 0
    assert torch.equal(dataset[4][1], labels_of(dataset, 0)[4])


LOOK = """
import sys
from torch.utils.data import DataLoader
from pipeline.loading import StoredCrops

def loaded(batch):
    return list(sys.modules)

if __name__ == "__main__":
    dataset = StoredCrops(sys.argv[1], sys.argv[2], image_size=8)
    loader = DataLoader(
        dataset, 90, num_workers=1, multiprocessing_context="spawn", collate_fn=loaded
    )
    print(*next(iter(loader)))
"""


def test_workers_need_no_dali(photos, store_path, tmp_path):
    (tmp_path / "look.py").write_text(LOOK)
    command = [sys.executable, tmp_path / "look.py", store_path, photos]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    modules = done.stdout.split()
    assert "pipeline.render.resample" in modules, done.stderr
    assert not [name for name in modules if "nvidia.dali" in name]


def test_codes_come_as_they_are_stored_and_are_decoded_on_the_device(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8, codes=True)
    plain = StoredCrops(store_path, photos, image_size=8)
    (_, codes), (_, labels) = (next(iter(DataLoader(one, 90))) for one in (dataset, plain))
    assert codes.dtype == torch.uint8
    assert np.array_equal(codes, LabelStore.open(store_path).codes(0, dataset.rows))
    assert torch.allclose(dataset.decoder()(codes), labels, atol=1e-6)


def test_a_label_goes_into_torchs_cross_entropy(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8)
    _, labels = next(iter(DataLoader(dataset, 8)))
    logits = torch.randn(8, 3)
    wanted = -(labels * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(functional.cross_entropy(logits, labels), wanted, atol=1e-5)


def test_the_transform_sees_the_pixels_and_another_is_refused(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8, transform=lambda pixels: 255 - pixels)
    plain = StoredCrops(store_path, photos, image_size=8)
    assert torch.equal(dataset[3][0], 255 - plain[3][0])
    with pytest.raises(AttributeError, match="PrefetchLoader"):
        dataset.transform = None


def test_the_class_of_an_item_is_known(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8)
    for item in range(0, 90, 7):
        name = dataset.store.images.path[int(dataset.rows[item])]
        assert dataset.class_names[dataset.class_index[item]] == name.split("/")[0]


def test_images_in_tar_files_are_the_same_dataset(photos, store_path, tmp_path):
    shards = as_shards(photos / "train", tmp_path / "shards")
    plain = StoredCrops(store_path, photos, image_size=16)
    dataset = StoredCrops(store_path, shards, image_size=16)
    loader = DataLoader(dataset, 90, num_workers=1, multiprocessing_context="spawn")
    (pixels, labels) = next(iter(loader))
    for item in range(0, 90, 5):
        assert torch.equal(pixels[item], plain[item][0])
        assert torch.equal(labels[item], plain[item][1])


# What doesn't fit together is one line, before anything is read.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "bicubic"}, "interpolation is 'bicubic', and the teachers of .* saw"),
        ({"views": 3}, "views is 3 but .* has 2; extend it with generate-labels --views 3"),
        ({"views": 0}, "views must be 1 or more, got 0"),
        ({"image_size": 4}, "image_size must be a number of pixels from 8 to 4096, got 4"),
        ({"image_size": 224.0}, "image_size must be a number of pixels .* got 224.0"),
    ],
)
def test_impossible_options_are_refused(photos, store_path, options, message):
    with pytest.raises(MealError, match=message) as error:
        StoredCrops(store_path, photos, **{"image_size": 8} | options)
    assert "\n" not in str(error.value)


def test_the_stores_own_interpolation_may_be_named(photos, store_path):
    assert len(StoredCrops(store_path, photos, image_size=8, interpolation="bilinear")) == 90


def test_a_negative_epoch_and_a_foreign_rank_are_refused(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8)
    with pytest.raises(ValueError, match="epoch must be 0 or more, got -1"):
        dataset.set_epoch(-1)
    with pytest.raises(ValueError, match="rank must be from 0 to world - 1, 3, got 4"):
        dataset.sampler(rank=4, world=4)


def test_an_unfinished_view_is_refused_and_fewer_views_are_taken(photos, store_path, tmp_path):
    path = tmp_path / "labels.zarr"
    shutil.copytree(store_path, path)
    store = LabelStore.open(path)
    store.file("labels", 1, 2).unlink()
    with pytest.raises(StoreError, match=r"view 1 of .* is not finished .* or pass views=1"):
        StoredCrops(path, photos, image_size=8)
    assert len(StoredCrops(path, photos, image_size=8, views=1)) == 90


def test_other_images_are_refused(store_path, tmp_path):
    write_photos(tmp_path / "train", 29)
    with pytest.raises(DataError):
        StoredCrops(store_path, tmp_path, image_size=8)


def test_other_pixels_than_the_teachers_saw_are_refused_unless_allowed(
    photos, recipe, tmp_path, capfd
):
    path = tmp_path / "labels.zarr"
    generate(changed(recipe, render={"resize": "dali"}), photos, path)
    with pytest.raises(StoreError, match="renders other pixels .* allow_renderer_difference=True"):
        StoredCrops(path, photos, image_size=32)
    dataset = StoredCrops(path, photos, image_size=32, allow_renderer_difference=True)
    assert "warning" in capfd.readouterr().err
    assert dataset[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_has_changed_since_is_named(photos, store_path, tmp_path, workers):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    dataset = StoredCrops(store_path, data, image_size=8)
    file = data / "train" / dataset.store.images.path[int(dataset.rows[5])]
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    loader = DataLoader(dataset, 4, num_workers=workers)
    with pytest.raises(DataError, match=f"{file.name} has changed since"):
        list(loader)


def test_a_damaged_shard_is_refused_by_the_worker_that_reads_it(photos, store_path, tmp_path):
    path = tmp_path / "labels.zarr"
    shutil.copytree(store_path, path)
    dataset = StoredCrops(path, photos, image_size=8)
    store = LabelStore.open(path)
    shutil.copy(store.file("boxes", 1, 0), store.file("boxes", 0, 0))
    with pytest.raises(StoreError, match="not what was written"):
        list(DataLoader(dataset, 16, num_workers=1))


# Sampler.


def blocks_read(dataset: StoredCrops, order: list[int], monkeypatch, most: int) -> int:
    """Count the chunks that are read from the disk, with room for so many in memory."""
    own = dataset._opened()
    own.blocks.held.clear()
    own.blocks.most = most
    count = 0
    read = type(own.blocks)._read

    def counted(blocks: object, view: int, number: int) -> object:
        nonlocal count
        count += 1
        return read(blocks, view, number)

    monkeypatch.setattr(type(own.blocks), "_read", counted)
    for item in order:
        own.blocks.of(dataset.view, int(dataset.rows[item]))
    return count


def test_the_sampler_reads_every_chunk_once(photos, recipe, tmp_path, monkeypatch):
    path = tmp_path / "labels.zarr"
    generate(changed(recipe, crops={"views": 1}, store={"shard_rows": 8}), photos, path)
    dataset = StoredCrops(path, photos, image_size=8)
    chunks = len(np.unique(dataset.rows // dataset.store.chunk_rows))
    assert chunks >= 10
    dataset.layout = replace(dataset.layout, window_blocks=4)
    order = list(dataset.sampler())
    assert sorted(order) == list(range(90))
    assert blocks_read(dataset, order, monkeypatch, most=5) == chunks
    scattered = np.random.default_rng(0).permutation(90).tolist()
    assert blocks_read(dataset, scattered, monkeypatch, most=5) > 2 * chunks


def test_the_chunks_in_use_stay_in_memory(photos, recipe, tmp_path, monkeypatch):
    path = tmp_path / "labels.zarr"
    generate(changed(recipe, crops={"views": 1}, store={"shard_rows": 8}), photos, path)
    dataset = StoredCrops(path, photos, image_size=8)
    first = [
        int(np.flatnonzero(dataset.rows // dataset.store.chunk_rows == n)[0]) for n in range(4)
    ]
    one, two, three, four = first
    order = [one, two, one, three, one, four, one]  # the first one is always in use
    assert blocks_read(dataset, order, monkeypatch, most=2) == 4


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_ranks_divide_an_epoch(photos, store_path, world, shuffle):
    dataset = StoredCrops(store_path, photos, image_size=8)
    for epoch in (0, 5):
        parts = []
        for rank in range(world):
            sampler = dataset.sampler(rank=rank, world=world, shuffle=shuffle)
            assert isinstance(sampler, DistributedSampler)
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
            assert len(parts[-1]) == len(sampler) == -(-90 // world)
        together = sorted(item for part in parts for item in part)
        assert set(together) == set(range(90))
        assert len(together) - 90 < world
        short = [list(dataset.sampler(rank=r, world=world, drop_last=True)) for r in range(world)]
        assert len({item for part in short for item in part}) == world * (90 // world)


def test_the_order_is_new_in_each_epoch_and_with_each_seed(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        sampler = dataset.sampler(seed=seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    assert dataset.sampler(shuffle=False).__iter__().__next__() == 0


def test_a_rank_reads_shards_of_its_own():
    rows = np.arange(100_000)
    order, touched = [], []
    for rank in range(8):
        part = slice(rank * 12_500, (rank + 1) * 12_500)
        mine = np.concatenate([*part_windows(rows, Layout(10, 64, 1000), (3, 2), part)])
        order.append(mine)
        touched.append(len(np.unique(mine // 1000)))
    assert max(touched) <= 14  # of 100 shards
    whole = np.concatenate(order)
    assert np.array_equal(np.sort(whole), rows)
    assert abs(np.corrcoef(rows, whole)[0, 1]) < 0.15
    # A window shuffles its chunks together, so neighbours are torn apart.
    assert (np.abs(np.diff(whole)) == 1).mean() < 0.01


def test_the_samplers_epoch_is_the_datasets(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8)
    dataset.sampler().set_epoch(3)
    assert (dataset.epoch, dataset.view) == (3, 1)


# Cheap to hand to workers.


def test_names_are_packed(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8)
    paths = dataset.store.images.path
    assert isinstance(paths, PackedTexts)
    assert [paths[i] for i in range(len(paths))] == LabelStore.open(store_path).images.path.tolist()
    texts = ["a", "", "é/ü", "x" * 300, ""]
    packed = PackedTexts(texts)
    assert (len(packed), [packed[i] for i in range(5)]) == (5, texts)


def test_a_pickled_dataset_shows_the_same_and_holds_no_open_store(photos, store_path):
    dataset = StoredCrops(store_path, photos, image_size=8)
    item = dataset[7]
    assert dataset._own is not None
    again = pickle.loads(pickle.dumps(dataset))
    assert again._own is None
    assert all(torch.equal(a, b) for a, b in zip(item, again[7], strict=True))


def test_a_worker_reads_the_description_and_the_manifest_no_more(photos, store_path, monkeypatch):
    dataset = StoredCrops(store_path, photos, image_size=8)
    monkeypatch.setattr(LabelStore, "open", None)
    monkeypatch.setattr(LabelStore, "_column", None)
    assert stored_crops._Own(dataset).item(0, 0)
