"""Run the training loop of stage two: passes over the images, validation and
checkpoints. The same loop trains from stored labels, from live teachers (online), and
with hard labels."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache.system import durable
from pipeline.config import Config
from pipeline.evaluation import EvaluationSettings, Validation, evaluate
from pipeline.models.average import Average
from pipeline.models.model import Model, sync_batchnorm
from pipeline.runs import checkpoint
from pipeline.runs.curves import Curves
from pipeline.runs.folder import METRICS, STATE, RunError
from pipeline.runs.tracking.tracker import Tracked
from pipeline.runs.tracking.trackers import Trackers
from pipeline.runtime.device_transfer import fetched
from pipeline.runtime.distributed import Elsewhere
from pipeline.runtime.execution import Execution
from pipeline.runtime.precision import in_precision
from pipeline.runtime.progress import Progress, duration, say
from pipeline.runtime.threads import share_the_interpreter
from pipeline.sampling import philox
from pipeline.training import losses, schedule
from pipeline.training.batches import Batch, Batching, Replay
from pipeline.training.discriminator import Discriminator, Influence
from pipeline.training.optimizer import make_optimizer, restore_optimizer
from pipeline.training.source import Source
from pipeline.training.targets import Goal, Targets

# Key of a state whose newest pass isn't validated. No other state has it.
UNVALIDATED = "unvalidated"
LOOK = 16  # steps between looks at the loss; on a GPU each look waits for the step


class Learner(nn.Module):
    """The modules that are trained: the student, and the discriminator if there is one.

    They form one module, so that the processes average all gradients together.
    """

    def __init__(
        self,
        student: Model,
        discriminator: Discriminator | None,
        influence: Influence | None,
        targets: Targets,
    ) -> None:
        super().__init__()
        self.student, self.discriminator = student.module, discriminator
        self.influence, self.targets = influence, targets
        self.precision = targets.recipe.precision
        self.model = student.compiled() if targets.recipe.compile else student

    def forward(self, pixels: torch.Tensor, goal: Goal) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss to minimise, and sums for the metrics.

        pixels: uint8 [n, size, size, 3]. goal: the labels of these crops. The loss is a
        scalar, the mean over the rows, the discriminator's loss included. The sums over
        the rows are float64 [6]: the loss without the discriminator's, KL(soft
        labels‖student), the number of rows where label and student put the same class
        first, the discriminator's loss, and the discriminator's right answers on the
        student's side and on the teachers' side.
        """
        logits = seen = self.model(pixels, self.precision)
        if self.influence:
            logits, seen = self.influence.fork(logits)
        loss = self.targets.loss(logits, goal)
        total = loss.mean()
        kl = against = torch.zeros((), device=logits.device)
        told = torch.zeros(2, device=logits.device)
        if self.discriminator:
            against, told = self.discriminator(*self.targets.judged(seen, goal))
            total = total + against
        with torch.no_grad():
            best = goal.hard if goal.soft is None else goal.soft
            agreeing = (logits.argmax(dim=1) == best.argmax(dim=1)).sum()
            if goal.soft is not None:
                kl = (
                    losses.soft_cross_entropy(logits, goal.soft) - losses.entropy(goal.soft)
                ).sum()
            n = len(logits)
            return total, torch.stack([loss.sum(), kl, agreeing, n * against, *(n * told)]).double()


class Run:
    """A student in training: model, optimizer, and the metrics of the epochs done so
    far."""

    def __init__(
        self,
        config: Config,
        out: Path,
        student: Model,
        teachers: list[Model],
        source: Source,
        validation: Validation | None,
        execution: Execution | None = None,
    ) -> None:
        execution = execution or Execution()
        self.config, self.out, self.student, self.source, self.validation = (
            config,
            out,
            student,
            source,
            validation,
        )
        self.execution, self.device, self.processes, self.clock = (
            execution,
            execution.device,
            execution.processes,
            execution.clock,
        )
        self.clock.begin()
        recipe = config.train
        if recipe.sync_bn and self.processes.world > 1:
            sync_batchnorm(student)
        self.discriminator = self.influence = None
        if judge := recipe.discriminator:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                self.discriminator = Discriminator(student.classes, authors=judge.authors).to(
                    self.device
                )
            self.influence = Influence(judge.bound, judge.reversal, self.device)
        self.optimizer = make_optimizer(recipe, student, self.discriminator, fused=execution.on_gpu)
        self.average = Average(student, recipe.ema_decay) if recipe.ema_decay else None
        # Of the steps of a pass: the sum of the gradients' norms, and how many were
        # shortened.
        self.clipped = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.targets = Targets(config, source, teachers, execution)
        self.learner: nn.Module = Learner(student, self.discriminator, self.influence, self.targets)
        sizes = [recipe.image_size, *(teacher.image_size for teacher in teachers)]
        self.replay = Replay(source, sizes, Batching.of(recipe), execution)
        share_the_interpreter()
        self.epoch = 0
        self.metrics: list[dict] = []
        self.unvalidated = False  # the newest pass is saved, and its validation is missing
        self.curves = Curves(out, config)
        facts = {
            "run.source": source.identity,
            "run.teachers": ", ".join(source.teachers),
            "run.student": student.name,
            "run.classes": student.classes,
        }
        track = self.execution.track if self.processes.leads else ()
        self.trackers = Trackers(Tracked.of(out, config, facts), track)

    def restore(self, state: dict) -> None:
        """Resume from the state that ``_save`` wrote."""
        self.student.module.load_state_dict(state["model"])
        if self.discriminator:
            self.discriminator.load_state_dict(state["discriminator"])
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.average:
            self.average.restore(state["average"])
        self.epoch, self.metrics = state["epoch"], state["metrics"]
        self.unvalidated = UNVALIDATED in state
        last = ", of which the last one is still to be validated" if self.unvalidated else ""
        say(f"going on with {self.out} after {self.epoch} epochs{last}")
        # A pass is drawn once, so not before it is validated.
        if shown := self.metrics[: -1 if self.unvalidated else None]:
            self.processes.first(lambda: self._show(shown))

    def train_pass(self) -> None:
        """Train for one pass over the images, save the state, then validate and save
        the checkpoints.

        A pass that shows several crops of each image counts as that many epochs.
        Whatever ends the validation leaves the pass: the next start validates first.
        """
        recipe, first = self.config.train, self.epoch
        done = first + recipe.crops_per_image
        # Dropout and the like draw fresh numbers in each epoch and process. A resumed
        # run draws the same numbers as an uninterrupted run.
        torch.manual_seed(int(philox.words(recipe.seed, first, self.processes.rank, 0, 3)[0, 0]))
        self.student.module.train()
        sums = torch.zeros(6, dtype=torch.float64, device=self.device)  # of _step's results
        if self.influence:
            self.influence.sums.zero_()
        self.clipped.zero_()
        crops = len(self.source.images.usable) * recipe.crops_per_image
        seen, rate, note = 0, 0.0, ""
        name = f"epoch {done}/{recipe.epochs}"
        with Progress(name, crops, "images") as progress, self.replay.epoch(first) as batches:
            for number, batch in enumerate(self.clock.waits("wait for crops", batches), 1):
                begins, finishes = (
                    first + recipe.crops_per_image * part / crops
                    for part in (seen, seen + batch.total)
                )
                decay = schedule.factor(recipe, begins, finishes)
                for group in self.optimizer.param_groups:
                    group["lr"] = group["base_lr"] * decay
                rate = recipe.lr * decay
                sums += self._step(batch)
                seen += batch.total
                if number % LOOK == 1:
                    loss = float(fetched(self.processes.sum(sums))[0]) / seen
                    note = f"loss {self._require_finite(loss, rate):.3f}"
                progress.advance(batch.total, note)
            sums = fetched(self.processes.sum(sums))
        if done < recipe.epochs:
            self.replay.begin(done)
        self._require_finite(float(sums[0]), rate)
        # The very last step, after the last loss, may have made weights infinite.
        if not all(torch.isfinite(p).all() for p in self.student.module.parameters()):
            self._require_finite(math.nan, rate)
        self.processes.average_batchnorm(self.student.module)
        if self.average:
            self.processes.average_batchnorm(self.average.model.module)
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
        if recipe.clip_norm:
            norm, clipped = (self.clipped / len(self.replay.sizes)).tolist()
            metrics |= {"gradient_norm": norm, "clipped": 100 * clipped}
        if self.discriminator:
            of_ce, *pulls = fetched(self.processes.sum(self.influence.sums)).tolist()
            unbounded, pull = (math.sqrt(one / of_ce) if of_ce else None for one in pulls)
            metrics |= {
                "discriminator_loss": against,
                "discriminator_gradient": pull,
                "discriminator_gradient_unbounded": unbounded,
                "discriminator_accuracy": 50 * (told_student + told_teachers),
                "discriminator_accuracy_student": 100 * told_student,
                "discriminator_accuracy_teachers": 100 * told_teachers,
            }
        self.epoch = done
        self.metrics.append(metrics)
        if self.validation:
            self.unvalidated = True
            with self.clock.part("save"):
                self.processes.first(self._save)
        self.finish_pass()

    def finish_pass(self) -> None:
        """Validate the newest pass, if there are images to validate on, and save the
        checkpoints."""
        if self.validation:
            with self.clock.part("validate"):
                self.metrics[-1] |= self._validate()
        self.unvalidated = False
        with self.clock.part("save"):
            self.processes.first(self._save)
        say(self._summary(self.metrics[-1]))

    def _require_finite(self, loss: float, rate: float) -> float:
        """Return the loss if it is finite; otherwise stop the run.

        The loss is the same in all processes. Raises RunError in the first process, and
        Elsewhere in the others.
        """
        if not math.isfinite(loss):
            if not self.processes.leads:
                raise Elsewhere
            raise RunError(
                f"the loss is {loss} in epoch {self.epoch + 1}; lower train.lr (now {rate:g}), or "
                f"check the student's weights"
            )
        return loss

    def _step(self, batch: Batch) -> torch.Tensor:
        """Take one optimizer step on the mean loss over the global batch.

        Returns this process's part of the epoch's sums (``Learner.forward``), float64
        [6] on the device. The device is not waited for.
        """
        with self.clock.part("labels and teachers", of_model=True):
            goal = self.targets(batch)
        recipe = self.config.train
        pixels, parts = batch.pixels[recipe.image_size], batch.parts(recipe.accumulate)
        sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        with (
            self.clock.part("forward and backward", of_model=True),
            self.processes.in_step(),
            in_precision(recipe.precision),
        ):
            self.optimizer.zero_grad(set_to_none=True)
            for part in parts:
                with self._together(last=part is parts[-1]):
                    total, its = self.learner(pixels[part], goal.take(part))
                    # The gradient becomes the mean over the processes.
                    share = (part.stop - part.start) / len(batch)
                    (total * (batch.weight * share)).backward()
                sums += its
        with self.clock.part("optimizer", of_model=True):
            if recipe.clip_norm:
                norm = nn.utils.clip_grad_norm_(self.student.module.parameters(), recipe.clip_norm)
                self.clipped += torch.stack([norm, norm > recipe.clip_norm]).double()
            self.optimizer.step()
            if self.average:
                self.average.update(self.student.module)
        return sums / batch.copies

    def _together(self, *, last: bool) -> AbstractContextManager:
        """Return a context in which the processes average their gradients in the last
        part of a batch alone."""
        joined: Any = self.learner
        return nullcontext() if last or not hasattr(joined, "no_sync") else joined.no_sync()

    def _validate(self) -> dict:
        """Return top-1 and top-5 in per cent, and the loss in nats, on the validation
        images."""
        self.student.module.eval()
        recipe = self.config.train
        settings = EvaluationSettings(
            self.source.settings,
            batch_size=min(256, recipe.batch_size),
            # On a CPU tf32 is the same as float32.
            precision="float32" if recipe.precision == "float32" else "tf32",
            what="validating",
        )
        validation = self.validation
        models = [self.student, *([self.average.model] if self.average else [])]
        result = evaluate(
            models,
            validation.data,
            validation.images,
            settings=settings,
            execution=self.execution,
        )
        return {
            f"{key}{suffix}": value
            for score, suffix in zip(result.models, ("", "_ema"), strict=False)
            for key, value in (
                ("val_top1", score.top1),
                ("val_top5", score.top5),
                ("val_loss", score.loss),
            )
        }

    def _save(self) -> None:
        """Save the checkpoints and the metrics, then the state that the run resumes
        from, then the curves.

        After a kill between checkpoints and state, the epoch is trained or validated
        again with the same result. Curves come last, since they can be drawn from the
        metrics again. Before validation neither the best student nor the curves can be
        known, and the state says so.
        """
        newest = self.metrics[-1]
        facts = {
            "epoch": newest["epoch"],
            "val_top1": newest.get("val_top1"),
            "labels": self.config.train.labels,
            "source": self.source.identity,
            "teachers": self.source.teachers,
            "class_names": list(self.source.data.class_names),
            **({"imported": self.source.imported} if self.source.imported else {}),
        }
        self._save_weights(self.student, facts, ("last", "best"))
        if self.average:
            facts |= {"val_top1": newest.get("val_top1_ema"), "ema_decay": self.average.ema.decay}
            self._save_weights(self.average.model, facts, ("ema", "best_ema"), "_ema")
        lines = "".join(json.dumps(m) + "\n" for m in self.metrics)
        durable.write(self.out / METRICS, lambda scratch: scratch.write_text(lines))
        state = {
            "model": self.student.module.state_dict(),
            "discriminator": self.discriminator.state_dict() if self.discriminator else None,
            "optimizer": self.optimizer.state_dict(),
            **({"average": self.average.state()} if self.average else {}),
            "epoch": self.epoch,
            "metrics": self.metrics,
            "source": self.source.identity,
            "how": self.source.how,
            **({UNVALIDATED: True} if self.unvalidated else {}),
        }
        checkpoint.save_state(self.out / STATE, state)
        if not self.unvalidated:
            self._show(self.metrics)

    def _show(self, metrics: list[dict]) -> None:
        self.curves.show(metrics)
        self.trackers.show(metrics)

    def _save_weights(
        self, model: Model, facts: dict, names: tuple[str, str], suffix: str = ""
    ) -> None:
        """Save a student under the first name and, if it is the best so far, under the
        second. suffix: of its top-1 in the metrics."""
        newest, best = names
        checkpoint.save_model(self.out / f"{newest}.safetensors", model, facts)
        # Without validation the newest student counts as the best.
        reached = [m.get(f"val_top1{suffix}", 0.0) for m in self.metrics]
        if not self.unvalidated and reached[-1] >= max(reached):
            checkpoint.save_model(self.out / f"{best}.safetensors", model, facts)

    def _summary(self, m: dict) -> str:
        parts = [
            f"epoch {m['epoch'] + 1}/{self.config.train.epochs}",
            f"view {m['view']}",
            f"lr {m['lr']:g}",
            f"loss {m['loss']:.4f}",
        ]
        if m["kl"] is not None:
            parts.append(f"KL {m['kl']:.4f}")
        if "discriminator_loss" in m:
            parts.append(
                f"discriminator loss {m['discriminator_loss']:.4f}, accuracy "
                f"{m['discriminator_accuracy']:.1f} %"
            )
        # None of a run that an older version began, and without a cross-entropy.
        if (pull := m.get("discriminator_gradient")) is not None:
            parts.append(f"its gradient {pull:.2g} of the cross-entropy's")
        if "val_top1" in m:
            parts.append(f"top-1 {m['val_top1']:.2f}, top-5 {m['val_top5']:.2f}")
        if "val_top1_ema" in m:
            parts.append(f"of the average {m['val_top1_ema']:.2f}, {m['val_top5_ema']:.2f}")
        if "clipped" in m:
            parts.append(f"gradient norm {m['gradient_norm']:.3g}, {m['clipped']:.0f} % clipped")
        return ", ".join(
            [*parts, f"{m['images_per_second']:,.0f} images/s", duration(m["seconds"])]
        )
