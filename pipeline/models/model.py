"""A model with its input size and normalisation, and the mean softmax of several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import timm
import torch
from torch import nn

from cache.errors import MealError
from pipeline.runtime.precision import HALF, in_precision

METADATA = "meal_v2"  # key of a checkpoint's description in a safetensors header


class ModelError(MealError):
    """A model that timm doesn't know, or weights that can't be had or don't fit."""


@dataclass
class Model:
    """A timm model with what it expects of its input. Calling it takes uint8 pixels and
    gives logits."""

    module: nn.Module
    name: str  # timm name with its tag
    classes: int
    image_size: int  # pixels
    mean: tuple[float, float, float]  # of RGB in 0 … 1
    std: tuple[float, float, float]
    interpolation: str  # of evaluation's resize
    notes: list[str] = field(
        default_factory=list
    )  # what a user should be told of how it was loaded

    def to(self, device: torch.device) -> Model:
        self.module.to(device)
        return self

    def introduction(self, role: str) -> list[str]:
        """Lines that tell a user what was loaded."""
        return [f"{role} {self.name}, {self.image_size} px, {self.classes} classes", *self.notes]

    def compiled(self, **options: bool) -> Model:
        """The same model, its weights too, that torch.compile makes faster: at the
        first call of each batch size, for a minute. Outputs are the same to
        rounding."""
        return replace(
            self, module=torch.compile(self.module, dynamic=False, options=options or None)
        )

    def compiled_teacher(self, precision: str) -> Model:
        """Compile a model whose weights don't change any more.

        Freezing folds BatchNorm into the convolutions. In half precision that would be
        done with rounded weights, which multiplies the outputs' error
        (github.com/pytorch/pytorch/pull/145623 saw fourfold in float16 and eightfold in
        bfloat16), so there it is left out.
        """
        return self.compiled(freezing=True) if precision not in HALF else self.compiled()

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [n, height, width, 3] → float32 [n, 3, height, width], (x / 255 − mean)
        / std, on the pixels' device."""
        mean, std = (_constant(c, pixels.device) for c in (self.mean, self.std))
        return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)

    def __call__(self, pixels: torch.Tensor, precision: str = "float32") -> torch.Tensor:
        """uint8 [n, height, width, 3] on the model's device → float32 logits [n,
        classes]; ``precision`` of the forward pass."""
        x = self.normalise(pixels)
        half = HALF.get(precision)
        with (
            in_precision(precision),
            torch.autocast(x.device.type, dtype=half, enabled=half is not None),
        ):
            return self.module(x).float()

    def digest(self) -> str:
        """Hex sha256 over the sorted tensors (name, dtype, shape, bytes): known by the
        weights, whatever file they came in."""
        h = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            if name.endswith(
                "num_batches_tracked"
            ):  # counts training steps; no output depends on it
                continue
            h.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            h.update(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return h.hexdigest()

    def describe(self) -> dict:
        """The model as provenance."""
        return {
            "model": self.name,
            "weights": self.digest(),
            "classes": self.classes,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }


@cache
def _constant(of_rgb: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """float32 [1, 3, 1, 1]; made once, since a GPU is waited for when it is given
    something."""
    with torch.inference_mode(
        False
    ):  # a teacher may ask for it first, and a student that trains next
        return torch.tensor(of_rgb, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def sync_batchnorm(model: Model) -> None:
    """Let the model's BatchNorm layers take mean and variance over the images of all
    processes; on GPUs."""
    model.module = timm.layers.convert_sync_batchnorm(model.module)


def mean_softmax(logits_tbc: Sequence[torch.Tensor]) -> torch.Tensor:
    """Eq. 1 of MEAL V2: per teacher logits [batch, classes] → float32 [batch, classes],
    the mean of the teachers' softmax."""
    return torch.stack([logits.float().softmax(dim=1) for logits in logits_tbc]).mean(dim=0)


@torch.inference_mode()
def ensemble(
    teachers: Sequence[Model],
    pixels: dict[int, torch.Tensor],
    precision: str,
    *,
    batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each teacher sees the crop at its own size, in its own normalisation.

    pixels: uint8 [n, size, size, 3] by size. batch_size: of a forward pass; otherwise
    all at once. A smaller rest is filled up with its last row, since the size of a
    batch decides the last bits of its outputs. Returns the mean of the teachers'
    softmax (Eq. 1) and of their logits, float32 [n, classes] each.
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
