"""Bit rot and meddling: any change to any file of a store is found, named and never
believed, and stage one alone makes the file anew."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.small import CPU, changed, edit_store, tree
from support.stages import generate
from support.stores import write

from cache import LabelStore, StoreError, repair
from cache.errors import DamagedStore
from cache.format import seal
from cache.format.schema import UNMIXED
from cache.verify import Verdict, verify
from cache.writer import StoreWriter
from pipeline.sampling.crop_sampler import CropSampler

PER_SHARD = ("labels", "boxes", "flips", "records")


def flip(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "a flipped bit": lambda file, dice: file.write_bytes(
        flip(file.read_bytes(), dice.randrange(8 * file.stat().st_size))
    ),
    "cut short": lambda file, dice: file.write_bytes(
        file.read_bytes()[: dice.randrange(1, file.stat().st_size)]
    ),
    "longer": lambda file, dice: file.write_bytes(file.read_bytes() + b"\0"),
    "empty": lambda file, dice: file.write_bytes(b""),
    "missing": lambda file, dice: file.unlink(),
    "noise": lambda file, dice: file.write_bytes(dice.randbytes(file.stat().st_size)),
}


def place_of(file: str) -> tuple[int, int] | None:
    """Return (view, shard) of a shard's file, or None for any other file."""
    name, *rest = file.split("/")
    return (int(rest[1]), int(rest[2])) if name in PER_SHARD and rest[0] == "c" else None


def everything(path: Path) -> list[np.ndarray]:
    """Read all that a student would be trained on."""
    store = LabelStore.open(path)
    content = [
        np.asarray(getattr(store.images, name)) for name in store.images.__dataclass_fields__
    ]
    for view in range(store.views):
        store.require_finished(view)
        content += [store.codes(view, slice(None)), *store.crops(view, slice(None))]
    return content


def found(verdict: Verdict, file: str, path: Path) -> None:
    """Require that the verdict names this file's place and no other."""
    place = place_of(file)
    findings = verdict.damaged + verdict.missing
    assert findings, f"{file} of {path} is damaged and verify says nothing"
    if place is None:
        assert [finding.view for finding in findings] == [None]
        assert file in str(findings[0]) or (
            file.startswith("images/") and "images/" in str(findings[0])
        ), str(findings[0])
    else:
        rows = LabelStore.open(path).shard_slice(place[1])
        assert [(f.view, f.shard, f.first_row, f.last_row) for f in findings] == [
            (*place, rows.start, rows.stop - 1)
        ]
    assert all("\n" not in str(finding) for finding in findings)


def never_believed(path: Path, truth: list[np.ndarray]) -> None:
    try:
        read = everything(path)
    except StoreError as refusal:
        assert "\n" not in str(refusal)
    else:
        pytest.fail(
            f"{path} was read, "
            f"{'rightly' if all(map(np.array_equal, read, truth)) else 'and wrongly'}"
        )


@pytest.fixture(scope="module")
def truth(store_path: Path) -> list[np.ndarray]:
    return everything(store_path)


@pytest.fixture
def copy(store_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store_path, tmp_path / "s.zarr"))


def test_a_sound_store_is_found_sound(store_path, recipe):
    read = []
    verdict = verify(store_path, threads=2, progress=read.append)
    assert (
        verdict.sound
        and verdict.complete
        and (verdict.shards, verdict.checked, sum(read)) == (6, 6, 6)
    )
    assert verdict.labelled == 180 and not verdict.foreign and not verdict.left


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_named_and_never_believed(copy, truth, damage):
    dice = random.Random(damage)
    for file, content in tree(copy).items():
        DAMAGES[damage](copy / file, dice)
        found(verify(copy), file, copy)
        never_believed(copy, truth)
        (copy / file).write_bytes(content)
    assert verify(copy).sound


def test_a_flipped_bit_anywhere_is_found(copy, truth):
    dice = random.Random(0)
    files = tree(copy)
    for _ in range(250):  # each file is equally likely, and each bit in a file
        file = dice.choice(sorted(files))
        (copy / file).write_bytes(flip(files[file], dice.randrange(8 * len(files[file]))))
        found(verify(copy), file, copy)
        never_believed(copy, truth)
        (copy / file).write_bytes(files[file])


def test_every_bit_of_a_stores_own_description_counts(copy):
    """zarr.json is text without a checksum of its own, and some flips leave it
    well-formed."""
    for file in ("zarr.json", "labels/zarr.json", "records/zarr.json", "images/path/zarr.json"):
        content = (copy / file).read_bytes()
        for bit in range(0, 8 * len(content), 1 if len(content) < 1000 else 7):
            (copy / file).write_bytes(flip(content, bit))
            try:
                store = LabelStore.open(copy)
            except StoreError:
                continue
            # 1.3333333333333333 may end in 2 and be the same number.
            if json.loads((copy / file).read_bytes()) != json.loads(content):
                # Only the length of the view axis may differ, if no view is missing.
                assert store.array(file.split("/")[0]).shape[0] > 2
                assert verify(copy).damaged[0].file == file
        (copy / file).write_bytes(content)


@pytest.mark.parametrize("name", PER_SHARD)
@pytest.mark.parametrize("other", [(0, 1), (1, 0)], ids=["of another place", "of another view"])
def test_files_that_changed_places_are_found(copy, truth, name, other):
    store = LabelStore.open(copy)
    here, there = store.file(name, 0, 0), store.file(name, *other)
    content = here.read_bytes()
    shutil.copy(there, here)
    there.write_bytes(content)
    assert [(f.view, f.shard) for f in verify(copy).damaged] == sorted([(0, 0), other])
    never_believed(copy, truth)


def test_whole_shards_that_changed_places_are_found(copy, truth):
    store = LabelStore.open(copy)
    for name in PER_SHARD:
        here, there = store.file(name, 0, 1), store.file(name, 1, 0)
        content = here.read_bytes()
        shutil.copy(there, here)
        there.write_bytes(content)
    assert [(f.view, f.shard) for f in verify(copy).damaged] == [(0, 1), (1, 0)]
    never_believed(copy, truth)


def test_a_shard_of_another_store_is_found(copy, truth, photos, recipe, tmp_path):
    other = generate(
        changed(recipe, crops={"seed": 1, "views": 1}), photos, tmp_path / "other.zarr", device=CPU
    )
    for name in PER_SHARD:
        shutil.copy(other.file(name, 0, 2), LabelStore.open(copy).file(name, 0, 2))
    assert [(f.view, f.shard) for f in verify(copy).damaged] == [(0, 2)]
    never_believed(copy, truth)


def test_foreign_files_are_named_and_unfinished_ones_told_apart(copy):
    (copy / "labels/c/0/7").mkdir()
    strangers = ["labels/c/0/7/x", "notes.txt", "images/path/c/9", "labels/c/5"]
    for name in strangers:
        (copy / name).write_text("?")
    (copy / "labels/c/0/0/0.abc.partial").write_text("?")
    verdict = verify(copy)
    assert not verdict.sound and verdict.complete
    assert verdict.foreign == sorted(strangers) and verdict.left == ["labels/c/0/0/0.abc.partial"]


def test_labels_that_were_never_any_are_found_though_every_digest_is_right(copy):
    """The store comes from a wrong program: sealed and recorded, but nonsense."""
    writer = StoreWriter(copy)
    store = writer.store
    codes, (boxes, flips) = store.content(0, 0)[0].codes, store.content(0, 0)[0].crops.arrays()
    for what, codes_, boxes_ in (
        ("does not sum to one", np.full_like(codes, 255), boxes),
        ("is not inside its image", codes, boxes + np.array([0, 0, 10_000, 0], np.int32)),
        ("is not inside its image", codes, boxes - np.array([1000, 0, 0, 0], np.int32)),
    ):
        write(writer, 0, 0, codes_, boxes_, flips)
        (finding,) = verify(copy).damaged
        assert (finding.view, finding.shard) == (0, 0) and what in finding.what


def test_an_unfinished_store_is_sound_and_not_complete(photos, recipe, tmp_path):
    generate(recipe, photos, tmp_path / "s.zarr", device=CPU, worker=(0, 2))
    verdict = verify(tmp_path / "s.zarr")
    assert verdict.sound and not verdict.complete
    assert len(verdict.missing) + verdict.checked == 6


# ---- making anew


def untouched(path: Path, but: set[tuple[int, int]]) -> dict[str, int]:
    """Return the modification times of all shards' files but those of ``but``."""
    return {
        f: os.stat(path / f).st_mtime_ns
        for f in tree(path)
        if (place := place_of(f)) and place not in but
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_generate_labels_makes_exactly_the_damaged_shards_anew(
    photos, recipe, store_path, copy, damage, capsys
):
    dice = random.Random(damage)
    hurt = dict(zip([(0, 0), (0, 2), (1, 1), (1, 2)], PER_SHARD, strict=True))
    for place, name in hurt.items():
        DAMAGES[damage](LabelStore.open(copy).file(name, *place), dice)
    rest = untouched(copy, set(hurt))
    generate(recipe, photos, copy, device=CPU)
    assert tree(copy) == tree(store_path)
    assert {file: os.stat(copy / file).st_mtime_ns for file in rest} == rest


def test_shards_that_changed_places_are_made_anew(photos, recipe, store_path, copy, capsys):
    store = LabelStore.open(copy)
    a, b = store.file("labels", 0, 1), store.file("labels", 1, 1)
    content = a.read_bytes()
    shutil.copy(b, a)
    b.write_bytes(content)
    rest = untouched(copy, {(0, 1), (1, 1)})
    generate(recipe, photos, copy, device=CPU)
    assert tree(copy) == tree(store_path)
    assert {file: os.stat(copy / file).st_mtime_ns for file in rest} == rest


def test_each_worker_makes_its_own_share_anew(photos, recipe, store_path, copy):
    for place in ((0, 0), (0, 1), (0, 2)):
        file = LabelStore.open(copy).file("labels", *place)
        file.write_bytes(flip(file.read_bytes(), 99))
    generate(recipe, photos, copy, device=CPU, worker=(0, 2))
    assert 0 < len(verify(copy).damaged) < 3
    generate(recipe, photos, copy, device=CPU, worker=(1, 2))
    assert tree(copy) == tree(store_path)


def test_unchecked_only_lost_files_are_noticed(photos, recipe, copy):
    """check=False is for a worker that is stopped every hour. Training and verify still
    compare digests."""
    file = LabelStore.open(copy).file("labels", 0, 0)
    file.write_bytes(flip(file.read_bytes(), 99))
    generate(recipe, photos, copy, device=CPU, check=False)
    assert [(f.view, f.shard) for f in verify(copy).damaged] == [(0, 0)]


def empty_copy(path: Path, fresh: Path) -> Path:
    """Copy a store without any label, as creation makes it."""
    return Path(
        shutil.copytree(
            path,
            fresh,
            ignore=lambda folder, names: ["c"] if Path(folder).name in PER_SHARD else [],
        )
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_of_a_stores_description_is_made_anew(store_path, copy, tmp_path, damage):
    dice = random.Random(damage)
    fresh = empty_copy(store_path, tmp_path / "fresh.zarr")
    wanted = tree(store_path)
    for file in wanted:
        if place_of(file) is None:
            DAMAGES[damage](copy / file, dice)
            with pytest.raises(DamagedStore):
                _ = LabelStore.open(copy).images
            assert repair.mend(copy, fresh) == [file]
            assert tree(copy) == wanted
    assert tree(fresh) == tree(empty_copy(store_path, tmp_path / "again.zarr"))


def test_generate_labels_makes_a_damaged_description_anew_and_no_label(
    photos, recipe, store_path, copy, capsys
):
    for files in (
        ["zarr.json"],
        ["labels/zarr.json", "images/zarr.json", "images/digest/c/0/0", "images/path/c/0"],
        ["records/zarr.json", "zarr.json"],
    ):
        for file in files:
            (copy / file).write_bytes(flip((copy / file).read_bytes(), 333))
        rest = untouched(copy, set())
        generate(recipe, photos, copy, device=CPU)
        assert tree(copy) == tree(store_path)
        assert untouched(copy, set()) == rest
        assert all(f"made {file} of" in capsys.readouterr().err for file in files[:1])
    assert not [name for name in os.listdir(copy.parent) if name != "s.zarr"]


def test_a_description_of_another_recipe_is_not_put_over_these_labels(photos, recipe, copy):
    (copy / "zarr.json").write_bytes(flip((copy / "zarr.json").read_bytes(), 333))
    before = tree(copy)
    with pytest.raises(
        StoreError,
        match="were made from other images, "
        "teachers or another recipe .* run the command that made it",
    ):
        generate(changed(recipe, crops={"seed": 1}), photos, copy, device=CPU)
    assert tree(copy) == before


def test_rows_in_another_order_are_no_rows_of_this_store(
    photos, recipe, store_path, copy, tmp_path
):
    """The manifest of the same images with another seed is sound by its own digest."""
    other = generate(
        changed(recipe, crops={"seed": 1}), photos, tmp_path / "other.zarr", device=CPU
    )
    assert other.provenance["data"] == LabelStore.open(copy).provenance["data"]
    shutil.rmtree(copy / "images")
    shutil.copytree(other.path / "images", copy / "images")
    with pytest.raises(DamagedStore, match="the rows are in another order"):
        LabelStore.open(copy).probabilities(0, [0])
    assert [finding.file for finding in verify(copy).damaged] == ["images/"]
    generate(recipe, photos, copy, device=CPU)
    assert tree(copy) == tree(store_path)


def test_a_description_is_made_anew_as_it_was_though_the_teacher_is_named_otherwise_now(
    photos, recipe, store_path, copy
):
    tagged = [
        t.model_copy(update={"model": f"{t.model}.r160_in1k"}) if t.model == "test_resnet" else t
        for t in recipe.teachers
    ]
    (copy / "labels/zarr.json").unlink()
    generate(recipe.model_copy(update={"teachers": tuple(tagged)}), photos, copy, device=CPU)
    assert tree(copy) == tree(store_path)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_manifest_is_made_anew_in_its_own_order_whatever_the_commands_seed(
    photos, recipe, copy, sealed
):
    """Digests of shards don't cover paths, so a wrong order would give an image the
    labels of another."""
    edit_store(copy, lambda attributes: None if sealed else attributes.pop("row_order"))
    before = tree(copy)
    (copy / "images/width/c/0").write_bytes(b"")
    with pytest.raises(StoreError, match="crops.seed 0, this is 1"):
        generate(changed(recipe, crops={"seed": 1}), photos, copy, device=CPU)
    assert tree(copy) == before


def test_the_description_of_an_older_store_is_made_anew(photos, recipe, copy):
    """An older provenance may have other keys than today's, and the store's digests are
    bound to the provenance as it is."""
    edit_store(copy, lambda attributes: attributes["provenance"].update(extra="of another version"))
    document = json.loads((copy / "zarr.json").read_text())
    writer = StoreWriter(copy)
    for view, shard in np.ndindex(2, 3):  # with digests of the changed provenance
        content, _ = writer.store.content(view, shard)
        writer.write(view, shard, *content)
    for later in ("seal", "views", "row_order"):
        del document["attributes"][later]
    document["attributes"]["format_version"] = 1
    (copy / "zarr.json").write_text(json.dumps(document))
    truth = everything(copy)
    (copy / "images/width/c/0").write_bytes(b"")
    generate(recipe, photos, copy, device=CPU)
    store = LabelStore.open(copy)
    assert (
        store.provenance["extra"] == "of another version"
        and store.progress() == (6, 6)
        and verify(copy).sound
    )
    assert all(map(np.array_equal, everything(copy), truth))


def test_a_damaged_description_of_other_images_is_not_mended(photos, recipe, copy, tmp_path):
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    (data / "train/ant/000.jpg").unlink()
    (copy / "labels/zarr.json").unlink()
    before = tree(copy)
    with pytest.raises(
        StoreError,
        match="s.zarr is damaged, and the images in .* are others than those it was made from",
    ):
        generate(recipe, data, copy, device=CPU)
    assert tree(copy) == before


def test_consolidated_metadata_is_compared_and_taken_away_when_it_is_wrong(
    photos, recipe, store_path, copy
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # consolidation is no part of Zarr's format yet
        zarr.consolidate_metadata(str(copy))
    assert verify(copy).sound
    document = json.loads((copy / "zarr.json").read_text())
    document["consolidated_metadata"]["metadata"]["labels"]["shape"][1] = 64
    (copy / "zarr.json").write_text(json.dumps(document))
    assert ["consolidated metadata" in finding.what for finding in verify(copy).damaged] == [True]
    generate(recipe, photos, copy, device=CPU)
    assert verify(copy).sound and tree(copy) == tree(store_path)


def test_links_to_folders_are_foreign(copy):
    (copy / "elsewhere").symlink_to("/etc")
    assert verify(copy).foreign == ["elsewhere"]


def test_a_store_of_which_nothing_can_be_told_is_not_complete(copy):
    (copy / "zarr.json").write_text("{}")
    verdict = verify(copy)
    assert not verdict.sound and not verdict.complete and verdict.damaged[0].file == "zarr.json"


@pytest.mark.parametrize("length", [1, 130])
def test_a_wrong_number_of_views_in_an_array_is_put_right(photos, recipe, store_path, copy, length):
    document = json.loads((copy / "labels/zarr.json").read_text())
    document["shape"][0] = length
    (copy / "labels/zarr.json").write_text(json.dumps(document, indent=2))
    assert "labels/zarr.json" in str(verify(copy).damaged[0])
    generate(recipe, photos, copy, device=CPU)
    assert tree(copy) == tree(store_path)


# ---- strangers


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "ant/../../x.jpg", "ant/\0.jpg"])
def test_a_path_that_leaves_the_data_folder_is_refused(copy, path):
    store = LabelStore.open(copy)
    store.images.path[3] = path
    group = zarr.open_group(str(copy), mode="r+")
    group["images/path"][:] = store.images.path
    document = json.loads((copy / "zarr.json").read_text())
    document["attributes"]["provenance"]["data"]["manifest"] = store.images.manifest_digest()
    document["attributes"]["row_order"] = store.images.order
    (copy / "zarr.json").write_text(json.dumps(document))
    seal.write_seal(copy, seal.read_metadata(copy, UNMIXED))
    with pytest.raises(StoreError, match="names an image outside the data folder"):
        _ = LabelStore.open(copy).images


@pytest.mark.parametrize(
    ("codec", "place", "bad"),
    [
        ("float32", 1, np.nan),
        ("float16", 1, np.inf),
        ("float32", 1, -3.0),
        ("float32", 1, 4.0),
        ("tail40", -1, 200),
    ],
)
def test_codes_that_a_codec_does_not_have_are_not_trained_from(
    photos, recipe, tmp_path, codec, place, bad
):
    """The store's digests cover these codes, so the digests fit."""
    path = tmp_path / "s.zarr"
    generate(changed(recipe, store={"codec": codec}), photos, path, device=CPU)
    writer = StoreWriter(path)
    codes, *kept = writer.store.content(0, 1)[0]
    codes[:, place] = bad
    with np.errstate(all="ignore"):
        writer.write(0, 1, codes, *kept)
    with pytest.raises(
        StoreError, match=f"view 0, rows 32 to 63 of .*: codes that codec {codec} doesn't have"
    ):
        LabelStore.open(path).codes(0, slice(None))
    assert [(f.view, f.shard) for f in verify(path).damaged] == [(0, 1)]


def test_the_plan_of_crops_is_what_the_store_holds(store_path, recipe):
    """A shard that is made anew must have the same crops."""
    store = LabelStore.open(store_path)
    plan = CropSampler(recipe.crops, store.images, store.shard_rows)
    for view in range(2):
        assert all(
            map(np.array_equal, plan.crops(view, np.arange(90)), store.crops(view, slice(None)))
        )
