"""Compare names, and put names and numbers into messages."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

FEW = 3  # names shown of a longer list


def same(name: str) -> str:
    """Return the form of a name by which names are compared. macOS, and archives made
    there, write é as two characters; elsewhere é is one (Unicode's NFD and NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def told_apart(*names: str) -> tuple[str, ...]:
    """Return names as a message shows them: those that look like each other with
    escapes for everything beyond ASCII, and all in quotes if spaces tell them apart."""
    looks = [unicodedata.normalize("NFKC", name).strip() for name in names]
    if len(set(looks)) == len(set(names)):
        return names
    return tuple(ascii(name) for name in names)


def some(names: Iterable[str], few: int = FEW) -> str:
    """Return the first few of several names, for a message. A name that begins or ends
    with a blank is in quotes."""
    listed = [name if name == name.strip() else repr(name) for name in names]
    more = f" and {len(listed) - few:,} more" if len(listed) > few else ""
    return ", ".join(listed[:few]) + more


def counted(n: int, what: str, several: str | None = None) -> str:
    """Return a number with its noun: 1 class, 2 classes."""
    return f"{n:,} {what if n == 1 else several or what + 's'}"
