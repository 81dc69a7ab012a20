"""Stage two: the student learns from the stored labels, a stopped and resumed run ends
with the weights of an undisturbed run, and a wrong store is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.paths import ROOT
from support.small import CPU, changed, edit_store, write_photos, write_teacher
from support.stages import generate, make_replay, scan, stored_labels, train

from cache import LabelStore, StoreError
from pipeline.config import ConfigError, ModelSpec
from pipeline.images.patience import DataError
from pipeline.models.model import ModelError
from pipeline.models.weights import load
from pipeline.runs.folder import RunError
from pipeline.training import losses
from pipeline.training.discriminator import Discriminator, log_floored

# What a run keeps beside the weights of a paper's run.
BEYOND = {"optimizer": "adamw", "decay_norm_and_bias": False, "ema_decay": 0.99, "dropout": 0.1}
BEYOND |= {"accumulate": 2, "clip_norm": 1.0}


def test_soft_cross_entropy_is_equation_3_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    targets = torch.tensor([[0.2, 0.7, 0.1]])
    norm = np.log(np.exp(1.0) + np.exp(2.0) + np.exp(0.5))
    by_hand = -(0.2 * (1.0 - norm) + 0.7 * (2.0 - norm) + 0.1 * (0.5 - norm))
    assert losses.soft_cross_entropy(logits, targets).item() == pytest.approx(by_hand, rel=1e-6)
    entropy = -(0.2 * np.log(0.2) + 0.7 * np.log(0.7) + 0.1 * np.log(0.1))
    assert losses.entropy(targets).item() == pytest.approx(entropy, rel=1e-6)
    # The entropy of the labels is the least loss.
    assert losses.soft_cross_entropy(targets.log(), targets).item() == pytest.approx(
        entropy, rel=1e-6
    )


def test_an_epoch_is_sgd_on_the_stored_labels_by_hand(photos, recipe, store_path, tmp_path):
    how = {"epochs": 1, "momentum": 0.7, "weight_decay": 0.05}
    one = changed(recipe, train=how)
    metrics = train(one, photos, tmp_path / "run", store=store_path, device=CPU)
    store = LabelStore.open(store_path)
    student = load(one.student, classes=3, image_size=32, seed=0)
    module = student.module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.7, weight_decay=0.05)
    replay = make_replay(
        stored_labels(store, 2),
        photos / "train",
        sizes=[32],
        batch_size=16,
        seed=0,
        rendering=one.render,
    )
    total = entropy = 0.0
    with replay.epoch(0) as batches:
        for batch in batches:
            p = torch.from_numpy(store.probabilities(0, batch.rows))
            x = (batch.pixels[32].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5  # test_vit's mean and std
            loss = -(p * module(x).log_softmax(1)).sum(1)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            total += loss.sum().item()
            entropy -= (p * p.log()).sum().item()
    assert metrics["loss"] == pytest.approx(total / 90, rel=1e-4)
    assert metrics["kl"] == pytest.approx((total - entropy) / 90, rel=1e-3)
    trained = load_file(tmp_path / "run" / "last.safetensors")
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_learning_rate_steps_at_the_milestones(photos, recipe, store_path, tmp_path):
    steps = changed(recipe, train={"epochs": 3, "milestones": [1, 2], "gamma": 0.5})
    train(steps, photos, tmp_path / "run", store=store_path, device=CPU)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["lr"] for line in lines] == [0.01, 0.005, 0.0025]
    assert [line["view"] for line in lines] == [0, 1, 0]
    assert {"loss", "kl", "val_top1", "val_top5", "images_per_second", "seconds"} <= lines[0].keys()


def test_the_discriminator_is_equations_4_and_5_by_hand():
    torch.manual_seed(0)
    judge = Discriminator(10)
    assert [layer.out_features for layer in judge.layers[::2]] == [32, 16, 1]
    assert [layer.out_features for layer in Discriminator(1000).layers[::2]] == [125, 16, 1]
    p = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(10), 4), dtype=torch.float32)
    logits = torch.randn(4, 10)
    seen = [log_floored(side, 0.02) for side in (logits.softmax(1), p)]
    loss, accuracy = judge(*seen)
    theirs = judge.layers(torch.log(torch.clamp(p, min=0.02)))[:, 0].sigmoid()
    students = judge.layers(torch.log(torch.clamp(logits.softmax(1), min=0.02)))[:, 0].sigmoid()
    assert loss.item() == pytest.approx(
        -(theirs.log().mean() + (1 - students).log().mean()).item() / 2, rel=1e-5
    )
    assert accuracy.tolist() == pytest.approx(
        [(students < 0.5).float().mean().item(), (theirs > 0.5).float().mean().item()]
    )
    moved = judge(log_floored((logits + 7).softmax(1), 0.02), seen[1])
    torch.testing.assert_close(moved, (loss, accuracy))  # an offset of the logits changes nothing


def test_the_discriminator_keeps_its_own_rate_and_survives_a_resumption(
    photos, recipe, store_path, tmp_path
):
    judged = {"epochs": 2, "milestones": [1], "discriminator": {"lr": 0.1}}
    train(changed(recipe, train=judged), photos, tmp_path / "whole", store=store_path, device=CPU)
    train(
        changed(recipe, train=judged | {"epochs": 1}),
        photos,
        tmp_path / "parts",
        store=store_path,
        device=CPU,
    )
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == [0.01, 0.1]
    metrics = train(
        changed(recipe, train=judged), photos, tmp_path / "parts", store=store_path, device=CPU
    )
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    # The ratio of the rates stays.
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == pytest.approx(
        [0.001, 0.01]
    )
    assert (tmp_path / "whole" / "last.safetensors").read_bytes() == (
        tmp_path / "parts" / "last.safetensors"
    ).read_bytes()
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    for key, value in json.loads(whole[-1]).items():
        if key.startswith("discriminator"):
            assert metrics[key] == value, key
    assert 0 < metrics["discriminator_loss"] < 2 and 0 <= metrics["discriminator_accuracy"] <= 100
    train(
        changed(recipe, train=judged | {"discriminator": None}),
        photos,
        tmp_path / "without",
        store=store_path,
        device=CPU,
    )
    assert (tmp_path / "whole" / "last.safetensors").read_bytes() != (
        tmp_path / "without" / "last.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_training_lowers_the_loss(photos, recipe, store_path, tmp_path, labels):
    longer = changed(recipe, train={"epochs": 8, "labels": labels, "lr": 0.005, "milestones": []})
    train(
        longer, photos, tmp_path / "run", store=store_path if labels == "soft" else None, device=CPU
    )
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["loss"] < lines[0]["loss"] - (0.2 if labels == "hard" else 0.02)
    assert (lines[0]["kl"] is None) == (labels == "hard")


def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(
    photos, recipe, store_path, tmp_path
):
    train(
        changed(recipe, train={"epochs": 3}),
        photos,
        tmp_path / "whole",
        store=store_path,
        device=CPU,
    )
    for epochs in (1, 2, 3):
        train(
            changed(recipe, train={"epochs": epochs}),
            photos,
            tmp_path / "parts",
            store=store_path,
            device=CPU,
        )
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("values", [{}, BEYOND], ids=["the paper's", "beyond the paper"])
def test_a_killed_and_resumed_run_ends_with_the_same_weights(
    photos, recipe, store_path, tmp_path, values
):
    config = tmp_path / "recipe.yaml"
    longer = changed(recipe, train={"epochs": 20} | values)
    document = yaml.safe_load(longer.to_yaml())
    document.pop("teachers")
    config.write_text(yaml.safe_dump(document))
    train(longer, photos, tmp_path / "whole", store=store_path, device=CPU)
    run = tmp_path / "killed"
    command = [
        sys.executable,
        ROOT / "cli.py",
        "train-student",
        f"--config={config}",
        f"--data={photos}",
        f"--store={store_path}",
        f"--out={run}",
    ]

    def epochs_done() -> int:
        try:
            return len((run / "metrics.jsonl").read_text().splitlines())
        except FileNotFoundError:
            return 0

    reached = []
    for wait in (0.0, 0.1):
        process = subprocess.Popen([*command, "--device=cpu"], stderr=subprocess.PIPE)
        before = epochs_done()
        while process.poll() is None and epochs_done() == before:
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        reached.append(epochs_done())
    assert 1 <= reached[0] < 20
    finished = subprocess.run([*command, "--device=cpu"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "going on with" in finished.stderr
    assert epochs_done() == 20
    for name in ("last", "ema") if values else ("last",):
        kept, whole = (folder / f"{name}.safetensors" for folder in (run, tmp_path / "whole"))
        assert kept.read_bytes() == whole.read_bytes()


def test_timm_loads_the_checkpoints(photos, recipe, store_path, tmp_path):
    train(
        changed(recipe, train={"epochs": 1}), photos, tmp_path / "run", store=store_path, device=CPU
    )
    path = tmp_path / "run" / "best.safetensors"
    theirs = timm.create_model(
        "test_vit", num_classes=3, img_size=32, checkpoint_path=str(path)
    ).eval()
    ours = load(ModelSpec(model="test_vit", checkpoint=str(path)))
    assert (ours.classes, ours.image_size, ours.mean, ours.interpolation) == (
        3,
        32,
        (0.5, 0.5, 0.5),
        "bilinear",
    )
    x = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(theirs((x.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5), ours(x))


def test_the_header_tells_timm_how_images_are_prepared(photos, recipe, store_path, tmp_path):
    """The README's lines. timm's own config has bicubic for this model, and another
    part of the image."""
    run = tmp_path / "run"
    train(changed(recipe, train={"epochs": 1}), photos, run, store=store_path, device=CPU)
    readme = (ROOT / "pipeline" / "training" / "README.md").read_text()
    code = readme[readme.index("    import json\n") :].partition("\n\nA model")[0]
    told: dict = {}
    lines = textwrap.dedent(code).replace("run/best.safetensors", str(run / "best.safetensors"))
    exec(lines.replace("num_classes=", "img_size=32, num_classes="), told)
    ours = load(ModelSpec(model="test_vit", checkpoint=str(run / "best.safetensors")))
    found = scan(photos / "val", ["ant", "bee", "cat"], exif="ignore")
    loss, seen = 0.0, 0
    for path, label in zip(found.path, found.class_index, strict=True):
        with Image.open(photos / "val" / path) as photo:
            x = told["transform"](photo.convert("RGB"))[None]
        with torch.no_grad():
            logits = told["model"](x)
        loss += torch.nn.functional.cross_entropy(logits, torch.tensor([int(label)])).item()
        seen += 1
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert loss / seen == pytest.approx(last["val_loss"], abs=1e-3)
    assert told["said"]["interpolation"] == ours.interpolation == "bilinear"
    theirs = timm.data.resolve_model_data_config(told["model"])
    assert theirs["interpolation"] == "bicubic" and theirs["crop_pct"] != told["said"]["crop_pct"]


def test_a_head_of_another_size_is_replaced_and_that_is_said(
    photos, recipe, store_path, tmp_path, capsys
):
    weights = write_teacher(tmp_path / "seven.safetensors", "test_resnet", 1, classes=7)
    other = recipe.model_copy(
        update={"student": ModelSpec(model="test_resnet", checkpoint=str(weights))}
    )
    train(
        changed(other, train={"epochs": 1}), photos, tmp_path / "run", store=store_path, device=CPU
    )
    assert "had a head of 7 classes; it starts with a new one of 3" in capsys.readouterr().err
    assert load_file(tmp_path / "run" / "last.safetensors")["fc.weight"].shape[0] == 3


def test_a_size_that_no_teacher_saw_is_allowed_and_said(
    photos, recipe, store_path, tmp_path, capsys
):
    train(
        changed(recipe, train={"epochs": 1, "image_size": 96}, student={"image_size": 96}),
        photos,
        tmp_path / "run",
        store=store_path,
        device=CPU,
    )
    assert "96 px, a size that no teacher" in capsys.readouterr().err


def test_an_image_size_that_the_student_cannot_take_is_refused(
    photos, recipe, store_path, tmp_path
):
    with pytest.raises(ModelError, match=r"test_vit.* can't take 40 px .*divisible by patch size"):
        train(
            changed(recipe, train={"image_size": 40}, student={"image_size": 40}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=CPU,
        )


def test_a_store_of_other_images_is_refused(photos, recipe, store_path, tmp_path):
    others = write_photos(tmp_path / "others", 30, seed=5)
    with pytest.raises(
        DataError,
        match=r"is not the data set that .* was made from: "
        r"90 of 90 images of another size.*; pass the folder",
    ):
        train(recipe, others, tmp_path / "run", store=store_path, device=CPU)
    shutil.copytree(photos / "train", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "ant" / "000.jpg", tmp_path / "data" / "ant" / "new.jpg")
    with pytest.raises(DataError, match=r"1 of 90 images added, the first is ant/new.jpg"):
        train(recipe, tmp_path / "data", tmp_path / "run", store=store_path, device=CPU)
    assert not (tmp_path / "run").exists()


def test_a_store_of_other_classes_is_refused(photos, recipe, store_path, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "data")
    (tmp_path / "data" / "dog").mkdir()
    with pytest.raises(
        StoreError,
        match=r"has labels for 3 classes \(ant, bee, cat\), .* has 4 class folders "
        r"of which 1 .* \(dog\); pass",
    ):
        train(recipe, tmp_path / "data", tmp_path / "run", store=store_path, device=CPU)


def test_an_unfinished_view_is_refused(photos, recipe, tmp_path):
    generate(recipe, photos, tmp_path / "s.zarr", device=CPU, worker=(0, 2))
    with pytest.raises(
        StoreError,
        match=r"view 0 of .* is not finished \(1 of 3 shards missing or damaged, the first is 1\); "
        r"run the same generate-labels",
    ):
        train(recipe, photos, tmp_path / "run", store=tmp_path / "s.zarr", device=CPU)


def test_other_pixels_than_the_teachers_saw_are_refused_unless_allowed(
    photos, recipe, store_path, tmp_path, capsys
):
    shutil.copytree(store_path, tmp_path / "s.zarr")
    edit_store(
        tmp_path / "s.zarr",
        lambda attributes: attributes["fingerprint"]["digests"].update({"64": "0" * 64}),
    )
    one = changed(recipe, train={"epochs": 1})
    with pytest.raises(StoreError, match=r"renders other pixels than the teachers saw \(at 64 px"):
        train(one, photos, tmp_path / "run", store=tmp_path / "s.zarr", device=CPU)
    train(
        one,
        photos,
        tmp_path / "run",
        store=tmp_path / "s.zarr",
        device=CPU,
        allow_renderer_difference=True,
    )
    assert "warning: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"crops": {"scale": [0.5, 1.0]}},
            r"crops.scale is \(0.5, 1.0\), .* was made with \(0.08, 1.0\)",
        ),
        ({"crops": {"seed": 3}}, "crops.seed is 3"),
        (
            {"train": {"views": 3}},
            "train.views is 3 but .* has 2; extend it with generate-labels --views 3",
        ),
    ],
)
def test_a_config_that_asks_for_what_the_store_does_not_hold_is_refused(
    photos, recipe, store_path, tmp_path, sections, says
):
    with pytest.raises((ConfigError, StoreError), match=says):
        train(changed(recipe, **sections), photos, tmp_path / "run", store=store_path, device=CPU)


def test_a_run_directory_of_something_else_is_refused(photos, recipe, store_path, tmp_path):
    train(
        changed(recipe, train={"epochs": 1}), photos, tmp_path / "run", store=store_path, device=CPU
    )
    with pytest.raises(
        RunError,
        match=r"was started with train.lr 0.01, this is 0.02; "
        r"pass the same to go on, or choose another --out",
    ):
        train(
            changed(recipe, train={"lr": 0.02}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=CPU,
        )
    generate(changed(recipe, store={"codec": "cbrt8"}), photos, tmp_path / "other.zarr", device=CPU)
    with pytest.raises(RunError, match="another label store"):
        train(recipe, photos, tmp_path / "run", store=tmp_path / "other.zarr", device=CPU)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("dear")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        train(recipe, photos, tmp_path / "full", store=store_path, device=CPU)
    for place in ("file", "file/below"):
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="a part of it is a file; choose another --out"):
            train(recipe, photos, tmp_path / place, store=store_path, device=CPU)
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(RunError, match="state.pt is damaged"):
        train(recipe, photos, tmp_path / "run", store=store_path, device=CPU)


def test_a_run_with_other_images_or_settings_than_it_began_with_is_refused(
    photos, recipe, store_path, tmp_path
):
    hard = changed(recipe, train={"epochs": 1, "labels": "hard"})
    shutil.copytree(photos / "train", tmp_path / "data")
    train(hard, tmp_path / "data", tmp_path / "hard", device=CPU)
    permuted = ["bee", "cat", "ant"]
    with pytest.raises(RunError, match="started with other images or classes"):
        train(hard, tmp_path / "data", tmp_path / "hard", classes=permuted, device=CPU)
    (tmp_path / "data" / "ant" / "000.jpg").unlink()
    with pytest.raises(RunError, match="started with other images or classes"):
        train(hard, tmp_path / "data", tmp_path / "hard", device=CPU)
    train(
        changed(recipe, train={"epochs": 2, "discriminator": {}}),
        photos,
        tmp_path / "run",
        store=store_path,
        device=CPU,
    )
    with pytest.raises(RunError, match=r"train.discriminator.*choose another --out"):
        train(
            changed(recipe, train={"epochs": 3}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=CPU,
        )
    (tmp_path / "run" / "state.pt").unlink()
    with pytest.raises(RunError, match="holds a run whose state.pt is gone"):
        train(
            changed(recipe, train={"epochs": 3, "discriminator": {}}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=CPU,
        )


def test_dropout_too_draws_the_same_after_a_resumption(
    photos, recipe, store_path, tmp_path, monkeypatch
):
    """The tiny models have no dropout, so the test adds some. An epoch's draws must not
    depend on earlier epochs in the same process."""
    import pipeline.training.train

    def with_dropout(*arguments: object, **options: object) -> object:
        model = load(*arguments, **options)
        model.module.head_drop.p = 0.5
        return model

    monkeypatch.setattr(pipeline.training.train, "load", with_dropout)
    train(
        changed(recipe, train={"epochs": 2}),
        photos,
        tmp_path / "whole",
        store=store_path,
        device=CPU,
    )
    for epochs in (1, 2):
        train(
            changed(recipe, train={"epochs": epochs}),
            photos,
            tmp_path / "parts",
            store=store_path,
            device=CPU,
        )
    assert (tmp_path / "whole" / "last.safetensors").read_bytes() == (
        tmp_path / "parts" / "last.safetensors"
    ).read_bytes()


def test_a_class_without_images_in_validation_is_said(photos, recipe, store_path, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "bee")
    train(
        changed(recipe, train={"epochs": 1}),
        tmp_path / "data",
        tmp_path / "run",
        store=store_path,
        device=CPU,
    )
    assert "1 of 3 classes have no usable image in" in capsys.readouterr().err


def test_a_store_that_grew_does_not_change_a_run_in_progress(photos, recipe, store_path, tmp_path):
    shutil.copytree(store_path, tmp_path / "s.zarr")
    train(
        changed(recipe, train={"epochs": 1}),
        photos,
        tmp_path / "run",
        store=tmp_path / "s.zarr",
        device=CPU,
    )
    generate(changed(recipe, crops={"views": 3}), photos, tmp_path / "s.zarr", device=CPU)
    assert (
        train(
            changed(recipe, train={"epochs": 3}),
            photos,
            tmp_path / "run",
            store=tmp_path / "s.zarr",
            device=CPU,
        )["view"]
        == 0
    )


def test_a_loss_that_is_not_finite_stops_the_run(photos, recipe, store_path, tmp_path):
    with pytest.raises(RunError, match=r"the loss is .* in epoch 1; lower train.lr \(now 1e\+30\)"):
        train(
            changed(recipe, train={"lr": 1e30}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=CPU,
        )


def test_no_half_written_file_is_left_under_a_final_name(
    photos, recipe, store_path, tmp_path, monkeypatch
):
    train(
        changed(recipe, train={"epochs": 1}), photos, tmp_path / "run", store=store_path, device=CPU
    )
    before = (tmp_path / "run" / "state.pt").read_bytes()

    def full_disk(*arguments: object) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(recipe, photos, tmp_path / "run", store=store_path, device=CPU)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".partial")]
