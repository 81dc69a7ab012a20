"""Find the class names that models agree on."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.models.model import Model


def known_classes(models: Sequence[Model]) -> tuple[str, ...] | None:
    """Return the class names that the models know; None if none of them knows any."""
    return next((m.class_names for m in models if getattr(m, "class_names", None)), None)
