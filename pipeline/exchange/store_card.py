"""Write the card of a shared label store."""

from __future__ import annotations

import re

import jinja2
import yaml

from cache import LabelStore
from pipeline.exchange.model_card import code
from pipeline.models.names import public

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


def store_card(repo: str, store: LabelStore, views: int, licence: str | None) -> str:
    """Return the card, Markdown with a head in YAML. views: how many are shared."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.exchange", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "public": public}
    head = {
        **({"license": licence} if licence else {}),
        "tags": ["soft-labels", "knowledge-distillation", "meal-v2", "zarr"],
        "task_categories": ["image-classification"],
        # The hub must not make a table of pictures or texts of the packs.
        "viewer": False,
    }
    return environment.get_template("store_card.md").render(
        head=yaml.safe_dump(head, sort_keys=False),
        repo=repo,
        store=store,
        views=views,
        licence=licence,
        crops=store.provenance["crops"],
        kl=store.max_error[0],
        tv=store.max_error[1],
    )
