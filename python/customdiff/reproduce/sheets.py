"""Contact sheets of the report: one sample of each prompt, of every method of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import read_pictures, replacing
from ..sheet import Row, contact_sheet
from .files import path_of, result_of
from .plan import Job
from .tables import TITLES, Table

CELLS = 2  # the first concepts, or pairs
COLOURS = 128  # of the palette: a sheet is an illustration, and a small file


def draw(table: Table, jobs: Sequence[Job], out: Path, path: Path) -> bool:
    """Writes the sheet of the first seed; False, and nothing written, where there are no samples."""
    scored = [job for job in jobs if job.kind in ("score", "true") and result_of(job, out) is not None]
    seed = min((job.settings["seed"] for job in scored), default=0)
    size = 1 if table.group == "single" else 2
    scored = [j for j in scored if j.settings["seed"] == seed and len(j.settings["concepts"]) == size]
    rows: list[Row] = []
    cells = list(dict.fromkeys(tuple(job.settings["concepts"]) for job in scored))
    for cell in cells[:CELLS]:
        own = {job.settings["method"]: job for job in scored if tuple(job.settings["concepts"]) == cell}
        shown = [own[method] for method in table.methods if method in own]
        if shown:
            rows += _trained_on(shown[0], out)
        rows += [(f"{' + '.join(cell)}: {TITLES[j.settings['method']]}", samples(j, out)) for j in shown]
    if rows:
        with replacing(path) as partial:
            contact_sheet(rows, side=64).quantize(COLOURS).save(partial, format="png", optimize=True)
    return bool(rows)


def _trained_on(job: Job, out: Path) -> list[Row]:
    own = [other for other in job.needs if other.kind == "pictures"]
    return [(f"the pictures of {j.settings['concept']}", read_pictures(path_of(j, out))) for j in own]


def samples(job: Job, out: Path) -> list[Image.Image]:
    """The first sample of each prompt."""
    with Image.open(path_of(job, out)) as image:
        strip = np.asarray(image.convert("RGB"))
    side = strip.shape[0]
    starts = range(0, strip.shape[1], side * job.settings["samples"])
    return [Image.fromarray(strip[:, start : start + side]) for start in starts]
