"""The merge's passes over the data on the CPU, compiled (``csrc/cpu``): any floating dtypes and strides. The
results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native


def residual(out: Tensor, base: Tensor, weight: Tensor, targets: Tensor) -> None:
    """out = (W_n - W0) C_nᵀ (R,s). base, weight (R,E), targets (s,E)."""
    native = _native.module()
    call = _native.merge(native, out, base, [weight], [targets], None)
    native.merge_residual(call, torch.get_num_threads())


def apply(
    out: Tensor, base: Tensor, weights: Sequence[Tensor], targets: Sequence[Tensor], basis: Tensor
) -> None:
    """out = W0 + [(W_n - W0) C_nᵀ]_n v (R,E), rounded once; may be ``base``. basis (Σs,E).

    Each row of every matrix is read once, and the result written once.
    """
    native = _native.module()
    call = _native.merge(native, out, base, weights, targets, basis)
    native.merge_apply(call, torch.get_num_threads())


def gram(features: Tensor) -> Tensor:
    """C_regᵀ C_reg (E,E) float64 of features (T,E), symmetric to the last bit."""
    native = _native.module()
    width = features.shape[1]
    out = torch.empty((width, width), dtype=torch.float64)
    described = (_native.describe_matrix(native, tensor) for tensor in (features, out))
    native.gram(*described, torch.get_num_threads())
    return out
