"""--profile says where the time of a stage went, and names what limits it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
from support.small import CPU, changed
from support.stages import generate, train

from pipeline.config import Config
from pipeline.labelling import stream
from pipeline.render.dali import Decoder
from pipeline.runtime.profiling import Clock, advice_on_labelling, advice_on_training
from pipeline.training.loop import Learner

SLOW = 0.3  # seconds added to a call


def slowed(monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> None:
    real: Callable = getattr(place, name)

    def slow(*given, **named):
        time.sleep(SLOW)
        return real(*given, **named)

    monkeypatch.setattr(place, name, slow)


def parts(said: str) -> dict[str, float]:
    """Read the seconds of each part from the printed profile."""
    return {
        name.strip(): float(seconds)
        for name, seconds in re.findall(r"^  (\D+?) +([\d.]+) s +[\d.]+ %$", said, re.M)
    }


def most(found: dict[str, float]) -> str:
    return max(found, key=lambda name: found[name] * (not name.startswith("wait")))


@pytest.mark.parametrize(
    "limit",
    [
        (
            stream,
            "ensemble",
            "teachers",
            "the teachers are the limit, the loader keeps up: "
            "set store.compile=true for a new store",
        ),
        (
            Decoder,
            "__call__",
            "decode",
            "the teachers wait for crops, and decoding takes most of that: raise "
            "store.views_per_decode (1 of 2 views now)",
        ),
    ],
)
def test_what_limits_labelling_is_named(photos, recipe, tmp_path, monkeypatch, capsys, limit):
    place, name, part, advice = limit
    slowed(monkeypatch, place, name)
    small = changed(
        recipe,
        store={"shard_rows": 64, "batch_size": 32, "views_per_decode": 1},
        render={"threads": None},
    )
    began = time.perf_counter()
    generate(small, photos, tmp_path / "s.zarr", device=CPU, profile=True)
    took, said = time.perf_counter() - began, capsys.readouterr().err
    found = parts(said)
    assert advice in said and most(found) == part and found[part] >= 6 * SLOW
    feeding = sum(
        found.get(name, 0)
        for name in ("teachers", "wait for crops", "wait for the writer", "the rest")
    )
    assert 6 * SLOW <= feeding <= took
    assert {"read", "decode", "resize", "send", "code", "write"} <= found.keys()


@pytest.mark.parametrize(
    "limit",
    [
        (
            Learner,
            "forward",
            "forward and backward",
            "the student is the limit, the loader keeps up: set train.compile=true",
        ),
        (
            Decoder,
            "__call__",
            "decode",
            "the student waits for crops, and decoding takes most of that: "
            "show several crops of each decoded image",
        ),
    ],
)
def test_what_limits_training_is_named(
    photos, recipe, store_path, tmp_path, monkeypatch, capsys, limit
):
    place, name, part, advice = limit
    slowed(monkeypatch, place, name)
    short = changed(recipe, train={"epochs": 2, "batch_size": 45}, render={"threads": None})
    train(short, photos, tmp_path / "run", store=store_path, device=CPU, profile=True)
    said = capsys.readouterr().err
    found = parts(said)
    assert advice in said and most(found) == part
    assert {
        "labels and teachers",
        "forward and backward",
        "optimizer",
        "wait for crops",
        "validate",
        "save",
        "labels",
        "read",
        "decode",
        "resize",
    } <= found.keys()


def test_without_profile_nothing_is_said_of_it(photos, recipe, store_path, tmp_path, capsys):
    train(
        changed(recipe, train={"epochs": 1}), photos, tmp_path / "run", store=store_path, device=CPU
    )
    assert "where" not in capsys.readouterr().err


def clock(**seconds: float) -> Clock:
    made = Clock()
    made.seconds.update({name.replace("_", " "): took for name, took in seconds.items()})
    return made


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("seconds", "settings", "device", "said"),
    [
        ({"teachers": 9, "wait_for_crops": 0.5}, {}, CPU, "the teachers are the limit"),
        ({"teachers": 9, "wait_for_crops": 0.5}, {}, CUDA, "store.precision=float16"),
        (
            {"teachers": 5, "wait_for_crops": 5, "read": 6, "decode": 3},
            {},
            CPU,
            "put --data on a faster disk",
        ),
        (
            {"teachers": 5, "wait_for_crops": 5, "read": 1, "decode": 8},
            {"render": {"threads": 1}},
            CPU,
            "set render.threads to ",
        ),
        (
            {"teachers": 5, "wait_for_crops": 5, "read": 1, "decode": 8},
            {"crops": {"views": 8}},
            CPU,
            "raise store.views_per_decode (4 of 8 views now)",
        ),
        (
            {"teachers": 5, "wait_for_crops": 5, "read": 1, "decode": 8},
            {},
            CUDA,
            "render.backend=gpu",
        ),
        (
            {"teachers": 5, "wait_for_the_writer": 5, "code": 1, "write": 5},
            {},
            CPU,
            "put --store on a faster one",
        ),
        (
            {"teachers": 5, "wait_for_the_writer": 5, "code": 5, "write": 1},
            {},
            CPU,
            "a codec of one byte a class",
        ),
    ],
)
def test_advice_on_labelling(seconds, settings, device, said):
    assert said in advice_on_labelling(clock(**seconds), Config.model_validate(settings), device)


@pytest.mark.parametrize(
    ("seconds", "settings", "device", "said"),
    [
        ({"forward_and_backward": 9, "validate": 90}, {}, CPU, "the student is the limit"),
        (
            {"forward_and_backward": 9},
            {"train": {"compile": True}},
            CUDA,
            "loader keeps up: train.precision=bfloat16, or use more GPUs",
        ),
        (
            {"forward_and_backward": 5, "wait_for_crops": 5, "labels": 8, "decode": 3},
            {},
            CPU,
            "put --store on a faster disk",
        ),
        (
            {"forward_and_backward": 5, "wait_for_crops": 5, "read": 8, "decode": 3},
            {},
            CPU,
            "put --data on a faster disk",
        ),
        (
            {"forward_and_backward": 5, "wait_for_crops": 5, "decode": 8},
            {"train": {"crops_per_image": 4, "batch_size": 8}},
            CPU,
            "more cores",
        ),
    ],
)
def test_advice_on_training(seconds, settings, device, said):
    assert said in advice_on_training(clock(**seconds), Config.model_validate(settings), device)
