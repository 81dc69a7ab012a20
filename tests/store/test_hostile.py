"""Hostile and odd data: pictures that are too large, names that are anything, links,
files that change, teachers that fail, and stores from strangers.

Threats to a process (memory, an endless loop, a fault inside a decoder) are tried in a
cage: a separate process with little memory and time.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from google_crc32c import value as crc32c
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from support import stages
from support.paths import ROOT
from support.small import CPU, changed, tree, write_photos, write_teacher
from support.stages import crop_renderer, generate, recheck, train
from support.stores import write

from cache import LabelStore, StoreError
from cache.errors import MealError
from cache.format import schema
from cache.format.manifest import USABLE, Images
from cache.format.schema import FORMAT
from cache.format.seal import write_seal
from cache.verify import verify
from cache.writer import StoreWriter
from cli import main
from pipeline.config import Config, ModelSpec
from pipeline.images.patience import DataError
from pipeline.images.scan import unusable_summary
from pipeline.models.model import ModelError
from pipeline.models.weights import load

pytestmark = pytest.mark.usefixtures("one_thread")


# The cage reads a line of JSON: commands, each a list of words; megabytes; seconds. It
# runs the commands one after the other in a fork of itself, which may take so many
# megabytes more than the cage has, and so many seconds a command. The answer is a line
# of JSON.
CAGE = """
import json, os, resource, signal, sys, traceback
import torch
torch.set_num_threads(1)
from click.testing import CliRunner
import pipeline.evaluation, pipeline.labelling.generate, pipeline.inspection.relabel
import pipeline.inspection.terminal, pipeline.training.train
from cli import main

def memory(kind):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(kind))

def inside(commands, megabytes, seconds, answer):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit = (memory("VmSize") + megabytes) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = memory("VmRSS")
    for command in commands:
        signal.alarm(seconds)
        # As on a terminal: click takes no escape sequence away.
        result = CliRunner().invoke(main, command, color=True)
        fault = result.exception and not isinstance(result.exception, SystemExit)
        trace = "".join(traceback.format_exception(result.exception)[-4:]) if fault else ""
        said = {"status": result.exit_code, "out": result.stdout, "err": result.stderr}
        said |= {"trace": trace, "grown": memory("VmHWM") - before}
        answer.write(json.dumps(said) + "\\n")
        answer.flush()

print("ready", flush=True)
for line in sys.stdin:
    wanted = json.loads(line)
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(here)
        try:
            limits = wanted["megabytes"], wanted["seconds"]
            inside(wanted["commands"], *limits, os.fdopen(there, "w"))
        finally:
            os._exit(0)
    os.close(there)
    said = [json.loads(line) for line in open(here)]
    _, status = os.waitpid(child, 0)
    print(json.dumps({"said": said, "killed": status & 127}), flush=True)
"""


@dataclass
class Said:
    """The status, output and errors of a command."""

    status: int
    out: str
    err: str
    trace: str = ""
    grown: int = 0  # megabytes by which the process grew at most

    def refused(self, *words: str) -> str:
        """Require that the command failed with one clear line, and return the line."""
        assert not self.trace, self.trace
        assert self.status == 1, f"status {self.status}: {self.out}{self.err}"
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.endswith(f"{line}\n")
        for word in words:
            assert word in line
        return line


class Cage:
    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", CAGE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, *commands: list, megabytes: int = 3000, seconds: int = 15) -> list[Said]:
        """Run commands one after the other. Fails if a command takes too long, or
        dies."""
        commands = [list(map(str, command)) for command in commands]
        print(
            json.dumps({"commands": commands, "megabytes": megabytes, "seconds": seconds}),
            file=self.process.stdin,
            flush=True,
        )
        answer = json.loads(self.process.stdout.readline())
        if answer["killed"]:
            how = signal.Signals(answer["killed"]).name.replace(
                "SIGALRM", f"the alarm after {seconds} s"
            )
            pytest.fail(f"{' '.join(commands[len(answer['said'])][:2])} … was killed by {how}")
        return [Said(**said) for said in answer["said"]]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def cage() -> Iterator[Cage]:
    cage = Cage()
    yield cage
    cage.close()


@pytest.fixture(scope="module")
def config(recipe: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as a file."""
    path = tmp_path_factory.mktemp("config") / "recipe.yaml"
    path.write_text(changed(recipe, train={"epochs": 1}).to_yaml())
    return path


class Commands:
    """The command line's words for one data set and store."""

    def __init__(
        self, config: Path, data: Path, store: Path, out: Path, teachers: list[dict]
    ) -> None:
        self.inspect, self.facts = ["inspect", store], ["inspect", store, "--json"]
        self.generate = [
            "generate-labels",
            "--config",
            config,
            "--data",
            data,
            "--store",
            store,
            "--device=cpu",
        ]
        self.train = [
            "train-student",
            "--config",
            config,
            "--data",
            data,
            "--store",
            store,
            "--out",
            out,
            "--device=cpu",
        ]
        self.verify, self.verify_data = ["verify", store], ["verify", store, "--data", data]
        chosen = [f"--teacher={t['model']}={t['checkpoint']}" for t in teachers]
        self.sample = [*self.verify_data, "--sample=9", "--device=cpu", *chosen]
        self.evaluate = [
            "eval",
            "--data",
            data,
            "--model",
            f"test_vit={out / 'last.safetensors'}",
            "--device=cpu",
        ]


@pytest.fixture
def commands(config, teachers, tmp_path) -> Callable[[Path, Path], Commands]:
    return lambda data, store: Commands(config, data, store, tmp_path / "run", teachers)


def run(*words: object) -> Said:
    """Run a command in this process."""
    result = CliRunner().invoke(main, [str(word) for word in words], color=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


def small_photos(
    folder: Path, per_class: int, classes: tuple[str, ...] = ("ant", "bee", "cat")
) -> Path:
    """Write a few photographs in class folders of any name."""
    write_photos(folder, per_class)
    for name, wanted in zip(("ant", "bee", "cat"), classes, strict=True):
        (folder / name).rename(folder / wanted)
    return folder


def encoded(kind: str, size: tuple[int, int] = (16, 16), **how: object) -> bytearray:
    out = io.BytesIO()
    Image.new("RGB", size, (90, 120, 40)).save(out, kind, **how)
    return bytearray(out.getvalue())


# ---- large pictures


def test_a_picture_of_a_hundred_megapixels_is_labelled_trained_from_and_evaluated(
    cage, commands, tmp_path
):
    for split in ("train", "val"):
        small_photos(tmp_path / "data" / split, 2)
    smooth = Image.linear_gradient("L").resize((10_000, 10_000))
    Image.merge("RGB", [smooth, smooth.rotate(90), smooth]).save(
        tmp_path / "data/train/bee/huge.jpg", quality=50
    )
    shutil.copy(tmp_path / "data/train/bee/huge.jpg", tmp_path / "data/val/bee/huge.jpg")
    c = commands(tmp_path / "data", tmp_path / "s.zarr")
    said = cage(
        c.generate, c.train, [*c.evaluate, "--json"], c.verify_data, megabytes=6000, seconds=200
    )
    assert [(s.status, s.trace) for s in said] == [(0, "")] * 4, said
    found = LabelStore.open(tmp_path / "s.zarr").images
    (row,) = np.flatnonzero(found.path == "bee/huge.jpg")
    assert (found.height[row], found.width[row], found.status[row]) == (10_000, 10_000, USABLE)
    assert json.loads(said[2].out)["images"] == 7
    # The decoded image takes 300 MB, in some stages twice, and in two threads.
    assert max(s.grown for s in said) < 2500


def test_lines_of_pixels_are_labelled_trained_from_and_evaluated(cage, commands, tmp_path):
    """Resized whole for evaluation at 600 px, each would have 23 gigapixels. They are
    among other pictures, several in a batch."""
    lines = np.random.default_rng(0).integers(0, 256, (50_000, 1, 3), dtype=np.uint8)
    for split in ("train", "val"):
        folder = small_photos(tmp_path / "data" / split, 2)
        for name in ("one", "two"):
            Image.fromarray(lines).save(folder / "bee" / f"tall {name}.png")
            Image.fromarray(lines.swapaxes(0, 1)).save(folder / "bee" / f"wide {name}.png")
    c = commands(tmp_path / "data", tmp_path / "s.zarr")
    at = ["--set=train.image_size=600", "--student=test_resnet", "--set=student.image_size=600"]
    evaluate = [word.replace("test_vit", "test_resnet") for word in map(str, c.evaluate)]
    page = ["--report", tmp_path / "page.html", "--data", tmp_path / "data"]
    said = cage(
        c.generate,
        [*c.train, *at],
        [*evaluate, "--image-size=600", "--json"],
        c.sample,
        [*c.inspect, *page],
        megabytes=6000,  # of addresses, of which threads take some 3 GB
        seconds=60,
    )
    assert [(s.status, s.trace) for s in said] == [(0, "")] * 5, said
    assert json.loads(said[2].out)["images"] == 10


def png(
    width: int, height: int, data: bytes = b"x\x9cc\0\0\0\1\0\1", *more: tuple[bytes, bytes]
) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    middle = b"".join(chunk(*one) for one in (*more, (b"IDAT", data)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IEND", b"")


def patched(content: bytearray, mark: bytes, offset: int, layout: str, *values: int) -> bytes:
    struct.pack_into(layout, content, content.index(mark) + offset, *values)
    return bytes(content)


def gif(width: int, height: int) -> bytes:
    content = encoded("GIF")
    table = 3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0
    struct.pack_into("<HH", content, 6, width, height)
    struct.pack_into("<HH", content, content.index(b",", 13 + table) + 5, width, height)
    return bytes(content)


def tiff(width: int, height: int) -> bytes:
    content = encoded("TIFF")
    (first,) = struct.unpack_from("<I", content, 4)
    for place in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", content, first)[0], 12):
        (tag,) = struct.unpack_from("<H", content, place)
        if tag in (256, 257, 278):  # width, length, rows of a strip
            struct.pack_into("<HII", content, place + 2, 4, 1, width if tag == 256 else height)
    return bytes(content)


def jpeg_2000(width: int, height: int) -> bytes:
    content = encoded("JPEG2000")
    for offset in (6, 22):  # of the image, and of its one tile
        patched(content, b"\xff\x51", offset, ">II", width, height)
    return patched(content, b"ihdr", 4, ">II", height, width)


def inflating(size: int) -> bytes:
    """Make zlib's stream of ``size`` zeros, one kilobyte for each megabyte."""
    packer = zlib.compressobj(9)
    first = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + first[2:] * ((size >> 20) - 1) + b"\3\0\0\0\0\0"


SIXTEEN = zlib.compress((b"\0" + bytes(3 * 16)) * 16)  # the pixels of a PNG of 16 × 16
BOMBS: dict[str, bytes] = {  # name and stated megapixels → content
    "50,000.png 2,500.0": png(50_000, 50_000),
    "65,535.png 4,294.8": png(65_535, 65_535),
    "long.png 2,147.5": png(1, 2**31 - 1),
    "largest.png 4,611,686,014,132.4": png(2**31 - 1, 2**31 - 1),
    "sof.jpg 4,290.2": patched(encoded("JPEG"), b"\xff\xc0", 5, ">HH", 65_500, 65_500),
    "progressive.jpg 4,290.2": patched(
        encoded("JPEG", progressive=True), b"\xff\xc2", 5, ">HH", 65_500, 65_500
    ),
    "screen.gif 4,294.8": gif(65_535, 65_535),
    "strip.tif 3,600.0": tiff(60_000, 60_000),
    "lossless.webp 268.4": patched(
        encoded("WEBP", lossless=True), b"VP8L", 9, "<I", 16_382 | 16_382 << 14
    ),
    "lossy.webp 268.4": patched(encoded("WEBP"), b"\x9d\x01\x2a", 3, "<HH", 16_383, 16_383),
    "up.bmp 3,600.0": patched(encoded("BMP"), b"BM", 18, "<ii", 60_000, 60_000),
    "down.bmp 3,600.0": patched(encoded("BMP"), b"BM", 18, "<ii", 60_000, -60_000),
    "plain.ppm 3,600.0": b"P6 60000 60000 255\n" + bytes(300),
    "wavelets.jp2 3,600.0": jpeg_2000(60_000, 60_000),
    "run.tga 3,600.0": patched(encoded("TGA"), b"\0\0\2", 12, "<HH", 60_000, 60_000),
}
# Bombs whose header states a harmless or an impossible size. They may be usable.
MORE_BOMBS: dict[str, bytes] = {
    "profile.png": png(16, 16, SIXTEEN, (b"iCCP", b"x\0\0" + inflating(2 << 30))),
    "text.png": png(16, 16, SIXTEEN, (b"zTXt", b"Comment\0\0" + inflating(2 << 30))),
    "more pixels.png": png(16, 16, inflating(64 << 20)),
    "overflowing.png": png(2**32 - 1, 2**32 - 1),
    "least.bmp": patched(encoded("BMP"), b"BM", 18, "<ii", 60_000, -(2**31)),
    "overflowing.ppm": b"P6 %d 16 255\n" % (2**32 + 16) + bytes(3 * 256),
    "no height.jpg": patched(encoded("JPEG"), b"\xff\xc0", 5, ">HH", 0, 65_535),
}


def test_a_bomb_is_left_out_with_its_size_as_the_reason_and_costs_no_memory(
    cage, commands, tmp_path
):
    data = small_photos(tmp_path / "data", 2)
    for name, content in (BOMBS | MORE_BOMBS).items():
        assert len(content) < 3 << 20
        (data / "ant" / name.split(".")[0]).with_suffix(
            "." + name.split(".")[1].split()[0]
        ).write_bytes(content)
    c = commands(data, tmp_path / "s.zarr")
    (said,) = cage([*c.generate, "--set=render.threads=2"], seconds=60)
    assert said.status == 0, said
    found = LabelStore.open(tmp_path / "s.zarr").images
    reasons = dict(zip(found.path, found.reason, strict=True))
    wrong = {}
    for name in BOMBS:
        file, megapixels = name.split()
        wanted = f"too large: {megapixels} megapixels, the limit is 179 (render.max_megapixels)"
        if reasons[f"ant/{file}"] != wanted:
            wrong[file] = reasons[f"ant/{file}"]
    assert wrong == {}
    assert len(found) == 6 + len(BOMBS) + len(MORE_BOMBS) and not any(
        "\n" in reason for reason in found.reason
    )
    assert said.grown < 400


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000"])
def test_max_megapixels_is_the_limit(tmp_path, kind):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "x").write_bytes(encoded(kind, (500, 400)))

    def reason(limit: float) -> str:
        found = stages.scan(tmp_path, ["ant"], exif="ignore", threads=1, max_megapixels=limit)
        assert (found.status[0] == USABLE) == (found.reason[0] == "")
        return found.reason[0]

    # 500 × 400 pixels are 0.2 megapixels, which is not above the limit.
    assert reason(0.2) == ("DALI can't decode this GIF file" if kind == "GIF" else "")
    assert reason(0.199) == "too large: 0.2 megapixels, the limit is 0.199 (render.max_megapixels)"


# ---- names

MARK = "INJECTED"  # begins the second line of a name
NAMES = [
    "with space.jpg", "  two  leading.jpg", "'single'.jpg", '"double".jpg', "é.jpg", "e\u0301.jpg",
    "中文.jpg", "😀.jpg", "-rf.jpg", "--help.jpg", "100%d %s {0}.jpg",
    "back\\slash.jpg", "\\xe9.jpg",
    f"new\n{MARK} line.jpg", "tab\tbed.jpg", f"\r{MARK} return.jpg", "\x1b[31mred\x1b[0m.jpg",
    "\x07bell.jpg", "\x7fdelete.jpg", "\x9b31m.jpg", "\u202egpj.jpg", "\u2028ls.jpg",
    "\ufeffbom.jpg",
    "[bold]rich.jpg", "{brace}.jpg", "$HOME `id`.jpg", "~.jpg", "*?.jpg", "#.jpg", ";.jpg",
    "a:b.jpg",
    "CON", "no extension", "x" * 246 + ".jpg", "é" * 123 + ".jpg",
]  # fmt: skip
# C0 without the end of a line, delete, and C1, whose 0x9b begins a sequence too
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def tame(text: str) -> str:
    """Require that a command's output holds no control character, and no line begun by
    a name."""
    assert not CONTROL.search(text), repr(text)
    assert not re.search(rf"(?m)^[\s│]*{MARK}", text), text
    return text


@pytest.fixture(scope="module")
def odd(photos, config, teachers, tmp_path_factory) -> tuple[Commands, dict[str, Said], LabelStore]:
    """Images of every name in classes of odd names, put through every command."""
    folder = tmp_path_factory.mktemp("odd")
    originals = sorted((photos / "train").glob("*/*.jpg"))
    for split in ("train", "val"):
        for c, name in enumerate((f"a\n{MARK} \x1b[31mclass", "-bee  [x] 'y'", "c" * 250)):
            (place := folder / "data" / split / name).mkdir(parents=True)
            for i, file in enumerate(NAMES[c::3] if split == "val" else NAMES):
                shutil.copy(originals[(3 * i + 30 * c) % 90], place / file)
            shutil.copy(originals[c], os.fsencode(place) + b"/latin-\xe9.jpg")
    c = Commands(config, folder / "data", folder / "s.zarr", folder / "run", teachers)
    wanted = ("generate", "train", "verify_data", "sample", "inspect", "facts", "evaluate")
    said = {name: run(*getattr(c, name)) for name in wanted}
    said["again"] = run(*c.generate)
    return c, said, LabelStore.open(folder / "s.zarr")


def test_images_of_any_name_are_labelled_trained_from_verified_and_evaluated(odd):
    _, said, store = odd
    assert {name: s.status for name, s in said.items()} == dict.fromkeys(said, 0), said
    classes = [f"a\n{MARK} \x1b[31mclass", "-bee  [x] 'y'", "c" * 250]
    assert sorted(store.class_names) == sorted(classes)
    usable = store.images.path[store.usable]
    assert sorted(usable) == sorted(f"{name}/{file}" for name in classes for file in NAMES)
    assert store.progress()[0] == store.progress()[1]
    assert store.probabilities(1, store.usable).shape == (3 * len(NAMES), 3)
    assert (
        f"all {3 * len(NAMES)} are, byte for byte, those that were labelled"
        in said["verify_data"].out
    )
    assert f"{len(NAMES)} images" in said["evaluate"].out


def test_a_name_that_is_not_utf8_is_left_out_and_told_apart_from_one_that_looks_like_it(odd):
    """In the manifest, latin-\\xe9.jpg stands for a name that is not UTF-8, while
    \\xe9.jpg is the real name of another file."""
    _, said, store = odd
    left_out = store.images.path[store.images.status != USABLE]
    assert len(left_out) == 3 and all(path.endswith("/latin-\\xe9.jpg") for path in left_out)
    assert set(store.images.reason[store.images.status != USABLE]) == {
        "the file's name is not UTF-8"
    }
    assert json.loads(said["facts"].out)["unusable"][0]["files"] == 3


def test_two_files_of_which_one_is_named_as_the_other_is_described_are_two(
    photos, recipe, tmp_path
):
    data = small_photos(tmp_path / "data", 2)
    shutil.copy(data / "ant/000.jpg", data / "ant" / "\\xe9.jpg")
    shutil.copy(data / "ant/001.jpg", os.fsencode(data) + b"/ant/\xe9.jpg")
    before = tree(generate(recipe, data, tmp_path / "s.zarr", device=CPU).path)
    store = generate(recipe, data, tmp_path / "s.zarr", device=CPU)
    assert len(store.images) == 8 and len(store.usable) == 7 and tree(store.path) == before
    assert recheck(store.path, data, [], None)["trusted"]


@pytest.mark.parametrize(
    "name", ["generate", "again", "train", "verify_data", "sample", "inspect", "facts", "evaluate"]
)
def test_no_name_gets_a_second_line_or_a_control_character_into_what_is_said(odd, name):
    _, said, _ = odd
    tame(said[name].out)
    tame(said[name].err)


@pytest.fixture(scope="module")
def nasty(config, teachers, tmp_path_factory) -> Commands:
    """An unusable file of the worst name, which every command has reason to name."""
    folder = tmp_path_factory.mktemp("nasty")
    for split in ("train", "val"):
        small_photos(folder / "data" / split, 2, ("ant", "odd[", "cat"))
        (
            folder / "data" / split / "odd[" / f"]\n{MARK} \x1b[31m\x9b31m\x07\r\t[red]  two  .txt"
        ).write_text("no image")
    c = Commands(config, folder / "data", folder / "s.zarr", folder / "run", teachers)
    assert run(*c.generate).status == run(*c.train).status == 0
    return c


@pytest.mark.parametrize("name", ["generate", "train", "evaluate", "inspect", "facts"])
def test_a_file_of_the_worst_name_is_left_out_in_one_line_that_names_it(nasty, name, tmp_path):
    command = getattr(nasty, name)
    if name in ("generate", "train"):  # these name the file while they make something
        made = command.index("--store" if name == "generate" else "--out") + 1
        command = [*command[:made], tmp_path / "another", *command[made + 1 :]]
    said = run(*command)
    assert said.status == 0
    both = tame(said.out + said.err)
    # Rich takes brackets for markup, and a closing tag without an opening tag for an
    # error.
    assert "odd[/]" in both and "[red]" in both


def test_the_worst_name_is_refused_in_one_line_by_strict(nasty, tmp_path):
    made = nasty.generate.index("--store") + 1
    said = run(*nasty.generate[:made], tmp_path / "s.zarr", *nasty.generate[made + 1 :], "--strict")
    tame(said.refused("1 of 7 files are unusable", "drop --strict"))
    tame(said.err)


@pytest.mark.parametrize(
    "file",
    ["  two  leading.jpg", f"new\n{MARK} line.jpg", "\x1b[31mred\x1b[0m.jpg", "[bold]rich.jpg"],
)
@pytest.mark.parametrize("stage", ["generate", "train", "verify_data"])
def test_an_image_of_an_odd_name_that_is_gone_is_named_in_one_line(odd, stage, file, tmp_path):
    c, _, _ = odd
    data = Path(shutil.copytree(c.verify_data[-1], tmp_path / "data"))
    (data / "train" / ("c" * 250) / file).unlink()
    command = [
        data if word == c.verify_data[-1] else tmp_path / "run" if word == c.train[8] else word
        for word in getattr(c, stage)
    ]
    said = run(*command)
    assert said.status == 1
    both = tame(said.out + said.err)
    (line,) = [
        line for line in both.splitlines() if "1 of 108 images missing, the first is" in line
    ]
    visible = file if file.isprintable() else MARK if MARK in file else "31mred"
    # Spaces and brackets appear as they are, unprintable characters in another form.
    assert visible in line


def test_what_the_library_says_of_odd_names_is_one_line_too(odd, recipe, tmp_path):
    c, _, store = odd
    data = Path(shutil.copytree(c.verify_data[-1], tmp_path / "data")) / "train"
    classes = store.class_names
    for name in classes:
        (data / name / f"new\n{MARK} line.jpg").write_bytes(b"no image")
    found = stages.scan(data, classes, exif="ignore", threads=1)
    assert len(unusable_summary(found)) == 2  # names that aren't UTF-8, files that are no image
    for line in unusable_summary(found):
        tame(line + "\n")
        assert "\n" not in line
    with pytest.raises(MealError) as refusal:
        generate(recipe, data, store.path, device=CPU)
    assert "\n" not in str(refusal.value)
    for line in recheck(store.path, data, [], None)["problems"]:
        assert not CONTROL.search(line) and "\n" not in line


# ---- links and folders


def test_links_lead_to_files_and_folders_wherever_they_are_and_end_where_they_turn(
    recipe, tmp_path
):
    """A data set may be laid out in links, as subsets are. A link that leads nowhere is
    an unusable file."""
    data = small_photos(tmp_path / "data", 2)
    away = small_photos(tmp_path / "away", 3)
    ant, bee = data / "ant", data / "bee"
    (ant / "file.jpg").symlink_to(away / "cat/000.jpg")
    (ant / "relative.jpg").symlink_to("../../away/cat/001.jpg")
    (ant / "chain.jpg").symlink_to("file.jpg")
    (ant / "folder").symlink_to(away / "bee")
    (ant / "myself").symlink_to(ant)
    (ant / "other").symlink_to(bee)
    (bee / "other").symlink_to(ant)
    (bee / "dangling.jpg").symlink_to("nowhere")
    (bee / "itself.jpg").symlink_to("itself.jpg")
    (bee / "there.jpg").symlink_to("back.jpg")
    (bee / "back.jpg").symlink_to("there.jpg")
    (bee / "device.jpg").symlink_to("/dev/zero")
    (data / "cat").rename(tmp_path / "cats")
    (data / "cat").symlink_to(tmp_path / "cats")
    store = generate(recipe, data, tmp_path / "s.zarr", device=CPU)
    of_ant = [
        "000.jpg",
        "001.jpg",
        "chain.jpg",
        "file.jpg",
        "relative.jpg",
        *(f"folder/00{i}.jpg" for i in range(3)),
    ]
    of_bee = ["000.jpg", "001.jpg"]
    expected = {f"ant/{name}" for name in (*of_ant, *(f"other/{name}" for name in of_bee))}
    expected |= {f"bee/{name}" for name in (*of_bee, *(f"other/{name}" for name in of_ant))} | {
        "cat/000.jpg",
        "cat/001.jpg",
    }
    assert set(store.images.path[store.usable]) == expected
    bad = ("dangling.jpg", "itself.jpg", "there.jpg", "back.jpg", "device.jpg")
    left_out = {
        path: reason
        for path, reason in zip(store.images.path, store.images.reason, strict=True)
        if reason
    }
    assert set(left_out) == {f"bee/{name}" for name in bad} | {f"ant/other/{name}" for name in bad}
    before = tree(store.path)
    generate(recipe, data, tmp_path / "s.zarr", device=CPU)
    assert tree(store.path) == before and recheck(store.path, data, [], None)["trusted"]
    # The image is the file that the link leads to.
    (away / "cat/001.jpg").write_bytes((away / "ant/000.jpg").read_bytes())
    with pytest.raises(
        DataError,
        match=r"2 of 32 images of another size or class, the first is "
        r"ant/relative.jpg|ant/relative.jpg has changed",
    ):
        generate(recipe, data, tmp_path / "s.zarr", device=CPU)


def test_a_class_without_images_hidden_files_and_folders_in_folders_are_no_obstacle(
    recipe, tmp_path
):
    data = small_photos(tmp_path / "data", 2)
    shutil.rmtree(data / "cat")
    (data / "cat").mkdir()
    (data / ".hidden").mkdir()
    for name in (".hidden/1.jpg", "ant/.2.jpg", ".DS_Store", "README.jpg"):
        shutil.copy(data / "bee/000.jpg", data / name)
    deep = data / "ant" / "deeper" / ".hidden"
    deep.mkdir(parents=True)
    shutil.copy(data / "bee/001.jpg", deep / "3.jpg")
    shutil.copy(data / "bee/001.jpg", deep.parent / "3.jpg")
    store = generate(recipe, data, tmp_path / "s.zarr", device=CPU)
    assert set(store.images.path) == {
        "ant/000.jpg",
        "ant/001.jpg",
        "ant/deeper/3.jpg",
        "bee/000.jpg",
        "bee/001.jpg",
    }
    assert store.classes == 3 and set(store.images.class_index) == {0, 1}
    assert (
        train(
            changed(recipe, train={"epochs": 1}),
            data,
            tmp_path / "run",
            store=store.path,
            device=CPU,
        )["images"]
        == 5
    )


def test_folders_in_folders_without_end_are_looked_through_or_refused_in_one_line(tmp_path):
    """A path may have two thousand folders, and Python's recursion ends at a thousand
    calls. The test lowers both numbers, to be quicker."""
    data = small_photos(tmp_path / "data", 2)
    deepest = data / "ant" / "/".join("d" * 200)
    deepest.mkdir(parents=True)
    shutil.copy(data / "bee/000.jpg", deepest / "x.jpg")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        with suppress(DataError):
            paths = stages.class_folders(data, ["ant", "bee", "cat"]).list().name
            assert len(paths) == 7
    finally:
        sys.setrecursionlimit(limit)


# ---- images that change

LATE = 80  # a row of the last shard, which the fingerprint doesn't render


def another_picture(path: Path) -> None:
    Image.fromarray(load_sample_images().images[1][100:200, 100:180]).save(path)


def another_picture_of_as_many_bytes(path: Path) -> None:
    """Replace a JPEG by another of the same size, since any bytes may follow a JPEG."""
    size = path.stat().st_size
    Image.new("RGB", (64, 64), (200, 10, 10)).save(path, quality=30)
    assert path.stat().st_size <= size
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


CHANGES: dict[str, Callable[[Path], object]] = {
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "another byte": flip_a_bit,
    "another picture": another_picture,
    "another picture of as many bytes": another_picture_of_as_many_bytes,
    "deleted": Path.unlink,
    "a link to nowhere": instead(lambda path: path.symlink_to("nowhere")),
    "a folder": instead(Path.mkdir),
    "a pipe": instead(os.mkfifo),  # reading a pipe would wait for ever
}


@pytest.fixture
def unfinished(photos, store_path, tmp_path) -> tuple[Path, Path, Path]:
    """Copies of data and store, the last shard of the store without a record, and the
    path of an image of this shard."""
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    store = Path(shutil.copytree(store_path, tmp_path / "s.zarr"))
    (store / "records/c/1/2/0").unlink()
    return data, store, data / "train" / LabelStore.open(store).images.path[LATE]


@pytest.mark.parametrize("change", CHANGES)
def test_an_image_that_changed_between_the_stages_is_named_by_every_stage(
    recipe, unfinished, change, tmp_path
):
    data, store, image = unfinished
    name = image.relative_to(data / "train").as_posix()
    CHANGES[change](image)
    before = tree(store)
    one = changed(recipe, train={"epochs": 1})
    for stage in (
        lambda: generate(recipe, data, store, device=CPU),
        lambda: train(one, data, tmp_path / "run", store=store, device=CPU),
    ):
        with pytest.raises(
            DataError,
            match=rf"{name}.*; (pass the folder it was made from|put the image back as it was), or",
        ) as refusal:
            stage()
        assert "\n" not in str(refusal.value)
        assert tree(store) == before
    result = recheck(store, data / "train", [], None)
    assert (
        not result["trusted"]
        and len(result["problems"]) == 1
        and name in result["problems"][0]
        and "\n" not in result["problems"][0]
    )


@pytest.mark.parametrize(
    "change",
    ["longer", "empty", "another byte", "another picture of as many bytes", "deleted", "a folder"],
)
def test_an_image_that_changes_while_a_stage_is_at_work_is_named(
    recipe, store_path, unfinished, change, tmp_path, monkeypatch
):
    data, store, image = unfinished
    original = image.read_bytes()
    before = tree(store)
    checked = []
    # the last check before the work
    for place in (
        "pipeline.provenance.refusals.require_same_pixels",
        "pipeline.training.source.require_same_pixels",
    ):
        monkeypatch.setattr(place, lambda *arguments: checked.append(CHANGES[change](image)))
    one = changed(recipe, train={"epochs": 1})
    for stage in (
        lambda: generate(recipe, data, store, device=CPU),
        lambda: train(one, data, tmp_path / "run", store=store_path, device=CPU),
    ):
        with pytest.raises(
            DataError,
            match=rf"{image} (has changed since|can't be read any more).*; "
            rf"put the image back as it was, or",
        ):
            stage()
        assert tree(store) == before and not store.with_name("s.zarr.claims").exists()
        image.rmdir() if image.is_dir() else image.unlink(missing_ok=True)
        image.write_bytes(original)
    assert len(checked) == 2
    monkeypatch.undo()
    generate(recipe, data, store, device=CPU)
    assert tree(store) == tree(store_path)


# ---- teachers that fail


def with_head(path: Path, model: str, edit: Callable[[dict], object]) -> Path:
    """Write a teacher's weights, changed by ``edit``."""
    weights = load_file(write_teacher(path, model, 1))
    edit(weights)
    save_file(weights, path)
    return path


@pytest.mark.parametrize(
    ("place", "value", "where"),
    [
        (0, "nan", "weight"),
        (1, "nan", "bias"),
        (0, "inf", "bias"),
        (1, "inf", "weight"),
        (0, "-inf", "bias"),
        (1, "-inf", "bias"),
    ],
)
def test_a_teacher_whose_output_is_not_finite_is_named_with_the_image(
    photos, recipe, tmp_path, place, value, where
):
    """Minus infinity counts as well, though its softmax is zero: it would call a class
    impossible."""
    specs = list(recipe.teachers)
    head = "fc" if place == 0 else "classifier"
    path = with_head(
        tmp_path / "bad.safetensors",
        specs[place].model,
        lambda w: w[f"{head}.{where}"][0].fill_(float(value)),
    )
    specs[place] = specs[place].model_copy(update={"checkpoint": str(path)})
    with pytest.raises(
        ModelError,
        match=rf"^teacher {specs[place].model} gives no finite output "
        rf"for \w+/\d+\.jpg \(.*; check its",
    ) as refusal:
        generate(
            recipe.model_copy(update={"teachers": tuple(specs)}),
            photos,
            tmp_path / "s.zarr",
            device=CPU,
        )
    assert "\n" not in str(refusal.value)
    assert LabelStore.open(tmp_path / "s.zarr").progress()[0] == 0
    assert not any(
        (tmp_path / "s.zarr" / name / "c").exists()
        for name in ("labels", "boxes", "flips", "records")
    )


def pooled(store: LabelStore, folder: Path, spec: ModelSpec) -> np.ndarray:
    """Return the features that a teacher's head sees of every crop: float32 [views,
    rows, features]."""
    teacher = load(spec)
    renderer = crop_renderer(
        [teacher.image_size],
        store.views,
        len(store.images),
        interpolation="bilinear",
        exif="ignore",
        threads=2,
    )
    blobs = [(folder / path).read_bytes() for path in store.images.path]
    crops = [store.crops(view, slice(None)) for view in range(store.views)]
    seen = renderer(
        blobs, np.stack([boxes for boxes, _ in crops]), np.stack([flips for _, flips in crops])
    )
    with torch.inference_mode():
        parts = [
            teacher.module.forward_features(teacher.normalise(view[teacher.image_size]))
            for view in seen
        ]
        return np.stack(
            [teacher.module.forward_head(part, pre_logits=True).numpy() for part in parts]
        )


def test_a_teacher_that_fails_on_one_image_leaves_nothing_of_its_shard(
    photos, recipe, store_path, tmp_path
):
    """The teacher's first output is near the largest float. Only the image with most of
    one feature takes the output beyond."""
    store, spec = LabelStore.open(store_path), recipe.teachers[0]
    features = pooled(store, photos / "train", spec)
    most = features.max(axis=0)  # [rows, features]
    second, first = np.sort(most, axis=0)[-2:]
    fit = (most.argmax(axis=0) >= 32) & (second > 0.15)  # an image after the first shard
    feature = int(np.argmax(np.where(fit, first / second.clip(0.15), 0)))
    row = int(most[:, feature].argmax())
    assert fit.any() and first[feature] > 1.01 * second[feature]
    near = 3e38
    factor = (float(np.finfo(np.float32).max) - near) / float(
        np.sqrt(first[feature] * second[feature])
    )

    def overflow(weights: dict) -> None:
        weights["fc.weight"].zero_()
        weights["fc.weight"][0, feature] = factor
        weights["fc.bias"].zero_()
        weights["fc.bias"][0] = near

    path = with_head(tmp_path / "once.safetensors", spec.model, overflow)
    once = recipe.model_copy(
        update={"teachers": (spec.model_copy(update={"checkpoint": str(path)}),)}
    )
    image = store.images.path[row]
    with pytest.raises(
        ModelError,
        match=rf"^teacher {spec.model} gives no finite output for {image} \(precision float32\); "
        rf"check its checkpoint",
    ):
        generate(once, photos, tmp_path / "s.zarr", device=CPU)
    made = LabelStore.open(tmp_path / "s.zarr")
    assert made.images.path[row] == image
    finished, shard = made.finished(), row // 32
    assert finished[:, :shard].all() and not finished[:, shard:].any()
    for name in ("labels", "boxes", "flips", "records"):
        assert not any(made.file(name, view, shard).exists() for view in range(made.views))
    assert verify(made.path).sound


# ---- malformed files


def malformed(dice: random.Random) -> dict[str, Callable[[], bytes]]:
    """Return ways to make a file that is no image, though it may begin like one."""
    photo = Image.fromarray(load_sample_images().images[0][200:290, 200:331])

    def good(kind: str, **how: object) -> bytes:
        out = io.BytesIO()
        photo.save(out, kind, **how)
        return out.getvalue()

    jpeg, progressive, bits, tagged, web = (
        good("JPEG"),
        good("JPEG", progressive=True),
        good("PNG"),
        good("TIFF"),
        good("WEBP"),
    )
    scan, later = jpeg.index(b"\xff\xda"), progressive.rindex(b"\xff\xda")

    def cut(content: bytes, least: float = 0.1, most: float = 0.9) -> bytes:
        return content[: int(len(content) * dice.uniform(least, most))]

    def put(content: bytes, place: int, value: bytes) -> bytes:
        return content[:place] + value + content[place + len(value) :]

    return {
        "empty": lambda: b"",
        "one byte": lambda: dice.randbytes(1),
        "noise": lambda: dice.randbytes(dice.randrange(2, 5000)),
        "zeros": lambda: bytes(dice.randrange(2, 5000)),
        "text": lambda: f"no image {dice.random()}\n".encode(),
        "a web page": lambda: (
            f"<!DOCTYPE html><html><body>404 {dice.random()}</body></html>".encode()
        ),
        "a drawing": lambda: (
            b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
        ),
        "a pickle": lambda: pickle.dumps(np.arange(dice.randrange(99))),
        "an archive": lambda: b"PK\3\4" + dice.randbytes(dice.randrange(30, 900)),
        "a film": lambda: b"\0\0\0\x20ftypisom" + dice.randbytes(dice.randrange(30, 900)),
        "an animation": lambda: good("GIF"),
        "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "the marker of a JPEG": lambda: b"\xff\xd8\xff" + dice.randbytes(dice.randrange(0, 9)),
        "a JPEG cut short": lambda: cut(jpeg),
        "a JPEG that ends after its header": lambda: jpeg[: scan + dice.randrange(2, 12)],
        "a JPEG without its beginning": lambda: jpeg[dice.randrange(20, scan) :],
        "a JPEG of no size": lambda: put(jpeg, jpeg.index(b"\xff\xc0") + 5, bytes(4)),
        "a JPEG of nine components": lambda: put(jpeg, jpeg.index(b"\xff\xc0") + 9, b"\x09"),
        "a JPEG of noise": lambda: jpeg[:200] + dice.randbytes(dice.randrange(500, 3000)),
        "a progressive JPEG cut short": lambda: progressive[
            : dice.randrange(progressive.index(b"\xff\xda") + 20, later)
        ],
        "a PNG cut short": lambda: cut(bits),
        "a PNG with another checksum": lambda: put(bits, 29, dice.randbytes(4)),
        "a PNG of noise": lambda: bits[:45] + dice.randbytes(dice.randrange(500, 3000)),
        "a PNG as a text file": lambda: bits.replace(b"\r\n", b"\n"),
        "a TIFF that is its own next page": lambda: put(
            tagged, 4, struct.pack("<I", dice.randrange(2**31))
        ),
        "a WebP cut short": lambda: cut(web),
        "a WebP of noise": lambda: web[:30] + dice.randbytes(dice.randrange(500, 3000)),
    }


def test_hundreds_of_malformed_files_of_many_kinds_are_left_out_and_the_good_ones_labelled(
    cage, commands, tmp_path
):
    data = small_photos(tmp_path / "data", 10)
    kinds = malformed(random.Random(0))
    for kind, make in kinds.items():
        for i in range(12):
            (data / "bee" / f"{kind} {i:02d}.jpg").write_bytes(make())
    c = commands(data, tmp_path / "s.zarr")
    generated, facts, checked = cage(c.generate, c.facts, c.verify_data, seconds=60)
    assert (generated.status, facts.status, checked.status) == (0, 0, 0), generated
    found = LabelStore.open(tmp_path / "s.zarr").images
    good = {f"{name}/{i:03d}.jpg" for name in ("ant", "bee", "cat") for i in range(10)}
    usable = set(found.path[found.status == USABLE])
    assert usable == good and len(found) == 30 + 12 * len(kinds)
    reasons = {
        kind: {
            r for p, r in zip(found.path, found.reason, strict=True) if p.startswith(f"bee/{kind} ")
        }
        for kind in kinds
    }
    assert all(
        reason and not CONTROL.search(reason) and "\n" not in reason
        for several in reasons.values()
        for reason in several
    )
    assert reasons["empty"] == {"empty file"} and reasons["text"] == {"not an image"}
    assert sum(kind["files"] for kind in json.loads(facts.out)["unusable"]) == 12 * len(kinds)


# ---- stores from strangers: seal and records are right, the described values are
# nonsense


@pytest.fixture
def copy(store_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store_path, tmp_path / "s.zarr"))


@pytest.fixture(scope="module")
def shards(store_path) -> dict[tuple[int, int], tuple[np.ndarray, list[np.ndarray]]]:
    """The record and the content of every shard."""
    store = LabelStore.open(store_path)
    return {
        place: (store.records()[place], store.content(*place)[0])
        for place in np.ndindex(store.views, store.shards)
    }


def set_in(document: dict, key: str, value: object) -> None:
    """Set a value by a dotted key; Ellipsis removes the key."""
    *parents, last = key.split(".")
    for name in parents:
        document = document[int(name) if isinstance(document, list) else name]
    if value is ...:
        del document[last]
    else:
        document[int(last) if isinstance(document, list) else last] = value


def forge(path: Path, shards: dict, changes: list[tuple[str, str, object]]) -> None:
    """Change values (file, dotted key, value) of a store's description as a malicious
    maker would: records and seal are right."""
    for file, key, value in changes:
        document = json.loads((path / file).read_text())
        set_in(document, key, value)
        (path / file).write_text(json.dumps(document))
    identity = schema.canonical_digest(
        json.loads((path / "zarr.json").read_text())["attributes"].get("provenance")
    )
    for (view, shard), (record, content) in shards.items():
        mine = np.array([record])
        mine["digest"] = np.frombuffer(
            schema.shard_digest(identity, view, shard, content.codes, *content.crops.arrays()), "u1"
        )
        (path / f"records/c/{view}/{shard}/0").write_bytes(with_checksum(mine.tobytes()))
    seal(path)


def seal(path: Path) -> None:
    """Seal a store as ``schema`` does, whatever the store describes."""
    write_seal(
        path,
        {
            file: json.loads(content)
            for file, content in tree(path).items()
            if file.endswith("zarr.json")
        },
    )


def with_checksum(content: bytes) -> bytes:
    """Append the checksum as Zarr's crc32c codec does."""
    return content + struct.pack("<I", crc32c(content))


def test_a_forgery_of_nothing_is_the_store(copy, store_path, shards):
    """Without this promise the tests below might try something else than they mean."""
    forge(copy, shards, [])
    assert {**tree(copy), "zarr.json": b""} == {**tree(store_path), "zarr.json": b""} and verify(
        copy
    ).sound


def attribute(key: str, *values: object) -> dict[str, list[tuple[str, str, object]]]:
    return {f"{key}={value!r:.40}": [("zarr.json", f"attributes.{key}", value)] for value in values}


def codec_value(key: str, *values: object) -> dict[str, list[tuple[str, str, object]]]:
    places = ("codec", "provenance.codec")
    return {
        f"codec.{key}={value!r}": [
            ("zarr.json", f"attributes.{place}.{key}", value) for place in places
        ]
        for value in values
    }


NAN, INF = float("nan"), float("inf")
BOXES = "boxes/zarr.json"
COLUMNS = tuple(Images.__dataclass_fields__)


def lengths(views: int = 2, rows: int = 90, chunk: int = 90) -> list[tuple[str, str, object]]:
    """Return changes to other lengths, in which all arrays agree."""
    changes: list[tuple[str, str, object]] = [("zarr.json", "attributes.views", views)]
    for name in ("labels", "boxes", "flips"):
        changes += [(f"{name}/zarr.json", "shape.0", views), (f"{name}/zarr.json", "shape.1", rows)]
    changes += [
        ("records/zarr.json", "shape.0", views),
        ("records/zarr.json", "shape.1", -(-rows // 32)),
    ]
    for name in COLUMNS:
        changes += [
            (f"images/{name}/zarr.json", "shape.0", rows),
            (f"images/{name}/zarr.json", "chunk_grid.configuration.chunk_shape.0", chunk),
        ]
    return changes


ACME = {"name": "acme.magic", "configuration": {}}
# Values that no store can have: every command refuses them.
ABSURD: dict[str, list[tuple[str, str, object]]] = {
    **attribute("views", 0, -1, 1.5, "2", None, True, 10**9),
    **attribute("provenance.layout.shard_rows", 0, -1, 10**30, "32", None),
    **attribute("provenance.layout.chunk_rows", 0, -1, 10**30, "32", 1.5),
    **codec_value("levels", 0, -255, 10**10, NAN, INF, "255", [255]),
    **codec_value("zero", NAN, INF, 0, -1, 1, "0"),
    **codec_value("exponent", NAN, INF, 0, -1, "a"),
    **codec_value("tail", -1, 10**10, NAN, "a"),
    **codec_value("dead_zone", NAN, -1, "a"),
    **codec_value("dtype", "object", "pickle", 5, None),
    **attribute(
        "class_names", [], [1, 2, 3], ["ant"] * 3, [["ant"], "bee", "cat"], "abc", None
    ),
    **attribute("provenance", None, [], {}),
    **attribute("provenance.crops", None, []),
    **attribute("provenance.data", None, []),
    **attribute("provenance.data.manifest", 5),
    **attribute("provenance.layout", None, [], {}),
    **attribute("codec", None, [], {}),
    "a class for three": [("zarr.json", "attributes.class_names", ["ant"])],
    "four for three": [("zarr.json", "attributes.class_names", ["ant", "bee", "cat", "dog"])],
    "codes of another width": codec_value("dtype", "uint16")["codec.dtype='uint16'"],
    "codes of another kind": codec_value("dtype", "float32")["codec.dtype='float32'"],
    "1e9 views": lengths(views=10**9),
    "1e6 views": lengths(views=10**6),
    "1e12 images": lengths(rows=10**12),
    "1e8 images": lengths(rows=10**8),
    "1e10 images in one chunk": lengths(rows=10**10, chunk=10**10),
    "1e12 classes": [("labels/zarr.json", "shape.2", 10**12)],
    "a negative length": [("labels/zarr.json", "shape.1", -90)],
    "half an image": [("labels/zarr.json", "shape.1", 90.5)],
    "a longer manifest": [(f"images/{name}/zarr.json", "shape.0", 91) for name in COLUMNS],
    "a longer column": [("images/status/zarr.json", "shape.0", 91)],
    "chunks of nothing": [(BOXES, "chunk_grid.configuration.chunk_shape.1", 0)],
    "boxes without edges": [(BOXES, "shape", [2, 90])],
    "labels of truth": [("labels/zarr.json", "data_type", "bool")],
    "labels of text": [("labels/zarr.json", "data_type", "string")],
    "labels of objects": [("labels/zarr.json", "data_type", "object")],
    "labels of nothing": [("labels/zarr.json", "data_type", None)],
    "boxes of fractions": [(BOXES, "data_type", "float32")],
    "paths of numbers": [("images/path/zarr.json", "data_type", "int64")],
    "a status of fractions": [("images/status/zarr.json", "data_type", "float32")],
    "labels in an unknown codec": [("labels/zarr.json", "codecs.0", ACME)],
    "boxes in an unknown codec": [(BOXES, "codecs.0", {"name": "acme.magic"})],
    "paths in an unknown codec": [("images/path/zarr.json", "codecs.0", ACME)],
}  # fmt: skip
# Values that make training from the store impossible.
ABSURD_IN_TRAINING: dict[str, list[tuple[str, str, object]]] = {
    **codec_value("levels", 1, 100),  # while codes are above
    **attribute("provenance.data.manifest", ...),  # without a digest of the images
    **attribute("fingerprint", [], {}, "x"),
    **attribute("fingerprint.rows", [10**9] * 64, [-1] * 64, ["a"] * 64, [], [0]),
    **attribute(
        "fingerprint.boxes",
        [[0, 0, 10**9, 10**9]] * 64,
        [[0, 0, 0, 0]] * 64,
        [[-5, 0, 9, 9]],
        [[-5, 0, 9, 9]] * 64,
        "x",
        None,
    ),
    **attribute("fingerprint.flips", None, [2] * 63),
    **attribute("fingerprint.rows", ...),
    **attribute("fingerprint.digests", ...),
    **attribute("provenance.crops.views", 2),
    **attribute("provenance.crops.cutmix", {"prob": 0, "beta": 1}),
    **attribute(
        "fingerprint.digests",
        {},
        {"1000000000": "0" * 64},
        {"100000000": "0" * 64},
        {"-1": "0" * 64},
        {"abc": "0" * 64},
        None,
    ),
    **attribute("provenance.crops.scale", [5, -1], [1, 0.5], "x", None),
    **attribute("provenance.crops.seed", -1, 10**40, "0"),
    **attribute("provenance.crops.flip", NAN, 7),
    **attribute("provenance.crops.interpolation", "lanczos", 5),
    **attribute("provenance.crops.exif", "perhaps"),
    **attribute("provenance.renderer", None, {}, []),
    **attribute("provenance.renderer.backend", "tpu", []),
    **attribute("provenance.teachers", None, "ab", [{}], 5),
    **attribute("provenance.teachers.0.image_size", "64", None),
}
ABSURD_IN_LABELLING_AGAIN: dict[str, list[tuple[str, str, object]]] = {
    **attribute("provenance.compute", None, {}),
    **attribute("provenance.compute.batch_size", 10**12, 0, -1, "16"),
    **attribute("provenance.compute.precision", "float7", 5),
    **attribute("provenance.teachers.0.image_size", 10**9, -1, 0, "64"),
    **attribute("provenance.teachers.0.mean", None, [1], "abc", [0.5, 0.5, 7]),
    **attribute(
        "provenance.merged",
        None,
        [],
        {},
        "x",
        [{}],
        [{"teachers": 0}],
        [{"identity": "0" * 64, "teachers": 1, "codec": {}, "compute": {}}],
    ),
    **attribute("provenance.teachers.0.weights", 5, None),
}


def word_of(what: str) -> str:
    """Return the word that a refusal of this absurdity must contain."""
    return what.split("=")[0].rsplit(".")[-1] if "=" in what else ""


@pytest.mark.parametrize("what", ABSURD)
def test_a_store_that_says_nonsense_is_refused_by_every_command_in_one_line(
    cage, commands, photos, copy, shards, what
):
    forge(copy, shards, ABSURD[what])
    c = commands(photos, copy)
    inspected, trained, verified = cage(c.inspect, c.train, c.verify, megabytes=2000)
    inspected.refused(word_of(what))
    trained.refused(word_of(what))
    assert not verified.trace, verified.trace
    assert verified.status == 1
    assert max(said.grown for said in (inspected, trained, verified)) < 500


@pytest.mark.parametrize("what", ABSURD_IN_TRAINING)
def test_a_store_that_says_nonsense_of_its_pictures_is_not_trained_from(
    cage, commands, photos, copy, shards, what
):
    forge(copy, shards, ABSURD_IN_TRAINING[what])
    c = commands(photos, copy)
    trained, inspected = cage([*c.train, "--set=render.backend=cpu"], c.inspect, megabytes=2000)
    trained.refused()
    assert not inspected.trace, inspected.trace
    assert trained.grown < 500


@pytest.mark.parametrize("what", ABSURD_IN_LABELLING_AGAIN)
def test_a_store_that_says_nonsense_of_its_teachers_can_not_be_labelled_again(
    cage, commands, photos, copy, shards, what
):
    forge(copy, shards, ABSURD_IN_LABELLING_AGAIN[what])
    sampled, inspected = cage(commands(photos, copy).sample, ["inspect", copy], megabytes=2000)
    assert not sampled.trace, sampled.trace
    assert sampled.status == 1 and sampled.grown < 500
    assert not inspected.trace, inspected.trace


TRIED_WITH_GENERATE = [
    "views='2'",
    "views=1000000000",
    "provenance.layout.shard_rows=0",
    "provenance.layout.shard_rows=-1",
    "provenance.layout.chunk_rows=0",
    "class_names=None",
    "class_names=[]",
    "provenance=None",
    "codec=None",
    "1e6 views",
    "chunks of nothing",
    "paths in an unknown codec",
    "fingerprint={}",
    "fingerprint.digests={}",
    *(
        key
        for key in ABSURD_IN_TRAINING
        if key.startswith(
            ("fingerprint.rows=[1", "fingerprint.boxes=[[-5", "provenance.teachers=[")
        )
    ),
]


@pytest.mark.parametrize("what", TRIED_WITH_GENERATE)
def test_generate_labels_puts_a_store_right_that_says_nonsense_or_refuses_it(
    cage, commands, photos, copy, shards, what
):
    forge(copy, shards, (ABSURD | ABSURD_IN_TRAINING)[what])
    c = commands(photos, copy)
    generated, verified = cage(c.generate, c.verify, megabytes=2000)
    assert not generated.trace, generated.trace
    if generated.status:
        generated.refused()
    else:
        assert verified.status == 0, verified
    assert generated.grown < 500


@pytest.mark.parametrize(
    "box",
    [
        [-5, 0, 9, 9],
        [0, -(2**31), 9, 9],
        [0, 0, 0, 0],
        [0, 0, -9, -9],
        [0, 0, 10**9, 10**9],
        [10**9, 0, 9, 9],
        [2**31 - 1] * 4,
    ],
)
def test_crops_outside_their_images_are_not_trained_from(cage, commands, photos, copy, box):
    """The maker of a store sealed these crops, and decoders believe any number."""
    writer = StoreWriter(copy)
    for view, shard in ((0, 0), (0, 2)):
        codes, crops = writer.store.content(view, shard)[0]
        boxes, flips = crops.arrays()
        write(
            writer, view, shard, codes, np.broadcast_to(np.array(box, np.int32), boxes.shape), flips
        )
    c = commands(photos, copy)
    trained, sampled = cage(c.train, [*c.sample, "--sample=180"], megabytes=2000)
    trained.refused("view 0", "generate")
    assert not sampled.trace and sampled.status == 1, sampled


def test_what_a_store_says_of_itself_reaches_no_terminal_as_it_is(
    cage, commands, photos, copy, shards
):
    bad = f"x\n{MARK} \x1b[31m\x9b31m[/b]"
    keys = [
        "provenance.teachers.0.model",
        "provenance.crops.policy",
        "provenance.compute.precision",
        "provenance.compute.device",
        "codec.name",
    ]
    changes = [
        ("zarr.json", f"attributes.{key}", bad)
        for key in (*keys, "provenance.codec.name", "provenance.crops.interpolation")
    ]
    changes += [
        ("zarr.json", "attributes.made_with", {bad: bad, "torch": bad}),
        ("zarr.json", "attributes.class_names", [bad, "bee", "cat"]),
    ]
    changes += [("zarr.json", "attributes.fingerprint.digests", {"48": "0" * 64, "64": "0" * 64})]
    forge(copy, shards, changes)
    c = commands(photos, copy)
    for said in cage(c.inspect, c.facts, c.verify, c.sample, c.train, c.generate, megabytes=2000):
        assert not said.trace, said.trace
        tame(said.out)
        tame(said.err)


@pytest.mark.parametrize("value", [None, [], "1.0", 5, {"torch": {"deep": [1]}}])
def test_versions_that_are_none_are_shown_or_refused_in_one_line(
    cage, commands, photos, copy, shards, value
):
    forge(
        copy,
        shards,
        [
            ("zarr.json", "attributes.made_with", value),
            ("zarr.json", "attributes.fingerprint.digests.48", "0" * 64),
        ],
    )
    c = commands(photos, copy)
    inspected, trained = cage(c.inspect, c.train, megabytes=2000)
    assert not inspected.trace, inspected.trace
    if inspected.status:
        inspected.refused("made_with")
    trained.refused()


# ---- stores from strangers: files that do harm when they are read


class Payload:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle"])
@pytest.mark.parametrize("name", ["images/path", "images/reason", "labels"])
def test_no_pickle_of_a_store_is_loaded(commands, photos, copy, shards, tmp_path, name, codec):
    payload = pickle.dumps(Payload(tmp_path / "harm"))
    pickle.loads(payload)  # the payload does harm when it is loaded
    (tmp_path / "harm").rmdir()
    forge(
        copy,
        shards,
        [
            (f"{name}/zarr.json", "codecs", [{"name": codec, "configuration": {}}]),
            (f"{name}/zarr.json", "data_type", "object"),
        ],
    )
    old = {
        "zarr_format": 2,
        "shape": [90],
        "chunks": [90],
        "dtype": "|O",
        "compressor": None,
        "fill_value": None,
        "order": "C",
    }
    # objects as Zarr 2 kept them
    (copy / name / ".zarray").write_text(json.dumps(old | {"filters": [{"id": "pickle"}]}))
    for chunk in (
        copy / name / "0",
        *(file for file in (copy / name / "c").rglob("*") if file.is_file()),
    ):
        chunk.write_bytes(payload)
    with pytest.raises(StoreError) as refusal:
        LabelStore.open(copy).probabilities(0, slice(0, 9))
    assert "\n" not in str(refusal.value)
    c = commands(photos, copy)
    for command in (c.inspect, c.verify_data, c.train, c.generate):
        # The tests above look at the refusal itself.
        CliRunner().invoke(main, list(map(str, command)))
        assert not (tmp_path / "harm").exists()


def test_a_whole_store_of_pickled_objects_is_refused(tmp_path):
    objects = np.empty(90, dtype=object)
    objects[:] = Payload(tmp_path / "harm")
    group = zarr.open_group(str(tmp_path / "s.zarr"), mode="w", zarr_format=2)
    group.attrs.update({"format": FORMAT, "format_version": 1})
    for name in ("labels", "records"):
        (tmp_path / "s.zarr" / name).mkdir()
        (tmp_path / "s.zarr" / name / ".zarray").write_text(
            json.dumps(
                {
                    "zarr_format": 2,
                    "shape": [90],
                    "chunks": [90],
                    "dtype": "|O",
                    "compressor": None,
                    "fill_value": None,
                    "order": "C",
                }
            )
        )
        (tmp_path / "s.zarr" / name / "0").write_bytes(numcodecs.Pickle().encode(objects))
    for look in (LabelStore.open, lambda path: LabelStore.open(path).images):
        with pytest.raises(StoreError):
            look(tmp_path / "s.zarr")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors"])
def test_no_pickle_of_a_checkpoint_is_loaded(recipe, photos, store_path, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    with_payload = recipe.teachers[0].model_copy(update={"checkpoint": str(path)})
    for save in (
        lambda: torch.save(
            {"fc.weight": torch.zeros(3, 4), "harm": Payload(tmp_path / "harm")}, path
        ),
        lambda: torch.save(Payload(tmp_path / "harm"), path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(Payload(tmp_path / "harm"))),
    ):
        save()
        with pytest.raises(ModelError, match="holds no weights that can be read") as refusal:
            generate(
                recipe.model_copy(update={"teachers": (with_payload,)}),
                photos,
                tmp_path / "s.zarr",
                device=CPU,
            )
        assert "\n" not in str(refusal.value) and not (tmp_path / "harm").exists()


def nested(depth: int, opening: str = '{"a":', closing: str = "}") -> str:
    return opening * depth + "1" + closing * depth


JSON_BOMBS: dict[str, tuple[str, Callable[[str], str]]] = {
    "lists": ("zarr.json", lambda text: nested(100_000, "[", "]")),
    "attributes": ("zarr.json", lambda text: text.replace('"pow8"', nested(100_000), 1)),
    "of an array": ("labels/zarr.json", lambda text: nested(100_000)),
    "of a column": ("images/path/zarr.json", lambda text: nested(100_000, "[", "]")),
    "a number of many digits": ("zarr.json", lambda text: text.replace("255", "9" * 100_000, 1)),
    "no end of a text": ("zarr.json", lambda text: text[:200] + '"' + "x" * 100_000),
}


@pytest.mark.parametrize("what", JSON_BOMBS)
def test_json_that_is_nested_without_end_is_refused_in_one_line(
    cage, commands, photos, copy, store_path, what
):
    file, edit = JSON_BOMBS[what]
    (copy / file).write_text(edit((copy / file).read_text()))
    c = commands(photos, copy)
    *refusing, verified, generated = cage(
        c.inspect, c.facts, c.train, c.verify, c.generate, megabytes=2000
    )
    for said in refusing:
        said.refused("is damaged", file)
    assert verified.status == 1 and file in verified.out and not verified.trace, verified.trace
    # generate-labels repairs this damage like any other.
    assert generated.status == 0 and tree(copy) == tree(store_path), generated.trace


@pytest.mark.parametrize("depth", [300, 900])
def test_a_nested_attribute_is_shown_or_refused_in_one_line(cage, commands, photos, copy, depth):
    """Python's functions may recurse less deep than its JSON reader."""
    document = json.loads((copy / "zarr.json").read_text())
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(5000)
    try:
        document["attributes"]["made_with"] = json.loads(nested(depth))
        (copy / "zarr.json").write_text(json.dumps(document))
        seal(copy)
    finally:
        sys.setrecursionlimit(limit)
    c = commands(photos, copy)
    *inspected, verified = cage(c.inspect, c.facts, c.verify, megabytes=2000)
    assert not verified.trace, verified.trace
    for said in inspected:
        assert not said.trace, said.trace
        if said.status:
            said.refused()


def zstd_of_zeros(size: int, says: int | None = None) -> bytes:
    """Make a Zstandard frame of ``size`` zeros: four bytes for every 128 KiB. says: the
    size that the header names."""
    blocks = size >> 17
    header = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", says or size)
    run, last = (1 << 17) << 3 | 1 << 1, 1
    return header + b"".join(
        struct.pack("<I", run | (last if i == blocks - 1 else 0))[:3] + b"\0" for i in range(blocks)
    )


INFLATING: dict[str, tuple[str, bytes]] = {
    "crops of 8 GB": ("boxes/c/0/0/0", zstd_of_zeros(8 << 30)),
    "crops that are said to be a terabyte": ("boxes/c/0/0/0", zstd_of_zeros(1 << 20, says=1 << 40)),
    "a column of 8 GB": ("images/status/c/0", zstd_of_zeros(8 << 30)),
    "paths of 8 GB": ("images/path/c/0", zstd_of_zeros(8 << 30)),
    "two thousand million paths": (
        "images/path/c/0",
        numcodecs.Zstd().encode(struct.pack("<I", 2**31 - 1) + b"\0\0\0\0"),
    ),
    "a path of four gigabytes": (
        "images/path/c/0",
        numcodecs.Zstd().encode(struct.pack("<II", 90, 2**32 - 1) + b"x"),
    ),
}


@pytest.mark.parametrize("what", INFLATING)
def test_a_chunk_that_grows_without_end_is_a_damaged_file(
    cage, commands, photos, copy, store_path, what
):
    file, content = INFLATING[what]
    assert len(content) < 1 << 20
    (copy / file).write_bytes(with_checksum(content))
    c = commands(photos, copy)
    inspected, trained, verified, generated = cage(
        c.inspect, c.train, c.verify, c.generate, megabytes=2000
    )
    trained.refused("generate-labels")
    assert not inspected.trace, inspected.trace
    assert verified.status == 1 and not verified.trace, verified.trace
    assert generated.status == 0 and tree(copy) == tree(store_path), generated.trace


STRANGE_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": instead(os.mkfifo),
    "an endless file": instead(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": instead(lambda path: path.symlink_to(path.name)),
    "a folder": instead(Path.mkdir),
}


HARMED = ("zarr.json", "labels/zarr.json", "images/path/c/0", "records/c/0/0/0", "labels/c/0/0/0")


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (kind, file)
        for kind in STRANGE_FILES
        for file in HARMED
        if kind in ("a pipe", "an endless file") or file[0] in "zr"
    ],
)
def test_a_file_of_a_store_that_is_no_file_is_refused_and_not_waited_for(
    cage, commands, photos, copy, kind, file
):
    """An archive can hold links and pipes, which unpacking makes."""
    STRANGE_FILES[kind](copy / file)
    c = commands(photos, copy)
    inspected, trained, verified = cage(c.inspect, c.train, c.verify, megabytes=2000, seconds=10)
    trained.refused()
    assert not inspected.trace, inspected.trace
    assert verified.status == 1 and not verified.trace, verified.trace
    assert max(said.grown for said in (inspected, trained, verified)) < 500
