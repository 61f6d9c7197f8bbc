"""Low-rank sums in Triton: every segment and every concept in one launch, on CUDA tensors; on CPU tensors
where TRITON_INTERPRET=1 was set before triton was imported.

A program has a tile of the weight, reads it once, adds the products of all terms that change its rows, and
writes it once. Which terms those are stands in tables that every call copies to the device, so a call cannot
be recorded into a CUDA graph (the ``cuda`` backend's can).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from .factors import alike

ROWS, COLUMNS = 64, 64  # of a tile
PRECISION = constexpr("tf32x3")  # of float32 factors, about 2**-21 relative
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def low_rank_sum(
    out: Tensor,
    base: Tensor,
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float],
) -> None:
    """out = base + sum_i scale_i u_i v_i as in ``cpu.py``; contiguous rows in base and out, no float64."""
    u, v = alike(u, v)
    used = [i for i, left in enumerate(u) if left.numel()]
    tiles, terms = _tables(base.shape[0], [(starts[i], starts[i] + u[i].shape[0]) for i in used])
    if not tiles or not base.shape[1]:
        return
    described = [
        (u[i].data_ptr(), v[i].data_ptr(), u[i].stride(0), v[i].stride(0), u[i].shape[1], starts[i])
        for i in (used[term] for term in terms)
    ]
    numbers = [scales[used[term]] for term in terms]
    dtype = u[0].dtype if u else base.dtype
    shallow = dtype is torch.float32 or all(row[4] <= 16 for row in described)  # float32 is three products
    with torch.cuda.device_of(base):
        low_rank_kernel[(len(tiles), triton.cdiv(base.shape[1], COLUMNS))](
            base, out, torch.tensor(tiles, dtype=torch.int64).to(base.device),
            torch.tensor(described or [(0,) * 6], dtype=torch.int64).to(base.device),
            torch.tensor(numbers or [0.0], dtype=torch.float32).to(base.device),
            base.shape[1], base.stride(0), out.stride(0),
            FACTOR=TYPES[dtype], ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=16 if shallow else 32, num_warps=8,
        )  # fmt: skip


def _tables(rows: int, ranges: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Tiles (first row, end of its rows, first and last of its terms), and the terms of all tiles."""
    cuts = sorted({0, rows, *(row for pair in ranges for row in pair)})
    place = {row: i for i, row in enumerate(cuts)}
    members: list[list[int]] = [[] for _ in cuts]
    for term, (start, stop) in enumerate(ranges):
        for i in range(place[start], place[stop]):
            members[i].append(term)
    tiles: list[tuple[int, ...]] = []
    terms: list[int] = []
    for begin, end, found in zip(cuts, cuts[1:], members, strict=False):
        first = len(terms)
        terms += found
        tiles += [(row, end, first, len(terms)) for row in range(begin, end, ROWS)]
    return tiles, terms


@triton.jit
def low_rank_kernel(base, out, tiles, terms, scales, width, base_row, out_row, FACTOR: constexpr,
                    ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr):  # fmt: skip
    tile = tiles + 4 * tl.program_id(0)
    first, start_of_columns = tl.load(tile), tl.program_id(1) * COLUMNS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)  # of the tile: 32 bits
    some_rows = (rows < tl.load(tile + 1) - first)[:, None]
    some_columns = (columns < width - start_of_columns)[None, :]
    base += first * base_row + start_of_columns
    out += first * out_row + start_of_columns
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for i in range(tl.load(tile + 2), tl.load(tile + 3)):
        term = terms + 6 * i
        u_row, v_row = tl.load(term + 2).to(tl.int32), tl.load(term + 3).to(tl.int32)
        rank, start = tl.load(term + 4).to(tl.int32), tl.load(term + 5)
        u = tl.load(term).to(tl.pointer_type(FACTOR)) + (first - start) * u_row
        v = tl.load(term + 1).to(tl.pointer_type(FACTOR)) + start_of_columns
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, rank, DEPTH):
            ranks = k + tl.arange(0, DEPTH)
            left = tl.load(u + (rows[:, None] * u_row + ranks[None, :]),
                           mask=some_rows & (ranks < rank)[None, :], other=0.0)  # fmt: skip
            right = tl.load(v + (ranks[:, None] * v_row + columns[None, :]),
                            mask=(ranks < rank)[:, None] & some_columns, other=0.0)  # fmt: skip
            product = tl.dot(left, right, product, input_precision=PRECISION)
        total += tl.load(scales + i) * product
    inside = some_rows & some_columns
    old = tl.load(base + (rows[:, None] * base_row + columns[None, :]), mask=inside, other=0.0)
    total += old.to(tl.float32)
    tl.store(out + (rows[:, None] * out_row + columns[None, :]), total.to(out.dtype.element_ty), mask=inside)
