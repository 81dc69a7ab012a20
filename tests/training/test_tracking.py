"""Trackers are told every figure of a run once, however the run was stopped and
continued, and never stop it. The libraries are real; Weights & Biases is offline."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import run as command
from support.paths import ROOT
from support.small import CPU, changed
from support.stages import train
from support.tracked import FakeWandb, hanging_server, offline_run

from cache.system.signals import Stopped
from pipeline.config_file import flat
from pipeline.runs.metrics import CURVES
from pipeline.runs.tracking import names
from pipeline.runs.tracking.mlflow_runs import LONGEST_PARAMETER, MARK, MLflow
from pipeline.runs.tracking.names import TrackingError, Wanted
from pipeline.runs.tracking.tracker import LEFT, Tracked
from pipeline.runs.tracking.trackers import Trackers, without_secrets

BOTH = ("wandb", "mlflow")
pytest.importorskip("wandb")
pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch) -> Iterator[None]:
    """A home and a current folder of their own, and none of the user's trackers."""
    before = dict(os.environ)
    for key in [key for key in before if key.startswith(("WANDB_", "MLFLOW_"))]:
        del os.environ[key]
    for folder in ("home", "here"):
        (tmp_path / folder).mkdir()
    os.environ |= {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
    monkeypatch.chdir(tmp_path / "here")
    yield
    sys.modules["wandb"].teardown()  # it reads its variables once
    os.environ.clear()
    os.environ.update(before)


def told(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the figures in a run's metrics: tag → [(epochs done, figure)]."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {
        c.tag: [(m["epoch"] + 1, m[c.key]) for m in metrics if m.get(c.key) is not None]
        for c in CURVES
    }
    return {tag: points for tag, points in found.items() if points}


def mlflow_run(out: Path, place: str = ""):
    """Return the client and the only run of MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(place or f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("offline-meal-v2")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def history(client, found) -> dict[str, list[tuple[int, float]]]:
    """Return all points of a run of MLflow but the best."""
    return {
        tag: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, tag)]
        for tag in found.data.metrics
        if not tag.startswith("best/")
    }


def test_a_killed_run_goes_on_in_the_same_tracked_run_with_every_point_once(
    photos, recipe, store_path, tmp_path
):
    out, file = tmp_path / "run", tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    killing = (
        "import os, sys; from pipeline.runs.tracking.trackers import Trackers\n"
        "show = Trackers.show\n"
        "def killed(self, metrics):\n"
        "    os.kill(os.getpid(), 9) if len(metrics) == 2 else show(self, metrics)\n"
        "Trackers.show = killed\n"
        "from cli import main; main(sys.argv[1:])"
    )
    words = [
        *("train-student", "--config", file, "--data", photos, "--store", store_path),
        *("--out", out, "--track", "wandb", "--track", "mlflow", "--device", "cpu"),
    ]
    died = subprocess.run(
        [sys.executable, "-c", killing, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert died.stderr.count("tracked in") == 2
    identity = json.loads((out / "tracking.json").read_text())["id"]
    client, found = mlflow_run(out)
    assert found.info.status == "RUNNING" and len(history(client, found)["training/loss"]) == 1

    longer = changed(recipe, train={"epochs": 3})
    train(longer, photos, out, store=store_path, device=CPU, track=BOTH)
    assert json.loads((out / "tracking.json").read_text())["id"] == identity
    expected = told(out)
    assert len(expected["validation/top1"]) == 3

    points, config, summary, code = offline_run(out)
    assert points == expected and code == 0
    assert summary["best/top1"] == max(top1 for _, top1 in expected["validation/top1"])
    written = flat(longer.with_resize("pillow").model_dump(mode="json"))
    assert written.keys() <= config.keys() and config["train.epochs"] == 3
    assert config["run.student"] == "test_vit" and config["run.classes"] == 3

    client, found = mlflow_run(out)
    assert history(client, found) == expected
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.metrics["best/top1"] == summary["best/top1"]
    assert written.keys() <= found.data.params.keys()
    assert found.data.params["train.epochs"] == "2" and found.data.tags["train.epochs"] == "3"
    assert found.data.tags["run.source"] == config["run.source"]
    assert found.data.tags["run.version"] == config["run.version"]
    assert {found.data.tags[MARK]} == {identity}

    # Nothing is written but in the run's folder.
    assert not any((tmp_path / "here").iterdir())
    others = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert all(name.startswith("fontlist") for name in others)  # matplotlib's


def test_what_trackers_leave_before_the_first_epoch_is_of_the_run(
    photos, recipe, store_path, tmp_path, monkeypatch
):
    def stopped(self) -> None:
        raise Stopped("SIGTERM")

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.training.loop.Run.train_pass", stopped)
        with pytest.raises(Stopped):
            train(recipe, photos, out, store=store_path, device=CPU, track=BOTH)
    assert {path.name for path in out.iterdir()} & {*LEFT} == {
        "tracking.json",
        "wandb",
        "mlflow.db",
    }
    # A run that was stopped isn't finished.
    assert mlflow_run(out)[1].info.status == "KILLED" and offline_run(out)[3] == 1
    train(recipe, photos, out, store=store_path, device=CPU)
    train(recipe, photos, out, store=store_path, device=CPU, track=BOTH)
    client, found = mlflow_run(out)
    assert found.info.status == "FINISHED" and history(client, found) == told(out)
    assert offline_run(out)[0] == told(out)


def test_a_server_that_hangs_is_a_warning_and_gets_all_points_later(
    photos, recipe, store_path, tmp_path, capsys
):
    out = tmp_path / "run"
    with hanging_server() as address:
        os.environ |= {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": address,
            "WANDB_API_KEY": 40 * "a",
            "WANDB_INIT_TIMEOUT": "2",
            "MLFLOW_TRACKING_URI": address,
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        }
        began = time.monotonic()
        train(recipe, photos, out, store=store_path, device=CPU, track=BOTH)
        # The tries: at the begin and at the end. Those between come too early.
        assert time.monotonic() - began < 30
    said = capsys.readouterr().err
    assert said.count("warning: MLflow could not be told") == 2
    assert said.count("warning: Weights & Biases could not be told") == 2
    assert len(told(out)["training/loss"]) == 2
    del os.environ["MLFLOW_TRACKING_URI"]
    os.environ["WANDB_MODE"] = "offline"
    sys.modules["wandb"].teardown()  # as at the end of a process
    train(recipe, photos, out, store=store_path, device=CPU, track=BOTH)
    client, found = mlflow_run(out)
    assert history(client, found) == told(out) and found.info.status == "FINISHED"
    assert offline_run(out)[0] == told(out)


def test_a_server_of_mlflow_that_comes_late_gets_every_point_at_its_own_step(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = f"http://127.0.0.1:{port}"
    os.environ |= {"MLFLOW_TRACKING_URI": place, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    out = tmp_path / "run"
    out.mkdir()
    passes = [
        {"epoch": epoch, "loss": 1.0 / (epoch + 1), "seconds": 1.0, "val_top1": 50.0 - epoch}
        for epoch in (1, 3, 5)  # two crops per image
    ]
    trackers = Trackers(Tracked(out, {"a.b": "x" * 7000}, {"store": "s"}), ["mlflow"])
    with trackers.following():
        trackers.show(passes[:1])
        assert trackers.guards[0].again > 0
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
                *("--port", str(port), "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{tmp_path}/server.db"),
                *("--artifacts-destination", str(tmp_path / "artifacts")),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{place}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.25)
            trackers.guards[0].again = 0.0
            trackers.show(passes)
            client, found = mlflow_run(out, place)
            assert found.info.status == "RUNNING"
            assert history(client, found)["training/loss"] == [(2, 0.5), (4, 0.25), (6, 1 / 6)]
            trackers._end(trackers.guards[0].tracker, "finished")
            found = client.get_run(found.info.run_id)
            assert found.info.status == "FINISHED" and found.data.metrics["best/top1"] == 49.0
            (best,) = client.get_metric_history(found.info.run_id, "best/top1")
            assert best.step == 2
            assert len(found.data.params["a.b"]) == LONGEST_PARAMETER
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_wandb_online_gets_what_its_server_lacks_and_is_not_waited_for_long(tmp_path, capfd):
    """The library is the real one; its server is an imitation, which answers what the
    library asks."""
    server = FakeWandb()
    os.environ |= {
        **{"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": 40 * "a"},
        "WANDB_FINISH_TIMEOUT": "2",
    }
    passes = [{"epoch": epoch, "loss": 1.0 / (epoch + 1), "seconds": 1.0} for epoch in range(4)]
    tracked = Tracked(tmp_path, {"a.b": 1}, {})
    trackers = Trackers(tracked, ["wandb"])
    with pytest.raises(ZeroDivisionError), trackers.following():
        trackers.show(passes[:2])
        raise ZeroDivisionError
    assert server.points("training/loss") == [(1, 1.0), (2, 0.5)] and server.codes == [1]
    for _ in range(2):  # the second start has nothing to add
        sys.modules["wandb"].teardown()
        trackers = Trackers(tracked, ["wandb"])
        with trackers.following():
            trackers.show(passes[:3])
            trackers.show(passes)
        assert server.points("training/loss") == [(e + 1, 1.0 / (e + 1)) for e in range(4)]
    assert server.codes == [1, 0, 0] and "Tried to log" not in capfd.readouterr().err
    sys.modules["wandb"].teardown()
    trackers = Trackers(tracked, ["wandb"])
    with trackers.following():
        server.silent = True
        began = time.monotonic()
        trackers.show([*passes, passes[0] | {"epoch": 4}])
        assert time.monotonic() - began < 2
    assert time.monotonic() - began < 15
    server.silent = False
    sys.modules["wandb"].teardown()
    server.shutdown()


def test_more_parameters_than_a_request_takes_are_all_told(tmp_path):
    config = {f"key.{number}": number for number in range(230)}
    tracker = MLflow(Tracked(tmp_path, config, {}), "offline-meal-v2")
    tracker.begin()
    assert len(mlflow_run(tmp_path)[1].data.params) == 230
    tracker.begin()  # the same run again
    assert len(mlflow_run(tmp_path)[1].data.params) == 230


def test_a_project_is_the_named_one_or_the_librarys_own(tmp_path):
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "theirs"
    for project, expected in (("", "theirs"), ("mine", "mine")):
        tracker = MLflow(Tracked(tmp_path, {}, {}), project)
        tracker.begin()
        run = tracker.client.get_run(tracker.id)
        assert tracker.client.get_experiment(run.info.experiment_id).name == expected
    assert Wanted.of("wandb:mine") == ("wandb", "mine")


@pytest.mark.parametrize(
    ("track", "repair"),
    [
        ("wandbd", "did you mean wandb?"),
        ("MLFlow", "did you mean mlflow?"),
        ("mlflow:", "pass mlflow:PROJECT"),
    ],
)
def test_an_unknown_tracker_is_refused_with_the_nearest_name(track, repair):
    status, _, err = command(
        *("train-student", "--config", "no", "--data", "no", "--out", "no", "--track", track)
    )
    assert status == 1 and repair in err and err.count("\n") == 1


@pytest.mark.parametrize("tracker", BOTH)
def test_a_package_that_is_missing_is_refused_before_anything_is_read(tracker, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        names.importlib.util, "find_spec", lambda name: None if name == tracker else find(name)
    )
    status, _, err = command(
        *("train-student", "--config", "no", "--data", "no", "--out", "no", "--track", tracker)
    )
    assert status == 1 and err.count("\n") == 1
    assert 'pip install "offline-meal-v2[track]"' in err and tracker in err


def test_without_a_key_of_wandb_a_run_is_refused_and_nothing_is_asked(tmp_path):
    code = (
        "from pipeline.runs.tracking.names import TrackingError\n"
        "from pipeline.runs.tracking.trackers import require_trackers\n"
        "try: require_trackers(('wandb',))\n"
        "except TrackingError as error: print(error)"
    )
    for mode, expected in (("online", "WANDB_API_KEY"), ("offline", "")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": mode},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert expected in done.stdout and bool(done.stdout) == bool(expected)


def test_trackers_are_refused_before_images_are_read(photos, recipe, tmp_path):
    with pytest.raises(TrackingError, match="did you mean mlflow"):
        train(recipe, photos, tmp_path / "run", device=CPU, track=("mlfow",))  # without a store
    assert not (tmp_path / "run").exists()


def test_no_tracker_is_imported_without_track(photos, recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(changed(recipe, train={"labels": "hard", "epochs": 1}).to_yaml())
    code = (
        # timm imports wandb where it can; now nobody can.
        "import sys; sys.modules.update(wandb=None, mlflow=None); from cli import main; "
        "main(sys.argv[1:])"
    )
    words = ["train-student", "--config", file, "--data", photos, "--out", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert not {path.name for path in (tmp_path / "run").iterdir()} & {*LEFT}


def test_of_several_processes_the_first_one_tells(photos, recipe, store_path, tmp_path):
    out, file = tmp_path / "run", tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    words = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "cli.py"),
        *("train-student", "--config", file, "--data", photos, "--store", store_path),
        *("--out", out, "--track", "wandb", "--track", "mlflow", "--device", "cpu"),
    ]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr.count("tracked in") == 2, done.stderr
    client, found = mlflow_run(out)
    assert history(client, found) == told(out) == offline_run(out)[0]


def test_a_copy_of_a_run_without_its_identity_is_a_run_of_its_own(tmp_path):
    (tmp_path / "run").mkdir()
    tracked = Tracked(tmp_path / "run", {}, {})
    assert tracked.identity() == tracked.identity()
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("*.json"))
    assert Tracked(tmp_path / "copy", {}, {}).identity() != tracked.identity()


def test_a_warning_holds_no_password_of_an_address():
    told = without_secrets("API request to https://ann:secret@tracker.example/api failed")
    assert told == "API request to https://…@tracker.example/api failed"
