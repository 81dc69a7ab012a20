"""The study of the README: it runs, goes on after a kill, says what it recorded, and calls nothing a difference that is none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photos

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "tests" / "bench" / "study"


@pytest.fixture(scope="module")
def study() -> Iterator[object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        import rows
        import tell

        import study

        study.rows, study.tell = rows, tell
        yield study
    for name in ("rows", "study", "tell"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((STUDY / "results.json").read_text())


def test_the_readme_tells_what_is_recorded(study, recorded):
    readme = (ROOT / "README.md").read_text()
    for experiment in study.EXPERIMENTS:
        told = study.tell.table(experiment, recorded)
        assert told and told in readme, (
            f"the README has another table of {experiment.name}; python {STUDY.relative_to(ROOT)}/study.py prints it"
        )


def test_every_record_is_of_a_row_as_it_is_now(study, recorded):
    steps = {}

    def visit(step) -> None:
        steps[step.name] = step
        for need in step.needs:
            visit(need)

    for experiment in study.EXPERIMENTS:
        visit(experiment.teachers_alone())
        for row in experiment.rows:
            for seed in row.seeds:
                visit(experiment.trained(row, seed))
    assert {name: record["identity"] for name, record in recorded.items()} == {name: step.identity for name, step in steps.items()}
    for record in recorded.values():
        assert record["seconds"] > 0 and record["commands"] and record["machine"]["processor"] and record["machine"]["torch"]


def test_every_command_line_is_the_programs(study):
    from cli import main

    for experiment in study.EXPERIMENTS:
        for row in experiment.rows:
            for step in study.steps_of([experiment.trained(row, 0)], study.Records(None), study.Records(None)):
                for command, *words in step.commands:
                    main.commands[command].make_context(command, list(words))


def test_another_config_command_or_step_before_makes_another_step(study, tmp_path, monkeypatch):
    experiment = study.EXPERIMENTS[0]
    row = experiment.row("soft")
    one = experiment.trained(row, 0)
    assert one.identity == experiment.trained(row, 0).identity
    assert one.identity != experiment.trained(row, 1).identity
    assert one.identity != experiment.trained(replace(row, sets=("train.lr=0.5",)), 0).identity
    assert one.identity != replace(experiment, made=(experiment.made[0], ("crops.seed=5",))).trained(row, 0).identity  # a teacher's


def records_of(study, experiment, top1: dict[str, tuple[float, ...]], loss: float = 0.5) -> dict:
    records = {}
    for name, values in top1.items():
        for seed, value in enumerate(values):
            step = experiment.trained(experiment.row(name), seed)
            figures = {"name": "s", "top1": value, "teacher_kl": 1 - value / 100, "teacher_agreement": value, "loss": 1.0}
            records[step.name] = {
                "identity": step.identity,
                "seconds": 1.0,
                "figures": {"models": [figures], "teachers": {"loss": loss}},
                "machine": {"processor": "P", "cores": 1, "gpu": None, "torch": "2", "date": "2026-01-01"},
            }
    return records


def test_a_difference_is_called_one_beyond_the_pooled_spread_alone(study):
    experiment = study.EXPERIMENTS[0]
    rng = np.random.default_rng(0)
    starts = rng.normal(50, 5, 3)  # good and bad seeds, which pairing takes out

    def row(mean: float) -> tuple[float, ...]:
        return tuple(starts + mean + rng.normal(0, 0.2, 3))

    noise = ("float16", "tail40", "top-5", "1 view", "4 views", "8 views", "2 crops", "4 crops")
    records = records_of(study, experiment, {"soft": row(0), "online": row(3), "hard": row(-3)} | {name: row(0) for name in noise})
    outcome = study.tell.Outcome(experiment, records)
    margin = outcome.margin(study.tell.TOP1, 3)
    assert 0.1 < margin < 1  # 2.1 · 0.2 · √2 / √3 = 0.34
    told = {row.name: outcome.told_difference(row, study.tell.TOP1) for row in experiment.rows}
    assert told["soft"] == "" and told["online"].startswith("**+") and told["hard"].startswith("**−")
    assert sum(told[name].startswith("**") for name in noise) <= 1


def test_records_of_different_teachers_make_no_table(study):
    experiment = study.EXPERIMENTS[0]
    records = records_of(study, experiment, {"soft": (50.0,)}) | records_of(study, experiment, {"online": (50.0,)}, loss=0.6)
    with pytest.raises(ValueError, match="different teachers"):
        study.tell.table(experiment, records)


def test_a_record_of_other_commands_is_left_out(study):
    experiment = study.EXPERIMENTS[0]
    records = records_of(study, experiment, {"soft": (50.0,), "online": (51.0,)})
    records["cifar10/online/0"]["identity"] = "another"
    assert "| soft |" in study.tell.table(experiment, records) and "| online |" not in study.tell.table(experiment, records)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes, as CIFAR-10 has: top-5 labels need more than five."""
    folder = tmp_path_factory.mktemp("ten")
    for split, each in (("train", 8), ("val", 4)):
        for part in range(4):  # of three classes each
            write_photos(folder / "made" / split / str(part), each, seed=part)
        (folder / split).mkdir()
        for c, made in enumerate(sorted((folder / "made" / split).glob("*/*"))[:10]):
            made.rename(folder / split / f"class{c}")
    return folder


def command(pictures: Path, work: Path, *words: str) -> list[str]:
    where = ("--cifar10", str(pictures), "--work", str(work), "--results", str(work / "results.json"))
    return [sys.executable, str(STUDY / "study.py"), "--small", "--seeds=1", "--jobs=1", *where, *words]


def test_the_study_runs_goes_on_after_a_kill_and_does_nothing_twice(pictures, tmp_path):
    only = ("--only", "online", "top-5", "CutMix faithful")
    work = tmp_path / "study"
    with subprocess.Popen(command(pictures, work, *only), stdout=subprocess.PIPE, text=True, start_new_session=True) as begun:
        for line in begun.stdout:  # a step that is done
            if "/first: " in line:
                break
        begun.send_signal(signal.SIGKILL)
    before = json.loads((work / "results.json").read_text())
    deadline = time.monotonic() + 60
    while (
        orphans := subprocess.run(["pgrep", "-s", str(begun.pid)], capture_output=True, text=True).stdout.split()
    ) and time.monotonic() < deadline:
        subprocess.run(["kill", "-9", *orphans], check=False)
    done = subprocess.run(command(pictures, work, *only), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    after = json.loads((work / "results.json").read_text())
    assert before.items() <= after.items()
    assert {"cifar10/online/0", "cifar10/top-5/0", "cifar10/CutMix faithful/0"} < set(after)
    assert all(f"| {name} |" in done.stdout for name in ("online", "top-5", "CutMix faithful", "ensemble"))
    again = subprocess.run(command(pictures, work, *only), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "to go" not in again.stdout
    assert json.loads((work / "results.json").read_text()) == after


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--only", "ofline"), "ofline: no row has that in its name; there are cifar10/hard from scratch, "),
        (("--photographs", "tests"), "--photographs and --weights go together"),
        (("--cifar10", "nowhere"), "there is no nowhere"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(words, line):
    done = subprocess.run([sys.executable, str(STUDY / "study.py"), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and line in done.stderr.splitlines()[-1]
