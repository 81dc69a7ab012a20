"""Train a student from stored labels, from live teachers (online), or with hard labels
(stage two). One loop serves all three."""

from __future__ import annotations

from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from cache.format.manifest import USABLE, Images
from cache.hub.address import Address, is_hub
from cache.hub.copy import announced, here
from cache.system import durable
from cache.system.claims import claim, claims_of
from cache.system.local import require_local
from pipeline.config import Config, ConfigError
from pipeline.evaluation import Validation
from pipeline.images.data_set import DataSet
from pipeline.images.names import is_hidden, split_of
from pipeline.images.patience import DataError, is_folder, is_there, listed
from pipeline.images.result_places import require_no_split, require_outside
from pipeline.images.scan import scan_and_say
from pipeline.images.scan_cache import Scanned
from pipeline.images.sources.opening import in_split, place_of
from pipeline.images.sources.remote.url import Url
from pipeline.models.model import Model
from pipeline.models.weights import Drop, load
from pipeline.runs.folder import CONFIG, SCANS, RunError
from pipeline.runs.tracking.trackers import require_trackers
from pipeline.runtime.distributed import ALONE, Processes
from pipeline.runtime.engine import take_over
from pipeline.runtime.execution import Execution
from pipeline.runtime.precision import fixed_shapes, require_precision, usual_precision
from pipeline.runtime.profiling import TRAINING, advice_on_training, report
from pipeline.runtime.progress import say
from pipeline.runtime.waiting import giving_way
from pipeline.runtime.wording import same, some
from pipeline.training.loop import Run
from pipeline.training.resume import (
    classes_of_run,
    config_of_run,
    state_of_run,
)
from pipeline.training.source import Source, choose_source


def train(
    config: Config,
    data: DataSet,
    out: Path,
    *,
    store: Path | None = None,
    validation: Path | Url | None = None,
    execution: Execution | None = None,
    allow_renderer_difference: bool = False,
) -> dict:
    """Train a student, and leave the run in ``out``.

    If ``out`` holds a part of this very run, training resumes after the last finished
    epoch. data: the images; its class map counts only without a store. store: the label
    store; needed for soft labels unless teachers are live. validation: a folder to
    validate on, instead of val/ of the folder that the user named. execution: with
    several processes, each process gets its part of every batch, and the first process
    writes. allow_renderer_difference: train even if this machine renders other pixels
    than the teachers saw. Returns the last epoch's metrics. Raises MealError for every
    error that the user can fix.
    """
    require_local(out, None if is_hub(store) else store)
    validation = None if validation is None else place_of(validation)
    execution = execution or Execution()
    if config.student is None:
        raise ConfigError(
            "student is missing; name one in the config, or with --student MODEL[=CHECKPOINT]"
        )
    processes, out = execution.processes, out.absolute()
    store = at_one_commit(store, processes)
    processes.together(lambda: _require_possible(config, execution))
    processes.first(lambda: require_trackers(execution.track))
    if any(part.is_file() for part in (out, *out.parents)):
        raise RunError(
            f"{out} can't be a folder, since a part of it is a file; choose another --out"
        )
    validating = processes.together(lambda: _validation_set(data, validation))
    processes.together(
        lambda: require_outside("--out", out, *(one for one in (data, validating) if one))
    )
    processes.together(lambda: require_no_split("--out", out, data))
    processes.first(lambda: take_over(out, execution.worker.name))
    with claim(claims_of(out), "train") if processes.leads else nullcontext() as mine:
        processes.first(lambda: _require_alone(out, mine))
        scans = [Scanned(out / name) for name in SCANS]
        begun = processes.first(lambda: classes_of_run(out))
        if begun and store is None and not data.mapped:
            # Versions up to 0.8 took more folders for class folders.
            data = replace(data, class_names=begun, mapped=True)
        before = processes.first(lambda: config_of_run(out))
        if before and store is None and not config.render.resize:
            config = config.with_resize(before.render.resize)
        config = config.with_precision(_precision(before, execution))
        judge = before.train.discriminator if before else None
        config = config.with_variant(judge.variant if judge else "paper")
        config, source, teachers = choose_source(
            config,
            data,
            store,
            execution,
            started_views=before.train.views if before else None,
            allow_renderer_difference=allow_renderer_difference,
            before=scans[0],
        )
        if len(source.images.usable) < 2:
            raise DataError(
                f"{data.path} holds {len(source.images.usable)} usable images; training needs two "
                f"or more"
            )
        state = processes.first(lambda: state_of_run(out, config, source))
        validated = find_validation(data, validating, source, processes, scans[1])
        student = processes.together(lambda: _student(config, source))
        for line in [*student.introduction("student"), *_unusual(config, source)]:
            say(line)
        processes.first(lambda: _make_folder(out, config, scans))
        run = processes.together(
            lambda: Run(
                config, out, student.to(execution.device), teachers, source, validated, execution
            )
        )
        run.learner = processes.joined(run.learner)
        with (
            closing(run.replay),
            run.trackers.following(),
            fixed_shapes(),
            giving_way(execution.device),
        ):
            if state is not None:
                run.restore(state)
            return _train_epochs(run)


def at_one_commit(store: Path | str | None, processes: Processes) -> Path | None:
    """Return the path of a store. Of a store of the hub it is the path of the local
    copy, at the commit that is the newest for the first process."""
    if store is None or not is_hub(store):
        return store if store is None else Path(store)
    commit = processes.first(lambda: announced(store)).parent.name
    repo = Address.parse(store).repo
    return processes.together(lambda: here(f"hf://{repo}@{commit}"))


def _precision(before: Config | None, execution: Execution) -> str:
    """Return the precision of a run that leaves it open: as the run began, otherwise
    the device's usual one."""
    return (before and before.train.precision) or usual_precision(execution.device)


def _student(config: Config, source: Source) -> Model:
    recipe = config.train
    student = load(
        config.student,
        class_names=source.data.class_names,
        image_size=recipe.image_size,
        seed=recipe.seed,
        drop=Drop(recipe.dropout, recipe.drop_path),
    )
    student.interpolation = source.policy.interpolation
    return student


def _train_epochs(run: Run) -> dict:
    """Validate what an earlier start has trained and not validated, then train until
    the run has all its epochs. Returns the last epoch's metrics."""
    config, clock = run.config, run.clock
    if run.unvalidated:
        run.finish_pass()
    elif run.epoch >= config.train.epochs:
        say(f"{run.out} has its {run.epoch} epochs already; a larger --epochs goes on")
    while run.epoch < config.train.epochs:
        run.train_pass()
    if clock.exact:
        for line in report(clock, TRAINING, advice_on_training(clock, config, run.device)):
            say(line)
    return run.metrics[-1]


def find_validation(
    data: DataSet,
    other: DataSet | None,
    source: Source,
    processes: Processes = ALONE,
    before: Scanned | None = None,
) -> Validation | None:
    """Scan the images to validate on.

    other: these images on this machine; None: there are none, and that is said. before:
    an earlier start's scan of the folder. Raises DataError.
    """
    if not processes.first(lambda: other is not None):
        processes.first(
            lambda: say(f"no validation: {_why_unvalidated(data)}, and no --val-data was given")
        )
        return None
    found = processes.together(lambda: _required(other, data))
    if why := processes.first(lambda: _untold(found, data, source)):
        say(f"no validation: {why}")
        return None
    mine = found.named(source.data.class_names)
    return Validation(mine, processes.first(lambda: _to_validate_on(mine, source, before)))


def _untold(found: DataSet, data: DataSet, source: Source) -> str:
    """Return why images can't be validated on, or an empty text. Images that the user
    named for it are refused later instead, if their classes have other names."""
    told, known = found.told(), set(map(same, source.data.class_names))
    if not told.names:
        return f"nothing tells the classes of {found.path}"
    if told.numbered or found.root != data.root or known & set(map(same, told.names)):
        return ""
    return (
        f"the classes of {found.path} ({some(told.names)}) have other names than those that the "
        f"student learns ({some(source.data.class_names)}); pass --val-data whose classes have "
        f"these names"
    )


def _validation_set(data: DataSet, other: Path | Url | None) -> DataSet | None:
    """Find the images to validate on: those that the user named, or the split val of
    the data set, if it is divided into splits."""
    if other is not None:
        return DataSet.find(other, "val")
    source = in_split(data.root, "val") if data.root else None
    if source is not None:
        return DataSet(source, source.classes().names, root=data.root, split="val")
    if data.root and data.source.divided:
        with suppress(DataError):  # it has no split of this name
            return DataSet.find(data.root, "val")
    return None


def _why_unvalidated(data: DataSet) -> str:
    """Say what there is in place of class folders to validate on."""
    root = data.root
    if root is None or root == data.path or isinstance(root, Url):
        return "the data has no val/"
    if is_there(root / "val"):
        return f"{root / 'val'} holds no class folders"
    near = [
        entry.name
        for entry in listed(root)
        if split_of(entry.name) == "val" and not is_hidden(entry.name) and is_folder(entry)
    ]
    return "the data has no val/" + (
        f" (it has {near[0]}/, which --val-data {root / near[0]} would take)" if near else ""
    )


def _required(other: DataSet | None, data: DataSet) -> DataSet:
    if other is None:
        raise DataError(
            f"{data.root} has no val/ here, and has one where the first process runs; put it on "
            f"every machine"
        )
    return other


def _to_validate_on(data: DataSet, source: Source, before: Scanned | None) -> Images:
    found = scan_and_say(data, source.settings, before=before)
    if not (found.status == USABLE).any():
        raise DataError(f"{data.path} holds no image to validate on")
    return found


def _require_possible(config: Config, execution: Execution) -> None:
    processes, device = execution.processes, execution.device
    least = 2 * processes.world * config.train.crops_per_image
    parts = 2 * processes.world * config.train.accumulate
    if processes.world > 1 and config.train.batch_size < parts > least:
        raise ConfigError(
            f"train.accumulate {config.train.accumulate} leaves fewer than two crops in each part "
            f"of train.batch_size {config.train.batch_size} in each of {processes.world} "
            f"processes; lower it, or raise train.batch_size to {parts}"
        )
    if processes.world > 1 and config.train.batch_size < least:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is fewer than two images for each of "
            f"{processes.world} processes; set it to {least} or more, or start fewer"
        )
    if config.train.sync_bn and device.type != "cuda":
        raise ConfigError(
            "train.sync_bn is for GPUs, and this runs on a CPU; set train.sync_bn=false"
        )
    if config.train.precision is not None:
        require_precision(config.train.precision, device, "train.precision")
    if config.train.online:
        require_precision(config.store.precision, device, "store.precision")


def _require_alone(out: Path, mine: set[str]) -> None:
    if not mine:
        raise RunError(
            f"another process is training in {out}; wait for it, or choose another --out"
        )


def _make_folder(out: Path, config: Config, scans: list[Scanned]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for scan in scans:
        scan.keep()
    durable.write(out / CONFIG, lambda scratch: scratch.write_text(config.to_yaml(), "utf-8"))


def _unusual(config: Config, source: Source) -> list[str]:
    """Return lines that tell the user how the labels differ from a store's plain
    labels."""
    lines = [f"trained in {config.train.precision}"] if config.train.precision != "float32" else []
    if config.train.online:
        lines.append(
            f"online: {len(config.teachers)} teachers label every batch; no store is read or made"
        )
    if source.policy.cutmix:
        seen = (
            "the class folders, mixed by area"
            if config.train.labels == "hard"
            else "as the teachers saw it"
        )
        lines.append(f"CutMix, its label {seen}")
    if config.train.cutmix:
        lines.append(
            "CutMix of neighbours in a batch, labelled "
            f"{'by live teachers' if config.train.online else 'by area'}"
        )
    if config.train.crops_per_image > 1:
        lines.append(
            f"{config.train.crops_per_image} crops of each decoded image: a pass over the images "
            f"counts as that many epochs"
        )
        if source.policy.cutmix:
            lines.append(
                "every crop's CutMix partner is another image, which is decoded too: "
                "crops_per_image saves nothing with this store"
            )
    return lines
