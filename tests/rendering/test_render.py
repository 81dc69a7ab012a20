"""The renderer: the student's pixels are the teachers', a crop shows the content of its
box, and evaluation's view is torchvision's."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn, types
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from support.small import CLASSES, edit_store
from support.stages import centre_renderer, class_folders, crop_renderer, make_replay, stored_labels
from torchvision.transforms import CenterCrop, Compose, Resize

from cache import LabelStore, StoreError
from pipeline.config import CropPolicy, Render
from pipeline.images import reader
from pipeline.images.patience import DataError
from pipeline.provenance.refusals import require_same_pixels
from pipeline.render import dali, hardware_jpeg
from pipeline.render.dali import WholeDecode
from pipeline.render.dali_resize import THIN, DaliCentre
from pipeline.render.errors import RenderError
from pipeline.render.renderer import BLANK, CentreRenderer, CropRenderer
from pipeline.render.settings import RenderSettings
from pipeline.runtime.profiling import Clock
from pipeline.sampling import philox, random_crop

Rendered = list[dict[int, torch.Tensor]]


def encoded(photo: Image.Image, kind: str, **how: object) -> bytes:
    out = io.BytesIO()
    photo.save(out, kind, **how)
    return out.getvalue()


def cut(height: int, width: int, photo: int = 0, top: int = 100, left: int = 60) -> Image.Image:
    """Cut a piece out of one of scikit-learn's two photographs."""
    return Image.fromarray(
        load_sample_images().images[photo][top : top + height, left : left + width]
    )


def odd_files() -> dict[str, bytes]:
    photo, turned = cut(151, 203), Image.Exif()
    turned[0x0112] = 6
    return {
        "colour": encoded(photo, "JPEG"),
        "finest": encoded(photo, "JPEG", quality=95, subsampling=0),
        "grey": encoded(photo.convert("L"), "JPEG"),
        "cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "progressive": encoded(photo, "JPEG", progressive=True),
        "alpha": encoded(photo.convert("RGBA"), "PNG"),
        "palette": encoded(photo.quantize(64), "PNG"),
        "turned": encoded(photo, "JPEG", exif=turned),
        "pixel": encoded(photo.crop((0, 0, 1, 1)), "JPEG"),
        "line": encoded(photo.crop((0, 0, 203, 1)), "JPEG"),
        "webp": encoded(photo, "WEBP"),
        "bmp": encoded(photo, "BMP"),
    }


def as_teachers(
    blobs: list[bytes],
    boxes: np.ndarray,
    flips: np.ndarray,
    sizes: list[int],
    batch_size: int,
    threads: int,
    **how: str,
) -> Rendered:
    """Render as stage one does: every view and size from one whole decode."""
    how = {"interpolation": "bilinear", "exif": "ignore"} | how
    renderer = crop_renderer(sizes, len(boxes), batch_size, threads=threads, **how)
    starts = range(0, len(blobs), batch_size)
    parts = [
        renderer(
            blobs[s : s + batch_size], boxes[:, s : s + batch_size], flips[:, s : s + batch_size]
        )
        for s in starts
    ]
    return [
        {size: torch.cat([part[view][size] for part in parts]) for size in sizes}
        for view in range(len(boxes))
    ]


def as_students(
    blobs: list[bytes],
    boxes: np.ndarray,
    flips: np.ndarray,
    size: int,
    batch_size: int,
    threads: int,
    **how: str,
) -> torch.Tensor:
    """Render as stage two does: one view (boxes [n, 4], flips [n]), one size, only the
    crop's region decoded."""
    return as_teachers(blobs, boxes[None], flips[None], [size], batch_size, threads, **how)[0][size]


@pytest.fixture(scope="module")
def store(store_path: Path) -> LabelStore:
    return LabelStore.open(store_path)


@pytest.fixture(scope="module")
def teachers_pixels(store: LabelStore, photos: Path) -> Rendered:
    """Both views of every image of the store, in row order, at the teachers' sizes and
    another size."""
    blobs = [(photos / "train" / path).read_bytes() for path in store.images.path]
    boxes, flips = (
        np.stack(column)
        for column in zip(*(store.crops(view, slice(None)) for view in (0, 1)), strict=True)
    )
    return as_teachers(blobs, boxes, flips, [48, 64, 33], 16, 2)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_student_sees_the_teachers_pixels(store, photos, teachers_pixels, batch_size, threads):
    """Whole epochs are compared bit for bit."""
    for epoch, size in ((0, 64), (1, 64), (2, 48), (3, 33)):
        replay = make_replay(
            stored_labels(store, 2),
            photos / "train",
            sizes=[size],
            batch_size=batch_size,
            seed=0,
            rendering=Render(threads=threads),
        )
        seen = 0
        with replay.epoch(epoch) as batches:
            for batch in batches:
                assert torch.equal(
                    batch.pixels[size],
                    teachers_pixels[epoch % 2][size][torch.from_numpy(batch.rows)],
                )
                seen += len(batch.rows)
        assert seen == 90
    # Other crops would be noticed, since the two views differ.
    assert (teachers_pixels[0][64] != teachers_pixels[1][64]).any(dim=(1, 2, 3)).all()


def test_pixels_depend_on_no_batch_or_thread(store, photos, teachers_pixels):
    rows = np.arange(90)[::-1]
    blobs = [(photos / "train" / store.images.path[row]).read_bytes() for row in rows]
    boxes, flips = store.crops(1, rows)
    for batch_size, threads in ((1, 1), (1, 4), (7, 2), (64, 1), (90, 4)):
        assert torch.equal(
            as_students(blobs, boxes, flips, 48, batch_size, threads),
            teachers_pixels[1][48].flip(0),
        )
        (whole,) = as_teachers(blobs, boxes[None], flips[None], [48, 64], batch_size, threads)
        assert torch.equal(whole[64], teachers_pixels[1][64].flip(0))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_every_kind_of_image_gives_the_student_the_teachers_pixels(exif, interpolation):
    files, views, how = odd_files(), 6, {"exif": exif, "interpolation": interpolation}
    deep = np.linspace(0, 65535, 151 * 203).reshape(151, 203).astype(np.uint16)
    files["16 bits"] = encoded(Image.fromarray(deep), "PNG")
    whole = WholeDecode(RenderSettings(exif=exif))
    height, width = np.array([whole(blob) for blob in files.values()]).T
    identity = philox.identities(np.array([*files], object))
    drawn = [random_crop.draw(CropPolicy(), identity, height, width, view) for view in range(views)]
    boxes, flips = (np.stack(column) for column in zip(*drawn, strict=True))
    blobs = [*files.values()]
    teachers = as_teachers(blobs, boxes, flips, [32, 57], len(blobs), 2, **how)
    for view in range(views):
        for size in (32, 57):
            for batch_size in (1, 5):
                student = as_students(blobs, boxes[view], flips[view], size, batch_size, 2, **how)
                for i, name in enumerate(files):
                    assert torch.equal(student[i], teachers[view][size][i]), (name, view, size)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
@pytest.mark.parametrize(
    "name", ["colour", "finest", "grey", "progressive", "alpha", "palette", "turned", "bmp"]
)
def test_a_crop_of_the_output_size_is_that_part_of_pillows_image(name, exif):
    blob = odd_files()[name]
    image = Image.open(io.BytesIO(blob))
    if exif == "apply":
        image = ImageOps.exif_transpose(image)
    decoded = torch.from_numpy(np.array(image.convert("RGB")))
    boxes = np.array(
        [
            [0, 0, 40, 40],
            [3, 5, 40, 40],
            [decoded.shape[0] - 40, decoded.shape[1] - 40, 40, 40],
            [3, 5, 40, 40],
        ]
    )
    flips = np.array([False, False, True, True])
    wanted = [decoded[t : t + h, left : left + w] for t, left, h, w in boxes]
    wanted = torch.stack(
        [part.flip(1) if flip else part for part, flip in zip(wanted, flips, strict=True)]
    )
    assert torch.equal(as_students([blob] * 4, boxes, flips, 40, 4, 1, exif=exif), wanted)
    views = as_teachers([blob], boxes[:, None], flips[:, None], [40], 1, 1, exif=exif)
    assert torch.equal(torch.cat([view[40] for view in views]), wanted)


@pytest.mark.parametrize("size", [48, 64, 160, 224])
@pytest.mark.parametrize("shape", [(300, 300), (300, 420), (420, 301), (151, 600), (427, 90)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_sees_torchvisions_centre_crop(size, shape, interpolation):
    photo = cut(*shape, top=0, left=0)
    mode = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[
        interpolation
    ]
    resize = Resize(size * 256 // 224, interpolation=mode)
    theirs = np.array(Compose([resize, CenterCrop(size)])(photo)).astype(float)
    centre = centre_renderer([(size, interpolation)], 1, exif="ignore", threads=1)
    (ours,) = (
        centre([encoded(photo, "PNG")], np.array(shape[:1]), np.array(shape[1:]))[
            size, interpolation
        ]
        .numpy()
        .astype(float)
    )
    assert ours.shape == (size, size, 3)
    difference = np.abs(ours - theirs).mean()
    assert difference < 1  # level of 255
    for axis in (0, 1):
        for step in (-1, 1):  # a shift by one pixel is much further away
            assert np.abs(ours - np.roll(theirs, step, axis)).mean() > 3 * difference


def test_evaluation_takes_images_of_any_shape_and_several_sizes_at_once():
    files = odd_files()
    height, width = np.array([WholeDecode(RenderSettings())(blob) for blob in files.values()]).T
    looks = [(64, "bilinear"), (32, "bicubic"), (32, "bilinear"), (64, "bilinear")]
    together = centre_renderer(looks, len(files), exif="ignore", threads=2)(
        [*files.values()], height, width
    )
    assert set(together) == set(looks)
    for size, interpolation in set(looks):
        alone = centre_renderer([(size, interpolation)], 1, exif="ignore", threads=1)
        for i, blob in enumerate(files.values()):
            (pixels,) = alone([blob], height[i : i + 1], width[i : i + 1])[size, interpolation]
            assert torch.equal(pixels, together[size, interpolation][i])


class Whole(DaliCentre):
    """Evaluation's view as it was up to version 0.8: every image resized whole."""

    def define(self, encoded: object, decode: Callable) -> list:
        image, outputs = decode(encoded), []
        for i, (size, interpolation) in enumerate(self.looks):
            whole = fn.external_source(name=f"whole{i}", dtype=types.FLOAT, ndim=1)
            start = fn.external_source(name=f"start{i}", dtype=types.INT32, ndim=1)
            kind = types.INTERP_CUBIC if interpolation == "bicubic" else types.INTERP_LINEAR
            resized = fn.resize(image, size=whole, interp_type=kind, antialias=True)
            outputs.append(fn.slice(resized, start=start, shape=[size, size], axes=[0, 1]))
        return outputs

    def render(self, made: dict, blobs: list[bytes], height: np.ndarray, width: np.ndarray) -> None:
        given = {}
        for i, (size, _) in enumerate(self.looks):
            short, shorter = size * 256 // 224, np.minimum(height, width)
            whole = np.stack([short * height // shorter, short * width // shorter], axis=1)
            given[f"whole{i}"] = whole.astype(np.float32)
            given[f"start{i}"] = np.rint((whole - size) / 2).astype(np.int32)
        self.fill(list(made.values()), blobs, **given)


def test_dalis_evaluation_shows_the_pixels_of_the_image_resized_whole():
    """Bit for bit for ordinary images. Of thin ones only the central square is resized,
    to the same pixels but for rounding. Both are in one batch."""
    dice = np.random.default_rng(0)
    long = dice.integers(8, 700, 96)
    short = np.maximum(1, long // dice.choice([1, 1.3, 1.5, 2, 4, 7, 8, 9, 30], 96)).astype(int)
    shapes = np.stack([long, short], axis=1)
    shapes[::2] = shapes[::2, ::-1]
    shapes = np.concatenate([shapes, [(1, 8), (8, 1), (1, 9), (9, 1), (1, 500), (500, 1), (1, 1)]])
    blobs = [
        encoded(Image.fromarray(dice.integers(0, 256, (*shape, 3), dtype=np.uint8)), "PNG")
        for shape in shapes
    ]
    looks = [(size, kind) for size in (32, 96, 224) for kind in ("bilinear", "bicubic")]
    settings = RenderSettings(threads=2, resize="dali")
    centre = CentreRenderer(looks, len(blobs), settings)
    ours = centre(blobs, *shapes.T)
    centre.engine = Whole(centre.looks, len(blobs), settings, Clock())
    before = centre(blobs, *shapes.T)
    thin = torch.from_numpy(shapes.max(axis=1) > THIN * shapes.min(axis=1))
    assert 20 < thin.sum() < 60
    for look in looks:
        assert torch.equal(ours[look][~thin], before[look][~thin])
        assert (ours[look][thin].int() - before[look][thin].int()).abs().max() <= 1


def test_the_longest_lines_of_pixels_show_their_middle():
    """A part of a pixel beyond float32's fractions is still a part of the image."""
    made = {}
    for length in (60_000, 1_000_000, 40_000_000):
        line = np.zeros((1, length, 3), np.uint8)
        line[:, length // 2 - 8 : length // 2 + 8] = 200
        for blob, shape in (
            (encoded(Image.fromarray(line), "TIFF"), (1, length)),
            (encoded(Image.fromarray(line.swapaxes(0, 1)), "TIFF"), (length, 1)),
        ):
            centre = centre_renderer([(64, "bilinear")], 1, exif="ignore", threads=1)
            made[shape] = centre([blob], *np.array(shape)[:, None])[64, "bilinear"]
    assert all(pixels.min() == pixels.max() == 200 for pixels in made.values())


def test_a_batch_that_no_memory_holds_names_its_largest_image(store, monkeypatch):
    blobs = [encoded(cut(40, 50), "JPEG", quality=80 + i) for i in range(3)]
    rows = np.array([4, 7, 2])
    largest = rows[(store.images.height[rows] * store.images.width[rows]).argmax()]
    line = (
        rf"^DALI could not render it .*; a batch of 3 images needs .* the largest is "
        rf"{store.images.path[largest]} \(\d+ × \d+ pixels\); free memory, lower --batch-size, "
        rf"or leave large images out \(render.max_megapixels\)$"
    )
    for error in (RuntimeError("std::bad_alloc"), MemoryError()):
        renderer = crop_renderer([32], 1, 8, interpolation="bilinear", exif="ignore", threads=1)
        renderer(blobs, *crops_of(blobs, 1))

        def run(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(renderer.engine.decode.pipes[False], "run", run)
        with pytest.raises(DataError, match=line), reader.naming(store.images, rows):
            renderer(blobs, *crops_of(blobs, 1))
        renderer(blobs, *crops_of(blobs, 1))  # the renderer lives on
    with pytest.raises(DataError, match="the largest is"), reader.naming(store.images, rows):
        raise torch.OutOfMemoryError("DALI is out of memory on the GPU (…)")
    # Without memory a decoder may call a good file broken.
    broken = pytest.raises(DataError, match="the manifest's pass could decode it")
    with broken, reader.naming(store.images, rows):
        raise RenderError("Failed to decode sample", 1)
    monkeypatch.setattr(reader, "lacks_memory", lambda height, width: True)
    with pytest.raises(DataError, match="the largest is"), reader.naming(store.images, rows):
        raise RenderError("Failed to decode sample", 1)


def test_a_store_knows_whether_its_pixels_are_rendered_again(store, store_path, photos, tmp_path):
    assert set(store.attributes["fingerprint"]["digests"]) == {"48", "64"}
    for threads in (1, 3):
        require_same_pixels(store, class_folders(photos / "train", CLASSES), threads)
    changed = tmp_path / "changed.zarr"
    shutil.copytree(store_path, changed)

    def edit(attributes: dict) -> None:
        digests = attributes["fingerprint"]["digests"]
        digests["48"] = digests["48"][::-1]
        attributes["made_with"]["numpy"] = "1.0"

    edit_store(changed, edit)
    with pytest.raises(
        StoreError,
        match=r"at 48 px; numpy 1.0 then, .* now.*; install .*--allow-renderer-difference",
    ) as refused:
        require_same_pixels(LabelStore.open(changed), class_folders(photos / "train", CLASSES), 2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", ["boxes", "flips"])
def test_a_fingerprint_notices_one_pixel_of_one_crop(store, store_path, photos, tmp_path, what):
    changed = tmp_path / "changed.zarr"
    shutil.copytree(store_path, changed)

    def edit(attributes: dict) -> None:
        kept = attributes["fingerprint"]
        assert len(kept["rows"]) == 64
        if what == "boxes":
            kept["boxes"][63][2] -= 1
        else:
            kept["flips"][63] = not kept["flips"][63]

    edit_store(changed, edit)
    with pytest.raises(StoreError, match="at 48, 64 px; same versions"):
        require_same_pixels(LabelStore.open(changed), class_folders(photos / "train", CLASSES), 2)


def test_a_blank_is_black_and_changes_no_neighbour(store, photos):
    rows = np.arange(9)
    blobs = [(photos / "train" / store.images.path[row]).read_bytes() for row in rows]
    boxes, flips = store.crops(0, rows)
    blank = np.isin(rows, [0, 4, 8])
    filled = [BLANK if empty else blob for blob, empty in zip(blobs, blank, strict=True)]
    shown = np.where(blank[:, None], [0, 0, 1, 1], boxes)
    without = as_students(blobs, boxes, flips, 48, 9, 2)
    for pixels in (
        as_students(filled, shown, flips, 48, 9, 2),
        as_teachers(filled, np.stack([shown, shown]), np.stack([flips, ~flips]), [48, 64], 9, 2)[0][
            48
        ],
    ):
        assert not pixels[torch.from_numpy(blank)].any()
        assert torch.equal(pixels[torch.from_numpy(~blank)], without[torch.from_numpy(~blank)])


def test_an_image_that_fails_later_is_an_error_of_one_line_and_the_renderer_lives_on(photos):
    blob = (photos / "train" / "ant" / "000.jpg").read_bytes()
    renderer = crop_renderer([32], 1, 2, interpolation="bilinear", exif="ignore", threads=1)
    box, flips = np.array([[[0, 0, 40, 40]]]), np.array([[False]])
    before = renderer([blob], box, flips)[0][32]
    with pytest.raises(RenderError, match="DALI could not render") as refused:
        renderer([b"no image"], box, flips)
    assert "\n" not in str(refused.value)
    assert torch.equal(renderer([blob], box, flips)[0][32], before)
    first = before.clone()
    renderer([blob], np.array([[[3, 3, 37, 37]]]), flips)
    assert torch.equal(before, first)  # the pixels handed out are a copy


# ---- rules that decide pixels on a GPU, tried without one


def test_baseline_jpegs_are_known_by_their_header():
    """A GPU's hardware decoder gets the sequential JPEGs of one or three components,
    and no other of these files."""
    files = odd_files()
    photo = cut(151, 203)
    files |= {
        # a comment that looks like a progressive frame
        "long comment": encoded(photo, "JPEG", comment=b"\xff\xc2" * 30_000),
        "filled": b"\xff\xd8"
        + b"\xff" * 7
        + encoded(photo, "JPEG")[3:],  # fill bytes before the first marker
        "twelve bits": (jpeg := encoded(photo, "JPEG")).replace(
            b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"
        ),
        "cut short": jpeg[:100],
        "empty": b"",
        "no image": b"\xff\xd8\xff\xc0",
        "blank": BLANK,
    }
    baseline = {name for name, blob in files.items() if hardware_jpeg.is_baseline_jpeg(blob)}
    assert baseline == {
        "colour",
        "finest",
        "grey",
        "turned",
        "pixel",
        "line",
        "long comment",
        "filled",
    }


def test_which_decoder_a_gpu_uses_is_said_and_never_left_to_the_batch(monkeypatch):
    renderer = crop_renderer([32], 1, 4, threads=1, resize="dali").engine
    monkeypatch.setattr(
        dali.fn.decoders,
        "image",
        lambda encoded, **how: (how["device"], how.get("hw_decoder_load")),
    )
    assert renderer._decoded(None, False) == ("cpu", None)
    renderer.gpu = True
    assert [renderer._decoded(None, hardware) for hardware in (False, True)] == [
        ("mixed", 0.0),
        ("mixed", 1.0),
    ]


@pytest.mark.parametrize(("engines", "refused"), [(0, True), (7, False), (None, False)])
def test_a_gpu_without_a_hardware_decoder_is_refused_by_name(monkeypatch, engines, refused):
    assert hardware_jpeg.hardware_engines() in (0, None) or torch.cuda.is_available()
    monkeypatch.setattr(dali, "hardware_engines", lambda: engines)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    how = {"interpolation": "bilinear", "exif": "ignore", "backend": "gpu-hardware"}
    if refused:
        with pytest.raises(RenderError, match="Tesla V100 has none; use render.backend: gpu$"):
            crop_renderer([32], 1, 4, **how)
    else:
        assert crop_renderer([32], 1, 4, **how).engine.divides


@pytest.mark.parametrize(
    "said",
    [
        "CUDA driver API error cudaErrorMemoryAllocation",
        "Can't allocate 8589934592 on device 0.",
        "std::bad_alloc",
    ],
)
def test_a_gpu_that_is_full_is_no_images_fault(said, monkeypatch):
    """The error is torch's for want of memory, to which the command line adds its
    advice."""
    renderer = crop_renderer([32], 1, 8, threads=1, resize="dali")
    blobs = [encoded(cut(40, 50), "JPEG")] * 2
    renderer(blobs, *crops_of(blobs, 1))
    renderer.engine.gpu = True
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(
        renderer.engine.pipes[False],
        "run",
        lambda stream: (_ for _ in ()).throw(RuntimeError(said)),
    )
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        renderer(blobs, *crops_of(blobs, 1))


def crops_of(blobs: list[bytes], views: int) -> tuple[np.ndarray, np.ndarray]:
    whole = WholeDecode(RenderSettings())
    height, width = np.array([whole(blob) for blob in blobs]).T
    identity = philox.identities(np.array([str(i) for i in range(len(blobs))], object))
    boxes, flips = zip(
        *(random_crop.draw(CropPolicy(), identity, height, width, view) for view in range(views)),
        strict=True,
    )
    return np.stack(boxes), np.stack(flips)


@pytest.mark.parametrize("views", [1, 3])
def test_images_that_go_through_two_pipelines_come_back_in_their_places(views):
    """With render.backend gpu-hardware, batches of baseline JPEGs are filled up, and
    other images are rendered apart."""
    kinds = list(odd_files().values())
    boxes, flips = crops_of(kinds, views)
    plain = crop_renderer([32, 48], views, 16, threads=2, resize="dali")(kinds, boxes, flips)
    renderer = crop_renderer([32, 48], views, 16, threads=2, resize="dali")
    renderer.engine.divides = True
    fed: list[tuple[bool, int]] = []
    run = renderer.engine.run

    def spy(blobs: list[bytes], *, hardware: bool = False, **arguments: np.ndarray) -> object:
        assert all(hardware_jpeg.is_baseline_jpeg(blob) == hardware for blob in blobs)
        fed.append((hardware, len(blobs)))
        return run(blobs, hardware=hardware, **arguments)

    renderer.engine.run = spy
    for chosen in (np.arange(12), np.array([4, 0, 6, 2]), np.array([0, 1]), np.array([5, 3])):
        made = renderer([kinds[i] for i in chosen], boxes[:, chosen], flips[:, chosen])
        for view in range(views):
            for size in (32, 48):
                assert torch.equal(made[view][size], plain[view][size][torch.from_numpy(chosen)])
    assert fed == [(True, 16), (False, 6), (True, 16), (False, 2), (True, 16), (False, 2)]


def test_the_hardware_decoder_is_told_only_when_the_batch_before_has_been_copied():
    """The hardware decoder writes without waiting for the GPU's earlier work."""
    blobs = [encoded(cut(40, 50), "JPEG"), encoded(cut(40, 50), "PNG")]
    renderer = crop_renderer([32], 1, 4, threads=1, resize="dali")
    renderer.engine.divides = True
    happened: list[str] = []

    class Copied:
        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            happened.append(self.name)

    run = renderer.engine.run
    renderer.engine.run = lambda blobs, **how: (
        happened.append("hardware" if how["hardware"] else "CUDA"),
        run(blobs, **how),
    )[1]
    renderer.engine.lent = {
        True: (None, Copied("waits for the hardware's")),
        False: (None, Copied("waits for CUDA's")),
    }
    renderer(blobs, *crops_of(blobs, 1))
    assert happened == ["waits for the hardware's", "waits for CUDA's", "hardware", "CUDA"]


def test_an_image_of_the_second_pipeline_that_fails_is_named_by_its_place():
    kinds = [*odd_files().values()]
    boxes, flips = crops_of(kinds, 1)
    renderer = crop_renderer([32], 1, 16, threads=1, resize="dali")
    renderer.engine.divides = True
    kinds[6] = kinds[6][:200]
    with pytest.raises(RenderError) as failed:
        renderer(kinds, boxes, flips)
    assert failed.value.place == 6


def test_an_image_that_only_the_renderers_own_decoder_refuses_is_named(store, monkeypatch):
    """A GPU's decoder may refuse an image that the CPU's decodes. All images are then
    decoded on the CPU, and after that by the renderer's own decoder."""
    blobs = [encoded(cut(40, 50), "JPEG", quality=80 + i) for i in range(5)]
    boxes, flips = crops_of(blobs, 1)
    looked: list[str] = []

    class Look:
        def __init__(self, settings: RenderSettings) -> None:
            self.backend = settings.backend

        def __call__(self, blob: bytes) -> tuple[int, int] | None:
            looked.append(self.backend)
            return None if self.backend == "gpu" and blob == blobs[3] else (40, 50)

    renderer = crop_renderer([32], 1, 8, threads=1, resize="dali")
    renderer(blobs, boxes, flips)
    monkeypatch.setattr(dali, "WholeDecode", Look)
    monkeypatch.setattr(
        renderer.engine.pipes[False],
        "run",
        lambda: (_ for _ in ()).throw(RuntimeError("the GPU's decoder can't")),
    )
    renderer.engine.backend = "gpu"
    with pytest.raises(RenderError, match="the GPU's decoder can't") as failed:
        renderer(blobs, boxes, flips)
    assert failed.value.place == 3 and looked == ["cpu"] * 5 + ["gpu"] * 4
    line = (
        r"bee/001\.jpg: DALI could not render it .*; the CPU decodes it, so convert it .* "
        r"\(render.backend: cpu\)"
    )
    rows = np.flatnonzero(store.images.path == "bee/001.jpg").repeat(5)
    with pytest.raises(DataError, match=line), reader.naming(store.images, rows):
        raise failed.value


def test_dalis_default_executor_which_a_gpu_has_makes_the_same_pixels_that_stay(
    store, photos, monkeypatch
):
    class Default(dali.dali.Pipeline):
        def __init__(self, **how: object) -> None:
            super().__init__(
                **{
                    name: value
                    for name, value in how.items()
                    if name not in ("exec_async", "exec_pipelined")
                }
            )

    blobs = [(photos / "train" / path).read_bytes() for path in store.images.path]
    boxes, flips = store.crops(0, slice(None))
    how = {"threads": 2, "resize": "dali"}
    wanted = crop_renderer([48], 1, 90, **how)(blobs, boxes[None], flips[None])[0][48]
    monkeypatch.setattr(dali.dali, "Pipeline", Default)
    renderer = crop_renderer([48], 1, 16, **how).engine
    made = []
    for start in range(0, 90, 16):
        here = slice(start, start + 16)
        given = {
            "start0": boxes[here, :2].astype(np.int32),
            "shape0": boxes[here, 2:].astype(np.int32),
            "flip0": flips[here].astype(np.int32),
        }
        (output,) = renderer.run(blobs[here], **given)
        assert renderer.pipes[False].exec_dynamic
        made.append(torch.from_dlpack(output.as_tensor()))  # without a copy
    assert torch.equal(torch.cat(made), wanted)


@pytest.mark.parametrize("depends_on", ["the number in a batch", "the place in a batch", "nothing"])
def test_pixels_that_depend_on_other_images_make_no_fingerprint(
    store, photos, monkeypatch, depends_on
):
    """One pixel of one crop changes, as with DALI's default share of the hardware
    decoder on a GPU."""
    real = CropRenderer.__call__

    def shifty(
        self: CropRenderer, blobs: list[bytes], boxes: np.ndarray, flips: np.ndarray
    ) -> Rendered:
        made = real(self, blobs, boxes, flips)
        if depends_on == "the number in a batch" and len(blobs) > 30:
            made[0][48][9, 5, 5, 0] ^= 1
        if depends_on == "the place in a batch":
            made[0][48][0, 5, 5, 0] ^= 1
        return made

    monkeypatch.setattr(CropRenderer, "__call__", shifty)
    if depends_on == "nothing":
        return require_same_pixels(store, class_folders(photos / "train", CLASSES), 2)
    with pytest.raises(
        RenderError,
        match=r"other pixels of an image when others are rendered with it "
        r"\([12] of \d+ crops differ at 48 px\)",
    ):
        require_same_pixels(store, class_folders(photos / "train", CLASSES), 2)
    return None


def test_views_of_one_rendering_lie_behind_each_other():
    blobs = [encoded(cut(60, 80), "JPEG", quality=80 + i) for i in range(3)]
    boxes, flips = crops_of(blobs, 2)
    made = crop_renderer([32], 2, 4, interpolation="bilinear", exif="ignore", threads=1)(
        blobs, boxes, flips
    )
    whole = made.all_views[32]
    assert whole.shape == (2, 3, 32, 32, 3) and torch.equal(whole[1], made[1][32])
    assert whole.flatten(0, 1).data_ptr() == made[0][32].data_ptr()


def test_a_crop_is_resized_with_antialiasing():
    """Noise becomes nearly grey, since every pixel counts: 64 of them make one."""
    noise = np.random.default_rng(0).integers(0, 2, (256, 256)).astype(np.uint8) * 255
    blob = encoded(Image.fromarray(noise).convert("RGB"), "PNG")
    renderer = crop_renderer([32], 1, 1, interpolation="bilinear", exif="ignore", threads=1)
    (pixels,) = renderer([blob], np.array([[[0, 0, 256, 256]]]), np.zeros((1, 1), bool))
    assert pixels[32].float().std() < 20  # 64 where four pixels make one
