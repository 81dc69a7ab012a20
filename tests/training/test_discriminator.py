"""The discriminator can't tell stored labels from teachers' outputs by their coding,
tells truly different outputs apart, and trains as its options say."""

from __future__ import annotations

import shutil
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.paths import SOFT_LABELS
from support.small import CPU, changed, toy_provenance, tree
from support.stages import make_replay, make_targets, stored_labels, train
from support.stores import write
from torch import nn

from cache import LabelStore
from cache.create import create
from cache.format.codec import CODECS, Codec
from cache.format.manifest import Images
from cache.writer import StoreWriter
from pipeline import config_file
from pipeline.config import Config, ConfigError, ModelSpec
from pipeline.models.weights import load, load_teachers
from pipeline.runs.compare import compare
from pipeline.runs.folder import RunError
from pipeline.training.batches import Batch
from pipeline.training.discriminator import Discriminator, Influence, log_floored
from pipeline.training.loop import UNVALIDATED
from pipeline.training.losses import soft_cross_entropy
from pipeline.training.targets import Goal, Targets

LEARNT, HELD_OUT = 4096, 1024  # rows
NO_FLOOR = 2.0**-149  # the smallest float32
FEW = Codec("few", "uint8", 0.5, 31, 0.35 * (0.5 / 31) ** 2)
ALL = {**CODECS, "few": FEW}


pytestmark = pytest.mark.usefixtures("one_thread")


def real_logits(low: float, high: float, seed: int = 0) -> torch.Tensor:
    """Make logits from real teachers: float64 [rows, 1000], log-probabilities of two
    pictures mixed by a random share, times a random sharpness.

    The rows to learn from and the held-out rows are of different pictures. At sharpness
    1 the least probability of all is 1.2e-6.
    """
    with np.load(SOFT_LABELS) as file:
        logs = np.log(file["probabilities"].astype("float64"))
    rng = np.random.default_rng(seed)
    half, parts = len(logs) // 2, []
    for first, n in ((0, LEARNT), (half, HELD_OUT)):
        one, other = logs[first + rng.integers(half, size=(2, n))]
        share, sharpness = rng.random((n, 1)), rng.uniform(low, high, (n, 1))
        parts.append(sharpness * (share * one + (1 - share) * other))
    return torch.from_numpy(np.concatenate(parts))


def made_up_logits(classes: int, low: float, high: float, seed: int = 0) -> torch.Tensor:
    """Make up normal logits with a random width per row: float64 [rows, classes]."""
    rng = np.random.default_rng(seed)
    n = LEARNT + HELD_OUT
    return torch.from_numpy(rng.normal(0, 1, (n, classes)) * rng.uniform(low, high, (n, 1)))


def sharp_logits(classes: int, codec: Codec, seed: int = 0) -> torch.Tensor:
    """Make logits of which every codec codes a similar share as zero, near half or
    more: the finer the codec, the sharper the logits."""
    finer = np.log(codec.floor) / np.log(CODECS["pow8"].floor)
    return (
        real_logits(2 * finer, 6 * finer, seed)
        if classes == 1000
        else made_up_logits(classes, 5 * finer, 15 * finer, seed)
    )


@dataclass
class Stored:
    """Labels read back from a store, and the goals that training makes of them."""

    logits: torch.Tensor  # float64 [n, classes], of the teachers
    goal: Goal
    targets: Targets

    def judged(self, floor: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both sides as the discriminator sees them: a student with the
        teachers' logits but for an offset per row, and the labels."""
        targets = copy(self.targets)
        targets.floor = floor or targets.floor
        offsets = 5 * torch.randn(
            len(self.logits), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        return targets.judged((self.logits + offsets).float(), self.goal)


def stored(path: Path, codec: Codec, logits: torch.Tensor) -> Stored:
    """Write labels to a store on the disk, and read them back."""
    n, classes = logits.shape
    words = {
        "path": np.array([f"c/{i:05}.jpg" for i in range(n)], dtype=object),
        "reason": np.full(n, "", dtype=object),
    }
    numbers = {
        "bytes": "int64",
        "height": "int32",
        "width": "int32",
        "class_index": "int32",
        "status": "uint8",
    }
    manifest = Images(
        **words,
        digest=np.zeros((n, 32), "uint8"),
        **{name: np.zeros(n, dtype) for name, dtype in numbers.items()},
    )
    manifest.height[:] = manifest.width[:] = 1
    layout = {"chunk_rows": min(n, 512), "shard_rows": n}
    attributes = {
        "codec": codec.describe(),
        "provenance": toy_provenance(codec, manifest, layout),
        "class_names": [str(c) for c in range(classes)],
    }
    assert create(path, images=manifest, views=1, attributes=attributes)
    codes = codec.encode(logits.softmax(dim=1).float().numpy())
    write(
        StoreWriter(path),
        0,
        0,
        codes,
        np.tile(np.array([0, 0, 1, 1], "int32"), (n, 1)),
        np.zeros(n, bool),
    )
    store = LabelStore.open(path)
    targets = make_targets(Config(train={"discriminator": {}}), stored_labels(store, 1))
    codes = torch.from_numpy(store.codes(0, slice(None)))
    return Stored(
        logits,
        targets(Batch(np.arange(n), {}, codes, torch.zeros(n, dtype=torch.int64), None, n)),
        targets,
    )


def told(student: torch.Tensor, teachers: torch.Tensor, seed: int = 0) -> float:
    """Train a discriminator, and return its share of right answers on held-out rows,
    the last HELD_OUT of either side. 0.5 is guessing."""
    torch.manual_seed(seed)
    seen = torch.cat([student[:-HELD_OUT], teachers[:-HELD_OUT]])
    # Standardise both sides, as the first layer could do itself.
    student, teachers = (
        (side - seen.mean(dim=0)) / seen.std(dim=0) for side in (student, teachers)
    )
    judge = Discriminator(student.shape[1])
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.003, fused=True)
    for _ in range(500):
        rows = torch.randint(len(student) - HELD_OUT, (64,))
        loss, _ = judge(student[rows], teachers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return judge(student[-HELD_OUT:], teachers[-HELD_OUT:])[1].mean().item()


# ---- traces of the coding


@pytest.fixture(
    scope="module",
    params=[(codec, classes) for codec in ALL for classes in (10, 1000)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def sharp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    codec, classes = ALL[request.param[0]], request.param[1]
    return stored(tmp_path_factory.mktemp("sharp") / "s.zarr", codec, sharp_logits(classes, codec))


def test_labels_from_a_store_are_not_told_from_the_teachers_own_outputs(sharp):
    rightly = told(*sharp.judged())
    assert rightly <= 0.55  # measured over five seeds: 0.50 to 0.514


def test_without_the_floor_they_would_be(sharp):
    rightly = told(*sharp.judged(NO_FLOOR))
    assert rightly > 0.65  # measured: 0.75 to 0.93


def test_below_the_floor_both_sides_look_exactly_alike(sharp):
    student, teachers = sharp.judged()
    below = sharp.logits.softmax(dim=1) < sharp.targets.floor * (1 - 1e-5)
    assert below.double().mean() > 0.4
    different = student[below] != teachers[below]
    # With a tail, a few zeros may share a little more than the floor, since their mass
    # was rounded up.
    if sharp.targets.decode.tail:
        assert different.double().mean() < 0.01 and (student - teachers)[below].abs().max() < 0.5
    else:
        assert not different.any()


def test_the_floor_is_that_of_the_stores_codec_by_hand(tmp_path):
    by_hand = {
        "cbrt8": (0.5 / 255) ** 3,
        "pow8": (0.5 / 255) ** 2.5,
        "sqrt8": (0.5 / 255) ** 2,
        "tail255": (0.75 / 255) ** 1.5,  # the edge of the dead zone
        "tail80": (0.75 / 80) ** 1.5,
        "tail40": (1.5 / 40) ** 1.5,
        "float16": 2.0**-25,  # half the smallest float16
        "float32": 2.0**-126,  # the value that smaller ones decode to
        "few": (1.5 / 31) ** 2,
    }
    for name, codec in ALL.items():
        assert stored(tmp_path / name, codec, torch.zeros(2, 3)).targets.floor == pytest.approx(
            by_hand[name], rel=1e-9, abs=0
        )
    for levels, edge in ((63, 1.5), (64, 0.5)):
        assert Codec("", "uint8", 0.4, levels, 0.0).floor == pytest.approx(
            (edge / levels) ** 2.5, rel=1e-9, abs=0
        )


def test_with_few_levels_the_flat_tails_of_real_labels_need_the_higher_floor(tmp_path):
    # Nearly all classes have code 1, which stands for 2.6e-4 to 2.3e-3.
    labels = stored(tmp_path / "s.zarr", FEW, real_logits(0.6, 1))
    rightly, with_lower = told(*labels.judged()), told(*labels.judged((0.5 / 31) ** 2))
    assert rightly <= 0.55 and with_lower > 0.6  # measured over five seeds: 0.50, and 0.70 or more


# ---- true differences


@pytest.mark.parametrize(("classes", "least"), [(10, 0.9), (2, 0.65)])
def test_a_sharper_student_is_told_from_the_teachers(classes, least):
    logits = made_up_logits(classes, 1, 2)
    rightly = told(
        *(
            log_floored((factor * logits).softmax(dim=1).float(), CODECS["pow8"].floor)
            for factor in (3, 1)
        )
    )
    assert rightly > least  # measured over five seeds: 0.94 or more, and 0.72 or more


# ---- what it does to the student


def gradients(seed: int = 0, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw gradients of both losses, float32 [rows, 10], whose ratios span 1e-3 to 1e3;
    one row has no cross-entropy's gradient, and one no discriminator's."""
    random = torch.Generator().manual_seed(seed)
    of_ce, of_judge = (torch.randn(rows, 10, generator=random) for _ in range(2))
    of_judge *= 10 ** (6 * torch.rand(rows, 1, generator=random) - 3)
    of_ce[0], of_judge[1] = 0, 0
    return of_ce, of_judge


def joined(
    of_ce: torch.Tensor, of_judge: torch.Tensor, bound: float | None, reversal: bool = False
) -> tuple[torch.Tensor, list[float]]:
    """Return the gradient that reaches the logits, and the sums of squares."""
    logits = torch.randn(len(of_ce), 10, generator=torch.Generator().manual_seed(9))
    influence = Influence(bound, reversal, torch.device("cpu"))
    one, other = influence.fork(logits.requires_grad_())
    assert torch.equal(one, logits) and torch.equal(other, logits)
    ((one * of_ce).sum() + (other * of_judge).sum()).backward()
    return logits.grad, influence.sums.tolist()


def test_without_a_bound_the_gradients_are_added_and_with_reversal_subtracted():
    of_ce, of_judge = gradients()
    for reversal, expected in ((False, of_ce + of_judge), (True, of_ce - of_judge)):
        found, sums = joined(of_ce, of_judge, None, reversal)
        assert torch.equal(found, expected)
        assert sums == pytest.approx(
            [of_ce.square().sum().item(), *[of_judge.square().sum().item()] * 2], rel=1e-5
        )


@pytest.mark.parametrize("reversal", [False, True])
def test_a_bound_shortens_the_discriminators_gradient_of_every_crop(reversal):
    of_ce, of_judge = gradients()
    found, sums = joined(of_ce, of_judge, 0.05, reversal)
    theirs = (found - of_ce) * (-1 if reversal else 1)
    length, allowed = theirs.norm(dim=1), 0.05 * of_ce.norm(dim=1)
    assert (length <= allowed * 1.001 + 1e-6).all()
    small = of_judge.norm(dim=1) <= allowed
    assert 5 < small.sum() < 35
    torch.testing.assert_close(theirs[small], of_judge[small], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(length[~small], allowed[~small], rtol=1e-3, atol=1e-6)
    aligned = (theirs * of_judge).sum(dim=1) / (length * of_judge.norm(dim=1)).clamp_min(1e-12)
    assert (aligned[~small][1:] > 0.999).all()  # shortened, not turned
    # Every crop's cross-entropy still falls, at 1 - 0.05 of its rate at least.
    assert ((found * of_ce).sum(dim=1) >= 0.9499 * of_ce.square().sum(dim=1)).all()
    assert sums[1] == pytest.approx(of_judge.square().sum().item(), rel=1e-5)
    assert sums[2] == pytest.approx(theirs.square().sum().item(), rel=1e-3)


def test_a_crops_gradient_depends_on_that_crop_alone():
    of_ce, of_judge = gradients()
    whole, _ = joined(of_ce, of_judge, 0.05)
    parts = [joined(of_ce[part], of_judge[part], 0.05)[0] for part in (slice(0, 7), slice(7, 40))]
    assert torch.equal(whole, torch.cat(parts))


def test_the_discriminator_learns_the_same_with_any_bound_and_reversal():
    found = []
    for bound, reversal in ((None, False), (0.01, False), (None, True)):
        torch.manual_seed(0)
        judge, influence = Discriminator(10), Influence(bound, reversal, torch.device("cpu"))
        student, teachers = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        one, other = influence.fork(student)
        loss, right = judge(other, teachers)
        (loss + (one * 1e-3).sum()).backward()
        found.append((loss, right, *(p.grad for p in judge.parameters())))
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(found[0], one, strict=True))


def mimic(bound: float | None, reversal: bool = False, rate: float = 0.01) -> tuple[float, float]:
    """Let free logits of 256 crops learn from labels of 10 classes, in the presence of
    a discriminator that learns fast. Returns the KL to the labels at the end, in nats,
    and the discriminator's loss."""
    labels = made_up_logits(10, 1, 1)[:256].float().softmax(dim=1)
    torch.manual_seed(0)
    student = (2 * torch.randn(256, 10)).requires_grad_()
    judge = Discriminator(10)
    influence = Influence(bound, reversal, torch.device("cpu"))
    optimizer = torch.optim.Adam(
        [{"params": [student], "lr": rate}, {"params": judge.parameters(), "lr": 0.001}]
    )
    for _ in range(1500):
        one, other = influence.fork(student)
        loss, _ = judge(log_floored(other.softmax(dim=1), 1e-6), log_floored(labels, 1e-6))
        entropy = soft_cross_entropy(one, labels).mean()
        optimizer.zero_grad()
        (entropy + loss).backward()
        optimizer.step()
    with torch.no_grad():
        kl = (soft_cross_entropy(student, labels) + torch.xlogy(labels, labels).sum(dim=1)).mean()
    return kl.item(), loss.item()


def test_a_bounded_discriminator_cant_keep_the_student_from_its_labels():
    bounded, _ = mimic(0.02)
    unbounded, _ = mimic(None)
    assert bounded < 1e-3  # measured: 1e-6 or less
    assert unbounded > 0.02  # measured: 0.09


def test_a_student_helps_the_discriminator_and_with_reversal_deceives_it():
    logits = made_up_logits(10, 1, 1)[:256].float()
    teachers = log_floored(logits.softmax(dim=1), 1e-6)
    losses = {}
    for name, rate, reversal in (
        ("helping", 0.01, False),
        ("frozen", 0.0, False),
        ("deceiving", 0.01, True),
    ):
        torch.manual_seed(0)
        student, judge = (2 * torch.randn(256, 10)).requires_grad_(), Discriminator(10)
        influence = Influence(None, reversal, torch.device("cpu"))
        optimizer = torch.optim.Adam(
            [{"params": [student], "lr": rate}, {"params": judge.parameters(), "lr": 0.001}]
        )
        for _ in range(300):
            one, other = influence.fork(student)
            loss, _ = judge(log_floored(other.softmax(dim=1), 1e-6), teachers)
            optimizer.zero_grad()
            (loss + 0 * one.sum()).backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["helping"] < losses["frozen"] / 4  # measured over five seeds: a 25th or less
    assert losses["frozen"] < losses["deceiving"] - 0.3  # measured: 0.51 or more


# ---- the authors' programs


def authors_loss(judge: Discriminator, student: torch.Tensor, teachers: torch.Tensor):
    """Return the loss as loss.py and models/discriminator.py of szq0214/MEAL-V2 compute
    it: 1 × 1 convolutions, each under a ReLU, and a target of two columns."""
    x = torch.cat([student, teachers], 0)[:, :, None, None]
    for layer in judge.layers[::2]:
        x = torch.relu(nn.functional.conv2d(x, layer.weight[:, :, None, None], layer.bias))
    target = torch.tensor([[1.0, 0.0]] * len(student) + [[0.0, 1.0]] * len(teachers))
    return nn.BCEWithLogitsLoss()(x.flatten(1), target)


def test_the_authors_network_and_loss_are_theirs():
    torch.manual_seed(0)
    judge = Discriminator(1000, authors=True)
    assert [layer.out_features for layer in judge.layers[::2]] == [125, 15, 2]
    student, teachers = (5 * torch.randn(6, 1000) for _ in range(2))
    found = []
    for loss_of in (lambda *sides: judge(*sides)[0], lambda *sides: authors_loss(judge, *sides)):
        one = student.clone().requires_grad_()
        judge.zero_grad()
        loss = loss_of(one, teachers)
        loss.backward()
        found.append([loss.detach(), one.grad, *(p.grad.clone() for p in judge.parameters())])
    assert found[0][1].abs().max() > 0
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_answers_at_zero_count_as_guessing():
    judge = Discriminator(10, authors=True)
    nn.init.constant_(judge.layers[4].bias, -100.0)  # both outputs stay at zero
    loss, right = judge(torch.randn(4, 10), torch.randn(4, 10))
    assert right.tolist() == [0.5, 0.5] and loss.item() == pytest.approx(np.log(2))


def test_each_variant_sees_what_it_says(recipe, store_path):
    expected = {  # what it sees, its bound, and the keys that count for nothing
        "paper": ("log_mean", 0.02, set()),
        "unbounded": ("log_mean", None, {"influence"}),
        "fkd_train_py": ("softmax", None, {"lr", "influence", "input"}),
        "train_py": ("mean_logits", None, {"lr", "influence", "input"}),
    }
    for variant, found in expected.items():
        train = {"online": variant == "train_py", "discriminator": {"variant": variant}}
        judge = config_file.validate({"train": train}, "test").train.discriminator
        assert (judge.seen, judge.bound, judge.unused) == found
    targets = make_targets(
        Config(train={"discriminator": {"variant": "fkd_train_py"}}),
        stored_labels(LabelStore.open(store_path), 1),
    )
    logits, soft = torch.randn(5, 3), torch.rand(5, 3)
    student, teachers = targets.judged(logits, Goal(soft, None, None))
    assert torch.equal(student, logits.softmax(dim=1)) and torch.equal(teachers, soft)


# ---- in training


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


def test_the_student_is_another_without_with_and_with_a_reversed_discriminator(
    photos, recipe, store_path, tmp_path
):
    judges = {"without": None, "with": {"lr": 0.01}, "reversed": {"lr": 0.01, "reversal": True}}
    for name, judge in judges.items():
        one = changed(recipe, train={"epochs": 1, "discriminator": judge})
        metrics = train(one, photos, tmp_path / name, store=store_path, device=CPU)
        assert ("discriminator_loss" in metrics) == (name != "without")
    heads = [weights(tmp_path / name)["head.weight"] for name in judges]
    assert len({head.numpy().tobytes() for head in heads}) == 3


def test_the_metrics_are_the_discriminators_by_hand(photos, recipe, store_path, tmp_path):
    still = changed(
        recipe,
        train={
            "epochs": 1,
            "lr": 1e-12,
            "seed": 2,
            "discriminator": {"lr": 1e-12, "influence": 0.1},
        },
    )
    metrics = train(still, photos, tmp_path / "run", store=store_path, device=CPU)
    store = LabelStore.open(store_path)
    student = load(still.student, classes=3, image_size=32, seed=2)
    torch.manual_seed(2)
    judge = Discriminator(3)
    loss, on_student, on_teachers, of_ce, of_judge, bounded = 0.0, 0, 0, 0, 0, 0
    replay = make_replay(
        stored_labels(store, 2),
        photos / "train",
        sizes=[32],
        batch_size=16,
        seed=2,
        rendering=still.render,
    )
    with replay.epoch(0) as batches:
        for batch in batches:
            p = torch.from_numpy(store.probabilities(0, batch.rows))
            with torch.no_grad():
                logits = student(batch.pixels[32]).requires_grad_()
            ours = judge.layers(log_floored(logits.softmax(dim=1), (0.5 / 255) ** 2.5))[:, 0]
            theirs = judge.layers(log_floored(p, (0.5 / 255) ** 2.5))[:, 0]
            losses = -(torch.log(1 - ours.sigmoid()) + torch.log(theirs.sigmoid())) / 2
            loss += losses.sum().item()
            on_student += int((ours < 0).sum())
            on_teachers += int((theirs > 0).sum())
            # Gradients of the batch's mean losses.
            (found,) = torch.autograd.grad(losses.mean(), logits)
            length = ((logits.softmax(dim=1) - p) / len(p)).norm(dim=1)
            of_ce += length.square().sum().item()
            of_judge += found.square().sum().item()
            bounded += found.norm(dim=1).minimum(0.1 * length).square().sum().item()
    assert metrics["discriminator_loss"] == pytest.approx(loss / 90, rel=1e-5)
    assert metrics["discriminator_gradient"] == pytest.approx((bounded / of_ce) ** 0.5, rel=1e-4)
    assert metrics["discriminator_gradient_unbounded"] == pytest.approx(
        (of_judge / of_ce) ** 0.5, rel=1e-4
    )
    assert 0.02 < metrics["discriminator_gradient"] < 0.0999  # some crops are at the bound
    parts = metrics["discriminator_accuracy_student"], metrics["discriminator_accuracy_teachers"]
    # A row on the edge may go either way.
    assert parts == pytest.approx((100 * on_student / 90, 100 * on_teachers / 90), abs=1.2)
    assert abs(parts[0] - parts[1]) > 5 and metrics["discriminator_accuracy"] == pytest.approx(
        sum(parts) / 2
    )


def test_a_new_run_has_the_papers_variant_and_an_old_run_keeps_its_own(
    photos, recipe, store_path, tmp_path
):
    """A run of a version before 0.11 has no variant in its config.yaml, and its
    discriminator pulled without a bound."""
    judged = {"epochs": 2, "milestones": [], "discriminator": {"lr": 0.1}}
    plain = changed(recipe, train=judged)
    train(plain, photos, tmp_path / "new", store=store_path, device=CPU)
    saved = yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())
    assert saved["train"]["discriminator"]["variant"] == "paper"

    unbounded = changed(
        recipe, train=judged | {"discriminator": {"lr": 0.1, "variant": "unbounded"}}
    )
    train(unbounded, photos, tmp_path / "whole", store=store_path, device=CPU)
    assert (
        weights(tmp_path / "whole")["head.weight"]
        .ne(weights(tmp_path / "new")["head.weight"])
        .any()
    )
    old = tmp_path / "old"
    train(changed(unbounded, train={"epochs": 1}), photos, old, store=store_path, device=CPU)
    saved = yaml.safe_load((old / "config.yaml").read_text())
    del saved["train"]["discriminator"]["variant"], saved["train"]["discriminator"]["influence"]
    (old / "config.yaml").write_text(yaml.safe_dump(saved))
    state = torch.load(old / "state.pt", weights_only=True)
    for key in ("discriminator_gradient", "discriminator_gradient_unbounded"):
        del state["metrics"][0][key]
    stopped = Path(shutil.copytree(old, tmp_path / "stopped"))
    torch.save(state, old / "state.pt")
    # Another was stopped in its validation.
    for key in ("val_top1", "val_top5", "val_loss"):
        del state["metrics"][0][key]
    torch.save(state | {UNVALIDATED: True}, stopped / "state.pt")
    before = tree(old)
    paper = changed(recipe, train=judged | {"discriminator": {"lr": 0.1, "variant": "paper"}})
    with pytest.raises(
        RunError,
        match=r"was started with train.discriminator.variant unbounded, this is paper; pass",
    ):
        train(paper, photos, old, store=store_path, device=CPU)
    assert tree(old) == before
    # The bound of the other variant counts for nothing.
    other = changed(recipe, train=judged | {"discriminator": {"lr": 0.1, "influence": 0.5}})
    for run, config in ((old, plain), (stopped, other)):
        train(config, photos, run, store=store_path, device=CPU)
        assert (run / "last.safetensors").read_bytes() == (
            tmp_path / "whole" / "last.safetensors"
        ).read_bytes()
    old_and_new = compare([old, tmp_path / "new"]).differences
    assert list(old_and_new["train.discriminator.variant"].values()) == ["unbounded", "paper"]


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ({"variant": "train_py"}, "variant train_py needs live teachers.*set it to fkd_train_py"),
        ({"variant": "fkd_train_py", "input": "mean_logits"}, "fkd_train_py sees probabilities"),
        (
            {"variant": "authors"},
            "variant must be 'paper', 'unbounded', 'train_py' or 'fkd_",
        ),
        ({"influence": 1.0}, "train.discriminator.influence must be below 1, got 1"),
        ({"influence": 0.0}, "train.discriminator.influence must be above 0, got 0"),
    ],
)
def test_what_cant_be_is_refused_in_one_line(judge, says):
    with pytest.raises(ConfigError, match=says) as error:
        config_file.validate({"train": {"discriminator": judge}}, "test")
    assert "\n" not in str(error.value)


def test_mean_logits_are_refused_without_live_teachers():
    document = {"train": {"discriminator": {"input": "mean_logits"}}}
    with pytest.raises(
        ConfigError,
        match="mean_logits needs live teachers, since a store holds no logits; "
        "set it to log_mean, or train --online",
    ):
        config_file.validate(document, "test")
    document["train"]["online"] = True
    assert config_file.validate(document, "test").train.discriminator.input == "mean_logits"


def test_online_the_discriminator_trains_in_every_form(photos, recipe, tmp_path):
    forms = {
        "log_mean": {},
        "mean_logits": {"input": "mean_logits"},
        "unbounded": {"variant": "unbounded"},
        "train_py": {"variant": "train_py"},
        "fkd_train_py": {"variant": "fkd_train_py"},
    }
    for name, form in forms.items():
        live = changed(
            recipe, train={"epochs": 1, "online": True, "discriminator": {"lr": 0.02} | form}
        )
        metrics = train(live, photos, tmp_path / name, device=CPU)
        state = torch.load(tmp_path / name / "state.pt", weights_only=True)
        # The authors' programs have two outputs, and give it the student's rate.
        assert [group["lr"] for group in state["optimizer"]["param_groups"]] == [
            0.01,
            0.01 if "py" in name else 0.02,
        ]
        assert len(state["discriminator"]["layers.4.bias"]) == (2 if "py" in name else 1)
        assert (
            0 < metrics["discriminator_loss"] < np.inf
            and 0 <= metrics["discriminator_accuracy"] <= 100
            # The authors' two outputs may be at zero from the start.
            and metrics["discriminator_gradient"] >= (1e-9 if "py" not in name else 0)
        )
    heads = {
        weights(tmp_path / name)["head.weight"].numpy().tobytes()
        for name in forms
        if "py" not in name
    }
    assert len(heads) == len(forms) - 2


def test_the_teachers_mean_logits_are_those_by_hand(recipe, store_path):
    live = changed(recipe, train={"online": True, "discriminator": {"input": "mean_logits"}})
    teachers = load_teachers([ModelSpec.model_validate(spec) for spec in live.teachers], CPU)
    targets = make_targets(live, stored_labels(LabelStore.open(store_path), 1), teachers)
    random = torch.Generator().manual_seed(0)
    pixels = {
        size: torch.randint(0, 256, (20, size, size, 3), dtype=torch.uint8, generator=random)
        for size in (32, 48, 64)
    }
    goal = targets(Batch(np.arange(20), pixels, None, torch.zeros(20, dtype=torch.int64), None, 20))
    with torch.no_grad():
        by_hand = sum(
            t.module(
                (pixels[size].permute(0, 3, 1, 2) / 255 - torch.tensor(t.mean)[:, None, None])
                / torch.tensor(t.std)[:, None, None]
            )
            for t, size in zip(teachers, (64, 48), strict=True)
        )
    torch.testing.assert_close(goal.mean_logits, by_hand / 2, rtol=1e-4, atol=1e-4)
    logits = torch.randn(20, 3, generator=random)
    seen = targets.judged(logits, goal)
    assert torch.equal(seen[0], logits) and torch.equal(seen[1], goal.mean_logits)
