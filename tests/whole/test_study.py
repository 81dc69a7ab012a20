"""The study of the README runs, goes on after a kill, tells its records, and calls a
difference only one beyond the spread."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT
from support.small import write_photos

STUDY = ROOT / "tests" / "bench" / "study"


@pytest.fixture(scope="module")
def study() -> Iterator[object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        # No import statements: where a folder called study lies, linters would sort
        # them otherwise.
        study, rows, tell = map(importlib.import_module, ("study", "rows", "tell"))
        study.rows, study.tell = rows, tell
        yield study
    for name in ("rows", "study", "tell"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((STUDY / "results.json").read_text())


@pytest.fixture(scope="module")
def again() -> dict:
    return json.loads((STUDY / "again.json").read_text())


@pytest.fixture(scope="module")
def forms() -> dict:
    return json.loads((STUDY / "discriminators.json").read_text())


def test_the_readme_tells_what_is_recorded(study, recorded, again, forms):
    readme = (ROOT / "tests" / "bench" / "study" / "README.md").read_text()
    told_of = [(experiment, recorded) for experiment in study.EXPERIMENTS]
    told_of += [(experiment, forms) for experiment in study.DISCRIMINATORS]
    for experiment, records in told_of:
        told = study.tell.table(experiment, records)
        assert told and told in readme, (
            f"the README has another table of {experiment.name}; python "
            f"{STUDY.relative_to(ROOT)}/study.py prints it"
        )
    beside = study.tell.beside(study.EXPERIMENTS[0], recorded, again)
    assert beside and beside in readme


def test_every_record_is_of_a_row_as_it_is_now(study, recorded, again, forms):
    for records, experiments in (
        (recorded, study.EXPERIMENTS),
        (again, study.EXPERIMENTS[:1]),
        (forms, study.DISCRIMINATORS),
    ):
        wanted = [experiment.teachers_alone() for experiment in experiments]
        wanted += [
            experiment.trained(row, seed)
            for experiment in experiments
            for row in experiment.rows
            for seed in row.seeds
        ]
        steps = {step.name: step for step in study.with_needs(wanted)}
        assert {name: record["identity"] for name, record in records.items()} == {
            name: step.identity for name, step in steps.items()
        }
    for record in (*recorded.values(), *again.values(), *forms.values()):
        assert record.get("seconds", 0) > 0 or record["training"]["images"] > 0
        assert record["commands"] and record["machine"]["processor"] and record["machine"]["torch"]
        assert str(ROOT) not in json.dumps(record)


def test_every_command_line_is_the_programs(study):
    from cli import main

    for experiment in (*study.EXPERIMENTS, *study.DISCRIMINATORS):
        for row in experiment.rows:
            for step in study.with_needs([experiment.trained(row, 0)]):
                for command, *words in step.commands:
                    main.commands[command].make_context(command, list(words))


def test_another_config_command_or_step_before_makes_another_step(study, tmp_path, monkeypatch):
    experiment = study.EXPERIMENTS[0]
    row = experiment.row("soft")
    one = experiment.trained(row, 0)
    assert one.identity == experiment.trained(row, 0).identity
    assert one.identity != experiment.trained(row, 1).identity
    assert one.identity != experiment.trained(replace(row, sets=("train.lr=0.5",)), 0).identity
    # another training of a teacher
    assert (
        one.identity
        != replace(experiment, made=(experiment.made[0], ("crops.seed=5",)))
        .trained(row, 0)
        .identity
    )
    shutil.copytree(STUDY, tmp_path / study.rows.FOLDER)
    monkeypatch.setattr(study.rows, "ROOT", tmp_path)
    assert one.identity == experiment.trained(row, 0).identity
    config = tmp_path / study.rows.FOLDER / "cifar10.yaml"
    labels = experiment.store("both").identity
    config.write_text(config.read_text() + "render: {threads: 7}\n")
    assert one.identity != experiment.trained(row, 0).identity
    assert labels == experiment.store("both").identity  # stage one doesn't read this section
    config.write_text(config.read_text().replace("views: 16", "views: 5"))
    assert labels != experiment.store("both").identity


def records_of(study, experiment, top1: dict[str, tuple[float, ...]], loss: float = 0.5) -> dict:
    records = {}
    for name, values in top1.items():
        for seed, value in enumerate(values):
            step = experiment.trained(experiment.row(name), seed)
            figures = {
                "name": "s",
                "top1": value,
                "teacher_kl": 1 - value / 100,
                "teacher_agreement": value,
                "loss": 1.0,
            }
            records[step.name] = {
                "identity": step.identity,
                "seconds": 1.0,
                "figures": {"models": [figures], "teachers": {"loss": loss}},
                "machine": {
                    "processor": "P",
                    "cores": 1,
                    "gpu": None,
                    "torch": "2",
                    "date": "2026-01-01",
                },
            }
    return records


def test_a_difference_is_called_one_beyond_the_spread_of_all_rows(study):
    experiment = study.EXPERIMENTS[0]
    rng = np.random.default_rng(0)
    noise = {"soft": 0.0, "online": 3.0, "hard": -3.0} | dict.fromkeys(
        ("float16", "tail40", "top-5", "1 view", "4 views", "2 crops"), 0.0
    )
    starts = rng.normal(50, 5, 3)  # good and bad seeds, which pairing removes
    figures = {name: tuple(starts + mean + rng.normal(0, 0.2, 3)) for name, mean in noise.items()}
    figures["hard from scratch"] = (10.0, 90.0, 50.0)  # this row sees other crops
    outcome = study.tell.Outcome(experiment, records_of(study, experiment, figures))
    table = np.array([figures[name] for name in noise])
    effects = table - table.mean(axis=1, keepdims=True)
    chance = ((effects - effects.mean(axis=0)) ** 2).sum() / (8 * 2)
    margin = outcome.margin(study.tell.TOP1, 3)
    # Student's t with 16 degrees of freedom, from a table.
    assert margin == pytest.approx(2.1199 * np.sqrt(chance * 2 / 3), rel=1e-4)
    told = {row.name: outcome.told_difference(row, study.tell.TOP1) for row in experiment.rows}
    assert (
        told["soft"] == "" and told["online"].startswith("**+") and told["hard"].startswith("**−")
    )
    for name in list(noise)[3:]:
        assert told[name].startswith("**") == (
            abs(np.mean(np.subtract(figures[name], figures["soft"]))) > margin
        )
    assert told["hard from scratch"] == ""


def test_records_of_different_teachers_make_no_table(study):
    experiment = study.EXPERIMENTS[0]
    records = records_of(study, experiment, {"soft": (50.0,)}) | records_of(
        study, experiment, {"online": (50.0,)}, loss=0.6
    )
    with pytest.raises(ValueError, match="different teachers"):
        study.tell.table(experiment, records)


def test_a_record_of_other_commands_is_left_out(study):
    experiment = study.EXPERIMENTS[0]
    records = records_of(study, experiment, {"soft": (50.0,), "online": (51.0,)})
    records["cifar10/online/0"]["identity"] = "another"
    assert "| soft |" in study.tell.table(
        experiment, records
    ) and "| online |" not in study.tell.table(experiment, records)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of ten classes, as in CIFAR-10: top-5 labels need more than five."""
    folder = tmp_path_factory.mktemp("ten")
    for split, each in (("train", 8), ("val", 4)):
        for part in range(4):  # three classes each
            write_photos(folder / "made" / split / str(part), each, seed=part)
        (folder / split).mkdir()
        for c, made in enumerate(sorted((folder / "made" / split).glob("*/*"))[:10]):
            made.rename(folder / split / f"class{c}")
    return folder


def command(pictures: Path, work: Path, *words: str) -> list[str]:
    where = ("--cifar10", str(pictures), "--work", str(work))
    return [
        sys.executable,
        str(STUDY / "study.py"),
        "--small",
        "--seeds=1",
        "--jobs=1",
        *where,
        *words,
    ]


def alive(session: int) -> list[str]:
    """List the processes of a session, without dead processes that nobody has waited
    for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
            found += [stat.parent.name] if int(its) == session and state not in "ZX" else []
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_the_study_runs_goes_on_after_a_kill_and_does_nothing_twice(pictures, tmp_path):
    rows = ("online", "top-5", "CutMix faithful")
    only = ("--only", *rows)
    work = tmp_path / "study"
    with subprocess.Popen(
        command(pictures, work, *only), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as begun:
        try:
            # More steps follow than one process does.
            next(line for line in begun.stdout if "/teachers: " in line)
            begun.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 60
            while alive(begun.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not alive(begun.pid)  # the study's processes end with it
        finally:
            with suppress(ProcessLookupError):
                os.killpg(begun.pid, signal.SIGKILL)
    before = json.loads((work / "records.json").read_text())
    done = subprocess.run(
        command(pictures, work, *only), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    after = json.loads((work / "records.json").read_text())
    assert before.items() <= after.items()
    assert {f"cifar10/{row}/0" for row in rows} < set(after)
    assert all(f"| {name} |" in done.stdout for name in (*rows, "ensemble"))

    kept = tmp_path / "kept.json"
    kept.write_text('{"another": {}}')
    again = subprocess.run(
        command(pictures, work, *only, "--keep", str(kept)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0 and "to go" not in again.stdout
    assert json.loads((work / "records.json").read_text()) == after
    assert json.loads(kept.read_text()) == {"another": {}} | after
    assert kept.with_suffix(".png").read_bytes() == (work / "results.png").read_bytes()

    anew = subprocess.run(
        command(pictures, work, "--only", "online", "--again"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert anew.returncode == 0
    assert [
        line.split(" ", 1)[1].partition(":")[0]
        for line in anew.stdout.splitlines()
        if "to go" in line
    ] == [
        "cifar10/teachers",
        "cifar10/online/0",
    ]
    anew_record = json.loads((work / "records.json").read_text())["cifar10/online/0"]
    # The row was trained again, to the same figures.
    assert anew_record["training"]["seconds"] != after["cifar10/online/0"]["training"]["seconds"]
    assert anew_record["figures"] == after["cifar10/online/0"]["figures"]  # from the same weights


def test_what_fails_is_told_and_what_needs_it_is_left(pictures, tmp_path):
    work = tmp_path / "study"
    shutil.copytree(pictures, work / "cifar10" / "data")
    for broken in (work / "cifar10" / "data" / "train").glob("*/*"):
        broken.write_bytes(b"no picture")
    done = subprocess.run(
        command(pictures, work, "--only", "cifar10/soft"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and all(
        "train-student of cifar10/teacher" in line and "error: " in line for line in failed
    )
    assert not (work / "records.json").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("--only", "ofline"),
            "ofline: no row has that in its name; there are cifar10/hard from scratch, ",
        ),
        (("--photographs", "hollow"), "--photographs and --weights go together"),
        (("--cifar10", "nowhere"), "--cifar10: there is no nowhere"),
        (
            ("--cifar10", "hollow"),
            "--cifar10: hollow has no train/ and val/ with a folder of images for each class",
        ),
        (("--cifar10", "note.txt"), "--cifar10: note.txt is neither a folder nor a tar of one"),
        (
            ("--cifar10", "hollow.tar", "--small", "--work", "made"),
            "--cifar10: hollow.tar has no train/ and val/",
        ),
        (
            ("--photographs", "hollow", "--weights", "hollow"),
            "--photographs: hollow has no class folders",
        ),
        (
            ("--photographs", ".", "--weights", "hollow"),
            "--weights: hollow has no tf_efficientnet_lite0.safetensors, tf_eff",
        ),
        (("--records", "note.txt"), "note.txt is no file of records"),
        (("--records", "list.json"), "list.json is no file of records"),
        (("--records", "none.json"), "--records: there is no file none.json"),
        (("--small",), "--small needs a --work of its own"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(study, words, line, tmp_path, monkeypatch, capsys):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "note.txt").write_text("no tar")
    (tmp_path / "list.json").write_text("[1]")
    for split in ("train", "val"):  # unpacked from another tar by a killed study
        (tmp_path / "made" / "cifar10" / "unpacked" / split / "class").mkdir(parents=True)
    with tarfile.open(tmp_path / "hollow.tar", "w") as tar:
        tar.add(tmp_path / "hollow", "hollow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py", *words])
    with pytest.raises(SystemExit) as refused:
        study.main()
    told = refused.value.code if isinstance(refused.value.code, str) else capsys.readouterr().err
    assert refused.value.code and line in told.splitlines()[-1]


def test_the_papers_form_of_the_discriminator_hurts_nothing(study, forms):
    """The figures that chose the default, and its faults' figures beside them."""
    for experiment in study.DISCRIMINATORS:
        outcome = study.tell.Outcome(experiment, forms)
        paper = outcome.differences(experiment.row("paper"), study.tell.KL)
        assert len(paper) == 3 and abs(paper.mean()) < outcome.margin(study.tell.KL, 3)
        top1 = outcome.differences(experiment.row("paper"), study.tell.TOP1)
        assert abs(top1.mean()) < outcome.margin(study.tell.TOP1, 3)
        for record in outcome.of["paper"].values():
            assert record["training"]["last"]["discriminator_gradient"] <= 0.0201
    outcome = study.tell.Outcome(study.DISCRIMINATORS[0], forms)
    old = outcome.differences(study.DISCRIMINATORS[0].row("unbounded, as in 0.6"), study.tell.KL)
    assert old.mean() > 3 * outcome.margin(study.tell.KL, 3)
