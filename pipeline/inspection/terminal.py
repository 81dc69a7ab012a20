"""Print the facts of a store, a verdict, an evaluation or an image as a page in a
terminal. ``--json`` prints the same facts as one object."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from cache.errors import printable
from cache.verify import Finding
from pipeline.evaluation import Evaluation
from pipeline.inspection.store_facts import StoreFacts, store_lines
from pipeline.runtime.progress import results

FINDINGS = 20  # lines of each kind on a page, at most


def store_page(facts: StoreFacts) -> None:
    """Print the facts of a store (``store_facts``)."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in store_lines(facts):
        style = ("green" if facts.complete else "red") if name == "state" else ""
        table.add_row(name, Text(printable(text), style))  # Text: a name may look like markup
    results().print(table)


def verdict_page(result: dict) -> None:
    """Print the result of ``verify``: a line for each finding, at most ``FINDINGS`` of
    a kind, and a summary."""
    console = results()

    def lines(kind: str, texts: list[str]) -> None:
        for text in texts[:FINDINGS]:
            console.print(f"{kind:9}{printable(text)}", markup=False, soft_wrap=True)
        if len(texts) > FINDINGS:
            console.print(
                f"{kind:9}… and {len(texts) - FINDINGS:,} more (--json lists all)", markup=False
            )

    def places(findings: list[dict]) -> list[str]:
        return [str(Finding(**finding)) for finding in findings]

    lines("damaged", places(result["damaged"]))
    lines("unread", places(result["unread"]))
    lines("missing", places(result["missing"]))
    lines("foreign", result["foreign"])
    lines(
        "left",
        [
            f"{file} (unfinished, of a process that was stopped, or is at work now)"
            for file in result["left"]
        ],
    )
    lines("problem", result["problems"])
    if result["images"] is not None:
        lines("images", [f"all {result['images']:,} are, byte for byte, those that were labelled"])
    if sample := result["sample"]:
        for name, key in (("KL", "kl"), ("TV", "tv")):
            mean, largest, stated = (
                sample[f"{key}_{what}"] for what in ("mean", "largest", "stated")
            )
            limit = "" if stated is None else f"; the codec states {stated:.3g}"
            lines(
                "sample",
                [
                    f"{sample['crops']:,} crops labelled again: {name} {mean:.3g} on average, "
                    f"{largest:.3g} at most{limit}"
                ],
            )
        lines("sample", [f"{100 * sample['equal_codes']:.3f} % of the codes are the same"])
    if result["trusted"]:
        summary = "every digest is right"
    elif result["sound"] and not result["problems"]:
        summary = (
            f"NOT COMPLETE, and sound as far as it goes: run the same {result['made_by']} "
            f"command again to finish it"
        )
    elif result["sound"]:
        summary = (
            "the files are sound, "
            "and the labels are NOT TO BE TRUSTED with these images and teachers"
        )
    elif not (result["damaged"] or result["foreign"]):
        summary = "NOT ALL OF IT COULD BE READ: mend that, and verify again"
    else:
        summary = (
            f"NOT SOUND: run the same {result['made_by']} command again, which makes anew "
            f"what is damaged; remove what is foreign"
        )
    console.print(
        f"{printable(result['store'])}: {result['checked']:,} of {result['shards']:,} shards read, "
        f"{result['labelled']:,} labels; {summary}",
        markup=False,
        soft_wrap=True,
    )


def evaluation_table(result: Evaluation) -> None:
    """Print top-1 and top-5 of each model, of the ensemble and of the teachers."""
    compared = result.models[0].teacher_kl is not None
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    comparison = ("KL to teachers", "agreement %") if compared else ()
    for name in ("top-1 %", "top-5 %", "loss", *comparison):
        table.add_column(name, justify="right")
    for score in (*result.models, result.ensemble, result.teachers):
        if score is None:
            continue
        if score.top1 is None:
            cells = ["–"] * 3
        else:
            cells = [f"{score.top1:.2f}", f"{score.top5:.2f}", f"{score.loss:.4f}"]
        if score.teacher_kl is not None:
            cells += [f"{score.teacher_kl:.4f}", f"{score.teacher_agreement:.2f}"]
        name = f"{score.name}={score.checkpoint}" if score.checkpoint else score.name
        table.add_row(Text(printable(name)), *cells)
    console = results()
    console.print(table)
    left_out = f", {result.unusable:,} unusable ones left out" if result.unusable else ""
    console.print(f"{result.images:,} images{left_out}")


def image_page(facts: dict) -> None:
    """Print the facts of one image and its views (``image_facts``)."""
    console = results()
    told = (
        f"{facts['height']} × {facts['width']} pixels, {facts['bytes']:,} bytes, row {facts['row']}"
    )
    folder = (
        ""
        if facts["class"] is None
        else f", folder {facts['class']}"
        + (f" ({facts['title']})" * (facts["title"] != facts["class"]))
    )
    console.print(
        Text.assemble((printable(facts["path"]), "bold"), printable(f"{folder}, {told}")),
        soft_wrap=True,
    )
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
            table.add_row(
                str(view["view"]), *[""] * 6, Text(printable(f"damaged: {view['fault']}"), "red")
            )
            continue
        label = Text(", ").join(
            Text(
                f"{printable(one['title'])} {100 * one['probability']:.1f} %",
                "bold" if one["class"] == facts["class"] else "",
            )
            for one in view["top5"]
        )
        if view["pasted"]:
            label = Text.assemble(label, printable(f" (pasted in: {view['pasted']})"))
        mirrored = "mirrored" if view["flip"] else ""
        table.add_row(
            str(view["view"]), *map(str, view["box"]), mirrored, f"{view['entropy']:.2f}", label
        )
    if facts["views"]:
        console.print(table)
