"""Write a report on a store: one page of HTML that needs no script, no other file and
no network."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from cache import LabelStore
from cache.errors import StoreError, printable
from cache.system.durable import make_folder, replace_file
from cache.system.local import require_local
from pipeline.images.data_set import DataSet
from pipeline.images.matching import require_same_files
from pipeline.images.result_places import require_elsewhere
from pipeline.inspection import statistics
from pipeline.inspection.contact_sheets import sheets
from pipeline.inspection.statistics import DAMAGED, DONE, LABELS, MISSING, Survey
from pipeline.inspection.store_facts import StoreFacts, store_facts, store_lines
from pipeline.models.names import class_titles

WORST, ALL = 15, 1000  # rows of a table of classes or pairs of classes, of the folded table
LARGEST_SIDE = 1024  # cells on a side of the coverage picture, at most
# done, missing, damaged
COLOURS = np.array([[24, 138, 128], [137, 143, 150], [214, 48, 49]], np.uint8)


@dataclass
class Histogram:
    """A histogram with bars of equal width."""

    title: str
    about: str
    # share of the values in per cent, height in per cent of the tallest bar, tooltip
    bars: list[tuple[float, float, str]]
    ticks: list[str]  # at the left end, in the middle and at the right end


def write_report(
    path: Path, file: Path, *, data: DataSet | None = None, labels: int = LABELS, check: bool = True
) -> StoreFacts:
    """Write the report on the store at ``path`` to ``file``, whole or not at all, and
    return the facts that ``inspect`` prints (``store_facts``).

    data: the labelled images, for photographs; None: a report without
    photographs. labels, check: see ``survey``. Raises StoreError, or DataError for
    other images than the store's.
    """
    require_local(path, file)
    if file.is_dir():
        raise StoreError(
            f"{file} is a folder; name a file for --report, like {file / 'report.html'}"
        )
    if path.resolve() in file.resolve().parents:
        raise StoreError(
            f"{file} is inside the store, where only its own files may be; "
            f"name another place for --report"
        )
    facts, store = store_facts(path), LabelStore.open(path)
    require_elsewhere("--report", file, store.images)
    if data is not None:  # first, since reading the store may take an hour
        data = require_same_files(data.named(store.class_names), store.images, str(path))
    make_folder(file.absolute().parent)
    found = statistics.survey(store, labels=labels, check=check)
    titles = class_titles(store.class_names)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.inspection", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = lambda text: printable(str(text))
    page = environment.get_template("report.html").render(
        facts=facts,
        lines=store_lines(facts)[1:],
        found=found,
        looked=len(np.unique(found.row)),
        seen_views=len(np.unique(found.view)),
        coverage=_coverage(found),
        histograms=_histograms(store, found),
        by_area=_by_area(store, found),
        views=_views(found),
        classes=_classes(store, found, titles) if facts.agreement is not None else None,
        sheets=sheets(store, found, data, titles) if data else [],
        data=data and data.path,
        worst=WORST,
    )
    replace_file(file, page.encode())
    return facts


def _coverage(found: Survey) -> dict:
    """Draw the state of each shard as a picture, views × shards, and count the states.
    Beyond LARGEST_SIDE views or shards, a cell shows the worst of several shards."""
    worst = found.coverage
    for axis in (0, 1):
        starts = np.unique(
            np.linspace(0, worst.shape[axis], min(worst.shape[axis], LARGEST_SIDE) + 1).astype(int)
        )[:-1]
        worst = np.maximum.reduceat(worst, starts, axis=axis)
    picture = io.BytesIO()
    Image.fromarray(COLOURS[worst]).save(picture, "PNG")
    count = np.bincount(found.coverage.ravel(), minlength=3)
    return {
        "picture": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode(),
        "height": int(np.clip(14 * worst.shape[0], 42, 320)),
        "views": found.coverage.shape[0],
        "shards": found.coverage.shape[1],
        "done": int(count[DONE]),
        "missing": int(count[MISSING]),
        "damaged": int(count[DAMAGED]),
    }


def _histograms(store: LabelStore, found: Survey) -> list[Histogram]:
    area, ratio = _shapes(store, found)
    most = float(np.log(store.classes))
    return [
        histogram(
            "Entropy of a label",
            "nats; the most possible is at the right end",
            found.entropy,
            np.linspace(0, most, 31),
        ),
        histogram(
            "Probability of its first class",
            "1: the teachers have no doubt",
            found.confidence,
            np.linspace(0, 1, 31),
        ),
        histogram("Area of a crop", "share of the image", area, np.linspace(0, 1, 31)),
        histogram(
            "Aspect ratio of a crop",
            "width over height, logarithmic",
            ratio,
            np.geomspace(*_around(ratio), 31),
        ),
    ]


def _shapes(store: LabelStore, found: Survey) -> tuple[np.ndarray, np.ndarray]:
    """Return the area of each surveyed crop as a share of its image, and its width over
    height."""
    height, width = (found.boxes[:, edge].astype(np.float64) for edge in (2, 3))
    whole = store.images.height[found.row].astype(np.float64) * store.images.width[found.row]
    return height * width / whole, width / height


def _around(ratio: np.ndarray) -> tuple[float, float]:
    """Return the ends of a logarithmic axis around 1 that leaves out at most 0.1 % of
    the ratios at either end."""
    far = max(1.5, *np.exp(np.abs(np.log(np.quantile(ratio, [0.001, 0.999])))))
    return 1 / far, far


def histogram(title: str, about: str, values: np.ndarray, edges: np.ndarray) -> Histogram:
    """Make a histogram of values. Values beyond the edges count in the outermost
    bars."""
    share = 100 * np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(1, len(values))
    most = max(share.max(), 1e-9)
    bars = [
        (float(part), float(100 * part / most), f"{low:.3g} to {high:.3g}: {part:.3g} %")
        for part, low, high in zip(share, edges[:-1], edges[1:], strict=True)
    ]
    middle = edges[len(edges) // 2]
    return Histogram(title, about, bars, [f"{edge:.3g}" for edge in (edges[0], middle, edges[-1])])


def _by_area(store: LabelStore, found: Survey) -> list[dict]:
    """Sort the crops by area and describe each tenth of them: smallest and largest area
    (share of the image), mean entropy in nats, and the share of labels that put the
    folder's class first (0 … 1)."""
    area, _ = _shapes(store, found)
    agreeing = found.first == store.images.class_index[found.row]
    order = np.argsort(area, kind="stable")
    return [
        {
            "low": float(area[part[0]]),
            "high": float(area[part[-1]]),
            "entropy": float(found.entropy[part].mean()),
            "agreement": float(agreeing[part].mean()),
        }
        for part in np.array_split(order, min(10, len(order)))
    ]


def _views(found: Survey) -> dict | None:
    """Describe how much the labels of an image differ from view to view; None if no
    image was surveyed in several views."""
    if len(found.loyalty) == 0:
        return None
    edges = np.linspace(0, 1, 11)
    return {
        "loyalty": histogram(
            "Views that agree on an image",
            "share of its views whose first class is its most frequent one",
            found.loyalty,
            edges,
        ),
        "unanimous": float((found.loyalty == 1).mean()),
        "divergence": histogram(
            "How far the labels of an image are apart",
            "Jensen-Shannon divergence of its views, nats",
            found.divergence,
            np.linspace(0, max(0.01, float(found.divergence.max(initial=0))), 31),
        ),
        "mean": float(found.divergence.mean()) if len(found.divergence) else 0.0,
        "images": len(found.loyalty),
    }


def _classes(store: LabelStore, found: Survey, titles: list[str]) -> dict:
    folders = store.images.class_index[found.row]
    return {
        "seen": len(np.unique(folders)),
        "agreement": float((found.first == folders).mean()),
        "rows": [
            {"title": titles[row["class"]], "name": store.class_names[row["class"]]}
            | {
                "labels": int(row["labels"]),
                "agreement": float(row["agreeing"] / row["labels"]),
                "mass": float(row["mass"]),
            }
            for row in statistics.by_class(found, folders)[:ALL]
        ],
        "confusions": [
            {
                "folder": titles[row["folder"]],
                "first": titles[row["first"]],
                "labels": int(row["labels"]),
                "share": float(row["share"]),
            }
            for row in statistics.confusions(found, folders)[:WORST]
        ],
    }
