"""Name the folder of this program's cache."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "OFFLINE_MEAL_CACHE"  # names another cache folder


def cache_folder() -> Path:
    """Return the folder of this program's cache: $OFFLINE_MEAL_CACHE, otherwise
    offline-meal-v2 in $XDG_CACHE_HOME or ~/.cache. It need not exist."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above, "offline-meal-v2")
