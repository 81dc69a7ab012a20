"""The benchmark works; what it says of speed is no matter of a test."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

SPEED = Path(__file__).parent / "bench" / "speed.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SPEED), *arguments], capture_output=True, text=True, timeout=300)


def test_every_ratio_is_measured_and_written(tmp_path):
    measured = ("teachers", "stand-in", "student", "online", "loader", "labels")  # compiling takes a minute
    done = run("--small", "--repeats=1", f"--out={tmp_path / 'speed.json'}", "--only", *measured)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads((tmp_path / "speed.json").read_text())
    assert document["machine"]["cores"] >= 1
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert len(figures) == 12
    assert all(math.isfinite(ratio) and ratio > 0 for figure in figures.values() for ratio in figure["ratios"])
    for name in figures:
        assert f"| {name} |" in done.stdout


def test_a_measurement_that_is_not_there_is_refused_in_a_line():
    done = run("--only", "stage two", "stage three")
    assert done.returncode == 2
    assert "--only stage three: no measurement has that in its name; there are stage one, teachers, " in done.stderr.splitlines()[-1]
