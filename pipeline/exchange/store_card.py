"""Write the card of a shared label store."""

from __future__ import annotations

import re

import yaml

from cache import LabelStore
from pipeline.exchange.templates import filled

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


def store_card(repo: str, store: LabelStore, views: int, licence: str | None) -> str:
    """Return the card, Markdown with a head in YAML. views: how many are shared."""
    head = {
        **({"license": licence} if licence else {}),
        "tags": ["soft-labels", "knowledge-distillation", "meal-v2", "zarr"],
        "task_categories": ["image-classification"],
        # The hub must not make a table of pictures or texts of the packs.
        "viewer": False,
    }
    return filled(
        "store_card.md",
        head=yaml.safe_dump(head, sort_keys=False),
        repo=repo,
        store=store,
        views=views,
        licence=licence,
        crops=store.provenance["crops"],
        kl=store.max_error[0],
        tv=store.max_error[1],
    )
