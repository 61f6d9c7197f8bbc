"""Short-context cross-attention in CUDA C++ (``csrc/cuda``): float32, bfloat16 and float16, on sm_80 and
later; any strides, but contiguous in the last dimension. Launches go to the current stream of the tensors'
device and ask nothing of the host, so that they can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import attention, describe, gradients, launch_place, module


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
    """out = softmax(query keyᵀ · scale + bias) value, written into ``out``; shapes as in ``cpu.py``.

    A bias is float32 or of query's dtype. A label outside the table counts as the nearest in it.
    """
    native = module()
    call = attention(native, query, key, value, bias, labels, table, scale)
    call.out = describe(native, out)
    native.cuda_attention_forward(call, *launch_place(query))


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
    """The gradients of :func:`attention_forward`, written into those ``grad_*`` that are given.

    ``grad_bias`` (contiguous) has the bias' own shape, ``grad_table`` the table's, both float32.
    """
    native = module()
    call = attention(native, query, key, value, bias, labels, table, scale)
    gradients(native, call, grad_out, grad_query, grad_key, grad_value, grad_bias, grad_table)
    device, stream = launch_place(query)
    size = native.cuda_attention_backward_scratch(call, device)
    scratch = torch.empty(size, dtype=torch.float32, device=query.device)
    native.cuda_attention_backward(call, device, stream, scratch.data_ptr())


def score_moments(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Σs and Σs² of s = q kᵀ over everything as float64 scalars, from Σq·Σk and tr((QᵀQ)(KᵀK)), without
    scores. Sums over a part of the rows are float32, everything above is float64.
    """
    (gram_q, sum_q), (gram_k, sum_k) = _gram(query), _gram(key)
    return (sum_q * sum_k).sum(), (gram_q * gram_k).sum()


def _gram(rows: Tensor) -> tuple[Tensor, Tensor]:
    """xᵀx (B,H,D,D) and Σx (B,H,D) over the rows of x (B,H,rows,D), float64."""
    native = module()
    device, stream = launch_place(rows)
    described, (batch, heads, _, dim) = describe(native, rows), rows.shape
    shape = batch, heads, native.cuda_gram_parts(described, device), dim + 1, dim
    parts = torch.empty(shape, dtype=torch.float32, device=rows.device)
    native.cuda_gram(described, parts.data_ptr(), device, stream)
    total = parts.sum(2, dtype=torch.float64)
    return total[:, :, :dim], total[:, :, dim]
