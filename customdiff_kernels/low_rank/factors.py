"""Factors as the GPU's kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def alike(u: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """All in one dtype, float32 where they differ, and with contiguous rows; copied where they are not."""
    dtypes = {factor.dtype for factor in (*u, *v)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def row_major(factors: Sequence[Tensor]) -> list[Tensor]:
        cast = [factor if factor.dtype is dtype else factor.to(dtype) for factor in factors]
        return [
            factor if factor.stride(1) == 1 or factor.shape[1] < 2 else factor.contiguous() for factor in cast
        ]

    return row_major(u), row_major(v)
