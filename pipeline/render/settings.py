"""Collect the settings of the renderer: all that decides a crop's pixels beside its box
and flip, and the resources that rendering may use."""

from __future__ import annotations

from dataclasses import dataclass

from cache import LabelStore
from pipeline.config import Config, CropPolicy, Render
from pipeline.runtime.threads import threads_for

MAX_MEGAPIXELS = 179.0  # Pillow's limit for a decompression bomb, too; 0.5 GB decoded


@dataclass(frozen=True)
class RenderSettings:
    """Settings of decoding and resizing.

    resize: "pillow", the pixels that Pillow makes (fixed_point.py), or "dali"; "" takes
    "pillow" on the CPU and "dali" on a GPU. interpolation: "bilinear" or "bicubic".
    exif: "apply" turns photographs by their EXIF orientation, "ignore" doesn't.
    backend: "cpu", "gpu" or "gpu-hardware". threads: number of threads that read and
    decode; None: one per core, at most 16 (``threads_for``). max_megapixels: a larger
    image is unusable.
    """

    interpolation: str = "bilinear"
    exif: str = "ignore"
    backend: str = "cpu"
    threads: int | None = None
    max_megapixels: float = MAX_MEGAPIXELS
    resize: str = ""

    def __post_init__(self) -> None:
        if not self.resize:
            object.__setattr__(self, "resize", "pillow" if self.backend == "cpu" else "dali")

    @property
    def decoder_threads(self) -> int:
        """Return the number of threads that decode, and of threads that resize."""
        return threads_for(self.threads)

    @classmethod
    def of(cls, crops: CropPolicy, render: Render) -> RenderSettings:
        """Take the settings from two sections of a config."""
        return cls(
            crops.interpolation,
            crops.exif,
            render.backend,
            render.threads,
            render.max_megapixels,
            render.resize or "",
        )

    @classmethod
    def of_config(cls, config: Config) -> RenderSettings:
        """Take the settings from a config."""
        return cls.of(config.crops, config.render)

    @classmethod
    def of_provenance(cls, provenance: dict, threads: int | None = None) -> RenderSettings:
        """Take the settings that a store's crops were rendered with, from its
        provenance."""
        crops, renderer = provenance["crops"], provenance["renderer"]
        return cls(
            crops["interpolation"],
            crops["exif"],
            renderer["backend"],
            threads,
            resize=resize_of(provenance),
        )

    @classmethod
    def of_store(cls, store: LabelStore, threads: int | None = None) -> RenderSettings:
        """Take the settings that a store's crops were rendered with."""
        return cls.of_provenance(store.provenance, threads)


def resize_of(provenance: dict) -> str:
    """Return who resized a store's crops: "pillow" or "dali". Before version 0.10 DALI
    was the only one, and stores don't name it."""
    return provenance["renderer"].get("resize", "dali")
