"""A real bash completes the installed command's words."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
ASK = """
source <(_OFFLINE_MEAL_V2_COMPLETE=bash_source offline-meal-v2)
complete -p offline-meal-v2 >/dev/null || exit 3
compopt() { :; }  # works within a completion alone
COMP_WORDS=(@@); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_offline_meal_v2_completion offline-meal-v2
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command, as an installation makes it, and some files."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "bin").mkdir()
    script = folder / "bin" / "offline-meal-v2"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from cli import main\nmain(prog_name='offline-meal-v2')\n"
    )
    script.chmod(0o755)
    (folder / "smoke_mine.yaml").touch()
    (folder / "other.yaml").touch()
    return folder


def completed(place: Path, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK.replace("@@", shlex.join(["offline-meal-v2", *words]))],
        cwd=place,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("tr",), ["train-student"]),
        (("train-student", "--st"), ["--store", "--student"]),
        (("train-student", "--track", "w"), ["wandb"]),
        (("train-student", "--track", ""), ["wandb", "mlflow"]),
        (("train-student", "--device", "c"), ["cpu", "cuda"]),
        (("train-student", "--config", "meal_v2_resnet1"), ["meal_v2_resnet18"]),
        (("train-student", "--config", "smoke"), ["smoke_cpu", "smoke_mine.yaml"]),
        (("train-student", "--config", "oth"), []),  # bash itself completes files
        (("train-student", "--out", "smo"), []),
    ],
)
def test_bash_completes(place, words, expected):
    assert completed(place, *words) == expected


def test_the_lines_of_the_page_are_those_of_click(place):
    """Each shell's line on the page prints a script of that shell."""
    page = (ROOT / "configs" / "README.md").read_text()
    for shell, sign in (("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete ")):
        assert f"_OFFLINE_MEAL_V2_COMPLETE={shell}_source offline-meal-v2" in page
        done = subprocess.run(
            [place / "bin" / "offline-meal-v2"],
            env={**os.environ, "_OFFLINE_MEAL_V2_COMPLETE": f"{shell}_source"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and sign in done.stdout and "offline-meal-v2" in done.stdout
