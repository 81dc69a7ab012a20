"""Make contact sheets of a store: photographs with the box of a crop, the crop as the
teachers saw it, and its soft label."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from cache import LabelStore
from pipeline.images import reader
from pipeline.images.data_set import DataSet
from pipeline.images.reader import Reader
from pipeline.inspection.statistics import Survey
from pipeline.inspection.stored_crops import pixels_of
from pipeline.render.renderer import CropRenderer
from pipeline.render.settings import RenderSettings

CARDS = 12  # cards on a sheet, at most
BARS = 5  # classes shown of a label
THUMBNAIL = 224  # pixels of a photograph's longer side
CROP = 160  # pixels of a crop's side


SURELY = (
    ": wrong folders, several objects, crops that miss the object. A hard label would teach "
    "the folder's class here."
)


@dataclass
class Card:
    """One crop of one image."""

    path: str
    view: int
    folder: str  # title of the class folder
    photo: str  # data: address of a picture of the whole image
    box: tuple[float, float, float, float]  # left, top, width, height in per cent of the photograph
    crop: str  # data: address of the crop as rendered
    flipped: bool
    pasted: str  # path of the image that is pasted in (CutMix), or empty
    entropy: float  # nats
    # class title, probability, class is the folder's; the most probable class first
    bars: list[tuple[str, float, bool]]


@dataclass
class Sheet:
    """Cards under one heading of the report."""

    title: str
    about: str
    cards: list[Card]


def sheets(store: LabelStore, found: Survey, data: DataSet, titles: Sequence[str]) -> list[Sheet]:
    """Make sheets of surveyed crops: the most certain, the most uncertain, and crops
    whose labels most favour another class than the folder's.

    A sheet shows at most one crop of an image, and an empty sheet is left out. data:
    holds the store's images. titles: of the classes. Pixels are rendered on the CPU.
    Raises DataError if an image has changed.
    """
    apart = found.confidence - found.folder
    apart[found.first == store.images.class_index[found.row]] = -1
    ways = (
        ("The most certain", "Crops whose soft label has the least entropy.", found.entropy, None),
        (
            "The most uncertain",
            "Crops whose soft label has the most entropy: what is seen of the class there?",
            -found.entropy,
            None,
        ),
        (
            "Where the teachers disagree with the folder",
            "Crops whose label is surest of another class than their image's folder"
            + (
                "; these pictures are mixed, so that it may be the pasted one's."
                if store.mixed
                else SURELY
            ),
            -apart,
            apart > 0,
        ),
    )
    sheets = []
    for title, about, key, among in ways:
        chosen = _first_of_each_image(found, key, among)
        if len(chosen):
            sheets.append(Sheet(title, about, _cards(store, found, chosen, data, titles)))
    return sheets


def _first_of_each_image(found: Survey, key: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    """Choose the CARDS entries of the survey with the least ``key``, at most one of an
    image. among: bool [labels], the entries to choose from; None: all."""
    entries = np.arange(len(key)) if among is None else np.flatnonzero(among)
    entries = entries[np.lexsort((entries, key[entries]))][: CARDS * 64]
    _, first = np.unique(found.row[entries], return_index=True)
    return entries[np.sort(first)][:CARDS]


def _cards(
    store: LabelStore, found: Survey, chosen: np.ndarray, data: DataSet, titles: Sequence[str]
) -> list[Card]:
    rows, views, manifest = found.row[chosen], found.view[chosen], store.images
    size = max(t["image_size"] or CROP for t in store.provenance["teachers"])
    with Reader(data, manifest) as read:
        crops = pixels_of(store, np.stack([views, rows], axis=1), read, {size}, backend="cpu")[size]
        wholes = _whole(store, rows, read)
    cards = []
    for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
        box, flip = (column[0] for column in store.crops(view, [row]))
        p = store.probabilities(view, [row])[0]
        height, width = int(manifest.height[row]), int(manifest.width[row])
        top, left, h, w = (int(edge) for edge in box)
        own = int(manifest.class_index[row])
        cards.append(
            Card(
                str(manifest.path[row]),
                view,
                titles[own] if own >= 0 else "",
                _address(wholes[i], _fitted(height, width)),
                (100 * left / width, 100 * top / height, 100 * w / width, 100 * h / height),
                _address(crops[i], (CROP, CROP)),
                bool(flip),
                _pasted(store, view, row),
                float(found.entropy[chosen[i]]),
                [(titles[c], float(p[c]), c == own) for c in p.argsort()[::-1][:BARS].tolist()],
            )
        )
    return cards


def _pasted(store: LabelStore, view: int, row: int) -> str:
    partner = int(store.mixes(view, [row])[0][0]) if store.mixed else -1
    return str(store.images.path[partner]) if partner >= 0 else ""


def _whole(store: LabelStore, rows: np.ndarray, read: Reader) -> torch.Tensor:
    """Render whole images, as the renderer decodes them, squeezed into squares: uint8
    [n, 2 · THUMBNAIL, 2 · THUMBNAIL, 3]."""
    manifest = store.images
    boxes = np.stack(
        [np.zeros_like(rows), np.zeros_like(rows), manifest.height[rows], manifest.width[rows]],
        axis=1,
    )
    renderer = CropRenderer(
        [2 * THUMBNAIL], 1, len(rows), replace(RenderSettings.of_store(store), backend="cpu")
    )
    with reader.naming(manifest, rows), renderer:
        return renderer(read(rows), boxes[None], np.zeros((1, len(rows)), bool))[0][2 * THUMBNAIL]


def _fitted(height: int, width: int) -> tuple[int, int]:
    """Return (width, height) of a thumbnail."""
    scale = THUMBNAIL / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _address(pixels: torch.Tensor, size: tuple[int, int]) -> str:
    """Encode pixels as a JPEG in a data: address, which needs no network. pixels: uint8
    [height, width, 3]. size: (width, height) of the JPEG."""
    picture = io.BytesIO()
    Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.LANCZOS).save(
        picture, "JPEG", quality=82
    )
    return "data:image/jpeg;base64," + base64.b64encode(picture.getvalue()).decode()
