"""Tile shapes for short-context attention: one readable rule, no autotuning. Needs neither torch nor triton.

Tensor-core tiles are powers of two, the shapes of this project are not (77 keys; head dimensions 40, 80, 160). A
dimension is therefore covered by one or two power-of-two tiles, 77 by 64+16 and 40 by 32+16, instead of one of the
next power of two: 80 columns of arithmetic instead of 128, 48 instead of 64.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_TILE = 16  # the inner dimension of a 16-bit tensor-core product
MAX_KEYS = 128  # one key tile up to here; longer contexts loop over tiles
MAX_DIM = 256


class Config(NamedTuple):
    """Queries a block, and the launch options of Triton."""

    block: int
    num_warps: int
    num_stages: int


def split_dimension(size: int) -> tuple[int, ...]:
    """The cheapest cover of ``size`` by one or two power-of-two tiles of at least 16: 77 -> (64, 16), 24 -> (32,)."""
    whole = max(MIN_TILE, 1 << (size - 1).bit_length())
    half = whole // 2
    rest = max(MIN_TILE, 1 << max(size - half - 1, 0).bit_length())
    return (half, rest) if half >= MIN_TILE and half + rest < whole else (whole,)


def split_keys(n_keys: int) -> tuple[int, ...]:
    """The split of one key tile. More than 128 keys are dealt out evenly: 154 -> two times (64, 16)."""
    n_tiles = -(-n_keys // MAX_KEYS)
    return split_dimension(-(-n_keys // n_tiles))


def forward_config(n_keys: int, head_dim: int, itemsize: int, capability: int) -> Config:
    return Config(64, 4, 1)


def backward_config(n_keys: int, head_dim: int, itemsize: int, capability: int) -> Config:
    return Config(32, 4 if head_dim <= 80 else 8, 1)


def gram_config(head_dim: int, itemsize: int) -> Config:
    return Config(32, 4 if head_dim <= 80 else 8, 1)


def split_queries(n_queries: int, block: int, programs: int, processors: int) -> int:
    """Queries a program walks, a multiple of ``block``: as few chunks as give each multiprocessor two programs.

    ``programs`` is the number of programs without a split. Few heads and rows would leave most of the GPU idle
    (77 keys are one tile, so FlashAttention's split over keys gives nothing), many need no split at all.
    """
    n_blocks = -(-n_queries // block)
    chunks = min(n_blocks, max(1, -(-2 * processors // programs)))
    return -(-n_blocks // chunks) * block
