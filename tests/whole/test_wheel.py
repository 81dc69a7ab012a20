"""An installed wheel works without the folder that it was built from: every module, the
recipes, the templates, the command."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from configparser import ConfigParser
from pathlib import Path

import pytest
from support.paths import ROOT

OURS = ("cache", "configs", "pipeline")


def sources() -> list[Path]:
    """List the program's Python files, relative to the root."""
    return [
        Path("cli.py"),
        *(path.relative_to(ROOT) for wing in OURS for path in sorted((ROOT / wing).rglob("*.py"))),
    ]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with a wheel of the project and the running
    environment's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("cli.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for wing in OURS:
        shutil.copytree(ROOT / wing, copy / wing, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy],
        check=True,
    )
    shutil.rmtree(copy)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "fresh"], check=True)
    python = folder / "fresh" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True
    )
    (packages,) = (folder / "fresh" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_every_module_is_in_the_wheel_and_can_be_imported(installed: Path, tmp_path: Path):
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sources()]
    assert "pipeline.demo" in modules and "cache.reader" in modules
    code = (
        f"import importlib\nfor name in {modules!r}: print(importlib.import_module(name).__file__)"
    )
    said = subprocess.run([installed, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.splitlines()) == len(modules)
    assert all(line.startswith(str(installed.parents[1])) for line in said.stdout.splitlines())


def test_every_recipe_and_template_is_in_the_wheel(installed: Path):
    (packages,) = installed.parents[1].glob("lib/python*/site-packages")
    for wing in OURS:
        kept = {
            path.relative_to(ROOT)
            for path in (ROOT / wing).rglob("*")
            if path.is_file() and path.parent.name != "__pycache__"
        }
        assert all((packages / path).read_bytes() == (ROOT / path).read_bytes() for path in kept)
    assert len(list((packages / "configs").glob("*.yaml"))) > 10


def test_the_installed_command_runs_and_finds_recipes_by_name(installed: Path, tmp_path: Path):
    command = installed.parent / "offline-meal-v2"
    said = subprocess.run([command, "demo", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0 and "Train two teachers" in said.stdout, said.stderr
    code = (
        "from pipeline.config_file import load; print(load('meal_v2_resnet50').student.model, "
        "load('demo_digits').train.epochs)"
    )
    said = subprocess.run([installed, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.startswith("resnet50"), said.stderr
    said = subprocess.run(
        [command, "generate-labels", "--config", "meal_v2_resnet5", "--plan"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        said.returncode == 1
        and "did you mean meal_v2_resnet50?" in said.stderr
        and said.stderr.count("\n") == 1
    )


def test_every_package_that_is_imported_is_declared():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    optional = "".join(extras[name] for name in ("export", "parquet", "ray", "remote", "track"))
    needed = config["options"]["install_requires"] + optional
    declared = {re.match(r"[\w.-]+", line)[0].lower() for line in needed.split()}
    of = importlib.metadata.packages_distributions()
    for path in sources():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (
                {name.partition(".")[0] for name in names}
                - sys.stdlib_module_names
                - {*OURS, "cli"}
            ):
                assert declared & {other.lower() for other in of[name]}, (
                    f"{path} imports {name}, which setup.cfg doesn't declare"
                )
