"""Stores of the same crops become one store: shards labelled apart are joined, labels
of different teachers are averaged, and other stores are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.small import CPU, changed, tree, write_teacher
from support.stages import generate, recheck, store_facts

from cache import LabelStore, StoreError
from cache.format.codec import CODECS, divergence
from cache.format.codec_bounds import max_error
from cache.merge import merge
from cache.verify import verify
from pipeline.config import Config, ConfigError
from pipeline.runtime.precision import ROUNDING


def merged(*paths: Path, out: Path, **options: object) -> LabelStore:
    return merge(paths, out, say=lambda line: None, progress=lambda shards: None, **options)


def taught_by(recipe: Config, *places: int, **sections: dict) -> Config:
    return changed(recipe, **sections).model_copy(
        update={"teachers": tuple(recipe.teachers[i] for i in places)}
    )


@pytest.fixture(scope="module")
def apart(
    photos: Path, recipe: Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Path]]:
    """For each codec, three stores: of the first teacher, of the second, of both."""
    folder = tmp_path_factory.mktemp("apart")
    made: dict[str, list[Path]] = {}
    for codec in ("float32", "pow8"):
        made[codec] = []
        for name, teachers in (("a", (0,)), ("b", (1,)), ("both", (0, 1))):
            path = folder / f"{codec}-{name}.zarr"
            generate(taught_by(recipe, *teachers, store={"codec": codec}), photos, path, device=CPU)
            made[codec].append(path)
    return made


@pytest.mark.parametrize("codec", ["float32", "pow8"])
def test_averaged_labels_are_those_of_all_teachers_at_once(apart, tmp_path, codec):
    one, other, both = apart[codec]
    store, wanted = merged(one, other, out=tmp_path / "m.zarr"), LabelStore.open(both)
    assert store.progress() == wanted.progress() == (6, 6)
    assert [t["model"] for t in store.provenance["teachers"]] == [
        t["model"] for t in wanted.provenance["teachers"]
    ]
    # the codec's error three times: in the parts, in the average, in the wanted labels
    most = 3 * max_error(store.codec, 3)[1]
    for view in (0, 1):
        _, tv = divergence(
            wanted.probabilities(view, slice(None)), store.probabilities(view, slice(None))
        )
        assert tv.max() <= (1e-6 if codec == "float32" else most)
        assert all(
            map(np.array_equal, store.crops(view, slice(None)), wanted.crops(view, slice(None)))
        )
    assert verify(tmp_path / "m.zarr").sound


def test_each_teacher_counts_once(apart, photos, recipe, tmp_path, teachers):
    """Of a store of two teachers and a store of one, each teacher counts a third."""
    from support.small import write_teacher

    third = {
        "model": "test_vit",
        "checkpoint": str(write_teacher(tmp_path / "c.safetensors", "test_vit", 5, img_size=48)),
        "image_size": 48,
    }
    alone = Config.model_validate(
        changed(recipe, store={"codec": "float32"}).model_dump(mode="json", exclude_unset=True)
        | {"teachers": [third]}
    )
    generate(alone, photos, tmp_path / "c.zarr", device=CPU)
    store = merged(apart["float32"][2], tmp_path / "c.zarr", out=tmp_path / "m.zarr")
    pair, single = (
        LabelStore.open(path).probabilities(0, slice(None))
        for path in (apart["float32"][2], tmp_path / "c.zarr")
    )
    assert np.abs(store.probabilities(0, slice(None)) - (2 * pair + single) / 3).max() < 1e-6
    assert divergence(pair, single)[1].max() > 0.05  # a wrong weight would show
    # A store that is an average already counts as all of its teachers.
    step = merged(*apart["float32"][:2], out=tmp_path / "ab.zarr")
    again = merged(step.path, tmp_path / "c.zarr", out=tmp_path / "abc.zarr")
    assert (
        np.abs(again.probabilities(1, slice(None)) - store.probabilities(1, slice(None))).max()
        < 1e-6
    )


def test_an_averaged_store_may_have_another_codec(apart, tmp_path):
    fine = merged(*apart["float32"][:2], out=tmp_path / "fine.zarr")
    coarse = merged(*apart["float32"][:2], out=tmp_path / "coarse.zarr", codec=CODECS["sqrt8"])
    kl, _ = divergence(fine.probabilities(0, slice(None)), coarse.probabilities(0, slice(None)))
    assert coarse.codec == CODECS["sqrt8"] and 0 < kl.max() <= max_error(CODECS["sqrt8"], 3)[0]


def test_an_averaged_store_is_trained_from_verified_and_extended_like_any(
    apart, photos, recipe, tmp_path
):
    merged(*apart["pow8"][:2], out=tmp_path / "m.zarr")
    specs = list(recipe.teachers)
    result = recheck(tmp_path / "m.zarr", photos / "train", specs, 40, device=CPU)
    assert result["trusted"] and result["sample"]["kl_stated"] is None
    store = generate(changed(recipe, crops={"views": 3}), photos, tmp_path / "m.zarr", device=CPU)
    assert store.progress() == (9, 9)
    assert recheck(tmp_path / "m.zarr", photos / "train", specs, 100, device=CPU)["trusted"]


def test_views_that_were_labelled_apart_are_joined_to_the_store_of_one_run(
    photos, recipe, tmp_path
):
    four = changed(recipe, crops={"views": 4})
    generate(four, photos, tmp_path / "whole.zarr", device=CPU)
    generate(recipe, photos, tmp_path / "early.zarr", device=CPU)
    late = generate(four, photos, tmp_path / "late.zarr", device=CPU, first_view=2)
    assert late.finished().any(axis=1).tolist() == [False, False, True, True]
    store = merged(tmp_path / "early.zarr", tmp_path / "late.zarr", out=tmp_path / "m.zarr")
    assert store.progress() == (12, 12)
    assert tree(tmp_path / "m.zarr") == tree(tmp_path / "whole.zarr")


def test_shares_of_workers_without_a_common_disk_are_joined(photos, recipe, store_path, tmp_path):
    generate(recipe, photos, tmp_path / "0.zarr", device=CPU, worker=(0, 3))
    shutil.copytree(
        tmp_path / "0.zarr",
        tmp_path / "empty.zarr",
        ignore=lambda place, names: ["c"] if Path(place).name in ("labels", "records") else [],
    )
    for i in (1, 2):
        shutil.copytree(tmp_path / "empty.zarr", tmp_path / f"{i}.zarr")
        generate(recipe, photos, tmp_path / f"{i}.zarr", device=CPU, worker=(i, 3))
    merged(*(tmp_path / f"{i}.zarr" for i in range(2)), out=tmp_path / "m.zarr")
    done, of = LabelStore.open(tmp_path / "m.zarr").progress()
    assert 0 < done < of
    # The third store arrives later.
    merged(*(tmp_path / f"{i}.zarr" for i in range(3)), out=tmp_path / "m.zarr")
    assert tree(tmp_path / "m.zarr") == tree(store_path)


def test_a_damaged_shard_is_taken_from_the_other_store(store_path, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(store_path, tmp_path / name)
        file = LabelStore.open(tmp_path / name).file("labels", 0, {"a": 0, "b": 1}[name])
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    merged(tmp_path / "a", tmp_path / "b", out=tmp_path / "m.zarr")
    assert tree(tmp_path / "m.zarr") == tree(store_path)


def test_a_damaged_shard_is_never_averaged(apart, tmp_path):
    broken = Path(shutil.copytree(apart["pow8"][1], tmp_path / "b.zarr"))
    file = LabelStore.open(broken).file("labels", 1, 1)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(
        StoreError,
        match="1 shards could not be merged, being damaged, "
        "the first is view 1, rows 32 to 63 of .*b.zarr: ",
    ):
        merged(apart["pow8"][0], broken, out=tmp_path / "m.zarr")
    assert LabelStore.open(tmp_path / "m.zarr").progress() == (5, 6)  # the other shards were merged
    shutil.copy(LabelStore.open(apart["pow8"][1]).file("labels", 1, 1), file)
    merged(apart["pow8"][0], broken, out=tmp_path / "m.zarr")
    merged(*apart["pow8"][:2], out=tmp_path / "whole.zarr")
    assert tree(tmp_path / "m.zarr") == tree(tmp_path / "whole.zarr")


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"crops": {"seed": 1}}, "crops.seed is 0 in one and 1 in the other"),
        ({"crops": {"scale": [0.2, 1.0]}}, "crops.scale.0 is 0.08 in one and 0.2"),
        (
            {"crops": {"interpolation": "bicubic"}},
            "crops.interpolation is bilinear in one and bicubic",
        ),
        ({"crops": {"cutmix": {"prob": 1.0}}}, "crops.cutmix is None in one"),
    ],
)
def test_other_crops_are_refused(apart, photos, recipe, tmp_path, sections, says):
    generate(taught_by(recipe, 1, **sections), photos, tmp_path / "x.zarr", device=CPU)
    with pytest.raises(StoreError, match=says) as refusal:
        merged(apart["pow8"][0], tmp_path / "x.zarr", out=tmp_path / "m.zarr")
    assert "\n" not in str(refusal.value) and not (tmp_path / "m.zarr").exists()


def test_other_images_are_refused(apart, photos, recipe, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "data")
    (tmp_path / "data/ant/000.jpg").unlink()
    generate(taught_by(recipe, 1), tmp_path / "data", tmp_path / "x.zarr", device=CPU)
    with pytest.raises(StoreError, match=r"data.images is 90 in one and 89 in the other"):
        merged(apart["pow8"][0], tmp_path / "x.zarr", out=tmp_path / "m.zarr")


def test_a_teacher_never_counts_twice(apart, tmp_path):
    one, _, both = apart["pow8"]
    with pytest.raises(
        StoreError,
        match="both have labels of test_resnet, which would count twice; "
        "leave one of them out .* differ in teachers",
    ):
        merged(one, both, out=tmp_path / "m.zarr")


def test_stores_of_one_teacher_that_differ_in_more_than_shards_are_refused_with_the_difference(
    apart, photos, recipe, tmp_path
):
    generate(taught_by(recipe, 0, store={"batch_size": 7}), photos, tmp_path / "x.zarr", device=CPU)
    with pytest.raises(
        StoreError,
        match=r"can't be joined either, since they differ in compute.batch_size: \d+ and 7",
    ):
        merged(apart["pow8"][0], tmp_path / "x.zarr", out=tmp_path / "m.zarr")


def test_a_teachers_tag_that_was_named_once_is_no_difference(photos, recipe, tmp_path):
    """Teachers are compared by their weights, as in a run that continues a store."""
    four = changed(recipe, crops={"views": 4})
    tagged = [
        t.model_copy(update={"model": f"{t.model}.r160_in1k"}) if t.model == "test_resnet" else t
        for t in recipe.teachers
    ]
    generate(recipe, photos, tmp_path / "early.zarr", device=CPU)
    generate(
        four.model_copy(update={"teachers": tuple(tagged)}),
        photos,
        tmp_path / "late.zarr",
        device=CPU,
        first_view=2,
    )
    one, other = (LabelStore.open(tmp_path / name) for name in ("early.zarr", "late.zarr"))
    assert one.identity != other.identity
    # The second merge continues the store of the first.
    for paths in ((one.path, other.path), (other.path, one.path)):
        store = merged(*paths, out=tmp_path / "m.zarr")
        assert store.progress() == (12, 12) and verify(tmp_path / "m.zarr").sound
    assert np.array_equal(store.codes(0, slice(None)), one.codes(0, slice(None)))
    assert np.array_equal(store.codes(3, slice(None)), other.codes(3, slice(None)))


def test_an_average_of_averages_is_trusted_within_what_all_of_them_lost(photos, recipe, tmp_path):
    third = tmp_path / "third.safetensors"
    write_teacher(third, "test_resnet", 7)
    teachers = [*recipe.teachers, recipe.teachers[0].model_copy(update={"checkpoint": str(third)})]
    for name, teacher, codec in zip("abc", teachers, ("tail40", "tail40", "float32"), strict=True):
        alone = changed(recipe, store={"codec": codec}).model_copy(update={"teachers": (teacher,)})
        generate(alone, photos, tmp_path / name, device=CPU)
    merged(tmp_path / "a", tmp_path / "b", out=tmp_path / "ab", codec=CODECS["float32"])
    store = merged(tmp_path / "ab", tmp_path / "c", out=tmp_path / "abc")
    result = recheck(tmp_path / "abc", photos / "train", teachers, 100, device=CPU)
    coarse, fine = (max_error(CODECS[name], 3)[1] for name in ("tail40", "float32"))
    assert result["trusted"], result["problems"]
    assert (
        1e-3
        < result["sample"]["tv_largest"]
        < store.max_error[1]
        == pytest.approx(2 / 3 * (coarse + fine) + 1 / 3 * fine + fine)
    )
    facts = store_facts(tmp_path / "abc")
    assert (
        facts["codec"]["largest_kl"] is None
        and facts["codec"]["largest_tv"] == store.max_error[1]
        and len(facts["merged"]) == 2
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_stores_of_other_precision_average_into_one_that_is_trusted(
    photos, recipe, tmp_path, order
):
    for i, precision in enumerate(("float32", "bfloat16")):
        generate(
            taught_by(recipe, i, store={"codec": "float32", "precision": precision}),
            photos,
            tmp_path / str(i),
            device=CPU,
        )
    merged(*(tmp_path / str(i) for i in order), out=tmp_path / "m.zarr")
    result = recheck(
        tmp_path / "m.zarr", photos / "train", [recipe.teachers[i] for i in order], 100, device=CPU
    )
    assert result["trusted"], result["problems"]
    full, half = ROUNDING["float32"], ROUNDING["bfloat16"]
    now = (full, half)[order[0]]  # all labels are computed again in the first store's precision
    allowed = sum(then if then == now else then + now for then in (full, half)) / 2
    assert result["sample"]["allowed"] == pytest.approx(allowed, abs=1e-3)


def test_merging_again_makes_what_is_damaged_anew(apart, tmp_path):
    store = merged(*apart["pow8"][:2], out=tmp_path / "m.zarr")
    whole, said = tree(store.path), []
    for damage in (
        store.file("labels", 1, 0),
        store.path / "labels/zarr.json",
        store.path / "zarr.json",
        store.path / "images/path/c/0",
    ):
        content = bytearray(damage.read_bytes())
        content[len(content) // 2] ^= 4
        damage.write_bytes(content)
        assert not verify(store.path).sound
        merge(apart["pow8"][:2], store.path, say=said.append, progress=lambda shards: None)
        assert tree(store.path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.zarr"]
    assert any("view 1, rows 0 to 31: damaged, and will be made anew" in line for line in said)
    assert any("made labels/zarr.json of" in line for line in said)


def test_a_shard_that_is_damaged_in_every_store_is_named(store_path, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(store_path, tmp_path / name)
        file = LabelStore.open(tmp_path / name).file("labels", 0, 1)
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(
        StoreError,
        match="1 shards could not be merged, being damaged, the first is view 0, rows 32 to 63 of "
        ".*/a: .*mend that store",
    ):
        merged(tmp_path / "a", tmp_path / "b", out=tmp_path / "m.zarr")
    assert LabelStore.open(tmp_path / "m.zarr").progress() == (5, 6)


@pytest.mark.parametrize("way", ["joined", "averaged"])
def test_a_damaged_record_is_no_label_that_is_yet_to_come(apart, store_path, tmp_path, way):
    whole, other = (store_path, store_path) if way == "joined" else apart["pow8"][:2]
    broken = Path(shutil.copytree(whole, tmp_path / "a"))
    rest = Path(
        shutil.copytree(
            other,
            tmp_path / "b",
            ignore=lambda place, names: (
                ["records"] if way == "joined" and Path(place).name == "b" else []
            ),
        )
    )
    shutil.copytree(other / "records", rest / "records", dirs_exist_ok=True)
    if way == "joined":
        shutil.rmtree(rest / "records/c/1/2")
    file = broken / "records/c/1/2/0"
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        StoreError,
        match="1 shards could not be merged, being damaged, the first is view 1, rows 64 to 89 of "
        ".*/a: its completion record",
    ):
        merged(broken, rest, out=tmp_path / "m.zarr")


def test_views_that_are_left_out_are_said(apart, photos, recipe, tmp_path):
    generate(taught_by(recipe, 1, crops={"views": 3}), photos, tmp_path / "three.zarr", device=CPU)
    said = []
    store = merge(
        (apart["pow8"][0], tmp_path / "three.zarr"),
        tmp_path / "m.zarr",
        say=said.append,
        progress=lambda shards: None,
    )
    assert (
        store.views == 2
        and said[0] == "views 2 to 2 are not in all of the stores, and are left out"
    )


def test_a_result_of_other_stores_is_not_gone_on_with(apart, tmp_path):
    merged(*apart["pow8"][:2], out=tmp_path / "m.zarr")
    before = tree(tmp_path / "m.zarr")
    with pytest.raises(StoreError, match="is there already and was made from other stores"):
        merged(*apart["float32"][:2], out=tmp_path / "m.zarr")
    with pytest.raises(StoreError, match="is one of the stores to merge"):
        merged(*apart["pow8"][:2], out=apart["pow8"][0])
    assert tree(tmp_path / "m.zarr") == before


def test_no_view_is_left_by_first_view(photos, recipe, tmp_path):
    with pytest.raises(ConfigError, match="--first-view 2 leaves nothing of 2 views"):
        generate(recipe, photos, tmp_path / "s.zarr", device=CPU, first_view=2)
