"""Define the command line. Commands only translate: the work is done in pipeline/ and
cache/."""

from __future__ import annotations

import atexit
import difflib
import gc
import glob
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from pipeline.runtime.failures import give_up, line_of, standard_streams


class Group(click.Group):
    """A group that lists commands in the order of the work, suggests the nearest name
    for an unknown command, and prints an error that a user can fix as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the work."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command; for an unknown name, fail with the name of the nearest
        command."""
        if self.get_command(ctx, args[0]) is None and (
            close := difflib.get_close_matches(args[0], self.commands, 1)
        ):
            ctx.fail(f"No such command '{args[0]}'. Did you mean {close[0]}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; print an error that a user can fix as one line, and exit with
        status 1."""
        try:
            _require_a_place()
            from cache.system.signals import on_signals

            with on_signals(_say_deaf):
                done = super().invoke(ctx)
                sys.stdout.flush()
                return done
        except KeyboardInterrupt as stop:
            _say_stopped(f" by {stop}" if str(stop) else "")
        except BrokenPipeError:  # the reader of the output has seen enough
            give_up("stdout")
            give_up("stderr")
        except Exception as error:
            _say_failed(error)
        ctx.exit(1)

    def main(self, *args: Any, **named: Any) -> Any:
        """Run the command line with usable standard streams."""
        # Python looks for cycles among all objects once more at its end: seconds, on a
        # busy machine many, for the modules of torch and timm.
        atexit.register(gc.freeze)
        with standard_streams():
            try:
                return super().main(*args, **named)
            except OSError as error:  # of printing the help; a command's are told by invoke
                _say_failed(error)
                raise SystemExit(1) from None


def _require_a_place() -> None:
    """Raise OSError if the current folder is gone; libraries then end the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise OSError(error.errno, "the current folder is gone; cd to another") from None


def _say_failed(error: Exception) -> None:
    """Print an error that a user can fix as one line; raise any other error again."""
    line = line_of(error)
    if line is None:
        raise error
    if isinstance(error, OSError) and error.filename is None and give_up("stdout"):
        line = f"stdout: {line}"
    if line:  # without a message: another process tells the error
        click.echo(f"error: {line}", err=True)


def _say_deaf(signal: str) -> None:
    _say_stopped(f" by {signal}, in the midst of a wait that doesn't end")


def _say_stopped(how: str) -> None:
    """Say that a signal stopped the command, unless another process says so."""
    progress = sys.modules.get("pipeline.runtime.progress")
    if progress is None or progress.speaks():
        click.echo(
            f"stopped{how}; run the same command again to go on from what is finished", err=True
        )


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
def main() -> None:
    """Offline MEAL V2: label every crop once with an ensemble of teachers, then train
    students from the stored labels."""


def options(*several: Callable) -> Callable:
    """Return a decorator that adds click options to a command, in this order."""

    def apply(command: Callable) -> Callable:
        for option in reversed(several):
            command = option(command)
        return command

    return apply


class LocalPath(click.Path):
    """Reads a path from the command line, and refuses a URL."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the path. Raises NotLocal, before pathlib makes a folder ``s3:`` of a
        URL."""
        from cache.system.local import require_local

        require_local(value)
        return super().convert(value, param, ctx)


class DataPath(LocalPath):
    """Reads what names images from the command line: a path, or the URL of a bucket or
    a web server."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the path, or a ``Url``. Raises NotLocal for a URL that images can't be
        fetched from."""
        from pipeline.images.sources.remote.url import Url, is_url

        if isinstance(value, Url):
            return value
        if is_url(value):
            return Url.parse(value)
        from cache.system.local import require_local

        require_local(value, images=True)
        return super().convert(value, param, ctx)


class StoreAddress(LocalPath):
    """Reads a label store that is only read from the command line: a path, or the
    address of a store on the hub."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the path, or the address."""
        from cache.hub.address import Address, is_hub

        if not is_hub(value):
            return super().convert(value, param, ctx)
        from cache.hub import client
        from pipeline.runtime.progress import say

        first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
        client.tell = say if first else lambda line: None
        return str(Address.parse(value))


class StorePath(StoreAddress):
    """Reads a label store that is only read from the command line, and fetches the
    description of a store on the hub."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the path. Of a store on the hub it is that of the local copy, which
        belongs to the newest commit now."""
        from cache.hub.copy import announced

        return announced(super().convert(value, param, ctx))


class RecipePath(LocalPath):
    """Reads a recipe's file, or the name of a recipe of the project."""

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Return the recipes and YAML files whose names begin so; or let the shell
        complete files."""
        import configs

        names = [file.stem for place in configs.__path__ for file in Path(place).glob("*.yaml")]
        folder, _, start = incomplete.rpartition("/")
        files = Path(folder or ".").glob(f"{glob.escape(start)}*.yaml")
        mine = sorted(name for name in names if name.startswith(incomplete))
        mine += sorted(str(file) for file in files) if mine else []
        return [CompletionItem(name) for name in mine] or super().shell_complete(
            ctx, param, incomplete
        )


folder = LocalPath(path_type=Path)
recipe_file = RecipePath(path_type=Path)
store_address = StoreAddress(path_type=Path)
store_place = StorePath(path_type=Path)
data_place = DataPath(path_type=Path)
config_option = click.option(
    "--config",
    required=True,
    type=recipe_file,
    help="Recipe: a YAML file, or the name of a recipe of the project (meal_v2_resnet50).",
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the config, for example train.lr=0.005.",
)
DATA = (
    "Images: a folder with a folder per class, or with train/ and val/ of such folders; tar or "
    "parquet files (their folder, or a pattern in quotes), here or at a URL (s3://, gs://, "
    "https://); or a list of paths and classes."
)
data_option = click.option(
    "--data",
    required=True,
    type=data_place,
    help=DATA,
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device that the models run on.  [default: cuda if there is one]",
)
class_map_option = click.option(
    "--class-map",
    type=LocalPath(path_type=str),
    metavar="imagenet-1k|FILE",
    help="Names of all classes in the order of the models' outputs, where the data has folders for "
    "some of the classes only: imagenet-1k, or a file with one name per line.",
)
profile_option = click.option(
    "--profile",
    is_flag=True,
    help="Print at the end where the time went, and what would make the command faster.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
)


class TeacherType(click.ParamType):
    """Reads MODEL or MODEL=CHECKPOINT from the command line. CHECKPOINT may be
    FILE#ENTRY."""

    name = "MODEL[=CHECKPOINT]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return ``model`` and ``checkpoint`` (or None) as a dict."""
        if not isinstance(value, str):
            return value
        from cache.system.local import require_local

        model, equals, checkpoint = value.partition("=")
        require_local(checkpoint)
        if not model or (equals and not checkpoint):
            self.fail(
                f"{value!r} must be MODEL or MODEL=CHECKPOINT, like "
                f"resnet50.ram_in1k=weights.safetensors",
                param,
                ctx,
            )
        return {"model": model, "checkpoint": checkpoint or None}


class TrackerType(click.ParamType):
    """Reads TRACKER or TRACKER:PROJECT from the command line."""

    name = "TRACKER[:PROJECT]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the text. Raises TrackingError for a tracker that is unknown or not
        installed."""
        from pipeline.runs.tracking.names import Wanted

        Wanted.of(value)
        return value

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Return the trackers whose names begin so."""
        from pipeline.runs.tracking.names import TRACKERS

        return [CompletionItem(name) for name in TRACKERS if name.startswith(incomplete)]


MODEL = TeacherType()
ENTRIES = (
    "CHECKPOINT is a .safetensors, .pth, .pt or .ckpt file; FILE#ENTRY takes one of several sets "
    "of weights in it, FILE#ema the moving average."
)


@main.command("generate-labels", short_help="Stage one: label every crop with the teachers.")
@options(
    config_option,
    click.option(
        "--data",
        type=data_place,
        help=DATA,
    ),
    click.option("--store", type=folder, help="Label store to create, finish or extend."),
    click.option(
        "--plan",
        is_flag=True,
        help="Label nothing: predict crops, hours and bytes from a short timing. Needs neither "
        "--data nor --store.",
    ),
    click.option(
        "--teacher",
        "teachers",
        multiple=True,
        type=MODEL,
        help="Teacher, in place of the config's teachers; repeat for several. " + ENTRIES,
    ),
    click.option(
        "--views",
        type=int,
        help="Crops per image; a larger number than the store's extends the store.",
    ),
    click.option("--split", default="train", show_default=True, help="Split of --data to label."),
    class_map_option,
    device_option,
    click.option(
        "--batch-size",
        type=int,
        help="Crops per forward pass of a teacher; can't change for an existing store.",
    ),
    click.option(
        "--worker",
        metavar="auto|I/N",
        help="auto: one of several workers that may come and go; each takes the shards that no "
        "other holds. Kubernetes, SLURM, SkyPilot or torchrun tells its number. I/N: label the "
        "I-th of N fixed shares, I from 0; combines with torchrun.",
    ),
    click.option(
        "--ray",
        metavar="local|auto|HOST:PORT",
        help="Label with workers of a Ray cluster; auto: of the one that this machine belongs to; "
        "local: of one that is started on this machine.",
    ),
    click.option(
        "--ray-workers",
        type=click.IntRange(1),
        help="Number of workers, which start as the cluster has room; otherwise as many as it has "
        "room for, now and later.",
    ),
    click.option(
        "--first-view",
        type=click.IntRange(0),
        default=0,
        help="First view to label, counted from 0; for stores that merge joins later.",
    ),
    click.option(
        "--strict", is_flag=True, help="Stop at an unusable file instead of leaving it out."
    ),
    click.option(
        "--no-check",
        is_flag=True,
        help="Trust finished shards: skip re-reading this worker's share at the start.",
    ),
    profile_option,
    set_option,
)
def generate_labels(
    config,
    data,
    store,
    plan,
    teachers,
    views,
    split,
    class_map,
    device,
    batch_size,
    worker,
    ray,
    ray_workers,
    first_view,
    strict,
    no_check,
    profile,
    settings,
):
    """Label every crop of every image once, and write the mean softmax of the teachers
    to a Zarr store.

    Run the same command again to label what is missing; finished labels stay as they
    are. A larger --views extends the store. --plan predicts time and disk space
    beforehand.

    \b
    Example:
      python cli.py generate-labels --config configs/meal_v2_resnet50.yaml --plan
      python cli.py generate-labels --config configs/meal_v2_resnet50.yaml \\
          --data imagenet --store labels.zarr
      python cli.py generate-labels --config configs/smoke_cpu.yaml --data photos \\
          --store photos.zarr --views 2 \\
          --teacher tf_efficientnet_lite1=lite1.safetensors \\
          --teacher tf_efficientnet_lite2=lite2.safetensors
    """
    recipe = _recipe(
        config,
        settings,
        {"teachers": list(teachers), "crops.views": views, "store.batch_size": batch_size},
    )
    if plan:
        from pipeline.labelling.plan import make_plan
        from pipeline.labelling.plan_page import plan_page

        share = _share(recipe, worker, first_view)
        images = _data(data, split, class_map) if data else None
        plan_page(make_plan(recipe, images, store, device=_device(device), share=share))
        return
    for option, value in (("--data", data), ("--store", store)):
        if value is None:
            raise click.UsageError(f"Missing option '{option}'; only --plan does without it")
    if ray_workers and not ray:
        raise click.UsageError("--ray-workers goes with --ray, which names the cluster")
    if ray:
        if worker or profile:
            raise click.UsageError(
                "--ray divides the work by itself; leave out --worker and --profile"
            )
        from pipeline.labelling.ray_driver import label_on_ray
        from pipeline.labelling.ray_workers import RayTask

        label_on_ray(
            RayTask(
                recipe,
                data,
                split,
                _class_map(class_map),
                store,
                device=device,
                first_view=first_view,
                strict=strict,
                check=not no_check,
            ),
            ray,
            ray_workers,
        )
        return
    from pipeline.labelling.generate import generate
    from pipeline.runtime.engine import Worker
    from pipeline.runtime.execution import Execution

    share = _share(recipe, worker, first_view)
    execution = Execution.on(_device(device), profile=profile, worker=Worker.here())
    generate(
        recipe,
        _data(data, split, class_map, models=recipe.teachers),
        store,
        execution,
        share=share,
        strict=strict,
        check=not no_check,
    )


@main.command("train-student", short_help="Stage two: train a student from the stored labels.")
@options(
    config_option,
    data_option,
    click.option(
        "--store",
        type=store_address,
        help="Label store, or hf://ORG/NAME of a shared one; needed unless --online is given or "
        "train.labels is hard.",
    ),
    click.option(
        "--online",
        is_flag=True,
        help="Train without a store: the config's teachers label every batch, as in the paper.",
    ),
    click.option(
        "--teacher",
        "teachers",
        multiple=True,
        type=MODEL,
        help="With --online: teacher, in place of the config's teachers; repeat for several.",
    ),
    click.option("--out", required=True, type=folder, help="Run directory to create or resume."),
    click.option(
        "--student", type=MODEL, help="Student, in place of the config's student. " + ENTRIES
    ),
    click.option(
        "--epochs", type=int, help="Total number of epochs; epoch e replays view e mod views."
    ),
    click.option("--batch-size", type=int, help="Images per step."),
    click.option(
        "--val-data",
        type=data_place,
        help="Images to validate on, as --data takes them; otherwise the split val of --data.",
    ),
    click.option(
        "--allow-renderer-difference",
        is_flag=True,
        help="Train even if this machine renders other pixels than the teachers saw.",
    ),
    click.option(
        "--track",
        multiple=True,
        type=TrackerType(),
        help="Tell the run to wandb (Weights & Biases) or mlflow too; repeat for both.",
    ),
    class_map_option,
    device_option,
    profile_option,
    set_option,
)
def train_student(
    config,
    data,
    store,
    online,
    teachers,
    out,
    student,
    epochs,
    batch_size,
    val_data,
    allow_renderer_difference,
    track,
    class_map,
    device,
    profile,
    settings,
):
    """Train a student on exactly the crops of a label store, towards its soft labels.

    The run directory holds metrics.jsonl, config.yaml, last.safetensors and
    best.safetensors. Run the same command again to resume after the last finished
    epoch. With --set train.labels=hard the same loop trains on the class folders: for
    the baseline, and for teachers of your own (no --store needed). With --online the
    command trains as MEAL V2 was published, at several times the cost: the reference
    for training from a store.

    \b
    Example:
      python cli.py train-student --config configs/meal_v2_resnet50.yaml \\
          --data imagenet --store labels.zarr --out run
      python cli.py train-student --config configs/meal_v2_resnet50.yaml \\
          --data imagenet --online --out reference
      python cli.py train-student --config configs/smoke_cpu.yaml --data photos \\
          --out teacher --set train.labels=hard
    """
    from pipeline.runtime.distributed import joining
    from pipeline.runtime.engine import Worker
    from pipeline.runtime.execution import Execution
    from pipeline.training.train import at_one_commit, train

    changed = {
        "student.model": student and student["model"],
        "student.checkpoint": student and student["checkpoint"],
    }
    changed |= {
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "train.online": online or None,
        "teachers": list(teachers),
    }
    recipe = _recipe(config, settings, changed)
    if teachers and not recipe.train.online:
        raise click.UsageError(
            "--teacher names live teachers and goes with --online; a store has its labels already"
        )
    models = [recipe.student] if recipe.student else []
    if recipe.train.online:
        models += recipe.teachers
    place = _device(device)
    with joining(place) as processes:
        store = at_one_commit(store, processes)
        train(
            recipe,
            processes.together(lambda: _data(data, "train", class_map, store=store, models=models)),
            out,
            store=store,
            validation=val_data,
            execution=Execution.on(
                place, processes, profile=profile, worker=Worker.here(), track=track
            ),
            allow_renderer_difference=allow_renderer_difference,
        )


@main.command("eval", short_help="Top-1 and top-5 of models and of their ensemble.")
@options(
    data_option,
    click.option(
        "--model",
        "models",
        multiple=True,
        required=True,
        type=MODEL,
        help="Model to evaluate; repeat for several models and their ensemble. " + ENTRIES,
    ),
    click.option(
        "--teacher",
        "teachers",
        multiple=True,
        type=MODEL,
        help="Teacher to compare each model with: KL and agreement. Repeat for several, whose mean "
        "softmax counts.",
    ),
    click.option(
        "--split", default="val", show_default=True, help="Split of --data to evaluate on."
    ),
    class_map_option,
    click.option(
        "--image-size",
        type=click.IntRange(8),
        help="Input size in pixels for every model; otherwise each model's own.",
    ),
    click.option(
        "--mean",
        nargs=3,
        type=float,
        help="RGB mean in 0 … 1 for every model; otherwise each model's own.",
    ),
    click.option(
        "--std",
        nargs=3,
        type=float,
        help="RGB standard deviation, on the scale of --mean, for every model; otherwise each "
        "model's own.",
    ),
    click.option(
        "--interpolation",
        type=click.Choice(["bilinear", "bicubic"]),
        help="Interpolation of the resize for every model; otherwise each model's own.",
    ),
    click.option(
        "--exif",
        type=click.Choice(["ignore", "apply"]),
        default="ignore",
        show_default=True,
        help="Ignore the EXIF orientation of photographs, or apply it.",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True),
    device_option,
    json_option,
)
def evaluate_models(
    data,
    models,
    teachers,
    split,
    class_map,
    image_size,
    mean,
    std,
    interpolation,
    exif,
    batch_size,
    device,
    as_json,
):
    """Evaluate models on single crops: top-1 and top-5 of each model and of the
    ensemble.

    Each image's shorter side is resized to size·256/224, and the central square is
    shown to the models.

    \b
    Example:
      python cli.py eval --data imagenet --model resnet50.ram_in1k
      python cli.py eval --data imagenet --model resnet50=run/best.safetensors \\
          --teacher senet154 --teacher resnet152_v1s
    """
    from pipeline.evaluation import EvaluationSettings, evaluate_checkpoints
    from pipeline.inspection.terminal import evaluation_table
    from pipeline.render.settings import RenderSettings
    from pipeline.runtime.execution import Execution

    own = {"image_size": image_size, "mean": mean or None, "std": std or None}
    students, judges = _specs(models, own), _specs(teachers, own)
    execution = Execution(_device(device))
    result = evaluate_checkpoints(
        _data(data, split, class_map, models=[*students, *judges]),
        students,
        teachers=judges,
        interpolation=interpolation,
        settings=EvaluationSettings(RenderSettings(exif=exif), batch_size),
        execution=execution,
    )
    click.echo(_json(result.document())) if as_json else evaluation_table(result)


@main.command(short_help="Show what a label store holds, who made it, and how complete it is.")
@options(
    click.argument("store", type=store_place),
    click.option(
        "--report",
        type=folder,
        help="HTML page to write about the store: distributions, agreement, confusions, "
        "photographs.",
    ),
    click.option(
        "--data",
        type=data_place,
        help="With --report: the labelled images, for photographs on the page.",
    ),
    click.option(
        "--split", default="train", show_default=True, help="Split of --data that was labelled."
    ),
    click.option(
        "--labels",
        type=click.IntRange(1),
        default=200_000,
        show_default=True,
        help="With --report: number of labels to read.",
    ),
    click.option(
        "--no-check",
        is_flag=True,
        help="With --report: verify the digests of the shards that the report reads, not of all.",
    ),
    click.option(
        "--image",
        help="Image whose views, crops and labels are shown: its path as in the store, or the end "
        "of its path.",
    ),
    json_option,
)
def inspect(store, report, data, split, labels, no_check, image, as_json):
    """Show a label store: provenance, completeness, bytes per crop, entropy, agreement
    with the class folders.

    \b
    Example:
      python cli.py inspect labels.zarr
      python cli.py inspect labels.zarr --json
      python cli.py inspect labels.zarr --report report.html --data imagenet
      python cli.py inspect labels.zarr --image n01440764_10026.JPEG
    """
    from pipeline.inspection.store_facts import image_facts, store_facts
    from pipeline.inspection.terminal import image_page, store_page

    if report and image:
        raise click.UsageError(
            "--report is of a whole store, --image of one image; give one of them"
        )
    if data and not report:
        raise click.UsageError(
            "--data is for the photographs of a --report; name a file for it, or leave --data out"
        )
    if image:
        from pipeline.config_file import typed

        facts = image_facts(store, typed(image))
        page = image_page
    elif report:
        from pipeline.inspection.html_report import write_report
        from pipeline.runtime.progress import say

        facts = write_report(
            store,
            report,
            data=data and _data(data, split, store=store),
            labels=labels,
            check=not no_check,
        )
        say(f"wrote {report}; open it in a browser")
        page = None
    else:
        facts, page = store_facts(store), store_page
    if as_json:
        click.echo(_json(facts if image else asdict(facts)))
    elif page:
        page(facts)


@main.command(
    "verify", short_help="Prove that a label store is, to the last bit, what was written."
)
@options(
    click.argument("store", type=store_place),
    click.option(
        "--data",
        type=data_place,
        help="The labelled images, in any form. Every image, or with --sample every sampled image, "
        "is compared with the store's manifest, byte for byte.",
    ),
    click.option(
        "--sample",
        type=click.IntRange(1),
        help="With --data: number of random crops to render and label again with the teachers.",
    ),
    click.option(
        "--teacher",
        "teachers",
        multiple=True,
        type=MODEL,
        help="Teachers of the store, in the store's order, if their weights are files of yours.",
    ),
    click.option(
        "--split", default="train", show_default=True, help="Split of --data that was labelled."
    ),
    click.option(
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Seed of the choice of crops for --sample.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1),
        help="Threads that read the store, some 200 MB each.  [default: one a core, at most 8]",
    ),
    device_option,
    json_option,
)
def verify_store(store, data, sample, teachers, split, seed, threads, device, as_json):
    """Read a whole label store and prove it: every digest, every label's sum, every
    crop inside its image, nothing missing, nothing foreign.

    With --data every image is compared with the store's manifest too. With --sample
    only the images of that many random crops are compared, and the crops are labelled
    again: the new labels must agree with the stored labels. Exit status 0: the store is
    sound and complete. Exit status 1: something is damaged, foreign, missing or can't
    be read. Run generate-labels again to make damaged or missing shards anew.

    \b
    Example:
      python cli.py verify labels.zarr
      python cli.py verify labels.zarr --data imagenet --sample 1000
    """
    from pipeline.inspection.relabel import recheck
    from pipeline.inspection.terminal import verdict_page

    if (sample or teachers) and not (data and sample):
        raise click.UsageError(
            "--sample renders images again and needs --data; --teacher needs both"
        )
    place, models = _device(device) if sample else None, _specs(teachers)
    result = recheck(
        store,
        data and _data(data, split, store=store, models=models),
        models,
        sample,
        device=place,
        seed=seed,
        threads=threads,
    )
    click.echo(_json(result)) if as_json else verdict_page(result)
    if not result["trusted"]:
        raise SystemExit(1)


@main.command("compare", short_help="Compare training runs: figures, settings that differ, curves.")
@options(
    click.argument("runs", type=folder, nargs=-1, required=True),
    click.option(
        "--figure",
        type=folder,
        default="comparison.png",
        show_default=True,
        help="Picture of the curves: .png, .pdf or .svg.",
    ),
    json_option,
)
def compare_runs(runs, figure, as_json):
    """Compare run directories of train-student: the figures that each run reached, the
    settings that differ, and the curves in one picture.

    Runs may still be training, and may have any number of epochs. With --json all
    metrics are printed too.

    \b
    Example:
      python cli.py compare run reference
      python cli.py compare run reference --figure curves.svg --json
    """
    from pipeline.runs.compare import compare, comparison_page, draw
    from pipeline.runtime.progress import say

    result = compare(runs)
    for run in runs:
        _require_outside_data("--figure", figure, run)
    draw(result, figure)
    click.echo(_json(asdict(result))) if as_json else comparison_page(result)
    say(f"wrote {figure}")


@main.command(
    "export", short_help="Export a trained student: for timm and the hub, and for ONNX Runtime."
)
@options(
    click.argument("run", type=folder),
    click.option(
        "--out",
        required=True,
        type=folder,
        help="Folder to create: config.json, model.safetensors, model.onnx and README.md.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["best", "last", "best_ema", "ema"]),
        default="best",
        show_default=True,
        help="Weights of the epoch with the highest validation top-1, or of the last epoch; ema: "
        "of their moving average (train.ema_decay).",
    ),
    click.option(
        "--no-onnx",
        is_flag=True,
        help="Leave out model.onnx, which needs onnx, onnxscript and onnxruntime.",
    ),
    click.option(
        "--store",
        type=store_place,
        help="Label store of the run; the model card then tells more about the teachers.",
    ),
    click.option(
        "--push",
        metavar="ORG/NAME",
        help="Upload the folder to this model of the Hugging Face hub, too.",
    ),
    click.option("--private", is_flag=True, help="With --push: hide the model if it is new."),
    json_option,
)
def export_run(run, out, weights, no_onnx, store, push, private, as_json):
    """Export a trained student to a folder that works without this tool: for timm, in
    the layout of timm's hub; for ONNX Runtime; and with a model card.

    timm.create_model("local-dir:OUT", pretrained=True) gives the student, bit for bit.
    model.onnx is compared with the student on random inputs, and refused if its softmax
    is off by more than 1e-4 in total variation. The model card says how the student was
    made, and what the run measured of it. RUN stays as it is. --push uploads the folder
    once it is complete; the token is that of hf auth login, or HF_TOKEN.

    \b
    Example:
      python cli.py export run --out resnet50-meal-v2 --store labels.zarr
      python cli.py export run --out resnet50-last --weights last --no-onnx
      python cli.py export run --out resnet50-hub --push lab/resnet50-meal-v2
    """
    if private and not push:
        raise click.UsageError("--private goes with --push, which names the model on the hub")
    repo = None
    if push:
        from pipeline.exchange.hub_upload import Repository

        repo = Repository(push, "model")
    from pipeline.exchange.export_student import export, summary

    _require_outside_data("--out", out, run)
    if repo:
        repo.require_token()
    result = export(run, out, weights=weights, onnx=not no_onnx, store=store)
    if not as_json:
        click.echo("\n".join(summary(result)))
    if repo:
        from pipeline.exchange.push_student import push as push_folder
        from pipeline.exchange.push_student import pushed_lines

        result["pushed"] = push_folder(out, repo, private=private)
        if not as_json:
            click.echo("\n".join(pushed_lines(result["pushed"])))
    if as_json:
        click.echo(_json(result))


@main.command("share", short_help="Share a label store on the Hugging Face hub.")
@options(
    click.argument("store", type=folder),
    click.option(
        "--to",
        required=True,
        metavar="ORG/NAME",
        help="Dataset of the hub to create or go on with.",
    ),
    click.option(
        "--licence",
        "--license",
        "licence",
        metavar="NAME",
        help="Licence of the labels, as the hub names licences, for example cc-by-nc-4.0.  "
        "[default: the one chosen before; without one the card says that none was chosen]",
    ),
    click.option("--private", is_flag=True, help="Hide the dataset if it is new."),
    json_option,
)
def share_store(store, to, licence, private, as_json):
    """Upload the finished views of a label store to a dataset of the Hugging Face hub,
    from where every command that reads a store reads it as hf://ORG/NAME.

    Each shard is read and compared with its digest first. No image is uploaded, but the
    names of files and classes are. Run the same command again to go on where it was
    stopped, or to add views that were finished since: only what is new is sent. The
    token is that of hf auth login, or HF_TOKEN.

    \b
    Example:
      python cli.py share labels.zarr --to lab/imagenet-labels --licence cc-by-nc-4.0
    """
    from pipeline.exchange.share import share

    result = share(store, to, licence=licence, private=private)
    click.echo(_json(result.document()) if as_json else "\n".join(result.lines()))


@main.command("merge", short_help="Merge several label stores of the same crops into one.")
@options(
    click.argument("stores", type=store_place, nargs=-1, required=True),
    click.option("--out", required=True, type=folder, help="Label store to create or go on with."),
    click.option("--codec", help="Codec of averaged labels.  [default: the first store's]"),
)
def merge_stores(stores, out, codec):
    """Join stores of one recipe that were filled separately, or average stores of
    different teachers.

    Joining combines shards and views. Of two clusters without a common disk, one labels
    with --worker 0/2 and the other with --worker 1/2; or one with --views 90 and the
    other with --views 180 --first-view 90. Averaging combines labels of the same crops
    by different teachers, each teacher counting once: for teachers that don't fit on a
    GPU together, or are added later. Stores of different crops are refused. Run the
    same command again to go on where it was stopped.

    \b
    Example:
      python cli.py merge here.zarr there.zarr --out labels.zarr
      python cli.py merge senet.zarr resnet.zarr --out both.zarr
    """
    from cache import LabelStore
    from cache.merge import merge
    from pipeline.images.result_places import require_elsewhere
    from pipeline.runtime.progress import Progress, say

    chosen = codec and _codec(codec)
    parts = [LabelStore.open(store) for store in stores]
    require_elsewhere("--out", out, parts[0].images)
    total = max(part.finished().size for part in parts)
    with Progress("merging", total, "shards") as progress:
        made = merge(stores, out, codec=chosen, say=say, progress=progress.advance)
    done, of = made.progress()
    say(
        f"{out} is complete: {of} of {of} shards"
        if done == of
        else f"{done} of {of} shards of {out}; the others aren't in the stores yet, or another "
        f"merge is at them; run this command again later"
    )


@main.command(
    "import-labels", short_help="Import published labels into a store, in place of stage one."
)
@options(
    click.argument("directory", type=folder),
    click.option(
        "--format",
        "form",
        default="fkd",
        show_default=True,
        metavar="fkd|ml-dr",
        help="Format of the label files. Of ml-dr's sets those of crops and flips alone.",
    ),
    data_option,
    click.option("--store", required=True, type=folder, help="Label store to create or finish."),
    click.option(
        "--teacher",
        "teachers",
        multiple=True,
        metavar="NAME",
        help="Teacher that made the labels, if you know it; repeat for several.",
    ),
    click.option(
        "--image-size",
        type=click.IntRange(8, 4096),
        help="Input size of the teachers in pixels, if you know it.",
    ),
    click.option(
        "--interpolation",
        type=click.Choice(["bilinear", "bicubic"]),
        help="Interpolation of the crops that were labelled.  [default: as the generators have it, "
        "bicubic for fkd, bilinear for ml-dr]",
    ),
    click.option(
        "--views",
        type=click.IntRange(1),
        help="Number of crops to take of each image, from the first on.  [default: all]",
    ),
    click.option(
        "--rest",
        type=click.Choice(["even", "none"]),
        default="even",
        show_default=True,
        help="What a top-k label says of the other classes: they share the rest evenly (FKD's "
        "marginal_smoothing, ml-dr's smooth), or have nothing (FKD's marginal_renorm). The files "
        "don't tell.",
    ),
    click.option("--codec", default="pow8", show_default=True, help="Codec of the stored labels."),
    click.option(
        "--split", default="train", show_default=True, help="Split of --data that was labelled."
    ),
    class_map_option,
)
def import_labels(
    directory,
    form,
    data,
    store,
    teachers,
    image_size,
    interpolation,
    views,
    rest,
    codec,
    split,
    class_map,
):
    """Make a label store from the label files in DIRECTORY, one file per image, and
    from the images that were labelled.

    FKD (arXiv 2112.01528) publishes such files, FKD's generator makes them, and MEAL
    V2's authors use them for "Fast MEAL V2". ml-dr (arXiv 2303.08983) publishes
    ImageNet+-RRC, -RRC-Small and -RRC-Mini. Crops, flips and labels are taken as they
    are. Facts that no file tells (weights, how crops were drawn) are recorded as
    unknown. Images without a label file are left out. Nothing in a file is executed.
    Run the same command again to go on where it was stopped.

    \b
    Examples:
      python cli.py import-labels FKD_soft_label_500_crops_marginal_smoothing_k_5 \\
          --data imagenet --store fkd.zarr \\
          --teacher tf_efficientnet_l2_ns_475 --image-size 475
      python cli.py import-labels imagenet_plus_rrc_mini --format ml-dr \\
          --data imagenet --store rrc.zarr
    """
    from pipeline.exchange.import_labels import FORMATS, REFUSED, Known, import_labels
    from pipeline.exchange.label_files import LabelFileError

    if form in REFUSED:
        raise LabelFileError(
            f"{form} label sets can't be imported: {REFUSED[form]}; make labels with "
            f"generate-labels"
        )
    if form not in FORMATS:
        raise click.BadParameter(
            f"{form!r} must be {' or '.join(FORMATS)} ({', '.join(REFUSED)} can't be replayed "
            f"exactly)",
            param_hint="--format",
        )
    import_labels(
        directory,
        _data(data, split, class_map),
        store,
        split=split,
        known=Known(teachers, image_size, interpolation, rest=rest, form=form),
        views=views,
        codec=_codec(codec).name,
    )


@main.command(
    "export-labels", short_help="Export a store's labels as files for FKD's training code."
)
@options(
    click.argument("store", type=store_place),
    click.option(
        "--out", required=True, type=folder, help="Folder of label files to create or go on with."
    ),
    click.option(
        "--labels",
        type=click.Choice(["full", "top5", "top10"]),
        default="top5",
        show_default=True,
        help="Classes kept in each label.",
    ),
    click.option(
        "--views",
        type=click.IntRange(1),
        help="Number of crops to take of each image, from the first on.  [default: all]",
    ),
    click.option(
        "--split",
        default="train",
        show_default=True,
        help="Folder of the images in the data set, as the label files' paths name it.",
    ),
)
def export_labels(store, out, labels, views, split):
    """Write a label file for each image, OUT/SPLIT/CLASS/NAME.tar, as FKD
    (github.com/szq0214/FKD) reads it.

    top5 and top10 are FKD's marginal_smoothing_k5 and _k10: the likeliest classes, and
    the remaining probability spread evenly over the others. full is FKD's ori. Crops
    become fractions of the image's height and width. MEAL V2's FKD_train.py looks one
    folder deeper than FKD's train_FKD.py: it finds OUT in the folder --softlabel_path,
    if OUT has the name of the folder --imagenet.

    \b
    Example:
      python cli.py export-labels labels.zarr --out soft_labels/imagenet --labels top10
    """
    from pipeline.exchange.export_labels import export_labels

    export_labels(store, out, labels=labels, views=views, split=split)


@main.command(short_help="Run both stages on handwritten digits, in minutes, without a network.")
@options(
    click.option(
        "--out",
        type=folder,
        default="demo",
        show_default=True,
        help="Folder for data, runs and store.",
    ),
    device_option,
    json_option,
    set_option,
)
def demo(out, device, as_json, settings):
    """Train two teachers, label a store with them, train a student from the store's
    soft labels and the same student from hard labels, and compare.

    \b
    Example:
      python cli.py demo
    """
    from pipeline.config_file import load
    from pipeline.demo import demo

    recipe = load("demo_digits", None, list(settings))
    result = demo(recipe, out, _device(device), quiet=as_json)
    if as_json:
        click.echo(_json(result))


def _json(result: dict) -> str:
    """Return standard JSON; a figure that isn't finite becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(v) for key, v in value.items()}
        if isinstance(value, list):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(result), allow_nan=False)


def _recipe(path: Path, settings: tuple[str, ...], overrides: dict[str, Any]) -> Any:
    from pipeline.config_file import load

    return load(
        path,
        {key: value for key, value in overrides.items() if value not in (None, [])},
        list(settings),
    )


def _codec(name: str) -> Any:
    from cache.format.codec import CODECS

    if name not in CODECS:
        close = difflib.get_close_matches(name, CODECS, 1)
        raise click.BadParameter(
            f"{name!r} must be one of {', '.join(CODECS)}"
            + (f"; did you mean {close[0]}?" if close else ""),
            param_hint="--codec",
        )
    return CODECS[name]


def _data(
    place: Any,
    split: str,
    class_map: str | None = None,
    *,
    store: Path | None = None,
    models: Sequence[Any] = (),
) -> Any:
    """Find a data set. store, models: a store and models that must be there. They are
    looked for first, since finding the images of a bucket may fetch them all."""
    from cache import LabelStore
    from cache.errors import DamagedStore
    from pipeline.images.data_set import DataSet

    if models:
        from pipeline.models.weights import require_known

        require_known(models)
    if store is not None:
        with suppress(DamagedStore):  # the command says what it makes of that
            LabelStore.open(store)
    return DataSet.find(place, split, _class_map(class_map))


def _require_outside_data(option: str, path: Path, run: Path) -> None:
    """Refuse a place among the images that a run was trained or validated on."""
    from pipeline.images.result_places import require_elsewhere
    from pipeline.images.scan_cache import kept_paths
    from pipeline.runs.folder import SCANS

    for name in SCANS:
        require_elsewhere(option, path, kept_paths(run / name))


def _class_map(name: str | None) -> list[str] | None:
    if name is None:
        return None
    if name == "imagenet-1k":
        from pipeline.models.names import imagenet_classes

        return imagenet_classes()
    from pipeline.images.class_names import read_class_map

    return read_class_map(name)


def _specs(models: list[dict], own: dict[str, Any] | None = None) -> list:
    from pipeline.config import ModelSpec
    from pipeline.config_file import validate

    return [validate({**model, **(own or {})}, "command line", ModelSpec) for model in models]


def _device(name: str | None) -> Any:
    from pipeline.runtime.distributed import DeviceError, own_device

    try:
        return own_device(name)
    except DeviceError as error:
        raise click.UsageError(str(error)) from None


def _share(recipe: Any, text: str | None, first_view: int) -> Any:
    """Return this process's share: I/N of the command line, combined with torchrun's
    rank and world size; or an open share, with this worker's number from the engine
    that started it."""
    from pipeline.labelling.shares import Share
    from pipeline.runtime.engine import Worker
    from pipeline.runtime.launch import Launch
    from pipeline.runtime.progress import say

    if text == "auto":
        worker = Worker.here()
        if not worker.engine:
            say(
                "nothing here tells a worker's number (JOB_COMPLETION_INDEX, SLURM_JOB_ID, "
                "SKYPILOT_NODE_RANK, RANK): this worker takes what no other holds"
            )
        return Share.open_to(worker, first_view, recipe.store.views_per_decode)
    found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", "0/1" if text is None else text)
    index, count = map(int, found.groups()) if found else (0, 0)
    if index >= count:
        raise click.BadParameter(
            f"{text!r} must be auto, or I/N with I from 0 to N-1, like 0/4", param_hint="--worker"
        )
    me = Launch.here()
    return Share(
        index * me.world + me.rank,
        count * me.world,
        first_view,
        recipe.store.views_per_decode,
    )


if __name__ == "__main__":
    main()
