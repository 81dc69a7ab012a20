"""Whatever surrounds a command (URLs for paths, closed streams, a umask, a locale,
little memory), it does its work, or says in one line what is wrong."""

from __future__ import annotations

import os
import re
import resource
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import run
from support.paths import ROOT
from support.small import CPU, changed
from support.stages import generate, train

from cache import LabelStore
from cache.create import create
from cache.errors import MealError, StoreError
from cache.merge import merge
from cache.system.local import require_local
from cache.writer import StoreWriter
from pipeline.config import ModelSpec
from pipeline.config_file import validate
from pipeline.runtime.failures import line_of

# ---- URLs

URLS = ["s3://bucket/x", "gs://bucket/x", "s3:/bucket/x", "https://host/x", "nas:/export/x"]
OTHERS = ["s3:/bucket/x", "nas:/export/x", "hf://datasets/x", "ftp://host/x"]
COMMANDS = [
    "generate-labels --config URL --data d --store s",
    "generate-labels --config c --data URL --store s",
    "generate-labels --config c --data d --store URL",
    "generate-labels --config c --data d --store s --class-map URL",
    "generate-labels --config c --data d --store s --teacher m=URL",
    "train-student --config c --data d --store URL --out o",
    "train-student --config c --data d --store s --out URL",
    "train-student --config c --data d --store s --out o --val-data URL",
    "train-student --config c --data d --store s --out o --student m=URL",
    "eval --data URL --model m",
    "eval --data d --model m=URL",
    "eval --data d --model m --teacher m=URL",
    "inspect URL",
    "inspect s --report URL",
    "inspect s --report r --data URL",
    "verify URL",
    "verify s --data URL",
    "compare o URL",
    "compare o --figure URL",
    "export URL --out o",
    "export o --out URL",
    "export o --out e --store URL",
    "merge s URL --out o",
    "merge s s --out URL",
    "import-labels URL --data d --store s",
    "import-labels f --data URL --store s",
    "import-labels f --data d --store URL",
    "export-labels URL --out o",
    "export-labels s --out URL",
    "demo --out URL",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_url_is_refused_wherever_a_path_is_taken_and_nothing_is_made(
    tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    takes_urls = "data URL" in command  # of images, from where they can be fetched
    for url in OTHERS if takes_urls else URLS:
        status, out, err = run(*command.replace("URL", url).split())
        assert (status, out) == (1, "")
        assert err == (
            f"error: {url} is a URL, and only local paths are read and written; copy it to a local "
            f"disk, or mount it there, and name the path\n"
        )
    status, _, err = run(*command.replace("URL", "file:///data/x").split())
    assert status == 1 and err.endswith("; write /data/x instead\n")
    assert not list(tmp_path.iterdir())


def test_a_url_is_refused_in_a_config_and_in_python(
    tmp_path, monkeypatch, recipe, photos, teachers
):
    monkeypatch.chdir(tmp_path)
    url = Path("s3://bucket/x")
    with pytest.raises(
        MealError, match="^test: checkpoint is a URL, and only local.*got 's3://b/c"
    ):
        validate({"model": "m", "checkpoint": "s3://b/c.pth"}, "test", ModelSpec)
    status, _, err = run(
        *("generate-labels", "--config", "smoke_cpu", "--data", photos, "--store", "s"),
        *("--set", "teachers=[{model: test_resnet, checkpoint: s3://b/c.pth}]"),
    )
    assert status == 1 and "teachers.0.checkpoint is a URL" in err
    for call in (
        lambda: LabelStore.open(url),
        lambda: LabelStore.open("s3://bucket/x"),
        lambda: StoreWriter(url),
        lambda: create(url, images=None, views=1, attributes={}),
        lambda: merge([photos, photos], url, say=print, progress=print),
        lambda: generate(recipe, photos, url, device=CPU),
        lambda: train(recipe, photos, url, device=CPU),
        lambda: train(recipe, photos, tmp_path / "o", store=url, device=CPU),
    ):
        with pytest.raises(StoreError, match="s3:/+bucket/x is a URL"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_path_that_only_looks_odd_is_a_path():
    require_local("a:b", Path("c:/x"), "./s3:/bucket", "/s3:/bucket", "x=s3://b", "é:", "", None)


# ---- streams


def shell(line: str, *, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """Run a line of the shell in which CLI is the command line."""
    cli = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'cli.py'))}"
    done = subprocess.run(
        ["bash", "-c", line.replace("CLI", cli)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    return done.returncode, done.stdout, done.stderr


def test_closed_stderr_stops_nothing_and_takes_nothing_to_stdout(
    tmp_path, recipe, photos, store_path
):
    (tmp_path / "recipe.yaml").write_text(changed(recipe, train={"epochs": 1}).to_yaml())
    given = f"--config recipe.yaml --data {photos} --device cpu"
    made = shell(f"CLI generate-labels {given} --store s.zarr 2>&-", cwd=tmp_path)
    assert made == (0, "", "") and LabelStore.open(tmp_path / "s.zarr").progress() == (6, 6)
    trained = shell(f"CLI train-student {given} --store s.zarr --out run 2>&-", cwd=tmp_path)
    assert trained == (0, "", "") and (tmp_path / "run" / "last.safetensors").exists()
    assert shell("CLI inspect nothing 2>&-", cwd=tmp_path) == (1, "", "")
    assert shell("CLI nothing 2>&-", cwd=tmp_path) == (2, "", "")
    assert shell(f"CLI verify {store_path} <&- >&- 2>&-", cwd=tmp_path) == (1, "", "")


@pytest.mark.parametrize("command", ["inspect STORE --json", "verify STORE"])
def test_a_result_that_can_t_be_printed_is_said_in_one_line(tmp_path, store_path, command):
    line = f"CLI {command.replace('STORE', str(store_path))}"
    status, _, err = shell(f"{line} >&-", cwd=tmp_path)
    assert (status, err) == (
        1,
        "error: stdout: Bad file descriptor; mend that and run the same command again\n",
    )
    status, _, err = shell(f"{line} >/dev/full", cwd=tmp_path)
    assert status == 1 and re.fullmatch("error: .*No space left on device; mend that .*\n", err)
    assert shell(f"{line} | head -c 1 >/dev/null", cwd=tmp_path)[2] == ""


def test_help_that_can_t_be_printed_is_said_in_one_line(tmp_path):
    status, _, err = shell("CLI --help >/dev/full", cwd=tmp_path)
    assert status == 1 and re.fullmatch("error: .*No space left on device; mend that .*\n", err)
    assert shell("CLI --help | head -c 1 >/dev/null", cwd=tmp_path)[2] == ""


def test_each_line_of_a_log_is_one_write_since_processes_may_share_the_log():
    """Each packet of a socket is one write. Cluster jobs run Python unbuffered."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        says = "from pipeline.runtime.progress import say; say('one'); say('two')"
        subprocess.run([sys.executable, "-u", "-c", says], cwd=ROOT, stderr=theirs, check=True)
        assert [ours.recv(100), ours.recv(100)] == [b"one\n", b"two\n"]


def test_a_log_on_a_full_disk_stops_no_work(tmp_path, recipe, photos):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    line = f"CLI generate-labels --config recipe.yaml --data {photos} --device cpu --store s.zarr"
    assert shell(f"{line} 2>/dev/full", cwd=tmp_path)[0] == 0
    assert LabelStore.open(tmp_path / "s.zarr").progress() == (6, 6)


@pytest.mark.parametrize(
    ("blocks", "file"), [(400, "last.safetensors"), (1800, "state.pt")], ids=["model", "state"]
)
def test_a_file_of_a_run_that_the_disk_refuses_is_named(
    tmp_path, recipe, photos, store_path, blocks, file
):
    """torch and safetensors raise errors of their own. The limit is of a file's size,
    which needs no disk that is full."""
    (tmp_path / "recipe.yaml").write_text(changed(recipe, train={"epochs": 1}).to_yaml())
    line = (
        f"CLI train-student --config recipe.yaml --data {photos} --device cpu "
        f"--store {store_path} --out run"
    )
    status, _, err = shell(f"ulimit -f {blocks}; {line}", cwd=tmp_path)
    assert status == 1 and "Traceback" not in err
    assert re.fullmatch(
        f"error: .*/run/{re.escape(file)}: .*; mend that and run the same command again",
        err.splitlines()[-1],
    )
    status, _, err = shell(line, cwd=tmp_path)
    assert status == 0 and "epoch 1/1" in err


def test_a_current_folder_that_is_gone_is_said(tmp_path, store_path):
    status, _, err = shell(f"mkdir g; cd g; rmdir ../g; CLI inspect {store_path}", cwd=tmp_path)
    assert (status, err.startswith("error: the current folder is gone; cd to another")) == (1, True)


def test_the_root_of_a_disk_is_no_store_and_no_run(recipe, photos):
    for call in (generate, train):
        with pytest.raises(MealError, match="^/ has no name of its own; name a folder in it"):
            call(changed(recipe, train={"labels": "hard"}), photos, Path("/"), device=CPU)


# ---- permissions


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_every_file_that_is_made_has_the_permissions_that_the_umask_leaves(
    tmp_path, recipe, photos, store_path, mask
):
    before = os.umask(mask)
    try:
        train(
            changed(recipe, train={"epochs": 1}), photos, tmp_path / "run", store=store_path,
            device=CPU,
        )  # fmt: skip
        for command in (
            ("export", tmp_path / "run", "--out", tmp_path / "export", "--no-onnx"),
            ("export-labels", store_path, "--out", tmp_path / "labels", "--labels", "full"),
            ("merge", store_path, store_path.parent / "labels.zarr", "--out", tmp_path / "m.zarr"),
            ("inspect", store_path, "--report", tmp_path / "page.html"),
            ("compare", tmp_path / "run", "--figure", tmp_path / "figure.png"),
        )[: 1 if mask != 0o027 else None]:
            status, _, err = run(*command)
            assert status == 0 or command[0] == "merge", err
    finally:
        os.umask(before)
    made = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"last.safetensors", "best.safetensors", "state.pt", "model.safetensors"} <= {
        file.name for file in made
    }
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in made} == {
        file.name: oct(0o666 & ~mask) for file in made
    }


# ---- locales

ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_under_an_ascii_locale_names_and_text_files_are_read_and_printed(tmp_path, recipe, photos):
    """A real process, since Python reads the locale at its start."""
    (tmp_path / "recette é.yaml").write_text(
        "# café\n" + changed(recipe, train={"epochs": 1}).to_yaml(), encoding="utf-8"
    )
    (tmp_path / "classes.txt").write_text("\ufeffant\nbee\ncat\nété\n", encoding="utf-8")
    given = f"--config 'recette é.yaml' --data {photos} --device cpu"

    def said(line: str, status: int = 0) -> str:
        ended, out, err = shell(line, cwd=tmp_path, **ASCII)
        assert ended == status and "Traceback" not in err, err
        return out + err

    assert "is complete" in said(f"CLI generate-labels {given} --store é.zarr --views 1")
    assert "class folder" in said("CLI inspect é.zarr")
    assert "every digest is right" in said("CLI verify é.zarr")
    assert "has no image été.jpg" in said("CLI inspect é.zarr --image été.jpg", 1).replace(
        "\\xe9", "é"
    )
    assert "epoch 1/1" in said(f"CLI train-student {given} --store é.zarr --out 'run é'")
    assert "wrote" in said("CLI compare 'run é' --figure é.png")
    assert "bit for bit" in said("CLI export 'run é' --out 'exp é' --no-onnx")
    assert "label files" in said("CLI export-labels é.zarr --out 'lab é' --labels full")
    assert "got 'é'" in said(f"CLI generate-labels {given} --store x --set crops.exif=é", 1)
    four = said(f"CLI generate-labels {given} --store x --class-map classes.txt", 1)
    assert "has 4 classes, the teachers have 3" in four
    assert not (tmp_path / "x").exists()


# ---- memory


@pytest.mark.parametrize("limit", [200, 800, 3000])
def test_too_little_memory_is_said_in_one_line(tmp_path, store_path, limit):
    """The limit strikes while libraries are loaded, wherever that may be."""
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", "inspect", store_path, "--json"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit << 20,) * 2),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: memory or threads are short \(.*\); raise the limit .*\n", done.stderr
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        RuntimeError("Critical error in pipeline:\n" + "x " * 200 + "std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_libraries_say_of_a_lack_of_memory_is_recognised(error):
    line = line_of(error)
    assert line is not None and line.startswith("memory or threads are short (")
    assert len(line) < 350 and "\n" not in line


def test_other_errors_of_libraries_are_faults_of_this_tool():
    assert line_of(RuntimeError("shape mismatch")) is None
    assert line_of(ImportError("No module named x")) is None
    assert line_of(ValueError("std::bad_alloc")) is None
