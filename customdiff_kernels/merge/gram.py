"""G = C_regᵀ C_reg and its Cholesky factor, in float64: the E×E work, once per base model and captions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backends

SUSPICIOUS_PIVOT = (
    1e-10  # share of a feature that the ones before it leave unexplained; below, the rank is counted
)
SAFE_CONDITION = 1e12  # what ridge="auto" brings G to


class SingularRegularizationError(ValueError):
    """The regularisation features do not determine the least-squares problem. ``rank`` of ``width`` was
    found.
    """

    def __init__(self, rank: int, width: int, rows: int):
        self.rank, self.width = rank, width
        super().__init__(
            f"reg_features ({rows} rows) have only {rank} independent directions of the text width "
            f"E={width}: "
            "give features of more and more varied captions (the paper takes about 1000), or a small ridge, "
            "e.g. ridge=1e-6, or ridge='auto' for the smallest that makes it solvable"
        )


def gram(features: Tensor) -> Tensor:
    """C_regᵀ C_reg (E,E) float64 of features (T,E)."""
    return _backends.for_weights("merge", features=features).gram(features)


def factorize(matrix: Tensor, rows: int, ridge: float | str) -> tuple[Tensor, float]:
    """(L, ridge) with L Lᵀ = G + ridge · (tr G / E) · I. Raises SingularRegularizationError where singular.

    The cheap sign of trouble is a small pivot; only then the eigenvalues are computed and the rank counted.
    """
    width = matrix.shape[0]
    mean = matrix.diagonal().mean()
    if isinstance(ridge, str):  # "auto"
        values = torch.linalg.eigvalsh(matrix)
        needed = (values[-1] / SAFE_CONDITION - values[0]).clamp(min=0) / mean
        ridge = float(needed) * 1.01  # the hundredth covers the rounding of the smallest eigenvalue
    if not (mean > 0):
        raise SingularRegularizationError(0, width, rows)
    matrix = matrix + ridge * mean * torch.eye(width, dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info == 0 and (factor.diagonal().square() / matrix.diagonal()).min() > SUSPICIOUS_PIVOT:
        return factor, float(ridge)
    values = torch.linalg.eigvalsh(matrix)
    rank = int((values > values[-1] * width * torch.finfo(torch.float64).eps).sum())
    if info != 0 or rank < width:
        raise SingularRegularizationError(min(rank, width - 1), width, rows)
    return factor, float(ridge)
