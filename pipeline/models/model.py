"""Run a timm model with its own input size and normalisation, and average the softmax
of several models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import timm
import timm.optim
import torch
from torch import nn

from cache.errors import MealError
from pipeline.runtime.precision import HALF, in_precision

METADATA = "meal_v2"  # key of a checkpoint's description in a safetensors header


class ModelError(MealError):
    """A model that timm doesn't know, or weights that can't be loaded or don't fit."""


@dataclass
class Model:
    """A timm model, and the input that it expects. A call maps uint8 pixels to
    logits."""

    module: nn.Module
    name: str  # timm name with its tag
    classes: int
    image_size: int  # pixels
    mean: tuple[float, float, float]  # of RGB in 0 … 1
    std: tuple[float, float, float]
    interpolation: str  # of evaluation's resize
    notes: list[str] = field(default_factory=list)  # for the user, on how it was loaded
    # Of the outputs, in order; None if the weights don't tell, or if the head is new.
    class_names: tuple[str, ...] | None = None
    # Of the file of weights, if the file offered a choice or the user chose.
    entry: str | None = None

    def to(self, device: torch.device) -> Model:
        """Move the model to a device, and return it."""
        self.module.to(device)
        return self

    def introduction(self, role: str) -> list[str]:
        """Return lines that tell a user which model was loaded, and how. role:
        "teacher" or "student"."""
        return [f"{role} {self.name}, {self.image_size} px, {self.classes} classes", *self.notes]

    def compiled(self, **options: Any) -> Model:
        """Return the same model, with the same weights, that torch.compile makes
        faster. The first call of each batch size compiles it, for a minute. Outputs are
        the same to rounding."""
        compiled: Any = torch.compile(self.module, dynamic=False, options=options or None)
        return replace(self, module=compiled)

    def compiled_teacher(self, precision: str) -> Model:
        """Compile a model whose weights don't change any more.

        Freezing folds BatchNorm into the convolutions. In half precision it would fold
        rounded weights, which multiplies the error of the outputs
        (github.com/pytorch/pytorch/pull/145623 measured a factor of four in float16 and
        of eight in bfloat16). So in half precision the model is compiled without
        freezing.
        """
        return self.compiled(freezing=True) if precision not in HALF else self.compiled()

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise pixels, on their device: uint8 [n, height, width, 3] → float32 [n,
        3, height, width], (x / 255 − mean) / std."""
        mean, std = (_constant(c, pixels.device) for c in (self.mean, self.std))
        return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)

    def __call__(self, pixels: torch.Tensor, precision: str = "float32") -> torch.Tensor:
        """Compute logits: uint8 [n, height, width, 3] on the model's device → float32
        [n, classes]. precision: of the forward pass."""
        x = self.normalise(pixels)
        half = HALF.get(precision)
        with (
            in_precision(precision),
            torch.autocast(x.device.type, dtype=half, enabled=half is not None),
        ):
            return self.module(x).float()

    def by_decay(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Divide the weights into those that decay and those that don't, by timm's
        rule: biases, norms and other vectors don't, nor does what the model itself
        names (position embeddings, class tokens)."""
        module: Any = self.module
        named = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        others, decaying = timm.optim.param_groups_weight_decay(
            module, weight_decay=1.0, no_weight_decay_list=named
        )
        return decaying["params"], others["params"]

    def digest(self) -> str:
        """Return the hex sha256 over the sorted tensors (name, dtype, shape, bytes). It
        depends on the weights alone, not on the file that held them."""
        h = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            # num_batches_tracked counts training steps; no output depends on it.
            if name.endswith("num_batches_tracked"):
                continue
            h.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            h.update(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return h.hexdigest()

    def describe(self) -> dict:
        """Return the description of the model that a store's provenance keeps. The
        entry is for people, since the digest of the weights tells models apart."""
        return {
            "model": self.name,
            "weights": self.digest(),
            "classes": self.classes,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            **({"entry": self.entry} if self.entry is not None else {}),
        }


@cache
def _constant(of_rgb: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """Return three RGB values as float32 [1, 3, 1, 1] on a device. The result is
    cached, since every copy to a GPU waits for the GPU."""
    # No inference tensor, since a student in training may use the constant after a
    # teacher.
    with torch.inference_mode(False):
        return torch.tensor(of_rgb, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def sync_batchnorm(model: Model) -> None:
    """Replace the model's BatchNorm layers by layers that take mean and variance over
    the images of all processes. The new layers need GPUs."""
    model.module = timm.layers.convert_sync_batchnorm(model.module)


def mean_softmax(logits_tbc: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of the teachers' softmax, float32 [batch, classes] (Eq. 1 of MEAL
    V2). logits_tbc: logits [batch, classes] of each teacher."""
    return torch.stack([logits.float().softmax(dim=1) for logits in logits_tbc]).mean(dim=0)


@torch.inference_mode()
def ensemble(
    teachers: Sequence[Model],
    pixels: dict[int, torch.Tensor],
    precision: str,
    *,
    batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run all teachers on crops, each at its own input size and with its own
    normalisation.

    pixels: input size → uint8 [n, size, size, 3]. batch_size: crops per forward pass;
    None: all crops at once. A smaller last batch is filled up with its last row, since
    the size of a batch decides the last bits of its outputs. Returns the mean of the
    teachers' softmax (Eq. 1) and the mean of their logits, float32 [n, classes] each.
    """
    n = len(next(iter(pixels.values())))
    batch_size = batch_size or n
    parts = []
    for start in range(0, n, batch_size):
        rows = min(batch_size, n - start)
        logits = []
        for teacher in teachers:
            x = pixels[teacher.image_size][start : start + rows]
            if rows < batch_size:
                x = torch.cat([x, x[-1:].expand(batch_size - rows, -1, -1, -1)])
            logits.append(teacher(x, precision)[:rows])
        parts.append((mean_softmax(logits), torch.stack(logits).mean(dim=0)))
    means, mean_logits = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(mean_logits)
