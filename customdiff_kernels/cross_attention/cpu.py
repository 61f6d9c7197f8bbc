"""Short-context cross-attention on the CPU, compiled (``csrc/cpu``): float32, bfloat16, float16 and float64,
any strides. The results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import attention, describe, gradients, module


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
    """out = softmax(query keyᵀ · scale + bias) value, written into ``out``.

    query, out (B,H,N,D), key, value (B,H,S,D). The bias is either dense, broadcastable to (B,H,N,S), or the
    row ``table[b, labels[b, i]]`` of table (B|1,G,S) chosen by labels (B|1,N) int32; in any of the four
    dtypes. A row whose every score is -inf gives zeros.
    """
    native = module()
    call = attention(native, query, key, value, bias, labels, table, scale)
    call.out = describe(native, out)
    native.attention_forward(call, torch.get_num_threads())


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

    ``grad_bias`` has the bias' own shape, ``grad_table`` the table's, both float32 (float64 for a float64
    query).
    """
    native = module()
    call = attention(native, query, key, value, bias, labels, table, scale)
    gradients(native, call, grad_out, grad_query, grad_key, grad_value, grad_bias, grad_table)
    native.attention_backward(call, torch.get_num_threads())


def score_moments(query: Tensor, key: Tensor) -> tuple[float, float]:
    """Σ s and Σ s² of s = query keyᵀ over all of (B,H,N,S), in float64 and without building the scores.

    Σ s = Σq · Σk and Σ s² = tr((QᵀQ)(KᵀK)) for each (b, h).
    """
    native = module()
    return native.score_moments(describe(native, query), describe(native, key), torch.get_num_threads())
