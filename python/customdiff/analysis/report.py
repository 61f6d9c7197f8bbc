"""What all analyses write and print: a plot and its data."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..output import check_writable

Table = Sequence[Sequence[Any]]  # lines of cells, the first of them the header


def add_report(
    parser: argparse.ArgumentParser, overwrite: str = "replace an earlier analysis in --output"
) -> None:
    """``--output``, ``--overwrite`` and ``--json``."""
    kind = parser.prog.rpartition(" ")[2]
    files = f"folder for {kind}.json, {kind}.csv and {kind}.png"
    parser.add_argument("--output", required=True, metavar="DIR", help=files)
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    parser.add_argument("--json", action="store_true", help="print JSON")


def begin(options: argparse.Namespace, panels: int = 1, resumes: bool = False) -> tuple[Path, Any]:
    """Where the report goes, its suffixes left out, and its empty figure. One folder may take all kinds.

    Raises ValueError, before the work, if nothing can be written there, or an earlier report is in the way:
    of an analysis that `resumes` it is not. Raises ModuleNotFoundError without matplotlib.
    """
    from ..plotting import new_figure

    stem = Path(options.output) / options.kind
    figure, held = new_figure(stem.with_suffix(".png"), panels), stem.with_suffix(".json")
    check_writable(held)
    if held.exists() and not (resumes or options.overwrite):
        raise ValueError(f"output {str(held)!r} exists; name another folder, or pass --overwrite")
    return stem, figure


def tabulated(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Header and cells of `rows`, which have the same keys."""
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def save(stem: Path, data: dict[str, Any], table: Table, figure: Any) -> None:
    """Writes `data` to `stem`.json, `table` to `stem`.csv and `figure` to `stem`.png, each whole or not at
    all.
    """
    from ..plotting import save_figure
    from ..scoring import write

    stem.parent.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(table)
    write(stem.with_suffix(".json"), json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    write(stem.with_suffix(".csv"), lines.getvalue())
    save_figure(figure, stem.with_suffix(".png"))


def show(options: argparse.Namespace, data: dict[str, Any], table: Table) -> None:
    """Prints `data` with ``--json``, else `table`, its numbers to four digits."""
    from ..inspection import aligned

    if options.json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        print("\n".join(aligned([[_cell(value) for value in line] for line in table])))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")
