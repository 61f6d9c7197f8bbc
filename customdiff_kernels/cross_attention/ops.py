"""``customdiff::cross_attention``, its backward, and ``customdiff::score_std``: schema, fake, autograd.

The operators check their arguments (the kernels behind them take raw pointers), allocate the results and hand
over to the backend that ``_backends`` chooses. Results keep the memory order of their argument: a query that
is a view (B,H,N,D) of (B,N,H,D) memory gives a result whose ``transpose(1, 2).reshape(B, N, H * D)`` is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _checks
from .._library import register


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
) -> Tensor:
    _checks.attention(query, key, value, bias, labels, table)
    out = torch.empty_like(query)
    run_forward(query, key, value, bias, labels, table, scale, out)
    return out


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
) -> Tensor:
    _checks.attention(query, key, value, bias, labels, table)
    return torch.empty_like(query)


def run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """Write the attention into ``out`` (B,H,N,D), any strides, through the chosen backend."""
    _checks.label_values(labels, table)
    if out.numel() == 0:
        return
    backend = _backends.for_tensors(query=query, key=key, value=value)
    backend.attention_forward(query, key, value, bias, labels, table, scale, out)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    _checks.attention(query, key, value, bias, labels, table)
    _checks.like("grad_out", grad_out, "query", query)
    inputs = (query, key, value, bias, table)
    grads = empty_gradients(inputs, needed)
    run_backward(grad_out, query, key, value, bias, labels, table, scale, grads)
    return finished(grads, inputs)


def _backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    inputs = (query, key, value, bias, table)
    return finished(empty_gradients(inputs, needed), inputs)


def run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    grads: Sequence[Tensor | None],
) -> None:
    """Fill ``grads`` (of query, key, value, bias, table; None: not wanted) through the chosen backend."""
    _checks.label_values(labels, table)
    wanted = [grad for grad in grads if grad is not None]
    if query.numel() == 0:
        for grad in wanted:
            grad.zero_()
    elif wanted:
        backend = _backends.for_tensors(query=query, key=key, value=value)
        if grad_out.stride(-1) != 1:  # the expanded gradient of a sum
            grad_out = grad_out.contiguous()
        backend.attention_backward(grad_out, query, key, value, bias, labels, table, scale, *grads)


def empty_gradients(inputs: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
    """Room for the gradients of (query, key, value, bias, table); the last two contiguous, in float32
    (float64).
    """
    sums = _checks.sum_dtype(inputs[0].dtype)
    dense, contiguous = inputs[:3], torch.contiguous_format
    return [torch.empty_like(x) if want else None for x, want in zip(dense, needed[:3], strict=True)] + [
        torch.empty_like(x, dtype=sums, memory_format=contiguous) if want and x is not None else None
        for x, want in zip(inputs[3:], needed[3:], strict=True)
    ]


def finished(grads: Sequence[Tensor | None], inputs: Sequence[Any]) -> list[Tensor]:
    """The gradients that were wanted, in their arguments' dtypes."""
    return [
        grad if grad.dtype is x.dtype else grad.to(x.dtype)
        for grad, x in zip(grads, inputs, strict=True)
        if grad is not None
    ]


def by_input(grads: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """``finished``'s gradients where they belong."""
    wanted = iter(grads)
    return [next(wanted) if want else None for want in needed]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5)]
    grads = _backward_op(grad_out, *ctx.saved_tensors, ctx.scale, needed)
    query, key, value, bias, table = by_input(grads, needed)
    return query, key, value, bias, None, table, None


def _std(query: Tensor, key: Tensor) -> Tensor:
    _checks.scores(query, key)
    n = query.numel() // max(query.shape[3], 1) * key.shape[2]
    if n < 2:  # as torch.std
        return torch.full((), torch.nan, dtype=_checks.sum_dtype(query.dtype), device=query.device)
    if query.shape[3] == 0:
        return torch.zeros((), dtype=_checks.sum_dtype(query.dtype), device=query.device)
    first, second = _backends.for_tensors(query=query, key=key).score_moments(query, key)
    first, second = (torch.as_tensor(m, dtype=torch.float64, device=query.device) for m in (first, second))
    std = ((second - first * first / n) / (n - 1)).clamp_min(0).sqrt()
    return std.to(_checks.sum_dtype(query.dtype))


def _std_fake(query: Tensor, key: Tensor) -> Tensor:
    _checks.scores(query, key)
    return torch.empty((), dtype=_checks.sum_dtype(query.dtype), device=query.device)


def _std_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _std_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """∂std/∂q = (q (kᵀk) − μ 1 (Σ k)ᵀ) / ((n−1) std), and its mirror image for k; D×D products only.

    0 where all scores are equal, as torch.std.
    """
    query, key, std = ctx.saved_tensors
    q, k = query.to(std.dtype), key.to(std.dtype)
    n = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    sum_q, sum_k = q.sum(2, keepdim=True), k.sum(2, keepdim=True)
    mean = (sum_q * sum_k).sum() / n
    factor = (grad / ((n - 1) * std)).masked_fill(std == 0, 0)
    d_query = (q @ (k.mT @ k) - mean * sum_k) * factor if ctx.needs_input_grad[0] else None
    d_key = (k @ (q.mT @ q) - mean * sum_q) * factor if ctx.needs_input_grad[1] else None
    return (
        None if d_query is None else d_query.to(query.dtype),
        None if d_key is None else d_key.to(key.dtype),
    )


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? labels, Tensor? table, float scale"
register(
    f"cross_attention({_INPUTS}) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
    cast=(0, 1, 2),
)
_backward_op = register(
    f"cross_attention_backward(Tensor grad_out, {_INPUTS}, bool[5] needed) -> Tensor[]",
    _backward,
    _backward_fake,
)
register(
    "score_std(Tensor query, Tensor key) -> Tensor",
    _std,
    _std_fake,
    setup_context=_std_setup,
    backward=_std_autograd,
)
