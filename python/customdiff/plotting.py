"""Figures: made before the work, so that a missing matplotlib or a name it cannot write shows at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("tab:blue", "tab:orange", "tab:green")


def new_figure(path: Path, panels: int = 1) -> Any:
    """An empty figure with room for `panels` side by side, to be written to `path`.

    Raises ModuleNotFoundError without matplotlib, and ValueError if it has no such file format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5) if panels == 1 else (5.5 * panels, 4.5), layout="constrained")
    kind = path.suffix.removeprefix(".").lower()
    if kind not in (known := figure.canvas.get_supported_filetypes()):
        raise ValueError(f"plot {str(path)!r} must end in one of .{', .'.join(sorted(known))}")
    return figure


def draw_maps(figure: Any, rows: Sequence[tuple[str, Any, Sequence[tuple[str, Any]]]]) -> None:
    """Draws a line for each (title, picture, its maps with their titles), each map from 0 to its largest."""
    columns = 1 + max(len(maps) for _, _, maps in rows)
    figure.set_size_inches(1.5 * columns, 1.8 * len(rows))
    for axes in figure.subplots(len(rows), columns, squeeze=False).flat:
        axes.set_axis_off()
    for row, (name, picture, maps) in enumerate(rows):
        panels = figure.axes[row * columns :]
        panels[0].imshow(picture)
        panels[0].set_title(name)
        for axes, (title, shown) in zip(panels[1:], maps, strict=False):
            axes.imshow(shown, vmin=0)
            axes.set_title(title)


def save_figure(figure: Any, path: Path) -> None:
    """Writes `figure`, whole or not at all."""
    from .data import replacing  # needs Pillow, as matplotlib does: not for those who plot nothing

    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=150)
