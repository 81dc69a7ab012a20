"""Stage two: train a student from stored labels, or with hard ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from cache import LabelStore
from cache.claims import claim, claims_of
from cache.schema import USABLE, Images, StoreError
from pipeline import checkpoint, images, losses, philox
from pipeline.checkpoint import RunError
from pipeline.config import Config, ConfigError
from pipeline.evaluate import evaluate
from pipeline.generate import require_same_pixels
from pipeline.models import Model, load
from pipeline.progress import Progress, duration, say
from pipeline.replay import Batch, Decoder, FolderLabels, Replay, Source, StoredLabels, policy_of

FREE_KEYS = ("train.epochs", "render.threads", "teachers", "store", "crops.views")  # may change when a run is gone on with


@dataclass
class Validation:
    folder: Path
    images: Images


def train(
    config: Config,
    data: Path,
    out: Path,
    *,
    store: Path | None = None,
    classes: list[str] | None = None,
    validation: Path | None = None,
    device: torch.device,
    allow_renderer_difference: bool = False,
) -> dict:
    """Train a student and leave it in ``out``; go on from the last finished epoch if ``out`` holds a part of this very run.

    store: the label store; needed for soft labels. classes: a class map, where there is no store. validation: another folder to validate on
    than ``data``/val. Returns the last epoch's metrics. Raises MealError for whatever the user can mend.
    """
    if config.student is None:
        raise ConfigError("student is missing; name one in the config, or with --student MODEL[=CHECKPOINT]")
    folder, out = images.split_folder(data, "train"), out.absolute()
    with claim(claims_of(out), "train") as mine:
        if not mine:
            raise RunError(f"another process is training in {out}; wait for it, or choose another --out")
        return _train(config, data, folder, out, store, classes, validation, device, allow_renderer_difference)


def _train(
    config: Config,
    data: Path,
    folder: Path,
    out: Path,
    store: Path | None,
    classes: list[str] | None,
    validation: Path | None,
    device: torch.device,
    allow_renderer_difference: bool,
) -> dict:
    config, source = _source(config, folder, store, classes, _views_of_run(out), allow_renderer_difference)
    if len(source.images.usable) < 2:
        raise images.DataError(f"{folder} holds {len(source.images.usable)} usable images; training needs two or more")
    state = checkpoint.load_state(out / "state.pt")
    _start_or_resume(out, config, state, source)
    student = load(config.student, classes=len(source.class_names), image_size=config.train.image_size, seed=config.train.seed)
    student.interpolation = source.policy.interpolation
    for line in (f"student {student.name}, {student.image_size} px, {student.classes} classes", *student.notes):
        say(line)
    validated = _validation(data, validation, source, config)
    run = Run(config, out, student.to(device), source, folder, validated, device)
    if state is not None:
        run.restore(state)
    if run.epoch >= config.train.epochs:
        say(f"{out} has its {run.epoch} epochs already; a larger --epochs goes on")
    while run.epoch < config.train.epochs:
        run.train_epoch()
    return run.metrics[-1]


def _views_of_run(out: Path) -> int | None:
    """How many views the run in ``out`` replays, if there is one: a store that has grown since must not change it."""
    if not (out / "state.pt").exists():
        return None
    try:
        return yaml.safe_load((out / "config.yaml").read_text())["train"]["views"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _source(
    config: Config, folder: Path, path: Path | None, classes: list[str] | None, started_views: int | None, allow_renderer_difference: bool
) -> tuple[Config, Source]:
    """The config with what the source decides filled in, and the source, checked against the folder."""
    hard = config.train.labels == "hard"
    if path is None:
        if not hard:
            raise ConfigError("soft labels need a --store; make one with generate-labels, or set train.labels=hard")
        names = classes or images.class_names(folder)
        found = images.scan(folder, names, exif=config.crops.exif, threads=config.render.threads, order_seed=config.crops.seed)
        for line in [*images.unusable_summary(found), *images.empty_classes(found, names, folder)]:
            say(line)
        views = config.train.views or config.train.epochs
        return config, FolderLabels(found, names, config.crops, config.render.backend, views)
    store = LabelStore.open(path)
    if classes is not None and classes != store.class_names:
        raise StoreError(f"{path} was made with another --class-map; leave it out, the store knows its classes")
    folders = images.class_names(folder)
    foreign = sorted(set(folders) - set(store.class_names))
    if foreign:
        raise StoreError(
            f"{path} has labels for {store.classes} classes, {folder} has {len(folders)} class folders of which {len(foreign)} are not among them "
            f"(the first is {foreign[0]}); pass the images that the store was made from, or generate a new store"
        )
    images.require_same_files(folder, store.images, store.class_names, str(path))
    _require_same_policy(config, store)
    views = config.train.views or started_views or store.views
    if views > store.views:
        raise StoreError(
            f"train.views is {views} but {path} has {store.views}; extend it with generate-labels --views {views}, or lower train.views"
        )
    for view in range(min(views, config.train.epochs)):
        store.require_finished(view)
    try:
        require_same_pixels(store, folder, config.render.threads)
    except StoreError as difference:
        if not allow_renderer_difference:
            raise
        say(f"warning: {difference}")
    seen = sorted({t["image_size"] for t in store.provenance["teachers"]})
    if config.train.image_size not in seen:
        say(f"the student trains at {config.train.image_size} px, a size that no teacher of {path} saw ({', '.join(map(str, seen))} px)")
    if config.train.epochs > views:
        say(f"{config.train.epochs} epochs replay {views} views: each comes up to {math.ceil(config.train.epochs / views)} times")
    filled = config.model_copy(
        update={
            "crops": policy_of(store),
            "train": config.train.model_copy(update={"views": views}),
            "render": config.render.model_copy(update={"backend": store.provenance["renderer"]["backend"]}),
        }
    )
    return filled, StoredLabels(store, views, hard=hard)


def _require_same_policy(config: Config, store: LabelStore) -> None:
    """A config that asks for other crops than the store holds can't have them."""
    kept = policy_of(store)
    for name in config.crops.model_fields_set - {"views"}:
        ours, theirs = getattr(config.crops, name), getattr(kept, name)
        if ours != theirs:
            raise ConfigError(
                f"crops.{name} is {ours}, {store.path} was made with {theirs}; set it so, leave it out, or generate another store"
            )
    if "backend" in config.render.model_fields_set and config.render.backend != store.provenance["renderer"]["backend"]:
        raise ConfigError(
            f"render.backend is {config.render.backend}, {store.path} was made with {store.provenance['renderer']['backend']}; leave it out"
        )


def _start_or_resume(out: Path, config: Config, state: dict | None, source: Source) -> None:
    """Make the run directory, or see that what is in it is a part of this run."""
    file = out / "config.yaml"
    if state is None:
        ours = {"config.yaml", "last.safetensors", "best.safetensors", "metrics.jsonl"}  # a kill in the first epoch's end leaves these
        if out.exists() and not out.is_dir():
            raise RunError(f"{out} is a file; choose another --out")
        if out.exists() and any(p.name not in ours and not p.name.startswith(".") for p in out.iterdir()):
            raise RunError(f"{out} is not empty and holds no run; choose another --out")
        if len(_lines(out / "metrics.jsonl")) > 1:
            raise RunError(f"{out} holds a run whose state.pt is gone, so it can't go on; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
    else:
        before, now = _flat(yaml.safe_load(file.read_text())), _flat(config.model_dump(mode="json"))
        for key in [*now, *(before.keys() - now.keys())]:
            if not key.startswith(FREE_KEYS) and before.get(key) != now.get(key):
                raise RunError(
                    f"{out} was started with {key} {before.get(key)}, this is {now.get(key)}; pass the same to go on, or choose another --out"
                )
        if state["source"] != source.identity:
            what = "another label store" if isinstance(source, StoredLabels) else "other images or classes"
            raise RunError(f"{out} was started with {what}; pass the same to go on, or choose another --out")
    checkpoint.write(file, lambda scratch: scratch.write_text(config.to_yaml()))


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _flat(document: object, prefix: str = "") -> dict[str, object]:
    if isinstance(document, dict):
        return {k: v for key, value in document.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: document}


def _validation(data: Path, other: Path | None, source: Source, config: Config) -> Validation | None:
    """DATA/val, or the folder that the user named; None if there is neither."""
    if other is not None:
        if not other.is_dir():
            raise images.DataError(f"--val-data {other} is no folder; it must hold class folders, or val/ with them")
        folder = images.split_folder(other, "val")
    elif images.is_split(data, "val"):
        folder = images.split_folder(data, "val")
    else:
        say("no validation: the data has no val/, and no --val-data was given")
        return None
    found = images.scan(folder, source.class_names, exif=source.policy.exif, threads=config.render.threads)
    for line in [*images.unusable_summary(found), *images.empty_classes(found, source.class_names, folder)]:
        say(line)
    if not (found.status == USABLE).any():
        raise images.DataError(f"{folder} holds no image to validate on")
    return Validation(folder, found)


class Run:
    """A student in training: model, optimizer, and what has been done so far."""

    def __init__(
        self, config: Config, out: Path, student: Model, source: Source, folder: Path, validation: Validation | None, device: torch.device
    ) -> None:
        self.config, self.out, self.student, self.source, self.validation, self.device = config, out, student, source, validation, device
        recipe = config.train
        groups = [{"params": list(student.module.parameters()), "base_lr": recipe.lr}]
        self.discriminator = None
        if recipe.discriminator:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                self.discriminator = losses.Discriminator(student.classes).to(device)
            groups.append({"params": list(self.discriminator.parameters()), "base_lr": recipe.discriminator.lr})
        self.optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        self.replay = Replay(
            source, folder, image_size=recipe.image_size, batch_size=recipe.batch_size, seed=recipe.seed, rendering=config.render
        )
        stored = isinstance(source, StoredLabels)
        self.decode = Decoder(source.store.codec, device) if stored and not source.hard else None
        self.epoch = 0
        self.metrics: list[dict] = []

    def restore(self, state: dict) -> None:
        self.student.module.load_state_dict(state["model"])
        if self.discriminator:
            self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.metrics = state["epoch"], state["metrics"]
        say(f"going on with {self.out} after {self.epoch} epochs")

    def train_epoch(self) -> None:
        """One pass over the images, validation, and the checkpoints."""
        recipe, epoch = self.config.train, self.epoch
        decay = recipe.gamma ** sum(epoch >= m for m in recipe.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * decay
        rate = recipe.lr * decay
        # Dropout and the like draw anew in each epoch, and the same whether or not the run was interrupted before it.
        torch.manual_seed(int(philox.words(recipe.seed, epoch, 0, 0, 3)[0, 0]))
        self.student.module.train()
        sums = torch.zeros(5, dtype=torch.float64)  # as _step returns them
        seen, shown, rows = 0, 0.0, len(self.source.images.usable)
        with Progress(f"epoch {epoch + 1}/{recipe.epochs}", rows, "images") as progress, self.replay.epoch(epoch) as batches:
            for batch in batches:
                sums += self._step(batch)
                seen += len(batch.rows)
                shown = float(sums[0]) / seen
                if not math.isfinite(shown):
                    raise self._diverged(shown, rate)
                progress.advance(len(batch.rows), f"loss {shown:.3f}")
        if not all(torch.isfinite(p).all() for p in self.student.module.parameters()):  # by the very last step
            raise self._diverged(math.nan, rate)
        loss, entropy, agreeing, against, told = (sums / seen).tolist()
        metrics = {
            "epoch": epoch,
            "view": epoch % self.source.views,
            "lr": rate,
            "loss": loss,
            "kl": loss - entropy if self.decode else None,
            "agreement": 100 * agreeing,
            "images": seen,
            "seconds": round(progress.seconds, 3),
            "images_per_second": round(seen / progress.seconds, 1),
        }
        if self.discriminator:
            metrics |= {"discriminator_loss": against, "discriminator_accuracy": 100 * told}
        if self.validation:
            metrics |= self._validate()
        self.epoch += 1
        self.metrics.append(metrics)
        self._save()
        say(self._summary(metrics))

    def _diverged(self, loss: float, rate: float) -> RunError:
        return RunError(f"the loss is {loss} in epoch {self.epoch + 1}; lower train.lr (now {rate:g}), or check the student's weights")

    def _step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step. Returns float64 [5], sums over the batch: loss against the labels, entropy of the labels, rows where student and label
        put the same class first, and the discriminator's loss and right answers."""
        labels = batch.labels.to(self.device, non_blocking=True)
        logits = self.student(batch.pixels.to(self.device, non_blocking=True), self.config.train.precision)
        entropy = against = told = torch.zeros((), device=self.device)
        if self.decode:
            targets = self.decode(labels)
            loss, entropy, best = losses.soft_cross_entropy(logits, targets), losses.entropy(targets).sum(), targets.argmax(dim=1)
        else:
            loss, best = nn.functional.cross_entropy(logits, labels, reduction="none"), labels
        total = loss.mean()
        if self.discriminator:
            against, told = self.discriminator(logits, targets, self.source.store.codec.smallest)
            total = total + against
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        with torch.no_grad():
            agreeing = (logits.argmax(dim=1) == best).sum()
            n = len(labels)
            return torch.stack([loss.sum(), entropy, agreeing, n * against, n * told]).double().cpu()

    def _validate(self) -> dict:
        self.student.module.eval()
        result = evaluate(
            [self.student],
            self.validation.folder,
            self.validation.images,
            self.student.classes,
            device=self.device,
            batch_size=min(256, self.config.train.batch_size),
            exif=self.source.policy.exif,
            backend=self.source.backend,
            threads=self.config.render.threads,
            what="validating",
        )["models"][0]
        return {"val_top1": result["top1"], "val_top5": result["top5"], "val_loss": result["loss"]}

    def _save(self) -> None:
        """The student for others first, then what this run goes on from: after a kill between the two, the epoch is done again, to the same end."""
        newest = self.metrics[-1]
        facts = {
            "epoch": newest["epoch"],
            "val_top1": newest.get("val_top1"),
            "labels": self.config.train.labels,
            "source": self.source.identity,
        }
        checkpoint.save_model(self.out / "last.safetensors", self.student, facts)
        if newest.get("val_top1", 0.0) >= max(
            m.get("val_top1", 0.0) for m in self.metrics
        ):  # without any validation the newest is the best
            checkpoint.save_model(self.out / "best.safetensors", self.student, facts)
        lines = "".join(json.dumps(m) + "\n" for m in self.metrics)
        checkpoint.write(self.out / "metrics.jsonl", lambda scratch: scratch.write_text(lines))
        state = {
            "model": self.student.module.state_dict(),
            "discriminator": self.discriminator.state_dict() if self.discriminator else None,
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "metrics": self.metrics,
            "source": self.source.identity,
        }
        checkpoint.save_state(self.out / "state.pt", state)

    def _summary(self, m: dict) -> str:
        parts = [f"epoch {m['epoch'] + 1}/{self.config.train.epochs}", f"view {m['view']}", f"lr {m['lr']:g}", f"loss {m['loss']:.4f}"]
        if m["kl"] is not None:
            parts.append(f"KL {m['kl']:.4f}")
        if "val_top1" in m:
            parts.append(f"top-1 {m['val_top1']:.2f}, top-5 {m['val_top5']:.2f}")
        return ", ".join([*parts, f"{m['images_per_second']:,.0f} images/s", duration(m["seconds"])])
