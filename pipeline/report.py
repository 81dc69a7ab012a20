"""What a person sees of a store and of an evaluation: facts as one JSON object, and the same as a page in a terminal."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cache import LabelStore
from cache.codec import entropy
from cache.schema import RECORD_MAGIC, USABLE, StoreError, printable
from cache.verify import Finding
from cache.writer import stored_bytes

FINDINGS = 20  # lines of a kind on a page
NAMES = 5000  # among which the nearest is looked for


def results() -> Console:
    """Where results go: stdout, as wide as the terminal, or unfolded into a pipe or file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def store_facts(path: Path) -> dict:
    """Everything ``inspect`` tells, from attributes, manifest and completion records: no label is read, however large the store is."""
    store = LabelStore.open(path)
    records = store.finished_records()
    finished = records["magic"] == RECORD_MAGIC
    status = store.images.status
    unusable = np.flatnonzero(status != USABLE)
    labelled = int(records["labelled"].sum())
    classified = bool((store.images.class_index >= 0).all())
    kl, tv = store.max_error
    label_bytes = int(records["stored_bytes"].sum())
    if "tail" in store.shard_arrays:
        label_bytes += sum(store.size("tail", int(view), int(shard)) for view, shard in np.argwhere(finished))
    return {
        "store": str(path),
        "format_version": store.attributes["format_version"],
        "images": len(status),
        "usable": int((status == USABLE).sum()),
        "unusable": _reasons(store, unusable),
        "classes": store.classes,
        "views": store.views,
        "complete_views": int(finished.all(axis=1).sum()),
        "finished_shards": int(finished.sum()),
        "shards": finished.size,
        "complete": bool(finished.all()),
        "labelled_crops": labelled,
        "label_bytes_per_crop": label_bytes / labelled if labelled else None,
        "store_bytes": stored_bytes(path),
        "entropy": float(records["entropy"].sum() / labelled) if labelled else None,
        "agreement": float(100 * records["agreeing"].sum() / labelled) if labelled and classified else None,
        "codec": store.attributes["codec"] | {"largest_kl": kl, "largest_tv": tv},
        **{key: store.provenance[key] for key in ("teachers", "crops", "renderer", "compute", "data", "layout")},
        "merged": store.provenance.get("merged", []),
        "imported": store.provenance.get("imported"),
        "made_by": store.made_by,
        "made_with": store.attributes.get("made_with", {}),
        "identity": store.identity.hex(),
    }


def _reasons(store: LabelStore, rows: np.ndarray) -> list[dict]:
    """Unusable files by kind of reason: count, and one example."""
    if len(rows) == 0:
        return []
    reasons, paths = store.images.reason, store.images.path
    kinds = Counter(str(reasons[row]).split(":")[0] for row in rows)
    example = {str(reasons[row]).split(":")[0]: str(paths[row]) for row in rows[::-1]}
    return [{"reason": kind, "files": count, "example": example[kind]} for kind, count in kinds.most_common()]


def store_lines(facts: dict) -> list[tuple[str, str]]:
    """What ``store_facts`` found, in words: (name, text), the name empty where the line goes on with the one above."""
    lines: list[tuple[str, str]] = [("store", facts["store"])]
    state = "complete" if facts["complete"] else f"NOT COMPLETE: run the same {facts['made_by']} command again"
    lines.append(
        ("state", f"{state} ({facts['finished_shards']} of {facts['shards']} shards, {facts['complete_views']} of {facts['views']} views)")
    )
    lines.append(("images", f"{facts['usable']:,} usable of {facts['images']:,} files, {facts['classes']:,} classes"))
    lines += [("", f"{kind['files']:,} left out: {kind['reason']} ({kind['example']})") for kind in facts["unusable"]]
    for i, teacher in enumerate(facts["teachers"]):
        lines.append(("" if i else "teachers", _teacher(teacher)))
    if facts["imported"]:
        several = [part["imported"] for part in facts["merged"] if "imported" in part] or [facts["imported"]]
        kinds = [one["labels"] + (" in half precision" if one.get("half_precision") else "") for one in several]
        told = f"{facts['imported']['format']} label files, {', '.join(dict.fromkeys(kinds))}; the teachers are named as the user told"
        lines.append(("imported", told))
        lines.append(
            ("", "UNKNOWN: weights, normalisation and precision of the teachers, how crops were drawn; pixels were rendered by other code")
        )
    crops = facts["crops"]
    drawn = (
        ""
        if crops["scale"] is None
        else f"area {crops['scale'][0]:g} to {crops['scale'][1]:g}, ratio {crops['ratio'][0]:.3g} to {crops['ratio'][1]:.3g}, flip {crops['flip']:g}, "
        f"seed {crops['seed']}, "
    )
    lines.append(("crops", f"{facts['views']} views of {crops['policy']}, {drawn}{crops['interpolation']}, EXIF {crops['exif']}"))
    if mix := crops.get("cutmix"):
        what = f"on {100 * mix['prob']:g} % of the crops, Beta({mix['beta']:g}, {mix['beta']:g}); the teachers saw the mixed pictures"
        lines.append(("CutMix", what))
    codec = facts["codec"]
    kl = "" if codec["largest_kl"] is None else f"KL {codec['largest_kl']:.2g}, "
    lines.append(("codec", f"{codec['name']} ({codec['dtype']}); no label is off by more than {kl}TV {codec['largest_tv']:.2g}"))
    if parts := facts["merged"]:
        lines.append(("averaged", f"of {len(parts)} stores, of {', '.join(str(part['teachers']) for part in parts)} teachers"))
    if facts["labelled_crops"]:
        lines.append(("size", f"{facts['label_bytes_per_crop']:.0f} bytes per crop, {facts['store_bytes'] / 2**20:,.1f} MiB in all"))
        lines.append(("entropy", f"{facts['entropy']:.3f} nats on average"))
        if facts["agreement"] is not None:
            lines.append(("agreement", f"{facts['agreement']:.2f} % of the labels put the class folder first"))
    compute = facts["compute"]
    if not facts["imported"]:
        labelled = f"{compute['device']}, {compute['precision']}, batches of {compute['batch_size']}, "
        lines.append(("made on", f"{labelled}rendered on {facts['renderer']['backend']}"))
    lines.append(("made with", ", ".join(f"{name} {version}" for name, version in facts["made_with"].items())))
    return [*lines, ("identity", facts["identity"])]


def _teacher(teacher: dict) -> str:
    size = f"{teacher['image_size']} px" if teacher["image_size"] else "an unknown size"
    return f"{teacher['model']} at {size}, " + (f"weights {teacher['weights'][:12]}" if teacher["weights"] else "weights unknown")


def store_page(facts: dict) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in store_lines(facts):
        style = ("green" if facts["complete"] else "red") if name == "state" else ""
        table.add_row(name, Text(printable(text), style))  # Text: a name may look like markup
    results().print(table)


def verdict_page(result: dict) -> None:
    """What ``verify`` found, a line a finding, the most at once ``FINDINGS`` of a kind."""
    console = results()

    def lines(kind: str, texts: list[str]) -> None:
        for text in texts[:FINDINGS]:
            console.print(f"{kind:9}{printable(text)}", markup=False, soft_wrap=True)
        if len(texts) > FINDINGS:
            console.print(f"{kind:9}… and {len(texts) - FINDINGS:,} more (--json lists all)", markup=False)

    def places(findings: list[dict]) -> list[str]:
        return [str(Finding(**finding)) for finding in findings]

    lines("damaged", places(result["damaged"]))
    lines("unread", places(result["unread"]))
    lines("missing", places(result["missing"]))
    lines("foreign", result["foreign"])
    lines("left", [f"{file} (unfinished, of a process that was stopped, or is at work now)" for file in result["left"]])
    lines("problem", result["problems"])
    if result["images"] is not None:
        lines("images", [f"all {result['images']:,} are, byte for byte, those that were labelled"])
    if sample := result["sample"]:
        for name, key in (("KL", "kl"), ("TV", "tv")):
            mean, largest, stated = (sample[f"{key}_{what}"] for what in ("mean", "largest", "stated"))
            limit = "" if stated is None else f"; the codec states {stated:.3g}"
            lines("sample", [f"{sample['crops']:,} crops labelled again: {name} {mean:.3g} on average, {largest:.3g} at most{limit}"])
        lines("sample", [f"{100 * sample['equal_codes']:.3f} % of the codes are the same"])
    if result["trusted"]:
        summary = "every digest is right"
    elif result["sound"] and not result["problems"]:
        summary = f"NOT COMPLETE, and sound as far as it goes: run the same {result['made_by']} command again to finish it"
    elif result["sound"]:
        summary = "the files are sound, and the labels are NOT TO BE TRUSTED with these images and teachers"
    elif not (result["damaged"] or result["foreign"]):
        summary = "NOT ALL OF IT COULD BE READ: mend that, and verify again"
    else:
        summary = f"NOT SOUND: run the same {result['made_by']} command again, which makes anew what is damaged; remove what is foreign"
    console.print(
        f"{printable(result['store'])}: {result['checked']:,} of {result['shards']:,} shards read, {result['labelled']:,} labels; {summary}",
        markup=False,
        soft_wrap=True,
    )


def evaluation_table(result: dict) -> None:
    """Top-1 and top-5 of each model, of the ensemble and of the teachers."""
    compared = "teacher_kl" in result["models"][0]
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for name in ("top-1 %", "top-5 %", "loss", *(("KL to teachers", "agreement %") if compared else ())):
        table.add_column(name, justify="right")
    for entry in [*result["models"], *(result[key] for key in ("ensemble", "teachers") if key in result)]:
        cells = [f"{entry['top1']:.2f}", f"{entry['top5']:.2f}", f"{entry['loss']:.4f}"]
        if "teacher_kl" in entry:
            cells += [f"{entry['teacher_kl']:.4f}", f"{entry['teacher_agreement']:.2f}"]
        name = f"{entry['name']}={entry['checkpoint']}" if entry.get("checkpoint") else entry["name"]
        table.add_row(Text(printable(name)), *cells)
    console = results()
    console.print(table)
    console.print(f"{result['images']:,} images" + (f", {result['unusable']:,} unusable ones left out" if result["unusable"] else ""))


def image_facts(path: Path, name: str) -> dict:
    """One image of a store and its finished views, each with crop and label. name: its path in the store, or how that ends. Raises StoreError."""
    from pipeline.models import class_titles  # takes seconds, since it knows timm

    store = LabelStore.open(path)
    row = _row_of(store, name)
    images, titles = store.images, class_titles(store.class_names)
    usable, own = bool(images.status[row] == USABLE), int(images.class_index[row])
    views = np.flatnonzero(store.finished()[:, row // store.shard_rows]).tolist() if usable else []
    return {
        "store": str(path),
        "path": str(images.path[row]),
        "row": row,
        "class": store.class_names[own] if own >= 0 else None,
        "title": titles[own] if own >= 0 else None,
        "bytes": int(images.bytes[row]),
        "height": int(images.height[row]),
        "width": int(images.width[row]),
        "sha256": images.digest[row].tobytes().hex(),
        "unusable": None if usable else str(images.reason[row]),
        "views": [_view_facts(store, view, row, titles) for view in views],
    }


def _view_facts(store: LabelStore, view: int, row: int, titles: list[str]) -> dict:
    if fault := store.fault(view, row // store.shard_rows):
        return {"view": view, "fault": fault}
    p = store.probabilities(view, [row])[0]
    box, flip = (column[0] for column in store.crops(view, [row]))
    partner = int(store.mixes(view, [row])[0][0]) if store.mixed else -1
    return {
        "view": view,
        "box": box.tolist(),  # top, left, height, width in pixels
        "flip": bool(flip),
        "pasted": str(store.images.path[partner]) if partner >= 0 else None,
        "entropy": float(entropy(p[None])[0]),
        "folder_probability": float(p[store.images.class_index[row]]) if store.images.class_index[row] >= 0 else None,
        "top5": [{"class": store.class_names[c], "title": titles[c], "probability": float(p[c])} for c in p.argsort()[::-1][:5].tolist()],
    }


def _row_of(store: LabelStore, name: str) -> int:
    paths = store.images.path.tolist()
    if name in paths:
        return paths.index(name)
    tail = "/" + name.replace("\\", "/").lstrip("/")
    # A path of the machine ends as the store does.
    found = [row for row, path in enumerate(paths) if path.endswith(name) or tail.endswith("/" + path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise StoreError(
            f"{len(found)} images of {store.path} end in {name}, like {paths[found[0]]} and {paths[found[1]]}; name more of the path"
        )
    near = [path for path in paths if path.startswith(name.rpartition("/")[0])] if len(paths) > NAMES else paths
    close = difflib.get_close_matches(name, near[:NAMES], 1, 0.5)
    raise StoreError(
        f"{store.path} has no image {name}" + (f"; did you mean {close[0]}?" if close else f"; its paths look like {paths[0]}")
    )


def image_page(facts: dict) -> None:
    console = results()
    told = f"{facts['height']} × {facts['width']} pixels, {facts['bytes']:,} bytes, row {facts['row']}"
    folder = "" if facts["class"] is None else f", folder {facts['class']}" + (f" ({facts['title']})" * (facts["title"] != facts["class"]))
    console.print(Text.assemble((printable(facts["path"]), "bold"), printable(f"{folder}, {told}")), soft_wrap=True)
    if facts["unusable"]:
        console.print(Text(f"unusable, without labels: {printable(facts['unusable'])}", "red"))
    elif not facts["views"]:
        console.print(Text("no view of it is finished", "red"))
    table = Table(box=None, pad_edge=False)
    for name in ("view", "top", "left", "height", "width"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_column("nats", justify="right")
    table.add_column("label", overflow="fold")
    for view in facts["views"]:
        if "fault" in view:
            table.add_row(str(view["view"]), *[""] * 6, Text(printable(f"damaged: {view['fault']}"), "red"))
            continue
        label = Text(", ").join(
            Text(f"{printable(one['title'])} {100 * one['probability']:.1f} %", "bold" if one["class"] == facts["class"] else "")
            for one in view["top5"]
        )
        if view["pasted"]:
            label = Text.assemble(label, printable(f" (pasted in: {view['pasted']})"))
        mirrored = "mirrored" if view["flip"] else ""
        table.add_row(str(view["view"]), *map(str, view["box"]), mirrored, f"{view['entropy']:.2f}", label)
    if facts["views"]:
        console.print(table)
