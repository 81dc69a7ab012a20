"""The Dockerfile's parts are there, and the shell completes the command."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
COMMAND = SETUP["options.entry_points"]["console_scripts"].split("=")[0].strip()


def steps() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, each with what follows it."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def kept() -> list[str]:
    """Return what .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return [line[1:] for line in lines if line.startswith("!")]


def test_the_image_holds_what_is_installed_and_no_more():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in kept():
        assert any(file == name or file.startswith(f"{name}/") for file in tracked), name
    folders = {f"{line.strip().rstrip('*')}" for line in
               SETUP["options.packages.find"]["include"].split()}  # fmt: skip
    modules = {f"{name}.py" for name in SETUP["options"]["py_modules"].split()}
    read = {"setup.cfg", "pyproject.toml", "README.md", SETUP["metadata"]["license_files"]}
    assert set(kept()) == folders | modules | read


def test_the_steps_name_files_extras_and_the_command_that_exist():
    done = steps()
    extras = next(value for step, value in done if step == "ARG").partition("=")[2].split(",")
    assert set(extras) <= set(SETUP["options.extras_require"])
    for step, value in done:
        if step == "COPY":
            assert all(name == "." or name in kept() for name in shlex.split(value)[:-1])
    assert json.loads(dict(done)["ENTRYPOINT"]) == [COMMAND]
    least = SETUP["options"]["python_requires"].removeprefix(">=")
    assert done[0] == ("FROM", f"python:{least}-slim")


def test_the_packages_are_installed_before_the_code_is_there(tmp_path):
    """A change of the code leaves the layer of packages as it is: setup.cfg alone tells
    pip what to fetch."""
    names = next(value for step, value in steps() if step == "COPY").split()[:-1]
    assert "." not in names
    for name in names:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    touched = re.search(r"touch ([^&]*) && pip install", "\n".join(v for _, v in steps()))
    for name in touched[1].split():
        (tmp_path / name).touch()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            "out",
            ".",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [file.suffix for file in (tmp_path / "out").iterdir()] == [".whl"]


# Completion.


def line_for(shell: str) -> str:
    """Return the line of configs/README.md that makes a shell complete the command."""
    (line,) = re.findall(
        rf"^    (.*=?{shell}_source.*)$", (ROOT / "configs/README.md").read_text(), re.M
    )
    return line


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with the command of this checkout."""
    script = tmp_path / COMMAND
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def completed(path: str, words: str) -> list[str]:
    """Return how bash completes the last word."""
    *_, last = split = words.split(" ")
    script = f"""
{line_for("bash")}
COMP_WORDS=({" ".join(shlex.quote(word) for word in split)})
COMP_CWORD={len(split) - 1}
COMP_LINE={shlex.quote(words)}
COMP_POINT={len(words)}
$(complete -p {COMMAND} | sed 's/.*-F \\([^ ]*\\).*/\\1/') {COMMAND} {shlex.quote(last)} x
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("train-st", ["train-student"]),
        ("train-student --st", ["--store", "--student"]),
        ("generate-labels --vie", ["--views"]),
        ("eval --dev", ["--device"]),
    ],
)
def test_bash_completes_commands_and_options(path, words, wanted):
    assert completed(path, f"{COMMAND} {words}") == wanted


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_their_script(path, shell):
    script = re.search(r"_\w+=\w+ [\w-]+", line_for(shell))[0]
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert {"zsh": "compdef", "fish": "complete --no-files"}[shell] in done.stdout, done.stderr
