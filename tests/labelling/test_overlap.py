"""Both stages keep their model busy: crops are rendered ahead of it, labels are coded
and written behind it, and units follow each other without a gap. If one of these parts
fails, the other parts end, and no thread and no claim is left.

Nothing here is timed. Each part waits for another part that must be at work at the same
time. A loop that does one thing after the other would wait for ever, and these tests
end the waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support.small import CPU, changed, tree
from support.stages import generate, train

from cache import LabelStore
from cache.errors import MealError, StoreError
from cache.system.claims import claims_of
from cache.writer import StoreWriter
from pipeline.config import Config
from pipeline.images.patience import DataError
from pipeline.labelling import stream
from pipeline.labelling.stream import UNITS, Labeller
from pipeline.models.model import ModelError
from pipeline.provenance.fingerprint import OTHER_BATCHES
from pipeline.render.renderer import CropRenderer
from pipeline.runtime import device_transfer
from pipeline.runtime.device_transfer import Sender, Sent
from pipeline.runtime.threads import ahead, behind
from pipeline.training import loop
from pipeline.training.loop import Run

FINGERPRINT = 1 + OTHER_BATCHES  # batches in which the fingerprint's crops are rendered
PATIENCE = 20.0  # seconds after which a part gives up waiting for another


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    patience = time.monotonic() + 5
    while time.monotonic() < patience and (
        left := [
            t
            for t in threading.enumerate()
            if t not in before and "asyncio" not in t.name and "zarr" not in t.name
        ]
    ):
        time.sleep(0.01)
    assert not left, left


class Counted:
    """The number of times that something has happened."""

    def __init__(self) -> None:
        self.n, self.changed = 0, threading.Condition()

    def happens(self) -> int:
        with self.changed:
            self.n += 1
            self.changed.notify_all()
            return self.n

    def wait_for(self, n: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.n >= n, PATIENCE):
                raise AssertionError(
                    f"it happened {self.n} times and never {n}: "
                    f"nothing is done beside anything else"
                )


@pytest.fixture
def small(recipe: Config) -> Config:
    """A recipe for 90 photographs in two views: three units of two batches, each batch
    with both views from one decode."""
    return changed(recipe, store={"shard_rows": 32, "batch_size": 16})


def spied(
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    name: str,
    before: Callable[[int], object],
    after: Callable[[], object] = lambda: None,
) -> None:
    """Wrap every call: ``before`` gets the call's number, from 1; ``after`` follows the
    call."""
    real, calls = getattr(place, name), Counted()

    def spy(*given, **named):
        before(calls.happens())
        result = real(*given, **named)
        after()
        return result

    monkeypatch.setattr(place, name, spy)


def test_crops_are_rendered_and_labels_written_while_the_teachers_work(
    photos, small, store_path, tmp_path, monkeypatch
):
    rendered, begun, written = Counted(), Counted(), Counted()
    fingerprint = 2 * FINGERPRINT  # rendered when the store is made and when it is filled

    def forward(call: int) -> None:  # of 12: two views × (2 + 2 + 2) batches
        begun.happens()
        # The next batch is rendered already, also where another unit begins.
        rendered.wait_for(min(6, (call + 1) // 2 + 1) + fingerprint)
        if call == 12:
            # The first unit was written while the second and third were labelled.
            written.wait_for(2)

    monkeypatch.setattr(stream, "BEHIND", 2)
    spied(monkeypatch, CropRenderer, "__call__", lambda call: None, rendered.happens)
    spied(monkeypatch, stream, "ensemble", forward)
    # A unit is written while the next unit's labels are made.
    spied(
        monkeypatch,
        StoreWriter,
        "write",
        lambda call: begun.wait_for(min(12, 4 + call)),
        written.happens,
    )
    generate(small, photos, tmp_path / "s.zarr", device=CPU)
    assert (begun.n, written.n, rendered.n) == (12, 6, 6 + fingerprint)
    assert tree(tmp_path / "s.zarr") == tree(store_path)


def test_pictures_are_rendered_while_the_student_trains(
    photos, small, store_path, tmp_path, monkeypatch
):
    rendered = Counted()
    epochs = changed(small, train={"epochs": 1})
    spied(monkeypatch, CropRenderer, "__call__", lambda call: None, rendered.happens)
    # 6 batches and the fingerprint
    spied(monkeypatch, Run, "_step", lambda call: rendered.wait_for(min(6, call + 1) + FINGERPRINT))
    train(epochs, photos, tmp_path / "run", store=store_path, device=CPU)
    assert rendered.n == 6 + FINGERPRINT


def test_the_next_epochs_pictures_are_rendered_while_the_student_is_validated(
    photos, small, store_path, tmp_path, monkeypatch
):
    rendered = Counted()
    spied(monkeypatch, CropRenderer, "__call__", lambda call: None, rendered.happens)
    # 6 batches an epoch and the fingerprint
    spied(
        monkeypatch,
        loop,
        "evaluate",
        lambda call: rendered.wait_for(min(12, 6 * call + 1) + FINGERPRINT),
    )
    train(small, photos, tmp_path / "run", store=store_path, device=CPU)
    assert rendered.n == 12 + FINGERPRINT


def test_what_is_sent_to_a_device_as_copies_makes_the_same_store_and_student(
    photos, small, store_path, tmp_path, monkeypatch
):
    """On a GPU every tensor arrives as another tensor."""

    def sent(self: Sender, what: object) -> Sent:
        return Sent(device_transfer._each(lambda tensor: tensor.clone(), what))

    train(small, photos, tmp_path / "plain", store=store_path, device=CPU)
    monkeypatch.setattr(Sender, "__call__", sent)
    generate(small, photos, tmp_path / "s.zarr", device=CPU)
    assert tree(tmp_path / "s.zarr") == tree(store_path)
    train(small, photos, tmp_path / "run", store=store_path, device=CPU)
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == (
        tmp_path / "plain" / "last.safetensors"
    ).read_bytes()


FAILURES = {
    "the renderer": (
        CropRenderer,
        "__call__",
        2 * FINGERPRINT + 1,
        DataError("a picture"),
        DataError,
    ),
    "a teacher": (stream, "ensemble", 5, ModelError("a teacher"), ModelError),
    "a thread behind": (Labeller, "_blame", 1, ModelError("a label"), ModelError),
    "the disk": (StoreWriter, "write", 2, OSError(28, "No space left on device"), StoreError),
}


@pytest.mark.parametrize("what", FAILURES)
def test_what_fails_ends_all_of_stage_one_and_is_told_and_goes_on_to_the_same_store(
    photos, small, store_path, tmp_path, monkeypatch, what
):
    place, name, nth, error, kind = FAILURES[what]

    def fail(call: int) -> None:
        if call == nth:
            raise error

    with monkeypatch.context() as broken:
        spied(broken, place, name, fail)
        if what == "a thread behind":
            broken.setattr(
                stream.torch, "isfinite", lambda logits: torch.zeros_like(logits, dtype=torch.bool)
            )
        with pytest.raises(kind, match=str(error.args[-1])):
            generate(small, photos, tmp_path / "s.zarr", device=CPU)
    assert not claims_of(tmp_path / "s.zarr").exists()
    done = LabelStore.open(tmp_path / "s.zarr").finished().sum()
    assert done < 6
    generate(small, photos, tmp_path / "s.zarr", device=CPU)
    assert tree(tmp_path / "s.zarr") == tree(store_path)


def test_what_is_whole_when_something_fails_is_written(photos, small, tmp_path, monkeypatch):
    """The teachers fail in the second unit, while all labels of the first unit wait to
    be written."""

    def fail(call: int) -> None:
        if call == 5:
            raise ModelError("a teacher")

    spied(monkeypatch, stream, "ensemble", fail)
    with pytest.raises(ModelError):
        generate(small, photos, tmp_path / "s.zarr", device=CPU)
    assert LabelStore.open(tmp_path / "s.zarr").finished().tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize("what", ["a teacher", "the disk"])
def test_a_renderer_that_waits_for_room_ends_when_there_will_never_be_any(
    photos, recipe, tmp_path, monkeypatch, what
):
    """Units are of one batch. The fourth unit can't begin before the first is written,
    and the first never is."""
    one_batch = changed(recipe, store={"shard_rows": 16, "batch_size": 16})
    begun = Counted()
    place, name, _, error, kind = FAILURES[what]

    def fail(call: int) -> None:
        begun.wait_for(UNITS)
        time.sleep(0.3)  # so that the renderer waits by then
        raise error

    spied(monkeypatch, Labeller, "_claimed", lambda call: begun.happens())
    spied(monkeypatch, place, name, fail)
    with pytest.raises(kind, match=str(error.args[-1])):
        generate(one_batch, photos, tmp_path / "s.zarr", device=CPU)
    assert begun.n == UNITS
    assert not LabelStore.open(tmp_path / "s.zarr").finished().any()


def test_what_fails_ends_training_and_is_told(photos, small, store_path, tmp_path, monkeypatch):
    def fail(call: int) -> None:
        if call == FINGERPRINT + 3:
            raise MealError("a picture")

    spied(monkeypatch, CropRenderer, "__call__", fail)
    with pytest.raises(MealError, match="a picture"):
        train(small, photos, tmp_path / "run", store=store_path, device=CPU)
    assert not claims_of(tmp_path / "run").exists()


# ---- the threads themselves


def test_ahead_is_bounded_and_keeps_the_order():
    made = Counted()

    def items() -> Iterator[int]:
        for i in range(50):
            made.happens()
            yield i

    with ahead(items(), depth=3) as given:
        for i, item in enumerate(given):
            assert item == i
            if i == 10:
                time.sleep(0.2)
                # items given, the queue's items, and one on its way into the queue
                assert made.n <= 10 + 1 + 3 + 2
    assert made.n == 50


def test_leaving_ahead_ends_its_thread_and_closes_its_iterator():
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with pytest.raises(KeyError), ahead(items()) as given:
        next(given)
        raise KeyError
    assert closed.is_set()


def test_behind_deals_with_everything_in_order_before_it_is_left():
    seen = []

    def deal_with(item: int) -> None:
        time.sleep(0.001)
        seen.append(item)

    with behind(deal_with, depth=2) as give:
        for i in range(50):
            give(i)
            assert i - 3 <= len(seen) + 1  # two items wait at most, and one is in hand
    assert seen == list(range(50))
    with pytest.raises(KeyError), behind(deal_with, depth=2) as give:
        give(50)
        give(51)
        raise KeyError
    assert seen == list(range(52))


def test_an_error_behind_is_raised_where_the_next_is_given_or_at_the_end_and_the_rest_is_dropped():
    seen = []

    def deal_with(item: int) -> None:
        seen.append(item)
        if item == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"), behind(deal_with, depth=1) as give:
        for i in range(1000):
            give(i)
    assert seen == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="three"), behind(deal_with, depth=5) as give:
        give(3)
    with pytest.raises(KeyError), behind(deal_with, depth=5) as give:  # the first error
        give(3)
        raise KeyError
    assert np.array_equal(seen, [0, 1, 2, 3, 3, 3])
