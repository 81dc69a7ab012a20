"""The discriminator can't tell labels from their teachers by their coding, tells apart what truly differs, and trains as its options say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, changed
from safetensors.torch import load_file

from cache import LabelStore, schema
from cache.codec import CODECS, Codec
from cache.schema import Images
from cache.writer import StoreWriter
from pipeline import config as configs
from pipeline.config import ConfigError
from pipeline.losses import Discriminator, log_floored, reverse_gradient
from pipeline.models import load_teachers
from pipeline.replay import Batch, DrawnCrops, StoredLabels
from pipeline.student import train
from pipeline.targets import Targets

LEARNT, HELD_OUT = 4096, 1024  # rows
NO_FLOOR = 2.0**-149  # the smallest float32
FEW = Codec("few", "uint8", 0.5, 31, 0.35 * (0.5 / 31) ** 2)
ALL = {**CODECS, "few": FEW}
JUDGED = {"train": {"discriminator": {}}}

every_codec = pytest.mark.parametrize("codec", ALL.values(), ids=ALL)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def real_logits(low: float, high: float, seed: int) -> np.ndarray:
    """float64 [rows, 1000]: log-probabilities of real teachers, of two pictures mixed by a random share, times a random sharpness.

    The rows to learn from and those held out are of different pictures. At sharpness 1 the least probability of all is 1.2e-6.
    """
    with np.load(Path(__file__).parent / "data" / "soft_labels.npz") as file:
        logs = np.log(file["probabilities"].astype("float64"))
    rng = np.random.default_rng(seed)
    half, parts = len(logs) // 2, []
    for first, n in ((0, LEARNT), (half, HELD_OUT)):
        one, other = logs[first + rng.integers(half, size=(2, n))]
        share, sharpness = rng.random((n, 1)), rng.uniform(low, high, (n, 1))
        parts.append(sharpness * (share * one + (1 - share) * other))
    return np.concatenate(parts)


def made_up_logits(classes: int, low: float, high: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = LEARNT + HELD_OUT
    return rng.normal(0, 1, (n, classes)) * rng.uniform(low, high, (n, 1))


def sharp_logits(classes: int, codec: Codec, seed: int) -> np.ndarray:
    """Logits of which every codec codes about a like share as zero, half or more: the finer the codec, the sharper."""
    finer = np.log(codec.floor) / np.log(CODECS["pow8"].floor)
    return real_logits(2 * finer, 6 * finer, seed) if classes == 1000 else made_up_logits(classes, 5 * finer, 15 * finer, seed)


@dataclass
class Sides:
    """What the discriminator sees of teachers through a store, and of a student who has the teachers' very logits but for an offset per row."""

    probabilities: torch.Tensor  # float32 [n, classes] of the teachers
    student: torch.Tensor  # float32 [n, classes], as Targets.judged gives it; so too
    teachers: torch.Tensor


def through_a_store(path: Path, codec: Codec, logits: np.ndarray, floor: float | None = None) -> Sides:
    """Labels are written to a store on the disk, read back, decoded and judged by the code that trains."""
    n, classes = logits.shape
    logits = torch.from_numpy(logits)
    probabilities = logits.softmax(dim=1).float()
    files = {"path": np.array([f"c/{i:05}.jpg" for i in range(n)], dtype=object), "reason": np.full(n, "", dtype=object)}
    columns = {"bytes": "int64", "height": "int32", "width": "int32", "class_index": "int32", "status": "uint8"}
    manifest = Images(**files, digest=np.zeros((n, 32), "uint8"), **{name: np.zeros(n, dtype) for name, dtype in columns.items()})
    layout = {"chunk_rows": 512, "shard_rows": n}
    attributes = {
        "codec": codec.describe(),
        "provenance": {"layout": layout, "crops": {}, "renderer": {"backend": "cpu"}},
        "class_names": [str(c) for c in range(classes)],
    }
    assert schema.create(path, images=manifest, views=1, classes=classes, attributes=attributes, **layout)
    StoreWriter(path).write(0, 0, codec.encode(probabilities.numpy()), np.zeros((n, 4), "int32"), np.zeros(n, bool))
    store = LabelStore.open(path)
    targets = Targets(configs.validate(JUDGED, "test"), StoredLabels(store, 1), classes, CPU, [])
    if floor is not None:
        targets.floor = floor
    codes = torch.from_numpy(store.codes(0, slice(None)))
    goal = targets(Batch(np.arange(n), {}, codes, torch.zeros(n, dtype=torch.int64), None, n))
    offsets = 5 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Sides(probabilities, *targets.judged((logits + offsets).float(), goal))


def told(student: torch.Tensor, teachers: torch.Tensor, seed: int, *, steps: int = 1000) -> float:
    """Share of right answers on rows held out, the last HELD_OUT of either side, after learning from the others: 0.5 is guessing."""
    torch.manual_seed(seed)
    seen = torch.cat([student[:-HELD_OUT], teachers[:-HELD_OUT]])
    student, teachers = ((side - seen.mean(dim=0)) / seen.std(dim=0) for side in (student, teachers))  # which the first layer could do itself
    judge = Discriminator(student.shape[1])
    optimizer = torch.optim.Adam(judge.parameters(), lr=LR, fused=True)
    for _ in range(steps):
        rows = torch.randint(len(student) - HELD_OUT, (64,))
        loss, _ = judge(student[rows], teachers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return judge(student[-HELD_OUT:], teachers[-HELD_OUT:])[1].mean().item()


# ---- the coding


@pytest.mark.parametrize("classes", [10, 1000])
@every_codec
def test_stored_labels_are_not_told_from_the_teachers_own_outputs(tmp_path, codec, classes):
    sides = through_a_store(tmp_path / "s.zarr", codec, sharp_logits(classes, codec, seed=0))
    assert (sides.probabilities < codec.floor).float().mean() > 0.2
    assert told(sides.student, sides.teachers, seed=0) <= 0.55
