"""Tile shapes for short-context attention: one readable rule, no autotuning. Needs neither torch nor triton.

Tensor-core tiles are powers of two, the shapes of this project are not (77 keys; head dimensions 40, 80,
160). A dimension is therefore covered by one or two power-of-two tiles, 77 by 64+16 and 40 by 32+16,
instead of one of the next power of two: 80 columns of arithmetic instead of 128, 48 instead of 64.

What bounds the choice is registers: every configuration is compiled for sm_80 and sm_90 by
tests/test_triton_compile.py and must not spill (docs/triton_resources.md). Nothing here was timed on a GPU
yet, so nothing depends on the architecture.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_TILE = 16  # the inner dimension of a 16-bit tensor-core product
MAX_KEYS = 128  # of one key tile
MAX_DIM = 256
GRAM_SLICE = 32  # rows of xᵀx a program sums


class Config(NamedTuple):
    """Tiles of the keys and of the head dimension, queries a block, and the launch options of Triton.

    ``reload``: the backward reads K and V for every block of queries instead of keeping them in registers.
    """

    keys: tuple[int, ...]
    dims: tuple[int, ...]
    block: int
    num_warps: int
    num_stages: int
    reload: bool = False


def split_dimension(size: int) -> tuple[int, ...]:
    """The cheapest cover of ``size`` by one or two powers of two from 16 on: 77 -> (64, 16), 24 -> (32,)."""
    whole = max(MIN_TILE, 1 << (size - 1).bit_length())
    half = whole // 2
    rest = max(MIN_TILE, 1 << max(size - half - 1, 0).bit_length())
    return (half, rest) if half >= MIN_TILE and half + rest < whole else (whole,)


def narrow_tiles(size: int, width: int) -> tuple[int, ...]:
    """Tiles of ``width`` and one power of two for the rest: 160 by 64 -> (64, 64, 32)."""
    rest = size % width
    return (width,) * (size // width) + ((max(MIN_TILE, 1 << (rest - 1).bit_length()),) if rest else ())


def split_keys(n_keys: int, limit: int) -> tuple[int, ...]:
    """The split of one key tile of at most ``limit``; more are dealt out evenly: 154 -> twice (64, 16)."""
    n_tiles = -(-n_keys // limit)
    while sum(split_dimension(-(-n_keys // n_tiles))) > limit:
        n_tiles += 1
    return split_dimension(-(-n_keys // n_tiles))


def forward_config(n_keys: int, dim: int, itemsize: int, n_rows: int, processors: int) -> Config:
    """One block of queries a program, all keys in registers. ``n_rows``: queries of all heads and batch rows.

    16 bits: a warp holds 16 queries, so the products are exact for any number of warps. 128 queries halve
    the reads of K and V (as large as q and o at 64), where registers suffice and every multiprocessor still
    gets two programs. float32: each operand is held as two tf32 halves, so blocks and key tiles shrink.
    """
    if itemsize == 4:
        return Config(split_keys(n_keys, 32), split_dimension(dim), 32 if dim <= 48 else 16, 4, 1)
    large = dim <= 96 and n_rows >= 2 * 128 * processors
    return Config(
        split_keys(n_keys, MAX_KEYS), split_dimension(dim), 128 if large else 64, 8 if large else 4, 1
    )


def backward_config(n_keys: int, dim: int, itemsize: int, biased: bool) -> Config:
    """K, V, dK and dV live in registers: 65,536 of them hold 80 keys at head dimension 160.

    Triton lays the warps of a chain of products along the rows or the columns as the last one is tall or
    wide. Along the rows, all warps would repeat the 16-key tile of dK and dV; hence few queries a block,
    and keys split until the last product (its key tile by the first tile of the head dimension) is wide.
    """
    dims = split_dimension(dim)
    if itemsize == 4:
        keys = split_keys(n_keys, 16)
        if dim > 128:
            return Config(keys, narrow_tiles(dim, 32), 16, 4, 2, reload=True)
        return Config(keys, dims, 32 if dim <= 64 else 16, 4, 2)
    keys = split_keys(n_keys, 80 if dim <= 160 else 48)
    if len(keys) == 1 and keys[0] // 2 < dims[0] <= keys[0]:
        keys = (keys[0] // 2, keys[0] // 2)
    block = 16 if biased or dim > 96 else 32
    return Config(keys, dims, block, 4 if dim <= 64 else 8, 2)


def bias_config(n_keys: int, dim: int, itemsize: int) -> Config:
    """Small tiles, pipelined through shared memory (two stages), since K and V change with every head."""
    dims = narrow_tiles(dim, 64) if itemsize == 4 and dim > 128 else split_dimension(dim)
    return Config(split_keys(n_keys, 32), dims, 16, 4, 2)


def gram_config(dim: int, itemsize: int) -> Config:
    return Config((), split_dimension(dim), 64 if itemsize == 2 else 16, 4, 2)


def split_queries(n_queries: int, block: int, programs: int, processors: int) -> int:
    """Queries a program walks, a multiple of ``block``: as few chunks as give a multiprocessor two programs.

    ``programs`` is the number of programs without a split. Few heads and rows would leave most of the GPU
    idle (77 keys are one tile, so FlashAttention's split over keys gives nothing), many need no split at
    all.
    """
    n_blocks = -(-n_queries // block)
    chunks = min(n_blocks, max(1, -(-2 * processors // programs)))
    return -(-n_blocks // chunks) * block
