"""The report: tables of what was measured, the claims, and pictures, as Markdown and JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data import replacing
from . import sheets, tables
from .claims import BAR, evaluate
from .figures import Figures
from .files import result_of
from .plan import Effort, Job, base_digest

NAME = "custom-diffusion"
MARKS = {True: "yes", False: "**no**", None: "not measured"}
ABOUT_CLAIMS = """\
A figure is the mean of paired differences ± its standard error over concepts and seeds, with the two means;
*within noise*: less than twice that error."""


def write(jobs: Sequence[Job], out: Path, folder: Path, effort: Effort, command: str) -> None:
    """custom-diffusion.md, .json and their pictures in `folder`, of all jobs that have a result."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = Figures.collect(jobs, out)
    claims, told = evaluate(figures), about(jobs, out, effort, command)
    drawn = {}
    for table in tables.TABLES:
        file = f"{NAME}-{table.sheet}.png"
        if table.sheet and sheets.draw(table, jobs, out, folder / file):
            drawn[table.title] = file
    held = {"about": told, "rows": tables.rows(figures), "claims": claims}
    texts = {
        f"{NAME}.json": json.dumps(held, indent=1, ensure_ascii=False) + "\n",
        f"{NAME}.md": markdown(figures, claims, told, drawn),
    }
    for name, text in texts.items():
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def markdown(
    figures: Figures, claims: Sequence[dict[str, Any]], told: dict[str, Any], drawn: dict[str, str]
) -> str:
    """The page; ``drawn``: the file of samples of each table that has one, by its title."""
    parts = ["# Custom Diffusion, reproduced on the embedded base", _introduction(told)]
    parts += [_count([claim for claim in claims if claim["source"] != BAR], "claims of the paper")]
    parts += [_count([claim for claim in claims if claim["source"] == BAR], "bars of this repository")]
    for table in tables.TABLES:
        if text := tables.markdown(table, figures):
            parts += [f"## {table.title}", text]
        if table.title in drawn:
            parts.append(f"![{table.title}]({drawn[table.title]})")
    if text := tables.steps(figures):
        parts += ["## A step", text]
    parts += ["Figures are means ± standard deviations over concepts and seeds.", tables.LEGEND]
    parts += ["## Claims", claims_table(claims), ABOUT_CLAIMS]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(about: dict[str, Any]) -> str:
    effort = about["effort"]
    size = f"{2 * len(effort['pairs'])} concepts, {len(effort['pairs'])} pairs, {len(effort['seeds'])} seeds"
    return (
        f"`{about['command']}` wrote this page on {about['date']}: {about['machine']}, {about['versions']}. "
        f"Its jobs took {about['minutes']:.0f} minutes, added up. {size}; {effort['steps']} steps of ours, "
        f"{effort['pictures']} pictures of a concept, {effort['denoising']} DDIM steps. The base "
        f"({about['base'][:8]}) is a small model of a procedural world (python/tinysd): the directions of "
        "the paper's claims can be compared, not its figures. Learning rates were chosen on other concepts "
        "and prompts."
    )


def _count(claims: Sequence[dict[str, Any]], what: str) -> str:
    broken = [claim for claim in claims if claim["held"] is False]
    measured = len(broken) + sum(claim["held"] is True for claim in claims)
    if not measured:
        return ""
    text = f"**Of {measured} {what} that were measured, {measured - len(broken)} held.**"
    if noise := sum(claim["clear"] is False for claim in broken):
        text += f" {noise} of the others are within noise."
    return text + ("" if measured == len(claims) else f" {len(claims) - measured} were not measured.")


def claims_table(claims: Sequence[dict[str, Any]]) -> str:
    lines = ["| claim | source | held | figure |", "|---|---|---|---|"]
    for claim in claims:
        mark = MARKS[claim["held"]] + (", within noise" if claim["clear"] is False else "")
        said = claim["claim"].replace("*", "\\*")
        lines.append(f"| {said} | {claim['source']} | {mark} | {claim['figure']} |")
    return "\n".join(lines)


def about(jobs: Sequence[Job], out: Path, effort: Any, command: str) -> dict[str, Any]:
    """Of a run: its command, when and where it ran, and how much was done (`effort`, a dataclass)."""
    import torch

    gpu = torch.cuda.is_available()
    names = ("torch", "diffusers", "transformers", "customdiff_kernels")
    results = [result for job in jobs if (result := result_of(job, out)) is not None]
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if gpu else f"{_processor()}, {os.cpu_count()} cores",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)]),
        "base": base_digest(),
        "minutes": sum(result["job_seconds"] for result in results) / 60,
        "effort": asdict(effort),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((s.split(": ")[1] for s in lines if s.startswith("model name")), platform.machine())
