"""The Dockerfile can be built from a checkout, as far as that can be told without
Docker, and its context holds what it copies."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from support.paths import ROOT

TEXT = (ROOT / "Dockerfile").read_text()
STEPS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"\\\n\s*", "", TEXT).splitlines()
    if line and not line.startswith("#")
]


def setup() -> ConfigParser:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def copied() -> list[str]:
    """List what the Dockerfile copies, relative to the root."""
    return [
        Path(name).as_posix() for do, what in STEPS if do == "COPY" for name in what.split()[:-1]
    ]


def in_context(path: str) -> bool:
    """Return whether .dockerignore lets a path into the context: the last rule that
    matches the path or a folder above it decides."""
    kept = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.lstrip("!").removeprefix("**/")
            parts = Path(path).parts
            above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
            names = parts if rule.startswith("**/") else above
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                kept = rule.startswith("!")
    return kept


def test_everything_that_is_copied_exists_and_is_in_the_context():
    assert len(copied()) > 5
    for name in copied():
        assert (ROOT / name).exists() and in_context(name), name


def test_the_image_has_every_file_of_the_program_and_nothing_that_is_not_its_own():
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout of git")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    wings = [pattern.rstrip("*") for pattern in setup()["options.packages.find"]["include"].split()]
    needed = {"cli.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"}
    needed |= {name for name in listed if name.split("/")[0] in wings}
    inside = {name for name in listed if in_context(name)}
    assert inside == needed
    assert {name.split("/")[0] for name in needed} == set(copied())
    for other in (".git/HEAD", ".venv/bin/python", "labels.zarr/zarr.json", "tests/conftest.py"):
        assert not in_context(other)
    assert not in_context("cache/__pycache__/reader.cpython-311.pyc")


def test_the_extras_that_are_installed_exist():
    extras = setup()["options.extras_require"]
    (default,) = re.findall(r"^ARG EXTRAS=(\S+)$", TEXT, flags=re.M)
    assert set(default.split(",")) <= set(extras) and ".[${EXTRAS}]" in TEXT
    for text in (ROOT / "pipeline").rglob("*.md"):
        for named in re.findall(r"EXTRAS=(\S+)", text.read_text()):
            assert set(named.split(",")) <= set(extras), text


def test_requirements_are_installed_before_the_code_is_copied_and_the_command_is_the_programs():
    does = [f"{do} {what}" for do, what in STEPS]
    requirements = next(n for n, step in enumerate(does) if "pip install" in step)
    code = next(n for n, step in enumerate(does) if step.startswith("COPY pipeline"))
    own = next(n for n, step in enumerate(does) if "--no-deps" in step)
    assert requirements < code < own
    (entry,) = (json.loads(what) for do, what in STEPS if do == "ENTRYPOINT")
    (script,) = setup()["options.entry_points"]["console_scripts"].split("=")[:1]
    assert entry == [script.strip()]
    (base,) = (what for do, what in STEPS if do == "FROM")
    least = re.search(r">=\s*(\S+)", setup()["options"]["python_requires"])[1]
    assert base == f"python:{least}-slim"


def test_the_command_runs_without_rights_in_a_home_that_can_be_written():
    user = next(n for n, (do, _) in enumerate(STEPS) if do == "USER")
    assert not STEPS[user][1].startswith(("0", "root"))
    (home,) = re.findall(r"HOME=(\S+)", dict(STEPS)["ENV"])
    opened = " ".join(what for do, what in STEPS[:user] if do == "RUN")
    assert re.search(rf"chmod 1777 .*{home}\b", opened)
    assert all(do not in ("RUN", "COPY") for do, _ in STEPS[user:])
