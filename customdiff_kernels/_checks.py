"""Argument checks that the operations share: each names the argument, what came and what would do."""

from __future__ import annotations

import numbers
import operator
import os
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def number(name: str, value: object) -> None:
    """A real number; not a tensor, whose gradient would be lost."""
    if not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def integer(name: str, value: Any) -> int:
    """``value`` as an int, numpy's integers included."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def floating(name: str, value: Tensor, *allowed: torch.dtype) -> None:
    """``value`` has a floating dtype, or one of ``allowed`` where given."""
    allowed = allowed or FLOATING
    if value.dtype not in allowed:
        names = ", ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in allowed))
        raise TypeError(f"{name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")


def rank(name: str, value: Tensor, dims: str) -> None:
    """``value`` has as many dimensions as ``dims`` names, e.g. ``"B,H,N,D"``."""
    if value.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} must have shape ({dims}), got {tuple(value.shape)}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], why: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {tuple(expected)} {why}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{name} is on {value.device} and {reference_name} on {reference.device}: move one of them"
        )


def like(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """``value`` has the shape, dtype and device of ``reference``."""
    floating(name, value, reference.dtype)
    shape(name, value, reference.shape, f"as {reference_name}")
    same_device(name, value, reference_name, reference)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory between the first and the last element of both meets."""
    if not a.numel() or not b.numel():
        return False
    (first, last), (start, stop) = (
        (
            t.data_ptr(),
            t.data_ptr()
            + t.element_size() * sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)),
        )
        for t in (a, b)
    )
    return first <= stop and start <= last


def in_place(out: Tensor, base: Tensor) -> None:
    """``out``, of the shape and dtype of ``base``, is the very same memory or none of it: rows are written
    while others are still read.
    """
    if overlap(out, base) and (out.data_ptr() != base.data_ptr() or out.stride() != base.stride()):
        raise ValueError("out must be base itself, or share no memory with it; give a tensor of its own")


def contiguous_rows(name: str, value: Tensor) -> None:
    """The last dimension has stride 1. All others may have any stride, 0 (expanded) included."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got shape {tuple(value.shape)} with strides "
            f"{value.stride()}; call {name}.contiguous() (nothing is copied behind your back)"
        )


def some_tokens(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """``value`` (..., S, width) has S > 0: a softmax over no text has no answer."""
    if value.shape[-2] == 0:
        raise ValueError(
            f"{name} must have at least one text token (S), got {tuple(value.shape)} "
            f"with {reference_name} {tuple(reference.shape)}"
        )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
) -> None:
    """What ``cross_attention`` relies on: query (B,H,N,D), key and value (B,H,S,D), a bias as below."""
    scores(query, key)
    like("value", value, "key", key)
    attention_bias(query, (*query.shape[:3], key.shape[2]), bias, labels, table)


def scores(query: Tensor, key: Tensor) -> None:
    """query (B,H,N,D) floating, key (B,H,S,D) of the same dtype and device; any strides."""
    rank("query", query, "B,H,N,D")
    floating("query", query)
    rank("key", key, "B,H,S,D")
    floating("key", key, query.dtype)
    batch, heads, _, dim = query.shape
    shape("key", key, (batch, heads, key.shape[2], dim), "(B,H,S,D) to go with query")
    some_tokens("key", key, "query", query)
    same_device("key", key, "query", query)


def attention_bias(
    query: Tensor,
    scores: tuple[int, int, int, int],
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
) -> None:
    """``bias`` broadcastable to ``scores`` (B,H,N,S), or ``labels`` (B|1,N) and ``table`` (B|1,regions,S)."""
    batch, _, n, s = scores
    if (labels is None) != (table is None):
        raise ValueError("labels and table come together (a LayoutBias), got only one of them")
    if bias is not None:
        if labels is not None:
            raise ValueError("bias is either dense or a layout (labels and table), got both")
        floating("bias", bias, query.dtype, sum_dtype(query.dtype))
        same_device("bias", bias, "query", query)
        if bias.dim() != 4 or any(b != 1 and b != full for b, full in zip(bias.shape, scores, strict=True)):
            raise ValueError(f"bias must be broadcastable to (B,H,N,S) = {scores}, got {tuple(bias.shape)}")
    if labels is not None and table is not None:
        if labels.dtype is not torch.int32:
            raise TypeError(f"labels must be int32, got {str(labels.dtype).removeprefix('torch.')}")
        floating("table", table, query.dtype, sum_dtype(query.dtype))
        same_device("labels", labels, "query", query)
        same_device("table", table, "query", query)
        if labels.dim() != 2 or labels.shape[0] not in (1, batch) or labels.shape[1] != n:
            raise ValueError(f"labels must have shape ({batch} or 1, {n}) (B|1,N), got {tuple(labels.shape)}")
        if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[2] != s:
            raise ValueError(
                f"table must have shape ({batch} or 1, regions, {s}) (B|1,R,S), got {tuple(table.shape)}"
            )
        contiguous_rows("labels", labels)


def label_values(labels: Tensor | None, table: Tensor | None) -> None:
    """Every label is a row of ``table``. On a GPU, where looking means waiting, only with CK_DEBUG=1.

    There a stray label gets the bias of some region or none; the kernels read nothing out of bounds.
    """
    if labels is None or table is None or not labels.numel():
        return
    if labels.device.type != "cpu" and not (
        labels.is_cuda and os.environ.get("CK_DEBUG") == "1" and not torch.cuda.is_current_stream_capturing()
    ):
        return
    regions = table.shape[1]
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= regions:
        raise ValueError(
            f"labels must lie in 0 … {regions - 1} (table has {regions} regions), "
            f"got {low if low < 0 else high}"
        )


def projection(context: Tensor, weight: Tensor, frozen_tokens: int) -> None:
    """context (B,S,E), weight (R,E), 0 <= frozen_tokens <= S."""
    rank("context", context, "B,S,E")
    rank("weight", weight, "R,E")
    floating("context", context)
    floating("weight", weight)
    same_device("weight", weight, "context", context)
    shape("weight", weight, (weight.shape[0], context.shape[2]), "(R,E) to go with context (B,S,E)")
    some_tokens("context", context, "weight", weight)
    if not 0 <= frozen_tokens <= context.shape[1]:
        raise ValueError(f"frozen_tokens must lie in 0 … {context.shape[1]} (S), got {frozen_tokens}")


def divides(heads: int, w_q: Tensor) -> None:
    """w_q is (inner,C) and ``heads`` divides inner."""
    rank("w_q", w_q, "inner,C")
    if heads < 1 or w_q.shape[0] == 0 or w_q.shape[0] % heads:
        raise ValueError(f"heads must divide inner = {w_q.shape[0]} (rows of w_q), got {heads!r}")


def kv_block(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    heads: int,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
) -> None:
    """What ``kv_cross_attention`` relies on: hidden (B,N,C), key and value (B,S,inner), frozen weights."""
    divides(heads, w_q)
    rank("hidden", hidden, "B,N,C")
    floating("hidden", hidden)
    rank("key", key, "B,S,inner")
    floating("key", key, hidden.dtype)
    rank("w_out", w_out, "C,inner")
    (batch, n, c), inner, s = hidden.shape, w_q.shape[0], key.shape[1]
    shape("w_q", w_q, (inner, c), "(inner,C) to go with hidden (B,N,C)")
    shape("w_out", w_out, (w_out.shape[0], inner), "(C,inner) to go with w_q (inner,C)")
    shape("key", key, (batch, s, inner), "(B,S,inner) to go with hidden and w_q")
    some_tokens("key", key, "hidden", hidden)
    like("value", value, "key", key)
    frozen = {"w_q": w_q, "w_out": w_out}
    if b_out is not None:
        frozen["b_out"] = b_out
        shape("b_out", b_out, (w_out.shape[0],), "(C) to go with w_out (C,inner)")
    for name, tensor in frozen.items():
        floating(name, tensor)
        same_device(name, tensor, "hidden", hidden)
    same_device("key", key, "hidden", hidden)
    attention_bias(hidden, (batch, heads, n, s), bias, labels, table)
