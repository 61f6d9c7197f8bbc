"""``kv_project`` and ``kv_cross_attention``: the public functions. MATH.md has the equations."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..layout import LayoutBias, bias_arguments
from . import ops  # noqa: F401  (registers torch.ops.customdiff)


def kv_project(context: Tensor, weight: Tensor, frozen_tokens: int = 0) -> Tensor:
    """Every layer's keys and values at once: context weightᵀ, with Custom Diffusion's K/V-only backward.

    What Custom Diffusion (Kumari et al., 2023, section 3.1) trains, of all layers as one matrix.

    Args:
        context: (B, S, E) text features.
        weight: (R, E), all layers' K and V rows (``KVStack.weight``). Another dtype than ``context``'s is
            fine, see Returns.
        frozen_tokens: the first so many tokens give no gradient to ``weight`` and receive none: Custom
            Diffusion detaches the start token (1).

    Returns:
        (B, S, R) in the promotion of both dtypes, or in autocast's dtype under ``torch.autocast``; float32
        master weights are then cast inside the call, nothing cast is saved, and their gradient is float32.
        Cut it into layers with one ``split``: slices would make the backward pass add up one (B, S, R)
        gradient each.

    Raises:
        TypeError: an argument that is no floating tensor, or no integer.
        ValueError: a shape or device that does not fit, or a context of no tokens.
    """
    for name, tensor in (("context", context), ("weight", weight)):
        _checks.is_tensor(name, tensor)
        _checks.floating(name, tensor)
    frozen_tokens = _checks.integer("frozen_tokens", frozen_tokens)
    context = context.to(torch.promote_types(context.dtype, weight.dtype))
    return torch.ops.customdiff.kv_project.default(context, weight, frozen_tokens)


def kv_cross_attention(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor | None = None,
    *,
    heads: int,
    bias: Tensor | LayoutBias | None = None,
    scale: float | None = None,
) -> Tensor:
    """attention(hidden w_qᵀ, key, value) w_outᵀ + b_out between frozen projections, keeping only its inputs.

    Args:
        hidden: (B, N, C) image tokens.
        key, value: (B, S, inner), dtype of ``hidden``: views of the stacked projection, read where they lie
            (any strides; on a GPU contiguous in the last dimension).
        w_q: (inner, C), w_out: (C, inner), b_out: (C,): frozen; any floating dtype, cast to hidden's inside
            the call.
        heads: number of heads, a divisor of ``inner``.
        bias, scale: as :func:`cross_attention`.

    Returns:
        (B, N, C) in hidden's dtype (autocast's under ``torch.autocast``). Differentiable once in hidden, key,
        value and the bias; saved for that are these alone, the queries and probabilities are computed again.

    Raises:
        ValueError: a shape, device or stride that does not fit; a context of no tokens; or a weight that
            requires a gradient while gradients are on: it would get none.
        TypeError, RuntimeError: as :func:`cross_attention`.
    """
    tensors = {"hidden": hidden, "key": key, "value": value, "w_q": w_q, "w_out": w_out}
    if b_out is not None:
        tensors["b_out"] = b_out
    for name, tensor in tensors.items():
        _checks.is_tensor(name, tensor)
    heads = _checks.integer("heads", heads)
    _checks.divides(heads, w_q)
    if scale is None:
        scale = (w_q.shape[0] // heads) ** -0.5
    _checks.number("scale", scale)
    dense, labels, table = bias_arguments(bias, hidden)
    return torch.ops.customdiff.kv_cross_attention.default(
        hidden, key, value, w_q, w_out, b_out, heads, dense, labels, table, float(scale)
    )
