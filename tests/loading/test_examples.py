"""The examples of the README train: each is run as it is written, with a small store in
place of ImageNet's, and shows a new view in every epoch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

from pipeline.loading import StoredCrops

README = ROOT / "pipeline" / "loading" / "README.md"
EXAMPLES = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", README.read_text(), re.M | re.S)
)
SMALL = {
    "resnet50": "test_resnet",
    "image_size=224": "image_size=32",
    "256": "16",
    "180": "2",
    "workers=8": "workers=1",
    "classes=1000": "classes=3",
    "warmup_epochs=5": "warmup_epochs=1",
}
NEEDS = {"Lightning": "pytorch_lightning", "Hugging Face Trainer": "transformers"}


def test_every_trainer_has_its_example_of_thirty_lines_at_most():
    assert list(EXAMPLES) == ["PyTorch", "timm", "Lightning", "Hugging Face Trainer"]
    for name, text in EXAMPLES.items():
        assert len(text.splitlines()) <= 35, name
        assert len([line for line in text.splitlines() if line.strip()]) <= 30, name


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_and_shows_a_new_view_in_every_epoch(
    name, photos, store_path, tmp_path, monkeypatch
):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    text = EXAMPLES[name]
    for large, small in SMALL.items():
        text = text.replace(large, small)
    text = text.replace("labels.zarr", str(store_path)).replace('"imagenet"', f'"{photos}"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    losses: list[tuple[int, float]] = []
    datasets: list[StoredCrops] = []
    made, backward = StoredCrops.__init__, torch.Tensor.backward

    def begun(dataset: StoredCrops, *given: object, **options: object) -> None:
        datasets.append(dataset)
        made(dataset, *given, **options)

    def stepped(loss: torch.Tensor, *given: object, **options: object) -> None:
        losses.append((datasets[-1].view, float(loss.detach())))
        backward(loss, *given, **options)

    monkeypatch.setattr(StoredCrops, "__init__", begun)
    monkeypatch.setattr(torch.Tensor, "backward", stepped)
    exec(compile(text, str(Path(tmp_path, "example.py")), "exec"), {"__name__": "__main__"})
    steps = -(-90 // 16)
    assert [view for view, _ in losses] == [0] * steps + [1] * steps
    assert all(torch.tensor([loss for _, loss in losses]).isfinite())
