"""Whatever ends a validation loses no epoch: the next start validates, trains no step
of the epoch again, and ends with the run of an undisturbed training."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.small import CPU, changed
from support.stages import train
from support.workers import House, When, require_no_trace

from cache.errors import MealError
from cache.system.signals import Stopped
from pipeline import evaluation
from pipeline.config import Config
from pipeline.exchange.trained import read_run
from pipeline.images.patience import DataError
from pipeline.runs.compare import compare
from pipeline.runs.folder import RunFolder
from pipeline.training.loop import Run

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6  # of an epoch: 90 images in batches of 16
JUDGED = {"discriminator": {"lr": 0.01}}  # whose weights the state holds too
CLOCK = {"seconds", "images_per_second"}  # figures that no two trainings have in common


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(metrics: list[dict]) -> list[dict]:
    return [{name: m[name] for name in m if name not in CLOCK} for m in metrics]


def require_same_run(one: Path, other: Path) -> None:
    """Require runs to be the same, bit for bit, but for the seconds that they took."""
    for name in ("last.safetensors", "best.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert without_clock(metrics_of(one)) == without_clock(metrics_of(other))
    mine, theirs = (torch.load(run / "state.pt", weights_only=True) for run in (one, other))
    for state in (mine, theirs):
        state["metrics"] = without_clock(state["metrics"])
    require_equal(mine, theirs)


def require_equal(one: object, other: object) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            require_equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            require_equal(mine, theirs)
    else:
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same


def require_readable(run: Path, epochs: int) -> None:
    """Require that a run whose newest epoch isn't validated can be compared and
    exported, and says of that epoch what it knows."""
    (newest,) = RunFolder(run).metrics()[epochs - 1 :]
    assert "val_top1" not in newest and newest["loss"] > 0
    (facts,) = compare([run]).runs
    assert facts.epochs == epochs and facts.top1 is None
    assert read_run(run, "last").epochs == epochs
    if epochs > 1:
        assert read_run(run, "best").figures["val_top1"] is not None
    else:
        with pytest.raises(MealError, match=r"there is no .*best.safetensors"):
            read_run(run, "best")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list:
    """Steps that this process trains; one entry each."""
    taken: list = []
    step = Run._step

    def counted(self: Run, batch: object) -> torch.Tensor:
        taken.append(self.epoch)
        return step(self, batch)

    monkeypatch.setattr(Run, "_step", counted)
    return taken


@dataclass
class Student:
    """One training in this process."""

    recipe: Config
    photos: Path
    store: Path

    def __call__(self, out: Path, epochs: int, photos: Path | None = None) -> dict:
        given = changed(self.recipe, train={**JUDGED, "epochs": epochs})
        return train(given, photos or self.photos, out, store=self.store, device=CPU)


@pytest.fixture
def student(recipe: Config, photos: Path, store_path: Path) -> Student:
    return Student(recipe, photos, store_path)


@pytest.fixture(scope="module")
def whole(recipe, photos, store_path, tmp_path_factory) -> Callable[[int], Path]:
    """Undisturbed runs of one and two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    for epochs in (1, 2):
        Student(recipe, photos, store_path)(folder / str(epochs), epochs)
    return lambda epochs: folder / str(epochs)


def vanish(photo: Path) -> None:
    photo.unlink()


def change(photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("befalls", [vanish, change])
def test_an_image_that_vanishes_or_changes_loses_no_epoch(
    student, whole, steps, tmp_path, monkeypatch, befalls, epochs
):
    """In the first epoch of one or of two. The image is put back before the next
    start."""
    photos, run = Path(shutil.copytree(student.photos, tmp_path / "photos")), tmp_path / "run"
    photo, evaluate = photos / "val" / "bee" / "003.jpg", evaluation.evaluate
    with monkeypatch.context() as patch:

        def disturbed(*given: object, **how: object) -> object:
            befalls(photo)
            return evaluate(*given, **how)

        patch.setattr("pipeline.training.loop.evaluate", disturbed)
        with pytest.raises(DataError, match=rf"{photo} .*; run the same command again"):
            student(run, epochs, photos)
    assert len(steps) == STEPS
    require_readable(run, 1)
    before = metrics_of(run)
    shutil.copy(student.photos / "val" / "bee" / "003.jpg", photo)
    student(run, epochs, photos)
    assert len(steps) == epochs * STEPS
    require_same_run(run, whole(epochs))
    # The epoch has the seconds of its only training.
    assert {key: metrics_of(run)[0][key] for key in before[0]} == before[0]


def test_an_image_that_stays_away_is_no_longer_validated_on(
    student, whole, steps, tmp_path, monkeypatch
):
    photos, run = Path(shutil.copytree(student.photos, tmp_path / "photos")), tmp_path / "run"
    evaluate = evaluation.evaluate

    def disturbed(*given: object, **how: object) -> object:
        (photos / "val" / "bee" / "003.jpg").unlink(missing_ok=True)
        return evaluate(*given, **how)

    monkeypatch.setattr("pipeline.training.loop.evaluate", disturbed)
    with pytest.raises(DataError, match="can't be read any more"):
        student(run, 1, photos)
    metrics = student(run, 1, photos)
    assert len(steps) == STEPS
    assert metrics["val_top1"] * 20 / 100 == pytest.approx(round(metrics["val_top1"] * 20 / 100))


@pytest.mark.parametrize("error", [Stopped("SIGTERM"), torch.OutOfMemoryError("out of memory")])
def test_a_signal_or_want_of_memory_loses_no_epoch(
    student, whole, steps, tmp_path, monkeypatch, error
):
    run = tmp_path / "run"
    student(run, 1)
    with monkeypatch.context() as patch:

        def disturbed(*given: object, **how: object) -> object:
            raise error

        patch.setattr("pipeline.training.loop.evaluate", disturbed)
        for _ in range(3):  # and again, while only the validation is missing
            with pytest.raises(type(error)):
                student(run, 2)
    assert len(steps) == 2 * STEPS
    require_readable(run, 2)
    student(run, 2)
    assert len(steps) == 2 * STEPS
    require_same_run(run, whole(2))


@pytest.mark.parametrize("epochs", [1, 2])
def test_without_its_validation_images_a_run_goes_on_unvalidated(
    student, steps, tmp_path, monkeypatch, capsys, epochs
):
    photos, run = Path(shutil.copytree(student.photos, tmp_path / "photos")), tmp_path / "run"
    with monkeypatch.context() as patch:

        def disturbed(*given: object, **how: object) -> object:
            shutil.rmtree(photos / "val")
            raise DataError("no val")

        patch.setattr("pipeline.training.loop.evaluate", disturbed)
        with pytest.raises(DataError, match="no val"):
            student(run, epochs, photos)
    student(run, epochs, photos)
    assert "no validation: the data has no val/" in capsys.readouterr().err
    student(tmp_path / "never", epochs, photos)
    assert len(steps) == 2 * epochs * STEPS
    require_same_run(run, tmp_path / "never")


def test_a_validated_state_has_no_mark(whole):
    state = torch.load(whole(1) / "state.pt", weights_only=True)
    assert [*state] == [
        *("model", "discriminator", "optimizer", "epoch", "metrics", "source", "how")
    ]


# ---- real processes


@dataclass
class Bench:
    house: House
    store: Path

    def start(self, out: Path, *options: object, **how: object) -> list:
        arguments = [
            *("train-student", f"--config={self.house.config}", f"--data={self.house.data}"),
            *(f"--store={self.store}", f"--out={out}", "--device=cpu"),
        ]
        return self.house.start(*arguments, *options, **how)


@pytest.fixture(scope="module")
def bench(recipe, photos, store_path, tmp_path_factory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    given = changed(recipe, train={**JUDGED, "epochs": 1})
    (folder / "recipe.yaml").write_text(given.to_yaml())
    house = House(folder, folder / "recipe.yaml", photos)
    yield Bench(house, store_path)
    house.end()


READING = When("read", r"/val/bee/", "SIGKILL", 4, after=r"/state\.pt$")
MOMENTS = {
    "while images are read": READING,
    "before the student is saved again": When("rename", r"/last\.safetensors$", "SIGKILL", 2),
    "before the best student is saved": When("rename", r"/best\.safetensors$", "SIGKILL"),
    "before the metrics are saved again": When("rename", r"/metrics\.jsonl$", "SIGKILL", 2),
    "before the state is saved again": When("rename", r"/state\.pt$", "SIGKILL", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_between_an_epoch_and_its_validation_loses_neither(
    bench, student, whole, steps, tmp_path, moment
):
    run = tmp_path / "run"
    killed = bench.start(run, whens=(MOMENTS[moment],))
    assert killed.end() == -9, killed.said()
    (before,) = metrics_of(run)
    student(run, 1)
    assert not steps
    require_same_run(run, whole(1))
    (after,) = metrics_of(run)
    assert after["seconds"] == before["seconds"]


@pytest.mark.parametrize("then", ["SIGTERM", "full"])
def test_a_signal_or_a_full_disk_in_a_validation_loses_no_epoch(
    bench, student, whole, steps, tmp_path, then
):
    moments = {
        "SIGTERM": replace(READING, then="SIGTERM"),
        "full": When("write", r"/\.metrics\.jsonl\.partial$", "full", 2),
    }
    run = tmp_path / "run"
    line = bench.start(run, whens=(moments[then],)).failed_with()
    assert "stopped by SIGTERM" in line if then == "SIGTERM" else "No space left" in line
    student(run, 1)
    assert not steps
    require_same_run(run, whole(1))


@pytest.mark.parametrize("lost", [0, 1])
def test_several_processes_lose_no_epoch_to_a_kill_in_validation(bench, tmp_path, lost):
    def together(out: Path, **per_rank: tuple) -> list:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        return [
            bench.start(
                out,
                whens=per_rank.get(f"rank{rank}", ()),
                environment=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]

    whole, run = tmp_path / "whole", tmp_path / "run"
    assert [one.end() for one in together(whole)] == [0, 0]
    # Only process 0 scans and renames files. Process 1 reads its part of the images.
    moment = READING if lost == 0 else When("read", r"/val/", "SIGKILL")
    runs = together(run, **{f"rank{lost}": (moment,)})
    assert runs[lost].end() == -9, runs[lost].said()
    assert runs[1 - lost].end() == 1
    require_no_trace(runs[1 - lost])
    (before,) = metrics_of(run)
    assert "val_top1" not in before
    again = together(run)
    assert [one.end() for one in again] == [0, 0], again[0].said()
    assert "going on with" in again[0].said()
    require_same_run(run, whole)
    assert metrics_of(run)[0]["seconds"] == before["seconds"]


def test_a_line_of_pixels_that_no_memory_would_hold_whole_is_validated_on(student, tmp_path):
    photos = Path(shutil.copytree(student.photos, tmp_path / "photos"))
    Image.new("RGB", (1, 60_000)).save(photos / "val" / "ant" / "thin.png")
    assert "val_top1" in student(tmp_path / "run", 1, photos)
