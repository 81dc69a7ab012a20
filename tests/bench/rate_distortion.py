"""Measure the cost of a label in bytes and in error: every codec of the store, beside
the top-k formats of other systems, on labels of real teachers.

    python tests/bench/rate_distortion.py
    python tests/bench/rate_distortion.py --store labels.zarr --rows 4096
    python tests/bench/rate_distortion.py --figure curves.png --json figures.json

Without --store, the labels are 256 of tf_efficientnet_lite1 + lite2 that come with the
tests. A store of yours must be made with store.codec float32.

Top-k formats (FKD, ml-dr, TinyViT) keep k class ids (2 bytes each) and probabilities (2
bytes, float16), and share the rest of the probability evenly over the other classes:
4·k bytes, uncompressed as their authors store them. "packed" is the same through zstd
level 19, which none of the authors does. Codecs are compressed as in a store. "ratio"
is a codec's KL over the KL of the top-k format at the same bytes, interpolated between
k in log-log.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from numcodecs.zstd import Zstd

from cache.format.codec_bounds import max_error

sys.path.insert(0, str(Path(__file__).parents[2]))

from cache import LabelStore
from cache.format.codec import CODECS, divergence, entropy

KS = (3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 125, 150, 200, 300)
SHOWN = (5, 10, 100, 150)
CHUNK = 1024  # rows compressed together, as in a store of 1,000 classes


def top_k(p: np.ndarray, k: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Code p, float64 [n, classes], as top-k. Returns the decoded p and the arrays to
    store."""
    ids = np.argsort(-p, axis=1)[:, :k].astype(np.uint16)
    kept = np.take_along_axis(p, ids.astype(int), 1).astype(np.float16)
    rest = np.maximum(1 - kept.sum(axis=1, dtype=np.float64), 1e-6) / (p.shape[1] - k)
    read = np.repeat(rest[:, None], p.shape[1], axis=1)
    np.put_along_axis(read, ids.astype(int), kept.astype(np.float64), 1)
    return read / read.sum(axis=1, keepdims=True), [ids, kept]


def packed(arrays: list[np.ndarray], level: int) -> float:
    """Return the bytes a row of arrays that are compressed in chunks."""
    n = len(arrays[0])
    return (
        sum(
            len(Zstd(level=level).encode(a[s : s + CHUNK].tobytes()))
            for a in arrays
            for s in range(0, n, CHUNK)
        )
        / n
    )


def measure(p: np.ndarray) -> dict:
    """Measure every format on probabilities, float64 [n, classes]."""
    rows: dict[str, dict] = {}
    for k in KS:
        if k < p.shape[1] // 2:
            read, arrays = top_k(p, k)
            kl, tv = divergence(p, read)
            rows[f"top-{k}"] = {
                "bytes": 4.0 * k,
                "packed": packed(arrays, 19),
                "kl": kl.mean(),
                "tv": tv.mean(),
                "kl_row": kl.max(),
            }
    peers = list(rows.values())
    for name, codec in CODECS.items():
        began = time.perf_counter()
        codes = codec.encode(p)
        encoded = time.perf_counter()
        arrays = [codes[:, : p.shape[1]], *([codes[:, p.shape[1] :]] if codec.tail else [])]
        size = packed([np.ascontiguousarray(a) for a in arrays], codec.compression)
        ended = time.perf_counter()
        kl, tv = divergence(p, codec.decode(codes))
        most_kl, most_tv = max_error(codec, p.shape[1])
        rows[name] = {
            "bytes": size,
            "kl": kl.mean(),
            "tv": tv.mean(),
            "kl_row": kl.max(),
            "kl_stated": most_kl,
            "tv_stated": most_tv,
        }
        rows[name] |= {
            "rows_a_second": len(p) / (ended - began),
            "encode_share": (encoded - began) / (ended - began),
        }
        for against in ("bytes", "packed"):
            sizes = np.log([peer[against] for peer in peers])
            if sizes[0] <= np.log(size) <= sizes[-1]:
                rows[name][f"ratio_{against}"] = kl.mean() / np.exp(
                    np.interp(np.log(size), sizes, np.log([peer["kl"] for peer in peers]))
                )
    return {name: {key: float(value) for key, value in row.items()} for name, row in rows.items()}


def table(rows: dict) -> None:
    print(
        f"{'format':10}{'bytes':>8}{'KL':>10}{'TV':>10}{'largest KL':>12}{'stated':>10}"
        f"{'ratio':>8}{'packed':>8}"
    )
    for name, row in sorted(rows.items(), key=lambda item: item[1]["bytes"]):
        if name in CODECS or int(name[4:]) in SHOWN:
            stated = f"{row['kl_stated']:.2g}" if "kl_stated" in row else ""
            ratios = [
                f"{row[key]:.2f}" if key in row else "" for key in ("ratio_bytes", "ratio_packed")
            ]
            print(
                f"{name:10}{row['bytes']:8.0f}{row['kl']:10.2g}{row['tv']:10.2g}{row['kl_row']:12.2g}{stated:>10}{ratios[0]:>8}{ratios[1]:>8}"
            )


def figure(measured: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(
        1, len(measured), figsize=(5.5 * len(measured), 4.2), sharey=True, squeeze=False
    )
    for axis, (what, rows) in zip(axes[0], measured.items(), strict=True):
        peers = sorted(
            (row["bytes"], row["kl"], row["packed"])
            for name, row in rows.items()
            if name not in CODECS
        )
        axis.plot(
            [b for b, _, _ in peers],
            [kl for _, kl, _ in peers],
            "o-",
            ms=3,
            color="tab:gray",
            label="top-k, as others store it",
        )
        axis.plot(
            [b for _, _, b in peers],
            [kl for _, kl, _ in peers],
            "--",
            color="tab:gray",
            lw=1,
            label="top-k through zstd",
        )
        axis.plot(
            [b for b, _, _ in peers],
            [kl / 4 for _, kl, _ in peers],
            ":",
            color="tab:gray",
            lw=1,
            label="a quarter of it",
        )
        ours = sorted(
            (row["bytes"], row["kl"], name)
            for name, row in rows.items()
            if name in CODECS and row["kl"] > 1e-6
        )
        axis.plot(
            [b for b, _, _ in ours],
            [kl for _, kl, _ in ours],
            "s-",
            color="tab:blue",
            label="codecs of this store",
        )
        for size, kl, name in ours:
            axis.annotate(name, (size, kl), textcoords="offset points", xytext=(6, 4), fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel="bytes per label", title=what)
        axis.grid(True, which="both", alpha=0.2)
    axes[0][0].set_ylabel("KL(teachers ‖ stored), nats")
    axes[0][0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def labels(store: Path | None, count: int) -> np.ndarray:
    """Return labels, float64 [n, classes], whose rows sum to one."""
    if store is None:
        with np.load(Path(__file__).parents[1] / "data" / "soft_labels.npz") as file:
            p = file["probabilities"][:count].astype(np.float64)
    else:
        opened = LabelStore.open(store)
        if not opened.codec.is_float:
            sys.exit(
                f"{store} has codec {opened.codec.name}; what a codec loses is measured on labels "
                f"that lost nothing: make one with store.codec=float32"
            )
        views = [opened.probabilities(view, opened.usable) for view in range(opened.views)]
        p = np.concatenate(views)[
            np.random.default_rng(0).permutation(sum(map(len, views)))[:count]
        ].astype(np.float64)
    return p / p.sum(axis=1, keepdims=True)


def sharper(p: np.ndarray, nats: float) -> np.ndarray:
    """Sharpen labels, as stronger teachers would: p^b renormalised, with the b that
    gives this mean entropy."""
    low, high = 1.0, 8.0
    for _ in range(40):
        b = (low + high) / 2
        q = p**b
        q /= q.sum(axis=1, keepdims=True)
        low, high = (b, high) if entropy(q).mean() > nats else (low, b)
    return q


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    p = labels(arguments.store, arguments.rows)
    measured = {}
    for nats in (None, 1.39):
        q = p if nats is None else sharper(p, nats)
        what = f"{len(q):,} labels, {entropy(q).mean():.2f} nats" + (
            "" if nats is None else " (the same, sharpened)"
        )
        measured[what] = measure(q)
        print(f"\n{what}, {q.shape[1]:,} classes")
        table(measured[what])
    if arguments.figure:
        figure(measured, arguments.figure)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
