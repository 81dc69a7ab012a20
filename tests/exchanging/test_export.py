"""An exported student is the trained student: timm and ONNX Runtime load it from the
folder alone, and its card holds facts of the run and no others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.label_files import write_set
from support.paths import ROOT
from support.small import CPU, changed, edit_store, tree
from support.stages import import_labels, train

from cache import LabelStore
from cache.errors import MealError
from cli import main
from pipeline.config import ModelSpec
from pipeline.exchange import export_student
from pipeline.exchange import onnx as onnx_module
from pipeline.exchange.export_student import export, summary
from pipeline.exchange.trained import ExportError
from pipeline.models import names, timm_export
from pipeline.models import weights as weights_module
from pipeline.models.weights import load
from pipeline.runs import checkpoint
from pipeline.runs.folder import RunFolder
from pipeline.training.loop import Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def soft(photos, recipe, store_path, tmp_path_factory) -> Path:
    """A run from a store, of a test_vit that is built for 32 px in place of its own
    160 px."""
    run = tmp_path_factory.mktemp("soft") / "run"
    train(
        changed(recipe, train={"discriminator": {"lr": 1e-4}}),
        photos,
        run,
        store=store_path,
        device=CPU,
    )
    return run


@pytest.fixture(scope="module")
def hard(photos, recipe, tmp_path_factory) -> Path:
    """A run without a store and with BatchNorm, whose last epoch is far from its best,
    since its learning rate explodes."""
    run = tmp_path_factory.mktemp("hard") / "run"
    baseline = {"labels": "hard", "batch_size": 15, "lr": 0.05, "milestones": [1], "gamma": 100.0}
    train(
        changed(recipe, student={"model": "test_resnet"}, train=baseline), photos, run, device=CPU
    )
    first, last = (one["val_top1"] for one in passes(run))
    assert first > last
    return run


@pytest.fixture(scope="module")
def online(photos, recipe, tmp_path_factory) -> Path:
    """A run with live teachers and without validation, stopped after the first of two
    epochs."""
    run = tmp_path_factory.mktemp("online") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_summary", stop)
        train(changed(recipe, train={"online": True}), photos / "train", run, device=CPU)
    return run


@pytest.fixture(scope="module")
def folder(soft, store_path, tmp_path_factory) -> Path:
    """The soft run, exported with everything."""
    out = tmp_path_factory.mktemp("exported") / "student"
    export(soft, out, store=store_path)
    return out


@pytest.fixture
def copied(hard, tmp_path) -> Path:
    return Path(shutil.copytree(hard, tmp_path / "run"))


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def passes(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def card(out: Path) -> tuple[dict, str]:
    """Read the card: its head, and its text with single spaces."""
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), " ".join(text.split())


def noise(images: int, size: int) -> torch.Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


def student(run: Path, model: str, weights: str = "best") -> torch.nn.Module:
    """Load a student as this tool does, but in timm's memory layout, since a
    convolution rounds otherwise in another layout."""
    return load(ModelSpec(model=model, checkpoint=str(run / f"{weights}.safetensors"))).module.to(
        memory_format=torch.contiguous_format
    )


def test_the_cards_own_code_runs_in_the_folder_alone(folder, soft, photos, tmp_path):
    """Both pieces of code run as a stranger would paste them, in a process that can't
    import this project."""
    there = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    shutil.copy(photos / "val" / "bee" / "000.jpg", there / "photo.jpg")
    with_timm, with_onnx = re.findall(
        r"```python\n(.*?)```", (there / "README.md").read_text(), re.DOTALL
    )
    asked = "torch.save((x := torch.randn(3, 3, 32, 32), model(x)), 'said.pt')\n"
    code = (
        f"import torch\ntorch.set_num_threads(1)\n{with_timm}\nwith torch.no_grad():\n    {asked}\n"
    )
    code += f"seen = probabilities.numpy()\n{with_onnx}\n"
    code += "print(abs(seen - probabilities).max())\n"
    code += "import sys\nprint('pipeline' in sys.modules, 'cache' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=there, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second, apart, imported = done.stdout.splitlines()
    (name, share), (other, _) = first.split(), second.split()
    assert (
        name == other
        and name in ("ant", "bee", "cat")
        and 1 / 3 < float(share) < 1
        and float(apart) < 1e-5
    )
    assert imported == "False False"
    x, logits = torch.load(there / "said.pt", weights_only=True)
    with torch.inference_mode():
        assert torch.equal(logits, student(soft, "test_vit")(x))


@pytest.mark.parametrize(
    ("which", "model", "size", "weights"),
    [("soft", "test_vit", 32, "best"), ("hard", "test_resnet", 32, "last")],
)
def test_timm_makes_the_very_student(which, model, size, weights, request, tmp_path):
    run = request.getfixturevalue(which)
    export(run, tmp_path / "out", weights=weights, onnx=False)
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = noise(3, size)
    with torch.inference_mode():
        assert torch.equal(theirs(x), student(run, model, weights)(x))
    look = timm.data.resolve_model_data_config(theirs)
    assert look["input_size"] == (3, size, size) and list(look["mean"]) == list(look["std"]) == [
        0.5,
        0.5,
        0.5,
    ]
    assert (look["interpolation"], look["crop_pct"], look["crop_mode"]) == (
        "bilinear",
        0.875,
        "center",
    )
    assert list(theirs.pretrained_cfg["label_names"]) == ["ant", "bee", "cat"]
    # keys of timm's own weights
    assert theirs.pretrained_cfg.keys().isdisjoint(
        {"tag", "license", "url", "hf_hub_id", "test_input_size"}
    )
    tuned = timm.create_model(
        f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5
    ).eval()
    assert tuned(x).shape == (3, 5)
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["meal_v2"]
    assert origin["weights"] == weights and origin["labels"] == which


def test_onnx_runtime_gives_the_students_logits_at_any_batch_size(folder, soft):
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    ((image,), (logits,)) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape, image.type) == ("image", ["batch", 3, 32, 32], "tensor(float)")
    assert (logits.name, logits.shape, logits.type) == ("logits", ["batch", 3], "tensor(float)")
    for images in (1, 2, 7):
        x = noise(images, 32)
        with torch.inference_mode():
            ours = student(soft, "test_vit")(x)
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {"image": x.numpy()})[0]), ours, rtol=1e-4, atol=1e-5
        )
    onnx.checker.check_model(onnx.load(folder / "model.onnx"), full_check=True)
    assert sorted(os.listdir(folder)) == [
        "README.md",
        "config.json",
        "model.onnx",
        "model.safetensors",
    ]


def test_an_export_says_nothing_but_its_result_and_no_path_of_the_machine(
    hard, tmp_path, monkeypatch, capfd, recwarn
):
    """The export is made as for a network with more weights than an ONNX file can hold,
    so that the weights lie beside the file."""
    monkeypatch.setattr(onnx_module, "INSIDE", 1_000)
    result = export(hard, tmp_path / "out")
    assert capfd.readouterr() == ("", "") and not recwarn.list
    measured, files = result["onnx"], tree(tmp_path / "out")
    assert 0 <= measured["total_variation"] <= 1e-5 and 0 <= measured["logits"] < 1e-3
    assert (
        f"to {measured['logits']:.1e}, and its softmax to {measured['total_variation']:.1e} in"
        in card(tmp_path / "out")[1]
    )
    assert f"{measured['total_variation']:.1e} in total variation" in "\n".join(summary(result))
    assert json.loads(json.dumps(result)) == result and result["files"] == {
        name: len(content) for name, content in files.items()
    }
    for name, content in files.items():
        for place in (tmp_path, hard, ROOT, sys.prefix):
            assert str(place).encode() not in content, name
    assert (
        names.public("local-dir:/home/me/secret/teacher") == "local-dir:teacher"
        and names.public("hf-hub:timm/x") == "hf-hub:timm/x"
    )
    assert os.listdir(tmp_path) == ["out"]
    assert measured["weights_outside"] and len(files["model.onnx.data"]) > len(files["model.onnx"])
    assert "`model.onnx.data`" in card(tmp_path / "out")[1]
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    x = noise(2, 32)
    with torch.inference_mode():
        ours = student(hard, "test_resnet")(x)
    theirs = onnxruntime.InferenceSession(moved / "model.onnx").run(None, {"image": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["best", "last"])
def test_the_card_has_the_figures_of_its_own_epoch(hard, tmp_path, weights):
    lines = passes(hard)
    mine = lines[-1] if weights == "last" else max(lines, key=lambda line: line["val_top1"])
    result = export(hard, tmp_path / "out", weights=weights, onnx=False)
    assert {key: result[key] for key in ("epoch", "val_top1", "loss")} == {
        key: mine[key] for key in ("epoch", "val_top1", "loss")
    }
    head, text = card(tmp_path / "out")
    for row in (
        f"| top-1 | {mine['val_top1']:.2f} % | 21 validation images |",
        f"| top-5 (of 3 classes: says nothing) | {mine['val_top5']:.2f} % |",
        f"| cross-entropy to the class folders | {mine['val_loss']:.4f} nats |",
        f"| loss | {mine['loss']:.4f} nats | 90 training crops |",
        f"| agreement: class folder and student put the same class first "
        f"| {mine['agreement']:.2f} % |",
        "| gamma | `100.0` |",
        f"those of epoch {mine['epoch'] + 1}, the ",
    ):
        assert row in text, row
    assert ("optimistic" in text) == (weights == "best") and (
        "not chosen by any figure" in text
    ) == (weights == "last")
    for line in lines:
        assert line is mine or f"{line['loss']:.4f} nats" not in text
    seconds, images = (sum(line[key] for line in lines) for key in ("seconds", "images"))
    assert (
        f"The run has done 2 of 2 epochs: "
        f"180 crops in {seconds:.0f} s, {images / seconds:,.1f} images per second" in text
    )
    assert (
        "(hard labels)" in text
        and "KL from" not in text
        and "teachers" not in text
        and "ONNX" not in text
    )
    assert head == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm"],
    }


def test_the_card_tells_of_the_store_and_its_teachers(folder, soft, store_path):
    store = LabelStore.open(store_path)
    head, text = card(folder)
    for teacher in store.provenance["teachers"]:
        assert (
            f"| `{teacher['model']}` | {teacher['image_size']} | `{teacher['weights']}` |" in text
        )
    assert f"identity `{store.identity.hex()}`, 2 views of 90 images, and the codec `pow8`" in text
    (mine,) = (line for line in passes(soft) if f"those of epoch {line['epoch'] + 1}," in text)
    assert (
        f"{mine['kl']:.4f} nats" in text
        and f"label and student put the same class first | {mine['agreement']:.2f} %" in text
    )
    assert (
        "a random share of 0.08 to 1.0 of the image's area" in text
        and "seed 0; resized with anti-aliasing (bilinear)" in text
    )
    assert (
        "offline, from the stored soft labels of 2 teachers" in text
        and "its pull on the student at most 0.02 of the cross-entropy's gradient." in text
        and "Online" not in text
    )
    assert {"knowledge-distillation", "onnx"} < set(head["tags"]) and "license" not in head
    assert "image-classification" in head["tags"] and "`ant`, `bee`, `cat`" in text


def test_the_card_of_an_unfinished_online_run_without_validation(online, tmp_path):
    result = export(online, tmp_path / "out", onnx=False)
    assert result["val_top1"] is None and (result["epochs_done"], result["epochs"]) == (1, 2)
    text = card(tmp_path / "out")[1]
    assert (
        "has done 1 of 2 epochs and is **not finished**" in text
        and "There was no validation" in text
        and "top-1 |" not in text
    )
    assert (
        "Online: the teachers labelled every batch" in text
        and "Offline" not in text
        and "optimistic" not in text
    )
    assert (
        "Teachers: `test_resnet`, `test_efficientnet`." in text
        and "without a validation the newest counts as the best" in text
    )


def test_the_card_of_imported_labels_says_what_is_unknown_of_them(photos, recipe, tmp_path):
    labels = write_set(tmp_path / "labels" / "imagenet", photos / "train")
    import_labels(labels, photos, tmp_path / "fkd.zarr", teachers=["somebody's b4"])
    train(
        changed(recipe, train={"epochs": 1}),
        photos,
        tmp_path / "run",
        store=tmp_path / "fkd.zarr",
        device=CPU,
    )
    export(tmp_path / "run", tmp_path / "with", onnx=False, store=tmp_path / "fkd.zarr")
    head, text = card(tmp_path / "with")
    assert (
        "| `somebody's b4` | unknown | unknown |" in text
        and "made by others and imported (`fkd` label files" in text
    )
    assert (
        "How the crops were drawn isn't known" in text
        and "a random share" not in text
        and "mean softmax" not in text
    )
    assert "meal-v2" not in head["tags"]
    export(tmp_path / "run", tmp_path / "without", onnx=False)
    text = card(tmp_path / "without")[1]
    assert (
        "How the crops were drawn, the label store tells." in text and "a random share" not in text
    )


def test_how_many_images_were_validated_is_said_only_if_the_run_tells(copied, tmp_path):
    kept = dict(np.load(copied / "validation-images.npz"))
    # Another start of the run found two images less.
    with open(copied / "validation-images.npz", "wb") as file:
        np.savez(file, **kept | {"bytes": kept["bytes"][:-2]})
    for out in ("other", "none"):
        assert export(copied, tmp_path / out, onnx=False)["validation_images"] is None
        assert (
            "% | the validation images |" in card(tmp_path / out)[1]
            and "21 validation" not in card(tmp_path / out)[1]
        )
        (copied / "validation-images.npz").unlink(missing_ok=True)


def test_this_tools_own_evaluation_of_the_folder_finds_the_figures_of_the_card(
    hard, photos, tmp_path
):
    result = export(hard, tmp_path / "out", onnx=False)
    said = CliRunner().invoke(
        main,
        [
            "eval",
            f"--data={photos}",
            f"--model=local-dir:{tmp_path / 'out'}",
            "--device=cpu",
            "--json",
        ],
    )
    assert json.loads(said.stdout)["models"][0]["top1"] == result["val_top1"]


def test_an_older_checkpoint_has_no_class_names_but_its_store_does(soft, store_path, tmp_path):
    run = Path(shutil.copytree(soft, tmp_path / "run"))
    described = RunFolder(run).header("best")
    for key in ("class_names", "teachers"):
        del described[key]
    save_file(
        load_file(run / "best.safetensors"),
        run / "best.safetensors",
        metadata={"meal_v2": json.dumps(described)},
    )
    assert not export(run, tmp_path / "alone", onnx=False)["class_names"]
    assert "label_names" not in (tmp_path / "alone" / "config.json").read_text()
    text = card(tmp_path / "alone")[1]
    assert (
        "the checkpoint doesn't name them" in text
        and "doesn't say who the teachers were" in text
        and "label_names" not in text
    )
    assert export(run, tmp_path / "with", onnx=False, store=store_path)["class_names"]
    assert (
        "`ant`, `bee`, `cat`" in card(tmp_path / "with")[1]
        and "labels of 2 teachers" in card(tmp_path / "with")[1]
    )


def other_store(run: Path, scratch: Path, store: Path, *_: object) -> dict:
    made = shutil.copytree(store, scratch / "other.zarr")
    edit_store(made, lambda attributes: attributes["provenance"]["crops"].update(seed=1))
    return {"store": made}


def without(name: str) -> object:
    return lambda run, *_: (run / name).unlink()


def cut_short(run: Path, *_: object) -> None:
    os.truncate(run / "best.safetensors", 5_000)


def foreign(run: Path, *_: object) -> None:
    save_file(load_file(run / "best.safetensors"), run / "best.safetensors")


def redone(run: Path, *_: object) -> None:
    """Change the metrics as if the best epoch had been done again with another end,
    while the best weights are of its first try."""
    lines = [line | {"val_top1": line["val_top1"] / 2} for line in passes(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def ahead_of_its_metrics(run: Path, *_: object) -> None:
    shutil.copy(run / "last.safetensors", run / "best.safetensors")
    (run / "metrics.jsonl").write_text(json.dumps(passes(run)[0]) + "\n")


def garbled(run: Path, *_: object) -> None:
    (run / "metrics.jsonl").write_text('{"epoch": 0')


def occupied(run: Path, scratch: Path, *_: object) -> None:
    (scratch / "out").mkdir()
    (scratch / "out" / "notes.txt").write_text("mine")


def a_file(run: Path, scratch: Path, *_: object) -> None:
    (scratch / "out").write_text("mine")


def nearly(run: Path, scratch: Path, store: Path, patch: pytest.MonkeyPatch) -> dict:
    """Make ONNX Runtime's logits off by a thousandth."""
    patch.setattr(onnx_module, "translate", lambda *_: {})
    patch.setattr(
        onnx_module,
        "run_onnx",
        lambda _, inputs: [
            student(run, "test_resnet")(x).detach() + torch.tensor([1e-3, 0, 0]) for x in inputs
        ],
    )
    return {"onnx": True}


def not_finite(run: Path, scratch: Path, store: Path, patch: pytest.MonkeyPatch) -> dict:
    patch.setattr(onnx_module, "translate", lambda *_: {})
    patch.setattr(
        onnx_module,
        "run_onnx",
        lambda _, inputs: [torch.full((len(x), 3), torch.nan) for x in inputs],
    )
    return {"onnx": True}


def untranslatable(run: Path, scratch: Path, store: Path, patch: pytest.MonkeyPatch) -> dict:
    def translate(*_: object) -> None:
        (scratch / ".out.partial" / "model.onnx").write_bytes(b"half")
        raise RuntimeError("report this") from ValueError("what it\nreally is")

    patch.setattr(onnx_module, "translate", translate)
    return {"onnx": True}


def missing_package(run: Path, scratch: Path, store: Path, patch: pytest.MonkeyPatch) -> dict:
    patch.setitem(sys.modules, "onnxscript", None)
    return {"onnx": True}


def other_timm(run: Path, scratch: Path, store: Path, patch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def untrained(name: str, **options: object) -> torch.nn.Module:
        return create(
            name,
            **{
                **options,
                "pretrained": not name.startswith("local-dir:")
                and options.get("pretrained", False),
            },
        )

    patch.setattr(timm, "create_model", untrained)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (
            without("config.yaml"),
            "is no run of train-student (it has no config.yaml); check the path",
        ),
        (without("metrics.jsonl"), "(it has no metrics.jsonl)"),
        (
            without("best.safetensors"),
            "best.safetensors; check the path, or run train-student again",
        ),
        (cut_short, "best.safetensors is damaged ("),
        (foreign, "was not written by train-student (its header doesn't say its model)"),
        (garbled, "metrics.jsonl is damaged ("),
        (
            ahead_of_its_metrics,
            "of which metrics.jsonl has no figures; run the same train-student command again",
        ),
        (redone, "of which metrics.jsonl has other figures"),
        (other_store, "; pass that store, or leave --store out"),
        (occupied, "out is not empty; choose another --out"),
        (a_file, "out is a file; choose another --out"),
        (nearly, " in total variation, more than 0.0001; pass --no-onnx"),
        (not_finite, "is off by nan in total variation"),
        (untranslatable, "test_resnet can't be made into ONNX (what it really is); pass --no-onnx"),
        (missing_package, '; install "offline-meal-v2[export]", or leave it out with --no-onnx'),
        (other_timm, "again of what it saved (its outputs differ); use the checkpoint as it is"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing(
    copied, store_path, tmp_path, monkeypatch, prepare, says
):
    options = {"onnx": False} | (prepare(copied, tmp_path, store_path, monkeypatch) or {})
    before = tree(tmp_path)
    with pytest.raises(MealError) as refused:
        export(copied, tmp_path / "out", **options)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert tree(tmp_path) == before and (tmp_path / "out").exists() == (
        prepare in (occupied, a_file)
    )
    assert not [name for name in os.listdir(tmp_path) if "claims" in name or "partial" in name]


def test_stopped_in_the_middle_it_leaves_nothing(hard, tmp_path, monkeypatch):
    monkeypatch.setattr(export_student, "write_onnx", stop)
    with pytest.raises(KeyboardInterrupt):
        export(hard, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_killed_in_the_middle_it_leaves_no_folder_and_does_not_hinder_the_next(hard, tmp_path):
    code = (
        "import os, sys; from pathlib import Path; "
        "from pipeline.exchange import export_student as export\n"
        "export.require_onnx = lambda: None\n"
    )
    code += (
        "export.write_onnx = lambda *_: os.kill(os.getpid(), "
        "9)\nexport.export(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, hard, tmp_path / "out"], cwd=ROOT, capture_output=True
    )
    assert (
        killed.returncode == -9
        and not (tmp_path / "out").exists()
        and len(os.listdir(tmp_path)) == 2
    )
    (tmp_path / "out").mkdir()  # an empty folder may be there
    export(hard, tmp_path / "out", onnx=False)
    assert os.listdir(tmp_path) == ["out"]


def test_an_export_by_two_at_once_is_refused(hard, tmp_path, monkeypatch):
    write = timm_export.save_for_timm

    def twice(*arguments: object) -> None:
        with pytest.raises(ExportError, match="another process is exporting to"):
            export(hard, tmp_path / "out", onnx=False)
        write(*arguments)

    monkeypatch.setattr(export_student, "save_for_timm", twice)
    export(hard, tmp_path / "out", onnx=False)


def test_a_run_that_goes_on_meanwhile_is_not_mixed_up(copied, tmp_path, monkeypatch):
    loading = weights_module.load

    def and_train(spec: ModelSpec) -> object:
        model = loading(spec)
        checkpoint.save_model(
            copied / "best.safetensors", model, {**RunFolder(copied).header("best"), "epoch": 7}
        )
        return model

    monkeypatch.setattr(export_student, "load", and_train)
    with pytest.raises(ExportError, match="was written anew while it was read"):
        export(copied, tmp_path / "out", onnx=False)


def test_the_command_says_what_it_wrote(hard, store_path, tmp_path):
    def run(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, ["export", *map(str, arguments)])
        return result.exit_code, result.stdout, result.stderr

    status, out, _ = run(hard, "--out", tmp_path / "a", "--no-onnx")
    assert status == 0 and "local-dir:" in out and "the model card" in out
    status, out, err = run(
        hard, "--out", tmp_path / "b", "--no-onnx", "--weights", "last", "--json"
    )
    assert (
        status == 0
        and json.loads(out)["onnx"] is None
        and json.loads(out)["epoch"] == 1
        and err == ""
    )
    status, out, err = run(hard, "--out", tmp_path / "c", "--no-onnx", "--store", store_path)
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1
