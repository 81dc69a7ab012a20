"""Estimate the cost of a recipe before anything runs: floating-point operations, GPU
hours and the size of the store."""

from __future__ import annotations

from functools import lru_cache

from pipeline.config import Config, ModelSpec
from pipeline.models.weights import forward_flops

IMAGENET_IMAGES = 1_281_167
GPU_FLOPS = 100e12  # per second, assumed: a third of an A100's bf16 rating (312e12)
# Assumed for the default codec at 1,000 classes, between the measured 413 and 584 bytes
# of the neighbouring codecs.
BYTES_PER_CROP = 500
# The same with CutMix: labels of mixed crops have a higher entropy, and partner and
# rectangle take 20 bytes.
BYTES_PER_MIXED_CROP = 580


@lru_cache(maxsize=64)
def flops(model: str, image_size: int | None) -> tuple[float, int]:
    """Return (operations of one forward pass of one image, input size in pixels). A
    multiplication and an addition count as two operations."""
    return forward_flops(ModelSpec(model=model, image_size=image_size, pretrained=False))


def estimate(config: Config, images: int = IMAGENET_IMAGES) -> dict:
    """Estimate the cost of both stages, and of online training for comparison.

    A labelled crop costs one forward pass of each teacher. A training step costs three
    forward passes of the student per crop: one forward, and a backward pass worth two.
    Labelling makes each view of each image once; training shows epochs × images crops.
    Hours are hours of one GPU at ``GPU_FLOPS``, for the arithmetic alone.
    """
    teachers = sum(flops(t.model, t.image_size)[0] for t in config.teachers)
    student = 3 * flops(config.student.model, config.train.image_size)[0]
    hour = 3600 * GPU_FLOPS
    labelled, shown = images * config.crops.views, images * config.train.epochs
    return {
        "teacher_gflop_per_crop": teachers / 1e9,
        "student_gflop_per_crop": student / 1e9,
        "label_hours": labelled * teachers / hour,
        "train_hours": shown * student / hour,
        "online_hours": shown * (student + teachers) / hour,
        "store_gb": labelled
        * (BYTES_PER_MIXED_CROP if config.crops.cutmix else BYTES_PER_CROP)
        / 1e9,
    }


def sentence(cost: dict) -> str:
    """Return the estimate as a sentence, as the head of each recipe file quotes it."""
    return (
        f"{cost['teacher_gflop_per_crop']:.3g} GFLOP of teachers per crop, "
        f"{cost['student_gflop_per_crop']:.3g} of student training; "
        f"at {GPU_FLOPS / 1e12:.0f} TFLOP/s {_hours(cost['label_hours'])} GPU hours of labelling "
        f"once, {_hours(cost['train_hours'])} of training per student "
        f"(online: {_hours(cost['online_hours'])}); store {cost['store_gb']:,.0f} GB"
    )


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
