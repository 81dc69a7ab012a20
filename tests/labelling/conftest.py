"""A recipe on a small data set, for tests that start workers as real processes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small import changed, write_photos
from support.workers import ROWS, VIEWS, House, Place


@pytest.fixture(scope="module")
def house(recipe, teachers) -> Iterator[House]:
    """18 photographs and a file that is no image, five shards a view, one teacher."""
    folder = Path(tempfile.mkdtemp(prefix="workers."))
    folder.chmod(0o755)
    write_photos(folder / "data" / "train", 6)
    (folder / "data" / "train" / "bee" / "notes.txt").write_text("no image")
    write_photos(folder / "data" / "val", 2, seed=1)
    teacher = teachers[0] | {"checkpoint": shutil.copy(teachers[0]["checkpoint"], folder)}
    os.chmod(teacher["checkpoint"], 0o644)
    small = changed(
        recipe,
        crops={"views": VIEWS},
        store={"shard_rows": ROWS, "batch_size": ROWS, "views_per_decode": 2},
        render={"threads": 1},
    )
    document = small.model_dump(mode="json", exclude_unset=True) | {"teachers": [teacher]}
    (folder / "recipe.yaml").write_text(type(recipe).model_validate(document).to_yaml())
    house = House(folder, folder / "recipe.yaml", folder / "data")
    yield house
    house.end()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(house) -> Path:
    """The store of a single undisturbed process, beside stores of one, two and four
    views."""
    for views in (1, 2, VIEWS, 4):
        Place(house, Path(), house.folder / f"{views} views").run(f"--views={views}")
        (house.folder / f"{views} views" / "s.zarr").rename(house.folder / f"{views}.zarr")
    return house.folder / f"{VIEWS}.zarr"


@pytest.fixture
def place(house, whole) -> Iterator[Place]:
    place = Place(house, whole, house.folder / f"place{next(house.number)}")
    yield place
    house.end()
    shutil.rmtree(place.folder)
