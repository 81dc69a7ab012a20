"""CutMix: mixes are drawn as in the paper, teachers and student see the same mix, a
mixed store behaves as any store, and labels may be mixed by area."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import zarr
from scipy.stats import ks_2samp
from support.small import CPU, changed, tree, write_photos
from support.stages import (
    crop_renderer,
    drawn_crops,
    generate,
    make_replay,
    make_targets,
    scan,
    stored_labels,
    train,
)

from cache import LabelStore, StoreError
from pipeline import config_file
from pipeline.config import Config, ConfigError, CropPolicy, CutMix, Render
from pipeline.images.data_set import DataSet
from pipeline.images.sources import folder_names
from pipeline.provenance.description import policy_of
from pipeline.render.mixing import paste
from pipeline.runtime.execution import Execution
from pipeline.sampling import cutmix, philox, random_crop
from pipeline.sampling.crop_sampler import CropSampler
from pipeline.sampling.cutmix import GROUP
from pipeline.sampling.epoch_order import blocks_of, side_by_side
from pipeline.training.batches import Batch
from pipeline.training.source import DrawnCrops, StoredLabels, choose_source

SIZES = (64, 48)  # pixels, of conftest's teachers
BAD = {
    "cut.jpg": b"\xff\xd8\xff\xe0 no more",
    "empty.jpg": b"",
    "notes.txt": b"no image",
    "none.jpg": b"neither",
}
PEOPLE = philox.identities(np.array([f"c{i % 7}/{i}.jpg" for i in range(20_000)], object))


# ---- rectangles


def test_a_rectangle_is_a_function_of_seed_image_and_view():
    policy, some = CutMix(prob=0.7, beta=0.5), PEOPLE[:500]
    first = cutmix.boxes(policy, 3, some, 5)
    order = np.random.default_rng(0).permutation(500)[:300]
    assert np.array_equal(cutmix.boxes(policy, 3, some[order], 5), first[order])
    for other in (
        cutmix.boxes(policy, 3 + (1 << 32), some, 5),
        cutmix.boxes(policy, 3, some, 6),
        cutmix.boxes(policy, 3, PEOPLE[500:1000], 5),
    ):
        mixed = first.any(axis=1) & other.any(axis=1)
        assert mixed.sum() > 150 and not (first[mixed] == other[mixed]).all(axis=1).any()


def paper(rng: np.random.Generator, beta: float, n: int) -> np.ndarray:
    """Draw rectangles by rand_bbox of Yun et al. on a picture of side one: [n, 4] top,
    left, bottom, right."""
    side = np.sqrt(1.0 - rng.beta(beta, beta, n))
    y, x = rng.uniform(size=n), rng.uniform(size=n)
    return np.clip(np.stack([y - side / 2, x - side / 2, y + side / 2, x + side / 2], axis=1), 0, 1)


def kept_share(box: np.ndarray) -> np.ndarray:
    return 1 - (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])


@pytest.mark.parametrize("beta", [1.0, 0.5, 3.0])
def test_rectangles_are_distributed_as_in_the_paper(beta):
    ours = cutmix.boxes(CutMix(beta=beta), 0, PEOPLE, 0).astype(np.float64)
    theirs = paper(np.random.default_rng(0), beta, len(PEOPLE))
    assert ours.min() >= 0 and ours.max() <= 1 and (ours[:, :2] < ours[:, 2:]).all()
    assert kept_share(ours).mean() == pytest.approx(kept_share(theirs).mean(), abs=0.01)
    for look in (
        kept_share,
        lambda box: box[:, 0],
        lambda box: box[:, 3],
        lambda box: box[:, 2] - box[:, 0],
        lambda box: box.sum(axis=1),
    ):
        assert ks_2samp(look(ours), look(theirs)).pvalue > 0.001


def test_lambda_is_uniform_for_beta_1_where_no_edge_cuts_the_rectangle_off():
    box = cutmix.boxes(CutMix(), 0, PEOPLE, 1).astype(np.float64)
    whole = (box[:, :2].min(axis=1) > 0) & (box[:, 2:].max(axis=1) < 1)
    assert 1000 < whole.sum() < len(box) / 2
    height, width = (box[whole, 2:] - box[whole, :2]).T
    np.testing.assert_allclose(height, width, atol=1e-6)
    # A square of side s stays whole with probability (1 − s)². Weighted by the inverse
    # of this probability, the area 1 − λ is uniform.
    weight = (height < 0.7) / (1 - height) ** 2
    for area in (0.05, 0.1, 0.2, 0.3, 0.4):
        assert (weight * (height**2 < area)).sum() / len(box) == pytest.approx(area, abs=0.015)


def test_prob_is_the_share_of_mixed_crops_and_the_others_have_no_rectangle():
    all_of_them = cutmix.boxes(CutMix(), 0, PEOPLE, 0)
    for prob in (0.1, 0.6):
        box = cutmix.boxes(CutMix(prob=prob), 0, PEOPLE, 0)
        mixed = box.any(axis=1)
        assert mixed.mean() == pytest.approx(prob, abs=0.012)
        assert np.array_equal(box[mixed], all_of_them[mixed])
    assert all_of_them.any(axis=1).all()


def test_a_mix_tells_nothing_of_its_crop():
    size = np.full(len(PEOPLE), 200)
    box, flips = random_crop.draw(CropPolicy(), PEOPLE, size, size, 0)
    mix = cutmix.boxes(CutMix(), 0, PEOPLE, 0)
    partner = cutmix.partners(0, PEOPLE, np.ones(len(PEOPLE), bool), 0)
    drawn = np.stack(
        [
            kept_share(mix),
            mix[:, 0],
            mix[:, 1],
            partner % GROUP,
            flips,
            box[:, 0],
            box[:, 1],
            box[:, 2] * box[:, 3],
        ]
    )
    among = np.abs(np.corrcoef(drawn))[:4]
    among[:4, :4][np.tril_indices(4)] = 0
    among[0, 1:3] = 0  # but large rectangles begin at an edge
    among[1, 2] = 0
    assert among.max() < 0.03


# ---- partners


def some_usable(rows: int) -> np.ndarray:
    usable = np.random.default_rng(1).random(rows) < 0.9
    usable[GROUP] ^= usable[GROUP : 2 * GROUP].sum() % 2 == 0  # an odd number in the second group
    return usable


def test_partners_are_usable_mutual_and_of_the_same_group():
    rows = 2 * GROUP + 450
    usable, own = some_usable(rows), np.arange(rows)
    partner = cutmix.partners(0, PEOPLE[:rows], usable, 0)
    assert np.array_equal(partner[~usable], own[~usable])
    assert usable[partner[usable]].all() and (partner[usable] != own[usable]).all()
    assert np.array_equal(partner // GROUP, own // GROUP)
    for start in range(0, rows, GROUP):
        group = slice(start, start + GROUP)
        assert (partner[partner] != own)[group].sum() == usable[group].sum() % 2  # one left over


def test_partners_are_a_random_pairing_and_another_in_every_view():
    rows = 2 * GROUP
    own, usable = np.arange(rows), np.ones(rows, bool)
    first = cutmix.partners(0, PEOPLE[:rows], usable, 0)
    assert np.array_equal(first, cutmix.partners(0, PEOPLE[:rows], usable, 0))
    for other in (
        cutmix.partners(0, PEOPLE[:rows], usable, 1),
        cutmix.partners(1, PEOPLE[:rows], usable, 0),
    ):
        assert (first == other).mean() < 0.01
    assert np.abs(first - own).mean() == pytest.approx(GROUP / 3, rel=0.06)


def test_what_is_alone_is_its_own_partner():
    for rows, alone in ((1, 0), (5, 3), (GROUP + 1, GROUP)):
        usable = np.arange(rows) == alone
        assert np.array_equal(cutmix.partners(0, PEOPLE[:rows], usable, 0), np.arange(rows))
    assert cutmix.pairs(np.array([7, 3, 9, 1, 4])).tolist() == [3, 7, 1, 9, 7]


# ---- pixels


def test_a_rectangles_pixels_are_rounded_half_up_in_double_precision():
    box = np.array(
        [
            [0.25, 0.0, 0.75, 1.0],
            [0.24, 0.26, 0.3125, 0.35],
            [np.nextafter(np.float32(0.05), np.float32(0)), 0, 1, 1],
        ],
        np.float32,
    )
    assert cutmix.pixel_box(box, 10).tolist() == [[3, 0, 8, 10], [2, 3, 3, 3], [0, 0, 10, 10]]
    assert cutmix.pixel_box(box[:2], 8).tolist() == [[2, 0, 6, 8], [2, 2, 3, 3]]
    below_half = np.full((1, 4), np.nextafter(np.float32(0.5), np.float32(0)))
    # In single precision the sum of this edge and ½ is 1.
    assert cutmix.pixel_box(below_half, 1).tolist() == [[0, 0, 0, 0]]


def slices(box: np.ndarray, size: int) -> tuple[slice, slice]:
    """Return the pasted rows and columns by the rule of how_to_read, in Python's own
    arithmetic."""
    top, left, bottom, right = (math.floor(edge * size + 0.5) for edge in box.tolist())
    return slice(top, bottom), slice(left, right)


@pytest.mark.parametrize("size", [8, 33, 64])
def test_pasting_is_an_assignment_of_slices_and_area_is_the_share_of_pixels_it_changes(size):
    rng = np.random.default_rng(0)
    box = np.concatenate(
        [
            cutmix.boxes(CutMix(beta=0.5, prob=0.9), 0, PEOPLE[:60], 0),
            [[0, 0, 1, 1]],
            np.zeros((1, 4)),
        ]
    ).astype(np.float32)
    # Crops and partners have no pixel value in common.
    ours, theirs = (
        rng.integers(low, low + 128, (len(box), size, size, 3), dtype=np.uint8) for low in (0, 128)
    )
    wanted = ours.copy()
    place = rng.integers(0, len(box), len(box))
    for picture, other, b in zip(wanted, theirs[place], box, strict=True):
        picture[slices(b, size)] = other[slices(b, size)]
    given = torch.from_numpy(ours)
    got = paste(given, torch.from_numpy(theirs), place, box).numpy()
    assert (
        np.array_equal(got, wanted)
        and np.shares_memory(given.numpy(), ours)
        and not np.shares_memory(got, ours)
    )
    assert (given.numpy() < 128).all()  # the given crops stay unmixed, since others paste from them
    changed_pixels = (got != ours).all(axis=3).sum(axis=(1, 2))
    np.testing.assert_array_equal(
        cutmix.area(box, size), (changed_pixels / size**2).astype(np.float32)
    )
    assert changed_pixels[-2:].tolist() == [size**2, 0]


# ---- stores


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 photographs and four files that are no image: with shards of 16 rows three
    groups of partners are odd or small."""
    data = tmp_path_factory.mktemp("data")
    write_photos(data, 16)
    for place, (name, content) in zip(("ant", "bee", "cat", "bee"), BAD.items(), strict=True):
        (data / place / name).write_bytes(content)
    return data


@pytest.fixture(scope="module")
def mixing(recipe: Config) -> Config:
    small = {"codec": "float32", "shard_rows": 16, "batch_size": 6, "views_per_decode": 2}
    return changed(
        recipe,
        store=small,
        crops={"cutmix": {}},
        train={"batch_size": 8, "epochs": 1, "milestones": []},
    )


@pytest.fixture(scope="module")
def stores(
    data: Path, mixing: Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[float, Path]:
    """Mixed stores of two views, by their probability of mixing."""
    folder = tmp_path_factory.mktemp("mixed")
    for prob, beta in ((1.0, 1.0), (0.6, 0.5)):
        generate(
            changed(mixing, crops={"cutmix": {"prob": prob, "beta": beta}}),
            data,
            folder / f"{prob}.zarr",
            device=CPU,
        )
    return {prob: folder / f"{prob}.zarr" for prob in (1.0, 0.6)}


class ByHand:
    """A view of a mixed store, read by how_to_read: the crops rendered one at a time,
    and pasted with numpy."""

    def __init__(self, path: Path, folder: Path, view: int) -> None:
        group = zarr.open_group(str(path), mode="r")
        boxes, flips, self.partner, self.mix_box, self.labels = (
            group[name][view] for name in ("boxes", "flips", "mix_partner", "mix_box", "labels")
        )
        self.usable = np.flatnonzero(group["images/status"][:] == 0)
        names = group["images/path"][:]
        one = crop_renderer(SIZES, 1, 1, interpolation="bilinear", exif="ignore", threads=1)
        self.alone = {size: np.zeros((len(names), size, size, 3), np.uint8) for size in SIZES}
        for row in self.usable:
            rendered = one(
                [(folder / names[row]).read_bytes()],
                boxes[None, row : row + 1],
                flips[None, row : row + 1],
            )[0]
            for size in SIZES:
                self.alone[size][row] = rendered[size][0].numpy()
        self.mixed = {size: pixels.copy() for size, pixels in self.alone.items()}
        self.area = {size: np.zeros(len(names)) for size in SIZES}
        for size in SIZES:
            for row in np.flatnonzero(self.partner >= 0):
                here = slices(self.mix_box[row], size)
                self.mixed[size][row][here] = self.alone[size][self.partner[row]][here]
                self.area[size][row] = self.mixed[size][row][here][..., 0].size / size**2


@pytest.fixture(scope="module")
def by_hand(stores: dict[float, Path], data: Path) -> dict[float, list[ByHand]]:
    return {prob: [ByHand(path, data, view) for view in (0, 1)] for prob, path in stores.items()}


def mean_softmax(teachers: list[dict], pixels: dict[int, np.ndarray]) -> np.ndarray:
    total = 0
    for teacher in teachers:
        module = timm.create_model(
            teacher["model"], num_classes=3, checkpoint_path=teacher["checkpoint"]
        ).eval()
        mean, std = (
            torch.tensor(module.pretrained_cfg[key])[:, None, None] for key in ("mean", "std")
        )
        with torch.no_grad():
            x = torch.from_numpy(pixels[teacher["image_size"]]).permute(0, 3, 1, 2) / 255
            total = total + module((x - mean) / std).softmax(dim=1)
    return (total / len(teachers)).numpy()


@pytest.mark.parametrize("prob", [1.0, 0.6])
def test_a_stored_label_is_the_teachers_mean_softmax_on_the_mixed_picture(by_hand, teachers, prob):
    for view in by_hand[prob]:
        rows = view.usable
        np.testing.assert_allclose(
            view.labels[rows],
            mean_softmax(teachers, {s: p[rows] for s, p in view.mixed.items()}),
            atol=1e-5,
        )
        unmixed = mean_softmax(teachers, {s: p[rows] for s, p in view.alone.items()})
        assert np.abs(view.labels[rows] - unmixed).max() > 0.1  # the comparison would notice a mix


def test_stage_one_mixes_within_every_group_of_a_shard_whatever_its_batches(
    data, mixing, teachers, tmp_path, monkeypatch
):
    monkeypatch.setattr(cutmix, "GROUP", 8)  # two groups a shard, each of batches of 3, 3 and 2
    generate(
        changed(mixing, crops={"views": 1}, store={"batch_size": 3}),
        data,
        tmp_path / "s.zarr",
        device=CPU,
    )
    view = ByHand(tmp_path / "s.zarr", data, 0)
    rows = np.flatnonzero(view.partner >= 0)
    assert np.array_equal(view.partner[rows] // 8, rows // 8) and len(rows) > 40
    np.testing.assert_allclose(
        view.labels[rows],
        mean_softmax(teachers, {s: p[rows] for s, p in view.mixed.items()}),
        atol=1e-5,
    )


def test_a_store_keeps_the_mix_of_every_crop_and_none_for_an_unusable_image(stores, by_hand):
    for prob, views in by_hand.items():
        for view, kept in enumerate(views):
            mixed, unusable = kept.partner >= 0, np.setdiff1d(np.arange(52), kept.usable)
            assert len(unusable) == 4 and not mixed[unusable].any()
            assert np.array_equal(mixed, kept.mix_box.any(axis=1))
            assert (
                np.isin(kept.partner[mixed], kept.usable).all()
                and (kept.partner[mixed] != np.flatnonzero(mixed)).all()
            )
            assert mixed[kept.usable].all() if prob == 1 else 15 < mixed.sum() < 40
            partner, box = LabelStore.open(stores[prob]).mixes(view, slice(None))
            assert np.array_equal(partner, kept.partner) and np.array_equal(box, kept.mix_box)
        assert not np.array_equal(views[0].partner, views[1].partner) and not np.array_equal(
            views[0].mix_box, views[1].mix_box
        )
    # The fixture has an odd group.
    assert any(
        np.isin(kept.usable, range(first, first + 16)).sum() % 2 for first in range(0, 52, 16)
    )


def batches(
    source: StoredLabels | DrawnCrops, folder: Path, epoch: int, **how: object
) -> list[Batch]:
    options = {"sizes": SIZES, "batch_size": 8, "seed": 5} | how
    with make_replay(source, folder, rendering=Render(threads=2), **options).epoch(epoch) as made:
        return list(made)


# 45 leaves a last batch of three, which every process has whole.
@pytest.mark.parametrize("batch_size", [8, 7, 45])
@pytest.mark.parametrize("prob", [1.0, 0.6])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_student_sees_the_teachers_pictures_bit_for_bit(
    stores, by_hand, data, prob, batch_size, world
):
    source = stored_labels(LabelStore.open(stores[prob]), 2)
    of_class = source.images.class_index
    for epoch in (0, 3):
        kept = by_hand[prob][epoch % 2]
        ranks = [
            batches(source, data, epoch, batch_size=batch_size, rank=rank, world=world)
            for rank in range(world)
        ]
        rows = [
            np.concatenate([part.rows for part in parts[: world // parts[0].copies]])
            for parts in zip(*ranks, strict=True)
        ]
        assert np.array_equal(np.sort(np.concatenate(rows)), kept.usable)
        assert {len(r) for r in rows[:-1]} == {batch_size} and [
            part.total for part in ranks[-1]
        ] == [len(r) for r in rows]
        if world > 1:
            alone = batches(source, data, epoch, batch_size=batch_size)
            assert [r.tolist() for r in rows] == [batch.rows.tolist() for batch in alone]
        for batch in (batch for rank in ranks for batch in rank):
            for size in SIZES:
                assert np.array_equal(batch.pixels[size].numpy(), kept.mixed[size][batch.rows])
            assert np.array_equal(batch.labels.numpy(), kept.labels[batch.rows])
            partner = np.where(kept.partner < 0, np.arange(52), kept.partner)[batch.rows]
            assert np.array_equal(
                batch.mixed.area.numpy(), kept.area[SIZES[0]][batch.rows].astype(np.float32)
            )
            assert (
                np.array_equal(batch.mixed.class_index.numpy(), of_class[partner])
                and batch.mixed.labels is None
            )


def test_hard_labels_of_a_mixed_store_are_mixed_by_area(stores, by_hand, data, mixing):
    source = stored_labels(LabelStore.open(stores[0.6]), 2, hard=True)
    kept, of_class = by_hand[0.6][0], source.images.class_index
    targets = make_targets(changed(mixing, train={"labels": "hard"}), source)
    for batch in batches(source, data, 0):
        a = kept.area[SIZES[0]][batch.rows][:, None]
        wanted = (1 - a) * np.eye(3)[of_class[batch.rows]] + a * np.eye(3)[
            of_class[kept.partner[batch.rows]]
        ] * (a > 0)
        goal = targets(batch)
        np.testing.assert_allclose(goal.hard.numpy(), wanted, atol=1e-6)
        assert goal.soft is None


def test_a_mix_does_not_depend_on_which_rows_are_asked_for_in_which_order(stores, by_hand):
    store = LabelStore.open(stores[0.6])
    plan = CropSampler(policy_of(store), store.images, 16)
    for rows in (
        np.random.default_rng(0).permutation(52),
        np.array([51, 3, 17]),
        np.array([], np.int64),
    ):
        for view, kept in enumerate(by_hand[0.6]):
            for partner, box in (plan.mixes(view, rows), store.mixes(view, rows)):
                assert np.array_equal(partner, kept.partner[rows]) and np.array_equal(
                    box, kept.mix_box[rows]
                )


def test_what_is_shuffled_together_holds_whole_groups_of_partners():
    assert blocks_of(8, 32, CropPolicy()) == (8, 64)
    for chunk_rows, shard_rows in (
        (8, 32),
        (4, 1500),
        (512, 16_384),
        (1024, 32_768),
        (2048, 65_536),
        (1, 5000),
    ):
        rows, blocks = blocks_of(chunk_rows, shard_rows, CropPolicy(cutmix=CutMix()))
        assert shard_rows % rows == 0 and blocks >= 1
        ends = {*range(0, shard_rows, GROUP), shard_rows}
        assert set(range(rows, shard_rows + 1, rows)) <= ends


def drawn(photos: Path, policy: CropPolicy, shard_rows: int = 32) -> DrawnCrops:
    folder = photos / "train"
    names = folder_names.class_folders(folder)
    found = scan(folder, names, exif="ignore", threads=2, order_seed=policy.seed)
    return drawn_crops(found, names, policy, 2, (shard_rows, shard_rows))


def asked_for(
    source: DrawnCrops, folder: Path, epoch: int, batch_size: int, **how: object
) -> list[np.ndarray]:
    """List the rows that each batch of an epoch reads, and so decodes."""
    replay = make_replay(
        source,
        folder,
        sizes=[32],
        batch_size=batch_size,
        seed=5,
        rendering=Render(threads=2),
        **how,
    )
    read, asked = replay.read, []

    def counted(rows: np.ndarray) -> list[bytes]:
        asked.append(rows)
        return read(rows)

    replay.read = counted
    with replay.epoch(epoch) as made:
        list(made)
    return asked


@pytest.mark.parametrize("prob", [1.0, 0.6])
def test_with_even_batches_and_groups_no_image_is_decoded_twice(photos, prob):
    source = drawn(photos, CropPolicy(cutmix=CutMix(prob=prob)))  # groups of 32, 32 and 26 rows
    for batch_size, window_blocks in ((2, 64), (16, 64), (16, 1), (90, 1)):
        source.window_blocks = window_blocks
        assert np.array_equal(
            np.sort(np.concatenate(asked_for(source, photos / "train", 1, batch_size))),
            source.images.usable,
        )


def test_with_odd_batches_a_pair_that_is_parted_is_decoded_twice_and_no_other(photos):
    source = drawn(photos, CropPolicy(cutmix=CutMix()))
    asked = asked_for(source, photos / "train", 0, 15)
    assert all(len(np.unique(rows)) == len(rows) for rows in asked)
    assert [len(rows) for rows in asked] == [16] * 6  # every two batches part one pair


def test_a_mixed_store_says_so_and_a_plain_one_has_nothing_of_it(stores, store_path):
    mixed, plain = LabelStore.open(stores[1.0]), LabelStore.open(store_path)
    assert {"mix_partner", "mix_box"} <= set(mixed.group.array_keys())
    assert set(plain.group.array_keys()) == {"labels", "boxes", "flips", "records"}
    assert (
        "CutMix" in mixed.attributes["how_to_read"]
        and "CutMix" not in plain.attributes["how_to_read"]
    )
    assert mixed.mixed and not plain.mixed and "cutmix" not in plain.provenance["crops"]
    with pytest.raises(
        StoreError,
        match=r"holds no CutMix; ask store.mixed first, or make a store with crops.cutmix",
    ) as refusal:
        plain.mixes(0, slice(None))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["mix_partner", "mix_box"])
@pytest.mark.parametrize("loss", ["missing", "empty"])
def test_a_lost_mix_makes_its_shard_unfinished_until_it_is_made_again(
    stores, data, mixing, tmp_path, name, loss
):
    path = tmp_path / "s.zarr"
    shutil.copytree(stores[1.0], path)
    lost = LabelStore.open(path).file(name, 1, 2)
    lost.unlink() if loss == "missing" else lost.write_bytes(b"")
    store = LabelStore.open(path)
    assert np.argwhere(~store.finished()).tolist() == [[1, 2]]
    with pytest.raises(StoreError, match=r"is not finished .*run the same generate-labels"):
        store.mixes(1, slice(None))
    generate(mixing, data, path, device=CPU)
    assert tree(path) == tree(stores[1.0])


@pytest.mark.parametrize(
    ("damage", "says"),
    [("a flipped bit", "mix_box/c/0/1/0 can't be read"), ("another shard's", "another digest")],
)
def test_a_damaged_mix_is_never_believed(stores, tmp_path, damage, says):
    path = tmp_path / "s.zarr"
    shutil.copytree(stores[1.0], path)
    store = LabelStore.open(path)
    file = store.file("mix_box", 0, 1)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(
        content if damage == "a flipped bit" else store.file("mix_box", 1, 1).read_bytes()
    )
    for read in (store.mixes, store.codes):
        with pytest.raises(StoreError, match=says) as refusal:
            read(0, np.array([20]))
        assert "\n" not in str(refusal.value)
    store.mixes(0, np.array([3]))  # rows of another shard can still be read


def test_a_mixed_store_that_was_interrupted_goes_on_to_the_same_bytes(
    stores, data, mixing, tmp_path
):
    path = tmp_path / "s.zarr"
    generate(mixing, data, path, device=CPU, worker=(0, 2))
    store = LabelStore.open(path)
    assert store.progress() == (4, 8)
    store.file("records", 0, 0).unlink()  # as killed between data and record
    store.file("mix_partner", 0, 0).write_bytes(b"torn")
    generate(mixing, data, path, device=CPU)
    assert tree(path) == tree(stores[1.0])


def test_more_views_extend_a_mixed_store_to_what_one_run_would_have_made(
    stores, data, mixing, tmp_path
):
    generate(changed(mixing, crops={"views": 1}), data, tmp_path / "s.zarr", device=CPU)
    generate(mixing, data, tmp_path / "s.zarr", device=CPU)
    assert tree(tmp_path / "s.zarr") == tree(stores[1.0])


# ---- mixes by area


@pytest.mark.parametrize("crops_per_image", [1, 2])
@pytest.mark.parametrize("batch_size", [16, 30])  # 30 is odd with two crops per image
def test_by_area_pictures_and_labels_are_mixed_with_the_neighbours_in_the_batch(
    photos, recipe, store_path, crops_per_image, batch_size
):
    mix, folder, seed, epoch = CutMix(prob=0.8, beta=0.7), photos / "train", 5, 2
    store = LabelStore.open(store_path)
    source, eye = stored_labels(store, 2), np.eye(3)
    targets = make_targets(changed(recipe, train={"hard_weight": 0.5}), source)
    how = {
        "sizes": [32],
        "batch_size": batch_size,
        "seed": seed,
        "crops_per_image": crops_per_image,
    }
    areas = []
    for plain, batch in zip(
        batches(source, folder, epoch, **how),
        batches(source, folder, epoch, mix=mix, **how),
        strict=True,
    ):
        n, goal = len(batch.rows), targets(batch)
        assert (
            np.array_equal(plain.rows, batch.rows)
            and torch.equal(plain.labels, batch.labels)
            and plain.mixed is None
        )
        mate = [i ^ 1 if i ^ 1 < n else 0 for i in range(n)]
        for j in range(crops_per_image):
            p, hard = (
                store.probabilities((epoch + j) % 2, batch.rows),
                eye[store.images.class_index[batch.rows]],
            )
            box = cutmix.boxes(
                mix, seed, philox.identities(store.images.path[batch.rows]), epoch + j
            )
            unmixed = plain.pixels[32][j * n : (j + 1) * n].numpy()
            wanted, a = unmixed.copy(), np.zeros((n, 1))
            for i in range(n):
                here = slices(box[i], 32)
                wanted[i][here] = unmixed[mate[i]][here]
                a[i] = wanted[i][here][..., 0].size / 32**2
            mine = slice(j * n, (j + 1) * n)
            assert np.array_equal(batch.pixels[32][mine].numpy(), wanted)
            np.testing.assert_array_equal(
                batch.mixed.area[mine].numpy(), a[:, 0].astype(np.float32)
            )
            np.testing.assert_allclose(
                goal.soft[mine].numpy(), (1 - a) * p + a * p[mate], rtol=1e-5, atol=1e-7
            )
            np.testing.assert_allclose(
                goal.hard[mine].numpy(), (1 - a) * hard + a * hard[mate], atol=1e-6
            )
            areas += a[:, 0].tolist()
    assert (
        len(areas) == 90 * crops_per_image
        and 0.7 < np.count_nonzero(areas) / len(areas) < 0.9
        and np.mean(areas) > 0.2
    )


@pytest.mark.parametrize("crops_per_image", [1, 2])
def test_by_area_every_number_of_processes_sees_the_same_global_batches(
    photos, recipe, store_path, crops_per_image
):
    source = stored_labels(LabelStore.open(store_path), 2)
    targets = make_targets(changed(recipe, train={"hard_weight": 0.5}), source)
    how = {"sizes": [32], "batch_size": 30, "crops_per_image": crops_per_image, "mix": CutMix()}

    def seen(batch: Batch) -> Iterator[torch.Tensor]:
        goal = targets(batch)
        for column in (batch.pixels[32], goal.soft, goal.hard, batch.mixed.area):
            yield column.unflatten(0, (crops_per_image, len(batch.rows)))  # by crop, then image

    alone = batches(source, photos / "train", 1, **how)
    for world in (2, 3):
        ranks = [
            batches(source, photos / "train", 1, rank=rank, world=world, **how)
            for rank in range(world)
        ]
        for whole, *parts in zip(alone, *ranks, strict=True):
            assert np.array_equal(whole.rows, np.concatenate([part.rows for part in parts]))
            for wanted, *got in zip(seen(whole), *map(seen, parts), strict=True):
                assert torch.equal(wanted, torch.cat(got, dim=1))


def test_by_area_a_process_decodes_no_neighbour_that_it_does_not_paste(photos):
    source, mix = drawn(photos, CropPolicy()), CutMix(prob=0.5)
    # Two processes have 15 each of a batch of 30, so the pair in the middle is parted.
    parts = [
        asked_for(source, photos / "train", 0, 30, mix=mix, rank=rank, world=2) for rank in (0, 1)
    ]
    shown = batches(source, photos / "train", 0, sizes=[32], batch_size=30)
    more = []
    for batch, *asked in zip(shown, *parts, strict=True):
        box = cutmix.boxes(mix, 5, philox.identities(source.images.path[batch.rows]), 0)
        for mine, other, rows in zip((14, 15), (15, 14), asked, strict=True):
            needed = batch.rows[:15] if mine == 14 else batch.rows[15:]
            more.append(bool(box[mine].any()))
            assert rows.tolist() == needed.tolist() + batch.rows[[other] * more[-1]].tolist()
    assert 0 < sum(more) < 6


def test_by_area_an_epoch_draws_anew_even_where_it_replays_a_view(photos, store_path):
    source = stored_labels(LabelStore.open(store_path), 2)
    first, later = (
        {
            row: a
            for batch in batches(source, photos / "train", epoch, sizes=[32], mix=CutMix())
            for row, a in zip(batch.rows, batch.mixed.area, strict=True)
        }
        for epoch in (0, 2)
    )
    assert sum(first[row] == later[row] for row in first) < 10


def test_by_area_training_mixes_what_the_student_is_trained_on(
    photos, recipe, store_path, tmp_path
):
    one = changed(recipe, train={"epochs": 1})
    plain = train(one, photos, tmp_path / "plain", store=store_path, device=CPU)
    mixed = train(
        changed(one, train={"cutmix": {}}), photos, tmp_path / "mixed", store=store_path, device=CPU
    )
    assert plain["loss"] != mixed["loss"] and plain["images"] == mixed["images"]


# ---- refusals and messages


def test_a_recipe_without_cutmix_replays_the_mix_of_a_store_and_says_so(
    stores, data, mixing, tmp_path, capsys
):
    silent = changed(mixing, crops={"cutmix": None})
    # The recipe's file doesn't name CutMix.
    silent = silent.model_copy(update={"crops": CropPolicy(views=2)})
    ours = train(silent, data, tmp_path / "silent", store=stores[1.0], device=CPU)
    assert "CutMix, its label as the teachers saw it" in capsys.readouterr().err
    theirs = train(mixing, data, tmp_path / "told", store=stores[1.0], device=CPU)
    assert ours["loss"] == theirs["loss"]
    filled, source, _ = choose_source(silent, DataSet.find(data, "train"), stores[1.0], Execution())
    assert filled.crops.cutmix == source.policy.cutmix == CutMix()


def refused(
    kind: type[Exception], says: str, function: object, *arguments: object, **options: object
) -> None:
    with pytest.raises(kind, match=says) as refusal:
        function(*arguments, **options)
    assert "\n" not in str(refusal.value)


def test_training_with_a_mix_that_the_store_has_not_is_refused(
    photos, data, recipe, mixing, stores, store_path, tmp_path
):
    out = tmp_path / "run"
    asks = changed(recipe, crops={"cutmix": {}})
    says = (
        r"crops.cutmix is .*, .* was made with null; "
        r"set it so, leave it out, or generate another store"
    )
    refused(ConfigError, says, train, asks, photos, out, store=store_path, device=CPU)
    other = changed(mixing, crops={"cutmix": {"beta": 0.3}})
    refused(
        ConfigError,
        r"crops.cutmix is .*0.3}, .* was made with .*1.0}; set it so",
        train,
        other,
        data,
        out,
        store=stores[1.0],
        device=CPU,
    )
    none = changed(mixing, crops={"cutmix": None})
    refused(
        ConfigError,
        r"crops.cutmix is null, .* was made with .*beta",
        train,
        none,
        data,
        out,
        store=stores[1.0],
        device=CPU,
    )
    assert not out.exists()


def test_mixing_twice_is_refused(data, mixing, stores, tmp_path):
    twice = mixing.model_copy(
        update={
            "crops": CropPolicy(views=2),
            "train": mixing.train.model_copy(update={"cutmix": CutMix()}),
        }
    )
    says = (
        r"train.cutmix would mix the pictures of .*1.0.zarr again, which its teachers saw "
        r"mixed; set train.cutmix=null"
    )
    refused(ConfigError, says, train, twice, data, tmp_path / "run", store=stores[1.0], device=CPU)
    both = {"crops": {"cutmix": {}}, "train": {"cutmix": {}}}
    refused(
        ConfigError,
        r"crops.cutmix and train.cutmix would mix every picture twice; set one of them to null",
        config_file.validate,
        both,
        "test",
    )


def test_labels_with_and_without_cutmix_do_not_go_into_one_store(
    photos, data, recipe, mixing, stores, store_path, tmp_path
):
    asks = changed(recipe, crops={"cutmix": {}})
    repair = "use the same crops section, or generate a new store"
    refused(
        StoreError,
        rf"was made with crops.cutmix None, this is .*prob.*; {repair}",
        generate,
        asks,
        photos,
        store_path,
        device=CPU,
    )
    before = tree(stores[1.0])
    none = changed(mixing, crops={"cutmix": None})
    refused(
        StoreError,
        rf"was made with crops.cutmix .*prob.*, this is None; {repair}",
        generate,
        none,
        data,
        stores[1.0],
        device=CPU,
    )
    other = changed(mixing, crops={"cutmix": {"beta": 0.3}})
    refused(
        StoreError,
        rf"crops.cutmix.beta 1.0, this is 0.3; {repair}",
        generate,
        other,
        data,
        stores[1.0],
        device=CPU,
    )
    assert tree(stores[1.0]) == before


@pytest.mark.parametrize("values", [{"prob": 0}, {"prob": 1.5}, {"beta": 0}, {"alpha": 1}])
def test_a_mix_that_makes_no_sense_is_refused(values):
    refused(
        ConfigError,
        rf"crops.cutmix.{next(iter(values))} ",
        config_file.validate,
        {"crops": {"cutmix": values}},
        "test",
    )


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_the_order_stays_random_with_unmixed_crops_among_the_mixed(share):
    rng = np.random.default_rng(0)
    rows = rng.permutation(4096)
    partner = np.full(4096, -1)
    pairs = rng.permutation(4096).reshape(-1, 2)
    partner[pairs[:, 0]], partner[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    partner[rng.random(4096) >= share] = -1
    order = side_by_side(rows, partner[rows])
    assert np.array_equal(np.sort(order), np.arange(4096))
    mixed = (partner[rows][order] >= 0).reshape(16, -1).mean(axis=1)
    assert np.abs(mixed - share).max() < 0.15  # in every sixteenth of the window
    two = rows[order].reshape(-1, 2)
    asked = (partner[two] >= 0).any(axis=1)
    assert (
        (np.sort(two[asked], axis=1)[:, None] == np.sort(pairs, axis=1)[None])
        .all(axis=2)
        .any(axis=1)
        .all()
    )


def test_a_shard_of_one_row_can_not_be_mixed(photos, mixing, tmp_path):
    alone = changed(mixing, store={"shard_rows": 1})
    refused(
        ConfigError,
        "store.shard_rows is 1; leave it out, or set it to 2 or more",
        generate,
        alone,
        photos,
        tmp_path / "s.zarr",
        device=CPU,
    )
