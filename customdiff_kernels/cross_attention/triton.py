"""Short-context cross-attention in Triton: forward, one-pass backward, bias gradients and score moments (MATH.md).

Tile map. A value of the kernels is a tuple of tiles: DIMS covers the head dimension by one or two powers of two and
KEYS one tile of keys (``configs.split_dimension``), so 77 keys cost 80 columns and head dimension 40 costs 48. All
helpers walk those tuples at compile time; nothing else knows of the split.

- forward: a program holds one block of queries and every key: no online softmax up to 128 keys, running maximum and
  sum over further key tiles beyond.
- backward: a program keeps one key tile, K, V, dK and dV, and walks one chunk of the queries, recomputing P. The
  chunks' partial sums are added in a fixed order by a second kernel: the same bits on every run, no atomics. Beyond
  one key tile, a first pass over the keys saves what the softmax of each row needs.
- bias gradients have their own kernel (few trainings want them, and the main one keeps its registers): a program owns
  one block of the *broadcast* bias and walks the heads and batch rows that share it.

16-bit inputs are multiplied on tensor cores with float32 sums. float32 inputs use three tf32 products for one
("tf32x3"), about 2**-21 relative. All offsets that a stride enters are 64 bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError(f"the triton backend needs triton >= 3.3 (tuples in kernels), found {triton.__version__}")

PRECISION = tl.constexpr("tf32x3")
BiasMatrix = tuple[tuple[Tensor | None, Tensor | None], tuple[int, ...]]  # as _bias_matrix returns it


@triton.jit
def _load(ptr, rows, n_rows, stride, DIM: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr):
    """Rows of a (n_rows, DIM) matrix as column tiles (rows, DIMS[i]), zero outside it."""
    starts = tl.multiple_of(rows.to(tl.int64) * stride, ALIGN)
    tiles = ()
    for i in tl.static_range(len(DIMS)):
        columns = i * DIMS[0] + tl.arange(0, DIMS[i])
        mask = (rows < n_rows)[:, None] & (columns < DIM)[None, :]
        tiles = tiles + (tl.load(ptr + starts[:, None] + columns[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def _store(ptr, rows, n_rows, stride, tiles, DIM: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr):
    starts = tl.multiple_of(rows.to(tl.int64) * stride, ALIGN)
    for i in tl.static_range(len(DIMS)):
        columns = i * DIMS[0] + tl.arange(0, DIMS[i])
        mask = (rows < n_rows)[:, None] & (columns < DIM)[None, :]
        tl.store(ptr + starts[:, None] + columns[None, :], tiles[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_keys(ptr, first, n_keys, stride, KEYS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
               ALIGN: tl.constexpr):  # fmt: skip
    """One key tile of K or V: a tuple over KEYS of tuples over DIMS."""
    tiles = ()
    for j in tl.static_range(len(KEYS)):
        rows = first + j * KEYS[0] + tl.arange(0, KEYS[j])
        tiles = tiles + (_load(ptr, rows, n_keys, stride, DIM, DIMS, ALIGN),)
    return tiles


@triton.jit
def _zeros(ROWS: tl.constexpr, DIMS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(DIMS)):
        tiles = tiles + (tl.zeros([ROWS, DIMS[i]], tl.float32),)
    return tiles


@triton.jit
def _zero_keys(KEYS: tl.constexpr, DIMS: tl.constexpr):
    tiles = ()
    for j in tl.static_range(len(KEYS)):
        tiles = tiles + (_zeros(KEYS[j], DIMS),)
    return tiles


@triton.jit
def _scaled(tiles, factor):
    out = ()
    for i in tl.static_range(len(tiles)):
        out = out + (tiles[i] * factor,)
    return out


@triton.jit
def _added(x, y):
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] + y[i],)
    return out


@triton.jit
def _dot_nt(x, y):
    """x yᵀ for row blocks x, y split along the summed dimension."""
    acc = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(x)):
        acc = tl.dot(x[i], tl.trans(y[i]), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _dot_nn(acc, x, y):
    """acc + x y for one tile x and a row block y split along its columns."""
    out = ()
    for i in tl.static_range(len(y) - 1, -1, -1):
        out = (tl.dot(x.to(y[i].dtype), y[i], acc[i], input_precision=PRECISION),) + out
    return out


@triton.jit
def _dot_tn(acc, x, y):
    """acc + xᵀ y, as above."""
    return _dot_nn(acc, tl.trans(x.to(y[0].dtype)), y)


@triton.jit
def _row_max(tiles):
    top = tl.max(tiles[0], 1)
    for j in tl.static_range(1, len(tiles)):
        top = tl.maximum(top, tl.max(tiles[j], 1))
    return top


@triton.jit
def _row_sum(tiles):
    total = tl.sum(tiles[0], 1)
    for j in tl.static_range(1, len(tiles)):
        total += tl.sum(tiles[j], 1)
    return total


@triton.jit
def _exp(tiles, shift):
    out = ()
    for j in tl.static_range(len(tiles)):
        out = out + (tl.exp(tiles[j] - shift[:, None]),)
    return out


@triton.jit
def _finite(top):
    """The row maximum as a shift: a row without any key is shifted by 0, and its exponentials are 0, not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _bias_rows(labels_ptr, rows, n_queries):
    """The row of the bias matrix that each query reads: its label in a layout, else itself."""
    if labels_ptr is not None:
        index = tl.load(labels_ptr + rows, mask=rows < n_queries, other=0)
    else:
        index = rows
    return index.to(tl.int64)


@triton.jit
def _scores(q, k, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows, bias_sn, bias_ss, n_bias_rows,
            KEYS: tl.constexpr):  # fmt: skip
    """q kᵀ·scale + bias as tiles (rows, KEYS[j]); -inf past the last key."""
    tiles = ()
    for j in tl.static_range(len(KEYS)):
        columns = first + j * KEYS[0] + tl.arange(0, KEYS[j])
        s = _dot_nt(q, k[j]) * scale
        if bias_ptr is not None:
            inside = (rows < n_queries) & (bias_rows >= 0) & (bias_rows < n_bias_rows)
            where = bias_rows[:, None] * bias_sn + columns[None, :].to(tl.int64) * bias_ss
            s += tl.load(bias_ptr + where, mask=inside[:, None] & (columns < n_keys)[None, :], other=0.0).to(tl.float32)
        tiles = tiles + (tl.where(columns[None, :] < n_keys, s, float("-inf")),)
    return tiles


@triton.jit
def _fwd_kernel(q_ptr, k_ptr, v_ptr, out_ptr, bias_ptr, labels_ptr,
                q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, out_sb, out_sh, out_sn,
                bias_sb, bias_sh, bias_sn, bias_ss, n_bias_rows, labels_sb,
                heads, n_queries, n_keys, n_blocks, scale,
                DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
                ONE_TILE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)  # heads fastest: neighbours read the same lines of (B,N,H,D) memory, bias and labels
    h = (pid % heads).to(tl.int64)
    block = (pid // heads) % n_blocks
    b = (pid // heads // n_blocks).to(tl.int64)
    q_ptr += tl.multiple_of(b * q_sb + h * q_sh, ALIGN)
    k_ptr += tl.multiple_of(b * k_sb + h * k_sh, ALIGN)
    v_ptr += tl.multiple_of(b * v_sb + h * v_sh, ALIGN)
    out_ptr += tl.multiple_of(b * out_sb + h * out_sh, ALIGN)
    if bias_ptr is not None:
        bias_ptr += b * bias_sb + h * bias_sh
    if labels_ptr is not None:
        labels_ptr += b * labels_sb

    rows = block * BLOCK + tl.arange(0, BLOCK)
    q = _load(q_ptr, rows, n_queries, q_sn, DIM, DIMS, ALIGN)  # (BLOCK, DIM)
    bias_rows = _bias_rows(labels_ptr, rows, n_queries)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = _zeros(BLOCK, DIMS)
    for first in range(0, TILE if ONE_TILE else n_keys, TILE):  # one turn is no loop after compilation
        k = _load_keys(k_ptr, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)  # (TILE, DIM)
        v = _load_keys(v_ptr, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
        s = _scores(q, k, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows, bias_sn, bias_ss, n_bias_rows,
                    KEYS)  # fmt: skip
        before = top
        top = tl.maximum(before, _row_max(s))
        p = _exp(s, _finite(top))
        if not ONE_TILE:
            fade = tl.exp(before - _finite(top))
            total *= fade
            acc = _scaled(acc, fade[:, None])
        total += _row_sum(p)
        for j in tl.static_range(len(KEYS)):
            acc = _dot_nn(acc, p[j], v[j])
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    _store(out_ptr, rows, n_queries, out_sn, _scaled(acc, norm[:, None]), DIM, DIMS, ALIGN)


@triton.jit
def _stats_kernel(g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, labels_ptr, stats_ptr,
                  g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
                  bias_sb, bias_sh, bias_sn, bias_ss, n_bias_rows, labels_sb,
                  stats_stride, heads, n_queries, n_keys, n_blocks, scale,
                  DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
                  ALIGN: tl.constexpr):  # fmt: skip
    """What a backward over several key tiles needs of each row: max s, 1/Σexp(s − max) and D = Σ P∘dP."""
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    block = (pid // heads) % n_blocks
    b = (pid // heads // n_blocks).to(tl.int64)
    q_ptr += tl.multiple_of(b * q_sb + h * q_sh, ALIGN)
    g_ptr += tl.multiple_of(b * g_sb + h * g_sh, ALIGN)
    k_ptr += tl.multiple_of(b * k_sb + h * k_sh, ALIGN)
    v_ptr += tl.multiple_of(b * v_sb + h * v_sh, ALIGN)
    stats_ptr += (b * heads + h) * n_queries
    if bias_ptr is not None:
        bias_ptr += b * bias_sb + h * bias_sh
    if labels_ptr is not None:
        labels_ptr += b * labels_sb

    rows = block * BLOCK + tl.arange(0, BLOCK)
    q = _load(q_ptr, rows, n_queries, q_sn, DIM, DIMS, ALIGN)
    g = _load(g_ptr, rows, n_queries, g_sn, DIM, DIMS, ALIGN)
    bias_rows = _bias_rows(labels_ptr, rows, n_queries)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    delta = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_keys, TILE):
        k = _load_keys(k_ptr, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)
        v = _load_keys(v_ptr, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
        s = _scores(q, k, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows, bias_sn, bias_ss, n_bias_rows,
                    KEYS)  # fmt: skip
        before = top
        top = tl.maximum(before, _row_max(s))
        p = _exp(s, _finite(top))
        weighted = ()
        for j in tl.static_range(len(KEYS)):
            weighted = weighted + (p[j] * _dot_nt(g, v[j]),)
        fade = tl.exp(before - _finite(top))
        total = total * fade + _row_sum(p)
        delta = delta * fade + _row_sum(weighted)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    tl.store(stats_ptr + rows, _finite(top), mask=rows < n_queries)
    tl.store(stats_ptr + stats_stride + rows, norm, mask=rows < n_queries)
    tl.store(stats_ptr + 2 * stats_stride + rows, delta * norm, mask=rows < n_queries)


@triton.jit
def _score_gradients(q, g, k, v, rows, n_queries, first, n_keys, scale,
                     bias_ptr, bias_rows, bias_sn, bias_ss, n_bias_rows, stats_ptr, stats_stride,
                     KEYS: tl.constexpr):  # fmt: skip
    """P and ∂L/∂s = P∘(dP − D) of a block of queries and one key tile, each as tiles (rows, KEYS[j])."""
    s = _scores(q, k, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows, bias_sn, bias_ss, n_bias_rows, KEYS)
    dp = ()
    for j in tl.static_range(len(KEYS)):
        dp = dp + (_dot_nt(g, v[j]),)
    if stats_ptr is None:  # every key is here
        p = _exp(s, _finite(_row_max(s)))
        total = _row_sum(p)
        p = _scaled(p, (1.0 / tl.where(total == 0.0, 1.0, total))[:, None])
        weighted = ()
        for j in tl.static_range(len(KEYS)):
            weighted = weighted + (p[j] * dp[j],)
        delta = _row_sum(weighted)
    else:
        top = tl.load(stats_ptr + rows, mask=rows < n_queries, other=0.0)
        norm = tl.load(stats_ptr + stats_stride + rows, mask=rows < n_queries, other=0.0)
        delta = tl.load(stats_ptr + 2 * stats_stride + rows, mask=rows < n_queries, other=0.0)
        p = _scaled(_exp(s, top), norm[:, None])
    ds = ()
    for j in tl.static_range(len(KEYS)):
        ds = ds + (p[j] * (dp[j] - delta[:, None]),)
    return p, ds


@triton.jit
def _bwd_kernel(g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, labels_ptr, stats_ptr,
                dq_ptr, dk_ptr, dv_ptr,
                g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
                dq_st, dq_sb, dq_sh, dq_sn, bias_sb, bias_sh, bias_sn, bias_ss, n_bias_rows, labels_sb,
                stats_stride, heads, n_queries, n_keys, n_chunks, n_tiles, chunk, scale,
                DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
                RELOAD: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    part = (pid // heads) % n_chunks
    tile = (pid // heads // n_chunks) % n_tiles
    b = (pid // heads // n_chunks // n_tiles).to(tl.int64)
    row_of_head = b * heads + h
    g_ptr += tl.multiple_of(b * g_sb + h * g_sh, ALIGN)
    q_ptr += tl.multiple_of(b * q_sb + h * q_sh, ALIGN)
    k_ptr += tl.multiple_of(b * k_sb + h * k_sh, ALIGN)
    v_ptr += tl.multiple_of(b * v_sb + h * v_sh, ALIGN)
    if bias_ptr is not None:
        bias_ptr += b * bias_sb + h * bias_sh
    if labels_ptr is not None:
        labels_ptr += b * labels_sb
    if stats_ptr is not None:
        stats_ptr += row_of_head * n_queries
    if dq_ptr is not None:
        dq_ptr += tl.multiple_of(tile.to(tl.int64) * dq_st + b * dq_sb + h * dq_sh, ALIGN)

    first = tile * TILE
    k = _load_keys(k_ptr, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)  # (TILE, DIM)
    v = _load_keys(v_ptr, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
    dk = _zero_keys(KEYS, DIMS)
    dv = _zero_keys(KEYS, DIMS)
    for start in range(part * chunk, min(part * chunk + chunk, n_queries), BLOCK):
        if RELOAD:
            k = _load_keys(k_ptr, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)
            v = _load_keys(v_ptr, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
        rows = start + tl.arange(0, BLOCK)
        q = _load(q_ptr, rows, n_queries, q_sn, DIM, DIMS, ALIGN)  # (BLOCK, DIM); zero past the last query,
        g = _load(g_ptr, rows, n_queries, g_sn, DIM, DIMS, ALIGN)  # so such rows add nothing to dK and dV
        bias_rows = _bias_rows(labels_ptr, rows, n_queries)
        p, ds = _score_gradients(q, g, k, v, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows, bias_sn,
                                 bias_ss, n_bias_rows, stats_ptr, stats_stride, KEYS)  # fmt: skip
        if dq_ptr is not None:
            dq = _zeros(BLOCK, DIMS)
            for j in tl.static_range(len(KEYS)):
                dq = _dot_nn(dq, ds[j], k[j])
            _store(dq_ptr, rows, n_queries, dq_sn, _scaled(dq, scale), DIM, DIMS, ALIGN)
        if dk_ptr is not None:
            new_dk = ()
            new_dv = ()
            for j in tl.static_range(len(KEYS)):
                new_dv = new_dv + (_dot_tn(dv[j], p[j], g),)
                new_dk = new_dk + (_dot_tn(dk[j], ds[j], q),)
            dv = new_dv
            dk = new_dk

    if dk_ptr is not None:  # partial sums (chunks, B, H, n_keys, DIM), without gaps
        batch = tl.num_programs(0) // heads // n_chunks // n_tiles
        offset = (part * batch * heads + row_of_head) * n_keys * DIM
        for j in tl.static_range(len(KEYS)):
            rows = first + j * KEYS[0] + tl.arange(0, KEYS[j])
            _store(dk_ptr + offset, rows, n_keys, DIM, _scaled(dk[j], scale), DIM, DIMS, 1)
            _store(dv_ptr + offset, rows, n_keys, DIM, dv[j], DIM, DIMS, 1)


@triton.jit
def _sum_kernel(dk_parts_ptr, dv_parts_ptr, dk_ptr, dv_ptr,
                dk_sb, dk_sh, dk_sn, dv_sb, dv_sh, dv_sn, heads, n_keys, n_blocks, n_parts, part_stride,
                DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """dK and dV: the chunks' partial sums, added first to last."""
    pid = tl.program_id(0)
    rows = (pid % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    row_of_head = (pid // n_blocks).to(tl.int64)
    b = row_of_head // heads
    h = row_of_head % heads
    offset = row_of_head * n_keys * DIM
    dk = _zeros(BLOCK, DIMS)
    dv = _zeros(BLOCK, DIMS)
    for part in range(n_parts):
        dk = _added(dk, _load(dk_parts_ptr + offset, rows, n_keys, DIM, DIM, DIMS, 1))
        dv = _added(dv, _load(dv_parts_ptr + offset, rows, n_keys, DIM, DIM, DIMS, 1))
        offset += part_stride
    if dk_ptr is not None:
        _store(dk_ptr + b * dk_sb + h * dk_sh, rows, n_keys, dk_sn, dk, DIM, DIMS, ALIGN)
    if dv_ptr is not None:
        _store(dv_ptr + b * dv_sb + h * dv_sh, rows, n_keys, dv_sn, dv, DIM, DIMS, ALIGN)


@triton.jit
def _bias_bwd_kernel(g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, labels_ptr, stats_ptr, grad_ptr,
                     g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
                     bias_sb, bias_sh, bias_sn, bias_ss, n_bias_rows, labels_sb,
                     grad_sp, grad_sb, grad_sh, grad_sn, stats_stride, heads, shared_heads, shared_batch,
                     n_queries, n_keys, n_blocks, n_tiles, scale,
                     DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
                     BLOCK: tl.constexpr, ONE_ROW: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """∂L/∂bias summed over the heads and batch rows that share it; grad is (parts, bias batch, bias heads, rows, S).

    A program owns one block of queries and one key tile of one bias matrix. Three endings: the rows themselves; their
    sum where one row serves all queries (ONE_ROW; one part a block); their sum by label (a layout; one part a block).
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    tile = (pid // n_blocks) % n_tiles
    matrix = pid // n_blocks // n_tiles
    bias_heads = heads // shared_heads
    first_h = matrix % bias_heads
    first_b = matrix // bias_heads

    rows = block * BLOCK + tl.arange(0, BLOCK)
    first = tile * TILE
    acc = ()
    for j in tl.static_range(len(KEYS)):
        acc = acc + (tl.zeros([BLOCK, KEYS[j]], tl.float32),)
    for turn in range(shared_heads * shared_batch):
        h = (first_h + turn % shared_heads).to(tl.int64)
        b = (first_b + turn // shared_heads).to(tl.int64)
        q = _load(q_ptr + tl.multiple_of(b * q_sb + h * q_sh, ALIGN), rows, n_queries, q_sn, DIM, DIMS, ALIGN)
        g = _load(g_ptr + tl.multiple_of(b * g_sb + h * g_sh, ALIGN), rows, n_queries, g_sn, DIM, DIMS, ALIGN)
        k_head = k_ptr + tl.multiple_of(b * k_sb + h * k_sh, ALIGN)
        v_head = v_ptr + tl.multiple_of(b * v_sb + h * v_sh, ALIGN)
        k = _load_keys(k_head, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)
        v = _load_keys(v_head, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
        if labels_ptr is not None:
            bias_rows = _bias_rows(labels_ptr + b * labels_sb, rows, n_queries)
        else:
            bias_rows = _bias_rows(None, rows, n_queries)
        matrix_ptr = bias_ptr + b * bias_sb + h * bias_sh
        row_stats_ptr = stats_ptr + (b * heads + h) * n_queries
        p, ds = _score_gradients(q, g, k, v, rows, n_queries, first, n_keys, scale, matrix_ptr, bias_rows, bias_sn,
                                 bias_ss, n_bias_rows, row_stats_ptr, stats_stride, KEYS)  # fmt: skip
        acc = _added(acc, ds)

    grad_ptr += first_b.to(tl.int64) * grad_sb + first_h.to(tl.int64) * grad_sh
    for j in tl.static_range(len(KEYS)):
        columns = first + j * KEYS[0] + tl.arange(0, KEYS[j])
        if labels_ptr is not None:  # a layout's table has one row a label and no head dimension
            labels = _bias_rows(labels_ptr + first_b * labels_sb, rows, n_queries)
            for start in range(0, n_bias_rows, 16):
                regions = start + tl.arange(0, 16)
                member = regions[:, None] == labels[None, :]
                total = tl.dot(member.to(tl.float32), acc[j], input_precision=PRECISION)
                where = block.to(tl.int64) * grad_sp + regions[:, None] * grad_sn + columns[None, :]
                tl.store(grad_ptr + where, total, mask=(regions < n_bias_rows)[:, None] & (columns < n_keys)[None, :])
        elif ONE_ROW:
            total = tl.sum(acc[j], 0)  # rows past the last query have g = 0, hence ∂L/∂s = 0
            tl.store(grad_ptr + block.to(tl.int64) * grad_sp + columns, total, mask=columns < n_keys)
        else:
            where = rows[:, None].to(tl.int64) * grad_sn + columns[None, :]
            tl.store(grad_ptr + where, acc[j], mask=(rows < n_queries)[:, None] & (columns < n_keys)[None, :])


@triton.jit
def _gram_kernel(x_ptr, gram_ptr, sum_ptr, x_sb, x_sh, x_sn, heads, n_rows, n_chunks, chunk,
                 DIM: tl.constexpr, DIMS: tl.constexpr, SLICE: tl.constexpr, N_SLICES: tl.constexpr,
                 BLOCK: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """SLICE rows of xᵀx (DIM, DIM) and of Σ rows (DIM,), over one chunk of the rows of one head."""
    pid = tl.program_id(0)
    columns = (pid % N_SLICES) * SLICE + tl.arange(0, SLICE)
    part = (pid // N_SLICES) % n_chunks
    row_of_head = (pid // N_SLICES // n_chunks).to(tl.int64)
    x_ptr += tl.multiple_of((row_of_head // heads) * x_sb + (row_of_head % heads) * x_sh, ALIGN)
    gram = _zeros(SLICE, DIMS)
    total = tl.zeros([SLICE], tl.float32)
    for start in range(part * chunk, min(part * chunk + chunk, n_rows), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        x = _load(x_ptr, rows, n_rows, x_sn, DIM, DIMS, ALIGN)
        starts = tl.multiple_of(rows.to(tl.int64) * x_sn, ALIGN)
        mask = (rows < n_rows)[:, None] & (columns < DIM)[None, :]
        slice = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=mask, other=0.0)
        gram = _dot_tn(gram, slice, x)
        total += tl.sum(slice.to(tl.float32), 0)
    offset = (row_of_head * n_chunks + part) * DIM
    _store(gram_ptr + offset * DIM, columns, DIM, DIM, gram, DIM, DIMS, 1)
    tl.store(sum_ptr + offset + columns, total, mask=columns < DIM)


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

    query (B,H,N,D), key and value (B,H,S,D) of one dtype, float32, bfloat16 or float16; all, ``out`` included, with any
    strides but contiguous in D. Either a dense ``bias`` broadcastable to (B,H,N,S), or int32 ``labels`` (B|1,N) with a
    ``table`` (B|1,regions,S). Raises ValueError for a head dimension above 256.
    """
    batch, heads, n_queries, _ = query.shape
    config = configs.forward_config(*_problem(query, key), batch * heads * n_queries, _processors(query))
    shape = _shape(config, query, query, key, value, out)
    n_blocks = triton.cdiv(n_queries, config.block)
    matrix, bias_strides = _bias_matrix(query, bias, labels, table)
    with torch.cuda.device_of(query):
        _fwd_kernel[(heads * n_blocks * batch,)](
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
    """Fill the gradients that are not None: grad_bias and grad_table float32, in the shapes of bias and table."""
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
    """Σs and Σs² of s = q kᵀ over everything as float64 scalars, from Σq·Σk and tr((QᵀQ)(KᵀK)): no scores are built.

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
        _bwd_kernel[(heads * n_chunks * n_tiles * batch,)](
            *inputs, *matrix[0], stats, dq, dk, dv, *_strides(*inputs), *dq_strides, *matrix[1],
            batch * heads * n_queries, heads, n_queries, n_keys, n_chunks, n_tiles, chunk, scale,
            **shape, RELOAD=config.reload, **_options(config),
        )  # fmt: skip
        if dk is not None and dv is not None:
            n_blocks = triton.cdiv(n_keys, configs.MIN_TILE)
            _sum_kernel[(n_blocks * heads * batch,)](
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
    """``grad`` (B|1, H|1, N|1 or regions, S) float32: the gradient of a dense bias, or of a layout's table."""
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
        _bias_bwd_kernel[(n_blocks * n_tiles * bias_batch * grad.shape[1],)](
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
        _stats_kernel[(heads * n_blocks * batch,)](
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
        _gram_kernel[(n_slices * n_chunks * heads * batch,)](
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
    strides = [s for x in tensors if x is not None for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    return math.gcd(16, *strides)


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides of batch, head and row of each (B,H,rows,D) tensor."""
    return [s for x in tensors for s in ((0, 0, 0) if x is None else x.stride()[:3])]


def _bias_matrix(query: Tensor, bias: Tensor | None, labels: Tensor | None, table: Tensor | None) -> BiasMatrix:
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
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
