"""``cross_attention`` and ``score_std``: the public functions. MATH.md has the equations."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..layout import LayoutBias, bias_arguments
from . import ops  # noqa: F401  (registers torch.ops.customdiff)


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | LayoutBias | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(query keyᵀ · scale + bias) value, for a context of any length; fastest up to 128 text tokens.

    Args:
        query: (B, H, N, D) float32, bfloat16, float16 or float64; any strides, expanded ones included, but
            on a GPU contiguous in D. Under ``torch.autocast`` it is cast, as key and value are.
        key, value: (B, H, S, D), dtype and device of ``query``; strides as there.
        bias: added after the scale. A tensor broadcastable to (B, H, N, S) in query's dtype or float32, −inf
            and −1e8 included, or a :class:`LayoutBias` (Cones 2, equation 7), whose (N, S) matrix is never
            built.
        scale: number, default D^(−1/2); not differentiated.

    Returns:
        (B, H, N, D) in query's dtype and memory order. A row with every score −inf is zero. Differentiable
        once in query, key, value, a dense bias, and a layout's table and scale; the result has the same bits
        on every run.

    Raises:
        TypeError: a dtype that is not supported or differs from query's.
        ValueError: a shape, device or stride that does not fit, a context of no tokens, a label without a row
            in its table (see :class:`LayoutBias`); the message names the argument.
        RuntimeError: no backend can run (see :func:`customdiff_kernels.explain`); the message says what would
            help.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.is_tensor(name, tensor)
    if scale is None:
        _checks.rank("query", query, "B,H,N,D")
        scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0
    _checks.number("scale", scale)
    dense, labels, table = bias_arguments(bias, query)
    return torch.ops.customdiff.cross_attention.default(query, key, value, dense, labels, table, float(scale))


def score_std(query: Tensor, key: Tensor) -> Tensor:
    """The unbiased standard deviation of every score in query keyᵀ, all batch rows and heads together.

    In O((N + S) D²) from ``Σq·Σk`` and ``tr((qᵀq)(kᵀk))``, without the scores; no scale is applied. Cones 2
    multiplies its layout by ``log(1 + σ²) · score_std(query, key)``: see :class:`LayoutBias`, whose ``scale``
    takes the result.

    Args:
        query: (B, H, N, D), key: (B, H, S, D): as in :func:`cross_attention`; under ``torch.autocast`` they
            may differ in dtype, and the wider one counts.

    Returns:
        0-dim tensor, float32 (float64 for float64), on query's device; NaN for fewer than two scores.
        Differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cross_attention`.
    """
    for name, tensor in (("query", query), ("key", key)):
        _checks.is_tensor(name, tensor)
    if query.dtype != key.dtype and torch.is_autocast_enabled(query.device.type):
        wider = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(wider), key.to(wider)
    return torch.ops.customdiff.score_std.default(query, key)
