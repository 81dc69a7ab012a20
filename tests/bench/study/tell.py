"""Tell the study's results from its records: a table for the README, and a figure.

A difference is between a row and the row that it is compared with, seed by seed: with
the same seed both begin with the same student and see the images in the same order. The
part of chance in a difference is estimated from all rows of an experiment together,
since the few seeds of one row tell little. A figure is modelled as row + seed + chance.
The variance s² of chance is the variance of the residuals of row and seed means, with
(rows − 1)(seeds − 1) degrees of freedom. A mean difference over n seeds counts as a
difference beyond t₀.₉₇₅ · s · √(2/n), and lies within the spread below. One in twenty
differences is beyond by chance alone. Such errors come together, since most rows are
compared with the same row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from rows import Experiment, Row, Step, with_needs
from scipy import stats

from pipeline.runs.curves import COLOURS

SAME = 1e-4  # nats between losses of the ensemble in records of the same teachers, at most


@dataclass(frozen=True)
class Measure:
    key: str
    name: str
    digits: int


TOP1, KL, AGREEMENT = (
    Measure("top1", "top-1 %", 2),
    Measure("teacher_kl", "KL to teachers", 4),
    Measure("teacher_agreement", "agreement %", 2),
)


class Outcome:
    """The records of an experiment's rows that were made with its present commands and
    configs."""

    def __init__(self, experiment: Experiment, records: dict) -> None:
        self.experiment, self.records = experiment, records
        self.of = {
            row.name: {
                seed: record
                for seed in row.seeds
                if (record := self.record(experiment.trained(row, seed)))
            }
            for row in experiment.rows
        }
        told = [
            record["figures"]["teachers"]["loss"]
            for seeds in self.of.values()
            for record in seeds.values()
        ]
        if told and max(told) - min(told) > SAME:
            raise ValueError(
                f"the records of {experiment.name} are of different teachers; do all its rows "
                f"again, in one work folder"
            )

    def record(self, step: Step) -> dict | None:
        found = self.records.get(step.name)
        return found if found and found["identity"] == step.identity else None

    def values(self, row: Row, measure: Measure) -> dict[int, float]:
        """Return a row's figures by seed."""
        return {
            seed: record["figures"]["models"][0][measure.key]
            for seed, record in self.of[row.name].items()
        }

    def differences(self, row: Row, measure: Measure) -> np.ndarray:
        """Return a row's differences, for the seeds that both rows have."""
        if row.against is None:
            return np.zeros(0)
        ours, theirs = (
            self.values(row, measure),
            self.values(self.experiment.row(row.against), measure),
        )
        return np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def margin(self, measure: Measure, n: int) -> float:
        """Return half the width of the 95 % interval of a mean difference of n seeds,
        or NaN with too few records. Rows with another start don't count, since they see
        other crops."""
        start = self.experiment.row(self.experiment.base).start
        found = [self.values(row, measure) for row in self.experiment.rows if row.start == start]
        most = max(map(len, found))
        table = np.array([list(values.values()) for values in found if len(values) == most])
        freedom = (len(table) - 1) * (most - 1)
        if freedom < 1 or not n:
            return float("nan")
        left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        return float(stats.t.ppf(0.975, freedom) * np.sqrt((left**2).sum() / freedom * 2 / n))

    def told_difference(self, row: Row, measure: Measure) -> str:
        """Return a row's mean difference as text, bold beyond the margin."""
        found = self.differences(row, measure)
        if not len(found):
            return ""
        text = f"{found.mean():+.{measure.digits}f}".replace("-", "−")
        return f"**{text}**" if abs(found.mean()) > self.margin(measure, len(found)) else text

    def told(self, row: Row, measure: Measure) -> str:
        found = list(self.values(row, measure).values())
        spread = f" ± {np.std(found, ddof=1):.{measure.digits}f}" if len(found) > 1 else ""
        return f"{np.mean(found):.{measure.digits}f}{spread}" if found else ""

    def labelling_seconds(self, row: Row) -> float | None:
        """Return the seconds of stage one, from the teachers to the row's store. None
        for rows that need no labels, or only some of the store's labels."""
        if (
            not row.store
            or "train.labels=hard" in row.sets
            or any(setting.startswith("train.views=") for setting in row.sets)
        ):
            return None
        records = [
            self.record(step)
            for step in with_needs([self.experiment.store(row.store)])
            if step.makes
        ]
        return None if None in records else sum(record["seconds"] for record in records)

    def training_seconds(self, row: Row) -> float | None:
        """Return the seconds of stage two, as the mean over the seeds."""
        found = [
            record["training"]["seconds"]
            for record in self.of[row.name].values()
            if "training" in record
        ]
        return float(np.mean(found)) if found else None

    @cached_property
    def teachers(self) -> dict | None:
        return self.record(self.experiment.teachers_alone())


def differs(row: Row, experiment: Experiment) -> str:
    """Tell the parts of a row's command lines that the recipe's don't have."""
    labels = {
        None: "",
        "both": "",
        "first-alone": f"one `--teacher {experiment.teachers[0].partition('=')[0]}`",
        "second-alone": f"one `--teacher {experiment.teachers[1].partition('=')[0]}`",
        "cutmix": "store with `crops.cutmix`",
        "top5": "`export-labels --labels top5`, `import-labels`",
        "top10": "`export-labels --labels top10`, `import-labels`",
    }
    words = [
        labels.get(row.store, f"`store.codec={row.store}`"),
        "`--online`" if row.online else "",
    ]
    words += [
        f"`{setting}`"
        for setting in row.sets
        if setting != "train.discriminator=null" or "train.labels=hard" not in row.sets
    ]
    if experiment.made and not row.start:
        words.append("random weights")
    return ", ".join(word for word in words if word)


def table(experiment: Experiment, records: dict) -> str:
    """Return an experiment's table in Markdown; empty without records."""
    outcome = Outcome(experiment, records)
    if not any(outcome.of.values()):
        return ""
    lines = [
        f"| {experiment.name} | differs by | top-1 % | Δ | KL to teachers | Δ | agreement % | "
        f"stage one | stage two |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    if outcome.teachers:
        for i, figures in enumerate(
            (*outcome.teachers["figures"]["models"], outcome.teachers["figures"]["ensemble"])
        ):
            step = experiment.taught()[i : i + 1]
            trained = [
                record["training"]["seconds"] for one in step if (record := outcome.record(one))
            ]
            name = (
                figures["name"] if figures["name"] == "ensemble" else f"teacher {figures['name']}"
            )
            lines.append(
                f"| {name} | | {figures['top1']:.2f} | | | | | | "
                f"{f'{trained[0]:,.0f} s' if trained else ''} |"
            )
    for claim in experiment.claims:
        rows = [row for row in claim.rows if outcome.of[row.name]]
        if rows:
            lines.append(f"| **{claim.question}** | | | | | | | | |")
        for row in rows:
            cells = [row.name, differs(row, experiment)]
            for measure in (TOP1, KL):
                cells += [outcome.told(row, measure), outcome.told_difference(row, measure)]
            times = [outcome.labelling_seconds(row), outcome.training_seconds(row)]
            cells += [
                outcome.told(row, AGREEMENT),
                *("" if seconds is None else f"{seconds:,.0f} s" for seconds in times),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    n = max(map(len, outcome.of.values()))
    spread = (
        f"Within the spread: a mean difference of {n} seeds below "
        f"{outcome.margin(TOP1, n):.2f} points of top-1 and {outcome.margin(KL, n):.4f} of KL."
    )
    told = spread if n > 1 else "One seed: how far seeds scatter isn't known."
    return "\n".join(lines) + f"\n\n{told} {costs(outcome)}{machines(outcome)}.\n"


def beside(experiment: Experiment, records: dict, again: dict) -> str:
    """Return a table in Markdown of the differences in two runs of an experiment, each
    in bold beyond the spread of its run; empty unless both have records."""
    outcomes = Outcome(experiment, records), Outcome(experiment, again)
    rows = [
        row
        for row in experiment.rows
        if row.against and all(outcome.of[row.name] for outcome in outcomes)
    ]
    if not rows:
        return ""
    lines = [
        f"| {experiment.name} | Δ top-1, first | again | Δ KL, first | again |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            outcome.told_difference(row, measure) for measure in (TOP1, KL) for outcome in outcomes
        ]
        lines.append(f"| {' | '.join((row.name, *cells))} |")
    spreads = [
        [outcome.margin(measure, max(map(len, outcome.of.values()))) for outcome in outcomes]
        for measure in (TOP1, KL)
    ]
    top1, kl = (
        f"{first:.{measure.digits}f} and {second:.{measure.digits}f}"
        for measure, (first, second) in zip((TOP1, KL), spreads, strict=True)
    )
    return (
        "\n".join(lines)
        + f"\n\nWithin the spread: below {top1} points of top-1, {kl} of KL. Again on "
        f"{machines(outcomes[1])}.\n"
    )


def costs(outcome: Outcome) -> str:
    """Tell the cost of further students, if a student was trained online too."""
    names = {row.name for row in outcome.experiment.rows}
    if not {"soft", "online"} <= names:
        return ""
    soft, online = outcome.experiment.row("soft"), outcome.experiment.row("online")
    label, train, live = (
        outcome.labelling_seconds(soft),
        outcome.training_seconds(soft),
        outcome.training_seconds(online),
    )
    if None in (label, train, live):
        return ""
    return (
        f"With the teachers there, the first student costs {label + train:.0f} s, of which "
        f"{label:.0f} for labels, each further one {train:.0f} s; "
        f"online each costs {live:.0f} s, {live / train:.1f} times as much. "
    )


def machines(outcome: Outcome) -> str:
    found = {
        (m["processor"], m["cores"], m["gpu"] or "no GPU", m["torch"]): m["date"]
        for seeds in outcome.of.values()
        for m in (record["machine"] for record in seeds.values())
    }
    return "; ".join(
        f"{processor}, {cores} core{'s' * (cores > 1)} a run, {gpu}, torch {torch}, {date}"
        for (processor, cores, gpu, torch), date in found.items()
    )


def draw(experiments: tuple[Experiment, ...], records: dict, file: Path) -> None:
    """Draw every row's seeds and their mean, beside the paper's recipe with its margin:
    a row of panels for each experiment that has records."""
    from matplotlib.figure import Figure

    outcomes = [
        outcome
        for experiment in experiments
        if any((outcome := Outcome(experiment, records)).of.values())
    ]
    if not outcomes:
        return
    heights = [len(outcome.experiment.rows) + 2 for outcome in outcomes]
    figure = Figure((9, 0.21 * sum(heights) + 0.5 * len(heights)), layout="constrained", dpi=100)
    places = figure.subplots(
        len(outcomes), 2, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for outcome, panels in zip(outcomes, places, strict=True):
        rows = [row for row in outcome.experiment.rows if outcome.of[row.name]]
        first = AGREEMENT if outcome.experiment.class_map else TOP1
        for measure, axes in zip((first, KL), panels, strict=True):
            for place, row in enumerate(rows):
                found = list(outcome.values(row, measure).values())
                axes.plot(
                    found,
                    [place] * len(found),
                    "o",
                    color=COLOURS[0],
                    markersize=3.5,
                    alpha=0.5,
                    markeredgewidth=0,
                )
                axes.plot(
                    np.mean(found), place, "|", color=COLOURS[1], markersize=11, markeredgewidth=2
                )
            base = list(
                outcome.values(outcome.experiment.row(outcome.experiment.base), measure).values()
            )
            if base:
                margin = outcome.margin(measure, len(base))
                axes.axvspan(
                    np.mean(base) - margin,
                    np.mean(base) + margin,
                    color=COLOURS[2],
                    alpha=0.15,
                    linewidth=0,
                )
                axes.axvline(np.mean(base), color=COLOURS[2], linewidth=1)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks(
                range(len(rows)),
                [row.name for row in rows] if axes is panels[0] else [""] * len(rows),
                fontsize=8,
            )
            axes.set_title(f"{outcome.experiment.name}: {measure.name}", fontsize=9, loc="left")
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(axis="x", linewidth=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    scratch = file.with_name(f".{file.name}.partial")
    figure.savefig(scratch, format="png")
    scratch.replace(file)
