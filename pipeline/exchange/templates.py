"""Fill in the Markdown templates of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jinja2

from cache.errors import printable
from pipeline.models.names import public


def filled(name: str, filters: dict[str, Callable], **values: Any) -> str:
    """Return a template with its values. filters: beside ``code`` and ``public``. A
    value that the template names and nobody gives is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.exchange", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "public": public, **filters}
    return environment.get_template(name).render(**values)


def code(value: object) -> str:
    """Format a value as Markdown code, in a table too. Names come from folders and from
    other people's stores, and may hold any character."""
    text = printable(value if isinstance(value, str) else json.dumps(value))
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"
