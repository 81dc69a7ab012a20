"""The resize on the CPU: Pillow's bytes, whatever the batch, the threads and the CPU;
the old resize for the stores and runs that have it."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import timm
import torch
import zarr
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from support.paths import ROOT
from support.stages import centre_renderer, crop_renderer

from cache import LabelStore
from pipeline.render.errors import RenderError

FILTER = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resized(crop: Image.Image, size: int, interpolation: str) -> Image.Image:
    """Resize rows, then columns, as every version of Pillow does in two calls."""
    kind = FILTER[interpolation]
    return crop.resize((size, crop.height), kind).resize((size, size), kind)


def by_pillow(
    image: Image.Image, box: np.ndarray, flip: bool, size: int, interpolation: str
) -> torch.Tensor:
    top, left, height, width = box.tolist()
    crop = resized(image.crop((left, top, left + width, top + height)), size, interpolation)
    return torch.from_numpy(np.array(ImageOps.mirror(crop) if flip else crop))


def pieces() -> list[Image.Image]:
    """Pictures of photographs, of noise, and of black and white noise, which overshoots
    bicubic weights the most; some are of one pixel, a row or a column."""
    dice, photos = np.random.default_rng(0), load_sample_images().images
    shapes = [(301, 402), (427, 640), (97, 640), (427, 60), (33, 47), (1, 1), (1, 90), (77, 1)]
    found = [photos[i % 2][:h, :w] for i, (h, w) in enumerate(shapes)]
    for height, width in ((600, 200), (90, 1200), (64, 64), (3, 5), (1300, 11)):
        noise = dice.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found += [noise, np.where(noise > 127, np.uint8(255), np.uint8(0))]
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in found]


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def drawn(images: list[Image.Image], views: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw boxes of any shape and flips; the first view's boxes are the whole
    images."""
    dice = np.random.default_rng(seed)
    shapes = np.array([image.size[::-1] for image in images])
    extent = dice.integers(1, shapes + 1, (views, len(images), 2))
    extent[0] = shapes
    corner = dice.integers(0, shapes - extent + 1)
    return np.concatenate([corner, extent], axis=2), dice.random((views, len(images))) < 0.5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sizes", [(224,), (7, 96), (1, 2, 333)])
def test_crops_are_pillows_byte_by_byte(interpolation, sizes):
    """Shrunk, enlarged, of one pixel, very long and very thin."""
    images = pieces()
    boxes, flips = drawn(images, 4, len(sizes))
    blobs = [encoded(image) for image in images]
    made = crop_renderer(sizes, 4, 64, interpolation=interpolation, threads=2)(blobs, boxes, flips)
    for view in range(4):
        for size in sizes:
            for i, image in enumerate(images):
                wanted = by_pillow(image, boxes[view, i], flips[view, i], size, interpolation)
                assert torch.equal(made[view][size][i], wanted), (view, size, i)


def test_one_call_of_pillow_makes_them_too_unless_its_version_turns_the_passes_round():
    """Pillow 13 resizes columns first if they shrink by more than twice of what rows
    do."""
    images = pieces()
    boxes, flips = drawn(images, 6, 5)
    renderer = crop_renderer([96], 6, 64, interpolation="bicubic", threads=1)
    made = renderer([encoded(image) for image in images], boxes, flips)
    same = 0
    for view in range(6):
        for i, image in enumerate(images):
            top, left, height, width = boxes[view, i].tolist()
            if int(PIL.__version__.split(".")[0]) >= 13 and max(0, height - 96) > 2 * (width - 96):
                continue
            crop = image.crop((left, top, left + width, top + height))
            crop = crop.resize((96, 96), FILTER["bicubic"])
            wanted = np.array(ImageOps.mirror(crop) if flips[view, i] else crop)
            assert np.array_equal(made[view][96][i].numpy(), wanted)
            same += 1
    assert same >= 30


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_torchs_resize_is_two_levels_away_at_most(interpolation):
    images = pieces()
    boxes, flips = drawn(images, 3, 2)
    renderer = crop_renderer([224], 3, 64, interpolation=interpolation, threads=1)
    made = renderer([encoded(image) for image in images], boxes, flips)
    for view in range(3):
        for i, image in enumerate(images):
            top, left, height, width = boxes[view, i]
            pixels = torch.from_numpy(np.array(image)[top : top + height, left : left + width])
            (theirs,) = torch.nn.functional.interpolate(
                pixels.permute(2, 0, 1)[None], (224, 224), mode=interpolation, antialias=True
            ).permute(0, 2, 3, 1)
            theirs = theirs.flip(1) if flips[view, i] else theirs
            assert (made[view][224][i].int() - theirs.int()).abs().max() <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_shows_pillows_bytes_of_images_of_any_shape(interpolation):
    images = [image for image in pieces() if max(image.size) <= 16 * min(image.size)]
    shapes = np.array([image.size[::-1] for image in images])
    looks = [(64, interpolation), (224, interpolation)]
    made = centre_renderer(looks, 64, threads=2)([encoded(image) for image in images], *shapes.T)
    for size, _ in looks:
        short = size * 256 // 224
        for i, image in enumerate(images):
            wide, tall = (short * side // min(image.size) for side in image.size)
            whole = image.resize((wide, image.height), FILTER[interpolation])
            whole = whole.resize((wide, tall), FILTER[interpolation])
            left, top = round((wide - size) / 2), round((tall - size) / 2)
            wanted = np.array(whole.crop((left, top, left + size, top + size)))
            assert np.array_equal(made[size, interpolation][i].numpy(), wanted), image.size


def test_evaluation_shows_what_timms_own_transform_shows():
    transform = timm.data.create_transform(
        224, interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3, crop_pct=0.875
    )
    for shape in ((300, 420), (420, 301), (427, 640), (256, 256), (100, 130)):
        image = Image.fromarray(load_sample_images().images[0][: shape[0], : shape[1]])
        ours = centre_renderer([(224, "bicubic")], 1, threads=1)(
            [encoded(image)], *np.array(shape)[:, None]
        )[224, "bicubic"]
        theirs = (transform(image) * 255).round().to(torch.uint8).permute(1, 2, 0)
        assert torch.equal(ours[0], theirs)


def test_a_batch_of_many_parts_is_rendered_as_its_images_alone():
    """Parts of a batch are decoded and resized beside each other."""
    photo = Image.fromarray(load_sample_images().images[1])
    images = [photo.crop((i, i // 2, 200 + 2 * i, 160 + i)) for i in range(150)]
    boxes, flips = drawn(images, 2, 7)
    blobs = [encoded(image, "JPEG") for image in images]
    for views in (1, 2):
        parts = crop_renderer([48], views, 150, threads=3)
        assert parts.engine.part < 50
        made = parts(blobs, boxes[:views], flips[:views])
        one = crop_renderer([48], views, 1, threads=1)
        for i in (0, 31, 32, 64, 149):
            here = slice(i, i + 1)
            (alone,) = one([blobs[i]], boxes[:views, here], flips[:views, here]).all_views.values()
            assert torch.equal(made.all_views[48][:, i], alone[:, 0])


@pytest.mark.parametrize("views", [1, 2])
def test_a_failure_in_a_later_part_names_its_image_and_the_renderer_lives_on(views):
    photo = Image.fromarray(load_sample_images().images[1][:240, :320])
    blobs, boxes = [encoded(photo, "JPEG")] * 100, np.tile([3, 4, 230, 100], (views, 100, 1))
    flips, renderer = np.zeros((views, 100), bool), crop_renderer([32], views, 100, threads=2)
    good = renderer(blobs, boxes, flips).all_views[32].clone()
    with pytest.raises(RenderError, match="DALI could not render") as failed:
        renderer([*blobs[:71], blobs[0][: len(blobs[0]) // 2], *blobs[72:]], boxes, flips)
    assert failed.value.place == 71
    assert torch.equal(renderer(blobs, boxes, flips).all_views[32], good)


def test_nothing_is_read_outside_of_a_picture():
    """Boxes of a store lie inside its images, or it isn't trained from. Nothing else
    may read memory that isn't the picture's."""
    photo = Image.fromarray(load_sample_images().images[1][:240, :320])
    blobs, renderer = [encoded(photo, "JPEG")] * 100, crop_renderer([32], 2, 100, threads=2)
    flips, boxes = np.zeros((2, 100), bool), np.tile([3, 4, 230, 100], (2, 100, 1))
    good = renderer(blobs, boxes, flips).all_views[32].clone()
    for edge, value in ((0, -1), (0, 11), (1, 221), (2, 238), (2, 0), (3, 317)):
        beyond = boxes.copy()
        beyond[1, 77, edge] = value
        with pytest.raises(RenderError, match="lies outside of the image") as failed:
            renderer(blobs, beyond, flips)
        assert failed.value.place == 77
    assert torch.equal(renderer(blobs, boxes, flips).all_views[32], good)


AT_THE_END = """
import ctypes, mmap, sys
sys.path.insert(0, {root!r})
import numpy as np
from pipeline.render.resample import resize_all
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
protect = ctypes.CDLL(None, use_errno=True).mprotect
assert protect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
for height, width in ((8, 8), (16, 21), (1, 1), (9, 30)):
    image = np.array([[start + page - 3 * height * width, height, width]])
    for box in ((0, 0, height, width), (height - 1, width - 1, 1, 1)):
        square = np.array([[[*box, 5, 5, 0, 0, 0]]])
        made = np.full((1, 1, 5, 5, 3), 7, np.uint8)
        resize_all(image, square, False, (0, 1, 0), made)
        assert not made.any()
"""


def test_no_byte_behind_a_picture_is_read():
    """The picture ends where memory may not be read."""
    code = AT_THE_END.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


DIGEST = """
import hashlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np, torch
from rendering.test_fixed_point import drawn, encoded, pieces
from support.stages import crop_renderer
boxes, flips = drawn(pieces(), 3, 1)
blobs = [encoded(image) for image in pieces()]
digest = hashlib.sha256()
for interpolation in ("bilinear", "bicubic"):
    made = crop_renderer([96, 224], 3, 64, interpolation=interpolation, threads=2)
    for pixels in made(blobs, boxes, flips).all_views.values():
        digest.update(pixels.numpy().tobytes())
print(digest.hexdigest())
"""


def capabilities() -> list[dict[str, str]]:
    """List environments in which torch and numba use other instructions of this CPU."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    known = [("avx2", "x86-64-v3", " avx2 "), ("avx512", "x86-64-v4", " avx512bw ")]
    able = [(aten, cpu) for aten, cpu, flag in known if flag in flags]
    if flags and " sse2 " in flags:
        able.append(("default", "x86-64"))
    return [
        {"ATEN_CPU_CAPABILITY": aten, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
        for aten, cpu in able
    ]


def test_no_pixel_depends_on_the_cpus_instructions(tmp_path):
    code = DIGEST.format(root=str(ROOT), tests=str(ROOT / "tests"))
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)} | environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for environment in [{}, *capabilities()]
    }
    assert len(found) == 1 and len(capabilities()) >= 1
    # The same on every machine, too. Pillow's own bytes:
    digest = hashlib.sha256()
    boxes, flips = drawn(pieces(), 3, 1)
    for interpolation in ("bilinear", "bicubic"):
        for size in (96, 224):
            for view in range(3):
                for i, image in enumerate(pieces()):
                    pixels = by_pillow(image, boxes[view, i], flips[view, i], size, interpolation)
                    digest.update(pixels.numpy().tobytes())
    assert found == {digest.hexdigest() + "\n"}


def test_where_no_folder_can_keep_compiled_functions_pixels_are_made_all_the_same(tmp_path):
    """As in a container whose files can't be written."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from numba.core import caching
from unittest import mock
with mock.patch.object(caching.CacheImpl, "_locator_classes", []):
    from pipeline.render import resample
assert type(resample.resize_all._cache).__name__ == "NullCache"
""" + DIGEST.format(root=str(ROOT), tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout) == 65


def test_a_reader_without_this_project_sees_the_teachers_pixels(store_path, photos):
    """What ``how_to_read`` says, with zarr, numpy and Pillow alone."""
    group = zarr.open_group(store_path, mode="r")
    about, told = group.attrs["provenance"], group.attrs["how_to_read"]
    assert "resize((size, height), filter).resize((size, size), filter)" in told
    paths = group["images/path"][:]
    kind = about["crops"]["interpolation"]
    store = LabelStore.open(store_path)
    for view, rows in ((0, np.arange(0, 90, 11)), (1, np.arange(5, 90, 13))):
        blobs = [(photos / "train" / str(paths[row])).read_bytes() for row in rows]
        for teacher in about["teachers"]:
            size = teacher["image_size"]
            boxes, flips = store.crops(view, rows)
            ours = crop_renderer([size], 1, 32, interpolation=kind)(
                blobs, boxes[None], flips[None]
            )[0][size]
            for i, row in enumerate(rows):
                image = Image.open(io.BytesIO(blobs[i])).convert("RGB")
                box, flip = group["boxes"][view, row], group["flips"][view, row]
                assert torch.equal(ours[i], by_pillow(image, box, flip, size, kind))
