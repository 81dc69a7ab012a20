"""In which arithmetic models run: the precisions, what torch has to be told for them,
and how far apart rounding puts labels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

from cache.errors import MealError

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Bounds of the total variation between a rounded label and the exact label, by
# precision. Of 1,000 crops of ImageNet photographs, labelled by tf_efficientnet_lite1 +
# lite2 on a CPU, the largest was 8.8e-3 in TF32 (emulated), 7.8e-3 in float16 and
# 9.5e-2 in bfloat16 (mean 1.4e-3, 1.5e-3, 1.2e-2). Two float32 passes were 1e-6 apart.
ROUNDING = {"float32": 1e-3, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 0.15}
_ONE_THREAD = threading.RLock()


class PrecisionError(MealError):
    """A precision that the device doesn't have."""


def require_precision(precision: str, device: torch.device, key: str) -> None:
    """Raise PrecisionError if the device doesn't have ``precision``, the value of the
    config's ``key``."""
    if precision != "tf32" or (
        device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    ):
        return
    here = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    raise PrecisionError(
        f"{key} tf32 needs a GPU of compute capability 8.0 or later, and this runs on {here}; set "
        f"{key}=float32"
    )


@contextmanager
def in_precision(precision: str) -> Iterator[None]:
    """Have GPUs compute convolutions and matrix products of float32 tensors in float32;
    with ``tf32`` in TF32, which keeps 10 bits of the mantissa.

    By default torch lets convolutions be TF32 and matrix products not. A backward pass
    needs the same block around it as its forward pass. One thread at a time is in such
    a block, since torch's setting is the whole process's.
    """
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    with _ONE_THREAD:
        before = convolutions.allow_tf32, products.allow_tf32
        try:
            convolutions.allow_tf32 = products.allow_tf32 = precision == "tf32"
            yield
        finally:
            convolutions.allow_tf32, products.allow_tf32 = before


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """Let cuDNN try its algorithms on the first batch of each shape and go on with the
    fastest: for batches of few different sizes."""
    before = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def rounding(compute: dict, made_with: dict, device: torch.device, precision: str) -> float:
    """Return a bound of the total variation that rounding alone puts between a stored
    label and the label that ``device`` makes now in ``precision``.

    compute: the store's ``provenance.compute``. made_with: the store's attribute of
    that name. If precision, kind of device, GPU and torch are the store's and nothing
    is compiled, the bound is ROUNDING's; otherwise both labels are rounded in ways of
    their own, and the bounds add up. A store that was made on a GPU and doesn't name
    the GPU is of a version that left the choice to torch: its float32 may have been
    TF32 in convolutions.
    """
    stored = compute["precision"]
    if stored == "float32" and compute["device"] == "cuda" and "gpu" not in made_with:
        stored = "tf32"
    alike = stored == precision and compute["device"] == device.type and not compute.get("compile")
    if device.type == "cuda" and alike:
        alike = made_with.get("gpu") == torch.cuda.get_device_name() and made_with.get(
            "torch"
        ) == version("torch")
    return ROUNDING[stored] if alike else ROUNDING[stored] + ROUNDING[precision]
