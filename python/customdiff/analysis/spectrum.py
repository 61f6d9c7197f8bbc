"""``customdiff analyse spectrum``: the singular values of a change (Custom Diffusion, figure 12)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..commands.common import existing, segment_bar
from .report import add_report, begin, save, show

if TYPE_CHECKING:
    from torch import Tensor

    import customdiff_kernels as ck

SUMMARY = "Singular values of every segment's change, and the ranks that hold a share of them (figure 12)."
EXAMPLES = """Printed are the ranks that customdiff compress --energy would keep.

examples:
  customdiff analyse spectrum dog.safetensors --output dog_spectrum/
"""
ENERGIES = tuple(tenths / 10 for tenths in range(1, 11))
ROUNDING = 1e-7  # of a segment's largest: smaller singular values are the error of finding them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concept", metavar="FILE", help="the concept file")
    add_report(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run(options: argparse.Namespace) -> None:
    from ..concept import Concept

    stem, figure = begin(options, panels=2)
    concept = Concept.load(existing(options.concept))
    if concept.weights or not concept.delta:
        held = "whole weights" if concept.weights else "modifier tokens"
        raise ValueError(
            f"{options.concept} holds {held}, not a change of a base's keys and values; customdiff convert "
            "makes one of whole weights, with --to customdiff --base DIR"
        )
    with segment_bar("singular values", concept.delta, options.quiet) as bar:
        data = {"concept": options.concept, **spectra(concept.delta, progress=bar.update)}
    plot(figure, data)
    save(stem, data, lines(data), figure)
    shown = [["segment", "of", *(f"{energy:.0%}" for energy in data["energies"])]]
    shown += [[row["name"], len(row["singular_values"]), *row["ranks"]] for row in data["segments"]]
    show(options, data, shown)


def spectra(
    delta: Mapping[str, Tensor] | ck.LowRankDelta,
    energies: Sequence[float] = ENERGIES,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Singular values of every segment, their cumulative shares, and the ranks that reach ``energies``.

    Args:
        delta: {name: (rows,E)} or a ``ck.LowRankDelta``: what ``ck.singular_values`` takes.
        energies: shares of a segment's sum of singular values, in (0,1].
        progress: called with the number of segments just done.

    Returns what JSON can hold: "energies", and "segments", a row each: name, singular_values (descending),
    cumulative_share (of the sum; of the first, the first two, ...), and ranks, the smallest whose share is at
    least each of the energies, as ``ck.compress`` has them. Values below ROUNDING of a segment's largest
    count as 0. Raises ValueError for an energy out of range.
    """
    import customdiff_kernels as ck

    for energy in energies:
        if not 0 < energy <= 1:
            raise ValueError(f"energies must be in (0, 1], got {energy}")
    segments = []
    for name, values in ck.singular_values(delta, progress=progress).items():
        values = values.where(values > ROUNDING * values[:1], 0)
        sums, total = values.cumsum(0), values.sum()
        shares = sums / total if total > 0 else sums + 1
        # 1e-12: a sum's rounding is taken for reached
        ranks = [int((shares < energy * (1 - 1e-12)).sum()) + 1 if total > 0 else 0 for energy in energies]
        segments.append(
            {
                "name": name,
                "ranks": ranks,
                "singular_values": values.tolist(),
                "cumulative_share": shares.tolist(),
            }
        )
    return {"energies": list(energies), "segments": segments}


def plot(figure: Any, data: dict[str, Any]) -> None:
    """Draws ``spectra``' answer: singular values, and their cumulative shares, against the index."""
    import torch

    from ..inspection import draw_spectra

    panels = figure.subplots(1, 2)
    for axes, key in zip(panels, ("singular_values", "cumulative_share"), strict=True):
        draw_spectra(axes, {row["name"]: torch.tensor(row[key]) for row in data["segments"]})
    panels[0].set_yscale("log")
    panels[0].set_ylabel("singular value of the change")
    panels[1].set_ylim(0, 1.02)
    panels[1].set_ylabel("cumulative share of their sum")


def lines(data: dict[str, Any]) -> list[list[Any]]:
    """Header and a line for each singular value."""
    made: list[list[Any]] = [["segment", "index", "singular_value", "cumulative_share"]]
    for row in data["segments"]:
        pairs = zip(row["singular_values"], row["cumulative_share"], strict=True)
        made += [[row["name"], index, *pair] for index, pair in enumerate(pairs, 1)]
    return made
