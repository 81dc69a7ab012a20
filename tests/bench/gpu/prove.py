"""Prove on a machine with a GPU that both stages are right there, and measure how fast
they are: one table, and JSON with the card's name.

    make gpu                                                      # nine minutes at most
    python tests/bench/gpu/prove.py --photographs FOLDER      # real photographs
    python tests/bench/gpu/prove.py --teacher MODEL=FILE ...  # real weights
    python tests/bench/gpu/prove.py --device cpu              # tiny models

Every group of measurements runs in a process of its own, with a limit of time. A group
that hangs or crashes costs no other group, and its findings until then are kept. Groups
come in the order of their worth. Groups that don't fit into the nine minutes are left
out and named. Exit status 1: a finding isn't as wanted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from finding import Bench, Finding
from machine import machine

from pipeline.runtime.malloc import keep_freed_memory
from pipeline.runtime.progress import silence

ROOT = Path(__file__).parents[3]
HEAD = "| | found | wanted | holds | |\n|---|---|---|---|---|"
PICTURES = (".jpg", ".jpeg")
NO_TIME = "no time was left"
LEAST = 10  # seconds left that are worth beginning a group for
# Of each group: the measurements as module.function, and the seconds that it may take.
# Each limit is above the expected time, so the sum of the limits exceeds nine minutes.
GROUPS: dict[str, tuple[tuple[str, ...], int]] = {
    "pixels": (("right.the_machine", "right.pixels"), 80),
    "labels": (("right.labels", "right.step"), 120),
    "tests": (("tests",), 170),
    "ranks": (("right.ranks",), 120),
    "stage one": (("fast.stage_one",), 150),
    "stage two": (("fast.stage_two",), 120),
    "decoding": (("fast.decoding",), 60),
    "teachers": (("fast.teachers",), 90),
    "compiled": (("fast.compiled",), 200),
}
SLOW_ON_CPU = ("tests", "compiled")  # on a CPU tests of a GPU skip, and compiling takes a minute


def tests(bench: Bench) -> Iterator[Finding]:
    """Run the project's tests of a GPU."""
    own = "tests/whole/test_gpu.py"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", own]
    log, seconds = bench.folder / "tests.txt", GROUPS["tests"][1] - LEAST
    with open(log, "w") as out, suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=seconds)
    said = log.read_text()
    ended = {
        word: re.findall(rf"^(tests/\S+) {word}", said, re.M)
        for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    told = (
        ", ".join(f"{len(names)} {word.lower()}" for word, names in ended.items() if names)
        or "nothing"
    )
    whole = bool(re.search(r" in \d+\.\d+s", said[-200:]))
    wrong = ended["FAILED"] + ended["ERROR"]
    detail = {"failed": wrong} if wrong else {}
    good = whole and bool(ended["PASSED"]) and not wrong
    yield Finding(
        "tests/whole/test_gpu.py",
        told if whole else f"{told}, stopped after {seconds} s",
        "all pass",
        good,
        detail,
    )


def measure(name: str, bench: Bench) -> Iterator[Finding]:
    module, _, function = name.rpartition(".")
    yield from getattr(importlib.import_module(module), function)(bench) if module else tests(bench)


def child(groups: list[str], into: Path, bench: Bench) -> None:
    """Measure groups, and write each finding at once to the file ``into``."""
    keep_freed_memory()
    silence()
    with open(into, "a") as out:
        for group in groups:
            for name in GROUPS[group][0]:
                try:
                    for found in measure(name, bench):
                        print(
                            json.dumps({"group": group, **asdict(found)}, default=float),
                            file=out,
                            flush=True,
                        )
                except Exception as error:
                    traceback.print_exc()
                    said = {
                        "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    }
                    failed = Finding(f"{group} ({name})", "failed", "an end", False, said)
                    print(json.dumps({"group": group, **asdict(failed)}), file=out, flush=True)


def run(command: list[str], into: Path, limit: float) -> tuple[list[dict], str]:
    """Run a child for at most ``limit`` seconds. Returns the findings that it wrote,
    and how it failed, or empty."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit)
        ended = "" if status == 0 else f"it ended with status {status}"
    except subprocess.TimeoutExpired:
        ended = f"it was stopped after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the child and its children
        process.wait()
    lines = into.read_text().splitlines() if into.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")], ended


def measured(given: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """Have every group measured, and yield the findings, with one for each group that
    came to no end."""
    begun = time.monotonic()
    groups = given.only or [
        group for group in GROUPS if given.device != "cpu" or group not in SLOW_ON_CPU
    ]
    # On a GPU each group has its process. On a CPU one process measures all groups,
    # since importing takes longer than measuring.
    for number, several in enumerate(
        [[group] for group in groups] if given.device == "cuda" else [groups]
    ):
        left = given.seconds - (time.monotonic() - begun)
        into, place = folder / f"{number}.jsonl", folder / str(number)
        place.mkdir()
        command = [
            sys.executable,
            __file__,
            f"--device={given.device}",
            "--child",
            str(into),
            f"--folder={place}",
            "--only",
            *several,
        ]
        command += [f"--photographs={given.photographs}"] if given.photographs else []
        command += [f"--teacher={name}={file}" for name, file in given.teachers]
        limit = min(sum(GROUPS[group][1] for group in several), left)
        findings, ended = run(command, into, limit) if left > LEAST else ([], NO_TIME)
        if ended:
            findings.append(
                {
                    "group": several[0],
                    **asdict(
                        Finding(
                            ", ".join(several), ended, "an end", False if left > LEAST else None
                        )
                    ),
                }
            )
        yield from findings


def photographs(folder: Path | None) -> list[Path] | None:
    if folder is None:
        return None
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not found:
        raise SystemExit(
            f"prove.py: --photographs {folder} holds no .jpg or .jpeg file; "
            f"name another folder, or leave it out"
        )
    return found


def teacher(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} must be MODEL=FILE, and FILE must be there")
    return name, file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--only", nargs="+", choices=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}"
    )
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="of JPEG files")
    parser.add_argument(
        "--teacher",
        dest="teachers",
        type=teacher,
        action="append",
        default=[],
        metavar="MODEL=FILE",
    )
    parser.add_argument("--out", type=Path, help="JSON; otherwise gpu-CARD.json here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "torch finds no GPU here; "
            "check nvidia-smi, or see with --device cpu that the measurements work"
        )
    files = photographs(given.photographs)
    if given.child:
        return child(
            given.only,
            given.child,
            Bench(given.folder, torch.device(given.device), files, given.teachers),
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no child is left
    begun, about, found = time.monotonic(), machine(), []
    card = about["gpu"] if given.device == "cuda" else "cpu"
    print(
        f"{card}; {about['processor']}, {about['cores']} cores; torch {about['torch']}; "
        f"{about['date']}\n\n{HEAD}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="gpu.") as folder:
        for finding in measured(given, Path(folder)):
            print(
                Finding(**{key: value for key, value in finding.items() if key != "group"}).row(),
                flush=True,
            )
            found.append(finding)
    wrong = [finding["what"] for finding in found if finding["holds"] is False]
    left_out = [finding["what"] for finding in found if finding["found"] == NO_TIME]
    verdict = (
        f"NOT as wanted: {'; '.join(wrong)}"
        if wrong
        else "everything that was measured is as wanted"
    )
    print(
        f"\n{time.monotonic() - begun:.0f} s; {verdict}"
        + (f"; no time was left for {', '.join(left_out)}" if left_out else "")
    )
    out = given.out or Path(f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}.json")
    out.write_text(json.dumps({"card": card, "machine": about, "findings": found}, indent=1) + "\n")
    print(f"wrote {out}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
