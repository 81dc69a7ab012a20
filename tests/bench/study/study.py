"""Try the paper's claims, and this project's, on CIFAR-10 and on photographs: every row
of the README's table, over three seeds.

    make study CIFAR10=cifar10.tar
    python tests/bench/study/study.py --cifar10 cifar10.tar --only online
    python tests/bench/study/study.py --photographs imagenet_sample --weights DIR
    python tests/bench/study/study.py --show "hard label 0.5"
    python tests/bench/study/study.py --discriminators --cifar10 cifar10.tar
    python tests/bench/study/study.py

The commands do, in this order: all of CIFAR-10's rows, which take one to two hours on
two cores; one row, with the steps that it needs; the rows with 1,000 classes; print the
command lines that make a row; the forms of the discriminator; print the tables, from
results.json and again.json.

Everything is made in study/ (2 GB), with a record of each step that is done. Kill the
study as often as you like. A step counts as done if its commands, its config and all
steps before it are the same. Each of --jobs processes has its own cores. results.json
and again.json hold the records of the README's tables.

cifar10: a folder, or a tar of a folder, with train/ and val/ of class folders of
images, of which the first 1,000 a class are trained on. photographs: class folders
named by WordNet id, of which two in five are for evaluation. weights:
tf_efficientnet_lite0.safetensors, …lite1…, …lite2…, of ImageNet.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing.util
import os
import shlex
import shutil
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import DISCRIMINATORS, EXPERIMENTS, WORK, Experiment, Row, Step, with_needs
from tell import beside, draw, table

ROOT = Path(__file__).parents[3]
RESULTS = Path(__file__).parent / "results.json"
# All of CIFAR-10's rows on another machine, which therefore has other teachers.
AGAIN = Path(__file__).parent / "again.json"
# The forms of the discriminator, with teachers of their own.
FORMS = Path(__file__).parent / "discriminators.json"
TRAINING = 1_000  # training images of each class of CIFAR-10
# Steps that a process does before another process takes its place. A process keeps the
# memory that it has freed: evaluating photographs comes to 7 GB, and grows.
STEPS = 8


class Records:
    """The records of finished steps, by name, in a file that several studies may
    change."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.of = self._read()

    def _read(self) -> dict:
        if not self.file.exists():
            return {}
        with suppress(ValueError):  # the file is no JSON
            if isinstance(read := json.loads(self.file.read_text()), dict):
                return read
        sys.exit(f"error: {self.file} is no file of records; move it away, or name another one")

    def has(self, step: Step) -> bool:
        return self.of.get(step.name, {}).get("identity") == step.identity

    def change(self, added: dict[str, dict], removed: Iterable[str] = ()) -> None:
        """Add and remove records in the file, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file.with_name(f".{self.file.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.of = {
                name: record for name, record in self._read().items() if name not in set(removed)
            } | added
            scratch = self.file.with_name(f".{self.file.name}.partial")
            scratch.write_text(json.dumps(dict(sorted(self.of.items())), indent=1) + "\n")
            scratch.replace(self.file)


def _told(error: BaseException) -> object:
    """Return the message of a command's error, or the trace of any other error."""
    return error if isinstance(error, RuntimeError) else "".join(traceback.format_exception(error))


def perform(step: Step, work: Path) -> dict:
    """Run a step's commands in this process, and return the step's record. Raises
    RuntimeError with the command's last line if a command fails."""
    from machine import machine

    from cli import main

    # with an ending, since a step may have the name of a folder of further steps
    log, begun = (work / "logs" / f"{step.name}.log", work / "begun" / f"{step.name}.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    begun.parent.mkdir(parents=True, exist_ok=True)
    for made in step.makes:
        shutil.rmtree(placed(made, work), ignore_errors=True)
    # a training that was begun by another step of this name
    if step.run and (not begun.exists() or begun.read_text() != step.identity):
        shutil.rmtree(placed(step.run, work), ignore_errors=True)
    begun.write_text(step.identity)
    record: dict = {
        "identity": step.identity,
        "commands": [shlex.join(("python", "cli.py", *words)) for words in step.commands],
    }
    began = time.monotonic()
    for words in step.commands:
        out = StringIO()
        with open(log, "a") as told, redirect_stdout(out), redirect_stderr(told):
            status = main.main(
                [placed(word, work) for word in words], prog_name="cli.py", standalone_mode=False
            )
        if status:
            raise RuntimeError(
                f"{words[0]} of {step.name} failed: "
                f"{(log.read_text().splitlines() or ['silently'])[-1]}"
            )
        if "--json" in words:
            record["figures"] = json.loads(out.getvalue())
            for model in record["figures"]["models"]:
                del model["checkpoint"]  # the path is this machine's
    record["machine"] = machine()
    if step.run:
        passes = [
            json.loads(line)
            for line in Path(placed(step.run, work), "metrics.jsonl").read_text().splitlines()
        ]
        record["training"] = {
            "seconds": sum(one["seconds"] for one in passes),
            "images": sum(one["images"] for one in passes),
            "last": {key: value for key, value in passes[-1].items() if value is not None},
        }
    else:
        record["seconds"] = time.monotonic() - began
    return record


def placed(word: str, work: Path) -> str:
    """Return a word of a command line, with the real path of the work folder."""
    return (
        word.replace(f"{WORK}/", f"{work}/")
        if word.startswith(f"{WORK}/") or f"={WORK}/" in word
        else word
    )


def begin(cores: multiprocessing.Queue) -> None:
    """Begin a process that runs steps on cores of its own, and ends with its parent."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # any command may be killed at any moment

    threading.Thread(target=watch, daemon=True).start()
    mine = cores.get()
    # The cores go back to the queue, for the process that comes after this process.
    multiprocessing.util.Finalize(None, cores.put, (mine,), exitpriority=0)
    os.sched_setaffinity(0, mine)
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(len(mine))


def run(steps: list[Step], work: Path, jobs: int, records: Records) -> int:
    """Run the steps, each when the steps before it are done. Prints a line for each
    step, and returns the number of steps that failed."""
    every = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for job in range(jobs):
        cores.put(every[job * len(every) // jobs : (job + 1) * len(every) // jobs])
    waiting, failed = list(steps), 0
    running: dict[Future, Step] = {}
    with ProcessPoolExecutor(jobs, context, begin, (cores,), max_tasks_per_child=STEPS) as pool:
        while waiting or running:
            ready = [step for step in waiting if all(records.has(need) for need in step.needs)]
            for step in ready[: jobs - len(running)]:
                waiting.remove(step)
                running[pool.submit(perform, step, work)] = step
            if not running:  # the waiting steps need a failed step
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                try:
                    record = future.result()
                except BrokenProcessPool:
                    sys.exit(
                        f"error: a process ended while it did {step.name} or a step beside it; run "
                        f"the same command again, or with fewer --jobs"
                    )
                except Exception as error:
                    failed += 1
                    print(
                        f"failed: {_told(error)}",
                        flush=True,
                    )
                    continue
                records.change({step.name: record})
                told = [
                    f"{model['name']} {model['top1']:.2f} %"
                    for model in record.get("figures", {}).get("models", ())
                ]
                took = record["training"]["seconds"] if step.run else record["seconds"]
                print(
                    f"{time.strftime('%H:%M:%S')} "
                    f"{', '.join([f'{step.name}: {took:.0f} s', *told])}; "
                    f"{len(waiting) + len(running)} to go",
                    flush=True,
                )
    return failed


def classes(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def weights_files(folder: Path) -> list[Path]:
    return [folder / f"tf_efficientnet_lite{i}.safetensors" for i in (0, 1, 2)]


def amiss(given: argparse.Namespace) -> str | None:
    """Say what is wrong with the given data, or return None."""
    for option, place in (
        ("--cifar10", given.cifar10),
        ("--photographs", given.photographs),
        ("--weights", given.weights),
    ):
        if place and not place.exists():
            return f"{option}: there is no {place}"
    if given.cifar10 and given.cifar10.is_file() and not tarfile.is_tarfile(given.cifar10):
        return f"--cifar10: {given.cifar10} is neither a folder nor a tar of one"
    if (
        given.cifar10
        and given.cifar10.is_dir()
        and not all(classes(given.cifar10 / split) for split in ("train", "val"))
    ):
        return (
            f"--cifar10: {given.cifar10} has no train/ and val/ "
            f"with a folder of images for each class"
        )
    if bool(given.photographs) != bool(given.weights):
        return "--photographs and --weights go together: the rows with 1,000 classes need both"
    if given.photographs and not classes(given.photographs):
        return (
            f"--photographs: {given.photographs} has no class folders, which are named by "
            f"WordNet id, like n01440764"
        )
    if given.weights and (
        lacks := [file.name for file in weights_files(given.weights) if not file.is_file()]
    ):
        return f"--weights: {given.weights} has no {', '.join(lacks)}"
    return None


def _plain(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """List the files and folders of a tar that stay in the folder that they are
    unpacked in. Links are left out."""
    return [
        m
        for m in tar
        if (m.isfile() or m.isdir())
        and not m.name.startswith("/")
        and ".." not in Path(m.name).parts
    ]


def lay_cifar10(source: Path, place: Path, most: dict[str, int | None]) -> None:
    """Copy the study's images whole or not at all. most: for each split the number of
    images of a class, from the first on; None: all."""
    scratch, unpacked = place.with_name("data.partial"), place.with_name("unpacked")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(unpacked, ignore_errors=True)  # perhaps from another tar
    if source.is_file():
        with tarfile.open(source) as tar:
            # Python 3.11.4 introduced the filter.
            safely = (
                {"filter": "data"} if hasattr(tarfile, "data_filter") else {"members": _plain(tar)}
            )
            tar.extractall(unpacked, **safely)
        found = [
            path.parent
            for path in sorted(unpacked.glob("**/train"))
            if classes(path) and classes(path.with_name("val"))
        ]
        if not found:
            sys.exit(
                f"error: --cifar10: {source} has no train/ and val/ "
                f"with a folder of images for each class"
            )
        source = found[0]
    for split in ("train", "val"):
        for folder in classes(source / split):
            (scratch / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[: most[split]]:
                shutil.copyfile(file, scratch / split / folder.name / file.name)
    scratch.rename(place)
    shutil.rmtree(unpacked, ignore_errors=True)


def lay_photographs(source: Path, weights: Path, place: Path, most: int | None) -> None:
    """Copy the first ``most`` classes, two in five of them for evaluation, and the
    models' weights."""
    scratch = place.with_name("data.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    for i, folder in enumerate(classes(source)[:most]):
        shutil.copytree(folder, scratch / ("val" if i % 5 in (1, 3) else "train") / folder.name)
    (place.parent / "weights").mkdir(exist_ok=True)
    for file in weights_files(weights):
        shutil.copyfile(file, place.parent / "weights" / file.name)
    scratch.rename(place)


def lay(experiment: Experiment, given: argparse.Namespace) -> None:
    """Copy the experiment's images into its folder, if they aren't there yet."""
    place = Path(placed(f"{experiment.folder}/data", given.work))
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        return
    if experiment.name == "cifar10":
        lay_cifar10(
            given.cifar10,
            place,
            {"train": 8, "val": 4} if given.small else {"train": TRAINING, "val": None},
        )
    else:
        lay_photographs(given.photographs, given.weights, place, 20 if given.small else None)


def chosen(words: list[str], experiments: tuple[Experiment, ...]) -> list[tuple[Experiment, Row]]:
    """Choose the rows that have one of these words as their name. A word that is no
    row's name chooses the rows that contain it."""
    rows = {
        f"{experiment.name}/{row.name}": (experiment, row)
        for experiment in experiments
        for row in experiment.rows
    }
    names = {
        name
        for word in words
        for name in (
            [n for n in rows if word in (n, n.partition("/")[2])] or [n for n in rows if word in n]
        )
    }
    return [rows[name] for name in rows if name in names]


def arguments() -> tuple[argparse.Namespace, tuple[Experiment, ...]]:
    """Return what was asked for, and the experiments whose rows may be asked for. Ends
    the program where that can't be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    processors = len(os.sched_getaffinity(0))
    parser.add_argument("--cifar10", type=Path, help="folder, or tar of it: run its rows")
    parser.add_argument("--photographs", type=Path, help="folder: run the rows with 1,000 classes")
    parser.add_argument("--weights", type=Path, help="folder of the photographs' models")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="ROW",
        help="a row's name, or a part of it, like online or photographs/tail",
    )
    parser.add_argument(
        "--show",
        metavar="ROW",
        help="print the command lines of a row and of what it needs, and run nothing",
    )
    parser.add_argument("--again", action="store_true", help="though it is done")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="the first so many")
    parser.add_argument(
        "--jobs",
        type=int,
        default=processors,
        choices=range(1, processors + 1),
        help="processes, which share the cores",
    )
    parser.add_argument(
        "--work", type=Path, help="folder in which everything is made  [default: study/]"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FILE",
        help="add what was recorded to a file of records, like results.json, and draw it",
    )
    parser.add_argument(
        "--records",
        type=Path,
        metavar="FILE",
        help="whose tables are printed if no data are given  [default: results.json, or "
        "discriminators.json]",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="few images, four epochs: whether it works; the figures mean nothing",
    )
    parser.add_argument(
        "--discriminators",
        action="store_true",
        help="the forms of the discriminator, in place of the study's rows",
    )
    given = parser.parse_args()
    every = DISCRIMINATORS if given.discriminators else EXPERIMENTS
    given.records = given.records or (FORMS if given.discriminators else RESULTS)
    for words in [*given.only, *([given.show] if given.show else ())]:
        if not chosen([words], every):
            names = ", ".join(
                f"{experiment.name}/{row.name}" for experiment in every for row in experiment.rows
            )
            parser.error(f"{words}: no row has that in its name; there are {names}")
    if not given.records.is_file():
        parser.error(f"--records: there is no file {given.records}")
    if wrong := amiss(given):
        parser.error(wrong)
    if given.small and not given.work:
        parser.error(
            "--small needs a --work of its own, so that its figures don't replace real ones"
        )
    given.work = (given.work or ROOT / WORK).absolute()
    return given, every


def main() -> None:
    given, every = arguments()
    experiments = {e.name: small(e) if given.small else e for e in every}
    if given.show:
        for step in with_needs(
            experiments[e.name].trained(row, 0) for e, row in chosen([given.show], every)
        ):
            print(
                f"# {step.name}",
                *(f"python cli.py {shlex.join(words)}" for words in step.commands),
                sep="\n",
            )
        return
    if not (given.cifar10 or given.photographs or given.keep):
        print(
            *(table(experiment, Records(given.records).of) for experiment in experiments.values()),
            sep="\n",
        )
        if given.records == RESULTS:
            print(beside(experiments["cifar10"], Records(RESULTS).of, Records(AGAIN).of))
        return
    records = Records(given.work / "records.json")
    wanted: list[tuple[int, Step]] = []  # by seed: every row gets its first seed early
    for experiment in experiments.values():
        rows = [row for e, row in chosen(given.only, every) if e.name == experiment.name]
        if rows and (given.cifar10 if experiment.name == "cifar10" else given.photographs):
            lay(experiment, given)
            wanted += [(-1, experiment.teachers_alone())]
            wanted += [
                (seed, experiment.trained(row, seed))
                for row in rows
                for seed in row.seeds
                if seed < given.seeds
            ]
    steps = [step for _, step in sorted(wanted, key=lambda one: one[0])]
    if given.again:
        records.change({}, [step.name for step in steps])
        for step in steps:
            (given.work / "begun" / f"{step.name}.txt").unlink(missing_ok=True)
    failed = run(
        [step for step in with_needs(steps) if not records.has(step)],
        given.work,
        given.jobs,
        records,
    )
    shown = tuple(experiments.values())
    print(*(table(experiment, records.of) for experiment in shown), sep="\n")
    draw(shown, records.of, given.work / "results.png")
    if given.keep:
        kept = Records(given.keep)
        kept.change(records.of)
        draw(shown, kept.of, given.keep.with_suffix(".png"))
    sys.exit(1 if failed else 0)


def small(experiment: Experiment) -> Experiment:
    training = (
        "--set",
        "train.epochs=4",
        "--set",
        "train.milestones=[2]",
        "--set",
        "train.batch_size=8",
        "--set",
        "train.image_size=32",
    )
    return replace(experiment, small_training=training)


if __name__ == "__main__":
    main()
