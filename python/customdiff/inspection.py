"""What a concept file holds, as numbers and as a table."""

from __future__ import annotations

from typing import Any

import torch

import customdiff_kernels as ck

from .concept import Concept


def describe(concept: Concept, file_bytes: int) -> dict[str, Any]:
    """Segments (shape, rank, Frobenius norm, bytes), modifier tokens (width, norm), metadata; for JSON."""
    delta, segments = concept.delta or concept.weights, []
    factors = delta.factors if isinstance(delta, ck.LowRankDelta) else None
    dense = delta if factors is None else delta.dense()
    for name, change in dense.items():
        stored = (change,) if factors is None else factors[name]
        segments.append(
            {
                "name": name,
                "shape": list(change.shape),
                "rank": min(change.shape) if factors is None else stored[0].shape[1],
                "norm": float(torch.linalg.matrix_norm(change.float())),
                "dtype": str(change.dtype).removeprefix("torch."),
                "bytes": sum(tensor.nbytes for tensor in stored),
            }
        )
    tokens = [
        {"word": word, "width": row.numel(), "norm": float(row.float().norm())}
        for word, rows in concept.modifier_tokens.items()
        for row in ([rows] if isinstance(rows, torch.Tensor) else rows)
    ]
    return {
        "file_bytes": file_bytes,
        "delta": "low rank" if factors is not None else "whole weights" if concept.weights else "full",
        "segments": segments,
        "modifier_tokens": tokens,
        "metadata": dict(concept.metadata),
    }


def table(found: dict[str, Any]) -> str:
    """`describe`'s answer as text."""
    rows = [("segment", "shape", "rank", "norm", "bytes")]
    for item in found["segments"]:
        shape = "×".join(map(str, item["shape"]))
        rows.append((item["name"], shape, str(item["rank"]), f"{item['norm']:.4f}", f"{item['bytes']:,}"))
    total = sum(item["bytes"] for item in found["segments"])
    rows.append((f"{len(found['segments'])} segments, {found['delta']}", "", "", "", f"{total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    lines.append("")
    for token in found["modifier_tokens"]:
        lines.append(f"modifier token {token['word']}  width {token['width']}, norm {token['norm']:.4f}")
    lines += [f"{key}: {value}" for key, value in found["metadata"].items()]
    return "\n".join([*lines, f"file: {found['file_bytes']:,} bytes"])
