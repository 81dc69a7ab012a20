"""Define the figures of a run that are drawn and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.config import Config


class Curve(NamedTuple):
    """A figure of a pass over the images.

    key: its key in the metrics. tag: its tag in TensorBoard, which groups tags by the
    part before the slash. name, unit: its title and axis label. beside: the key of the
    curve whose panel it shares. among: its label in a panel that others share.
    """

    key: str
    tag: str
    name: str
    unit: str
    beside: str = ""
    among: str = ""


CURVES = (
    Curve("val_top1", "validation/top1", "validation top-1", "% of images", among="weights"),
    Curve("val_top1_ema", "validation/top1_ema", "average", "", "val_top1"),
    Curve("val_top5", "validation/top5", "validation top-5", "% of images", among="weights"),
    Curve("val_top5_ema", "validation/top5_ema", "average", "", "val_top5"),
    Curve("val_loss", "validation/loss", "validation loss", "nats", among="weights"),
    Curve("val_loss_ema", "validation/loss_ema", "average", "", "val_loss"),
    Curve("loss", "training/loss", "training loss", "nats"),
    Curve("kl", "training/kl", "KL to the labels", "nats"),
    Curve("agreement", "training/agreement", "agreement with the labels", "% of crops"),
    Curve("discriminator_loss", "discriminator/loss", "discriminator loss", "nats"),
    Curve(
        "discriminator_accuracy",
        "discriminator/accuracy",
        "discriminator accuracy",
        "% of answers right",
        among="both",
    ),
    Curve(
        "discriminator_accuracy_student",
        "discriminator/accuracy_student",
        "student",
        "",
        "discriminator_accuracy",
    ),
    Curve(
        "discriminator_accuracy_teachers",
        "discriminator/accuracy_teachers",
        "teachers",
        "",
        "discriminator_accuracy",
    ),
    Curve(
        "discriminator_gradient",
        "discriminator/gradient",
        "discriminator's gradient",
        "of the cross-entropy's",
        among="on the student",
    ),
    Curve(
        "discriminator_gradient_unbounded",
        "discriminator/gradient_unbounded",
        "unbounded",
        "",
        "discriminator_gradient",
    ),
    Curve("gradient_norm", "training/gradient_norm", "norm of the gradient", "before clipping"),
    Curve("clipped", "training/clipped", "clipped gradients", "% of steps"),
    Curve("lr", "training/lr", "learning rate", "of the last step"),
    Curve("images_per_second", "training/images_per_second", "speed", "images/s"),
)


def points(metrics: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    """Return the epochs done and the figure after each, for the passes in which the
    figure is finite."""
    found = [
        (m["epoch"] + 1, m[key])
        for m in metrics
        if m.get(key) is not None and math.isfinite(m[key])
    ]
    return [epoch for epoch, _ in found], [value for _, value in found]


def ended(metrics: Sequence[dict], last: float) -> list[float]:
    """Return when each pass ended, if the last one ended at the time ``last`` and there
    was no pause. The metrics don't say when the passes of earlier processes ended."""
    ends = [last]
    for one in reversed(metrics[1:]):
        ends.append(ends[-1] - one["seconds"])
    return ends[len(metrics) - 1 :: -1] if metrics else []


def images_of(one: dict) -> float:
    """Return how many crops the student saw in a pass. For a run of an older version,
    which didn't note the number, it is computed from the speed."""
    return one.get("images") or one["images_per_second"] * one["seconds"]


def best_of(metrics: Sequence[dict]) -> tuple[int, float] | None:
    """Return epochs done and top-1 of best.safetensors: the best pass, or the newest of
    several best. Returns None without validation."""
    epochs, top1 = points(metrics, "val_top1")
    return max(zip(epochs, top1, strict=True), key=lambda point: (point[1], point[0]), default=None)


def labels_of(config: Config) -> str:
    """Return the kind of labels that the student learns from: "soft" (a store),
    "online" (live teachers) or "hard"."""
    return "online" if config.train.online else config.train.labels


FIGURES = frozenset(curve.key for curve in CURVES)
