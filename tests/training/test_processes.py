"""Training in several processes: any number of processes has the same global batches,
the same gradients to rounding, and exact evaluation. One process writes and prints. If
any process fails, one line says why, and no process is left waiting.

The processes are real, run the real command line and speak by gloo. They are forked
from a server that has imported every module (see support/killing.py). One test starts
the real torchrun.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.paths import ROOT
from support.small import CPU, changed, write_photos
from support.stages import evaluate, generate, make_replay, scan, stored_labels, train
from support.workers import House, Run, require_no_trace

from cache import LabelStore
from cache.errors import MealError
from cache.system import signals
from cache.system.claims import claims_of
from cache.system.signals import Stopped
from pipeline.config import ModelSpec
from pipeline.models.weights import load
from pipeline.provenance.fingerprint import FINGERPRINT_CROPS
from pipeline.runtime import distributed, rendezvous
from pipeline.runtime.launch import Launch, MeetingPoint

SOON = 30.0  # seconds in which processes notice that another is gone


@dataclass
class Bench:
    """A data set, its store, a recipe, and processes that train on it together."""

    house: House
    store: Path

    def start(
        self,
        world: int,
        out: Path,
        *options: object,
        per_rank: Sequence[tuple] = (),
        port: int | None = None,
        only: int | None = None,
    ) -> list[Run]:
        """Start the processes of one training. per_rank: further options of each. port:
        of the meeting point. only: start only the first ``only`` processes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = port or probe.getsockname()[1]
        together = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        arguments = [
            "train-student",
            f"--config={self.house.config}",
            f"--data={self.house.data}",
            f"--out={out}",
            "--device=cpu",
        ]
        if "--online" not in options and not any("--store" in str(option) for option in options):
            arguments.append(f"--store={self.store}")
        alone = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        return [
            self.house.start(
                *arguments,
                *options,
                *(per_rank[rank] if per_rank else ()),
                environment=(together | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                if world > 1
                else alone,
            )
            for rank in range(world)[:only]
        ]

    def train(self, world: int, out: Path, *options: object) -> list[str]:
        """Train to a good end, and return the stderr of each process."""
        runs = self.start(world, out, *options)
        assert [run.end() for run in runs] == [0] * world, "\n".join(run.said() for run in runs)
        for run in runs:
            require_no_trace(run)
        return [run.said() for run in runs]


@pytest.fixture(scope="module")
def bench(recipe, photos, store_path, tmp_path_factory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "recipe.yaml").write_text(changed(recipe, train={"epochs": 1}).to_yaml())
    house = House(folder, folder / "recipe.yaml", photos)
    yield Bench(house, store_path)
    house.end()


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


FIGURES = {
    "loss",
    "kl",
    "agreement",
    "lr",
    "images",
    "view",
    "discriminator_loss",
    "discriminator_accuracy",
    "discriminator_gradient",
    "discriminator_gradient_unbounded",
    "gradient_norm",
    "clipped",
    "val_loss_ema",
}


def require_same(one: Path, other: Path, *, weights: float) -> None:
    """Require equal metrics and weights but for rounding. weights: the largest allowed
    difference of a weight."""
    assert len(metrics(one)) == len(metrics(other))
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name in FIGURES & mine.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    a, b = load_file(one / "last.safetensors"), load_file(other / "last.safetensors")
    assert max((a[name] - b[name]).abs().max().item() for name in a) < weights


VARIANTS = {
    "plain": (),
    "discriminator": ("train.discriminator.lr=0.01", "train.discriminator.reversal=true"),
    "crops per image": ("train.crops_per_image=2", "train.epochs=2"),
    "mixed by area": ("train.cutmix.prob=1", "train.hard_weight=0.3"),
    "a last batch of two": ("train.batch_size=44",),
    "parts": ("train.accumulate=2", "train.clip_norm=0.5", "train.ema_decay=0.9"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_epoch_of_any_number_of_processes_is_that_of_one(bench, tmp_path, variant):
    """The student has no BatchNorm. One variant leaves a last batch of two rows to
    three processes: 90 = 2 · 44 + 2."""
    options = [f"--set={setting}" for setting in VARIANTS[variant]]
    bench.train(1, tmp_path / "1", *options)
    for world in (2, 3) if variant in ("plain", "a last batch of two") else (2,):
        bench.train(world, tmp_path / str(world), *options)
        require_same(tmp_path / "1", tmp_path / str(world), weights=2e-5)
    started = load(
        ModelSpec(model="test_vit", pretrained=False), classes=3, image_size=32, seed=0
    ).module.state_dict()
    ended = load_file(tmp_path / "1" / "last.safetensors")
    # The weights have moved, so that equal weights prove something.
    assert max((started[name] - ended[name]).abs().max().item() for name in started) > 2e-3


def test_the_gradient_of_a_step_is_that_of_one_process(bench, tmp_path):
    """In one step over all 90 images, at rate 1 and without momentum, the weights move
    by the gradient."""
    whole = [f"--set=train.{setting}" for setting in ("batch_size=90", "lr=1.0", "momentum=0.0")]
    bench.train(1, tmp_path / "1", *whole)
    started = load(
        ModelSpec(model="test_vit", pretrained=False), classes=3, image_size=32, seed=0
    ).module.state_dict()
    expected = {
        name: started[name] - tensor
        for name, tensor in load_file(tmp_path / "1" / "last.safetensors").items()
    }
    for world in (2, 4):  # four have 23, 23, 22 and 22: a mean of means would be wrong
        bench.train(world, tmp_path / str(world), *whole)
        for name, tensor in load_file(tmp_path / str(world) / "last.safetensors").items():
            torch.testing.assert_close(started[name] - tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_live_teachers_in_several_processes_teach_as_in_one(bench, tmp_path):
    bench.train(1, tmp_path / "1", "--online")
    bench.train(2, tmp_path / "2", "--online")
    require_same(tmp_path / "1", tmp_path / "2", weights=2e-5)


def test_batchnorm_sees_the_images_of_its_own_process_and_its_memory_is_averaged(bench, tmp_path):
    """One step is repeated by hand: each half of the batch is normalised by itself, and
    gradients and running statistics are averaged."""
    bench.train(
        2,
        tmp_path / "run",
        "--student=resnet10t",
        "--set=train.batch_size=90",
        "--set=train.momentum=0.0",
    )
    student = load(ModelSpec(model="resnet10t", pretrained=False), classes=3, image_size=32, seed=0)
    module, store = student.module.train(), LabelStore.open(bench.store)
    began = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with make_replay(
        stored_labels(store, 2),
        bench.house.data / "train",
        sizes=[32],
        batch_size=90,
        seed=0,
        rendering=_Rendering(),
    ).epoch(0) as batches:
        (batch,) = batches
    seen = []
    for half in np.array_split(np.arange(90), 2):
        module.load_state_dict(
            began
            | {
                name: tensor
                for name, tensor in module.state_dict().items()
                if "running" not in name and "tracked" not in name
            }
        )
        p = torch.from_numpy(store.probabilities(0, batch.rows[half]))
        (-(p * student(batch.pixels[32][half]).log_softmax(1)).sum() / 90).backward()
        seen.append(
            {
                name: tensor.clone()
                for name, tensor in module.state_dict().items()
                if "running" in name
            }
        )
    ended = load_file(tmp_path / "run" / "last.safetensors")
    for name in seen[0]:
        torch.testing.assert_close(
            ended[name], (seen[0][name] + seen[1][name]) / 2, rtol=1e-4, atol=1e-6
        )
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            ended[name], began[name] - 0.01 * parameter.grad, rtol=1e-3, atol=1e-5
        )


class _Rendering:
    threads = 2


def test_validation_counts_every_image_once_whatever_the_number_of_processes(bench, tmp_path):
    """At a rate near zero the model is the same, and so are the counts. With 21 images
    in batches of 2 for each of 3 processes, some processes have one batch less."""
    still = ["--set=train.lr=1e-12", "--set=train.batch_size=6"]
    found = {}
    for world in (1, 2, 3):
        bench.train(world, tmp_path / str(world), *still)
        found[world] = metrics(tmp_path / str(world))[0]
    folder = bench.house.data / "val"
    manifest = scan(folder, ["ant", "bee", "cat"], exif="ignore")
    model = load(ModelSpec(model="test_vit", pretrained=False), classes=3, image_size=32, seed=0)
    model.interpolation = "bilinear"
    exact = evaluate([model], folder, manifest, 3, device=CPU)["models"][0]
    for world in found:
        assert (
            found[world]["val_top1"] == exact["top1"] and found[world]["val_top5"] == exact["top5"]
        )
        assert found[world]["val_loss"] == pytest.approx(exact["loss"], rel=1e-5)


def test_one_process_writes_and_speaks(bench, tmp_path):
    said = bench.train(3, tmp_path / "run", "--epochs=2")
    assert "epoch 2/2" in said[0] and said[1:] == ["", ""]
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [0, 1]
    assert not claims_of(tmp_path / "run").exists()


def test_a_run_goes_on_with_another_number_of_processes(bench, tmp_path):
    judged = "--set=train.discriminator.lr=0.01"
    bench.train(1, tmp_path / "whole", judged, "--epochs=3")
    for epochs, world in enumerate((3, 1, 2), 1):
        said = bench.train(world, tmp_path / "parts", judged, f"--epochs={epochs}")
        assert (f"after {epochs - 1} epochs" in said[0]) == (epochs > 1)
    require_same(tmp_path / "whole", tmp_path / "parts", weights=5e-5)


def test_what_all_would_refuse_is_refused_once(bench, tmp_path):
    runs = bench.start(2, tmp_path / "run", "--set=train.views=9")
    assert "train.views is 9" in runs[0].failed_with()
    assert (runs[1].end(), runs[1].said()) == (1, "")  # though each process finds the fault
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    runs = bench.start(3, tmp_path / "full")
    assert "is not empty and holds no run" in runs[0].failed_with()
    assert [(run.end(), run.said()) for run in runs[1:]] == [(1, ""), (1, "")]
    small = ("--set=train.batch_size=5",)
    parts = ("--set=train.batch_size=16", "--set=train.accumulate=4")
    for options, message in (
        (small, "5 is fewer than two images for each of 3 processes; set it to 6 or more"),
        (parts, "16 in each of 3 processes; lower it, or raise train.batch_size to 24"),
    ):
        runs = bench.start(3, tmp_path / "small", *options)
        assert f"train.batch_size {message}" in runs[0].failed_with()
        assert [(run.end(), run.said()) for run in runs[1:]] == [(1, ""), (1, "")]
        assert not (tmp_path / "small").exists()


def test_a_run_that_diverges_says_so_once(bench, tmp_path):
    runs = bench.start(2, tmp_path / "run", "--set=train.lr=1e30")
    assert "lower train.lr (now 1e+30)" in runs[0].failed_with()
    assert (runs[1].end(), runs[1].said()) == (1, "")


def test_what_one_finds_wrong_before_the_first_step_is_said_by_that_one(bench, tmp_path):
    """One of two machines has its photographs in another folder, without a val/."""
    shutil.copytree(bench.house.data / "train", tmp_path / "data" / "train")
    runs = bench.start(2, tmp_path / "run", per_rank=[(), (f"--data={tmp_path / 'data'}",)])
    assert "has no val/ here, and has one where the first process runs" in runs[1].failed_with()
    assert runs[0].end() == 1
    require_no_trace(runs[0])


# ---- how processes find each other

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is set and empty"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', which is no number from 1 on"),
        ({"WORLD_SIZE": None, "RANK": "1"}, "RANK is 1, and no WORLD_SIZE is set"),
        ({"RANK": None}, "WORLD_SIZE is 2, and RANK is not set"),
        ({"RANK": ""}, "RANK is set and empty; set it to this process's number, 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1', which is no number from 0 on"),
        ({"RANK": "²"}, "RANK is '²', which is no number from 0 on"),
        ({"RANK": "2"}, "RANK is 2, and WORLD_SIZE is 2"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set; start them with torchrun"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is empty; start them with torchrun"),
        ({"MASTER_ADDR": "a..b"}, "MASTER_ADDR 'a..b' is no name of a machine"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is set and empty"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0', which is no number from 1 on"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536, and ports end at 65535"),
    ],
)
def test_a_variable_of_torchrun_that_is_missing_or_no_number_is_named(monkeypatch, changes, says):
    for name, value in (LAUNCHED | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
            name, value
        )
    with pytest.raises(MealError, match=f"^.*{re.escape(says)}"), distributed.joining(CPU):
        pass


def test_both_stages_name_such_a_variable_in_one_line(bench, tmp_path):
    (run,) = bench.start(1, tmp_path / "run", "--epochs=2")
    assert run.end() == 0  # WORLD_SIZE 1 is one process
    given = (f"--config={bench.house.config}", f"--data={bench.house.data}", "--device=cpu")
    for environment in ({"WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}, {"LOCAL_WORLD_SIZE": ""}):
        for command in (
            ("train-student", *given, f"--store={bench.store}", f"--out={tmp_path / 'no'}"),
            ("generate-labels", *given, f"--store={tmp_path / 'no'}", "--set=render.threads=null"),
        ):
            (name,) = environment
            run = bench.house.start(*command, environment=environment)
            assert run.failed_with().startswith(f"error: {name} is ")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("value", ["", "one"])
def test_a_local_rank_that_is_no_number_is_named(monkeypatch, value):
    monkeypatch.setenv("LOCAL_RANK", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MealError, match="^LOCAL_RANK is "):
        distributed.own_device()


def test_a_port_that_is_taken_is_named(bench, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (run, *_) = bench.start(2, tmp_path / "run", port=port, only=1)
        assert f"MASTER_PORT {port} is taken by another program" in run.failed_with()


@pytest.mark.parametrize(("rank", "name"), [(0, "SIGTERM"), (1, "SIGINT")])
def test_a_process_that_waits_for_the_others_obeys_a_signal(bench, tmp_path, rank, name):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = _port(place)  # nobody answers there: not even a listener, for process 1
        if rank == 0:
            place.close()
        given = {"RANK": str(rank), "MASTER_PORT": str(port)}
        run = bench.house.start(
            *("train-student", f"--config={bench.house.config}", f"--data={bench.house.data}"),
            *("--device=cpu", f"--store={bench.store}", f"--out={tmp_path / 'run'}"),
            environment=LAUNCHED | given,
        )
        run.wait_for(f"waiting for process {1 - rank} of 2 at 127.0.0.1:{port}")
        run.signal(name)
        assert f"stopped by {name}" in run.failed_with() and run.stopped_after() < SOON
    assert not (tmp_path / "run").exists()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return _port(probe)


def _port(bound: socket.socket) -> int:
    return bound.getsockname()[1]


def meet(monkeypatch, rank: int, port: int, host: str = "127.0.0.1") -> str:
    """Return why a process that is alone doesn't meet the other one, soon."""
    monkeypatch.setattr(rendezvous, "LIMIT", 0.5)
    monkeypatch.setattr(rendezvous, "ANSWERS", 2.0)
    monkeypatch.setattr("pipeline.runtime.progress._speaks", True)
    with pytest.raises(MealError) as missing:
        rendezvous.meet(Launch(rank, 2), MeetingPoint(host, port), timedelta(seconds=5))
    return str(missing.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_after_a_limit_a_line_says_who_is_missing(monkeypatch, rank):
    port = _free_port()
    assert f"in vain for process {1 - rank} of 2 at 127.0.0.1:{port}" in meet(
        monkeypatch, rank, port
    )


def test_a_name_that_nobody_knows_is_said_at_the_limit(monkeypatch):
    """A cluster may give process 0's machine its name only once the machine runs."""

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "MASTER_ADDR is unknown here: Name or service not known" in meet(monkeypatch, 1, 2, "x")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", None])
def test_another_program_at_the_port_is_told_from_process_0(monkeypatch, capfd, answer):
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def serve() -> None:
            with suppress(OSError):
                while answer:
                    with stranger.accept()[0] as connection:
                        connection.recv(64)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        assert "is not process 0 of this run" in meet(monkeypatch, 1, _port(stranger))
    assert capfd.readouterr().err == ""  # torch prints screens of stack


def test_two_of_one_rank_and_another_number_of_processes_are_refused(bench, tmp_path):
    for given, says in (
        ({"RANK": "1"}, "has RANK 1 too"),
        ({"RANK": "2", "WORLD_SIZE": "4"}, "WORLD_SIZE is 4 here, and 3 in another process"),
    ):
        common = LAUNCHED | {"WORLD_SIZE": "3", "MASTER_PORT": str(_free_port())}
        runs = [
            bench.house.start(
                *("train-student", f"--config={bench.house.config}", f"--data={bench.house.data}"),
                *("--device=cpu", f"--store={bench.store}", f"--out={tmp_path / 'run'}"),
                environment=common | own,
            )
            for own in ({"RANK": "0"}, {"RANK": "1"})
        ]
        runs[0].wait_for("waiting for process 2 of 3")
        odd = bench.house.start(
            *("train-student", f"--config={bench.house.config}", f"--data={bench.house.data}"),
            *("--device=cpu", f"--store={bench.store}", f"--out={tmp_path / 'run'}"),
            environment=common | given,
        )
        assert says in odd.failed_with()
        for run in runs:
            run.signal("SIGTERM")
        assert [run.end() for run in runs] == [1, 1]


def test_a_signal_ends_a_process_that_waits_in_a_library_for_one_that_sleeps(bench, tmp_path):
    """Python obeys no signal while the main thread waits in gloo."""
    runs = bench.start(2, tmp_path / "run", "--epochs=5000")
    runs[0].wait_for("epoch 1/5000")
    os.kill(runs[1].process.pid, signal.SIGSTOP)
    time.sleep(1.0)
    runs[0].signal("SIGTERM")
    assert runs[0].failed_with().startswith("stopped by SIGTERM")
    runs[1].kill()
    epochs = len(metrics(tmp_path / "run"))
    bench.train(2, tmp_path / "run", f"--epochs={epochs + 1}")  # no finished epoch is lost


def test_batchnorm_over_all_processes_is_refused_on_a_cpu(bench, tmp_path):
    (run,) = bench.start(1, tmp_path / "run", "--set=train.sync_bn=true")
    assert "train.sync_bn is for GPUs" in run.failed_with()


@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_process_is_killed_the_others_end_in_a_line(bench, tmp_path, lost):
    runs = bench.start(2, tmp_path / "run", "--epochs=5000")
    runs[0].wait_for("epoch 1/5000")
    runs[lost].kill()
    began, other = time.monotonic(), runs[1 - lost]
    assert other.end() == 1 and time.monotonic() - began < SOON
    require_no_trace(other)
    # Only the first process prints.
    assert ("another process of this run has ended" in other.said()) == (lost == 1)
    epochs = len(metrics(tmp_path / "run"))
    # No finished epoch is lost.
    said = bench.train(2, tmp_path / "run", f"--epochs={epochs + 1}")
    assert f"after {epochs} epochs" in said[0] or f"after {epochs + 1} epochs" in said[0]


def test_an_image_that_changes_in_one_processs_part_is_named_by_that_one(bench, tmp_path, recipe):
    data = tmp_path / "data"
    write_photos(data, 30, seed=3)
    generate(changed(recipe, crops={"views": 1}), data, tmp_path / "s.zarr", device=CPU)
    store = LabelStore.open(tmp_path / "s.zarr")
    replay = make_replay(
        stored_labels(store, 1),
        data,
        sizes=[32],
        batch_size=16,
        seed=0,
        rendering=_Rendering(),
        rank=1,
        world=2,
    )
    with replay.epoch(0) as batches:
        # images that no check reads before training
        theirs = [row for batch in batches for row in batch.rows if row >= FINGERPRINT_CROPS]
    photo = data / store.images.path[theirs[0]]
    photo.write_bytes(photo.read_bytes()[:-1] + b"x")  # of the same size: noticed at reading
    runs = bench.start(2, tmp_path / "run", f"--store={tmp_path / 's.zarr'}", f"--data={data}")
    assert f"{photo} has changed since the manifest was made" in runs[1].failed_with()
    assert runs[0].end() == 1
    require_no_trace(runs[0])


def test_asked_to_stop_all_stop(bench, tmp_path):
    runs = bench.start(3, tmp_path / "run", "--epochs=5000")
    runs[0].wait_for("epoch 1/5000")
    for run in runs:  # as torchrun passes the signal on
        run.signal("SIGTERM")
    assert [run.end() for run in runs] == [1] * 3
    for run in runs:
        require_no_trace(run)
        assert run.stopped_after() < SOON
    assert (
        "stopped by SIGTERM" in runs[0].said() and "stopped" not in runs[1].said() + runs[2].said()
    )


def test_one_that_is_asked_to_stop_while_the_others_have_gone_already_says_so(monkeypatch):
    """A signal comes to all processes. The last to get it has lost the others by
    then."""
    with signals.on_signals(), pytest.raises(Stopped), distributed._naming_the_dead():
        monkeypatch.setattr(signals, "_asked", signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")


def test_torchrun_fills_one_store_and_trains_one_student(bench, tmp_path, recipe):
    """The README's command lines run with two processes."""
    store, out = tmp_path / "labels.zarr", tmp_path / "run"

    def torchrun(*arguments: object) -> str:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(ROOT / "cli.py"),
            *map(str, arguments),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    given = (f"--config={bench.house.config}", f"--data={bench.house.data}", "--device=cpu")
    torchrun("generate-labels", *given, f"--store={store}")
    said = torchrun("train-student", *given, f"--store={store}", f"--out={out}")
    assert len(re.findall("epoch 1/1", said)) == 1
    one = bench.train(1, tmp_path / "one")
    assert one and len(metrics(out)) == 1
    require_same(out, tmp_path / "one", weights=2e-5)


def test_torchrun_starts_processes_again_when_one_dies(bench, tmp_path):
    """torchrun's server outlives the processes, and with it what the dead have written
    there."""
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("--max-restarts=1", str(ROOT / "cli.py"), "train-student", "--device=cpu"),
        *(f"--config={bench.house.config}", f"--data={bench.house.data}", "--epochs=60"),
        *(f"--store={bench.store}", f"--out={out}"),
    ]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            command, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        )
    try:
        while "epoch 2/60" not in (tmp_path / "said").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(300) == 0, (tmp_path / "said").read_text()
    finally:
        process.kill()
    assert "going on with" in (tmp_path / "said").read_text()
    assert [line["epoch"] for line in metrics(out)] == list(range(60))


def test_without_torchrun_nothing_of_this_is_asked_for(photos, recipe, store_path, tmp_path):
    train(
        changed(recipe, train={"epochs": 1}), photos, tmp_path / "run", store=store_path, device=CPU
    )
    assert not torch.distributed.is_initialized()
