"""Provenance: a command with other data, teachers or settings than the store's is
refused in one line, before anything changes. Differences that don't matter are taken.

Mismatches of CutMix are in test_cutmix.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.small import CPU, changed, edit_store, tree, write_teacher
from support.stages import generate, recheck, store_facts, train

from cache import LabelStore
from cache.errors import MealError
from cache.format.schema import VERSIONS
from cache.verify import verify
from cli import main
from pipeline.config import Config, ModelSpec
from pipeline.models.weights import load

pytestmark = pytest.mark.usefixtures("one_thread")

# A row of the last shard: the fingerprint doesn't render it, and no digest of it is
# compared before the row is read.
LATE = 80
SAME_TEACHERS, SAME_CROPS = (
    "; pass the same teachers and checkpoints",
    "; use the same crops section, or generate a new store",
)
SET_IT_SO = "; set it so, leave it out, or generate another store"
SAME_FOLDER = "; pass the folder it was made from, or generate a new store"
PUT_IT_BACK = "; put the image back as it was, or begin anew, with another store or --out"


@dataclass(frozen=True)
class Command:
    """The recipe, data and store that one of the two stages is run with."""

    recipe: Config
    data: Path  # a copy of the photographs
    store: Path  # a copy of the store, alone in its folder
    scratch: Path
    patch: pytest.MonkeyPatch
    classes: list[str] | None = None

    def generate(self) -> LabelStore:
        return generate(self.recipe, self.data, self.store, device=CPU, classes=self.classes)

    def train(self) -> dict:
        return train(
            self.recipe,
            self.data,
            self.scratch / "run",
            store=self.store,
            device=CPU,
            classes=self.classes,
        )

    @property
    def late(self) -> Path:
        """The image of a row of the last shard."""
        return self.data / "train" / LabelStore.open(self.store).images.path[LATE]


Change = Callable[[Command], Command]


@pytest.fixture
def command(photos, recipe, store_path, tmp_path, monkeypatch) -> Command:
    data = Path(shutil.copytree(photos, tmp_path / "photos"))
    store = Path(shutil.copytree(store_path, tmp_path / "stores" / "s.zarr"))
    return Command(changed(recipe, train={"epochs": 1}), data, store, tmp_path, monkeypatch)


def settings(**sections: dict) -> Change:
    return lambda c: replace(c, recipe=changed(c.recipe, **sections))


def teacher(place: int, make: Callable[[Command], dict] | None = None, **values: object) -> Change:
    """Change values of one teacher in the config."""

    def change(c: Command) -> Command:
        teachers = [spec.model_dump(exclude_unset=True) for spec in c.recipe.teachers]
        teachers[place] |= (make(c) if make else {}) | values
        return replace(
            c,
            recipe=Config.model_validate(
                c.recipe.model_dump(exclude_unset=True) | {"teachers": teachers}
            ),
        )

    return change


def renamed(c: Command) -> dict:
    """Copy the first teacher's weights to a file of another name."""
    copied = shutil.copy(c.recipe.teachers[0].checkpoint, c.scratch / "x.safetensors")
    return {"checkpoint": str(copied)}


def teachers(choose: Callable[[list], list]) -> Change:
    return lambda c: replace(
        c, recipe=c.recipe.model_copy(update={"teachers": tuple(choose(list(c.recipe.teachers)))})
    )


def files(edit: Callable[[Path], object]) -> Change:
    """Edit the folder of class folders."""

    def change(c: Command) -> Command:
        edit(c.data / "train")
        return c

    return change


def late_image(edit: Callable[[bytes], bytes]) -> Change:
    def change(c: Command) -> Command:
        before = c.late.read_bytes()
        after = edit(before)
        assert after != before
        c.late.write_bytes(after)
        return c

    return change


def made(edit: Callable[[dict], object]) -> Change:
    """Edit the store's attributes, as if the store had been made otherwise."""

    def change(c: Command) -> Command:
        edit_store(c.store, edit)
        return c

    return change


def classes(*names: str) -> Change:
    return lambda c: replace(c, classes=list(names))


def third_teacher(c: Command) -> Command:
    more = ModelSpec(
        model="test_resnet",
        checkpoint=str(write_teacher(c.scratch / "third.safetensors", "test_resnet", 3)),
    )
    return teachers(lambda both: [*both, more])(c)


def codec_of_another_version(attributes: dict) -> None:
    for place in (attributes, attributes["provenance"]):
        place["codec"]["levels"] = 127


def with_comment(jpeg: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xfe\x00\x06abcd" + jpeg[2:]


def with_other_density(jpeg: bytes) -> bytes:
    return jpeg.replace(b"JFIF\0\1\1", b"JFIF\0\1\2", 1)


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


# Change: (its function, words of generate-labels' refusal, words of train-student's).
# None: the store decides, and train-student doesn't ask. {late} is the path of the
# changed image, {then} and {now} its bytes.
REFUSED: dict[str, tuple[Change, list[str], list[str] | None]] = {
    "a teacher of another architecture": (
        teacher(
            1,
            lambda c: {
                "model": "test_resnet",
                "checkpoint": str(write_teacher(c.scratch / "t.safetensors", "test_resnet", 3)),
            },
        ),
        ["teachers.1.model test_efficientnet, this is test_resnet", SAME_TEACHERS],
        None,
    ),
    "a teacher less": (
        teachers(lambda both: both[:1]),
        ["teachers ['test_resnet', 'test_efficientnet'], this is ['test_resnet']", SAME_TEACHERS],
        None,
    ),
    "a teacher more": (
        third_teacher,
        [
            "['test_resnet', 'test_efficientnet'], "
            "this is ['test_resnet', 'test_efficientnet', 'test_resnet']",
            SAME_TEACHERS,
        ],
        None,
    ),
    "another order of the teachers": (
        teachers(lambda both: both[::-1]),
        ["test_resnet, this is test_efficientnet", SAME_TEACHERS, "in the same order"],
        None,
    ),
    "another size of a teacher": (
        teacher(1, image_size=64),
        ["teachers.1.image_size 48, this is 64", SAME_TEACHERS],
        None,
    ),
    "another mean of a teacher": (
        teacher(0, mean=[0.5, 0.5, 0.4]),
        ["teachers.0.mean.2 0.5, this is 0.4", SAME_TEACHERS],
        None,
    ),
    "another std of a teacher": (
        teacher(1, std=[0.229, 0.2, 0.225]),
        ["teachers.1.std.1 0.224, this is 0.2", SAME_TEACHERS],
        None,
    ),
    "another interpolation of a teacher": (
        teacher(0, lambda c: {"checkpoint": described(c, interpolation="bicubic")}),
        ["teachers.0.interpolation bilinear, this is bicubic", SAME_TEACHERS],
        None,
    ),
    "another area of the crops": (
        settings(crops={"scale": [0.08, 0.9]}),
        ["crops.scale.1 1.0, this is 0.9", SAME_CROPS],
        ["crops.scale is (0.08, 0.9)", "was made with (0.08, 1.0)", SET_IT_SO],
    ),
    "another aspect ratio of the crops": (
        settings(crops={"ratio": [0.5, 2.0]}),
        ["crops.ratio.0 0.75, this is 0.5", SAME_CROPS],
        ["crops.ratio is (0.5, 2.0)", "was made with (0.75, 1.33333", SET_IT_SO],
    ),
    "another probability of a flip": (
        settings(crops={"flip": 0.25}),
        ["crops.flip 0.5, this is 0.25", SAME_CROPS],
        ["crops.flip is 0.25", "was made with 0.5", SET_IT_SO],
    ),
    "another interpolation of the crops": (
        settings(crops={"interpolation": "bicubic"}),
        ["crops.interpolation bilinear, this is bicubic", SAME_CROPS],
        ["crops.interpolation is bicubic", "was made with bilinear", SET_IT_SO],
    ),
    "photographs turned by their EXIF": (
        settings(crops={"exif": "apply"}),
        ["crops.exif ignore, this is apply", SAME_CROPS],
        ["crops.exif is apply", "was made with ignore", SET_IT_SO],
    ),
    "another seed": (
        settings(crops={"seed": 1}),
        ["crops.seed 0, this is 1", SAME_CROPS],
        ["crops.seed is 1", "was made with 0", SET_IT_SO],
    ),
    "another backend of the renderer": (
        settings(render={"backend": "gpu"}),
        [
            "renderer.backend cpu, this is gpu",
            "; use the same render.backend, or generate a new store",
        ],
        ["render.backend is gpu", "was made with cpu", "; leave it out"],
    ),
    "a renderer that makes other steps": (
        made(lambda attributes: attributes["provenance"]["renderer"].update(steps="resize, slice")),
        [
            "another way to render crops (resize, slice; this version: slice, resize",
            "use the version of this program",
        ],
        None,
    ),
    "a renderer of other pixels": (
        made(lambda attributes: attributes["fingerprint"]["digests"].update({"48": "0" * 64})),
        [
            "renders other pixels than the teachers saw (at 48 px",
            "; install the versions it was made with",
        ],
        [
            "renders other pixels than the teachers saw (at 48 px",
            "or train with --allow-renderer-difference",
        ],
    ),
    "another codec": (
        settings(store={"codec": "cbrt8"}),
        ["codec.name pow8, this is cbrt8", "; use the same store.codec, or generate a new store"],
        None,
    ),
    "other parameters of the codec": (
        made(codec_of_another_version),
        ["codec.levels 127, this is 255", "; use the same store.codec, or generate a new store"],
        None,
    ),
    "another batch size": (
        settings(store={"batch_size": 8}),
        [
            "compute.batch_size 16, this is 8",
            "; use the same --batch-size, --device, store.precision and store.compile",
        ],
        None,
    ),
    "another precision": (
        settings(store={"precision": "bfloat16"}),
        [
            "compute.precision float32, this is bfloat16",
            "; use the same --batch-size, --device, store.precision and store.compile",
        ],
        None,
    ),
    "another device": (
        made(lambda attributes: attributes["provenance"]["compute"].update(device="cuda")),
        [
            "compute.device cuda, this is cpu",
            "; use the same --batch-size, --device, store.precision and store.compile",
        ],
        None,
    ),
    "an added image": (
        files(lambda train: shutil.copy(train / "ant/000.jpg", train / "bee/new.jpg")),
        ["1 of 90 images added, the first is bee/new.jpg", SAME_FOLDER],
        ["1 of 90 images added, the first is bee/new.jpg", SAME_FOLDER],
    ),
    "a removed image": (
        files(lambda train: (train / "bee/007.jpg").unlink()),
        ["1 of 90 images missing, the first is bee/007.jpg", SAME_FOLDER],
        ["1 of 90 images missing, the first is bee/007.jpg", SAME_FOLDER],
    ),
    "a renamed image": (
        files(lambda train: (train / "cat/007.jpg").rename(train / "cat/seven.jpg")),
        ["1 of 90 images missing, the first is cat/007.jpg", SAME_FOLDER],
        ["1 of 90 images missing, the first is cat/007.jpg", SAME_FOLDER],
    ),
    "an image in another class folder": (
        files(lambda train: (train / "ant/003.jpg").rename(train / "bee/030.jpg")),
        ["1 of 90 images missing, the first is ant/003.jpg", SAME_FOLDER],
        ["1 of 90 images missing, the first is ant/003.jpg", SAME_FOLDER],
    ),
    "two images of two classes in each other's place": (
        files(lambda train: swap(train / "ant/003.jpg", train / "bee/003.jpg")),
        ["2 of 90 images of another size or class, the first is ant/003.jpg", SAME_FOLDER],
        ["2 of 90 images of another size or class, the first is ant/003.jpg", SAME_FOLDER],
    ),
    "an image of the same pixels in other bytes": (
        late_image(with_comment),
        [
            "1 of 90 images of another size or class, the first is {late}",
            "{then}",
            "{now}",
            SAME_FOLDER,
        ],
        [
            "1 of 90 images of another size or class, the first is {late}",
            "{then}",
            "{now}",
            SAME_FOLDER,
        ],
    ),
    "an image of the same pixels in as many other bytes": (
        late_image(with_other_density),
        [
            "{late} has changed since the manifest was made (other contents: "
            "{now} bytes now, {then} then)",
            PUT_IT_BACK,
        ],
        [
            "{late} has changed since the manifest was made (other contents: "
            "{now} bytes now, {then} then)",
            PUT_IT_BACK,
        ],
    ),
    "an added class folder": (
        files(lambda train: shutil.copytree(train / "ant", train / "dog")),
        [
            "class folder of no known class (dog)",
            "where 3 classes (ant, bee, cat) are known",
            "take the folders away",
        ],
        [
            "has labels for 3 classes",
            "has 4 class folders",
            "not among them (dog)",
            "; pass the images that the store was made from",
        ],
    ),
    "an added class folder without images": (
        files(lambda train: (train / "dog").mkdir()),
        [
            "class folder of no known class (dog)",
            "where 3 classes (ant, bee, cat) are known",
            "take the folders away",
        ],
        [
            "has labels for 3 classes",
            "has 4 class folders",
            "not among them (dog)",
            "; pass the images that the store was made from",
        ],
    ),
    "a renamed class folder": (
        files(lambda train: (train / "bee").rename(train / "wasp")),
        ["class folder of no known class (wasp)", "where 3 classes (ant, bee, cat) are known"],
        [
            "has labels for 3 classes",
            "1 are not among them (wasp)",
            "; pass the images that the store was made from",
        ],
    ),
    "a removed class folder": (
        files(lambda train: shutil.rmtree(train / "bee")),
        ["30 of 90 images missing, the first is bee/000.jpg", SAME_FOLDER],
        ["30 of 90 images missing, the first is bee/000.jpg", SAME_FOLDER],
    ),
    "a class map of another order": (
        classes("ant", "cat", "bee"),
        ["another list of classes", "bee", "cat", "; pass that one again, or generate a new store"],
        ["another list of classes", "bee", "cat", "; leave it out, the store knows its classes"],
    ),
    "a class map with more classes": (
        classes("ant", "bee", "cat", "dog"),
        ["another list of classes", "dog", "; pass that one again, or generate a new store"],
        ["another list of classes", "dog", "; leave it out, the store knows its classes"],
    ),
}


def described(c: Command, **facts: object) -> str:
    """Save the first teacher's weights as this tool writes a checkpoint, with facts of
    the model."""
    path = c.scratch / "described.safetensors"
    save_file(
        load_file(c.recipe.teachers[0].checkpoint),
        path,
        metadata={"meal_v2": json.dumps({"model": "test_resnet", **facts})},
    )
    return str(path)


def require_refusal(command: Command, run: Callable[[], object], wanted: list[str]) -> None:
    """Require that the command is refused in one line that holds all wanted words, and
    that the store and its folder stay as they were."""
    store = LabelStore.open(command.store)
    known = {"late": store.images.path[LATE], "then": store.images.bytes[LATE]}
    known["now"] = command.late.stat().st_size if command.late.exists() else None
    before, beside = tree(command.store), os.listdir(command.store.parent)
    with pytest.raises(MealError) as refusal:
        run()
    line = str(refusal.value)
    assert "\n" not in line
    for words in wanted:
        assert words.format(**known) in line
    assert tree(command.store) == before and os.listdir(command.store.parent) == beside


def leave_a_shard_to_do(store: Path) -> None:
    """Remove a record, so that a command that isn't refused would change the store."""
    (store / "records/c/1/2/0").unlink()


@pytest.mark.parametrize("what", REFUSED)
def test_generate_labels_refuses_what_a_store_was_not_made_from(command, what):
    change, wanted, _ = REFUSED[what]
    command = change(command)
    leave_a_shard_to_do(command.store)
    require_refusal(command, command.generate, wanted)


@pytest.mark.parametrize("what", [what for what, (_, _, wanted) in REFUSED.items() if wanted])
def test_train_student_refuses_what_a_store_was_not_made_from(command, what):
    change, _, wanted = REFUSED[what]
    command = change(command)
    require_refusal(command, command.train, wanted)
    assert not (command.scratch / "run" / "state.pt").exists()


@pytest.mark.parametrize("tensor", ["conv1.0.weight", "layer1.0.bn1.running_var", "fc.bias"])
def test_one_changed_bit_of_one_tensor_is_other_weights(command, tensor):
    weights = load_file(command.recipe.teachers[0].checkpoint)
    first = weights[tensor].view(-1)
    first[0] = torch.nextafter(first[0], torch.tensor(9.0))
    save_file(weights, command.scratch / "bit.safetensors")
    other = teacher(0, checkpoint=str(command.scratch / "bit.safetensors"))(command)
    ours = load(other.recipe.teachers[0]).digest()
    theirs = LabelStore.open(command.store).provenance["teachers"][0]["weights"]
    leave_a_shard_to_do(command.store)
    require_refusal(
        other,
        other.generate,
        [f"teachers.0.weights {theirs[:12]}…, this is {ours[:12]}…", SAME_TEACHERS],
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_store_rendered_on_a_gpu_is_refused_in_one_line_where_there_is_none(command):
    command = made(lambda attributes: attributes["provenance"]["renderer"].update(backend="gpu"))(
        command
    )
    leave_a_shard_to_do(command.store)
    require_refusal(
        command,
        command.generate,
        ["renderer.backend gpu, this is cpu; use the same render.backend, or generate a new store"],
    )
    require_refusal(command, command.train, ["gpu"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("levels", 127), ("exponent", 0.5), ("zero", 1e-3), ("dtype", "uint16"), ("name", "cbrt8")],
)
def test_a_codec_that_is_not_the_provenances_decodes_nothing(command, key, value):
    """Labels are decoded by the attribute ``codec``, while completion records are bound
    to the provenance, which holds the codec too."""
    command = made(lambda attributes: attributes["codec"].update({key: value}))(command)
    before = tree(command.store)
    for read in (
        command.train,
        lambda: LabelStore.open(command.store).probabilities(0, slice(0, 3)),
    ):
        with pytest.raises(MealError, match="codec") as refusal:
            read()
        assert "\n" not in str(refusal.value)
    assert tree(command.store) == before


STAGES = {
    "generate-labels": Command.generate,
    "train-student": Command.train,
    "inspect": lambda c: store_facts(c.store),
    "verify": lambda c: recheck(c.store, c.data / "train", [], None),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("version", "says"),
    [
        (VERSIONS[-1] + 1, "it was made by a newer version: update this program"),
        (2**40, "it was made by a newer version: update this program"),
        (0, "use the version of this program that made it"),
        ("new", "use the version of this program that made it"),
        (None, "use the version of this program that made it"),
        (True, "use the version of this program that made it"),
        (3.0, "use the version of this program that made it"),
    ],
)
def test_every_stage_refuses_another_format_kindly(command, stage, version, says):
    edit_store(command.store, lambda attributes: attributes.update(format_version=version))
    reads = f"this program reads {VERSIONS[0]} to {VERSIONS[-1]}"
    with pytest.raises(MealError) as refusal:
        LabelStore.open(command.store)
    assert (
        str(refusal.value) == f"{command.store} has label store format {version}, {reads}; {says}"
    )
    before = tree(command.store)
    with pytest.raises(MealError) as refusal:
        STAGES[stage](command)
    assert (
        str(refusal.value) == f"{command.store} has label store format {version}, {reads}; {says}"
    )
    assert tree(command.store) == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_newer_format_is_refused_kindly_whatever_it_looks_like_inside(command, stage):
    """A newer store isn't damaged, and must not be mended."""
    shutil.rmtree(command.store)
    command.store.mkdir()
    attributes = {
        "format": "meal-v2-label-store",
        "format_version": 70,
        "seal": "of another kind",
        "provenance": ["rearranged"],
    }
    (command.store / "zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})
    )
    before = tree(command.store)
    for _ in range(2):
        with pytest.raises(
            MealError,
            match="has label store format 70, .*; "
            "it was made by a newer version: update this program",
        ):
            STAGES[stage](command)
        assert tree(command.store) == before
        (command.store / "records").mkdir(exist_ok=True)  # now with folders that our stores have
        (command.store / "labels").mkdir(exist_ok=True)


def test_a_refusal_is_one_line_and_status_1_on_the_command_line(command):
    config = command.scratch / "recipe.yaml"
    config.write_text(command.recipe.to_yaml())
    common = [
        f"--config={config}",
        f"--data={command.data}",
        f"--store={command.store}",
        "--device=cpu",
        "--set=crops.seed=1",
    ]
    for name, more in (
        ("generate-labels", []),
        ("train-student", [f"--out={command.scratch / 'run'}"]),
    ):
        before = tree(command.store)
        result = CliRunner().invoke(main, [name, *common, *more])
        assert result.exit_code == 1 and result.stdout == ""
        *others, last = result.stderr.splitlines()
        assert (
            last.startswith("error: ")
            and "crops.seed" in last
            and not any(line.startswith("error") for line in others)
        )
        assert tree(command.store) == before


# ---- differences that don't matter


def elsewhere(c: Command) -> Command:
    (away := c.scratch / "another name").mkdir()
    return replace(c, data=c.data.rename(away / "pictures"))


def behind_a_link(c: Command) -> Command:
    (c.scratch / "link").symlink_to(c.data)
    return replace(c, data=c.scratch / "link")


def by_links(train: Path) -> None:
    """Replace images by links to files elsewhere, as in subsets of large data sets."""
    away = train.parent / ".away"
    shutil.copytree(train, away)
    for image in away.glob("*/*.jpg"):
        (link := train / image.relative_to(away)).unlink()
        link.symlink_to(image)


def in_another_order(c: Command) -> Command:
    """Shuffle the lists of files, since a file system lists files in any order."""

    scandir, dice = os.scandir, random.Random(0)

    class Shuffled:
        """An iterator that is a context, like os.scandir's."""

        def __init__(self, path: str = ".") -> None:
            with scandir(path) as entries:
                listed = list(entries)
            dice.shuffle(listed)
            self.entries = iter(listed)

        def __iter__(self) -> Shuffled:
            return self

        def __next__(self) -> os.DirEntry:
            return next(self.entries)

        def __enter__(self) -> Shuffled:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def close(self) -> None:
            pass

    c.patch.setattr(os, "scandir", Shuffled)
    return c


def much_later(train: Path) -> None:
    for i, image in enumerate(sorted(train.glob("*/*.jpg"))):
        os.utime(image, (2e9 + i, 2e9 - i))


def beside_the_images(train: Path) -> None:
    (train / "ant/.DS_Store").write_text("hidden")
    (train / ".cache").mkdir()
    (train / ".cache/000.jpg").write_text("hidden")
    (train / "LICENSE").write_text("beside the class folders")


def as_pth(wrapped: bool) -> Callable[[Command], dict]:
    def make(c: Command) -> dict:
        weights = load_file(c.recipe.teachers[0].checkpoint)
        backwards = {name: weights[name].clone() for name in sorted(weights, reverse=True)}
        torch.save(
            {"epoch": 3, "state_dict": backwards} if wrapped else backwards,
            c.scratch / "weights.pth",
        )
        return {"checkpoint": str(c.scratch / "weights.pth")}

    return make


def with_counters(count: int | None) -> Callable[[Command], dict]:
    """Save weights whose BatchNorms counted other steps, or no steps (None)."""

    def make(c: Command) -> dict:
        weights = load_file(c.recipe.teachers[0].checkpoint)
        counters = [name for name in weights if name.endswith("num_batches_tracked")]
        assert counters
        for name in counters:
            if count is None:
                del weights[name]
            else:
                weights[name] = torch.tensor(count)
        save_file(weights, c.scratch / "counted.safetensors")
        return {"checkpoint": str(c.scratch / "counted.safetensors")}

    return make


NO_MATTER: dict[str, Change] = {
    "another path of the data folder": elsewhere,
    "the data folder by a symbolic link": behind_a_link,
    "images by symbolic links": files(by_links),
    "the class folders alone": lambda c: replace(c, data=c.data / "train"),
    "another order of files in the file system": in_another_order,
    "other times of files": files(much_later),
    "hidden files, and files beside the class folders": files(beside_the_images),
    "one thread": settings(render={"threads": 1}),
    "three threads": settings(render={"threads": 3}),
    "the class map that says what the folders say": classes("ant", "bee", "cat"),
}
NO_MATTER_TO_LABELS: dict[str, Change] = {
    **NO_MATTER,
    "one view per decode": settings(store={"views_per_decode": 1}),
    # The manifest has settled which images are usable.
    "a lower limit for large pictures": settings(render={"max_megapixels": 0.001}),
    "other rows of a shard": settings(store={"shard_rows": 16}),  # the store keeps its own
    "another student": settings(student={"model": "test_resnet"}, train={"lr": 1.0, "epochs": 9}),
    "a teacher's name with its tag": teacher(0, model="test_resnet.r160_in1k"),
    "a checkpoint of another name": teacher(0, renamed),
    "a checkpoint as this tool writes it": teacher(0, lambda c: {"checkpoint": described(c)}),
    "a checkpoint in torch's format": teacher(0, as_pth(wrapped=False)),
    "a checkpoint with other things around the weights": teacher(0, as_pth(wrapped=True)),
    "BatchNorms that counted other steps": teacher(0, with_counters(9)),
    "BatchNorms that counted no steps": teacher(0, with_counters(None)),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_MATTER_TO_LABELS)
def test_generate_labels_goes_on_to_the_same_bytes_with_what_does_not_matter(
    command, store_path, what
):
    leave_a_shard_to_do(command.store)
    command = NO_MATTER_TO_LABELS[what](command)
    command.generate()
    assert tree(command.store) == tree(store_path)
    assert verify(command.store).sound


@pytest.fixture(scope="module")
def trained(one_thread, photos, recipe, store_path, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The student's weights after an epoch."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(changed(recipe, train={"epochs": 1}), photos, out, store=store_path, device=CPU)
    return load_file(out / "last.safetensors")


@pytest.mark.parametrize("what", NO_MATTER)
def test_train_student_trains_the_same_student_with_what_does_not_matter(command, trained, what):
    command = NO_MATTER[what](command)
    command.train()
    student = load_file(command.scratch / "run" / "last.safetensors")
    assert student.keys() == trained.keys() and all(
        torch.equal(student[name], trained[name]) for name in trained
    )


def test_a_store_that_names_a_tag_goes_on_without_it(command, photos):
    tagged = teacher(0, model="test_resnet.r160_in1k")(command)
    path = command.scratch / "stores" / "tagged.zarr"
    wanted = tree(
        generate(changed(tagged.recipe, crops={"views": 1}), photos, path, device=CPU).path
    )
    leave = path / "records/c/0/2/0"
    leave.unlink()
    generate(changed(command.recipe, crops={"views": 1}), photos, path, device=CPU)
    assert tree(path) == wanted and leave.exists()
