"""The command line: exit statuses, one line for an error that a user can mend, JSON
alone on stdout, and help with examples."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.command import SMOKE, run
from support.paths import ROOT


@pytest.mark.parametrize("command", ["generate-labels", "train-student", "eval", "inspect", "demo"])
def test_every_command_has_help_with_an_example(command):
    status, out, _ = run(command, "--help")
    assert status == 0 and "Example:" in out and f"python cli.py {command}" in out


def test_wrong_usage_is_status_2_and_names_the_nearest():
    assert run("generate-label")[0] == 2
    assert "Did you mean generate-labels?" in run("generate-label")[2]
    assert run("inspect")[0] == 2
    status, _, err = run("inspect", "x", "--jsn")
    assert status == 2 and "--json" in err
    status, _, err = run("eval", "--data", "x", "--model", "resnet18=")
    assert status == 2 and "must be MODEL or MODEL=CHECKPOINT" in err
    status, _, err = run(
        "generate-labels", "--config", SMOKE, "--data", "x", "--store", "y", "--worker", "4/4"
    )
    assert status == 2 and "I from 0 to N-1" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["inspect", "nowhere.zarr"],
            "there is no label store at nowhere.zarr; make one with generate-labels",
        ),
        (["inspect", __file__], "is not a label store"),
        (["eval", "--data", "nowhere", "--model", "test_resnet"], "there is no folder nowhere"),
        (
            [
                "generate-labels",
                "--config",
                SMOKE,
                "--data",
                ROOT,
                "--store",
                ROOT.parent / "never made",
            ],
            "there is no teacher",
        ),
        (
            [
                "generate-labels",
                "--config",
                "no.yaml",
                "--data",
                ".",
                "--store",
                ROOT.parent / "never made",
            ],
            "no.yaml can't be read",
        ),
        (
            [
                "generate-labels",
                "--config",
                SMOKE,
                "--data",
                ROOT,
                "--store",
                ROOT.parent / "never made",
                "--teacher",
                "resnet5",
            ],
            "timm has no model resnet5; near it are resnet50",
        ),
        (
            [
                "generate-labels",
                "--config",
                SMOKE,
                "--data",
                ROOT,
                "--store",
                ROOT.parent / "never made",
                "--teacher",
                "test_resnet=gone.pth",
            ],
            "there is no checkpoint gone.pth",
        ),
        (
            [
                "train-student",
                "--config",
                SMOKE,
                "--data",
                ROOT,
                "--out",
                "r",
                "--set",
                "train.lr=0",
            ],
            "train.lr must be above 0, got 0",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_1(arguments, says):
    status, out, err = run(*arguments)
    assert status == 1 and out == ""
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


def test_soft_labels_need_a_store(photos, tmp_path):
    status, _, err = run(
        "train-student", "--config", SMOKE, "--data", photos, "--out", tmp_path / "run"
    )
    assert (
        status == 1
        and "soft labels need a --store; make one with generate-labels, ask live teachers with "
        "--online, or set train.labels=hard"
        in err
    )


def test_json_is_one_object_and_nothing_else(store_path, photos, teachers):
    status, out, _ = run("inspect", store_path, "--json")
    facts = json.loads(out)
    assert (
        status == 0
        and facts["complete"]
        and facts["labelled_crops"] == 180
        and facts["usable"] == 90
    )
    assert [t["image_size"] for t in facts["teachers"]] == [64, 48]
    assert (
        0 < facts["entropy"] < 1.0987
        and 0 <= facts["agreement"] <= 100
        and facts["label_bytes_per_crop"] > 0
    )
    models = [f"--model={t['model']}={t['checkpoint']}" for t in teachers]
    status, out, _ = run(
        "eval", "--data", photos, *models, "--image-size", 64, "--json", "--device", "cpu"
    )
    result = json.loads(out)
    assert (
        status == 0
        and result["images"] == 21
        and len(result["models"]) == 2
        and "ensemble" in result
    )


def test_inspect_tells_what_the_labels_are(store_path):
    import numpy as np

    from cache import LabelStore
    from cache.format.codec import entropy

    store = LabelStore.open(store_path)
    facts = json.loads(run("inspect", store_path, "--json")[1])
    labels = np.concatenate([store.probabilities(view, store.usable) for view in (0, 1)])
    assert facts["entropy"] == pytest.approx(entropy(labels).mean(), rel=1e-6)
    agreeing = labels.argmax(axis=1) == np.tile(store.images.class_index[store.usable], 2)
    assert facts["agreement"] == pytest.approx(100 * agreeing.mean())
    files = [
        (store_path / "labels" / "c" / str(v) / str(s) / "0").stat().st_size
        for v in (0, 1)
        for s in range(3)
    ]
    assert facts["label_bytes_per_crop"] == pytest.approx(sum(files) / 180)


def test_inspect_says_how_complete_a_store_is(store_path, tmp_path):
    shutil.copytree(store_path, tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / "records" / "c" / "1" / "2" / "0").unlink()
    status, out, _ = run("inspect", tmp_path / "s.zarr")
    assert status == 0 and "NOT COMPLETE" in out and "5 of 6 shards, 1 of 2 views" in out


def test_the_whole_line_by_its_commands(photos, teachers, tmp_path):
    """The commands run as a user types them: labels, student, evaluation, inspection,
    each in a process of its own, in an empty folder."""
    chosen = [f"--teacher={t['model']}={t['checkpoint']}" for t in teachers]
    common = ["--config", SMOKE, "--data", photos, "--store", "labels.zarr", "--device", "cpu"]
    small = ["--set", "teachers.0.image_size=64", "--set", "teachers.1.image_size=48"]
    student = [
        "--out",
        "run",
        "--student",
        "test_resnet",
        "--set",
        "train.batch_size=32",
        "--set",
        "train.lr=0.001",
    ]

    def command(*arguments: object) -> subprocess.CompletedProcess:
        environment = {**os.environ, "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, ROOT / "cli.py", *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return done

    assert (
        "is complete: 2 of 2 shards" in command("generate-labels", *common, *chosen, *small).stderr
    )
    assert "epoch 2/2" in command("train-student", *common, *student).stderr
    files = [
        "best.safetensors",
        "config.yaml",
        "curves.png",
        "last.safetensors",
        "metrics.jsonl",
        "state.pt",
        "validation-images.npz",
    ]
    found = sorted(os.listdir(tmp_path / "run"))
    assert [name for name in found if not name.startswith("events.out.tfevents.")] == files and len(
        found
    ) == len(files) + 1
    assert "has its 2 epochs already" in command("train-student", *common, *student).stderr
    evaluated = command(
        "eval", "--data", photos, "--model", "test_resnet=run/best.safetensors", "--json"
    )
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    best = max(
        json.loads(line)["val_top1"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )
    assert json.loads(evaluated.stdout)["models"][0]["top1"] == best
    assert last["epoch"] == 1
    assert "complete" in command("inspect", "labels.zarr").stdout
    assert sorted(os.listdir(tmp_path)) == ["labels.zarr", "run"]


def test_the_demo_tells_the_whole_story(short_demo):
    """The demo is shortened to two epochs and two views. Its table in the README is of
    a full run."""
    folder, out = short_demo
    result = json.loads(out)
    assert result["labelled_crops"] == 2 * 1297
    assert [row["name"] for row in result["rows"]][2:] == [
        "ensemble",
        "student from soft labels",
        "student from hard labels",
    ]
    assert all(0 <= row["top1"] <= 100 for row in result["rows"])
    runs = [
        "teacher-resnet10t",
        "teacher-test_resnet",
        "student-from-soft-labels",
        "student-from-hard-labels",
    ]
    for name in runs:
        last = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
        # Top-1 after two epochs differs between processors. Beyond 30 % of ten classes
        # the model has learned something.
        assert last["agreement"] > 30
