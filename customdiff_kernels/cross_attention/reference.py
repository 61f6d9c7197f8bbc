"""The specification in plain PyTorch, in the symbols of MATH.md. Float64 capable; builds the scores.

``cross_attention_reference`` is differentiable by autograd and is what all backends are tested against. The
three functions after it offer the same as every backend (``CK_BACKEND=reference``), with the gradients
written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import sum_dtype


def dense_bias(bias: Tensor | None, labels: Tensor | None, table: Tensor | None) -> Tensor | None:
    """β (B|1, H|1, N|1, S|1): the dense bias itself, or β_ij = t[b, ℓ(b,i), j] (B|1,1,N,S)."""
    if labels is None or table is None:
        return bias
    b = max(labels.shape[0], table.shape[0])
    rows = labels.long().expand(b, -1).unsqueeze(-1).expand(-1, -1, table.shape[-1])
    return table.expand(b, -1, -1).gather(1, rows).unsqueeze(1)


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """P = softmax(τ q kᵀ + β), zero in a row whose every score is −inf."""
    s = scale * (q @ k.mT)
    if bias is not None:
        s = s + bias
    dead = (s == -torch.inf).all(-1, keepdim=True)
    return s.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)


def cross_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    labels: Tensor | None = None,
    table: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """o = P v (B,H,N,D) for query (B,H,N,D), key and value (B,H,S,D), computed in the inputs' dtype."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return probabilities(query, key, dense_bias(bias, labels, table), scale) @ value


def score_std_reference(query: Tensor, key: Tensor) -> Tensor:
    """std(q kᵀ) over everything, unbiased, with the scores built."""
    return (query @ key.mT).std()


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    q, k, v = (x.to(sum_dtype(query.dtype)) for x in (query, key, value))
    out.copy_(cross_attention_reference(q, k, v, bias, labels, table, scale))


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
    grad_table: Tensor | None,
) -> None:
    g, q, k, v = (x.to(sum_dtype(query.dtype)) for x in (grad_out, query, key, value))
    p = probabilities(q, k, dense_bias(bias, labels, table), scale)
    dp = g @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    if grad_query is not None:
        grad_query.copy_(scale * (ds @ k))
    if grad_key is not None:
        grad_key.copy_(scale * (ds.mT @ q))
    if grad_value is not None:
        grad_value.copy_(p.mT @ g)
    if grad_bias is not None:
        grad_bias.copy_(ds.sum_to_size(grad_bias.shape))
    if grad_table is not None and labels is not None:
        ds = ds.sum(1)  # (B,N,S): a layout is the same for every head
        rows = labels.long().expand(ds.shape[0], -1).unsqueeze(-1).expand_as(ds)
        dt = ds.new_zeros(ds.shape[0], *grad_table.shape[1:]).scatter_add_(1, rows, ds)
        grad_table.copy_(dt.sum_to_size(grad_table.shape))


def score_moments(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Σ s and Σ s² of s = q kᵀ as float64 scalars: (Σ_i q_i)·(Σ_j k_j) and tr((qᵀq)(kᵀk))."""
    q, k = query.double(), key.double()
    return (q.sum(2) * k.sum(2)).sum(), ((q.mT @ q) * (k.mT @ k)).sum()
