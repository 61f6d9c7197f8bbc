"""The tables of the report: which methods and figures stand in each, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .figures import Figures
from .plan import LEVELS, METHODS

TITLES = {
    "base": "base model",
    **{name: method.title for name, method in METHODS.items()},
    "joint": "ours, joint",
    "joint-cutmix": "ours, joint with Cut-Mix",
    "merged": "ours, merged in closed form",
    "sequential": "ours, sequential",
    "true": "true pictures",
    **{level: level for level in LEVELS},
}
HEADINGS = {
    "text": "text alignment",
    "image": "image alignment",
    "image1": "image alignment with the first",
    "image2": "with the second",
    "gap": "gap closed",
    "kid_validation": "KID × 10³",
    "kid_unrelated": "KID × 10³",
    "seen": "seen",
    "seen1": "first seen",
    "seen2": "second seen",
    "seconds": "seconds",
    "peak_memory": "peak MB",
    "bytes": "kB stored",
}
HEADINGS_OF_TWO = HEADINGS | {"image": "with both", "seen": "both seen"}
LEGEND = """\
*text alignment*, *image alignment*: mean cosines in CLIP space, of samples with their prompts (V\\* taken
out) and with the concept's pictures. *gap closed*: share of the way from the base's image alignment to that
of true pictures of the same scenes, which were not trained on. *KID*: of samples of captions without V\\*
against real pictures of such captions, over CLIP embeddings; unbiased, so near 0 and also below it for a
perfect model. *seen*: share of samples in which a detector finds the concept, its category in its colours;
*both seen*: in one picture. *Cut-Mix*: half of the training pictures show two concepts side by side, which
is not in the paper. *seconds*: of training on one core (merged: the closed form alone; sequential:
the second concept alone; DreamBooth and generated regularization: with the generating). *peak MB*: the
process's largest resident memory, libraries and base included; on a GPU, of its memory."""

TIMES = ("seconds", "peak_memory", "bytes")
QUALITY = ("text", "image", "gap", "kid_validation", "seen", *TIMES)


@dataclass(frozen=True)
class Table:
    """`group` is that of the figures; `sheet` names the file of samples beside the table, if it has one."""

    title: str
    group: str
    methods: Sequence[str]
    metrics: Sequence[str]
    sheet: str = ""


TABLES = (
    Table(
        "Table 1: one concept",
        "single",
        ("base", "textual-inversion", "dreambooth", "fine-tune-all", "ours", "true"),
        QUALITY,
        "one-concept",
    ),
    Table(
        "Table 1: two concepts",
        "multi",
        ("base", "textual-inversion", "sequential", "merged", "joint", "joint-cutmix", "true"),
        ("text", "image1", "image2", "image", "seen1", "seen2", "seen", *TIMES),
        "two-concepts",
    ),
    Table(
        "Table 3: augmentation and regularization",
        "single",
        ("ours", "resized", "no-regularization", "generated"),
        QUALITY,
    ),
    Table(
        "Table 4: choices of V\\*",
        "single",
        ("ours", "normal", "fixed"),
        ("text", "image", "gap", "seen", *TIMES),
    ),
    Table(
        "Table 5: captions of anything",
        "single",
        ("base", "dreambooth", "fine-tune-all", "ours"),
        ("kid_unrelated",),
    ),
    Table(
        "Figure 13: compression",
        "single",
        ("ours", *LEVELS, "base"),
        ("text", "image", "gap", "seen", "bytes"),
        "compression",
    ),
)


def rows(figures: Figures) -> list[dict[str, Any]]:
    """One a line of each table: means, standard deviations, means by seed, and every cell's own figure."""
    found = []
    for table in TABLES:
        for method in table.methods:
            cells = {m: figures.of(table.group, method, m) for m in table.metrics}
            if held := [metric for metric, values in cells.items() if values]:
                found.append(
                    {
                        "table": table.title,
                        "method": TITLES[method],
                        "mean": {m: figures.mean(table.group, method, m) for m in held},
                        "spread": {m: figures.spread(table.group, method, m) for m in held},
                        "seeds": {m: figures.seeds(table.group, method, m) for m in held},
                        "cells": {m: cells[m] for m in held},
                    }
                )
    for method, metrics in figures.cells.get("timing", {}).items():
        found.append(
            {"table": "A step", "method": TITLES[method], "mean": {"seconds": metrics["seconds"][""]}}
        )
    return found


def markdown(table: Table, figures: Figures) -> str:
    """The lines of the methods that were measured; empty if there are none."""
    headings = HEADINGS_OF_TWO if table.group == "multi" else HEADINGS
    lines = []
    for method in table.methods:
        cells = [_cell(figures, table.group, method, metric) for metric in table.metrics]
        if any(cells):
            lines.append(f"| {TITLES[method]} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = f"| | {' | '.join(headings[metric] for metric in table.metrics)} |"
    return "\n".join([head, "|---" * (len(table.metrics) + 1) + "|", *lines])


def steps(figures: Figures) -> str:
    """The table of the time of a step; empty if it was not measured."""
    timed = {name: metrics["seconds"][""] for name, metrics in figures.cells.get("timing", {}).items()}
    if not timed:
        return ""
    lines = ["| | seconds a step | × ours |", "|---|---|---|"]
    lines += [
        f"| {TITLES[name]} | {seconds:.3f} | {seconds / timed['ours']:.2f} |"
        for name, seconds in timed.items()
    ]
    return "\n".join(lines)


def _cell(figures: Figures, group: str, method: str, metric: str) -> str:
    mean, spread = figures.mean(group, method, metric), figures.spread(group, method, metric)
    if mean is None:
        return ""
    if metric == "gap" or metric.startswith("seen"):
        return f"{mean:.0%} ± {100 * spread:.0f}"
    if metric.startswith("kid"):
        return f"{1e3 * mean:.1f} ± {1e3 * spread:.1f}"
    if metric in TIMES:
        scaled = mean / {"seconds": 1, "peak_memory": 1e6, "bytes": 1e3}[metric]
        return f"{scaled:,.1f}" if scaled < 100 else f"{scaled:,.0f}"
    return f"{mean:.3f} ± {spread:.3f}"
