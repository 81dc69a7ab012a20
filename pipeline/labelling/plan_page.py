"""Print the predicted cost of filling a store."""

from __future__ import annotations

from rich.table import Table

from cache.errors import printable
from pipeline.labelling.cost import GPU_FLOPS
from pipeline.labelling.plan import Plan
from pipeline.runtime.progress import duration, results


def plan_page(plan: Plan) -> None:
    """Print a plan as a table."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    counted = "" if plan.counted else " (ImageNet's; --data counts yours)"
    table.add_row("crops", f"{plan.images:,} images{counted} × {plan.views} views = {plan.crops:,}")
    if plan.finished:
        table.add_row("", f"{100 * plan.finished:.1f} % of them are finished")
    table.add_row(
        "teachers",
        printable(" + ".join(plan.teachers)) + f", {plan.gflop_per_crop:.3g} GFLOP a crop",
    )
    loader = (
        f", loader {plan.loader_per_second:,.1f}; together {plan.crops_per_second:,.1f}"
        if plan.loader_per_second
        else " (the loader is timed with --data)"
    )
    table.add_row(
        "measured",
        f"crops/s on this {plan.device}, {plan.precision}: teachers "
        f"{plan.teachers_per_second:,.1f}{loader}",
    )
    if plan.loader_milliseconds:
        parts = ", ".join(f"{name} {took:.2g}" for name, took in plan.loader_milliseconds.items())
        table.add_row("", f"of the loader's time, in ms a crop: {parts}")
    workers = (
        f", {duration(3600 * plan.hours / plan.workers)} with {plan.workers} workers like it"
        if plan.workers > 1
        else ""
    )
    table.add_row("time", f"{duration(3600 * plan.hours)} on one such device{workers}")
    if plan.device == "cpu":
        hours = duration(3600 * plan.gpu_hours)
        table.add_row(
            "",
            f"{hours} on a GPU that does {GPU_FLOPS / 1e12:.0f} TFLOP/s: arithmetic alone, not "
            f"measured",
        )
    how = (
        "measured on some crops"
        if plan.bytes_measured
        else "of real labels of that many classes, not measured here"
    )
    table.add_row(
        "store",
        f"{_bytes(plan.store_bytes)}, {plan.bytes_per_crop:.0f} bytes a crop ({plan.codec}, {how})",
    )
    table.add_row("", f"{plan.shards:,} shards in {plan.files:,} files")
    if plan.free_bytes is not None:
        short = "" if plan.free_bytes > plan.bytes_left else ": NOT ENOUGH"
        table.add_row("", f"{_bytes(plan.free_bytes)} are free there{short}")
    results().print(table)


def _bytes(n: float) -> str:
    power = min(4, max(0, len(f"{n:.0f}") - 1) // 3)
    return f"{n / 1000**power:,.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
