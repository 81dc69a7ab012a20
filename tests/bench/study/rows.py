"""Define the study: two experiments, the rows of each, and the steps that make a row,
which are command lines of this tool."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from pipeline.config_file import load

ROOT = Path(__file__).parents[3]
FOLDER = "tests/bench/study"  # the folder of configs
WORK = "study"  # the folder that everything is made in
# Stores made by way of label files: name → source store, kept classes, codec.
COPIES = {
    "top5": ("float16", "top5", "float16"),
    "top10": ("float16", "top10", "float16"),
    "first-alone": ("first", "full", "pow8"),
    "second-alone": ("second", "full", "pow8"),
}


@dataclass(frozen=True)
class Step:
    """Command lines that are run once, one after the other.

    recipe: the configs of the commands, with the values that the commands set. needs:
    the steps before this step. makes: folders that are removed if the step was begun
    and not finished, since only half of the work would be timed. (A training goes on
    instead, since its metrics hold its time.) run: the folder of a training.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    recipe: str
    needs: tuple[Step, ...] = ()
    makes: tuple[str, ...] = ()
    run: str | None = None

    @property
    def identity(self) -> str:
        """The digest of the commands, of the values that their configs set, and of all
        steps before. Defaults of the program and the images aren't part of it."""
        told = json.dumps([self.commands, self.recipe, [step.identity for step in self.needs]])
        return hashlib.sha256(told.encode()).hexdigest()[:12]


def with_needs(steps: Iterable[Step]) -> list[Step]:
    """List the steps and all that they need, each once and after its needs."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.name not in found:
            for need in step.needs:
                visit(need)
            found[step.name] = step

    for step in steps:
        visit(step)
    return list(found.values())


@dataclass(frozen=True)
class Row:
    """A student, trained once a seed. sets: values that it changes in the config.
    store: the labels that it learns from, or None. start: the row whose students it
    starts from, or None for the config's student. against: the row that it is compared
    with."""

    name: str
    sets: tuple[str, ...] = ()
    store: str | None = "both"
    start: str | None = "hard from scratch"
    against: str | None = "soft"
    online: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Claim:
    """A question, and the rows that answer it."""

    question: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Experiment:
    """One student and two teachers on one data set. teachers: MODEL=CHECKPOINT. made:
    the values that each teacher's training sets; empty if the checkpoints are given.
    small_training: words that make every training short. base: the row whose spread and
    mean are drawn."""

    name: str
    student: str
    teachers: tuple[str, str]
    claims: tuple[Claim, ...]
    made: tuple[tuple[str, ...], ...] = ()
    class_map: tuple[str, ...] = ()
    small_training: tuple[str, ...] = ()
    base: str = "soft"

    @property
    def folder(self) -> str:
        return f"{WORK}/{self.name}"

    @property
    def rows(self) -> list[Row]:
        return [row for claim in self.claims for row in claim.rows]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def step(self, name: str, *commands: tuple[str, ...], **more: object) -> Step:
        """Make a step whose recipe holds its commands' configs. Of a config, stage one
        reads two sections."""
        told = []
        for words in commands:
            if "--config" in words:
                settings = [value for option, value in pairwise(words) if option == "--set"]
                config = load(ROOT / words[words.index("--config") + 1], None, settings).model_dump(
                    mode="json", exclude_unset=True
                )
                told.append(
                    {
                        key: config[key]
                        for key in (("crops", "store") if words[0] == "generate-labels" else config)
                    }
                )
        return Step(f"{self.name}/{name}", commands, json.dumps(told), **more)

    def training(self, config: str, out: str, *words: str) -> tuple[str, ...]:
        """Return a command that trains on the folder of training images alone, so that
        it doesn't validate. Evaluation comes after the training."""
        where = (
            "--config",
            f"{FOLDER}/{config}.yaml",
            "--data",
            f"{self.folder}/data/train",
            "--out",
            out,
        )
        return ("train-student", *where, *words, *self.small_training)

    def labelling(self, path: str, *words: str) -> tuple[str, ...]:
        where = (
            "--config",
            f"{FOLDER}/{self.name}.yaml",
            "--data",
            f"{self.folder}/data/train",
            "--store",
            path,
        )
        return ("generate-labels", *where, *self.class_map, *words)

    def evaluation(self, *words: str) -> tuple[str, ...]:
        return (
            "eval",
            "--data",
            f"{self.folder}/data",
            "--batch-size",
            "100",
            *self.class_map,
            "--json",
            *words,
        )

    def taught(self) -> tuple[Step, ...]:
        """Return the steps that train the teachers."""
        steps = []
        for teacher, sets in zip(self.teachers, self.made, strict=bool(self.made)):
            model, _, checkpoint = teacher.partition("=")
            run = str(Path(checkpoint).parent)
            words = [word for setting in sets for word in ("--set", setting)]
            command = self.training(f"{self.name}_teacher", run, "--student", model, *words)
            steps.append(self.step(f"teacher {model}", command, run=run))
        return tuple(steps)

    def teachers_alone(self) -> Step:
        """Return the step that evaluates the teachers and their ensemble."""
        words = [word for teacher in self.teachers for word in ("--model", teacher)]
        return self.step("teachers", self.evaluation(*words), needs=self.taught())

    def store(self, name: str) -> Step:
        """Return the step of stage one. Each teacher labels alone, in float32, and the
        labels are averaged into stores of several codecs, so that no teacher runs
        twice."""
        path = f"{self.folder}/{name}.zarr"
        made = {"makes": (path, f"{path}.claims")}
        if name in ("first", "second"):
            one = slice(name == "second", 1 + (name == "second"))
            words = ("--teacher", *self.teachers[one], "--set", "store.codec=float32")
            return self.step(name, self.labelling(path, *words), needs=self.taught()[one], **made)
        if name == "cutmix":
            words = [word for teacher in self.teachers for word in ("--teacher", teacher)]
            words += ["--set", "crops.cutmix={prob: 1.0, beta: 1.0}"]
            return self.step(name, self.labelling(path, *words), needs=self.taught(), **made)
        if name in COPIES:
            source, kept, codec = COPIES[name]
            files = f"{self.folder}/{name}"
            made["makes"] += (files,)
            export = (
                "export-labels",
                f"{self.folder}/{source}.zarr",
                "--out",
                files,
                "--labels",
                kept,
            )
            data = ("--data", f"{self.folder}/data/train", *self.class_map)
            load = (
                "import-labels",
                files,
                *data,
                "--store",
                path,
                "--codec",
                codec,
                "--interpolation",
                "bilinear",
            )
            return self.step(name, export, load, needs=(self.store(source),), **made)
        parts = (self.store("first"), self.store("second"))
        codec = "pow8" if name == "both" else name
        return self.step(
            name,
            ("merge", *(part.makes[0] for part in parts), "--out", path, "--codec", codec),
            needs=parts,
            **made,
        )

    def run(self, row: Row, seed: int) -> str:
        return f"{self.folder}/runs/{row.name.replace(' ', '-')}-{seed}"

    def trained(self, row: Row, seed: int) -> Step:
        """Return the step of a row: stage two, and the evaluation beside the
        teachers."""
        model, run = self.student.partition("=")[0], self.run(row, seed)
        teachers = [word for teacher in self.teachers for word in ("--teacher", teacher)]
        student, needs = self.student, list(self.taught())
        if row.start:
            start = self.row(row.start)
            student = f"{model}={self.run(start, seed)}/last.safetensors"
            needs.append(self.trained(start, seed))
        words = ["--student", student]
        if row.store:
            words += ["--store", f"{self.folder}/{row.store}.zarr"]
            needs.append(self.store(row.store))
        if row.online:
            words += ["--online", *teachers]
        words += [
            word for setting in (f"train.seed={seed}", *row.sets) for word in ("--set", setting)
        ]
        evaluation = self.evaluation("--model", f"{model}={run}/last.safetensors", *teachers)
        return self.step(
            f"{row.name}/{seed}",
            self.training(self.name, run, *words),
            evaluation,
            needs=tuple(needs),
            run=run,
        )


HARD = ("train.labels=hard", "train.discriminator=null")

CIFAR10 = (
    Claim(
        "Do soft labels help? (1, 2)",
        (
            Row(
                "hard from scratch",
                (*HARD, "train.lr=0.05", "crops.seed=1"),
                store=None,
                start=None,
                against=None,
            ),
            Row("hard", HARD),
            Row("soft", against=None),
            Row("soft from scratch", ("train.lr=0.05",), start=None, against="hard from scratch"),
        ),
    ),
    Claim("Does the store cost accuracy? (3)", (Row("online", store=None, online=True),)),
    Claim(
        "Which codec? (4)",
        (
            Row("float16", store="float16"),
            Row("tail40", store="tail40"),
            Row("top-5", store="top5"),
        ),
    ),
    Claim(
        "How many views? (5)",
        tuple(
            Row(f"{views} view{'s' * (views > 1)}", (f"train.views={views}",)) for views in (1, 4)
        ),
    ),
    Claim(
        "The discriminator? (6)",
        (
            Row("no discriminator", ("train.discriminator=null",)),
            Row("discriminator reversed", ("train.discriminator.reversal=true",)),
        ),
    ),
    Claim(
        "The hard label mixed in? (7)",
        tuple(
            Row(f"hard label {weight}", (f"train.hard_weight={weight}",)) for weight in (0.1, 0.5)
        ),
    ),
    Claim(
        "Is the ensemble needed? (8)",
        (Row("first teacher", store="first-alone"), Row("second teacher", store="second-alone")),
    ),
    Claim(
        "CutMix? (9)",
        (
            Row("CutMix faithful", store="cutmix"),
            Row("CutMix by area", ("train.cutmix={prob: 1.0, beta: 1.0}",)),
        ),
    ),
    Claim(
        "Several crops per decode? (10)",
        tuple(Row(f"{crops} crops", (f"train.crops_per_image={crops}",)) for crops in (2, 4)),
    ),
    Claim(
        "At other learning rates?",
        tuple(
            Row(
                f"{labels} lr {lr}",
                (*(HARD if labels == "hard" else ()), f"train.lr={lr}"),
                against=labels,
                seeds=(2,),
            )
            for lr in ("0.01", "0.1")
            for labels in ("hard", "soft")
        ),
    ),
)

PHOTOGRAPHS = (
    Claim("The recipe", (Row("soft", start=None, against=None),)),
    Claim(
        "Which codec? (4)",
        (
            Row("float16", store="float16", start=None),
            Row("tail40", store="tail40", start=None),
            Row("top-5", store="top5", start=None),
            Row("top-10", store="top10", start=None),
        ),
    ),
    Claim(
        "The discriminator? (6)",
        (
            Row("no discriminator", ("train.discriminator=null",), start=None),
            Row("discriminator reversed", ("train.discriminator.reversal=true",), start=None),
        ),
    ),
)

EXPERIMENTS = (
    Experiment(
        "cifar10",
        "test_byobnet",
        tuple(
            f"{model}=study/cifar10/teachers/{model}/last.safetensors"
            for model in ("test_resnet", "resnet10t")
        ),
        CIFAR10,
        # other crops than the labelled crops
        made=(("crops.seed=2",), ("crops.seed=3", "train.image_size=32", "train.epochs=32")),
    ),
    Experiment(
        "photographs",
        "tf_efficientnet_lite0=study/photographs/weights/tf_efficientnet_lite0.safetensors",
        tuple(
            f"tf_efficientnet_lite{i}=study/photographs/weights/tf_efficientnet_lite{i}.safetensors"
            for i in (1, 2)
        ),
        PHOTOGRAPHS,
        class_map=("--class-map", "imagenet-1k"),
    ),
)

# Forms of the discriminator, all against none. The other rows' configs have the form of
# version 0.6, in which they were measured.
FORMS = {
    "paper": ("train.discriminator.variant=paper",),
    "influence 0.05": (
        "train.discriminator.variant=paper",
        "train.discriminator.influence=0.05",
    ),
    "influence 0.1": ("train.discriminator.variant=paper", "train.discriminator.influence=0.1"),
    "unbounded, as in 0.6": (),
    "fkd_train_py": ("train.discriminator.variant=fkd_train_py",),
}


def _forms(experiment: Experiment, *more: Row) -> Experiment:
    start = experiment.row("soft").start
    none = Row("none", ("train.discriminator=null",), start=start, against=None)
    rows = [Row(name, sets, start=start, against="none") for name, sets in FORMS.items()]
    begun = [experiment.row(start)] if start else []
    claim = Claim("Which form of the discriminator?", (*begun, none, *rows, *more))
    return replace(experiment, claims=(claim,), base="none")


DISCRIMINATORS = (
    _forms(
        EXPERIMENTS[0],
        Row(
            "train_py",
            ("train.online=true", "train.discriminator.variant=train_py"),
            store=None,
            online=True,
            against="none",
        ),
    ),
    _forms(EXPERIMENTS[1]),
)
