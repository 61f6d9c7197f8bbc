"""What a concept file holds and what compression kept, as numbers, tables and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import customdiff_kernels as ck

from .concept import Concept
from .plotting import COLOURS, new_figure, save_figure


def describe(concept: Concept, file_bytes: int, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Segments (shape, rank, Frobenius norm, energy, bytes), other weights (shape, norm, bytes), modifier
    tokens (width, norm), metadata; for JSON.

    ``values``: the singular values, ``ck.singular_values`` of the delta or the weights. A segment's energy is
    its share of the sum of all segments'.
    """
    delta, segments = concept.delta or concept.weights, []
    factors = delta.factors if isinstance(delta, ck.LowRankDelta) else None
    kind = "low rank" if factors is not None else "whole weights" if concept.weights else "full"
    kind = kind if delta else "no change"
    total = float(sum(found.sum() for found in values.values()))
    for name, found in values.items():
        stored = (delta[name],) if factors is None else factors[name]
        shape = (stored[0].shape[0], stored[-1].shape[1])
        segments.append(
            {
                "name": name,
                "shape": list(shape),
                "rank": min(shape) if factors is None else stored[0].shape[1],
                "norm": float(found.norm()),
                "energy": float(found.sum()) / total if total else 0.0,
                "dtype": str(stored[0].dtype).removeprefix("torch."),
                "bytes": sum(tensor.nbytes for tensor in stored),
            }
        )
    tokens = [
        {"word": word, "width": row.numel(), "norm": float(row.float().norm())}
        for word, rows in concept.modifier_tokens.items()
        for row in ([rows] if isinstance(rows, Tensor) else rows)
    ]
    others = [
        {"name": name, "shape": list(value.shape), "norm": float(value.float().norm()), "bytes": value.nbytes}
        for name, value in concept.others.items()
    ]
    return {
        "file_bytes": file_bytes,
        "delta": kind,
        "segments": segments,
        "others": others,
        "modifier_tokens": tokens,
        "metadata": dict(concept.metadata),
    }


def table(found: dict[str, Any]) -> str:
    """`describe`'s answer as text."""
    rows = [("segment", "shape", "rank", "norm", "energy", "bytes")]
    for item in found["segments"]:
        shape, energy = "×".join(map(str, item["shape"])), f"{item['energy']:.1%}"
        rows.append(
            (item["name"], shape, str(item["rank"]), f"{item['norm']:.3g}", energy, f"{item['bytes']:,}")
        )
    total = sum(item["bytes"] for item in found["segments"])
    rows.append((f"{len(found['segments'])} segments, {found['delta']}", "", "", "", "", f"{total:,}"))
    lines = [*aligned(rows), ""]
    if others := found["others"]:
        size = sum(item["bytes"] for item in others)
        lines.append(f"{len(others)} other weights, first {others[0]['name']}: {size:,} bytes")
    for token in found["modifier_tokens"]:
        lines.append(f"modifier token {token['word']}  width {token['width']}, norm {token['norm']:.4f}")
    lines += [f"{key}: {value}" for key, value in found["metadata"].items()]
    return "\n".join([*lines, f"file: {found['file_bytes']:,} bytes"])


def compression_table(report: ck.CompressionReport) -> str:
    """Rank, share of the singular values' sum, relative Frobenius error and bytes of each segment and all."""
    rows = [("segment", "rank", "of", "energy", "error", "bytes")]
    for item in report.segments:
        ranks, shares = (str(item.rank), str(item.full_rank)), (f"{item.energy:.1%}", f"{item.error:.1%}")
        rows.append((item.name, *ranks, *shares, f"{item.bytes:,}"))
    shares = (f"{report.energy:.1%}", f"{report.error:.1%}")
    rows.append((f"{len(report.segments)} segments", "", "", *shares, f"{report.bytes:,}"))
    return "\n".join(aligned(rows))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equally wide columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def plotter(path: Path) -> Callable[[Mapping[str, Tensor]], None]:
    """A function that plots singular values into ``path``; see `new_figure` for when it is made."""
    figure = new_figure(path)

    def plot(values: Mapping[str, Tensor]) -> None:
        axes = figure.subplots()
        draw_spectra(axes, values)
        axes.set_yscale("log")
        axes.set_ylabel("singular value of the change")
        save_figure(figure, path)

    return plot


def draw_spectra(axes: Any, values: Mapping[str, Tensor]) -> None:
    """A line for each segment's ``values`` above 0, against their index; keys in one colour and values (V)
    in another.
    """
    for part, colour in zip(("to_k", "to_v"), COLOURS, strict=False):
        label: str | None = part
        for name, found in values.items():
            kept = found[found > 0]
            if f".{part}." in f".{name}." and len(kept):
                axes.plot(range(1, len(kept) + 1), kept, color=colour, alpha=0.5, label=label)
                label = None  # once in the legend
    axes.set_xlabel("index")
    axes.legend()
