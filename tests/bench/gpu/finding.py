"""Describe a finding, and provide the models and pictures that it is measured on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from parts import Extent, Place

from pipeline.config import ModelSpec
from pipeline.models.model import Model
from pipeline.models.weights import load
from pipeline.render.hardware_jpeg import hardware_engines

PAPER = Extent(256, 16, ("senet154", "resnet152s"), "resnet50", image_size=224)
TINY = Extent(24, 1, ("test_resnet", "test_efficientnet"), "test_efficientnet", image_size=48)
# Standard deviation of the random teachers' logits: their softmax would be flat
# otherwise.
SHARPNESS = 3.0


@dataclass
class Finding:
    what: str
    found: float | str
    wanted: str = ""  # in words; empty: the finding has no aim
    holds: bool | None = None  # True: the finding is as wanted; None: nobody can say
    detail: dict = field(default_factory=dict)

    def row(self) -> str:
        """Return the finding as a row of a table in Markdown."""
        found = self.found if isinstance(self.found, str) else f"{self.found:.3g}"
        verdict = {True: "yes", False: "**NO**", None: ""}[self.holds]
        more = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.detail.items()
        )
        return f"| {self.what} | {found} | {self.wanted} | {verdict} | {more} |"


def at_most(what: str, found: float, bound: float, **detail: object) -> Finding:
    """Make a finding of a figure that must not exceed ``bound``."""
    return Finding(what, float(found), f"≤ {bound:.3g}", bool(found <= bound), detail)


class Bench(Place):
    """The place of the measurements: the paper's models and sizes on a GPU; on a CPU
    tiny models and pictures, which show that the measurements work.

    given: real teachers of 1,000 classes as (timm name, file of weights), for the
    distance between labels; empty: random teachers.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        files: list[Path] | None,
        given: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.gpu = device.type == "cuda"
        super().__init__(folder, 1, PAPER if self.gpu else TINY, device, files)
        self.given = given
        self.size, self.batch = self.extent.image_size, 256 if self.gpu else 8
        self.half = "float16" if self.gpu else "bfloat16"  # CPUs are slow in float16

    def backends(self) -> list[str]:
        """List the renderer's backends that this machine has."""
        return [
            "cpu",
            *["gpu"] * self.gpu,
            *["gpu-hardware"] * (self.gpu and hardware_engines() != 0),
        ]

    def judges(self) -> tuple[list[Model], str]:
        """Load on the CPU the teachers whose labels are compared, and say whether
        their weights are real."""
        if self.given:
            return [
                load(ModelSpec(model=name, checkpoint=file)) for name, file in self.given
            ], "real weights"
        names = (
            ("tf_efficientnet_lite1", "tf_efficientnet_lite2") if self.gpu else self.extent.teachers
        )
        models = [
            load(ModelSpec(model=name, pretrained=False), classes=1000, seed=seed)
            for seed, name in enumerate(names)
        ]
        for model in models:
            noise = torch.randint(
                256, (4, model.image_size, model.image_size, 3), dtype=torch.uint8
            )
            with torch.inference_mode():
                spread = model(noise).std()
            with torch.no_grad():
                model.module.get_classifier().weight.mul_(SHARPNESS / spread)
        return models, "random weights"

    def settings(self, **sections: dict) -> dict:
        """Return sections of a config, for ``config``: one recipe for both stages, with
        some values replaced."""
        store = {
            "batch_size": self.batch,
            "shard_rows": 1024 if self.gpu else 16,
            "views_per_decode": 4,
        } | sections.pop("store", {})
        train = {
            "image_size": self.size,
            "batch_size": self.batch,
            "precision": "bfloat16" if self.gpu else "float32",
        } | sections.pop("train", {})
        return {"store": store, "train": train, **sections}
