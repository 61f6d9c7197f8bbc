"""MATH.md in plain PyTorch, one matrix at a time: what the batched operations are tested against (in
float64), and what runs on a device without kernels for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]


def reconstruct_reference(
    base: Mapping[str, Tensor], deltas: Sequence[Factors], scales: Sequence[float] | Tensor
) -> dict[str, Tensor]:
    """W = W0 + sum_n scale_n U_n V_n for every named matrix."""
    result = {}
    for name, weight in base.items():
        for factors, scale in zip(deltas, scales, strict=True):
            if name in factors:
                u, v = factors[name]
                weight = weight + scale * (u @ v)
        result[name] = weight
    return result


def low_rank_sum(
    out: Tensor,
    base: Tensor,
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float],
) -> None:
    """out = base + sum_i scale_i u_i v_i, each on its own rows from starts_i on; ``out`` may be ``base``.

    base, out (R,E); u_i (rows,r), v_i (r,E), any floating dtypes. Sums in float32 (float64 for float64).
    """
    sums = torch.float64 if base.dtype is torch.float64 else torch.float32
    total = out.copy_(base) if out.dtype is sums else base.to(sums)
    for left, right, start, scale in zip(u, v, starts, scales, strict=True):
        total[start : start + left.shape[0]].addmm_(left.to(sums), right.to(sums), alpha=scale)
    if total is not out:
        out.copy_(total)


def energy_rank_reference(singular_values: Tensor, energy: float) -> int:
    """The smallest rank whose singular values sum to at least ``energy`` of all; 0 for a zero matrix."""
    total = singular_values.sum()
    if total == 0:
        return 0
    reached = singular_values.cumsum(0) >= energy * total * (1 - 1e-12)
    return int(reached.nonzero()[0]) + 1


def compress_reference(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of (rows,E) of that rank: u = U_r diag(sigma_r), v = V_rᵀ, by LAPACK's SVD in
    float64.
    """
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]
