"""The codes of probabilities: every row is decoded within the stated error, and only
distributions are encoded."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from numcodecs.zstd import Zstd
from support.paths import SOFT_LABELS

from cache import StoreError
from cache.format.codec import CODECS, DEFAULT, Codec, divergence, entropy, from_description
from cache.format.codec_bounds import distance, max_error, plausible

SIZES = (2, 10, 1_000, 21_841)
TAIL = [name for name, codec in CODECS.items() if codec.tail]
POWER = [name for name, codec in CODECS.items() if not codec.is_float and not codec.tail]
# KL and TV that bf16 autocast costs against float32, measured on the teachers of
# soft_labels.npz
BF16_NOISE = (8.5e-4, 0.0123)

everywhere = pytest.mark.parametrize("classes", SIZES)
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def real_rows() -> np.ndarray:
    """Load labels of two real teachers for random crops of ImageNet photographs:
    float64 [256, 1000]."""
    with np.load(SOFT_LABELS) as file:
        p = file["probabilities"].astype("float64")
    return p / p.sum(axis=1, keepdims=True)


@cache
def varied(classes: int) -> np.ndarray:
    """Make rows from flat to one-hot."""
    rng = np.random.default_rng(classes)
    many = 2 if classes > 1_000 else 20
    rows = [np.full((1, classes), 1 / classes), np.eye(2, classes, classes - 2)]
    rows += [
        rng.dirichlet(np.full(classes, concentration), many)
        for concentration in (0.003, 0.03, 0.3, 3, 100)
    ]
    for width in (0.1, 1, 3, 10, 30):
        logits = rng.normal(0, width, (many, classes))
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        rows.append(e / e.sum(axis=1, keepdims=True))
    return np.concatenate(rows)


def edges(codec: Codec) -> np.ndarray:
    """Return the probabilities at which the rounding changes from one code to the next:
    float64 [edges]."""
    if codec.dtype == "float32":
        return np.geomspace(1e-30, 0.9, 200)
    if codec.is_float:
        values = np.arange(0x3C01, dtype="uint16").view("float16").astype("float64")
        return (values[1:] + values[:-1]) / 2
    middle = np.arange(1, codec.levels + 1) - 0.5
    middle[0] = codec.dead_zone
    return (middle / codec.levels) ** (1 / codec.exponent)


def adversarial(codec: Codec, classes: int) -> np.ndarray:
    """Make the rows that round worst: as many classes as fit are just above or just
    below one edge, and one class takes the rest."""
    rows = []
    usable = edges(codec)
    usable = usable[(usable < 1) & (usable > 1e-4 / classes)]
    # A tail loses by sharing, also among classes far below the first edge.
    if codec.tail:
        usable = np.concatenate([usable[0] * np.array([0.01, 0.1, 0.3, 0.7]), usable])
    near_flat = np.argsort(np.abs(usable - 1 / classes))[:4]
    spread = np.linspace(
        0, len(usable) - 1, min(len(usable), 12 if classes > 1_000 else 80)
    ).astype(int)
    for edge in usable[np.union1d(near_flat, spread)]:
        many = min(classes - 1, int(1 / (edge * (1 + 1e-5))))
        for share in (0.0, 0.5, 0.9, 1.0):
            row = np.zeros(classes)
            up = round(share * many)
            row[:up] = edge * (1 + 1e-5)
            row[up:many] = edge * (1 - 1e-5)
            row[-1] += 1 - row.sum()
            rows.append(row)
            if codec.tail:  # a third of the classes that fit, and zero for the other classes
                row = np.where(np.arange(classes) < many // 3, row, 0)
                row[-1] += 1 - row.sum()
                rows.append(row)
    if classes <= 10:  # few classes: many mixtures of edges
        rng = np.random.default_rng(0)
        rough = rng.dirichlet(np.full(classes, 0.5), 4_000)
        below = np.maximum(np.searchsorted(usable, rough[:, :-1]) - 1, 0)
        snapped = usable[below] * (1 + rng.choice([-1e-5, 1e-5], below.shape))
        snapped = snapped[snapped.sum(axis=1) <= 1]
        rows.extend(np.column_stack([snapped, 1 - snapped.sum(axis=1)]))
    return np.array(rows)


@everywhere
@every_codec
def test_a_decoded_row_sums_to_one_and_holds_no_zero(codec, classes):
    rows = varied(classes)
    codes = codec.encode(rows)
    decoded = codec.decode(codes)
    assert (codes == 0).any()  # codes of zero, which must not be decoded as zero
    assert codes.shape == (len(rows), codec.columns(classes))
    assert (
        codes.dtype == codec.dtype and decoded.dtype == np.float32 and decoded.shape == rows.shape
    )
    assert np.abs(decoded.sum(axis=1, dtype="float64") - 1).max() < 1e-5
    assert decoded.min() > 0


@everywhere
@every_codec
def test_no_row_exceeds_the_stated_error(codec, classes):
    rows = np.concatenate([varied(classes), adversarial(codec, classes)])
    assert np.abs(rows.sum(axis=1) - 1).max() < 1e-9 and rows.min() >= 0
    kl, tv = divergence(rows, codec.decode(codec.encode(rows)))
    most_kl, most_tv = max_error(codec, classes)
    assert kl.max() <= most_kl, f"row {kl.argmax()}"
    assert tv.max() <= most_tv, f"row {tv.argmax()}"
    if codec.tail:
        assert kl.max() > 0.3 * most_kl or classes < 1_000
    elif not codec.is_float:  # the bound is not idle: some row comes near it
        assert kl.max() > 0.8 * most_kl and tv.max() > 0.75 * most_tv


@everywhere
def test_finer_codecs_state_smaller_errors(classes):
    stated = [max_error(CODECS[name], classes) for name in ("float32", "float16", *POWER)]
    if classes >= 1_000:
        assert stated == sorted(stated)
    for kl, tv in stated:
        assert 0 < kl < 0.2 and 0 < tv < 0.35
    tails = [max_error(CODECS[name], classes) for name in TAIL]
    assert tails == sorted(tails) and tails[0][0] > 0 and tails[-1][1] < 1


# Codec → mean KL in nats, mean total variation, bytes a row as one zstd block of the
# codec's level, measured on tests/data/soft_labels.npz.
MEASURED = {
    "cbrt8": (3.51e-4, 6.87e-3, 584),
    "pow8": (7.32e-4, 9.33e-3, 520),
    "sqrt8": (2.56e-3, 1.60e-2, 413),
    "tail255": (0.0103, 0.0329, 214),
    "tail80": (0.0385, 0.0619, 55),
    "tail40": (0.076, 0.0847, 26),
    "float16": (0, 6.23e-5, 1738),  # KL under 1e-7: the rounding of float32 arithmetic
    "float32": (0, 0, 3590),
}


@every_codec
def test_real_labels_cost_what_the_table_says(codec):
    rows = real_rows()
    codes = codec.encode(rows)
    kl, tv = (error.mean() for error in divergence(rows, codec.decode(codes)))
    wanted_kl, wanted_tv, wanted_bytes = MEASURED[codec.name]
    assert kl == pytest.approx(wanted_kl, rel=0.05, abs=1e-7)
    assert tv == pytest.approx(wanted_tv, rel=0.05, abs=1e-7)
    parts = [codes[:, :1000], codes[:, 1000:]]  # the tail is an array of its own
    size = sum(
        len(Zstd(level=codec.compression).encode(part.tobytes())) for part in parts if part.size
    )
    assert size / len(rows) == pytest.approx(wanted_bytes, rel=0.1)


@everywhere
@every_codec
def test_the_distance_to_a_coded_row_is_none_from_that_row_and_never_more_than_to_any_other(
    codec, classes
):
    rows = varied(classes)
    codes, others = codec.encode(rows), np.roll(rows, 1, axis=0)
    assert distance(codec, rows, codes).max() < 2e-6
    apart = distance(codec, others, codes)
    # One row with these codes is known, so the nearest such row is no further away.
    assert (apart <= divergence(others, rows)[1] + 2e-6).all()
    assert apart.max() > 0.2  # the others are indeed other rows


def test_the_default_codec_costs_less_than_half_precision_teachers():
    kl, tv = divergence(real_rows(), CODECS[DEFAULT].decode(CODECS[DEFAULT].encode(real_rows())))
    assert kl.mean() < BF16_NOISE[0] and tv.mean() < BF16_NOISE[1]


def test_divergence_and_entropy_are_those_of_the_books():
    p, q = (
        np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]),
        np.array([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]]),
    )
    kl, tv = divergence(p, q)
    assert kl == pytest.approx([np.log(2), np.log(2)]) and tv == pytest.approx([0.5, 0.5])
    assert entropy(p) == pytest.approx([np.log(2), 0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({1: np.nan}, "1 values not finite"),
        ({1: np.inf}, "sum inf.* 1 values not finite"),
        ({1: np.inf, 2: -np.inf}, "2 values not finite"),
        ({1: -0.1, 2: 0.5}, "sum 1, minimum -0.1"),
        ({1: 0.21}, "sum 1.01"),
        ({1: 0.19}, "sum 0.99"),
        (dict.fromkeys(range(5), 0.0), "sum 0, minimum 0"),
    ],
)
@every_codec
def test_a_row_that_is_no_distribution_is_refused_and_named(codec, change, says):
    rows = np.full((4, 5), 0.2, "float32")
    codec.encode(rows)
    rows[2, list(change)] = list(change.values())
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(
            StoreError, match=f"row 2 of a batch is no probability distribution: .*{says}"
        ) as error,
    ):
        codec.encode(rows)
    assert "\n" not in str(error.value)


@every_codec
def test_the_small_misses_of_half_precision_are_no_error(codec):
    rows = varied(10) * np.linspace(0.9995, 1.0005, len(varied(10)))[:, None]
    kl, _ = divergence(varied(10), codec.decode(codec.encode(rows)))
    assert kl.max() < 2 * max_error(codec, 10)[0] + 2e-6


def test_a_row_that_codes_to_nothing_but_zeros_is_refused():
    classes = 400_000  # a flat row's 2.5e-6 is below the smallest code of sqrt8, 3.8e-6
    rows = np.zeros((2, classes), "float32")
    rows[0, 0], rows[1] = 1, 1 / classes
    with pytest.raises(
        StoreError,
        match="row 1 of a batch has no probability large enough "
        "for codec sqrt8 at 400000 classes; choose a finer",
    ):
        CODECS["sqrt8"].encode(rows)
    assert CODECS["pow8"].encode(rows).any(axis=1).all()


# A store's formulas in words → the same in numpy. If the words change, they must change
# here too.
FORMULAS = {
    "p = max(q, zero); p = p / sum(p)": lambda q, c: np.maximum(q, c["zero"]),
    "p = (q / levels) ** (1 / exponent) where q > 0, p = zero where q = 0; "
    "p = p / sum(p)": lambda q, c: np.where(
        q > 0, (q / c["levels"]) ** (1 / c["exponent"]), c["zero"]
    ),
    "T = (t / M) ** 2 with M = codec.tail, t = tail[view, image], or T = 0 if no q is 0; "
    "p = (q / levels) ** (1 / exponent) where q > 0, scaled to the sum 1 - T; "
    "p = T / (number of classes with q = 0) where q = 0": lambda q, c: tail_by_its_words(
        q[:, :-1], q[:, -1], c
    ),
}


def tail_by_its_words(q: np.ndarray, t: np.ndarray, c: dict) -> np.ndarray:
    out = []
    for row, mass in zip(q, (t / c["tail"]) ** 2, strict=True):
        T = mass if (row == 0).any() else 0.0
        p = (row / c["levels"]) ** (1 / c["exponent"])
        out.append(np.where(row > 0, p * (1 - T) / p.sum(), T / max(1, (row == 0).sum())))
    return np.array(out)


@pytest.mark.parametrize("classes", [2, 1_000])
@every_codec
def test_a_description_decodes_alike_by_parameters_and_by_its_words(codec, classes):
    description = json.loads(json.dumps(codec.describe()))
    codes = codec.encode(varied(classes))
    decoded = codec.decode(codes)
    assert np.array_equal(
        from_description(description | {"name": "renamed"}).decode(codes), decoded
    )
    p = FORMULAS[description["formula"]](codes.astype("float64"), description)
    assert np.allclose(p / p.sum(axis=1, keepdims=True), decoded, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", TAIL)
def test_a_tail_keeps_its_mass_and_the_largest_class_its_code(name):
    codec = CODECS[name]
    for classes in SIZES:
        rows = varied(classes)
        codes, decoded = codec.encode(rows), codec.decode(codec.encode(rows)).astype("float64")
        zero = codes[:, :-1] == 0
        assert not zero[np.arange(len(rows)), rows.astype("float32").argmax(axis=1)].any()
        mass = np.where(zero, rows, 0).sum(axis=1)
        assert (
            np.abs(np.sqrt(np.where(zero, decoded, 0).sum(axis=1)) - np.sqrt(mass)).max()
            < 1.01 / codec.tail
        )
        assert (codes[:, -1] < codec.tail).all() and ((codes[:, -1] > 0) == zero.any(axis=1)).all()


@everywhere
@every_codec
def test_only_rows_that_sum_to_one_are_plausible(codec, classes):
    rows = np.concatenate([varied(classes), adversarial(codec, classes)])
    assert plausible(codec, codec.encode(rows)).all()
    full = np.full(
        (1, codec.columns(classes)), 1.0 if codec.is_float else codec.levels, codec.dtype
    )
    assert not plausible(codec, full).any()
    if codec.is_float:
        assert not plausible(codec, np.full((1, classes), np.nan, codec.dtype)).any()


def test_every_code_of_a_power_codec_decodes_to_its_formula_and_comes_back():
    for name in POWER:
        codec = CODECS[name]
        codes = np.arange(256, dtype="uint8")
        p = np.where(codes > 0, (codes / codec.levels) ** (1 / codec.exponent), codec.zero)
        assert np.allclose(codec.table, p, rtol=1e-6, atol=0)
        rows = np.column_stack([p, 1 - p])  # two classes: no renormalisation to speak of
        assert np.array_equal(codec.encode(rows)[:, 0], codes)
        assert 0 < codec.zero < edges(codec)[0]


@pytest.mark.parametrize("key", ["name", "dtype", "exponent", "levels", "zero"])
def test_a_description_without_one_of_its_keys_is_refused_by_its_name(key):
    description = CODECS[DEFAULT].describe()
    del description[key]
    with pytest.raises(StoreError, match=f"codec has no '{key}'"):
        from_description(description)
