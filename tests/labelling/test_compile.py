"""torch.compile makes models faster, outputs stay the same to rounding, and a store
records that its teachers were compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.paths import ROOT
from support.small import CPU, changed
from support.stages import generate, train

from cache import LabelStore, StoreError
from pipeline.config import Config

COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)


@pytest.fixture(scope="module")
def one_teacher(recipe: Config) -> Config:
    exact = changed(recipe, store={"codec": "float32", "compile": True}, crops={"views": 1})
    return exact.model_copy(update={"teachers": recipe.teachers[:1]})


@COMPILER
def test_compiled_teachers_and_a_compiled_student_are_the_same_to_rounding(
    one_teacher, photos, tmp_path
):
    stores = {}
    for compiled in (True, False):
        made = one_teacher.model_copy(
            update={"store": one_teacher.store.model_copy(update={"compile": compiled})}
        )
        stores[compiled] = generate(made, photos, tmp_path / f"{compiled}.zarr", device=CPU)
    rows = slice(0, 90)
    ours, plain = (stores[compiled].probabilities(0, rows) for compiled in (True, False))
    assert np.abs(ours - plain).sum(axis=1).max() / 2 < 1e-4
    assert [t["weights"] for t in stores[True].provenance["teachers"]] == [
        t["weights"] for t in stores[False].provenance["teachers"]
    ]
    assert (
        stores[True].provenance["compute"]["compile"] is True
        and "compile" not in stores[False].provenance["compute"]
    )
    with pytest.raises(
        StoreError, match="compute.compile None, this is True; use the same .* store.compile"
    ):
        generate(one_teacher, photos, tmp_path / "False.zarr", device=CPU)

    for compiled in (True, False):
        how = changed(one_teacher, train={"compile": compiled, "epochs": 1})
        train(how, photos, tmp_path / f"run {compiled}", store=tmp_path / "False.zarr", device=CPU)
    one, other = (
        json.loads((tmp_path / f"run {compiled}" / "metrics.jsonl").read_text())
        for compiled in (True, False)
    )
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4) and one[
        "val_loss"
    ] == pytest.approx(other["val_loss"], rel=1e-3)
    assert LabelStore.open(tmp_path / "True.zarr").progress() == (3, 3)


def test_without_a_compiler_a_line_says_what_to_do(one_teacher, photos, tmp_path):
    (tmp_path / "recipe.yaml").write_text(one_teacher.to_yaml())
    command = [
        "generate-labels",
        "--config",
        tmp_path / "recipe.yaml",
        "--data",
        photos,
        "--store",
        tmp_path / "s.zarr",
        "--device",
        "cpu",
    ]
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PATH": "",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert (
        line.startswith("error: torch.compile fails here (")
        and "leave out store.compile and train.compile" in line
    )
    assert "Traceback" not in done.stderr
