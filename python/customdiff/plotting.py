"""Figures: made before the work, so that a missing matplotlib or a name it cannot write shows at once."""

from __future__ import annotations

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


def save_figure(figure: Any, path: Path) -> None:
    """Writes `figure`, whole or not at all."""
    from .data import replacing  # needs Pillow, as matplotlib does: not for those who plot nothing

    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=150)
