"""Short-context cross-attention in Triton: forward, backward, bias gradients and score moments (MATH.md).

The functions that every backend offers, on CUDA tensors; on CPU tensors where TRITON_INTERPRET=1 was set
before triton was imported. ``triton_kernels.py`` says how the work is laid out, ``configs.py`` how the
tiles are chosen. Launches go to the current stream of the tensors' device.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .triton_kernels import bias_bwd_kernel, bwd_kernel, fwd_kernel, gram_kernel, stats_kernel, sum_kernel

BiasMatrix = tuple[tuple[Tensor | None, Tensor | None], tuple[int, ...]]  # as _bias_matrix returns it


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
    """Write softmax(q kᵀ·scale + bias) v into ``out`` (B,H,N,D); a row whose every score is -inf gives zeros.

    query (B,H,N,D), key and value (B,H,S,D) of one dtype, float32, bfloat16 or float16; all, ``out``
    included, with any strides but contiguous in D. Either a dense ``bias`` broadcastable to (B,H,N,S), or
    int32 ``labels`` (B|1,N) with a ``table`` (B|1,regions,S). Raises ValueError for a head dimension above
    256.
    """
    batch, heads, n_queries, _ = query.shape
    config = configs.forward_config(*_problem(query, key), batch * heads * n_queries, _processors(query))
    shape = _shape(config, query, query, key, value, out)
    n_blocks = triton.cdiv(n_queries, config.block)
    matrix, bias_strides = _bias_matrix(query, bias, labels, table)
    with torch.cuda.device_of(query):
        fwd_kernel[(heads * n_blocks * batch,)](
            query, key, value, out, *matrix, *_strides(query, key, value, out), *bias_strides,
            heads, n_queries, key.shape[2], n_blocks, scale,
            **shape, ONE_TILE=key.shape[2] <= shape["TILE"], **_options(config),
        )  # fmt: skip


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
    """Fill the gradients that are not None; those of bias and table are float32, in their shapes."""
    inputs, matrix = (grad_out, query, key, value), _bias_matrix(query, bias, labels, table)
    if grad_query is not None or grad_key is not None or grad_value is not None:
        _launch_backward(inputs, matrix, scale, grad_query, grad_key, grad_value)
    if grad_table is not None:
        _launch_bias_backward(inputs, matrix, scale, grad_table.unsqueeze(1))
    if grad_bias is not None:
        grad = grad_bias[(None,) * (4 - grad_bias.ndim)]
        if grad.shape[3] == 1:  # the softmax does not see a shift of a whole row
            grad.zero_()
        else:
            _launch_bias_backward(inputs, matrix, scale, grad)


def score_moments(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Σs and Σs² of s = q kᵀ over everything as float64 scalars, from Σq·Σk and tr((QᵀQ)(KᵀK)), without
    scores.

    Sums over a chunk of rows are float32, everything above is float64.
    """
    (gram_q, sum_q), (gram_k, sum_k) = _gram(query), _gram(key)
    return (sum_q * sum_k).sum(), (gram_q * gram_k).sum()


def _launch_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    matrix: BiasMatrix,
    scale: float,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:
    _, query, key, _ = inputs
    (batch, heads, n_queries, dim), n_keys = query.shape, key.shape[2]
    config = configs.backward_config(*_problem(query, key), matrix[0][0] is not None)
    shape = _shape(config, query, *inputs, grad_query, grad_key, grad_value)
    n_tiles = triton.cdiv(n_keys, shape["TILE"])
    chunk = configs.split_queries(n_queries, config.block, batch * heads * n_tiles, _processors(query))
    n_chunks = triton.cdiv(n_queries, chunk)
    stats = _row_stats(inputs, matrix, scale) if n_tiles > 1 else None

    dq, dk, dv = grad_query, None, None
    if dq is not None and n_tiles > 1:  # one partial sum a key tile
        dq = torch.empty(n_tiles, *query.shape, dtype=torch.float32, device=query.device)
    dq_strides = (0, 0, 0, 0) if dq is None else (0, *dq.stride()[:3]) if dq.ndim == 4 else dq.stride()[:4]
    if grad_key is not None or grad_value is not None:
        dk, dv = torch.empty(2, n_chunks, batch, heads, n_keys, dim, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        bwd_kernel[(heads * n_chunks * n_tiles * batch,)](
            *inputs, *matrix[0], stats, dq, dk, dv, *_strides(*inputs), *dq_strides, *matrix[1],
            batch * heads * n_queries, heads, n_queries, n_keys, n_chunks, n_tiles, chunk, scale,
            **shape, RELOAD=config.reload, **_options(config),
        )  # fmt: skip
        if dk is not None and dv is not None:
            n_blocks = triton.cdiv(n_keys, configs.MIN_TILE)
            sum_kernel[(n_blocks * heads * batch,)](
                dk, dv, grad_key, grad_value, *_strides(grad_key, grad_value),
                heads, n_keys, n_blocks, n_chunks, dk.stride(0),
                DIM=dim, DIMS=config.dims, BLOCK=configs.MIN_TILE, ALIGN=shape["ALIGN"], num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    if grad_query is not None and dq is not None and n_tiles > 1:
        grad_query.copy_(dq.sum(0))


def _launch_bias_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], matrix: BiasMatrix, scale: float, grad: Tensor
) -> None:
    """``grad`` (B|1, H|1, N|1 or regions, S) float32: the gradient of a dense bias or of a layout's table."""
    _, query, key, _ = inputs
    (batch, heads, n_queries, _), n_keys = query.shape, key.shape[2]
    config = configs.bias_config(*_problem(query, key))
    shape = _shape(config, query, *inputs)
    n_blocks, n_tiles = triton.cdiv(n_queries, config.block), triton.cdiv(n_keys, shape["TILE"])

    layout = matrix[0][1] is not None
    one_row = not layout and grad.shape[2] == 1
    bias_batch = batch if layout else grad.shape[0]  # each batch row of a layout has its own labels
    if layout or one_row:
        parts = grad.new_empty(n_blocks, bias_batch, *grad.shape[1:])
    else:
        parts = grad.unsqueeze(0)
    stats = _row_stats(inputs, matrix, scale)
    with torch.cuda.device_of(query):
        bias_bwd_kernel[(n_blocks * n_tiles * bias_batch * grad.shape[1],)](
            *inputs, *matrix[0], stats, parts, *_strides(*inputs), *matrix[1], *parts.stride()[:4],
            batch * heads * n_queries, heads, heads // grad.shape[1], batch // bias_batch,
            n_queries, n_keys, n_blocks, n_tiles, scale,
            **shape, ONE_ROW=one_row, **_options(config),
        )  # fmt: skip
    if layout or one_row:
        grad.copy_(parts.sum(0).sum_to_size(grad.shape))


def _row_stats(inputs: tuple[Tensor, Tensor, Tensor, Tensor], matrix: BiasMatrix, scale: float) -> Tensor:
    """(3,B,H,N) float32: of each row the greatest score, 1/Σexp and D = rowsum(P∘dP)."""
    _, query, key, _ = inputs
    batch, heads, n_queries, _ = query.shape
    config = configs.bias_config(*_problem(query, key))
    stats = torch.empty(3, batch, heads, n_queries, dtype=torch.float32, device=query.device)
    n_blocks = triton.cdiv(n_queries, config.block)
    with torch.cuda.device_of(query):
        stats_kernel[(heads * n_blocks * batch,)](
            *inputs, *matrix[0], stats, *_strides(*inputs), *matrix[1],
            batch * heads * n_queries, heads, n_queries, key.shape[2], n_blocks, scale,
            **_shape(config, query, *inputs), **_options(config),
        )  # fmt: skip
    return stats


def _gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """xᵀx (B,H,D,D) and Σx (B,H,D) over the rows of x (B,H,rows,D), float64."""
    batch, heads, n_rows, dim = x.shape
    config = configs.gram_config(dim, x.element_size())
    n_slices = triton.cdiv(dim, configs.GRAM_SLICE)
    chunk = configs.split_queries(n_rows, config.block, n_slices * batch * heads, _processors(x))
    n_chunks = triton.cdiv(n_rows, chunk)
    gram = torch.empty(batch, heads, n_chunks, dim, dim, dtype=torch.float32, device=x.device)
    total = torch.empty(batch, heads, n_chunks, dim, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        gram_kernel[(n_slices * n_chunks * heads * batch,)](
            x, gram, total, *_strides(x), heads, n_rows, n_chunks, chunk,
            DIM=dim, DIMS=config.dims, SLICE=configs.GRAM_SLICE, N_SLICES=n_slices,
            BLOCK=config.block, ALIGN=_alignment(x), **_options(config),
        )  # fmt: skip
    return gram.sum(2, dtype=torch.float64), total.sum(2, dtype=torch.float64)


def _problem(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """What a configuration depends on: keys, head dimension, bytes an element."""
    return key.shape[2], query.shape[3], query.element_size()


def _shape(config: configs.Config, query: Tensor, *tensors: Tensor | None) -> dict[str, Any]:
    """The compile-time shape of a kernel; ``tensors`` are those whose head rows it reads or writes."""
    dim = query.shape[3]
    if dim > configs.MAX_DIM:
        raise ValueError(f"query has head dimension {dim}; the triton backend takes up to {configs.MAX_DIM}")
    return {
        "DIM": dim, "DIMS": config.dims, "KEYS": config.keys, "TILE": sum(config.keys),
        "BLOCK": config.block, "ALIGN": _alignment(*tensors),
    }  # fmt: skip


def _alignment(*tensors: Tensor | None) -> int:
    """The power of two up to 16 that divides every stride: what lets a 16-byte load be proven aligned.

    Triton itself sees only divisibility by 16; a head of 40 in (B,N,H,D) memory starts at multiples of 8.
    """
    strides = [
        s for x in tensors if x is not None for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1
    ]
    return math.gcd(16, *strides)


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides of batch, head and row of each (B,H,rows,D) tensor."""
    return [s for x in tensors for s in ((0, 0, 0) if x is None else x.stride()[:3])]


def _bias_matrix(
    query: Tensor, bias: Tensor | None, labels: Tensor | None, table: Tensor | None
) -> BiasMatrix:
    """(matrix, labels), and (matrix' strides in b, h, row and key; its number of rows; labels' stride in b).

    A layout's matrix is its table, read at the row of the query's label.
    """
    if labels is not None and table is not None:
        matrix = table.unsqueeze(1)
        n_rows, labels_sb = table.shape[1], labels.stride(0) if labels.shape[0] > 1 else 0
    elif bias is not None:
        matrix = bias[(None,) * (4 - bias.ndim)]
        n_rows, labels_sb = query.shape[2], 0
    else:
        return (None, None), (0,) * 6
    strides = [0 if n == 1 else s for n, s in zip(matrix.shape, matrix.stride(), strict=True)]
    return (matrix, labels), (*strides, n_rows, labels_sb)


def _options(config: configs.Config) -> dict[str, object]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def _processors(x: Tensor) -> int:
    return _processors_of(x.device) if x.is_cuda else 4


@cache
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
