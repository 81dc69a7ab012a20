"""Imports run down the floors, no list of parameters is long, the store needs numpy and
zarr only, and no test leans on another."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

# From the ground up. Wings of one floor know nothing of each other.
FLOORS = (
    ("cache",),
    ("config",),
    ("config_file",),
    ("runtime", "sampling"),
    ("models", "render"),
    ("images", "runs"),
    ("provenance", "evaluation"),
    ("loading",),
    ("labelling", "training", "inspection", "exchange"),
    ("demo",),
    ("cli",),
)
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
MOST = 7  # parameters of a function, but for click's commands
SOURCES = [
    path.relative_to(ROOT)
    for path in (
        ROOT / "cli.py",
        *(ROOT / "cache").rglob("*.py"),
        *(ROOT / "pipeline").rglob("*.py"),
    )
]


def wing_of(module: str) -> str:
    """Return the wing of a module of ours, or the module's name if it lies directly in
    pipeline/."""
    first, *rest = module.split(".")
    return first if first != "pipeline" else rest[0] if rest else "pipeline"


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            yield from (f"pipeline.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def running_up(path: Path, modules: Iterator[str]) -> list[str]:
    """List the modules of ours that a file may not import."""
    own = wing_of(".".join(path.with_suffix("").parts))
    others = [module for module in modules if module.split(".")[0] in ("cache", "pipeline", "cli")]
    return [m for m in others if wing_of(m) != own and FLOOR[wing_of(m)] >= FLOOR[own]]


def test_imports_run_down_the_floors_only():
    assert len(SOURCES) > 80
    for path in SOURCES:
        if path.name != "__init__.py" or path.parent.name == "cache":
            assert running_up(path, imported(path)) == [], path


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("cache/reader.py", "pipeline.config"),
        ("pipeline/labelling/plan.py", "pipeline.training.train"),
        ("pipeline/render/dali.py", "pipeline.images.scan"),
    ],
)
def test_an_import_that_runs_up_would_be_seen(file, module):
    assert running_up(Path(file), iter([module])) == [module]


def test_every_wing_is_a_package_and_has_a_floor():
    wings = {
        path.parts[1] for path in SOURCES if path.parts[0] == "pipeline" and len(path.parts) > 2
    }
    for wing in wings:
        assert (ROOT / "pipeline" / wing / "__init__.py").is_file() and wing in FLOOR
    files = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}
    assert wings | files | {"cache", "cli"} == set(FLOOR)


def test_the_label_store_needs_numpy_and_zarr_only():
    """One file talks to the hub, with a library that only stores of the hub need."""
    for path in SOURCES:
        if path.parts[0] == "cache":
            names = {module.split(".")[0] for module in imported(path)}
            own = {"cache", "numpy", "zarr"}
            if path == Path("cache/hub/client.py"):
                own.add("huggingface_hub")
            assert names - sys.stdlib_module_names <= own, path
    code = "import sys, cache; print([n for n in sys.modules if n.startswith('huggingface')])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "[]\n", said.stderr


def test_two_files_know_dali():
    knowing = [
        path.name for path in SOURCES if any("nvidia" in module for module in imported(path))
    ]
    assert knowing == ["dali.py", "dali_resize.py"]


def long_lists(text: str) -> list[str]:
    """List the functions with too many parameters."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            if len([name for name in names if name not in ("self", "cls")]) > MOST:
                found.append(node.name)
    return found


def test_no_function_takes_more_than_seven_parameters_but_commands():
    from cli import main

    commands = {command.callback.__name__ for command in main.commands.values()}
    for path in SOURCES:
        assert set(long_lists((ROOT / path).read_text())) <= commands, path
    for path in (ROOT / "tests").rglob("*.py"):
        assert long_lists(path.read_text()) == [], path
    assert long_lists("def long(a, b, c, d, e, f, *, g, h): ...") == ["long"]


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        tests = [module for module in imported(path) if module.split(".")[0].startswith("test_")]
        assert tests == [] and "conftest" not in imported(path), path
