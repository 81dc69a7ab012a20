"""Fill in the Markdown templates of this folder."""

from __future__ import annotations

import json
from typing import Any

import jinja2

from cache.errors import printable
from pipeline.models.names import public
from pipeline.runtime.progress import duration


def filled(name: str, **values: Any) -> str:
    """Return a template with its values. Raises jinja2.UndefinedError if the template
    names a value that isn't given."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.exchange", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "duration": duration, "public": public}
    return environment.get_template(name).render(**values)


def code(value: object) -> str:
    """Format a value as Markdown code, in a table too. Names come from folders and from
    other people's stores, and may hold any character."""
    text = printable(value if isinstance(value, str) else json.dumps(value))
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"
