"""The benchmarks work. Their speeds are no matter of a test."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.bucket_server import weed
from support.paths import ROOT

BENCH = ROOT / "tests" / "bench"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCH / name), *arguments], capture_output=True, text=True, timeout=300
    )


def test_every_ratio_is_measured_and_written(tmp_path):
    # all but the compiled teacher, since compiling takes a minute
    measured = ("teachers", "stand-in", "student", "online", "loader", "labels")
    done = run(
        "speed.py",
        "--small",
        "--repeats=1",
        f"--out={tmp_path / 'speed.json'}",
        "--only",
        *measured,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads((tmp_path / "speed.json").read_text())
    assert document["machine"]["cores"] >= 1
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert len(figures) == 25
    assert all(
        math.isfinite(ratio) and ratio > 0
        for figure in figures.values()
        for ratio in figure["ratios"]
    )
    for name in figures:
        assert f"| {name} |" in done.stdout


def test_a_measurement_that_is_not_there_is_refused_in_a_line():
    done = run("speed.py", "--only", "stage two", "stage three")
    assert done.returncode == 2
    assert (
        "--only stage three: no measurement has that in its name; there are stage one, teachers, "
        in done.stderr.splitlines()[-1]
    )


def test_every_step_of_growth_is_measured_and_written(tmp_path):
    done = run(
        "scale.py", "--largest=3", f"--out={tmp_path / 'scale.json'}", f"--folder={tmp_path}"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads((tmp_path / "scale.json").read_text())
    steps = document["sizes"]["10^3"]["steps"]
    assert {"open", "manifest", "resume", "epoch", "inspect", "verify", "grow"} <= set(steps)
    assert all(step["cpu_ns"] > 0 for step in steps.values())


def test_reading_and_starting_are_measured_for_every_source(tmp_path):
    done = run("sources.py", "--small", f"--out={tmp_path / 'sources.json'}")
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads((tmp_path / "sources.json").read_text())
    assert {"class folders", "tar files", "parquet, as it is"} <= set(document["reading"])
    assert all(min(took.values()) > 0 for took in document["reading"].values())
    assert len(document["starting"]) == 4
    if weed():
        assert len(document["remote"]) == 6 and min(document["remote"].values()) > 0


def test_workers_that_share_a_store_are_measured(tmp_path):
    done = run(
        "workers.py",
        "--workers=3",
        "--units=11",
        "--seconds=0.001",
        f"--out={tmp_path / 'workers.json'}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "workers.json").read_text())["rows"]
    assert {(row["shares"], row["speeds"]) for row in rows} == {
        (shares, speeds) for shares in ("fixed", "open") for speeds in ("even", "uneven")
    }
    assert all(row["ratio"] > 1 and row["claims_ms_per_shard"] > 0 for row in rows)


# ---- make gpu


def prove(*arguments: str) -> subprocess.CompletedProcess:
    return run("gpu/prove.py", *arguments)


def test_what_is_proven_and_measured_on_a_gpu_is_on_a_cpu_too(tmp_path):
    done = prove("--device=cpu", f"--out={tmp_path / 'gpu.json'}")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["card"] == "cpu" and "everything that was measured is as wanted" in done.stdout
    groups = {finding["group"] for finding in document["findings"]}
    assert groups == {"pixels", "labels", "ranks", "stage one", "stage two", "decoding", "teachers"}
    found = {finding["what"]: finding for finding in document["findings"]}
    judged = [finding for finding in found.values() if finding["holds"] is not None]
    assert len(judged) == 14 and all(finding["holds"] for finding in judged)
    assert (
        found["labels in float32, largest total variation"]["found"]
        == 0
        < found["labels in float16, largest total variation"]["found"]
    )
    assert 0 < found["first gradient in bfloat16, off the CPU's"]["found"] < 0.1
    assert found["loss of two processes beside one's, test_vit (gloo, a CPU)"]["detail"]["two"] > 1
    for what in found:
        assert f"| {what} | " in done.stdout


def test_a_group_that_hangs_costs_its_own_time_and_keeps_what_it_found(tmp_path, monkeypatch):
    gpu = gpu_tools(monkeypatch)
    into = tmp_path / "found.jsonl"
    script = (
        f'import time; open({str(into)!r}, \'w\').write(\'{{"what": "one"}}\\n{{"what": '
        f"\"half'); time.sleep(60)"
    )
    assert gpu.run([sys.executable, "-c", script], into, 2.0) == (
        [{"what": "one"}],
        "it was stopped after 2 s",
    )
    assert gpu.run(
        [sys.executable, "-c", "import os; os.abort()"], tmp_path / "no.jsonl", 20.0
    ) == ([], "it ended with status -6")


def test_a_bound_that_is_broken_is_a_failure(tmp_path, monkeypatch, capsys):
    """A broken bound is noticed for any kind of number that a measuring process
    returns."""
    gpu = gpu_tools(monkeypatch)
    from finding import at_most

    monkeypatch.setattr(
        gpu,
        "measure",
        lambda name, bench: iter(
            [at_most("labels", np.float32(0.5), 0.1), at_most("pixels", np.int64(0), 0)]
        ),
    )
    monkeypatch.setitem(gpu.GROUPS, "ranks", (("one",), 9))
    monkeypatch.setattr(gpu, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(gpu, "silence", lambda: None)
    gpu.child(["ranks"], tmp_path / "found.jsonl", None)
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [finding["holds"] for finding in found] == [False, True]
    found.append(
        {
            "group": "compiled",
            "what": "compiled",
            "found": gpu.NO_TIME,
            "wanted": "an end",
            "holds": None,
            "detail": {},
        }
    )
    monkeypatch.setattr(gpu, "measured", lambda given, folder: iter(found))
    monkeypatch.setattr(sys, "argv", ["prove.py", "--device=cpu", f"--out={tmp_path / 'gpu.json'}"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    said = capsys.readouterr().out
    assert (
        ended.value.code == 1
        and "| labels | 0.5 | ≤ 0.1 | **NO** |" in said
        and "NOT as wanted: labels; no time was left for compiled" in said
    )


@pytest.mark.parametrize(
    ("said", "found", "good"),
    [
        (
            "tests/test_gpu.py::a PASSED [50%]\ntests/test_gpu.py::b SKIPPED (two GPUs)\n=== 1 "
            "passed, 1 skipped in 4.20s ===\n",
            "1 passed, 1 skipped",
            True,
        ),
        (
            "tests/test_gpu.py::a PASSED\ntests/test_gpu.py::b[x] FAILED\n"
            "=== 1 failed, 1 passed in 4.20s ===\n",
            "1 passed, 1 failed",
            False,
        ),
        (
            "tests/test_gpu.py::a PASSED\ntests/test_gpu.py::b ",
            "1 passed, stopped after 160 s",
            False,
        ),
        ("tests/test_gpu.py::a SKIPPED\n=== 1 skipped in 0.20s ===\n", "1 skipped", False),
        ("", "nothing, stopped after 160 s", False),
    ],
)
def test_what_the_tests_of_a_gpu_said_is_read(tmp_path, monkeypatch, said, found, good):
    gpu = gpu_tools(monkeypatch)
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, stdout, **how: stdout.write(said))
    (finding,) = gpu.tests(gpu.Bench(tmp_path, gpu.torch.device("cpu"), None))
    assert (finding.found, finding.holds) == (found, good)


def test_a_measurement_that_fails_is_told_and_the_next_one_measured(tmp_path, monkeypatch):
    gpu = gpu_tools(monkeypatch)

    def measure(name, bench):
        if name == "bad":
            raise RuntimeError("no room\nfor it")
        yield gpu.Finding("good", 1.0)

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setitem(gpu.GROUPS, "pixels", (("bad", "good"), 9))
    monkeypatch.setattr(gpu, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(gpu, "silence", lambda: None)
    gpu.child(["pixels"], tmp_path / "found.jsonl", None)
    bad, good = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert (
        bad["holds"] is False
        and bad["detail"]["error"] == "RuntimeError: no room for it"
        and good["what"] == "good"
    )


def test_pixels_that_depend_on_the_batch_would_be_seen(tmp_path, monkeypatch):
    gpu = gpu_tools(monkeypatch)
    from pipeline.render.renderer import CropRenderer

    real = CropRenderer.__call__

    def shifty(self, blobs, boxes, flips):
        made = real(self, blobs, boxes, flips)
        made[0][48][0, 3, 3, 0] ^= len(blobs) == 16
        return made

    monkeypatch.setattr(CropRenderer, "__call__", shifty)
    (finding,) = gpu.measure("right.pixels", gpu.Bench(tmp_path, gpu.torch.device("cpu"), None))
    assert finding.holds is False and finding.found == finding.detail["batches of 16"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device=cpu", "--only", "pixel"], "invalid choice: 'pixel'"),
        (
            ["--device=cpu", "--teacher", "resnet50"],
            "'resnet50' must be MODEL=FILE, and FILE must be there",
        ),
        (
            ["--device=cpu", "--photographs", "nowhere"],
            "--photographs nowhere holds no .jpg or .jpeg file",
        ),
        pytest.param(
            [],
            "torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(arguments, says):
    done = prove(*arguments)
    assert (
        done.returncode in (1, 2)
        and says in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )


def gpu_tools(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "gpu"))
    return importlib.import_module("prove")
