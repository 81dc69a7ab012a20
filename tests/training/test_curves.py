"""A run's curves are its metrics, however the run was stopped and continued. Runs are
compared by the files in their folders."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.cells import cell_len
from support.small import CPU, changed
from support.stages import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pipeline.runs.curves
from cache.system.signals import Stopped
from pipeline.config import Config
from pipeline.runs.compare import compare, comparison_page, draw
from pipeline.runs.curves import EVENTS, FIRST, PICTURE, SHARE, Curves
from pipeline.runs.folder import RunError
from pipeline.runs.metrics import CURVES, points

JUDGED = {"discriminator": {"lr": 0.1}, "milestones": [1]}


@pytest.fixture(autouse=True, scope="module")
def pictures(no_pictures) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curves, "_draw", no_pictures)
        yield


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events_in(run: Path) -> list[int]:
    """Return the sizes of a run's event files, the oldest first."""
    return [
        (run / name).stat().st_size for name in sorted(os.listdir(run)) if name.startswith(EVENTS)
    ]


def as_events(metrics: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Turn metrics into events: tag → (epochs done, figure), rounded as events are."""
    told = {
        c.tag: [
            (m["epoch"] + 1, float(np.float32(m[c.key])))
            for m in metrics
            if m.get(c.key) is not None
        ]
        for c in CURVES
    }
    return {tag: found for tag, found in told.items() if found}


def read(events: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def as_after_a_kill(run: Path, config: Config, epochs: int) -> None:
    """Leave events of ``epochs`` epochs, more than the run has saved."""
    newest = metrics_of(run)[-1]
    Curves(run, changed(config, train={"epochs": 100})).show(
        [newest | {"epoch": epoch} for epoch in range(epochs)]
    )


@pytest.fixture(scope="module")
def judged(photos, recipe, store_path, tmp_path_factory) -> Path:
    """A run of two epochs with a discriminator and validation."""
    out = tmp_path_factory.mktemp("runs") / "soft"
    train(changed(recipe, train=JUDGED), photos, out, store=store_path, device=CPU)
    return out


@pytest.fixture(scope="module")
def plain(photos, recipe, judged) -> Path:
    """A run of one epoch with hard labels and without validation, in a folder beside
    the other."""
    out = judged.parent / "hard"
    train(
        changed(recipe, train={"labels": "hard", "epochs": 1, "lr": 0.02}),
        photos / "train",
        out,
        device=CPU,
    )
    return out


def test_events_are_the_metrics_after_kills_and_restarts_for_a_tensorboard_that_watches_too(
    photos, recipe, store_path, tmp_path
):
    every = JUDGED | {"epochs": 1, "ema_decay": 0.9, "clip_norm": 1.0}
    run, one = tmp_path / "run", changed(recipe, train=every)
    train(one, photos, run, store=store_path, device=CPU)
    watching = EventAccumulator(str(run))
    assert read(watching) == as_events(metrics_of(run))
    as_after_a_kill(run, one, epochs=5)
    assert [step for step, _ in read(watching)["training/loss"]] == [1, 2, 3, 4, 5]
    (run / f"{EVENTS}1.elsewhere").write_bytes(b"no events")
    metrics = train(changed(one, train={"epochs": 2}), photos, run, store=store_path, device=CPU)
    told = as_events(metrics_of(run))
    assert (
        metrics["epoch"] == 1
        and len(told) == len(CURVES)
        and all(len(found) == 2 for found in told.values())
    )
    assert read(watching) == read(EventAccumulator(str(run))) == told
    assert len(events_in(run)) == 2 and events_in(run)[0] == 0 < events_in(run)[1]
    times = [event.wall_time for event in watching.Scalars("training/loss")]
    assert times[1] - times[0] >= metrics["seconds"]


def test_a_finished_run_of_an_older_version_gets_its_curves_by_being_run_again(
    judged, photos, recipe, store_path, tmp_path
):
    run = Path(shutil.copytree(judged, tmp_path / "run"))
    for file in run.glob(f"{EVENTS}*"):
        file.unlink()
    (run / PICTURE).unlink()
    train(changed(recipe, train=JUDGED), photos, run, store=store_path, device=CPU)
    assert Image.open(run / PICTURE).size == Image.open(judged / PICTURE).size
    assert (
        read(EventAccumulator(str(run))) == as_events(metrics_of(run)) and len(events_in(run)) == 1
    )


def test_other_files_and_other_runs_keep_theirs(judged, recipe, tmp_path):
    run = Path(shutil.copytree(judged, tmp_path / "run", copy_function=os.link))
    (run / f"{EVENTS}folder").mkdir()
    (run / "my.out.tfevents.1").write_text("mine")
    Curves(run, recipe).show(metrics_of(judged)[:1])
    assert (
        read(EventAccumulator(str(judged))) == as_events(metrics_of(judged))
        and events_in(judged)[0] > 0
    )
    assert (run / "my.out.tfevents.1").read_text() == "mine" and (run / f"{EVENTS}folder").is_dir()


def test_only_curves_that_a_run_has_are_written(plain, judged):
    told = read(EventAccumulator(str(plain)))
    assert set(told) == {
        "training/loss",
        "training/agreement",
        "training/lr",
        "training/images_per_second",
    }
    few, many = Image.open(plain / PICTURE), Image.open(judged / PICTURE)
    assert few.format == many.format == "PNG"
    assert 600 < few.width < many.width < 2500 and 400 < few.height <= many.height < 1200
    for picture in (few, many):
        picture.load()
        assert len(picture.convert("RGB").getcolors(100_000)) > 20


def test_a_run_killed_before_its_first_state_goes_on(judged, photos, recipe, store_path, tmp_path):
    run = Path(shutil.copytree(judged, tmp_path / "run"))
    for name in ("state.pt", "best.safetensors", "last.safetensors", "metrics.jsonl"):
        (run / name).unlink()
    (run / f".{PICTURE}.partial").write_bytes(b"half")
    assert events_in(run) and (run / PICTURE).exists()
    train(changed(recipe, train=JUDGED), photos, run, store=store_path, device=CPU)
    assert (run / "last.safetensors").read_bytes() == (judged / "last.safetensors").read_bytes()
    assert read(EventAccumulator(str(run))) == as_events(metrics_of(run))


def test_a_kill_while_the_picture_is_drawn_loses_no_epoch_and_leaves_no_half_of_one(
    judged, photos, recipe, store_path, tmp_path, monkeypatch
):
    def killed(metrics: list[dict], config: Config) -> object:
        class Canvas:
            def savefig(self, file: Path, **options: object) -> None:
                file.write_bytes(b"half")
                raise Stopped("SIGTERM")

        return Canvas()

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.runs.curves, "picture", killed)
        with pytest.raises(Stopped):
            train(changed(recipe, train=JUDGED), photos, run, store=store_path, device=CPU)
    assert not (run / PICTURE).exists() and len(metrics_of(run)) == 2
    train(changed(recipe, train=JUDGED), photos, run, store=store_path, device=CPU)
    assert Image.open(run / PICTURE).size == Image.open(judged / PICTURE).size
    assert (run / "last.safetensors").read_bytes() == (judged / "last.safetensors").read_bytes()


def test_the_picture_changes_with_each_epoch_while_drawing_takes_a_twentieth_of_the_time_at_most(
    judged, recipe, tmp_path, monkeypatch
):
    class Watch:
        now, drawing = 100.0, 0.0

        def monotonic(self) -> float:
            return self.now

        def time(self) -> float:
            return 1e9 + self.now

    watch, drawn = Watch(), []
    picture = pipeline.runs.curves.picture

    def slow(metrics: list[dict], config: Config) -> object:
        drawn.append(len(metrics))
        watch.now += watch.drawing
        return picture(metrics, config)

    monkeypatch.setattr(pipeline.runs.curves, "time", watch)
    monkeypatch.setattr(pipeline.runs.curves, "picture", slow)
    metrics = [
        metrics_of(judged)[0] | {"epoch": epoch, "loss": 1 / (epoch + 1)} for epoch in range(8)
    ]
    curves = Curves(tmp_path, changed(recipe, train={"epochs": 8}))

    def shown(epochs: int, seconds: float, drawing: float = 0.0) -> bytes | None:
        watch.now, watch.drawing = watch.now + seconds, drawing
        curves.show(metrics[:epochs])
        return (tmp_path / PICTURE).read_bytes() if (tmp_path / PICTURE).exists() else None

    assert shown(1, 0.9 * SHARE * FIRST) is None
    first = shown(2, 0.2 * SHARE * FIRST, drawing=3.0)
    assert first == shown(3, 3.0 * SHARE - 0.1)
    second = shown(4, 0.2, drawing=0.0)
    third = shown(5, 0.0)
    assert shown(6, 0.0, drawing=1e6) != third
    assert shown(7, 1.0) == (tmp_path / PICTURE).read_bytes()
    assert len({first, second, third, shown(8, 0.0)}) == 4
    assert drawn == [2, 4, 5, 6, 8]
    assert read(EventAccumulator(str(tmp_path))) == as_events(metrics)


def test_curves_draw_no_random_numbers_and_take_figures_that_are_not_finite(
    judged, recipe, tmp_path
):
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    metrics = [m | {"kl": float("inf"), "val_loss": float("nan")} for m in metrics_of(judged)]
    Curves(tmp_path, recipe).show(metrics)
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert points(metrics, "kl") == ([], []) and points(metrics, "loss")[0] == [1, 2]
    assert Image.open(tmp_path / PICTURE).width > 600


def test_a_comparison_says_what_the_metrics_say(judged, plain):
    metrics = metrics_of(judged)
    result = compare([judged, plain])
    soft, hard = (asdict(run) for run in result.runs)
    assert (soft["name"], hard["name"]) == ("soft", "hard") and soft["metrics"] == metrics
    assert (soft["student"], soft["labels"], soft["epochs"], soft["of"]) == (
        "test_vit",
        "soft",
        2,
        2,
    )
    best = max(m["val_top1"] for m in metrics)
    assert soft["best_top1"] == best and metrics[soft["best_epoch"] - 1]["val_top1"] == best
    for ours, theirs in (
        ("top1", "val_top1"),
        ("top5", "val_top5"),
        *((key, key) for key in ("val_loss", "loss", "kl", "agreement")),
    ):
        assert soft[ours] == metrics[-1][theirs]
    assert soft["seconds"] == sum(m["seconds"] for m in metrics)
    assert soft["images_per_second"] == pytest.approx(180 / soft["seconds"])
    assert (hard["labels"], hard["epochs"]) == ("hard", 1)
    assert [hard[key] for key in ("best_top1", "best_epoch", "top1", "top5", "val_loss", "kl")] == [
        None
    ] * 6
    differences = result.differences
    assert differences["train.lr"] == {"soft": 0.01, "hard": 0.02} and differences[
        "train.labels"
    ] == {"soft": "soft", "hard": "hard"}
    assert differences["train.discriminator.lr"] == {"soft": 0.1, "hard": None}
    assert (
        "train.discriminator" not in differences
        and "train.batch_size" not in differences
        and "teachers.0.model" not in differences
    )
    assert json.loads(json.dumps(asdict(result))) == asdict(result)


def test_of_the_best_epochs_the_newest_counts_as_in_the_checkpoint(judged, tmp_path):
    run = Path(shutil.copytree(judged, tmp_path / "run"))
    first = metrics_of(run)[0] | {"val_top1": 50.0}
    told = [first, first | {"epoch": 1}, first | {"epoch": 2, "val_top1": 40.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in told))
    (facts,) = (asdict(run) for run in compare([run]).runs)
    assert (facts["best_epoch"], facts["best_top1"], facts["top1"]) == (2, 50.0, 40.0)


def test_runs_are_named_by_the_shortest_ends_of_their_paths(judged, tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("a/soft/run", "b/soft/run", "run", "other")]
    for place in places:
        shutil.copytree(judged, place)
    assert [run.name for run in compare(places).runs] == [
        "a/soft/run",
        "b/soft/run",
        f"{tmp_path.name}/run",
        "other",
    ]
    monkeypatch.chdir(places[0])
    assert [run.name for run in compare([Path("."), Path("../../../other")]).runs] == [
        "run",
        "other",
    ]


def test_a_page_and_a_picture_show_any_runs(judged, plain, tmp_path, capsys):
    odd = Path(shutil.copytree(judged, tmp_path / "_$x$ [red]学\n"))
    # metrics as version 0.1.0 wrote them
    older = [
        {k: v for k, v in m.items() if k not in ("agreement", "images")} for m in metrics_of(odd)
    ]
    (odd / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in older))
    sizes = []
    for number, runs in enumerate(([judged], [judged, odd], [judged, plain, odd], [plain])):
        result = compare(runs)
        draw(result, tmp_path / f"{number}.png")
        sizes.append(Image.open(tmp_path / f"{number}.png").size)
        comparison_page(result)
        lines = capsys.readouterr().out.splitlines()
        rows = {
            name: cells for name, *cells in (re.split(r" {2,}", line.strip()) for line in lines)
        }
        assert rows["loss"] == [f"{run.loss:.4f}" for run in result.runs]
        assert rows["epochs"] == [f"{run.epochs} of {run.of}" for run in result.runs]
        assert ("best top-1 %" in rows) == ("KL to labels" in rows) == (judged in runs)
        figures = lines[: lines.index("")] if len(runs) > 1 else lines
        assert len({cell_len(line) for line in figures}) == 1
        assert rows.get("train.lr") == (["0.01", "0.02", "0.01"] if number == 2 else None)
        assert ("the settings are the same" in lines) == (number == 1)
    assert "KL to labels" not in rows and len(lines) < 10
    assert sizes[0][0] == sizes[2][0] > sizes[3][0]
    draw(result, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()[:1000]
    with pytest.raises(
        RunError, match=r"figure.txt must end in .png, .pdf, .svg, which says .*; name another file"
    ):
        draw(result, tmp_path / "figure.txt")
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == [".png"] * 4 + [".svg"]


def test_runs_that_cannot_be_compared_are_refused_in_one_line(judged, tmp_path):
    def refuses(name: str, text: str | bytes | None, says: str) -> None:
        run = Path(shutil.copytree(judged, tmp_path / "run", dirs_exist_ok=True))
        file = run / name
        file.unlink()
        if text is not None:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(RunError, match=says) as refusal:
            compare([judged, run])
        assert "\n" not in str(refusal.value) and "; " in str(refusal.value)

    whole = (judged / "metrics.jsonl").read_text()
    first, second = map(json.loads, whole.splitlines())
    refuses(
        "config.yaml",
        None,
        r"run is no run of train-student \(it has no config.yaml\); "
        r"check the path, or leave this run out",
    )
    refuses(
        "config.yaml",
        "train: {lr: -1}",
        r"config.yaml is damaged \(.*train.lr must be above 0, got -1\); "
        r"leave this run out, or bring",
    )
    for text in ("", "a: [", b"\xff"):
        refuses("config.yaml", text, "config.yaml is damaged")
    refuses(
        "metrics.jsonl",
        None,
        r"run has no finished epoch \(it has no metrics.jsonl\); finish one, or leave this run out",
    )
    refuses("metrics.jsonl", "", "metrics.jsonl is empty; leave this run out")
    refuses("metrics.jsonl", whole[:-20], "metrics.jsonl is damaged")
    refuses("metrics.jsonl", b"\xff\n", "metrics.jsonl is damaged")
    refuses("metrics.jsonl", whole + "7\n", r"damaged \(line 3 is no JSON object\)")
    refuses(
        "metrics.jsonl",
        whole + json.dumps(second),
        r"damaged \(line 3 has epoch 1, which doesn't go on from the one before\)",
    )
    refuses(
        "metrics.jsonl",
        json.dumps(first | {"kl": "2"}),
        r"damaged \(line 1 has kl '2', which is no number\)",
    )
    refuses("metrics.jsonl", json.dumps(first | {"kl": 10**400}), "metrics.jsonl is damaged")
    refuses(
        "metrics.jsonl",
        json.dumps(first | {"seconds": float("nan")}),
        "line 1 has seconds nan, which isn't finite",
    )
    refuses(
        "metrics.jsonl",
        json.dumps({k: v for k, v in first.items() if k != "loss"}),
        r"damaged \(line 1 lacks loss\)",
    )
    with pytest.raises(RunError, match="soft is named twice; name each run once"):
        compare([judged, judged.parent / "hard" / ".." / "soft"])


def test_a_config_of_an_older_version_differs_in_what_it_says_alone(judged, tmp_path):
    run = Path(shutil.copytree(judged, tmp_path / "older"))
    document = yaml.safe_load((run / "config.yaml").read_text())
    del document["train"]["sync_bn"], document["store"]["compile"]
    (run / "config.yaml").write_text(yaml.safe_dump(document))
    assert compare([judged, run]).differences == {}
    gone = document["teachers"].pop()
    (run / "config.yaml").write_text(yaml.safe_dump(document))
    differences = compare([judged, run]).differences
    assert differences["teachers.1.model"] == {"soft": gone["model"], "older": None}
    assert all(key.startswith("teachers.1.") for key in differences)


def test_no_training_ends_for_want_of_a_picture(tmp_path, recipe, monkeypatch, capsys):
    """A broken library or a missing font is told, and the next pass draws everything
    anew."""
    passes = [
        {
            "epoch": epoch,
            "loss": 1.0 / (epoch + 1),
            "seconds": 1.0,
            "lr": 0.1,
            "images_per_second": 5.0,
        }
        for epoch in range(3)
    ]
    curves = Curves(tmp_path, recipe)
    with monkeypatch.context() as broken:
        broken.setattr(
            "tensorboard.summary.writer.record_writer.RecordWriter.write", lambda self, data: 1 / 0
        )
        curves.show(passes[:1])
    assert "could not be brought up to date (ZeroDivisionError" in capsys.readouterr().err
    curves.show(passes[:2])
    curves.show(passes)
    assert read(EventAccumulator(str(tmp_path))) == as_events(passes)
