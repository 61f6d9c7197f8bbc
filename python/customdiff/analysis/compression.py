"""``customdiff analyse compression``: quality against compression (Custom Diffusion, figure 13)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands.common import existing
from .report import begin, save, show, tabulated
from .series import SCORES, Comparison, add_comparison, described
from .series import plot as plot_alignments

if TYPE_CHECKING:
    from torch import Tensor

    import customdiff_kernels as ck

    from ..concept import Concept

    Delta = Mapping[str, Tensor] | ck.LowRankDelta

SUMMARY = "Image and text alignment against the bytes of a compressed concept (figure 13)."
EXAMPLES = """Samples that the output folder holds are not drawn again. It keeps each compressed concept, as
energy-0.6/concept.safetensors and so on.

examples:
  customdiff analyse compression dog.safetensors --pictures my_dog/ --prompts prompts.txt --category dog \\
      --output dog_compression/
"""
ENERGIES, RANKS = (1.0, 0.6, 0.4, 0.1), (1, 0)  # of figure 13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concept", metavar="FILE", help="the concept file")
    parser.add_argument(
        "--energies",
        nargs="*",
        type=float,
        default=ENERGIES,
        metavar="SHARE",
        help="shares of the sum of singular values to keep; 1: as it is (default: 1 0.6 0.4 0.1)",
    )
    parser.add_argument(
        "--ranks",
        nargs="*",
        type=int,
        default=RANKS,
        metavar="RANK",
        help="singular values a matrix to keep; 0: the modifier token alone (default: 1 0)",
    )
    add_comparison(parser)


def run(options: argparse.Namespace) -> None:
    from ..concept import Concept

    stem, figure = begin(options, panels=2, resumes=True)
    concept = Concept.load(existing(options.concept))
    comparison = Comparison.of(options)
    found = quality_by_compression(concept, comparison, options.energies, options.ranks)
    data = {"concept": options.concept, **found}
    plot(figure, data)
    save(stem, data, tabulated(data["rows"]), figure)
    show(options, data, tabulated(data["rows"]))


def quality_by_compression(
    concept: Concept,
    comparison: Comparison,
    energies: Sequence[float] = ENERGIES,
    ranks: Sequence[int] = RANKS,
) -> dict[str, Any]:
    """Stored bytes, image and text alignment of a concept compressed to several sizes.

    Args:
        concept: a change of the base's keys and values, or whole weights.
        comparison: how they are drawn and scored. Its output also gets every compressed concept.
        energies: shares of the singular values' sum to keep (``ck.compress``), in (0,1]; 1 is the concept as
            it is.
        ranks: singular values a matrix to keep; 0 leaves the modifier tokens alone.

    Returns what JSON can hold: "rows", one for each size in the order given: kept ("60%" or "rank 1"),
    mean_rank of a segment, bytes of the concept's file, error (the Frobenius norm of what is lost, relative
    to that of the change), and every score of ``evaluate``; "scales" of the scores; "configuration" and
    "versions". Raises ValueError, before anything is written, for bad input.
    """
    if not energies and not ranks:
        raise ValueError("energies and ranks are both empty; give at least one of either")
    concept = concept.of(comparison.pipe.unet)
    if concept.others:
        raise ValueError(
            f"concept changes weights beside keys and values ({len(concept.others)}, first "
            f"{next(iter(concept.others))}), which are not compressed"
        )
    if not concept.delta:
        raise ValueError("concept has modifier tokens alone: there is no change of weights to compress")
    levels = [(f"energy-{energy:g}", f"{100 * energy:g}%", energy, None) for energy in energies]
    levels += [(f"rank-{rank}", f"rank {rank}", None, rank) for rank in ranks]
    rows, versions = {}, {}
    for name, kept, energy, rank in levels:
        delta, error = _compressed(concept.delta, energy, rank)
        rows[name] = {"kept": kept, "mean_rank": _mean_rank(delta), "error": error}
        versions[name] = replace(concept, delta=delta)
    results = comparison.results(versions)
    for name, version in versions.items():
        file = Path(comparison.output) / name / "concept.safetensors"
        version.save(file)
        rows[name] |= {"bytes": file.stat().st_size, **results[name].summary}
    return described(list(rows.values()), list(results.values()))


def plot(figure: Any, data: dict[str, Any]) -> None:
    """Draws ``quality_by_compression``'s answer: alignments against bytes, each point with what it keeps."""
    panels = plot_alignments(figure, data["rows"], "bytes", "stored bytes")
    for axes, score in zip(panels, SCORES, strict=True):
        axes.set_xscale("log")
        axes.margins(x=0.2)
        labels: dict[tuple[float, float], list[str]] = {}
        for row in data["rows"]:
            labels.setdefault((row["bytes"], row[score]), []).append(row["kept"])
        for point, kept in labels.items():
            axes.annotate(", ".join(kept), point, textcoords="offset points", xytext=(4, 6), fontsize=8)


def _compressed(delta: Delta, energy: float | None, rank: int | None) -> tuple[Delta, float]:
    """The change with what is to be kept of it, and the relative error: all of it and rank 0 too, which
    ``ck.compress`` does not know.
    """
    import customdiff_kernels as ck

    if energy == 1:
        return delta, 0.0
    if rank is not None and rank < 0:
        raise ValueError(f"ranks must be at least 0, got {rank}")
    least = None if rank is None else max(rank, 1)
    found, report = ck.compress(delta, energy=energy, rank=least, report=True)
    if rank == 0:
        nothing = {name: (u[:, :0], v[:0]) for name, (u, v) in found.factors.items()}
        return ck.LowRankDelta(found.segments, nothing), 1.0
    return found, report.error


def _mean_rank(delta: Delta) -> float:
    import customdiff_kernels as ck

    if isinstance(delta, ck.LowRankDelta):
        ranks = [u.shape[1] for u, _ in delta.factors.values()]
    else:
        ranks = [min(matrix.shape) for matrix in delta.values()]
    return sum(ranks) / len(ranks)
