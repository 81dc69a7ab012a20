"""Find out whether a GPU's results are right: its pixels, its labels beside float32 on
the CPU, its training step beside the CPU's, and two processes beside one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from finding import Bench, Finding, at_most
from parts import CPU, seconds, stored
from PIL import Image
from support.stages import crop_renderer

from cache.format.codec import divergence
from pipeline.config import CropPolicy
from pipeline.models.model import Model, ensemble
from pipeline.models.weights import load
from pipeline.provenance import description
from pipeline.render import dali
from pipeline.render.dali import WholeDecode
from pipeline.render.hardware_jpeg import hardware_engines
from pipeline.render.settings import RenderSettings
from pipeline.runtime.precision import ROUNDING
from pipeline.sampling import philox, random_crop

FEW, BATCH = 96, 64  # photographs that are rendered in many ways; images of a batch
# Bounds of the error of a first gradient, in the Euclidean norm, relative to the CPU's
# gradient in float32: some ten times the effect of rounding that was seen on a CPU.
GRADIENT = {"float32": 1e-3, "tf32": 3e-2, "bfloat16": 0.3}
ALIKE = 1e-3  # relative difference between the losses of one process and of two, at most


def the_machine(bench: Bench) -> Iterator[Finding]:
    """Name the machine and its versions, and measure the greatest speed of its
    connection and of its arithmetic."""
    import nvidia.dali
    import timm

    versions = {
        "torch": torch.__version__,
        "dali": nvidia.dali.__version__,
        "timm": timm.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    if not bench.gpu:
        yield Finding("machine", "a CPU", detail=versions)
        return
    facts = description.gpu_facts()
    yield Finding("machine", facts.pop("gpu"), detail=facts | versions)
    n = 2**26
    pinned, there = (
        torch.empty(n, dtype=torch.uint8, pin_memory=True),
        torch.empty(n, dtype=torch.uint8, device=bench.device),
    )
    there.copy_(pinned)
    copying = min(seconds(lambda: there.copy_(pinned, non_blocking=True)) for _ in range(5))
    a, b = (torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    multiplying = min(seconds(lambda: a @ b) for _ in range(5))
    yield Finding(
        "GB/s from pinned memory to the GPU", n / copying / 1e9, "≥ 10", n / copying > 1e10
    )
    yield Finding("TFLOP/s of a large bfloat16 product", 2 * 8192**3 / multiplying / 1e12)
    yield Finding(
        "hardware JPEG engines", "unknown" if (n := hardware_engines()) is None else float(n)
    )


# ---- pixels


def odd_kinds() -> dict[str, bytes]:
    """Make pictures of many kinds, some for hardware decoders and some not."""
    photo = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (20, 27, 3), dtype=np.uint8)
    ).resize((270, 200))
    found = {}
    for name, picture, kind, how in (
        ("progressive JPEG", photo, "JPEG", {"progressive": True}),
        ("JPEG 4:4:4", photo, "JPEG", {"subsampling": 0}),
        ("JPEG 4:2:2", photo, "JPEG", {"subsampling": 1}),
        ("grey JPEG", photo.convert("L"), "JPEG", {}),
        ("CMYK JPEG", photo.convert("CMYK"), "JPEG", {}),
        ("PNG", photo, "PNG", {}),
        ("tiny JPEG", photo.crop((0, 0, 9, 7)), "JPEG", {}),
    ):
        out = io.BytesIO()
        picture.save(out, kind, **how)
        found[name] = out.getvalue()
    return found


def crops_of(blobs: list[bytes], views: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Draw boxes [views, n, 4] and flips [views, n], as a store would have them."""
    whole = WholeDecode(RenderSettings())
    height, width = np.array([whole(blob) for blob in blobs]).T
    identity = philox.identities(np.array([f"{i:04d}" for i in range(len(blobs))], object))
    drawn = [random_crop.draw(CropPolicy(), identity, height, width, view) for view in range(views)]
    return np.stack([boxes for boxes, _ in drawn]), np.stack([flips for _, flips in drawn])


def pixels(bench: Bench) -> Iterator[Finding]:
    """Find out whether a crop's pixels depend on the other crops of its batch, and how
    far they are from the CPU's pixels."""
    for backend in bench.backends():
        kinds = odd_kinds()
        look = WholeDecode(RenderSettings(backend=backend))
        refused = [name for name, blob in kinds.items() if look(blob) is None]
        if refused:
            yield Finding(
                f"pictures that {backend} can't decode", ", ".join(refused), "none", False
            )
        blobs = bench.encoded[:FEW] + [blob for name, blob in kinds.items() if name not in refused]
        base, moved = moving(bench, backend, blobs)
        yield at_most(
            f"crops whose pixels depend on the batch, {backend}",
            max(moved.values()),
            0,
            **{"of": len(blobs), **moved},
        )
        if backend != "cpu":
            apart = np.abs(base.astype(int) - moving(bench, "cpu", blobs, only=())[0])
            detail = {
                "largest": int(apart.max()),
                "crops that differ": int(apart.reshape(len(apart), -1).any(axis=1).sum()),
                "of": len(blobs),
            }
            yield Finding(
                f"{backend} pixels beside the CPU's, mean difference in levels",
                float(apart.mean()),
                "below 1",
                None,
                detail,
            )
    if bench.gpu:
        with dalis_own_share():
            moved = moving(bench, "gpu", bench.encoded[:FEW])[1]
        yield Finding(
            "the same with DALI's own share of the hardware decoder",
            max(moved.values()),
            "above 0, which is why it isn't used",
            None,
            moved,
        )


WAYS = (
    "the same again",
    "another order",
    "batches of 16",
    "batches of 7, another order",
    "all in one batch",
    "alone",
    "with a second size",
    "while the GPU is busy",
)


def moving(
    bench: Bench, backend: str, blobs: list[bytes], only: tuple[str, ...] = WAYS
) -> tuple[np.ndarray, dict[str, int]]:
    """Render crops, uint8 [n, size, size, 3], in batches of BATCH, then again in other
    ways, and count for each way the crops that come out otherwise."""
    boxes, flips = crops_of(blobs)
    own, mixed = np.arange(len(blobs)), np.random.default_rng(0).permutation(len(blobs))

    def rendered(
        order: np.ndarray, batch: int, *more: int, beside: Callable[[], object] = lambda: None
    ) -> np.ndarray:
        renderer = crop_renderer(
            [bench.size, *more], 1, batch, interpolation="bilinear", exif="ignore", backend=backend
        )
        made = []
        for first in range(0, len(order), batch):  # without a wait for the batch before
            rows = order[first : first + batch]
            beside()
            made.append(
                renderer([blobs[i] for i in rows], boxes[:, rows], flips[:, rows])[0][bench.size]
            )
        return torch.cat(made).cpu().numpy()[np.argsort(order)]

    ways = (
        (own, BATCH),
        (mixed, BATCH),
        (own, 16),
        (mixed, 7),
        (own, len(own)),
        (own, 1),
        (own, BATCH, 33),
        (mixed, 16),
    )
    base, moved = rendered(own, BATCH), {}
    for way, how in zip(WAYS, ways, strict=True):
        if way in only and (bench.gpu or way != "while the GPU is busy"):
            again = rendered(
                *how, beside=work_for(bench) if way == "while the GPU is busy" else lambda: None
            )
            moved[way] = int((base != again).reshape(len(base), -1).any(axis=1).sum())
    return base, moved


def work_for(bench: Bench) -> Callable[[], object]:
    """Return a function that keeps the whole GPU busy for some 30 ms a call, on a
    stream of its own."""
    stream, a = (
        torch.cuda.Stream(),
        torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16),
    )

    def work() -> None:
        with torch.cuda.stream(stream):
            for _ in range(20):
                torch.mm(a, a)

    return work


@contextmanager
def dalis_own_share() -> Iterator[None]:
    """Give the largest 65 % of a batch to the hardware decoder, as DALI does by
    default."""
    real = dali.fn.decoders.image

    def image(encoded: object, **how: object) -> object:
        how.pop("hw_decoder_load", None)
        return real(encoded, **how)

    with mock.patch.object(dali.fn.decoders, "image", image):
        yield


# ---- labels


def labels(bench: Bench) -> Iterator[Finding]:
    """Measure how far labels of each precision are from float32 on the CPU, and whether
    a row's label depends on its place in the batch."""
    judges, what = bench.judges()
    blobs = bench.encoded
    boxes, flips = crops_of(blobs)
    pixels = crop_renderer(
        [t.image_size for t in judges], 1, len(blobs), interpolation="bilinear", exif="ignore"
    )(blobs, boxes, flips)[0]
    batch = min(BATCH, len(blobs))
    exact = ensemble(judges, pixels, "float32", batch_size=batch)[0]
    there = {size: p.to(bench.device) for size, p in pixels.items()}
    teachers = [teacher.to(bench.device) for teacher in judges]
    detail = {"crops": len(blobs), "teachers": f"{' + '.join(t.name for t in teachers)}, {what}"}
    for precision, bound in ROUNDING.items():
        p = ensemble(teachers, there, precision, batch_size=batch)[0]
        kl, tv = apart(p, exact)
        yield at_most(
            f"labels in {precision}, largest total variation",
            tv.max(),
            bound,
            mean=tv.mean(),
            kl=kl.mean(),
            **detail,
        )
        backwards = ensemble(
            teachers, {size: x.flip(0) for size, x in there.items()}, precision, batch_size=batch
        )[0].flip(0)
        again = ensemble(teachers, there, precision, batch_size=batch)[0]
        yield at_most(
            f"labels in {precision}, at another place of a batch",
            apart(backwards, p)[1].max(),
            bound,
            the_same_again="equal" if torch.equal(again, p) else "not equal",
        )
    # Torch's own choice of arithmetic, which versions up to 0.6 called float32.
    if bench.gpu:
        with torch.inference_mode(), mock.patch.object(Model, "__call__", as_torch_has_it):
            tv = apart(ensemble(teachers, there, "float32", batch_size=batch)[0], exact)[1]
        yield Finding(
            "labels as torch's own float32 has them (TF32 in convolutions)",
            tv.max(),
            "near tf32's",
            None,
            {"mean": tv.mean()},
        )


def as_torch_has_it(model: Model, pixels: torch.Tensor, precision: str) -> torch.Tensor:
    """Compute logits with torch's default settings."""
    return model.module(model.normalise(pixels)).float()


def apart(p: torch.Tensor, exact: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(exact‖p) in nats and the total variation, by row."""
    return divergence(exact.cpu().numpy(), p.cpu().numpy().clip(1e-30))


# ---- a training step


def step(bench: Bench) -> Iterator[Finding]:
    """Compare the first step of stage two with the CPU's, by loss and gradient, and SGD
    in one kernel with SGD weight by weight."""
    size, model = (224, "tf_efficientnet_lite0") if bench.gpu else (48, "test_efficientnet")
    given = {"student": {"model": model, "pretrained": False}, "store": {"batch_size": 32}}
    how = {
        "image_size": size,
        "batch_size": 8 if not bench.gpu else 32,
        "discriminator": {"lr": 1e-4},
    }
    config = bench.config(**bench.settings(**given, train=how | {"precision": "float32"}))
    source = stored(bench, bench.few, config)

    def first(precision: str, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the loss of the first step, and the gradient by name."""
        with mock.patch.object(bench, "device", device):
            changed = bench.config(**bench.settings(**given, train=how | {"precision": precision}))
            run = bench.training(
                changed,
                source,
                bench.few,
                load(changed.student, classes=1000, image_size=size).to(device),
            )
        run.student.module.train()
        torch.manual_seed(0)
        with run.replay.epoch(0) as batches:
            batch = next(iter(batches))
            loss = float(run._step(batch)[0]) / len(batch)
        run.replay.close()
        return loss, {
            name: p.grad.double().cpu() for name, p in run.student.module.named_parameters()
        }

    loss, gradient = first("float32", CPU)
    for precision, bound in GRADIENT.items():
        theirs, moved = first(precision, bench.device)
        yield at_most(
            f"first gradient in {precision}, off the CPU's",
            off(moved, gradient),
            bound,
            loss=theirs,
            loss_on_the_cpu=loss,
        )
    yield at_most(
        "weights after three steps of fused SGD, off those of SGD weight by weight",
        fused(bench, config, size),
        1e-5,
    )


def off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖ over all tensors."""
    apart = sum(float((found[name] - wanted[name]).norm() ** 2) for name in wanted)
    return (apart / sum(float(tensor.norm() ** 2) for tensor in wanted.values())) ** 0.5


def fused(bench: Bench, config: object, size: int) -> float:
    """Step the same weights by the same gradients, once in one kernel for all weights
    and once weight by weight. Returns the final distance between the weights, relative
    to the way that they went."""
    model = load(config.student, classes=1000, image_size=size).to(bench.device).module
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ended = []
    for how in ({"fused": True}, {"foreach": False}):
        draw = torch.Generator(bench.device).manual_seed(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **how)
        for rate in (0.1, 0.05, 0.01):  # each step may have another rate
            optimizer.param_groups[0]["lr"] = rate
            for p in model.parameters():
                p.grad = torch.empty_like(p).normal_(generator=draw)  # with its weight's layout
            optimizer.step()
        ended.append(
            {
                name: p.detach().double().cpu() - start[name].double().cpu()
                for name, p in model.named_parameters()
            }
        )
    return off(*ended)


# ---- two processes


def ranks(bench: Bench) -> Iterator[Finding]:
    """Compare the loss of a student that two processes train with the loss of one
    process. On a machine with one GPU both processes are on it and speak by gloo, since
    NCCL refuses two processes on one GPU."""
    folder = bench.folder / "ranks"
    folder.mkdir()
    size = 64 if bench.gpu else 32
    base = bench.settings(
        train={
            "image_size": size,
            "epochs": 1,
            "batch_size": 16 if bench.gpu else 8,
            "lr": 0.01,
            "precision": "float32",
        }
    )
    several = bench.gpu and torch.cuda.device_count() > 1
    by = "NCCL, two GPUs" if several else "gloo, one GPU" if bench.gpu else "gloo, a CPU"
    stored(bench, bench.few, bench.config(**base)).store.path.rename(folder / "s.zarr")
    # a model without BatchNorm, and one whose BatchNorm sees both processes' batches
    for model, together in [("test_vit", False), *([("resnet10t", True)] if bench.gpu else [])]:
        losses = {}
        for n in (1, 2):
            recipe = bench.config(
                **base
                | {
                    "student": {"model": model, "pretrained": False, "image_size": size},
                    "train": base["train"] | {"sync_bn": together},
                }
            )
            (folder / "recipe.yaml").write_text(recipe.to_yaml())
            out = folder / f"{model}-{together}-{n}"
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={n}",
                Path(__file__).with_name("ranks.py"),
            ]
            command += [
                folder / "recipe.yaml",
                bench.few,
                folder / "s.zarr",
                out,
                bench.device.type,
            ]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if done.returncode:
                yield Finding(
                    f"{n} processes train {model}",
                    "failed",
                    "an end",
                    False,
                    {"said": " ".join(done.stderr.split())[-300:]},
                )
                break
            losses[n] = json.loads((out / "metrics.jsonl").read_text())["loss"]
        else:
            name = f"loss of two processes beside one's, {model}{', sync_bn' * together} ({by})"
            yield at_most(name, abs(losses[2] / losses[1] - 1), ALIKE, one=losses[1], two=losses[2])
