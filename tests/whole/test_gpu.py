"""Both stages on a GPU: labels are a CPU's to a stated bound, pixels arrive whole, and
a student learns. The tests are skipped on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from support.paths import ROOT
from support.small import CPU, changed
from support.stages import crop_renderer, evaluate, generate, recheck, scan, train

from cache import LabelStore
from pipeline.models.weights import load
from pipeline.render.hardware_jpeg import hardware_engines
from pipeline.runtime.device_transfer import Returning, Sender

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and torch finds none here"
)


BACKENDS = [
    "gpu",
    pytest.param(
        "gpu-hardware",
        marks=pytest.mark.skipif(
            not hardware_engines(), reason="needs a GPU with a JPEG decoder in hardware"
        ),
    ),
]
AMPERE = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU with TF32, of compute capability 8.0 or later",
)


def apart(a: LabelStore, b: LabelStore) -> np.ndarray:
    """Return the total variation between the labels of two stores, by row."""
    rows = slice(0, len(a.images))
    return np.abs(a.probabilities(0, rows) - b.probabilities(0, rows)).sum(axis=1) / 2


def test_tensors_arrive_whole_while_the_device_is_busy():
    send, busy = Sender(CUDA), torch.randn(2000, 2000, device=CUDA)
    for i in range(50):
        pixels = torch.randint(
            0, 256, (64, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)
        )
        with send.beside():
            sent = send({"pixels": [pixels], "n": i})
        for _ in range(5):
            busy = busy @ busy.T / 2000
        got = sent.received()
        assert got["n"] == i and torch.equal(got["pixels"][0].cpu(), pixels)


def test_labels_that_come_back_are_those_of_their_own_pass():
    """Later work on the GPU doesn't change labels on their way back."""
    busy = torch.randn(2000, 2000, device=CUDA)
    returning = []
    for i in range(20):
        made = torch.full((64, 100), float(i), device=CUDA)
        returning.append(Returning(made, made > 10))
        del made  # its memory may go to another tensor
        for _ in range(5):
            busy = busy @ busy.T / 2000
    for i, one in enumerate(returning):
        numbers, larger = one.arrived()
        assert not numbers.is_cuda and (numbers == i).all() and (larger == (i > 10)).all()


# Total variation. The largest seen for the tests' teachers, emulated on a CPU, was
# 3.6e-4 in TF32, 3.0e-3 in bfloat16, 5.0e-4 in float16.
BOUNDS = {"float32": 1e-4, "tf32": 2e-3, "bfloat16": 1e-2, "float16": 2e-3}
PRECISIONS = [pytest.param(p, marks=AMPERE) if p == "tf32" else p for p in BOUNDS]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_are_those_of_a_cpu_to_a_bound(photos, recipe, tmp_path, precision):
    exact = changed(recipe, store={"codec": "float32", "precision": precision}, crops={"views": 1})
    on_cpu = generate(
        changed(exact, store={"precision": "float32"}), photos, tmp_path / "cpu.zarr", device=CPU
    )
    on_gpu = generate(exact, photos, tmp_path / "gpu.zarr", device=CUDA)
    assert apart(on_cpu, on_gpu).max() < BOUNDS[precision]
    assert on_gpu.attributes["made_with"]["gpu"] == torch.cuda.get_device_name()
    for device in (CUDA, CPU):  # each device allows the rounding that it explains
        assert recheck(
            tmp_path / "gpu.zarr",
            photos / "train",
            list(recipe.teachers),
            20,
            device=device,
            seed=0,
            threads=2,
        )["trusted"]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_compiled_teachers_say_the_same_to_rounding(photos, recipe, tmp_path, precision):
    exact = changed(recipe, store={"codec": "float32", "precision": precision}, crops={"views": 1})
    stores = [
        generate(changed(exact, store={"compile": c}), photos, tmp_path / f"{c}.zarr", device=CUDA)
        for c in (False, True)
    ]
    assert apart(*stores).max() < BOUNDS[precision]


def rendered(
    blobs: list[bytes],
    boxes: np.ndarray,
    flips: np.ndarray,
    backend: str,
    order: np.ndarray,
    batch: int,
    *more: int,
) -> np.ndarray:
    """Render crops at 64 px in an order and in batches, perhaps beside other sizes, and
    return them in their own order."""
    renderer = crop_renderer(
        [64, *more], 1, batch, interpolation="bilinear", exif="ignore", backend=backend
    )
    parts = [order[first : first + batch] for first in range(0, len(order), batch)]
    made = torch.cat(
        [
            renderer([blobs[i] for i in rows], boxes[None, rows], flips[None, rows])[0][64]
            for rows in parts
        ]
    )
    return made.cpu().numpy()[np.argsort(order)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gpus_pixels_depend_on_no_batch_order_or_size(photos, store_path, backend):
    store = LabelStore.open(store_path)
    blobs = [(photos / "train" / path).read_bytes() for path in store.images.path]
    boxes, flips = store.crops(0, slice(None))
    own, mixed = np.arange(90), np.random.default_rng(0).permutation(90)
    base = rendered(blobs, boxes, flips, backend, own, 32)
    for order, batch, *more in (
        (own, 32),
        (mixed, 32),
        (own, 7),
        (mixed, 1),
        (own, 90),
        (own, 32, 33),
    ):
        assert (rendered(blobs, boxes, flips, backend, order, batch, *more) == base).all(), (
            batch,
            more,
        )
    busy, stream = torch.randn(4096, 4096, device=CUDA), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(200):  # many batches are under way while others use the GPU
            torch.mm(busy, busy)
    assert (rendered(blobs, boxes, flips, backend, mixed, 8) == base).all()
    cpu = rendered(blobs, boxes, flips, "cpu", own, 32)
    assert np.abs(base.astype(int) - cpu).mean() < 2  # levels: other rounding, but the same crops


def test_one_kernel_steps_all_weights_as_one_for_each_does(recipe):
    """The weights have the memory layout of the project's models, among them depthwise
    and 1 × 1 convolutions."""
    ended = []
    for how in ({"fused": True}, {"foreach": False}):
        model = load(recipe.teachers[1]).to(CUDA).module
        draw, optimizer = (
            torch.Generator(CUDA).manual_seed(0),
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **how),
        )
        for rate in (0.1, 0.05, 0.01):
            optimizer.param_groups[0]["lr"] = rate
            for p in model.parameters():
                p.grad = torch.empty_like(p).normal_(generator=draw)
            optimizer.step()
        ended.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*ended, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_run_of_a_cpu_goes_on_here_in_one_kernel(photos, recipe, store_path, tmp_path):
    for epochs, device, fused in ((1, CPU, None), (2, CUDA, True), (3, CPU, None)):
        train(
            changed(recipe, train={"epochs": epochs, "milestones": []}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=device,
        )
        state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
        assert [group["fused"] for group in state["optimizer"]["param_groups"]] == [fused]


def test_a_run_trains_in_bfloat16_unless_told_and_with_all_that_timm_has(
    photos, recipe, store_path, tmp_path
):
    how = {"optimizer": "adamw", "decay_norm_and_bias": False, "clip_norm": 1.0, "accumulate": 2}
    how |= {"ema_decay": 0.9, "milestones": []}
    losses = {}
    for precision in (None, "float32"):
        out = tmp_path / str(precision)
        for epochs, device in ((1, CPU if precision else CUDA), (3, CUDA)):
            values = how | {"precision": precision, "epochs": epochs}
            made = train(
                changed(recipe, train=values), photos, out, store=store_path, device=device
            )
        losses[precision] = made["loss"]
    said = yaml.safe_load((tmp_path / "None" / "config.yaml").read_text())["train"]["precision"]
    assert said == ("bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32")
    assert losses[None] == pytest.approx(losses["float32"], rel=0.05)


@pytest.mark.parametrize("backend", ["cpu", *BACKENDS])
def test_evaluation_counts_as_on_a_cpu(photos, recipe, backend):
    models = [load(spec) for spec in recipe.teachers]
    found = scan(photos / "val", ["ant", "bee", "cat"], exif="ignore")
    figures = {}
    for device, where in ((CPU, "cpu"), (CUDA, backend)):
        models = [model.to(device) for model in models]
        figures[device] = evaluate(
            models, photos / "val", found, 3, device=device, batch_size=8, backend=where
        )["ensemble"]
    assert figures[CUDA]["loss"] == pytest.approx(
        figures[CPU]["loss"], rel=1e-4 if backend == "cpu" else 0.1
    )


@pytest.mark.parametrize(
    ("backend", "compiled"),
    [("cpu", False), ("cpu", True), *((backend, False) for backend in BACKENDS)],
)
def test_a_student_learns_on_a_gpu_what_it_learns_on_a_cpu(
    photos, recipe, tmp_path, backend, compiled
):
    made = changed(recipe, render={"backend": backend}, crops={"views": 1})
    generate(made, photos, tmp_path / "s.zarr", device=CUDA)
    exact = {"precision": "float32", "compile": compiled}
    short = changed(made, train=exact | {"epochs": 1, "discriminator": {"lr": 0.001}})
    on_gpu = train(short, photos, tmp_path / "gpu", store=tmp_path / "s.zarr", device=CUDA)
    if backend == "cpu":
        on_cpu = train(
            changed(short, train={"compile": False}),
            photos,
            tmp_path / "cpu",
            store=tmp_path / "s.zarr",
            device=CPU,
        )
        assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=1e-2)
    half = changed(short, train={"precision": "bfloat16"})
    assert train(half, photos, tmp_path / "half", store=tmp_path / "s.zarr", device=CUDA)[
        "loss"
    ] == pytest.approx(on_gpu["loss"], rel=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sync_bn", ["false", "true"])
def test_two_gpus_train_as_one(photos, recipe, store_path, tmp_path, sync_bn):
    exact = changed(recipe, train={"epochs": 1, "precision": "float32"})
    (tmp_path / "recipe.yaml").write_text(exact.to_yaml())
    losses = []
    for n in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={n}",
            ROOT / "cli.py",
            "train-student",
        ]
        command += [
            "--config",
            tmp_path / "recipe.yaml",
            "--data",
            photos,
            "--store",
            store_path,
            "--out",
            tmp_path / str(n),
        ]
        command += [
            "--set",
            f"train.sync_bn={sync_bn}",
            *(["--student", "resnet10t"] if sync_bn == "true" else []),
        ]
        subprocess.run([str(part) for part in command], check=True, env={**os.environ})
        losses.append(json.loads((tmp_path / str(n) / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
