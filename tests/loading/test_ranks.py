"""Several processes that train one student share an epoch's crops, whoever starts them:
torchrun, Lightning, or accelerate under Hugging Face's Trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.bucket_server import free_ports
from support.paths import ROOT

from pipeline.loading import StoredCrops

BEGIN = """
import json, os, sys
import torch
from torch.utils.data import DataLoader
from pipeline.loading import StoredCrops

STORE, DATA, OUT = sys.argv[1:4]

class Numbered(StoredCrops):
    def __getitem__(self, item):
        pixels, label = super().__getitem__(item)
        return pixels, label, torch.tensor([item, self.view])

seen = []

def note(numbers):
    seen.extend(numbers.tolist())

def leave():
    with open(f"{OUT}/{os.environ['RANK']}.json", "w") as file:
        json.dump(seen, file)
"""
SCRIPTS = {
    "torchrun": """
torch.distributed.init_process_group("gloo")
crops = Numbered(STORE, DATA, image_size=8)
loader = DataLoader(crops, 8, sampler=crops.sampler())
for epoch in range(2):
    loader.sampler.set_epoch(epoch)
    for _, _, numbers in loader:
        note(numbers)
leave()
""",
    "Lightning": """
import pytorch_lightning as lightning

class Student(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(192, 3)
    def training_step(self, batch, number):
        note(batch[2])
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1) / 255), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def train_dataloader(self):
        crops = Numbered(STORE, DATA, image_size=8)
        return DataLoader(crops, 8, sampler=crops.sampler())

how = dict(accelerator="cpu", devices=2, strategy="ddp", logger=False)
how |= dict(enable_checkpointing=False, enable_progress_bar=False)
lightning.Trainer(max_epochs=2, **how).fit(Student())
leave()
""",
    "accelerate": """
from transformers import Trainer, TrainingArguments

class Student(Trainer):
    def _get_train_sampler(self, dataset=None):
        return self.train_dataset.sampler(rank=0, world=1)
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        note(inputs["numbers"])
        return torch.nn.functional.cross_entropy(model(inputs["pixels"]), inputs["labels"])

def together(items):
    return dict(zip(("pixels", "labels", "numbers"), map(torch.stack, zip(*items))))

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(192, 3)
    def forward(self, pixels):
        return self.layer(pixels.flatten(1) / 255)

how = dict(use_cpu=True, per_device_train_batch_size=8, num_train_epochs=2, report_to="none")
how |= dict(save_strategy="no", disable_tqdm=True, remove_unused_columns=False)
crops = Numbered(STORE, DATA, image_size=8)
Student(
    Model(), TrainingArguments(OUT, **how), data_collator=together, train_dataset=crops
).train()
leave()
""",
}
NEEDS = {"Lightning": "pytorch_lightning", "accelerate": "transformers"}


@pytest.mark.parametrize("starter", SCRIPTS)
def test_two_processes_share_each_epoch(starter, photos, store_path, tmp_path):
    if starter in NEEDS:
        pytest.importorskip(NEEDS[starter])
    script = tmp_path / "script.py"
    script.write_text(BEGIN + SCRIPTS[starter])
    parts = run_two(script, store_path, photos, tmp_path)
    items = len(StoredCrops(store_path, photos, image_size=8))
    for epoch in range(2):
        mine, theirs = ([item for item, view in part if view == epoch] for part in parts)
        assert len(mine) + len(theirs) - items < 16  # at most one batch is filled up
        assert abs(len(mine) - len(theirs)) <= 8
        assert set(mine) | set(theirs) == set(range(items))
        assert len(set(mine) & set(theirs)) < 16
    first, second = ([item for item, view in parts[0] if view == epoch] for epoch in range(2))
    assert first != second


def run_two(script: Path, store: Path, data: Path, out: Path) -> list[list]:
    """Run two processes as torchrun does. Returns (item, view) of each batch's items,
    for each process."""
    (port,) = free_ports(1)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "test",
        "GROUP_RANK": "0",
    }
    command = [sys.executable, script, store, data, out]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
