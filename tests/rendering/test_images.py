"""The manifest: every file of the class folders is seen, bad files are named with a
reason, and later changes are noticed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from support.paths import ROOT
from support.small import CLASSES
from support.stages import centre_renderer, class_folders, scan

from cache.format.manifest import UNUSABLE, USABLE, Images
from pipeline.images import matching
from pipeline.images.class_names import read_class_map
from pipeline.images.patience import DataError
from pipeline.images.reader import Reader
from pipeline.images.reasons import shown
from pipeline.images.scan import unusable_summary
from pipeline.images.sources.folder_names import class_folders as class_folder_names
from pipeline.images.sources.opening import open_source
from pipeline.sampling import epoch_order


def encoded(photo: Image.Image, kind: str, **how: object) -> bytes:
    out = io.BytesIO()
    photo.save(out, kind, **how)
    return out.getvalue()


def good_files() -> dict[str, bytes]:
    """Make one file of each kind that the renderer must read."""
    photo = Image.fromarray(load_sample_images().images[0][200:290, 200:331])  # 90 × 131
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "colour.jpg": encoded(photo, "JPEG"),
        "grey.jpg": encoded(photo.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(photo, "JPEG", progressive=True),
        "pixel.jpg": encoded(photo.crop((0, 0, 1, 1)), "JPEG"),
        "turned.jpg": encoded(photo, "JPEG", exif=turned),
        "alpha.png": encoded(photo.convert("RGBA"), "PNG"),
        "palette.png": encoded(photo.quantize(16), "PNG"),
        "name with spaces, é and 中.jpg": encoded(photo, "JPEG"),
        "NO EXTENSION": encoded(photo, "JPEG"),
        "photo.webp": encoded(photo, "WEBP"),
        "photo.bmp": encoded(photo, "BMP"),
    }


def bad_files() -> dict[str, bytes]:
    photo = Image.fromarray(load_sample_images().images[1][200:290, 200:331])
    jpeg = encoded(photo, "JPEG")
    return {
        "empty.jpg": b"",
        "notes.txt": b"no image at all\n",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "nine tenths.jpg": jpeg[: len(jpeg) * 9 // 10],
        "without its end.jpg": jpeg[:-2],
        "header.jpg": jpeg[: jpeg.index(b"\xff\xda") + 14],
        "animation.gif": encoded(photo, "GIF"),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One class folder of good files and one of bad files."""
    data = tmp_path_factory.mktemp("zoo")
    write(data / "good", good_files() | {".hidden.jpg": b"never looked at"})
    write(data / "bad", bad_files())
    (data / "bad" / "dangling.jpg").symlink_to("nowhere")
    Path(os.fsdecode(os.fsencode(data / "bad") + b"/latin-\xe9.jpg")).write_bytes(
        good_files()["colour.jpg"]
    )
    return data


@pytest.fixture
def data(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photographs that a test may change."""
    return Path(shutil.copytree(photos / "train", tmp_path / "data"))


@pytest.fixture(scope="module")
def manifest(photos: Path) -> Images:
    return scan(photos / "train", CLASSES, exif="ignore", threads=2, order_seed=0)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_good_files_are_usable_with_the_dimensions_that_pillow_sees(zoo, exif):
    found = scan(zoo, ["bad", "good"], exif=exif, threads=2)
    good = found.take(np.flatnonzero(found.class_index == 1))
    assert set(good.path) == {f"good/{name}" for name in good_files()}  # hidden files are left out
    for path, height, width, status, reason in zip(
        good.path, good.height, good.width, good.status, good.reason, strict=True
    ):
        seen = Image.open(zoo / path).size
        wanted = seen if path == "good/turned.jpg" and exif == "apply" else seen[::-1]
        assert (height, width) == wanted and status == USABLE and reason == "", path


def test_bad_files_are_recorded_with_a_reason(zoo):
    found = scan(zoo, ["bad", "good"], exif="ignore", threads=2)
    bad = found.take(np.flatnonzero(found.class_index == 0))
    reasons = {
        path.removeprefix("bad/"): reason for path, reason in zip(bad.path, bad.reason, strict=True)
    }
    assert set(reasons) == {*bad_files(), "dangling.jpg", "latin-\\xe9.jpg"}
    assert (
        all(reasons.values())
        and (bad.status == UNUSABLE).all()
        and not bad.height.any()
        and not bad.width.any()
    )
    assert reasons["empty.jpg"] == "empty file"
    assert reasons["notes.txt"] == "not an image"
    assert "No such file" in reasons["dangling.jpg"]
    assert "not UTF-8" in reasons["latin-\\xe9.jpg"]
    assert "GIF" in reasons["animation.gif"]
    assert all(
        reasons[name].startswith("damaged")
        for name in ("half.jpg", "nine tenths.jpg", "without its end.jpg", "header.jpg")
    )
    summary = unusable_summary(found)
    assert sum(int(line.split()[0]) for line in summary) == len(bad) and not any(
        "\n" in line for line in summary
    )


def boxes(*brands: bytes) -> bytes:
    """Make a file of boxes (ISO/IEC 14496-12) that begins as HEIC and AVIF do."""
    first = b"ftyp" + brands[0] + bytes(4) + b"".join(brands)
    return (len(first) + 4).to_bytes(4, "big") + first + b"\0\0\0\x0cmeta" + bytes(400)


FOREIGN = {
    "HEIC": boxes(b"heic", b"mif1", b"heic"),
    "HEIF": boxes(b"mif1", b"heix"),
    "AVIF": boxes(b"avis", b"avif"),
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(300),
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "GIF": encoded(Image.new("RGB", (9, 9)), "GIF"),
    "ICO": encoded(Image.new("RGB", (16, 16)), "ICO"),
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\2\0\0\0\2\0\x08\0\3" + bytes(30),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_format_that_cannot_be_decoded_is_named_with_what_to_do(tmp_path, kind):
    """Pillow doesn't know the first ones. They are known by their first bytes."""
    write(tmp_path / "a", {"x": FOREIGN[kind]})
    found = scan(tmp_path, ["a"], threads=1)
    (reason,) = found.reason
    if kind in ("GIF", "ICO", "PSD"):
        assert reason == f"DALI can't decode this {kind} file"
        assert shown(reason) == f"{reason}: convert it to JPEG or PNG"
    else:
        # The words of earlier versions, by which a run of theirs goes on.
        assert reason == "not an image"
        assert shown(reason) == f"{reason}: this {kind} file must be converted to JPEG or PNG"
    assert shown(reason) in unusable_summary(found)[0]


def spliced(before: int, extra: bytes) -> tuple[bytes, int]:
    """Put bytes before a marker of a JPEG, and return the JPEG and the marker's new
    place."""
    blob = good_files()["colour.jpg"]
    place = blob.index(bytes([0xFF, before]), 3)
    return blob[:place] + extra + blob[place:], place + len(extra)


@pytest.mark.parametrize("before", [0xDB, 0xC0, 0xC4, 0xDA])  # tables, frame, tables, scan
@pytest.mark.parametrize("extra", [b"\0", b"\n" * 12, b"a\xff\0b" * 300])
def test_bytes_between_the_segments_of_a_jpeg_are_counted(tmp_path, before, extra):
    """Pillow skips them. Without them the file is usable."""
    blob, place = spliced(before, extra)
    shorter = blob[: place - len(extra)] + blob[place:]
    assert Image.open(io.BytesIO(blob)).tobytes() == Image.open(io.BytesIO(shorter)).tobytes()
    write(tmp_path / "a", {"extra": blob, "shorter": shorter})
    first, second = scan(tmp_path, ["a"], threads=1).reason
    assert first == "DALI can't decode this JPEG file"
    assert shown(first) == (
        f"{first}: {len(extra):,} extraneous bytes before the marker at byte {place:,}; save it "
        f"again, or without loss by jpegtran -copy all"
    )
    assert second == ""


def test_other_odd_bytes_in_a_jpeg_do_no_harm(tmp_path):
    """Fill bytes before a marker, bytes after the end, a second image, a missing
    restart marker, CMYK."""
    blob = good_files()["colour.jpg"]
    two = io.BytesIO()
    photo = Image.open(io.BytesIO(blob))
    photo.save(two, "MPO", save_all=True, append_images=[photo.rotate(90)])
    restarts = encoded(photo, "JPEG", restart_marker_rows=1)
    files = {
        "fill": spliced(0xDB, b"\xff" * 9)[0],
        "after": blob + bytes(99),
        "two": two.getvalue(),
        "twice": blob + blob,
        "restart": restarts.replace(b"\xff\xd1", b"", 1),
        "cmyk": good_files()["cmyk.jpg"],
    }
    write(tmp_path / "a", files)
    assert set(scan(tmp_path, ["a"], threads=1).reason) == {""}


def test_a_tiff_that_the_renderer_misreads_is_left_out(tmp_path):
    photo = Image.fromarray(load_sample_images().images[0][200:290, 200:331])
    grey = np.asarray(photo.convert("L"))
    files = {
        "colour": encoded(photo, "TIFF"),
        "big": encoded(photo, "TIFF", big_tiff=True),
        "grey": encoded(photo.convert("L"), "TIFF"),
        "grey 16": encoded(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"),
        "alpha": encoded(photo.convert("RGBA"), "TIFF"),
        "CMYK": encoded(photo.convert("CMYK"), "TIFF"),
        "pages": encoded(photo, "TIFF", save_all=True, append_images=[photo.convert("LA")]),
        "to 1": encoded(Image.fromarray(grey / np.float32(255)), "TIFF"),
    }
    bad = {
        "grey and alpha": encoded(photo.convert("LA"), "TIFF"),
        "big grey and alpha": encoded(photo.convert("LA"), "TIFF", big_tiff=True),
        "to 254": encoded(Image.fromarray(grey.astype(np.float32)), "TIFF"),
        "not a number": encoded(Image.new("F", (9, 9), float("nan")), "TIFF"),
    }
    write(tmp_path / "bad", bad)
    write(tmp_path / "good", files)
    found = scan(tmp_path, ["bad", "good"], threads=1)
    reasons = dict(zip(found.path, found.reason, strict=True))
    assert {name for name, reason in reasons.items() if reason} == {f"bad/{name}" for name in bad}
    assert all(reasons[f"bad/{name}"].startswith("DALI misreads this") for name in bad)
    assert "numbers go from 0 to 254, not from 0 to 1" in reasons["bad/to 254"]
    renderer = centre_renderer([(64, "bilinear")], len(files), exif="ignore", threads=1)
    shape = np.full(len(files), 90), np.full(len(files), 131)
    pixels = renderer([*files.values()], *shape)[64, "bilinear"].numpy().astype(int)
    for i, name in enumerate(files):
        same = pixels[0] if name in ("colour", "big", "alpha", "pages") else pixels[2]
        assert np.abs(pixels[i] - same).max() <= 1 or name == "CMYK", name


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from pipeline.images.data_set import DataSet
from pipeline.images.patience import DataError
from pipeline.images.sources.class_folders import ClassFolders
from pipeline.images.scan import scan
from pipeline.render.settings import RenderSettings
small = DataSet(ClassFolders(Path({data!r})), ["a"], True)
scan(small, RenderSettings(threads=1))  # of small files
for name in ("large.jpg", "large.png", "large.webp"):
    Path({data!r}, "a", name).write_bytes(Path({data!r}, name).read_bytes())
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (150 << 20), resource.RLIM_INFINITY))
for name in ("large.jpg", "large.png", "large.webp"):
    for other in Path({data!r}, "a").glob("large*"):
        other.unlink()
    Path({data!r}, "a", name).write_bytes(Path({data!r}, name).read_bytes())
    try:
        data = DataSet(ClassFolders(Path({data!r})), ["a"], True)
        print(name, *scan(data, RenderSettings(threads=1)).reason)
    except DataError as error:
        print(error)
"""


def test_an_image_that_finds_no_memory_is_not_called_damaged(tmp_path):
    """Its decoder says the same as of a broken file. A file that is truly broken stays
    so."""
    large = Image.fromarray(load_sample_images().images[0]).resize((6000, 6000))
    write(tmp_path / "a", {"small.jpg": good_files()["colour.jpg"], "half.jpg": b"\xff\xd8"})
    for name, kind in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        (tmp_path / f"large.{name}").write_bytes(encoded(large, kind, quality=30))
    program = SHORT_OF_MEMORY.format(root=str(ROOT), data=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout
    for line, name in zip(lines, ("large.jpg", "large.png", "large.webp"), strict=True):
        assert line.startswith(
            f"{tmp_path}/a/{name} can't be decoded for want of memory (6,000 × 6,000 pixels)"
        )


def test_sizes_and_digests_are_those_of_the_files(zoo, photos, manifest):
    for folder, found in (
        (photos / "train", manifest),
        (zoo, scan(zoo, ["bad", "good"], exif="ignore", threads=1)),
    ):
        for path, size, digest in zip(found.path, found.bytes, found.digest, strict=True):
            # But for the dangling link and the name that a manifest can only describe.
            if (folder / path).exists():
                assert size == os.stat(folder / path).st_size
                assert (
                    size == 0
                    or digest.tobytes() == hashlib.sha256((folder / path).read_bytes()).digest()
                )


MALFORMED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from pipeline.images.data_set import DataSet
from pipeline.images.sources.class_folders import ClassFolders
from pipeline.images.scan import scan
from pipeline.render.settings import RenderSettings
data = DataSet(ClassFolders(Path({data!r})), ["a", "b"], True)
found = scan(data, RenderSettings(threads=2), order_seed=0)
rows = list(zip(found.path, found.status, found.reason))
good = sorted(path for path, status, _ in rows if status == 0 and "good" in path)
unnamed = [path for path, status, reason in rows if status != 0 and not reason]
print(len(found), int((found.status != 0).sum()), len(good), len(unnamed))
"""


def test_hundreds_of_malformed_files_dont_stop_the_scan(tmp_path):
    """The scan runs in a process of its own, since the threat is a segmentation fault
    inside DALI."""
    rng = np.random.default_rng(0)
    kinds = {
        name: content
        for name, content in good_files().items()
        if len(content) > 1000 or name == "photo.webp"
    }
    files = {}
    for i in range(420):
        name, content = list(kinds.items())[i % len(kinds)]
        cut, where = int(rng.integers(1, len(content))), rng.integers(0, len(content), 20)
        damaged = bytearray(content)
        if i % 7 == 0:
            del damaged[cut:]
        elif i % 7 == 1:
            del damaged[: cut // 8 + 1]
        elif i % 7 == 2:
            damaged[min(cut, 600) :] = rng.bytes(500)
        elif i % 7 == 3:
            damaged[:cut] = bytes(cut)
        elif i % 7 == 4:
            damaged[30 : 30 + cut] = b"\xff" * cut
        elif i % 7 == 5:
            damaged = bytearray(rng.bytes(cut))
        else:
            for place in where:
                damaged[place] = rng.integers(256)
        files[f"{i:03d} {name}"] = bytes(damaged)
    good = good_files()["colour.jpg"]
    for c, half in enumerate("ab"):
        write(
            tmp_path / half,
            {name: content for i, (name, content) in enumerate(files.items()) if i % 2 == c},
        )
        write(tmp_path / half, {f"{i:03d} good.jpg": good for i in range(0, 400, 10)})
    code = MALFORMED.format(root=str(ROOT), data=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    total, bad, usable, unnamed = map(int, done.stdout.split())
    assert (total, usable, unnamed) == (500, 80, 0)
    assert bad >= 300  # some changes leave an image that can be decoded


def test_row_order_is_a_function_of_seed_and_path(photos, manifest, data):
    again = scan(data, CLASSES, exif="ignore", threads=1, order_seed=0)
    assert np.array_equal(again.path, manifest.path)
    (data / manifest.path[40]).unlink()
    fewer = scan(data, CLASSES, exif="ignore", threads=2, order_seed=0)
    assert list(fewer.path) == [path for path in manifest.path if path != manifest.path[40]]
    other = epoch_order.row_order(1, manifest.path)
    assert not np.array_equal(other, epoch_order.row_order(0, manifest.path))
    assert set(manifest.path[other]) == set(manifest.path)


def test_rows_are_class_mixed(manifest):
    for third in np.split(manifest.class_index, 3):
        assert np.bincount(third, minlength=3).min() >= 4  # of 30, where 10 are expected


def test_the_manifest_digest_ignores_the_row_order_and_nothing_else(photos, data, manifest):
    plain = scan(photos / "train", CLASSES, exif="ignore", threads=2)
    assert not np.array_equal(plain.path, manifest.path)
    assert plain.manifest_digest() == manifest.manifest_digest()
    victim = data / manifest.path[7]
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    assert (
        scan(data, CLASSES, exif="ignore", threads=2).manifest_digest()
        != manifest.manifest_digest()
    )


def test_a_split_is_a_folder_of_class_folders(tmp_path):
    write(tmp_path / "both" / "train" / "ant", {"1.jpg": b"x"})
    write(tmp_path / "both" / "val" / "ant", {"1.jpg": b"x"})
    assert open_source(tmp_path / "both", "val").path == tmp_path / "both" / "val"
    write(tmp_path / "plain" / "ant", {"1.jpg": b"x"})
    write(tmp_path / "plain" / "train", {"locomotive.jpg": b"x"})  # a class, not a split
    for split in ("train", "val"):
        assert open_source(tmp_path / "plain", split).path == tmp_path / "plain"
    assert class_folder_names(tmp_path / "plain") == ["ant", "train"]


def test_a_split_that_isnt_there_is_refused_in_one_line(tmp_path):
    write(tmp_path / "train" / "ant", {"1.jpg": b"x"})
    (tmp_path / "empty").mkdir()
    for act, says in (
        (
            lambda: open_source(tmp_path, "val"),
            "has train but no val; name another --split",
        ),
        (
            lambda: open_source(tmp_path / "nowhere", "train"),
            "there is no folder .*nowhere; --data must name",
        ),
        (lambda: class_folder_names(tmp_path / "empty"), "has no class folders"),
        (
            lambda: class_folders(tmp_path / "train", ["bee"]).list(),
            r"train has 1 class folder of no known class \(ant\), where 1 class \(bee\)",
        ),
    ):
        with pytest.raises(DataError, match=says) as refused:
            act()
        assert "\n" not in str(refused.value)


def test_nested_folders_are_found_and_loops_of_links_end(tmp_path):
    write(tmp_path / "ant" / "deep" / "deeper", {"1.jpg": b"x", ".hidden.jpg": b"x"})
    write(tmp_path / "ant" / ".hidden", {"2.jpg": b"x"})
    write(tmp_path / ".elsewhere" / "linked", {"3.jpg": b"x"})
    write(tmp_path / "bee", {"4.jpg": b"x"})
    (tmp_path / "ant" / "deep" / "loop").symlink_to(tmp_path / "ant")
    (tmp_path / "ant" / "link").symlink_to(tmp_path / ".elsewhere")
    files = class_folders(tmp_path, ["ant", "bee"]).list()
    paths, class_index, sizes = files.name, files.class_index, files.size
    assert list(paths) == ["ant/deep/deeper/1.jpg", "ant/link/linked/3.jpg", "bee/4.jpg"]
    assert list(class_index) == [0, 0, 1] and list(sizes) == [1, 1, 1]


def test_a_link_to_itself_is_an_unusable_file(tmp_path):
    write(tmp_path / "ant", good_files())
    (tmp_path / "ant" / "self.jpg").symlink_to("self.jpg")
    found = scan(tmp_path, ["ant"], exif="ignore", threads=1)
    assert list(found.path[found.status != USABLE]) == ["ant/self.jpg"]


def test_a_pipe_is_an_unusable_file(tmp_path):
    write(tmp_path / "ant", good_files())
    os.mkfifo(tmp_path / "ant" / "pipe.jpg")
    found = scan(tmp_path, ["ant"], exif="ignore", threads=1)
    assert list(found.reason[found.status != USABLE]) == ["not a regular file"]


def test_a_class_folder_without_images_keeps_its_index(data):
    (data / "aardvark").mkdir()
    assert class_folder_names(data) == ["aardvark", "ant", "bee", "cat"]
    found = scan(data, class_folder_names(data), exif="ignore", threads=2)
    assert {
        path.split("/")[0]: index for path, index in zip(found.path, found.class_index, strict=True)
    } == {"ant": 1, "bee": 2, "cat": 3}


def test_a_class_map_gives_the_class_indices(tmp_path):
    write(tmp_path / "data" / "polar bear", {"1.jpg": b"x"})
    write(tmp_path / "data" / "ant", {"1.jpg": b"x"})
    listed = tmp_path / "map.txt"
    listed.write_text("zebra\npolar bear\n\nant\n")
    classes = read_class_map(listed)
    assert classes == ["zebra", "polar bear", "ant"]
    files = class_folders(tmp_path / "data", classes).list()
    paths, class_index = files.name, files.class_index
    assert dict(zip(paths, class_index, strict=True)) == {"polar bear/1.jpg": 1, "ant/1.jpg": 2}
    write(tmp_path / "data" / "brown bear", {"1.jpg": b"x"})
    with pytest.raises(DataError, match=r"1 class folder of no known class \(brown bear\)"):
        class_folders(tmp_path / "data", classes).list()


@pytest.mark.parametrize("content", [b"ant\nbee\nant\n", b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_class_map_that_isnt_one_is_refused(tmp_path, content):
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"--class-map .*map\.txt"):
        read_class_map(tmp_path / "map.txt")
    with pytest.raises(DataError, match="can't be read"):
        read_class_map(tmp_path / "nowhere.txt")


def test_reading_names_a_file_that_changed_or_vanished(data, manifest):
    rows = np.array([5, 3, 50])
    with Reader(class_folders(data, CLASSES), manifest, 2) as read:
        assert read(rows) == [(data / manifest.path[row]).read_bytes() for row in rows]
        victim = data / manifest.path[3]
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        with pytest.raises(DataError, match=f"{victim} has changed"):
            read(rows)
        victim.unlink()
        with pytest.raises(DataError, match=f"{victim} can't be read any more .*No such file"):
            read(rows)
        assert len(read([5, 50])) == 2  # the other files can still be read


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda d: shutil.copy(d / "ant" / "000.jpg", d / "ant" / "new.jpg"),
            "1 of 90 images added, the first is ant/new.jpg",
        ),
        (
            lambda d: [(d / "cat" / f"{i:03d}.jpg").unlink() for i in (4, 5)],
            "2 of 90 images missing, the first is cat/004.jpg",
        ),
        (
            lambda d: (d / "bee" / "007.jpg").rename(d / "bee" / "seven.jpg"),
            "1 of 90 images missing, the first is bee/007.jpg",
        ),
        (
            lambda d: (d / "bee" / "009.jpg").write_bytes(b"short"),
            "1 of 90 images of another size or class, the first is bee/009.jpg",
        ),
    ],
)
def test_another_data_set_is_refused_with_count_and_first_path(data, manifest, change, says):
    matching.require_same_files(class_folders(data, CLASSES), manifest, "labels.zarr")
    change(data)
    with pytest.raises(
        DataError, match=f"is not the data set that labels.zarr was made from: {says}"
    ):
        matching.require_same_files(class_folders(data, CLASSES), manifest, "labels.zarr")


def test_another_class_index_is_refused(data, manifest):
    with pytest.raises(
        DataError, match=r"60 of 90 images of another size or class, the first is ant/000\.jpg"
    ):
        turned = class_folders(data, ("cat", "bee", "ant"))
        matching.require_same_files(turned, manifest, "labels.zarr")


def test_the_same_files_are_the_same_files_with_a_name_that_isnt_utf8_among_them(zoo, tmp_path):
    data = Path(shutil.copytree(zoo / "bad", tmp_path / "data" / "bad", symlinks=True)).parent
    (data / "bad" / "latin-z.jpg").write_bytes(good_files()["colour.jpg"])
    found = scan(data, ["bad"], exif="ignore", threads=1, order_seed=0)
    matching.require_same_files(class_folders(data, ["bad"]), found, "labels.zarr")
