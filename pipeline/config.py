"""Define the sections of a recipe: one YAML file, typed and validated when loaded.

The description of a field says its meaning and unit. The error for an unknown key names
the nearest known key.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from cache.errors import MealError
from cache.format.codec import CODECS, DEFAULT
from cache.system.local import NotLocal, require_local

Pair = Annotated[tuple[float, float], Strict(False)]
Colour = Annotated[tuple[float, float, float], Strict(False)]
Interpolation = Literal["bilinear", "bicubic"]
Precision = Literal["float32", "tf32", "bfloat16", "float16"]


def nearest(word: str, known: Any) -> str:
    """Return the end of an error message: the nearest known word, or all known
    words."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


class ConfigError(MealError):
    """A config, or an override, with an unknown key, an impossible value, or values
    that contradict each other."""


class Section(BaseModel):
    """Base of all sections: strictly typed, immutable, without unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSpec(Section):
    """A timm model and the source of its weights."""

    model: str = Field(
        description="timm name, with its tag where timm has several weights: resnet50.ram_in1k"
    )
    checkpoint: str | None = Field(
        None,
        description="file of weights (.safetensors, .pth, .pt); FILE#ENTRY takes an entry of a "
        "file that holds several sets of weights, FILE#ema the moving average; otherwise timm's "
        "weights from the hub",
    )
    pretrained: bool = Field(
        True,
        description="without a checkpoint: start from timm's weights (false: from random ones, a "
        "student only)",
    )
    image_size: int | None = Field(
        None, ge=8, le=4096, description="input size in pixels; otherwise the model's own"
    )
    mean: Colour | None = Field(
        None, description="normalisation of RGB in 0 … 1; otherwise the model's own"
    )
    std: Colour | None = Field(
        None, description="standard deviation of RGB in 0 … 1; otherwise the model's own"
    )

    @field_validator("checkpoint")
    @classmethod
    def _local(cls, value: str | None) -> str | None:
        try:
            require_local(value)
        except NotLocal as error:
            raise ValueError(error.fault) from None
        return value

    @field_validator("mean")
    @classmethod
    def _in_range(cls, value: Colour | None) -> Colour | None:
        if value and not 0 <= min(value) <= max(value) <= 1:
            raise ValueError("must be three numbers from 0 to 1")
        return value

    @field_validator("std")
    @classmethod
    def _positive(cls, value: Colour | None) -> Colour | None:
        if value and min(value) <= 0:
            raise ValueError("must be three numbers above 0")
        return value


class CutMix(Section):
    """CutMix (Yun et al., arXiv 1905.04899): a rectangle of another image's crop is
    pasted over a crop."""

    prob: float = Field(1.0, gt=0, le=1, description="probability that a crop is mixed")
    beta: float = Field(
        1.0,
        gt=0,
        le=100,
        description="the share of the picture that stays is drawn from Beta(beta, beta)",
    )


class CropPolicy(Section):
    """The distribution of the crops that teachers and student see: RandomResizedCrop,
    flip and, if it is set, CutMix."""

    views: int = Field(1, ge=1, le=100_000, description="random crops per image")
    scale: Pair = Field((0.08, 1.0), description="least and greatest share of the image's area")
    ratio: Pair = Field((3 / 4, 4 / 3), description="least and greatest width over height")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a left-right flip")
    seed: int = Field(0, ge=0, lt=2**64, description="of the crops and of the store's row order")
    interpolation: Interpolation = Field(
        "bilinear", description="of the resize, with anti-aliasing, for every teacher and student"
    )
    exif: Literal["ignore", "apply"] = Field(
        "ignore",
        description="turn photographs as their EXIF orientation says (phones), or not (ImageNet)",
    )
    cutmix: CutMix | None = Field(
        None,
        description="the teachers label the mixed crops, as in online training; null: no CutMix",
    )

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: Pair) -> Pair:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be two numbers above 0, the smaller first")
        return value

    @field_validator("scale")
    @classmethod
    def _share(cls, value: Pair) -> Pair:
        if value[1] > 1:
            raise ValueError("must not exceed 1, the whole image")
        return value


class Store(Section):
    """Settings by which labels are computed and stored. A store keeps them: other
    values need another store."""

    codec: str = Field(
        DEFAULT,
        description="cbrt8, pow8 or sqrt8 (one byte a class), tail255, tail80 or tail40 (few "
        "bytes), float16 or float32",
    )
    batch_size: int = Field(64, ge=1, le=65_536, description="crops per forward pass of a teacher")
    precision: Precision = Field(
        "float32",
        description="of the teachers' forward pass: float32, tf32 (GPUs from compute capability "
        "8.0 on), float16 or bfloat16; softmax and mean are float32 always",
    )
    compile: bool = Field(
        False,
        description="let torch.compile make the teachers faster, which takes a minute at each "
        "start; labels are the same to rounding",
    )
    shard_rows: int | None = Field(
        None,
        ge=1,
        description="images per shard, which is finished as a whole or not at all; otherwise near "
        "32 MiB of labels",
    )
    views_per_decode: int = Field(
        4,
        ge=1,
        description="views made from one decode of an image (not recorded: labels don't depend on "
        "it)",
    )

    @field_validator("codec")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in CODECS:
            raise ValueError(f"must be one of {', '.join(CODECS)}{nearest(value, CODECS)}")
        return value


class Render(Section):
    """Settings of decoding and resizing."""

    backend: Literal["cpu", "gpu", "gpu-hardware"] = Field(
        "cpu",
        description="where images are decoded and resized: cpu, gpu (CUDA), or gpu-hardware (the "
        "GPU's JPEG decoder for baseline JPEGs: an experiment, not yet seen on a card). Crops of "
        "a store are rendered on the backend that the store was made on",
    )
    resize: Literal["pillow", "dali"] | None = Field(
        None,
        description="who resizes crops: pillow (integer arithmetic on the CPU, the pixels that "
        "Pillow makes), or dali (on a GPU always; on the CPU for stores that began before version "
        "0.10). null: as the store or the run was begun, otherwise pillow on the CPU",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="decoder threads; otherwise as many as the process may use (at most 16)",
    )
    max_megapixels: float = Field(
        179.0,
        gt=0,
        description="a larger image is left out: it may be a decompression bomb, and takes 3 bytes "
        "a pixel in every decoder thread",
    )

    @model_validator(mode="after")
    def _possible(self) -> Render:
        if self.resize == "pillow" and self.backend != "cpu":
            raise ValueError(
                f"render.resize pillow needs render.backend cpu, got {self.backend}; leave "
                "render.resize out"
            )
        return self


class Discriminator(Section):
    """MEAL V2's discriminator, trained together with the student: its loss is added to
    the soft cross-entropy."""

    lr: float = Field(
        1e-4,
        gt=0,
        description="its own learning rate at the start, which decays as the student's does",
    )
    variant: Literal["paper", "unbounded", "train_py", "fkd_train_py"] | None = Field(
        None,
        description="paper: its pull on the student is at most influence; unbounded: it pulls "
        "without a bound, as before version 0.11; train_py (online only), fkd_train_py: as the "
        "authors' programs of these names run, with two outputs under a ReLU and the student's "
        "learning rate in place of lr; null: paper, or what the run began with",
    )
    influence: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="of variant paper: the largest ratio of its gradient to the cross-entropy's, "
        "on a crop's logits",
    )
    reversal: bool = Field(
        False,
        description="reverse its gradient on the way to the student, who then learns to deceive it "
        "(an ablation)",
    )
    input: Literal["log_mean", "mean_logits"] = Field(
        "log_mean",
        description="input of variants paper and unbounded. log_mean: clamped log-probabilities; "
        "mean_logits, as in the authors' train.py: the student's logits, and the mean of the "
        "teachers' logits (online only). fkd_train_py sees probabilities",
    )

    @property
    def authors(self) -> bool:
        """Return whether the discriminator is one of the authors' programs'."""
        return self.variant in ("train_py", "fkd_train_py")

    @property
    def seen(self) -> str:
        """Return the discriminator's input: "log_mean", "mean_logits" or "softmax"."""
        return {"train_py": "mean_logits", "fkd_train_py": "softmax"}.get(
            self.variant or "", self.input
        )

    @property
    def unused(self) -> set[str]:
        """Return the keys that count for nothing in this variant."""
        if self.authors:
            return {"lr", "influence", "input"}
        return {"influence"} if self.bound is None else set()

    @property
    def bound(self) -> float | None:
        """Return the largest ratio of the discriminator's gradient to the
        cross-entropy's; None: no bound."""
        return self.influence if self.variant in (None, "paper") else None

    @model_validator(mode="after")
    def _possible(self) -> Discriminator:
        if self.variant == "fkd_train_py" and self.input == "mean_logits":
            raise ValueError(
                "train.discriminator.variant fkd_train_py sees probabilities, got "
                "train.discriminator.input mean_logits; leave input out, or take train_py"
            )
        return self


class Train(Section):
    """Settings of the student's training. The defaults are MEAL V2's (arXiv 2009.08453,
    Sec. 4)."""

    labels: Literal["soft", "hard"] = Field(
        "soft",
        description="soft: the labels of the store, or of live teachers; hard: the class folders "
        "(for a baseline, or to train own teachers)",
    )
    online: bool = Field(
        False,
        description="ask the teachers in every step, as the paper does, instead of a store "
        "(--online)",
    )
    image_size: int = Field(224, ge=8, le=4096, description="pixels")
    epochs: int = Field(180, ge=1)
    batch_size: int = Field(512, ge=2, le=65_536, description="images per step, over all processes")
    accumulate: int = Field(
        1,
        ge=1,
        le=1024,
        description="parts of each process's share of a batch, whose gradients are added up before "
        "a step: a large batch fits any GPU. BatchNorm normalises each part by itself",
    )
    crops_per_image: int = Field(
        1,
        ge=1,
        le=64,
        description="crops (views) of each decoded image in a batch; batch_size and epochs go on "
        "counting crops, as in FKD",
    )
    lr: float = Field(0.01, gt=0, description="learning rate at the start")
    schedule: Literal["step", "cosine"] = Field(
        "step", description="gamma at the milestones, or half a cosine down to zero over all epochs"
    )
    warmup_epochs: float = Field(
        0.0, ge=0, description="epochs in which the learning rate rises linearly to its full value"
    )
    milestones: Annotated[tuple[int, ...], Strict(False)] = Field(
        (100,), description="epochs, counted from 0, from which gamma applies once more"
    )
    gamma: float = Field(0.1, gt=0)
    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="of student and discriminator: sgd with momentum, or adamw with betas"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    betas: Annotated[tuple[float, float], Strict(False)] = Field(
        (0.9, 0.999), description="of adamw: decay of the mean gradient, and of its square"
    )
    weight_decay: float = Field(0.0, ge=0)
    decay_norm_and_bias: bool = Field(
        True,
        description="decay all weights; false: not norms, biases, and what the model excepts "
        "(position embeddings), timm's rule",
    )
    clip_norm: float | None = Field(
        None,
        gt=0,
        description="greatest norm of the student's gradient in a step; a longer gradient is "
        "shortened to it",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep the exponential moving average of the student's weights, with this decay "
        "(0.9999) once it has risen to it; evaluated and saved beside the weights: "
        "ema.safetensors, best_ema.safetensors",
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout of the student's head; null: the model's own"
    )
    drop_path: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="stochastic depth of the student: greatest probability that a block is left "
        "out; null: the model's own",
    )
    precision: Literal["float32", "tf32", "bfloat16"] | None = Field(
        None,
        description="of forward and backward pass: float32, tf32 (GPUs from compute capability 8.0 "
        "on) or bfloat16; weights and loss are float32 always. null: as the run was begun, "
        "otherwise bfloat16 on GPUs that have it, float32 elsewhere",
    )
    compile: bool = Field(
        False,
        description="let torch.compile make the steps faster; the first ones take a minute more",
    )
    sync_bn: bool = Field(
        False,
        description="BatchNorm over the images of all processes (GPUs only); otherwise each with "
        "its own, as in the paper",
    )
    views: int | None = Field(
        None,
        ge=1,
        description="number of views, from the first on; otherwise all views of the store or, "
        "without a store, a fresh view in every epoch. Epoch e replays view e mod views",
    )
    label_temperature: float = Field(
        1.0,
        gt=0,
        le=100,
        description="t: soft labels p become p^(1/t) / Σ p^(1/t); above 1 they are softer",
    )
    student_temperature: float = Field(
        1.0,
        gt=0,
        le=100,
        description="t: the student's logits are divided by t in the soft cross-entropy",
    )
    hard_weight: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="weight of the class folder's cross-entropy; the soft labels' is 1 minus this",
    )
    cutmix: CutMix | None = Field(
        None,
        description="mix the crops of a batch, and average their labels by area: cheap, with an "
        "ordinary store (crops.cutmix is faithful: the teachers label the mixed crops)",
    )
    discriminator: Discriminator | None = Field(
        None, description="with soft labels only; null: none"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="of the order of images, a new head, random weights and dropout",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if list(self.milestones) != sorted(set(self.milestones)) or any(
            m < 1 for m in self.milestones
        ):
            raise ValueError(
                f"train.milestones must be rising epochs from 1 on, got {list(self.milestones)}"
            )
        if not 0 <= min(self.betas) <= max(self.betas) < 1:
            raise ValueError(
                f"train.betas must be two numbers from 0 to below 1, got {list(self.betas)}"
            )
        if self.batch_size < 2 * self.accumulate:
            raise ValueError(
                f"train.accumulate must leave two crops in each part of train.batch_size "
                f"({self.batch_size}), got {self.accumulate}"
            )
        if self.discriminator and self.labels == "hard":
            raise ValueError(
                "train.discriminator needs soft labels; set train.discriminator=null, or "
                "train.labels=soft"
            )
        if self.online and self.labels == "hard":
            raise ValueError(
                "train.online asks teachers, whose labels are soft; leave it out, or set "
                "train.labels=soft"
            )
        if self.discriminator and self.discriminator.seen == "mean_logits" and not self.online:
            key, other = (
                ("variant train_py", "fkd_train_py")
                if self.discriminator.authors
                else ("input mean_logits", "log_mean")
            )
            raise ValueError(
                f"train.discriminator.{key} needs live teachers, since a store holds no logits; "
                f"set it to {other}, or train --online"
            )
        if self.hard_weight and self.labels == "hard":
            raise ValueError(
                "train.hard_weight mixes the hard label into soft ones; leave it out, or set "
                "train.labels=soft"
            )
        if self.batch_size % self.crops_per_image or self.batch_size == self.crops_per_image > 1:
            raise ValueError(
                f"train.batch_size counts crops and must be a multiple of train.crops_per_image "
                f"({self.crops_per_image}), twice it at least, got {self.batch_size}"
            )
        if self.epochs % self.crops_per_image:
            raise ValueError(
                f"train.epochs must be a multiple of train.crops_per_image "
                f"({self.crops_per_image}), since a pass shows so many crops of every "
                f"image, got {self.epochs}"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"train.warmup_epochs must be at most train.epochs ({self.epochs}), got "
                f"{self.warmup_epochs:g}"
            )
        return self


class Config(Section):
    """A whole recipe: teachers, crops, store, rendering, student and training."""

    teachers: Annotated[tuple[ModelSpec, ...], Strict(False)] = ()
    crops: CropPolicy = CropPolicy()
    store: Store = Store()
    render: Render = Render()
    student: ModelSpec | None = None
    train: Train = Train()

    @model_validator(mode="after")
    def _one_size(self) -> Config:
        if self.student and self.student.image_size not in (None, self.train.image_size):
            raise ValueError(
                f"student.image_size is {self.student.image_size}; the student's size is "
                f"train.image_size, {self.train.image_size}"
            )
        if self.crops.cutmix and self.train.cutmix:
            raise ValueError(
                "crops.cutmix and train.cutmix would mix every picture twice; set one of them to "
                "null"
            )
        return self

    def with_resize(self, resize: str) -> Config:
        """Return the config with another ``render.resize``."""
        render = self.render.model_copy(update={"resize": resize})
        return self.model_copy(update={"render": render})

    def with_precision(self, precision: str) -> Config:
        """Return the config with this ``train.precision``, if it leaves it open."""
        if self.train.precision is not None:
            return self
        train = self.train.model_copy(update={"precision": precision})
        return self.model_copy(update={"train": train})

    def with_variant(self, variant: str) -> Config:
        """Return the config with another ``train.discriminator.variant``, if it has a
        discriminator that leaves the variant open."""
        judge = self.train.discriminator
        if judge is None or judge.variant is not None:
            return self
        judge = judge.model_copy(update={"variant": variant})
        train = self.train.model_copy(update={"discriminator": judge})
        return self.model_copy(update={"train": train})

    def to_yaml(self) -> str:
        """Return the config as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
