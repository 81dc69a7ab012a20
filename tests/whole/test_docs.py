"""Every command line of the READMEs and helps can be typed: each is run, in a folder
with the files that it names.

Tiny models stand in for big models, random weights for weights of the hub, and small
numbers for the recipes' numbers. The command lines are unchanged but for torchrun.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import yaml
from support import containers
from support.bucket_server import Bucket
from support.command import run
from support.hub_server import a_hub
from support.paths import ROOT
from support.peers import reinforce
from support.small import write_photos
from support.web_server import WebServer

from cli import main
from pipeline.exchange import fkd_format, label_kinds
from pipeline.labelling import plan
from pipeline.models import names
from pipeline.models import weights as weights_module

WEB = "https://data.example.org"  # a server of the READMEs, for which a local one stands
WORDNET = ("n01440764", "n01443537", "n01484850")
COMMANDS = tuple(main.commands)


def lines_of(text: str) -> list[str]:
    """List the program's command lines in a text, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [
        line.split("  #")[0].strip()
        for line in joined.splitlines()
        if re.match(r"\s+(python|torchrun [^`]*?) ?cli\.py ", line)
    ]


ENGINES = ROOT / "pipeline" / "labelling" / "engines"
READMES = sorted(
    path
    for path in {ROOT / "README.md", *ROOT.glob("*/**/README.md"), *ENGINES.glob("*.md")}
    if not {".venv", "demo", "study"} & set(path.relative_to(ROOT).parts[:1])
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in READMES}
EVERYTHING = "\n".join(TEXTS.values())


def sections() -> dict[str, list[str]]:
    """Collect command lines of READMEs by file and heading, of helps by command."""
    found: dict[str, list[str]] = {}
    for file, text in TEXTS.items():
        for part in re.split(r"^#+ ", text, flags=re.M)[1:]:
            if lines := lines_of(part):
                found[f"{file}: {part.splitlines()[0]}"] = lines
    for name, command in main.commands.items():
        found[f"{name} --help"] = lines_of((command.help or "").replace("\b", ""))
    return found


SECTIONS = sections()


def test_every_command_has_help_with_an_example_and_is_in_the_readme():
    readme = TEXTS["README.md"]
    for name in COMMANDS:
        assert SECTIONS[f"{name} --help"] and all(
            f"cli.py {name}" in line for line in SECTIONS[f"{name} --help"]
        )
        assert f"`{name}`" in readme
    assert sum(map(len, SECTIONS.values())) > 40


def test_every_option_in_the_readme_exists():
    known = {
        option
        for command in main.commands.values()
        for parameter in command.params
        for option in parameter.opts
    }
    for lines in SECTIONS.values():
        for line in lines:
            words = shlex.split(line.partition("cli.py ")[2])
            own = {
                option for parameter in main.commands[words[0]].params for option in parameter.opts
            }
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= own, line
    named = set(re.findall(r"`(--[a-z][a-z0-9_-]+)", EVERYTHING))
    # options of FKD and MEAL V2, of torchrun, of every command
    assert named - known <= {
        "--ff",
        "--lf",
        "--softlabel_path",
        "--soft_label_type",
        "--num_classes",
        "--imagenet",
        "--use_fp16",
        "--d_lr",
        "--reference_path",
        "--nproc-per-node",
        "--max-restarts",
        "--requeue",
        "--signal",
        "--help",
        # docker's
        "--entrypoint",
        "--shm-size",
        "--user",
    }


class World:
    """A folder in which commands are typed. A section's own commands make their results
    anew, and all other files that the section names are prepared."""

    bucket: Bucket  # for commands that name one
    web: WebServer

    def __init__(self, folder: Path, recipe: str, data: str) -> None:
        self.folder, self.recipe, self.data = folder, recipe, data

    def make(self, name: str) -> None:
        """Prepare a file or folder that a command names, unless it exists."""
        place = self.folder / name
        if name in PREPARED and not place.exists():
            PREPARED[name](self, place)

    def command(self, *words: object) -> None:
        status, _, err = run(*words)
        assert status == 0, f"{words}\n{err}"

    def type(self, section: str) -> None:
        made: set[tuple[str, str | None]] = set()
        for line in SECTIONS[section]:
            line = line.replace("$SLURM_ARRAY_TASK_ID/16", "0/1")  # all shares in one
            # Workers of Ray are processes without stand-ins; test_ray.py has them.
            line = re.sub(r" --ray(-workers)? \S+", "", line)
            if WEB in line:
                line = line.replace(WEB, self.web.url)
            words = shlex.split(line.partition("cli.py ")[2])
            if words == ["demo"]:  # short_demo runs the demo, with the demo's own models
                continue
            results = results_of(words)
            for word in words:
                name = word.partition("=")[2] or word
                if name not in results:
                    self.make(name)
            images = words[words.index("--data") + 1] if "--data" in words else None
            for result in results - {name for name, of in made if of == images}:
                for name in (result, *TRAINED.get(result, ())):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            made |= {(result, images) for result in results}
            self.command(*words)


# What is trained from a store, and is of no use once the store is made anew.
TRAINED = {"labels.zarr": ("run", "baseline")}


def results_of(words: list[str]) -> set[str]:
    """Return the files and folders that a command makes."""
    fills = words[0] in ("generate-labels", "import-labels") and "--plan" not in words
    options = {"--out", "--store"} if fills else {"--out"}
    return {value for option, value in pairwise(words) if option in options}


def store(world: World, place: Path) -> None:
    """Make the READMEs' label store."""
    how = ["--config", world.recipe, "--data", world.data, "--store", place]
    for teacher in ("teacher-resnet50", "teacher-efficientnet") if world.data == "data" else ():
        world.make(teacher)
    world.command("generate-labels", *how)


def student(world: World, place: Path) -> None:
    """Train the READMEs' run, or the baseline, which sees the same crops."""
    world.make("labels.zarr")
    hard = ["--set", "train.labels=hard", "--set", "train.discriminator=null"]
    how = ["--config", world.recipe, "--data", world.data, "--store", "labels.zarr"]
    world.command(
        "train-student", *how, "--out", place, *(hard if place.name == "baseline" else ())
    )


def teacher(model: str) -> Callable[[World, Path], None]:
    """Return a function that trains a teacher on an own data set."""

    def make(world: World, place: Path) -> None:
        how = ["--config", "configs/own_teacher.yaml", "--data", "data"]
        world.command("train-student", *how, "--out", place, "--student", model)

    return make


def half(keep: int) -> Callable[[World, Path], None]:
    """Return a function that makes a store whose other half another cluster has."""

    def make(world: World, place: Path) -> None:
        world.make("labels.zarr")
        shutil.copytree(world.folder / "labels.zarr", place)
        shutil.rmtree(place / "records" / "c" / str(1 - keep))

    return make


def by_one(teacher: str) -> Callable[[World, Path], None]:
    def make(world: World, place: Path) -> None:
        status, _, err = run(
            "generate-labels",
            "--config",
            "configs/meal_v2_resnet50.yaml",
            "--data",
            "imagenet",
            "--store",
            place,
            "--teacher",
            teacher,
        )
        assert status == 0, err

    return make


def weights(model: str, classes: int, prefix: str = "") -> Callable[[World, Path], None]:
    def make(world: World, place: Path) -> None:
        tensors = {
            prefix + name: tensor
            for name, tensor in weights_module._create(model, pretrained=False, num_classes=classes)
            .state_dict()
            .items()
        }
        if place.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, place)
        else:
            torch.save({"state_dict": tensors}, place)

    return make


def label_files(world: World, place: Path) -> None:
    for image in sorted((world.folder / "imagenet" / "train").glob("*/*")):
        file = place / fkd_format.place_of(f"{image.parent.name}/{image.name}", "train")
        file.parent.mkdir(parents=True, exist_ok=True)
        crops, p = (
            torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2).numpy(),
            torch.rand(2, 1000).softmax(dim=1).numpy(),
        )
        with open(file, "wb") as f:
            fkd_format.write(
                f, crops, torch.zeros(2, dtype=torch.bool).numpy(), label_kinds.sparse(p, 5)
            )


def in_form(write: Callable[[Path, Path], Path]) -> Callable[[World, Path], None]:
    """Return a function that writes ImageNet's images in another form."""

    def make(world: World, place: Path) -> None:
        write(world.folder / "imagenet" / "train", place)

    return make


def shared(world: World, place: Path) -> None:
    """Share the READMEs' label store."""
    world.make("labels.zarr")
    world.command("share", "labels.zarr", "--to", "lab/imagenet-labels")


def pictures(world: World, place: Path) -> None:
    """Make a folder of images without classes."""
    place.mkdir()
    for image in (world.folder / "imagenet" / "train").glob("*/*"):
        shutil.copy(image, place)


PREPARED: dict[str, Callable[[World, Path], None]] = {
    "labels.zarr": store,
    "run": student,
    "baseline": student,
    "reference": student,
    "teacher-resnet50": teacher("resnet50"),
    "teacher-efficientnet": teacher("tf_efficientnet_b4"),
    "run/best.safetensors": lambda world, place: world.make("run"),
    "teacher-resnet50/best.safetensors": lambda world, place: world.make("teacher-resnet50"),
    "teacher-efficientnet/best.safetensors": lambda world, place: world.make(
        "teacher-efficientnet"
    ),
    "here.zarr": half(0),
    "there.zarr": half(1),
    "senet.zarr": by_one("senet154"),
    "resnet.zarr": by_one("resnet152_v1s"),
    "lite1.safetensors": weights("tf_efficientnet_lite1", 3),
    "lite2.safetensors": weights("tf_efficientnet_lite2", 3),
    "MEALV2_MobileNet_V3_Small_0.75_224.pth": weights("tf_mobilenetv3_small_075", 1000, "module."),
    "MEALV2_ResNet50_380.pth": weights("resnet50", 1000, "module."),
    "MEALV2_ResNet50_224.pth": weights("resnet50", 1000, "module."),
    "FKD_soft_label_500_crops_marginal_smoothing_k_5": label_files,
    "shards": in_form(containers.as_shards),
    "shards/photos-train-{000000..000002}.tar": lambda world, place: world.make("shards"),
    "parquet": in_form(containers.parquet()),
    "imagenet/train.csv": in_form(containers.as_list),
    "pictures": pictures,
    "hf://lab/imagenet-labels": shared,
    "s3://pictures/shards": lambda world, place: world.bucket.put(
        containers.as_shards(world.folder / "imagenet" / "train", world.folder / "up"), "shards"
    ),
    "imagenet_plus_rrc_mini": lambda world, place: reinforce(
        place, world.folder / "imagenet" / "train", classes=1000
    ),
}


@pytest.fixture(scope="module")
def worlds(
    short_demo: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[World]]:
    """Two folders with images and recipes, for ImageNet and for an own data set, and
    tiny models under the names of big ones."""
    folder = tmp_path_factory.mktemp("world")
    write_photos(folder / "data" / "train", 4)
    write_photos(folder / "data" / "val", 2, seed=1)
    (folder / "photos").symlink_to("data")
    (folder / "demo").symlink_to(short_demo[0])
    for split in ("train", "val"):
        for name in names.imagenet_classes():
            (folder / "imagenet" / split / name).mkdir(parents=True)
        for own, name in zip(("ant", "bee", "cat"), WORDNET, strict=True):
            for file in sorted((folder / "data" / split / own).iterdir()):
                shutil.copy(
                    file,
                    folder / "imagenet" / split / name / f"{name}_{10026 + int(file.stem)}.JPEG",
                )
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        (folder / "configs" / path.name).write_text(
            yaml.safe_dump(smaller(yaml.safe_load(path.read_text())))
        )

    create = weights_module._create
    tiny = {"fc": "test_resnet", "classifier": "test_efficientnet", "head": "test_vit"}

    def small(name: str, *, pretrained: bool, **options: int) -> torch.nn.Module:
        torch.manual_seed(zlib.crc32(name.encode()))
        head = (
            timm.get_pretrained_cfg(name).to_dict() if timm.is_model(name.partition(".")[0]) else {}
        ).get("classifier", "fc")
        return create(
            name if name.startswith("test_") or ":" in name else tiny.get(head, "test_resnet"),
            pretrained=False,
            **options,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "_create", small)
        patch.setattr(plan, "SECONDS", 0.01)
        own = tmp_path_factory.mktemp("own")
        shutil.copytree(folder, own, symlinks=True, dirs_exist_ok=True)
        yield [
            World(folder, "configs/meal_v2_resnet50.yaml", "imagenet"),
            World(own, "configs/own_data.yaml", "data"),
        ]


def smaller(document: dict) -> dict:
    """Shrink a recipe to one that takes seconds."""
    for teacher in document.get("teachers", ()):
        if "checkpoint" not in teacher:
            teacher["image_size"] = 32
    document.setdefault("crops", {})["views"] = 2
    document.setdefault("store", {}).update(batch_size=8, shard_rows=8)
    document.setdefault("train", {}).update(epochs=2, milestones=[], batch_size=6, image_size=32)
    if "warmup_epochs" in document["train"]:
        document["train"]["warmup_epochs"] = 1
    return document


@pytest.mark.parametrize("section", [name for name, lines in SECTIONS.items() if lines])
def test_what_is_written_can_be_typed(section, worlds, monkeypatch, request):
    world = worlds["Your own" in section or "A run" in section]
    monkeypatch.chdir(world.folder)
    for exported in re.findall(r"^    export (\w+)=(\w+)", EVERYTHING, flags=re.M):
        monkeypatch.setenv(*exported)
    if any("s3://" in line for line in SECTIONS[section]):
        world.bucket = request.getfixturevalue("seaweed")
        for name, value in world.bucket.variables.items():
            monkeypatch.setenv(name, value)
    if any(WEB in line for line in SECTIONS[section]):
        world.web = WebServer().start()
        request.addfinalizer(world.web.stop)
        world.make("shards")
        for file in (world.folder / "shards").iterdir():
            world.web.files[f"/photos/{file.name}"] = file.read_bytes()
    if any(re.search(r"hf://|--push|cli\.py share", line) for line in SECTIONS[section]):
        stack = ExitStack()
        request.addfinalizer(stack.close)
        stack.enter_context(a_hub(request.getfixturevalue("tmp_path")))
    world.type(section)


def test_the_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"(?:`|^    )make (\w+)", EVERYTHING, flags=re.M))
    assert {"setup", "demo", "bench", "test"} <= named <= targets


def prose(text: str) -> list[str]:
    """List a README's lines of prose: no table, link, picture or code."""
    lines, code = [], False
    for line in text.splitlines():
        code ^= line.startswith("```")
        if not (code or line.startswith(("|", "    ", "```", "!["))):
            lines.append(re.sub(r"\]\([^)]*\)", "]", line))
    return lines


def anchors(text: str) -> set[str]:
    """Return the headings as GitHub names them in addresses."""
    heads = re.findall(r"^#+ (.*)", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere():
    links = 0
    for file, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            place, _, anchor = target.partition("#")
            there = (ROOT / file).parent / place if place else ROOT / file
            there = there / "README.md" if there.is_dir() else there
            assert there.resolve().is_relative_to(ROOT) and there.exists(), f"{file}: {target}"
            if anchor:
                assert anchor in anchors(there.read_text()), f"{file}: {target}"
            links += 1
    assert links > 30


def test_a_readme_is_short_and_its_lines_too():
    assert len(TEXTS) >= 10
    assert len(TEXTS["README.md"].splitlines()) <= 200
    for file, text in TEXTS.items():
        for line in prose(text):
            assert len(line) <= 88 or "Within the spread" in line, f"{file}: {line}"


@pytest.mark.parametrize("reader", ["configs/README.md", "pipeline/labelling/README.md"])
def test_who_has_own_images_or_gpus_finds_the_page_from_the_root(reader):
    links = re.findall(r"\]\(([^)#\s]+)", TEXTS["README.md"])
    pages = (link if link.endswith(".md") else f"{link.rstrip('/')}/README.md" for link in links)
    assert reader in set(pages)


def test_a_help_is_quick():
    """No command's help loads a library that takes seconds."""
    code = (
        "import sys; from click.testing import CliRunner; from cli import main; "
        "CliRunner().invoke(main, ['train-student', '--help']); "
    )
    code += (
        "print([name for name in ('torch', 'timm', 'nvidia.dali', 'matplotlib', 'tensorboard') "
        "if name in sys.modules])"
    )
    command = f"cd {shlex.quote(str(ROOT))} && {shlex.quote(sys.executable)} -c "
    assert os.popen(command + shlex.quote(code)).read().strip() == "[]"
