"""Crops: the random numbers are Philox's, a crop depends on seed, image and view alone,
and the distribution of crops is torchvision's."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from pipeline.config import CropPolicy, CutMix
from pipeline.sampling import cutmix, philox, random_crop
from pipeline.sampling.epoch_order import epoch_windows, row_order

POLICY = CropPolicy()
SIZES = [(375, 500), (500, 333), (224, 224), (300, 900)]  # the last often needs the fallback
DRAWS = 10_000  # crops drawn for each size


def some_images(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make up identities, heights and widths of images."""
    rng = np.random.default_rng(seed)
    return (
        philox.identities(np.array([f"class/{i}.jpg" for i in range(n)], object)),
        rng.integers(1, 600, n),
        rng.integers(1, 600, n),
    )


@pytest.mark.parametrize(
    ("counter", "key", "drawn"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_random_words_are_those_of_random123(counter, key, drawn):
    c, k = [int(word, 16) for word in counter.split()], [int(word, 16) for word in key.split()]
    # The counter is drawn in a batch, beside another counter.
    words = philox.words(k[0] | k[1] << 32, np.array([7, c[0]]), *c[1:])
    assert " ".join(f"{word:08x}" for word in words[1]) == drawn


def test_a_crop_depends_on_no_batch_order_or_other_image():
    images = some_images(200)
    boxes, flips = random_crop.draw(POLICY, *images, 3)
    for rows in (
        np.random.default_rng(1).permutation(200),
        np.arange(0, 200, 3),
        *np.arange(200)[:, None],
    ):
        other_boxes, other_flips = random_crop.draw(POLICY, *(column[rows] for column in images), 3)
        assert np.array_equal(other_boxes, boxes[rows]) and np.array_equal(other_flips, flips[rows])


@pytest.mark.parametrize("what", ["seed", "high word of the seed", "view", "path"])
def test_another_seed_view_or_path_moves_the_crop(what):
    identity, height, width = some_images(200)
    height, width = height + 100, width + 100
    boxes, flips = random_crop.draw(POLICY, identity, height, width, 3)
    seed = {"seed": 1, "high word of the seed": 1 << 32}.get(what, 0)
    if what == "path":
        identity = philox.identities(np.array([f"klass/{i}.jpg" for i in range(200)], object))
    others, other_flips = random_crop.draw(
        CropPolicy(seed=seed), identity, height, width, 4 if what == "view" else 3
    )
    # A few images have the fallback's crop in every view.
    assert (others != boxes).any(axis=1).mean() > 0.9
    assert 60 < (flips != other_flips).sum() < 140


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (1, 500), (500, 1), (3, 4000), (4000, 3), (40, 40), (41, 37)]
)
def test_boxes_lie_inside_the_image(size):
    n = 2000
    identity, _, _ = some_images(n)
    height, width = np.full(n, size[0]), np.full(n, size[1])
    for policy in (
        POLICY,
        CropPolicy(scale=(0.0001, 1.0)),
        CropPolicy(scale=(1.0, 1.0)),
        CropPolicy(ratio=(0.1, 10.0)),
        CropPolicy(ratio=(3.0, 4.0)),
    ):
        boxes, _ = random_crop.draw(policy, identity, height, width, 0)
        top, left, h, w = boxes.T
        assert h.min() >= 1 and w.min() >= 1 and top.min() >= 0 and left.min() >= 0
        assert (top + h).max() <= size[0] and (left + w).max() <= size[1]


def features(boxes: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the values by which distributions of boxes are compared."""
    top, left, h, w = boxes.astype(float).T
    return {
        "area": h * w / (size[0] * size[1]),
        "log aspect": np.log(w / h),
        "top": top / np.maximum(size[0] - h, 1),
        "left": left / np.maximum(size[1] - w, 1),
    }


@pytest.fixture(scope="module")
def torchvisions() -> dict[tuple[int, int], np.ndarray]:
    """The boxes [draws, 4] that torchvision draws for each size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            size: np.array(
                [
                    RandomResizedCrop.get_params(
                        torch.empty(3, *size, device="meta"), [*POLICY.scale], [*POLICY.ratio]
                    )
                    for _ in range(DRAWS)
                ]
            )
            for size in SIZES
        }


def drawn(size: tuple[int, int]) -> np.ndarray:
    return random_crop.draw(
        POLICY, some_images(DRAWS)[0], np.full(DRAWS, size[0]), np.full(DRAWS, size[1]), 0
    )[0]


@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_distributed_like_torchvisions(torchvisions, size):
    ours, theirs = features(drawn(size), size), features(torchvisions[size], size)
    for name in ours:
        assert ks_2samp(ours[name], theirs[name]).pvalue > 1e-3, name
    assert np.abs(np.corrcoef([*ours.values()]) - np.corrcoef([*theirs.values()])).max() < 0.06


def sampler(size: tuple[int, int], uniform_ratio: bool) -> np.ndarray:
    """Draw boxes by RandomResizedCrop with numpy's random numbers. uniform_ratio: make
    the ratio uniform in place of its logarithm, which is wrong."""
    rng, (low, high), boxes = np.random.default_rng(0), POLICY.ratio, []
    while len(boxes) < DRAWS:
        area = size[0] * size[1] * rng.uniform(*POLICY.scale)
        ratio = (
            rng.uniform(low, high)
            if uniform_ratio
            else np.exp(rng.uniform(np.log(low), np.log(high)))
        )
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= size[1] and h <= size[0]:
            boxes.append((rng.integers(size[0] - h + 1), rng.integers(size[1] - w + 1), h, w))
    return np.array(boxes)


def test_that_comparison_would_notice_a_ratio_drawn_wrongly(torchvisions):
    size = SIZES[0]
    theirs = features(torchvisions[size], size)["log aspect"]
    assert (
        ks_2samp(features(sampler(size, uniform_ratio=False), size)["log aspect"], theirs).pvalue
        > 1e-3
    )
    assert (
        ks_2samp(features(sampler(size, uniform_ratio=True), size)["log aspect"], theirs).pvalue
        < 1e-12
    )


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_flips_have_the_asked_probability_and_nothing_to_do_with_the_box(probability):
    n = 40_000
    boxes, flips = random_crop.draw(
        CropPolicy(flip=probability), some_images(n)[0], np.full(n, 400), np.full(n, 400), 0
    )
    assert abs(flips.mean() - probability) <= 4 * (probability * (1 - probability) / n) ** 0.5
    if 0 < probability < 1:
        for name, values in features(boxes, (400, 400)).items():
            assert ks_2samp(values[flips], values[~flips]).pvalue > 1e-3, name


@pytest.mark.parametrize(
    "size", [(3000, 40), (40, 3000), (41, 3001), (3001, 43), (1, 500), (500, 1), (3, 4000)]
)
def test_an_image_far_outside_the_ratio_gives_torchvisions_centred_crop(size):
    theirs = RandomResizedCrop.get_params(
        torch.empty(3, *size, device="meta"), [*POLICY.scale], [*POLICY.ratio]
    )
    boxes, _ = random_crop.draw(
        POLICY, some_images(50)[0], np.full(50, size[0]), np.full(50, size[1]), 0
    )
    assert (boxes == theirs).all()


def sha256(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def test_crops_mixes_and_orders_are_those_of_every_version_before():
    """A store that another version began is extended and replayed with the same draws.
    The digests are those of version 0.7.0."""
    paths = np.array([f"class/{i:05}.jpg" for i in range(1000)], object)
    identity, size = philox.identities(paths), np.full(1000, 300)
    crops = random_crop.draw(CropPolicy(seed=7), identity, size, size, 3)
    assert sha256(*crops) == "bbdfed7aea071cd629581187af0f8d74037069611f06f17e756f9c0de1390fbf"
    rectangles = cutmix.boxes(CutMix(prob=0.5), 7, identity, 3)
    partners = cutmix.partners(7, identity, np.ones(1000, bool), 3)
    mixes = sha256(rectangles, partners)
    assert mixes == "c6c054c2a3b18b1c328c49feaf4ebc25c335fdc01806aa38857a0a9e3c66c113"
    epoch = np.concatenate([*epoch_windows(np.arange(1000), 16, 7, 3)])
    order = sha256(epoch, row_order(7, paths))
    assert order == "dc50d3f6b7bf21aac272276c2ada9d6b30089b5a19639f6131e5c7837f9096b1"
