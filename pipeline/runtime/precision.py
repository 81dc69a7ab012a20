"""Choose the arithmetic that models run in, and bound how far rounding moves labels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

from cache.errors import MealError

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Upper bounds of the total variation between a rounded label and the exact label, by
# precision. For 1,000 crops of ImageNet photographs, labelled by tf_efficientnet_lite1
# + lite2 on a CPU, the largest distance was 8.8e-3 in TF32 (emulated), 7.8e-3 in
# float16 and 9.5e-2 in bfloat16 (mean 1.4e-3, 1.5e-3, 1.2e-2). Two float32 passes were
# 1e-6 apart.
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


def usual_precision(device: torch.device) -> str:
    """Return the precision in which a student is trained on a device if nothing else is
    asked for: bfloat16 on GPUs that compute in it, otherwise float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return "bfloat16"
    return "float32"


@contextmanager
def in_precision(precision: str) -> Iterator[None]:
    """Make GPUs compute convolutions and matrix products of float32 tensors in float32;
    with ``tf32`` in TF32, which keeps 10 bits of the mantissa.

    By default torch allows TF32 in convolutions, but not in matrix products. A backward
    pass needs the same context around it as its forward pass. Only one thread at a time
    can be in this context, since torch's setting holds for the whole process.
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
    """Let cuDNN try its algorithms on the first batch of each shape, and keep the
    fastest. Use it if batches have few different shapes."""
    before = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def rounding(compute: dict, made_with: dict, device: torch.device, precision: str) -> float:
    """Return an upper bound of the total variation that rounding alone causes between a
    stored label and the label that ``device`` computes now in ``precision``.

    compute: the store's ``provenance.compute``. made_with: the store's attribute
    ``made_with``. If precision, kind of device, GPU and version of torch are the
    store's, and the store's teachers were not compiled, the bound is ROUNDING's.
    Otherwise the two labels are rounded differently, and their bounds add up. A store
    that was made on a GPU and doesn't name the GPU is of a version that left the choice
    of precision to torch: its float32 may have been TF32 in convolutions.
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
