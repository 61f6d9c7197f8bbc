"""The report: a table for each number of subjects, the claims, and pictures, as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...data import replacing
from ...embedded_world import GUIDANCE_SCALE
from ...sheet import contact_sheet
from ..files import result_of
from ..plan import Job
from ..report import about, claims_table
from ..sheets import COLOURS, samples
from .claims import NUMBERS, evaluate
from .figures import METRICS, Figures
from .plan import METHODS, Effort

NAME = "cones2"
HEADINGS = {
    "text": "text alignment",
    "image": "image alignment",
    "categories_in_region": "categories in regions",
    "in_region": "a subject in its region",
    "all_in_region": "all in their regions",
    "seen": "all seen anywhere",
    "leakage": "leakage",
    "seconds": "seconds",
    "bytes": "kB stored",
}
LEGEND = """\
*text alignment*, *image alignment*: mean cosines in CLIP space, of samples with their prompts (V\\* taken
out) and with each subject's pictures. *categories in regions*: share of samples in which a detector finds
every subject's category in its region, whatever its colours. *in its region*: the category there is in the
colours of the subject, too. A region is cut out and enlarged, since the detector knows subjects of that size;
methods without a layout are measured by the same regions, which stand in the order of the prompt, as the base
places two subjects by itself. *reversed*: in the reverse of that order. *all seen anywhere*: the same on
whole pictures. *leakage*: share of the pixels of the right category in each region whose colour is more
common in true pictures of another of the subjects; true pictures have some too, at edges and where subjects
share a colour. *seconds*: of training on one core. Up to three subjects are asked for in the words of the
base's captions ("a dog a cat and a car"); from four on prompts begin with "very small photo of". Four stand
in two rows of two, six in two rows of three without a place in the prompt; the base was trained on three at
most."""


def write(jobs: Sequence[Job], out: Path, folder: Path, effort: Effort, command: str) -> None:
    """cones2.md, .json and the pictures in `folder`, of all jobs that have a result."""
    folder.mkdir(parents=True, exist_ok=True)
    figures, told = Figures.collect(jobs, out), about(jobs, out, effort, command)
    told["missing"] = [job.name for job in jobs if result_of(job, out) is None]
    claims, sheet = evaluate(figures), f"{NAME}.png"
    rows = [{**asdict(row), "title": METHODS[row.method].title} for row in figures.rows.values()]
    drawn = _draw(jobs, out, folder / sheet)
    texts = {
        f"{NAME}.json": json.dumps({"about": told, "rows": rows, "claims": claims}, indent=1) + "\n",
        f"{NAME}.md": markdown(figures, claims, told, sheet if drawn else None),
    }
    for name, text in texts.items():
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def markdown(
    figures: Figures, claims: Sequence[dict[str, Any]], told: dict[str, Any], sheet: str | None
) -> str:
    """The page."""
    parts = ["# Cones 2 on the embedded base", _introduction(told)]
    if missing := len(told["missing"]):
        parts.append(
            f"**{missing} jobs had not ended when this was written**; what they measure is missing here."
        )
    measured = [claim for claim in claims if claim["held"] is not None]
    if measured:
        held = sum(claim["held"] for claim in measured)
        parts.append(f"**Of {len(measured)} claims and bars that were measured, {held} held.**")
    for n, name in NUMBERS.items():
        if text := _table(figures, n):
            parts += [f"## {name.capitalize()} subject{'s' * (n > 1)}", text]
    parts += [LEGEND]
    if sheet:
        parts += ["## Pictures", f"![One sample of each method before each background]({sheet})"]
    parts += ["## Claims", claims_table(claims)]
    return "\n\n".join(parts) + "\n"


def _introduction(told: dict[str, Any]) -> str:
    effort = told["effort"]
    return (
        f"`{told['command']}` wrote this page on {told['date']}: {told['machine']}, {told['versions']}. "
        f"Its jobs took {told['minutes']:.0f} minutes, added up. A residual is learned in "
        f"{effort['residual_steps']} steps from {effort['pictures']} captioned pictures, Custom Diffusion "
        f"from the same in {effort['steps']} steps a subject with regularization. All is drawn in "
        f"{effort['denoising']} DDIM steps, at guidance scale {effort['guidance_scale']:g}; Custom Diffusion "
        f"at {GUIDANCE_SCALE:g}, as in its own report. The base ({told['base'][:8]}) is a small model of a "
        "procedural world (python/tinysd): the directions of the paper's claims can be compared, not its "
        "figures. What was chosen (rates, steps, weights, prompts) was chosen on other subjects."
    )


def _table(figures: Figures, n: int) -> str:
    """The lines of the methods that were measured with `n` subjects; empty if there are none."""
    rows = [row for method in METHODS if (row := figures.rows.get((method, n)))]
    if not rows:
        return ""
    metrics = [metric for metric in METRICS if any(metric in row.mean for row in rows)]
    if n == 1:
        metrics = [metric for metric in metrics if metric != "all_in_region"]
    lines = [
        f"| | pictures | {' | '.join(HEADINGS[m] for m in metrics)} |",
        "|---" * (len(metrics) + 2) + "|",
    ]
    for row in rows:
        cells = [_cell(metric, row.mean.get(metric)) for metric in metrics]
        lines.append(f"| {METHODS[row.method].title} | {row.pictures} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric == "bytes":
        return f"{value / 1e3:,.1f}"
    if metric == "seconds":
        return f"{value:,.0f}"
    return f"{value:.3f}" if metric in ("text", "image") else f"{value:.0%}"


def _draw(jobs: Sequence[Job], out: Path, path: Path) -> bool:
    """Writes one sample a background of each method, of the first combination of each size."""
    done = [job for job in jobs if job.kind == "compose" and result_of(job, out) is not None]
    first: dict[int, list[str]] = {}
    for job in done:
        first.setdefault(len(job.settings["subjects"]), job.settings["subjects"])
    rows = []
    for names in first.values():
        for job in done:
            if job.settings["subjects"] == names:
                label = f"{' + '.join(names)}: {METHODS[job.settings['method']].title}"
                rows.append((label, samples(job, out)))
    if rows:
        with replacing(path) as partial:
            contact_sheet(rows, side=64).quantize(COLOURS).save(partial, format="png", optimize=True)
    return bool(rows)
