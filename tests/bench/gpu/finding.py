"""One thing that was found out, and what it was found out on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm
import torch
from parts import Extent, Place
from safetensors.torch import save_file

from pipeline.config import ModelSpec
from pipeline.models import Model, load
from pipeline.render import hardware_engines

PAPER = Extent(256, 16, ("senet154", "resnet152s"), "resnet50")
TINY = Extent(24, 1, ("test_resnet", "test_efficientnet"), "test_efficientnet")
SHARPNESS = 3.0  # standard deviation of the random teachers' logits, whose softmax would be flat otherwise


@dataclass
class Finding:
    what: str
    found: float | str
    wanted: str = ""  # in words; empty: nothing is asked of it
    holds: bool | None = None  # whether it is as wanted; None: nobody can say
    detail: dict = field(default_factory=dict)

    def row(self) -> str:
        """Of a table in Markdown."""
        found = self.found if isinstance(self.found, str) else f"{self.found:.3g}"
        verdict = {True: "yes", False: "**NO**", None: ""}[self.holds]
        more = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in self.detail.items())
        return f"| {self.what} | {found} | {self.wanted} | {verdict} | {more} |"


def at_most(what: str, found: float, bound: float, **detail: object) -> Finding:
    """A figure that must not be larger."""
    return Finding(what, float(found), f"≤ {bound:.3g}", bool(found <= bound), detail)


class Bench(Place):
    """Where the measurements are done. Tiny models and pictures on a CPU, where they show that the measurements work; the paper's on a GPU.

    given: real teachers of 1,000 classes as (timm name, file of weights), for how far labels are apart; none: random ones.
    """

    def __init__(self, folder: Path, device: torch.device, files: list[Path] | None, given: Sequence[tuple[str, str]] = ()) -> None:
        self.gpu = device.type == "cuda"
        super().__init__(folder, 1, PAPER if self.gpu else TINY, device, files)
        self.given = given
        self.size, self.batch = (224, 256) if self.gpu else (48, 8)
        self.half = "float16" if self.gpu else "bfloat16"  # CPUs are slow in float16

    @cached_property
    def teachers(self) -> list[dict]:
        """For speed alone: random weights."""
        return [self._random(name, seed) for seed, name in enumerate(self.extent.teachers)]

    def _random(self, name: str, seed: int) -> dict:
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            torch.manual_seed(seed)
            save_file(timm.create_model(name).state_dict(), file)
        return {"model": name, "checkpoint": str(file), "image_size": self.size}

    def backends(self) -> list[str]:
        """Of the renderer, that this machine has."""
        return ["cpu", *["gpu"] * self.gpu, *["gpu-hardware"] * (self.gpu and hardware_engines() != 0)]

    def judges(self) -> tuple[list[Model], str]:
        """Teachers whose labels are compared, on the CPU, and what they are."""
        if self.given:
            return [load(ModelSpec(model=name, checkpoint=file)) for name, file in self.given], "real weights"
        names = ("tf_efficientnet_lite1", "tf_efficientnet_lite2") if self.gpu else self.extent.teachers
        models = [load(ModelSpec(model=name, pretrained=False), classes=1000, seed=seed) for seed, name in enumerate(names)]
        for model in models:
            noise = torch.randint(256, (4, model.image_size, model.image_size, 3), dtype=torch.uint8)
            with torch.inference_mode():
                spread = model(noise).std()
            with torch.no_grad():
                model.module.get_classifier().weight.mul_(SHARPNESS / spread)
        return models, "random weights"

    def settings(self, **sections: dict) -> dict:
        """Sections of a config, for ``config``: one recipe for both stages."""
        store = {"batch_size": self.batch, "shard_rows": 1024 if self.gpu else 16, "views_per_decode": 4} | sections.pop("store", {})
        train = {"image_size": self.size, "batch_size": self.batch, "precision": "bfloat16" if self.gpu else "float32"} | sections.pop(
            "train", {}
        )
        return {"store": store, "train": train, **sections}
