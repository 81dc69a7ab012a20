"""Hold many texts in one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.images.sources.kept import packed


class PackedTexts:
    """Texts, read one at a time.

    A million Python strings take 100 MB in every worker of a data loader: whoever reads
    a string counts a reference in it, and so copies the memory that forked processes
    would share. texts: without NUL.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.text = packed(texts)
        self.ends = np.flatnonzero(self.text == 0)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: int) -> str:
        first = self.ends[place - 1] + 1 if place else 0
        return self.text[first : self.ends[place]].tobytes().decode("utf-8", "surrogateescape")
