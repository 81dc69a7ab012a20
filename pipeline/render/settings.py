"""Everything beside a crop's box and flip that decides on its pixels, and what
rendering may take of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from cache import LabelStore
from pipeline.config import Config, CropPolicy, Render

MAX_MEGAPIXELS = 179.0  # what Pillow, too, takes for a decompression bomb; 0.5 GB decoded


@dataclass(frozen=True)
class RenderSettings:
    """How images are decoded and resized.

    interpolation: "bilinear" or "bicubic". exif: "ignore" or "apply", whether
    photographs are turned by their EXIF. backend: "cpu", "gpu" or "gpu-hardware".
    threads: that read and decode; None: one a core. max_megapixels: a larger image is
    unusable.
    """

    interpolation: str = "bilinear"
    exif: str = "ignore"
    backend: str = "cpu"
    threads: int | None = None
    max_megapixels: float = MAX_MEGAPIXELS

    @classmethod
    def of(cls, crops: CropPolicy, render: Render) -> RenderSettings:
        """Take the settings from two sections of a config."""
        return cls(
            crops.interpolation, crops.exif, render.backend, render.threads, render.max_megapixels
        )

    @classmethod
    def of_config(cls, config: Config) -> RenderSettings:
        """Take the settings from a config."""
        return cls.of(config.crops, config.render)

    @classmethod
    def of_provenance(cls, provenance: dict, threads: int | None = None) -> RenderSettings:
        """Take the settings that the crops of a store of this provenance were rendered
        with."""
        crops = provenance["crops"]
        return cls(
            crops["interpolation"], crops["exif"], provenance["renderer"]["backend"], threads
        )

    @classmethod
    def of_store(cls, store: LabelStore, threads: int | None = None) -> RenderSettings:
        """Take the settings that a store's crops were rendered with."""
        return cls.of_provenance(store.provenance, threads)
