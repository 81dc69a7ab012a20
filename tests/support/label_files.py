"""Write label files as FKD's generator does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

CROPS = 3


def write_set(root: Path, images: Path, seed: int = 0, dtype: type = np.float32) -> Path:
    for i, file in enumerate(sorted(images.glob("*/*.jpg"))):
        rng = np.random.default_rng((7, i))  # the same crops for every seed
        with Image.open(file) as photo:
            width, height = photo.size
        boxes = []
        for _ in range(CROPS):
            h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
            boxes.append(
                (
                    rng.integers(0, height - h + 1) / height,
                    rng.integers(0, width - w + 1) / width,
                    h / height,
                    w / width,
                )
            )
        p = np.sort(np.random.default_rng((seed, i)).dirichlet(np.ones(3), CROPS), axis=1)[:, :0:-1]
        ids = np.stack([rng.permutation(3)[:2] for _ in range(CROPS)])
        state = [
            torch.tensor(boxes).numpy().astype(dtype),
            rng.random(CROPS) < 0.5,
            np.stack([ids, p], axis=1).astype(dtype),
        ]
        place = root / "train" / file.parent.name / f"{file.stem}.tar"
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, place)
    return root.parent
