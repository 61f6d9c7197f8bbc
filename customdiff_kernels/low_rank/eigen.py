"""The largest eigenvectors of symmetric matrices on the CPU, compiled (``csrc/cpu/eigen.h``), in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._native import describe, module


class Eigen(NamedTuple):
    """One matrix (k,k), reduced: ``reflectors`` (k-1,k-1) and ``numbers`` (4,k) as the native code leaves
    them.
    """

    reflectors: Tensor
    numbers: Tensor

    @property
    def values(self) -> Tensor:
        """All eigenvalues (k,), descending."""
        return self.numbers[3]

    def vectors(self, count: int) -> Tensor:
        """Eigenvectors (k,count) of the largest eigenvalues. Those of equal ones may lie in each other's
        span: the caller looks whether they are orthonormal.
        """
        size = self.numbers.shape[1]
        found = torch.empty((count, size))
        native = module()
        native.tridiagonal_vectors(
            describe(native, self.numbers[None, None]),
            describe(native, found[None, None]),
            torch.get_num_threads(),
        )
        tau = self.numbers[2, : size - 1].contiguous()
        rotated = torch.ormqr(self.reflectors.mT, tau, found[:, 1:].mT)
        return torch.cat([rotated.flip(0), found[None, :, 0]])  # the native order of rows is the reverse


def symmetric_eigen(matrices: Tensor) -> list[Eigen]:
    """``matrices`` (G,k,k) float32, k at least 2, of which the lower triangles are read."""
    count, size, _ = matrices.shape
    reflectors = torch.empty((count, 1, size - 1, size - 1))
    numbers = torch.empty((count, 1, 4, size))
    native = module()
    native.symmetric_eigenvalues(
        describe(native, matrices.contiguous()[:, None]),
        describe(native, reflectors),
        describe(native, numbers),
        torch.get_num_threads(),
    )
    return [Eigen(*pair) for pair in zip(reflectors[:, 0], numbers[:, 0], strict=True)]
