"""What both stages do on a GPU: the labels of a CPU to a stated bound, pixels that arrive whole, and a student that learns. Skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, changed

from cache import LabelStore
from pipeline.generate import generate
from pipeline.recheck import recheck
from pipeline.student import train
from pipeline.transfer import Sender

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch finds none here")
CUDA, ROOT = torch.device("cuda"), Path(__file__).parents[1]


def apart(a: LabelStore, b: LabelStore) -> np.ndarray:
    """Total variation between the labels of two stores, a row."""
    rows = slice(0, len(a.images))
    return np.abs(a.probabilities(0, rows) - b.probabilities(0, rows)).sum(axis=1) / 2


def test_tensors_arrive_whole_while_the_device_is_busy():
    send, busy = Sender(CUDA), torch.randn(2000, 2000, device=CUDA)
    for i in range(50):
        pixels = torch.randint(0, 256, (64, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        with send.beside():
            sent = send({"pixels": [pixels], "n": i})
        for _ in range(5):
            busy = busy @ busy.T / 2000
        got = sent.received()
        assert got["n"] == i and torch.equal(got["pixels"][0].cpu(), pixels)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 0.02), ("bfloat16", 0.1), ("float16", 0.1)])
def test_labels_are_those_of_a_cpu_to_a_bound(photos, recipe, tmp_path, precision, bound):
    exact = changed(recipe, store={"codec": "float32", "precision": precision}, crops={"views": 1})
    on_cpu = generate(changed(exact, store={"precision": "float32"}), photos, tmp_path / "cpu.zarr", device=CPU)
    on_gpu = generate(exact, photos, tmp_path / "gpu.zarr", device=CUDA)
    assert apart(on_cpu, on_gpu).max() < bound
    assert recheck(tmp_path / "gpu.zarr", photos / "train", [], 20, device=CUDA, seed=0, threads=2)["trusted"]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_student_learns_on_a_gpu_what_it_learns_on_a_cpu(photos, recipe, tmp_path, backend, compiled):
    made = changed(recipe, render={"backend": backend}, crops={"views": 1})
    generate(made, photos, tmp_path / "s.zarr", device=CUDA)
    short = changed(made, train={"epochs": 1, "compile": compiled, "discriminator": {"lr": 0.001}})
    on_gpu = train(short, photos, tmp_path / "gpu", store=tmp_path / "s.zarr", device=CUDA)
    if backend == "cpu":
        on_cpu = train(changed(short, train={"compile": False}), photos, tmp_path / "cpu", store=tmp_path / "s.zarr", device=CPU)
        assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=1e-2)
    half = changed(short, train={"precision": "bfloat16"})
    assert train(half, photos, tmp_path / "half", store=tmp_path / "s.zarr", device=CUDA)["loss"] == pytest.approx(on_gpu["loss"], rel=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sync_bn", ["false", "true"])
def test_two_gpus_train_as_one(photos, recipe, store_path, tmp_path, sync_bn):
    (tmp_path / "recipe.yaml").write_text(changed(recipe, train={"epochs": 1}).to_yaml())
    losses = []
    for n in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", ROOT / "cli.py", "train-student"]
        command += ["--config", tmp_path / "recipe.yaml", "--data", photos, "--store", store_path, "--out", tmp_path / str(n)]
        command += ["--set", f"train.sync_bn={sync_bn}", *(["--student", "resnet10t"] if sync_bn == "true" else [])]
        subprocess.run([str(part) for part in command], check=True, env={**os.environ})
        losses.append(json.loads((tmp_path / str(n) / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
