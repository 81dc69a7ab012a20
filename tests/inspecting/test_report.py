"""The report on a store: its numbers are the labels', its page needs no other file, and
a real browser shows the page at every width, light and dark."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import run
from support.small import CLASSES, edit_store
from support.stages import class_folders

from cache import LabelStore
from cache.format.codec import entropy
from pipeline.inspection import statistics
from pipeline.inspection.contact_sheets import sheets
from pipeline.inspection.html_report import COLOURS, histogram
from pipeline.inspection.statistics import DAMAGED, DONE, MISSING
from pipeline.models.names import class_titles

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


@pytest.fixture(scope="module")
def store(store_path: Path) -> LabelStore:
    return LabelStore.open(store_path)


@pytest.fixture(scope="module")
def report(store_path: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    status, out, err = run("inspect", store_path, "--report", file, "--data", photos)
    assert status == 0 and out == "" and f"wrote {file}" in err
    return file


def test_a_survey_counts_what_is_stored(store):
    found, p = statistics.survey(store), {}
    for view in (0, 1):
        p[view] = store.probabilities(view, store.usable)
    both = np.concatenate([p[0], p[1]])
    order = np.lexsort((found.row, found.view))
    assert np.array_equal(found.row[order], np.tile(store.usable, 2))
    assert found.entropy[order] == pytest.approx(entropy(both), abs=1e-5)
    assert np.array_equal(found.first[order], both.argmax(axis=1)) and np.array_equal(
        found.confidence[order], both.max(axis=1)
    )
    folders = np.tile(store.images.class_index[store.usable], 2)
    assert np.array_equal(found.folder[order], both[np.arange(len(both)), folders])
    assert np.array_equal(
        found.boxes[order], np.concatenate([store.crops(view, store.usable)[0] for view in (0, 1)])
    )
    same = p[0].argmax(axis=1) == p[1].argmax(axis=1)
    assert sorted(found.loyalty) == sorted(np.where(same, 1, 0.5))
    apart = entropy((p[0] + p[1]) / 2) - (entropy(p[0]) + entropy(p[1])) / 2
    assert found.divergence == pytest.approx(apart, abs=1e-5)
    assert (found.coverage == DONE).all() and found.checked and not found.faults


def test_agreement_and_confusions_are_counted_by_class_folder(store):
    found = statistics.survey(store)
    folders = store.images.class_index[found.row]
    table = statistics.by_class(found, folders)
    assert (
        table["labels"].sum() == 180 and table["agreeing"].sum() == (found.first == folders).sum()
    )
    assert (np.diff(table["agreeing"] / table["labels"]) >= 0).all()  # the least agreeing first
    for row in statistics.confusions(found, folders):
        wrong = (folders == row["folder"]) & (found.first == row["first"])
        assert row["folder"] != row["first"] and row["labels"] == wrong.sum()
        assert row["share"] == pytest.approx(wrong.sum() / (folders == row["folder"]).sum())
    assert statistics.confusions(found, folders)["labels"].sum() == (found.first != folders).sum()


def test_a_part_of_a_large_store_is_looked_at_in_several_views(store):
    found = statistics.survey(store, labels=40)
    assert len(found.row) == 40 and sorted(set(found.view)) == [0, 1]
    assert np.array_equal(np.sort(found.row[found.view == 0]), np.sort(found.row[found.view == 1]))
    assert len(set(found.row // store.shard_rows)) == 3  # images of all shards


def test_missing_and_damaged_shards_are_shown_where_they_are(store_path, tmp_path):
    path = tmp_path / "s.zarr"
    shutil.copytree(store_path, path)
    (path / "records" / "c" / "1" / "2" / "0").unlink()
    file = path / "labels" / "c" / "0" / "1" / "0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = statistics.survey(LabelStore.open(path))
    assert found.coverage.tolist() == [[DONE, DAMAGED, DONE], [DONE, DONE, MISSING]]
    assert [(view, shard) for view, shard, _ in found.faults] == [(0, 1)]
    assert len(found.row) == 180 - 32 - 26
    status, _, _ = run("inspect", path, "--report", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert status == 0 and "Not complete: 5 of 6 shards" in page and "Damaged: 1 shards" in page
    picture = re.search(r'class="coverage".*?base64,([^"]+)"', page)[1]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(picture))))
    assert np.array_equal(pixels, COLOURS[found.coverage])


def test_a_store_that_was_just_begun_is_looked_at_where_it_has_labels(store_path, tmp_path):
    path = tmp_path / "s.zarr"
    shutil.copytree(store_path, path)
    shutil.rmtree(path / "records" / "c" / "1")
    for shard in (0, 1):
        (path / "records" / "c" / "0" / str(shard) / "0").unlink()
    found = statistics.survey(LabelStore.open(path), labels=1)
    assert found.row.tolist() == [64] and not found.faults
    assert len(found.loyalty) == len(found.divergence) == 0  # one view can't be compared
    assert len(statistics.survey(LabelStore.open(path)).row) == 26


def test_classes_of_one_name_are_told_apart():
    assert class_titles(["n02012849", "n03126707", "n01440764"]) == [
        "crane (n02012849)",
        "crane (n03126707)",
        "tench",
    ]
    assert class_titles(["ant", "bee"]) == ["ant", "bee"]


def test_an_image_is_shown_though_one_of_its_views_is_damaged(store_path, tmp_path):
    path = tmp_path / "s.zarr"
    shutil.copytree(store_path, path)
    store = LabelStore.open(path)
    shard = store.images.path.tolist().index("bee/003.jpg") // store.shard_rows
    (path / "boxes" / "c" / "0" / str(shard) / "0").write_bytes(b"torn")
    facts = json.loads(run("inspect", path, "--image", "bee/003.jpg", "--json")[1])
    assert "boxes/c/0" in facts["views"][0]["fault"] and len(facts["views"][1]["top5"]) == 3
    assert "damaged: boxes/c/0" in run("inspect", path, "--image", "bee/003.jpg")[1]


def test_a_store_without_labels_says_so(store_path, tmp_path):
    shutil.copytree(store_path, tmp_path / "s.zarr")
    shutil.rmtree(tmp_path / "s.zarr" / "records" / "c")
    status, _, err = run("inspect", tmp_path / "s.zarr", "--report", tmp_path / "r.html")
    assert (
        status == 1
        and "has no label yet; run the same generate-labels command again" in err
        and not (tmp_path / "r.html").exists()
    )


def test_a_histogram_has_all_values():
    shares = [
        share
        for share, _, _ in histogram(
            "", "", np.array([-1.0, 0.1, 0.2, 0.95, 7.0]), np.linspace(0, 1, 11)
        ).bars
    ]
    assert (
        sum(shares) == pytest.approx(100)
        and shares[0] == pytest.approx(20)
        and shares[9] == pytest.approx(40)
    )


def test_contact_sheets_show_what_they_say(store, photos):
    found = statistics.survey(store)
    certain, uncertain, disagreeing = sheets(
        store, found, class_folders(photos / "train", CLASSES), CLASSES
    )
    paths = store.images.path[found.row]
    assert (
        certain.cards[0].path == paths[found.entropy.argmin()]
        and uncertain.cards[0].path == paths[found.entropy.argmax()]
    )
    assert all(
        len({card.path for card in sheet.cards}) == len(sheet.cards) == 12
        for sheet in (certain, uncertain, disagreeing)
    )
    for card in disagreeing.cards:
        assert (
            card.bars[0][0] != card.folder
            and card.path.startswith(card.folder)
            and not card.bars[0][2]
        )
    card = certain.cards[0]
    row = int(np.flatnonzero(store.images.path == card.path)[0])
    assert [p for _, p, _ in card.bars] == pytest.approx(
        sorted(store.probabilities(card.view, [row])[0], reverse=True)
    )
    top, left, height, width = store.crops(card.view, [row])[0][0]
    H, W = store.images.height[row], store.images.width[row]
    assert card.box == pytest.approx(
        (100 * left / W, 100 * top / H, 100 * width / W, 100 * height / H)
    )
    photo, crop = (
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        for address in (card.photo, card.crop)
    )
    assert crop.size == (160, 160) and photo.width / photo.height == pytest.approx(W / H, rel=0.02)
    own = Image.open(photos / "train" / card.path).convert("RGB")
    cut = own.crop((left, top, left + width, top + height)).resize((160, 160))
    if card.flipped:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for ours, theirs in ((photo, own.resize(photo.size)), (crop, cut)):
        assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean() < 12


def test_photographs_of_other_images_are_refused(store_path, photos, tmp_path):
    status, _, err = run(
        "inspect", store_path, "--report", tmp_path / "r.html", "--data", photos, "--split", "val"
    )
    assert status == 1 and "is not the data set" in err and not (tmp_path / "r.html").exists()


class Addresses(HTMLParser):
    """The addresses and scripts that a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")
        ]
        self.found += [tag] * (tag in ("script", "iframe", "object", "embed", "form", "base"))
        self.found += [name for name, _ in attrs if name.startswith("on")]


def test_a_page_needs_nothing_else(report):
    page = report.read_text()
    addresses = Addresses()
    addresses.feed(page)
    assert len(addresses.found) > 70 and all(
        address.startswith("data:") for address in addresses.found
    )
    assert "url(" not in page and "@import" not in page


def test_names_of_strangers_stay_text(store_path, tmp_path):
    """A class or a teacher may have any name."""
    path = tmp_path / "s.zarr"
    shutil.copytree(store_path, path)
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    edit_store(path, lambda attributes: attributes["class_names"].__setitem__(0, evil))
    assert run("inspect", path, "--report", tmp_path / "r.html", "--no-check")[0] == 0
    page = (tmp_path / "r.html").read_text()
    addresses = Addresses()
    addresses.feed(page)
    assert (
        all(address.startswith("data:") for address in addresses.found)
        and "&lt;script&gt;alert(1)" in page
    )


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--report", "."], 1, "is a folder; name a file for --report"),
        (["--data", "."], 2, "is for the photographs of a --report"),
        (["--report", "r.html", "--image", "x"], 2, "give one of them"),
        (["--image", "zebra.jpg"], 1, "has no image zebra.jpg"),
        (["--image", "0.jpg"], 1, "images of"),
        (["--image", "ant/0000.jpg"], 1, "did you mean ant/000.jpg?"),
    ],
)
def test_wrong_usage_is_one_line(store_path, tmp_path, monkeypatch, arguments, status, says):
    monkeypatch.chdir(tmp_path)
    got, out, err = run("inspect", store_path, *arguments)
    assert got == status and says in err and out == ""


def test_a_report_is_not_put_into_the_store(store_path):
    status, _, err = run("inspect", store_path, "--report", store_path / "images" / "r.html")
    assert status == 1 and "is inside the store" in err


def test_one_image_is_shown_with_its_views_and_labels(store, store_path, photos):
    status, out, _ = run(
        "inspect", store_path, "--image", photos / "train" / "bee" / "003.jpg", "--json"
    )
    facts = json.loads(out)
    row = facts["row"]
    assert (
        status == 0
        and store.images.path[row] == facts["path"] == "bee/003.jpg"
        and facts["class"] == "bee"
    )
    with Image.open(photos / "train" / "bee" / "003.jpg") as photo:
        assert (facts["width"], facts["height"]) == photo.size
    for view in (0, 1):
        told, p = facts["views"][view], store.probabilities(view, [row])[0]
        assert (
            told["box"] == store.crops(view, [row])[0][0].tolist()
            and told["flip"] == store.crops(view, [row])[1][0]
        )
        assert {one["class"]: one["probability"] for one in told["top5"]} == pytest.approx(
            dict(zip(CLASSES, map(float, p), strict=True))
        )
        assert told["entropy"] == pytest.approx(entropy(p[None])[0]) and told[
            "folder_probability"
        ] == pytest.approx(p[1])
    status, page, _ = run("inspect", store_path, "--image", "bee/003.jpg")
    assert (
        status == 0
        and "bee/003.jpg, folder bee, " in page
        and f"{100 * max(p):.1f} %" in page
        and "\x1b" not in page
    )


def test_the_keys_of_inspect_stay(store_path):
    """Other people's scripts read the keys: a new key may join, no key may go."""
    facts = json.loads(run("inspect", store_path, "--json")[1])
    assert {
        *(
            "store",
            "format_version",
            "images",
            "usable",
            "unusable",
            "classes",
            "views",
            "complete_views",
            "finished_shards",
            "shards",
            "complete",
        ),
        *(
            "labelled_crops",
            "label_bytes_per_crop",
            "store_bytes",
            "entropy",
            "agreement",
            "codec",
            "teachers",
            "crops",
            "renderer",
            "compute",
        ),
        *("data", "layout", "merged", "made_with", "identity"),
    } <= facts.keys()
    out = run("inspect", store_path)[1]
    assert len(out.splitlines()) < 24 and "\x1b" not in out  # fits a screen; a pipe has no colours


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("needs a Chromium, as Debian's package chromium brings")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page(browser, report, width, scheme):
    """The page writes nothing to the console, asks nothing of the network and fits the
    window. Every picture is decoded, and every box is on its photograph."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].length") > 70
    assert page.evaluate(
        "[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 20)"
    )
    inside = """[...document.querySelectorAll('.photo')].every(photo => {
        const [p, b] = [photo, photo.querySelector('b')].map(e => e.getBoundingClientRect());
        return b.width > 4 && b.left >= p.left - 1 && b.right <= p.right + 1
            && b.top >= p.top - 1 && b.bottom <= p.bottom + 1 })"""
    assert page.evaluate(inside)
    ground, text = (
        [
            int(part)
            for part in re.findall(
                r"\d+", page.evaluate(f"getComputedStyle(document.body).{what}")
            )[:3]
        ]
        for what in ("backgroundColor", "color")
    )
    # The text is readable on its ground.
    assert (sum(ground) > sum(text)) == (scheme == "light") and abs(sum(ground) - sum(text)) > 400
    assert (
        page.evaluate(
            "Math.min(...[...document.querySelectorAll('p, td, dd, small')].map(e => "
            "parseFloat(getComputedStyle(e).fontSize)))"
        )
        >= 11
    )
    page.close()
