"""The benchmarks work; what it says of speed is no matter of a test."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent / "bench"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(BENCH / name), *arguments], capture_output=True, text=True, timeout=300)


def test_every_ratio_is_measured_and_written(tmp_path):
    measured = ("teachers", "stand-in", "student", "online", "loader", "labels")  # compiling takes a minute
    done = run("speed.py", "--small", "--repeats=1", f"--out={tmp_path / 'speed.json'}", "--only", *measured)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads((tmp_path / "speed.json").read_text())
    assert document["machine"]["cores"] >= 1
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert len(figures) == 12
    assert all(math.isfinite(ratio) and ratio > 0 for figure in figures.values() for ratio in figure["ratios"])
    for name in figures:
        assert f"| {name} |" in done.stdout


def test_a_measurement_that_is_not_there_is_refused_in_a_line():
    done = run("speed.py", "--only", "stage two", "stage three")
    assert done.returncode == 2
    assert "--only stage three: no measurement has that in its name; there are stage one, teachers, " in done.stderr.splitlines()[-1]


def test_every_step_of_growth_is_measured_and_written(tmp_path):
    done = run("scale.py", "--largest=3", f"--out={tmp_path / 'scale.json'}", f"--folder={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads((tmp_path / "scale.json").read_text())
    steps = document["sizes"]["10^3"]["steps"]
    assert {"open", "manifest", "resume", "epoch", "inspect", "verify", "grow"} <= set(steps)
    assert all(step["cpu_ns"] > 0 for step in steps.values())
