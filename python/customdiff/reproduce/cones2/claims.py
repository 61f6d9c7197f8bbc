"""The claims of Cones 2, and the bars of this repository, each held or not by the figures measured."""

from __future__ import annotations

from typing import Any

from ..claims import BAR
from .figures import Figures

TABLE1, FIGURE3, STORAGE = "table 1", "figure 3, section 4.2", "table 1, storage"
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 6: "six"}
MIN_PICTURES = 100  # of a bar on shares of pictures
TEN_MINUTES = 600


def evaluate(figures: Figures) -> list[dict[str, Any]]:
    """{claim, source, held, figure, clear}; ``held`` is None where it was not measured."""
    found = [*_bars(figures), *_of_the_paper(figures)]
    names = ("claim", "source", "held", "figure", "clear")
    return [dict(zip(names, (*claim, None), strict=True)) for claim in found]


Verdict = tuple[str, str, "bool | None", str]


def _bars(figures: Figures) -> list[Verdict]:
    found: list[Verdict] = []
    for n in (2, 3):
        row = figures.rows.get(("ours", n))
        seen = figures.of("ours", n, "all_in_region")
        enough = row is not None and row.pictures >= MIN_PICTURES
        said = f"{NUMBERS[n]} subjects with layout: all in their regions in at least 90% of the pictures"
        figure = "" if row is None or seen is None else f"{seen:.0%} of {row.pictures}"
        found.append((said, BAR, None if seen is None or not enough else seen >= 0.9, figure))
        said = f"{NUMBERS[n]} subjects: each in its region in at least 90%, over all"
        each = figures.of("ours", n, "in_region")
        least = None if row is None else row.least
        figure = "" if each is None else f"{each:.0%}; the subject least often there {least:.0%}"
        found.append((said, BAR, None if each is None or not enough else each >= 0.9, figure))
        said = f"{NUMBERS[n]} subjects: at least 20 points above the same without layout"
        plain = figures.of("residuals", n, "all_in_region")
        figure = "" if seen is None or plain is None else f"{seen:.0%} against {plain:.0%}"
        found.append((said, BAR, None if not figure else seen - plain >= 0.2, figure))
        for other in ("joint", "merged"):
            said = f"{NUMBERS[n]} subjects: less leakage than {other} Custom Diffusion"
            found.append(_compared(figures, said, BAR, "leakage", n, other, lambda a, b: a < b))
    seconds = figures.of("ours", 1, "seconds")
    said = "one subject is learned within 10 minutes"
    figure = "" if seconds is None else f"{seconds:.0f} s on one core"
    found.append((said, BAR, None if seconds is None else seconds <= TEN_MINUTES, figure))
    return found


def _of_the_paper(figures: Figures) -> list[Verdict]:
    found: list[Verdict] = []
    for metric, name in (("text", "text alignment"), ("image", "image alignment")):
        said = f"one subject: {name} within 2% of Custom Diffusion's"
        found.append(
            _compared(figures, said, TABLE1, metric, 1, "joint", lambda a, b: abs(a - b) <= 0.02 * abs(b))
        )
        for n in (2, 3, 4):
            said = f"{NUMBERS[n]} subjects: higher {name} than joint Custom Diffusion"
            found.append(_compared(figures, said, TABLE1, metric, n, "joint", lambda a, b: a > b))
        ends = [figures.of(method, n, metric) for method in ("ours", "joint") for n in (1, 4)]
        said = f"{name} falls less from one to four subjects than Custom Diffusion's"
        if None in ends:
            found.append((said, TABLE1, None, ""))
        else:
            ours, theirs = ends[0] - ends[1], ends[2] - ends[3]
            found.append((said, TABLE1, ours < theirs, f"{ours:.3f} against {theirs:.3f}"))
    for n in (2, 3, 4, 6):
        said = f"{NUMBERS[n]} subjects: more pictures with all in their regions than joint Custom Diffusion's"
        found.append(_compared(figures, said, FIGURE3, "all_in_region", n, "joint", lambda a, b: a > b))
    for n in (1, 4):
        said = f"{NUMBERS[n]} subject{'s' * (n > 1)}: less than a hundredth of Custom Diffusion's bytes"
        found.append(_compared(figures, said, STORAGE, "bytes", n, "joint", lambda a, b: a < b / 100, ",.0f"))
    return found


def _compared(
    figures: Figures, said: str, source: str, metric: str, n: int, other: str, holds: Any, spec: str = ".3f"
) -> Verdict:
    ours, theirs = figures.of("ours", n, metric), figures.of(other, n, metric)
    if ours is None or theirs is None:
        return said, source, None, ""
    return said, source, holds(ours, theirs), f"{ours:{spec}} against {theirs:{spec}}"
