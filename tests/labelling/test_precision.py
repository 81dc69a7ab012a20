"""The arithmetic that models run in: a GPU is told the precision that was asked for, a
store records the precision, and verify allows the rounding that it explains. These
tests pretend a GPU on a CPU; test_gpu.py needs one."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from support import stages
from support.small import CPU, changed, edit_store
from support.stages import generate, recheck, train

from cache import LabelStore, StoreError
from cache.errors import DamagedStore
from cache.format import schema
from cache.merge import merge
from pipeline.config import Config, ConfigError
from pipeline.config_file import validate
from pipeline.inspection import relabel
from pipeline.labelling import plan, stream
from pipeline.models import model as model_module
from pipeline.models.model import Model, ensemble
from pipeline.models.weights import load
from pipeline.provenance import description, refusals
from pipeline.render.dali import DECODERS
from pipeline.render.renderer import STEPS
from pipeline.runs.folder import RunError
from pipeline.runtime.device_transfer import Returning
from pipeline.runtime.precision import (
    HALF,
    ROUNDING,
    PrecisionError,
    in_precision,
    require_precision,
    rounding,
)
from pipeline.training import resume

CUDA = torch.device("cuda")


def flags() -> tuple[bool, bool]:
    """Return two switches of a GPU: TF32 in convolutions, TF32 in matrix products."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that claims to have a GPU of this name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


# ---- the settings of a GPU


@pytest.mark.parametrize(
    ("precision", "allowed"), [("float32", False), ("tf32", True), ("bfloat16", False)]
)
def test_a_forward_pass_has_the_arithmetic_that_it_was_asked_for(recipe, precision, allowed):
    seen = []
    model = load(recipe.teachers[0])
    model.module.conv1.register_forward_hook(lambda *_: seen.append(flags()))
    before = flags()
    logits = model(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), precision)
    assert seen == [(allowed, allowed)] and flags() == before and logits.dtype == torch.float32


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_backward_pass_has_the_same(recipe, photos, store_path, tmp_path, monkeypatch, precision):
    seen = []
    real = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor,
        "backward",
        lambda loss: (seen.append((*flags(), torch.backends.cudnn.benchmark)), real(loss)),
    )
    monkeypatch.setattr("pipeline.training.train.require_precision", lambda *_: None)
    train(
        changed(recipe, train={"epochs": 1, "precision": precision}),
        photos,
        tmp_path / "run",
        store=store_path,
        device=CPU,
    )
    tf32 = precision == "tf32"
    assert set(seen) == {(tf32, tf32, True)}  # cuDNN tries algorithms: shapes are fixed
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("precision", "validated"), [("float32", "float32"), ("bfloat16", "tf32")])
def test_a_run_validates_in_float32_or_where_it_is_not_so_exact_in_tf32(
    recipe, photos, store_path, tmp_path, monkeypatch, precision, validated
):
    seen = []
    real = Model.__call__
    monkeypatch.setattr(
        Model,
        "__call__",
        lambda model, pixels, how: (
            seen.append((model.module.training, how)),
            real(model, pixels, how),
        )[1],
    )
    train(
        changed(recipe, train={"epochs": 1, "precision": precision}),
        photos,
        tmp_path / "run",
        store=store_path,
        device=CPU,
    )
    assert {how for training, how in seen if training} == {precision} and {
        how for training, how in seen if not training
    } == {validated}


def test_teachers_fill_batches_of_one_shape_and_cudnn_is_told(
    recipe, photos, tmp_path, monkeypatch
):
    seen = []
    real = ensemble
    monkeypatch.setattr(
        stream,
        "ensemble",
        lambda *given, **named: (
            seen.append(torch.backends.cudnn.benchmark),
            real(*given, **named),
        )[1],
    )
    generate(changed(recipe, crops={"views": 1}), photos, tmp_path / "s.zarr", device=CPU)
    assert seen == [True] * 6 and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("precision", "options"),
    [("float32", {"freezing": True}), ("tf32", {"freezing": True}), *((p, None) for p in HALF)],
)
def test_batchnorm_is_not_folded_into_weights_of_half_precision(
    recipe, monkeypatch, precision, options
):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda module, **how: asked.update(how) or module)
    load(recipe.teachers[0]).compiled_teacher(precision)
    assert asked == {"dynamic": False, "options": options}


def test_tf32_is_refused_where_there_is_none(recipe, photos, store_path, tmp_path, monkeypatch):
    line = (
        "{} tf32 needs a GPU of compute capability 8.0 or later, "
        "and this runs on a CPU; set {}=float32"
    )
    with pytest.raises(PrecisionError) as refused:
        generate(
            changed(recipe, store={"precision": "tf32"}), photos, tmp_path / "s.zarr", device=CPU
        )
    assert (
        str(refused.value) == line.format("store.precision", "store.precision")
        and not (tmp_path / "s.zarr").exists()
    )
    with pytest.raises(PrecisionError) as refused:
        train(
            changed(recipe, train={"precision": "tf32"}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=CPU,
        )
    assert (
        str(refused.value) == line.format("train.precision", "train.precision")
        and not (tmp_path / "run").exists()
    )
    with pytest.raises(PrecisionError, match="store.precision tf32"):
        stages.make_plan(changed(recipe, store={"precision": "tf32"}), photos, None, device=CPU)
    with pytest.raises(PrecisionError, match="store.precision tf32"):
        train(
            changed(recipe, store={"precision": "tf32"}, train={"online": True}),
            photos,
            tmp_path / "run",
            device=CPU,
        )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    for capability in ((7, 0), (8, 0), (9, 0)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device=None, is_of=capability: is_of
        )
        for precision in ("float32", "float16", "bfloat16", "tf32"):
            if precision == "tf32" and capability < (8, 0):
                with pytest.raises(
                    PrecisionError, match="this runs on Tesla V100; set store.precision=float32"
                ):
                    require_precision(precision, CUDA, "store.precision")
            else:
                require_precision(precision, CUDA, "store.precision")


def test_other_precisions_are_refused_by_name():
    with pytest.raises(
        ConfigError,
        match=r"store\.precision must be 'float32', 'tf32', 'bfloat16' or 'float16', got 'fp16'",
    ):
        validate({"store": {"precision": "fp16"}}, "test")
    with pytest.raises(
        ConfigError,
        match=r"train\.precision must be 'float32', 'tf32' or 'bfloat16', got 'float16'",
    ):
        validate({"train": {"precision": "float16"}}, "test")


def test_arithmetic_is_as_before_after_an_error():
    before = flags()
    with pytest.raises(RuntimeError), in_precision("tf32"):
        raise RuntimeError
    assert flags() == before


# ---- the records in a store, and the bounds of verify


def test_a_gpu_is_recorded_by_name_capability_and_versions(h100, store_path, tmp_path):
    facts = description.made_with(gpu=True)
    assert (
        facts["gpu"] == "NVIDIA H100"
        and facts["capability"] == "9.0"
        and {"cuda", "cudnn", "driver", "torch"} <= facts.keys()
    )
    copy = Path(shutil.copytree(store_path, tmp_path / "s.zarr"))
    edit_store(copy, lambda attributes: attributes.update(made_with=facts))
    assert LabelStore.open(copy).attributes["made_with"]["gpu"] == "NVIDIA H100"
    assert not {"gpu", "capability", "cudnn"} & description.made_with().keys()  # made on a CPU
    assert "gpu" not in LabelStore.open(store_path).attributes["made_with"]


ON_CPU, ON_GPU = {"device": "cpu"}, {"device": "cuda"}
HERE = {"gpu": "NVIDIA H100", "torch": version("torch")}
UNKNOWN_FLOAT32 = ROUNDING["tf32"] + ROUNDING["float32"]


@pytest.mark.parametrize(
    ("compute", "made", "device", "times"),
    [
        (ON_CPU, {}, CPU, 1),
        (ON_CPU, {}, CUDA, 2),
        (ON_CPU | {"compile": True}, {}, CPU, 2),
        (ON_GPU, HERE, CUDA, 1),
        (ON_GPU, HERE, CPU, 2),
        (ON_GPU, HERE | {"gpu": "NVIDIA A100"}, CUDA, 2),
        (ON_GPU, HERE | {"torch": "2.9.0"}, CUDA, 2),
        (ON_GPU | {"compile": True}, HERE, CUDA, 2),
    ],
)
@pytest.mark.parametrize("precision", ROUNDING)
def test_what_rounding_explains_hangs_on_precision_device_name_torch_and_compilation(
    h100, compute, made, device, times, precision
):
    assert (
        rounding(compute | {"precision": precision}, made, device, precision)
        == times * ROUNDING[precision]
    )


def test_float32_of_a_version_that_recorded_no_gpu_may_have_been_tf32(h100):
    for device in (CPU, CUDA):
        assert (
            rounding(
                ON_GPU | {"precision": "float32"}, {"torch": version("torch")}, device, "float32"
            )
            == UNKNOWN_FLOAT32
        )
        assert (
            rounding(ON_GPU | {"precision": "bfloat16"}, {}, device, "bfloat16")
            == 2 * ROUNDING["bfloat16"]
        )


def test_what_rounding_explains_is_less_than_labels_of_other_crops_are_apart(store_path):
    """Otherwise verify would let labels of other crops pass."""
    p = LabelStore.open(store_path).probabilities(0, slice(0, 90))
    apart = np.abs(p - np.roll(p, 1, axis=0)).sum(axis=1) / 2
    assert np.median(apart) > 2 * ROUNDING["float16"]


def on_a_gpu(path: Path, precision: str, made: dict) -> LabelStore:
    """Turn a store into one made on a GPU, with records bound to the new provenance."""
    store = LabelStore.open(path)
    shards = {
        (view, shard): store.content(view, shard)[0]
        for view in range(store.views)
        for shard in range(store.shards)
    }

    def edit(attributes: dict) -> None:
        attributes["provenance"]["compute"] |= {"precision": precision, "device": "cuda"}
        attributes["made_with"] |= made
        attributes["format_version"] = schema.format_version(attributes["provenance"])

    edit_store(path, edit)
    from cache.writer import StoreWriter

    writer = StoreWriter(path)
    for (view, shard), arrays in shards.items():
        writer.write(view, shard, *arrays)
    return LabelStore.open(path)


@pytest.mark.parametrize(
    ("precision", "made", "allowed"),
    [
        ("float32", {"gpu": "NVIDIA H100"}, 2e-3),
        ("float32", {}, 2.1e-2),
        ("tf32", {"gpu": "NVIDIA H100"}, 4e-2),
        ("float16", {"gpu": "NVIDIA H100"}, 4e-2),
        ("bfloat16", {"gpu": "NVIDIA H100"}, 0.3),
    ],
)
def test_a_gpus_store_is_labelled_again_on_a_cpu_and_judged_by_what_it_recorded(
    photos, recipe, store_path, tmp_path, precision, made, allowed
):
    copy = Path(shutil.copytree(store_path, tmp_path / "s.zarr"))
    on_a_gpu(copy, precision, made)
    result = recheck(copy, photos / "train", list(recipe.teachers), 30, device=CPU)
    assert result["sample"]["allowed"] == pytest.approx(allowed) and result["trusted"], result[
        "problems"
    ]


def test_an_average_is_judged_by_its_parts(photos, recipe, tmp_path, h100):
    parts = []
    for i, teacher in enumerate(recipe.teachers):
        alone = changed(recipe, crops={"views": 1}).model_copy(update={"teachers": (teacher,)})
        generate(alone, photos, tmp_path / f"{i}.zarr", device=CPU)
        parts.append(tmp_path / f"{i}.zarr")
    on_a_gpu(parts[1], "tf32", {"gpu": "NVIDIA H100"})
    both = merge(parts, tmp_path / "both.zarr", say=print, progress=lambda n: None)
    assert [part.get("gpu") for part in both.provenance["merged"]] == [None, "NVIDIA H100"]
    # Older programs know neither TF32 nor the resize.
    assert both.attributes["format_version"] == 6
    assert relabel._arithmetic(both.provenance, {}, CPU, "float32") == pytest.approx(
        (1e-3 + 2.1e-2) / 2
    )


def test_only_what_older_programs_cannot_know_has_a_new_format(store_path):
    new = LabelStore.open(store_path).provenance
    assert (
        schema.format_version(new)
        == 6
        == json.loads((store_path / "zarr.json").read_text())["attributes"]["format_version"]
    )
    origin = new | {"renderer": {"backend": "cpu"}}  # resized by DALI
    assert schema.format_version(origin) == 3
    assert (
        schema.format_version(origin | {"compute": origin["compute"] | {"precision": "tf32"}}) == 5
    )
    assert schema.format_version(origin | {"renderer": {"backend": "gpu-hardware"}}) == 5
    assert schema.format_version(origin | {"renderer": {"backend": "gpu"}}) == 3
    assert schema.format_version(origin | {"imported": {}}) == 4
    average = {
        **origin,
        "merged": [
            origin,
            {**origin, "merged": [origin, origin | {"compute": {"precision": "tf32"}}]},
        ],
    }
    assert schema.format_version(average) == schema.format_version(average | {"imported": {}}) == 5
    assert (
        schema.format_version(
            {
                **origin,
                "merged": [origin, origin | {"imported": {}, "compute": {"precision": None}}],
            }
        )
        == 4
    )


def test_a_bit_that_flips_in_the_number_of_the_new_format_is_damage(store_path, tmp_path):
    """The damaged number isn't taken for a version that another program could read."""
    copy = Path(shutil.copytree(store_path, tmp_path / "s.zarr"))
    assert on_a_gpu(copy, "tf32", {"gpu": "NVIDIA H100"}).attributes["format_version"] == 6
    description = copy / "zarr.json"
    description.write_text(
        description.read_text().replace('"format_version": 6', '"format_version": 70')
    )
    with pytest.raises(DamagedStore):
        LabelStore.open(copy)


def test_going_on_with_a_store_on_another_gpu_is_told(h100, store_path, tmp_path):
    copy = Path(shutil.copytree(store_path, tmp_path / "s.zarr"))
    store = on_a_gpu(copy, "float16", {"gpu": "NVIDIA A100"})
    line = (
        f"{copy} was begun on NVIDIA A100; labels of this NVIDIA H100 are the same to rounding, "
        "0.04 in total variation at most"
    )
    assert refusals.changed_gpu(store, CUDA) == line
    assert refusals.changed_gpu(store, CPU) is None  # a CPU is refused elsewhere
    edit_store(copy, lambda attributes: attributes["made_with"].update(gpu="NVIDIA H100"))
    assert refusals.changed_gpu(LabelStore.open(copy), CUDA) is None
    edit_store(copy, lambda attributes: attributes["made_with"].pop("gpu"))
    assert (
        "begun by a version that recorded no GPU, and whose float32 was TF32 in conv"
        in refusals.changed_gpu(LabelStore.open(copy), CUDA)
    )


def test_a_store_whose_decoder_depended_on_the_batch_is_not_gone_on_with(
    recipe, store_path, tmp_path
):
    """Earlier versions made such stores with render.backend gpu."""
    copy = Path(shutil.copytree(store_path, tmp_path / "s.zarr"))
    renderer = {"backend": "gpu", "steps": STEPS["dali"]}
    edit_store(copy, lambda attributes: attributes["provenance"].update(renderer=renderer))
    teachers = [load(spec) for spec in recipe.teachers]
    with pytest.raises(
        StoreError,
        match="made with another way to render crops .DALI's own choice of decoder, .*; this "
        "version: CUDA .hw_decoder_load 0.0.*generate a new store",
    ):
        refusals.require_same_recipe(
            LabelStore.open(copy), changed(recipe, render={"backend": "gpu"}), teachers, CPU
        )
    # A store made on a CPU has no new key.
    assert "decoder" not in LabelStore.open(store_path).provenance["renderer"]
    how = {"renderer": {"backend": "gpu", "steps": "as now"}}
    with pytest.raises(
        RunError,
        match="started with renderer.decoder None, this is CUDA .*; "
        "pass the same to go on, or choose another --out",
    ):
        resume._require_same_teachers(
            tmp_path, how, {"renderer": how["renderer"] | DECODERS["gpu"]}
        )


# ---- other settings for the device


def test_a_run_of_another_device_goes_on_with_this_ones_way_to_step(
    recipe, photos, store_path, tmp_path
):
    """``fused`` is kept with the optimizer's state. A GPU's run that goes on on a CPU
    isn't fused."""
    short = changed(recipe, train={"epochs": 1})
    train(short, photos, tmp_path / "run", store=store_path, device=CPU)
    file = tmp_path / "run" / "state.pt"
    state = torch.load(file, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        assert group["fused"] is None
        group["fused"] = True
    torch.save(state, file)
    train(
        changed(recipe, train={"epochs": 2}), photos, tmp_path / "run", store=store_path, device=CPU
    )
    assert all(
        group["fused"] is None
        for group in torch.load(file, weights_only=True)["optimizer"]["param_groups"]
    )
    train(
        changed(recipe, train={"epochs": 2}),
        photos,
        tmp_path / "straight",
        store=store_path,
        device=CPU,
    )
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == (
        tmp_path / "straight" / "last.safetensors"
    ).read_bytes()


def test_what_is_on_the_cpu_has_returned_already():
    p, finite = torch.rand(3, 4), torch.ones(3, dtype=torch.bool)
    there = Returning(p, finite).arrived()
    assert there[0] is p and there[1] is finite


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [({}, {8, 16}), ({"compile": True}, {16}), ({"compile": True, "batch_size": 100}, {100})],
)
def test_the_plan_times_what_will_run(recipe: Config, photos, monkeypatch, settings, sizes):
    """The plan times compiled teachers in the store's precision and in whole batches,
    since another batch size would be compiled on its own."""
    monkeypatch.setattr(plan, "SECONDS", 0.01)
    compiled, seen = [], []
    real = model_module.Model.__call__
    monkeypatch.setattr(
        Model, "compiled_teacher", lambda model, precision: (compiled.append(precision), model)[1]
    )
    monkeypatch.setattr(
        Model,
        "__call__",
        lambda model, pixels, precision: (
            seen.append((len(pixels), precision)),
            real(model, pixels, precision),
        )[1],
    )
    told = stages.make_plan(
        changed(recipe, store=settings | {"precision": "bfloat16"}), photos, None, device=CPU
    )
    assert compiled == ["bfloat16"] * 2 * bool(settings) and {
        precision for _, precision in seen
    } == {"bfloat16"}
    assert {n for n, _ in seen} == sizes and told["teachers_per_second"] > 0
