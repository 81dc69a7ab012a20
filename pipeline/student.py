"""Stage two: train a student from stored labels, from live teachers (online), or with hard labels: one loop for all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from cache.claims import claim, claims_of
from pipeline import checkpoint, images, losses, philox, schedule, start
from pipeline.checkpoint import RunError
from pipeline.config import Config, ConfigError
from pipeline.evaluate import evaluate
from pipeline.models import Model, load
from pipeline.progress import Progress, duration, say
from pipeline.replay import Batch, Replay, Source
from pipeline.targets import Targets


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
    if any(part.is_file() for part in (out, *out.parents)):
        raise RunError(f"{out} can't be a folder, since a part of it is a file; choose another --out")
    with claim(claims_of(out), "train") as mine:
        if not mine:
            raise RunError(f"another process is training in {out}; wait for it, or choose another --out")
        config, source, teachers = start.choose_source(
            config,
            folder,
            store,
            classes,
            device,
            started_views=start.views_of_run(out),
            allow_renderer_difference=allow_renderer_difference,
        )
        if len(source.images.usable) < 2:
            raise images.DataError(f"{folder} holds {len(source.images.usable)} usable images; training needs two or more")
        state = checkpoint.load_state(out / "state.pt")
        start.require_same_run(out, config, state, source)
        validated = start.find_validation(data, validation, source, config)
        student = load(config.student, classes=len(source.class_names), image_size=config.train.image_size, seed=config.train.seed)
        student.interpolation = source.policy.interpolation
        for line in [*student.introduction("student"), *_unusual(config, source)]:
            say(line)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write(out / "config.yaml", lambda scratch: scratch.write_text(config.to_yaml()))
        run = Run(config, out, student.to(device), teachers, source, folder, validated, device)
        if state is not None:
            run.restore(state)
        if run.epoch >= config.train.epochs:
            say(f"{out} has its {run.epoch} epochs already; a larger --epochs goes on")
        while run.epoch < config.train.epochs:
            run.train_pass()
        return run.metrics[-1]


def _unusual(config: Config, source: Source) -> list[str]:
    """What a user should know of the labels, where they aren't simply a store's."""
    lines = []
    if config.train.online:
        lines.append(f"online: {len(config.teachers)} teachers label every batch; no store is read or made")
    if source.policy.cutmix:
        seen = "the class folders, mixed by area" if config.train.labels == "hard" else "as the teachers saw it"
        lines.append(f"CutMix, its label {seen}")
    if config.train.cutmix:
        lines.append(f"CutMix of neighbours in a batch, labelled {'by live teachers' if config.train.online else 'by area'}")
    if config.train.crops_per_image > 1:
        lines.append(f"{config.train.crops_per_image} crops of each decoded image: a pass over the images counts as that many epochs")
        if source.policy.cutmix:
            lines.append(
                "every crop's CutMix partner is another image, which is decoded too: crops_per_image saves nothing with this store"
            )
    return lines


class Run:
    """A student in training: model, optimizer, and what has been done so far."""

    def __init__(
        self,
        config: Config,
        out: Path,
        student: Model,
        teachers: list[Model],
        source: Source,
        folder: Path,
        validation: start.Validation | None,
        device: torch.device,
    ) -> None:
        self.config, self.out, self.student, self.source, self.validation, self.device = config, out, student, source, validation, device
        recipe = config.train
        groups = [{"params": list(student.module.parameters()), "base_lr": recipe.lr}]
        self.discriminator = None
        if recipe.discriminator:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                self.discriminator = losses.Discriminator(student.classes, reversal=recipe.discriminator.reversal).to(device)
            groups.append({"params": list(self.discriminator.parameters()), "base_lr": recipe.discriminator.lr})
        self.optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        self.targets = Targets(config, source, student.classes, device, teachers)
        self.replay = Replay(
            source,
            folder,
            sizes=[recipe.image_size, *(teacher.image_size for teacher in teachers)],
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            rendering=config.render,
            crops_per_image=recipe.crops_per_image,
            mix=recipe.cutmix,
        )
        self.epoch = 0
        self.metrics: list[dict] = []

    def restore(self, state: dict) -> None:
        self.student.module.load_state_dict(state["model"])
        if self.discriminator:
            self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.metrics = state["epoch"], state["metrics"]
        say(f"going on with {self.out} after {self.epoch} epochs")

    def train_pass(self) -> None:
        """One pass over the images, which is as many epochs as it shows crops of each; then validation, and the checkpoints."""
        recipe, first = self.config.train, self.epoch
        done = first + recipe.crops_per_image
        # Dropout and the like draw anew in each epoch, and the same whether or not the run was interrupted before it.
        torch.manual_seed(int(philox.words(recipe.seed, first, 0, 0, 3)[0, 0]))
        self.student.module.train()
        sums = torch.zeros(6, dtype=torch.float64)  # as _step returns them
        seen, crops, rate = 0, len(self.source.images.usable) * recipe.crops_per_image, 0.0
        name = f"epoch {done}/{recipe.epochs}"
        with Progress(name, crops, "images") as progress, self.replay.epoch(first) as batches:
            for batch in batches:
                begins, finishes = (first + recipe.crops_per_image * part / crops for part in (seen, seen + len(batch)))
                decay = schedule.factor(recipe, begins, finishes)
                for group in self.optimizer.param_groups:
                    group["lr"] = group["base_lr"] * decay
                rate = recipe.lr * decay
                sums += self._step(batch)
                seen += len(batch)
                shown = float(sums[0]) / seen
                if not math.isfinite(shown):
                    raise self._diverged(shown, rate)
                progress.advance(len(batch), f"loss {shown:.3f}")
        if not all(torch.isfinite(p).all() for p in self.student.module.parameters()):  # by the very last step
            raise self._diverged(math.nan, rate)
        loss, kl, agreeing, against, told_student, told_teachers = (sums / seen).tolist()
        metrics = {
            "epoch": done - 1,
            "view": first % self.source.views,
            "lr": rate,
            "loss": loss,
            "kl": kl if self.targets.soft else None,
            "agreement": 100 * agreeing,
            "images": seen,
            "seconds": round(progress.seconds, 3),
            "images_per_second": round(seen / progress.seconds, 1),
        }
        if self.discriminator:
            metrics |= {
                "discriminator_loss": against,
                "discriminator_accuracy": 50 * (told_student + told_teachers),
                "discriminator_accuracy_student": 100 * told_student,
                "discriminator_accuracy_teachers": 100 * told_teachers,
            }
        if self.validation:
            metrics |= self._validate()
        self.epoch = done
        self.metrics.append(metrics)
        self._save()
        say(self._summary(metrics))

    def _diverged(self, loss: float, rate: float) -> RunError:
        return RunError(f"the loss is {loss} in epoch {self.epoch + 1}; lower train.lr (now {rate:g}), or check the student's weights")

    def _step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step. Returns float64 [6], sums over the batch: the loss without the discriminator's, KL(soft labels‖student), rows where
        label and student put the same class first, the discriminator's loss, and its right answers on the student's side and on the teachers'."""
        goal = self.targets(batch)
        pixels = batch.pixels[self.config.train.image_size].to(self.device, non_blocking=True)
        logits = self.student(pixels, self.config.train.precision)
        loss = self.targets.loss(logits, goal)
        total = loss.mean()
        kl = against = torch.zeros((), device=self.device)
        told = torch.zeros(2, device=self.device)
        if self.discriminator:
            against, told = self.discriminator(*self.targets.judged(logits, goal))
            total = total + against
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        with torch.no_grad():
            best = goal.hard if goal.soft is None else goal.soft
            agreeing = (logits.argmax(dim=1) == best.argmax(dim=1)).sum()
            if goal.soft is not None:
                kl = (losses.soft_cross_entropy(logits, goal.soft) - losses.entropy(goal.soft)).sum()
            n = len(batch)
            return torch.stack([loss.sum(), kl, agreeing, n * against, *(n * told)]).double().cpu()

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
            "teachers": self.source.teachers,
        }
        checkpoint.save_model(self.out / "last.safetensors", self.student, facts)
        # Without any validation the newest is the best.
        if newest.get("val_top1", 0.0) >= max(m.get("val_top1", 0.0) for m in self.metrics):
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
            "how": self.source.how,
        }
        checkpoint.save_state(self.out / "state.pt", state)

    def _summary(self, m: dict) -> str:
        parts = [f"epoch {m['epoch'] + 1}/{self.config.train.epochs}", f"view {m['view']}", f"lr {m['lr']:g}", f"loss {m['loss']:.4f}"]
        if m["kl"] is not None:
            parts.append(f"KL {m['kl']:.4f}")
        if "discriminator_loss" in m:
            parts.append(f"discriminator loss {m['discriminator_loss']:.4f}, accuracy {m['discriminator_accuracy']:.1f} %")
        if "val_top1" in m:
            parts.append(f"top-1 {m['val_top1']:.2f}, top-5 {m['val_top5']:.2f}")
        return ", ".join([*parts, f"{m['images_per_second']:,.0f} images/s", duration(m["seconds"])])
