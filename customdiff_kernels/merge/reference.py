"""Custom Diffusion's eq. 4-5 as printed, in float64: what the solver is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_reference(
    base: Tensor, weights: Sequence[Tensor], targets: Sequence[Tensor], reg_features: Tensor
) -> Tensor:
    """W = W0 + vᵀd with d = C G⁻¹, vᵀ = (V - W0 Cᵀ)(d Cᵀ)⁻¹ and G = C_regᵀ C_reg; float64.

    base, weights: (R,E); targets: (s_n,E), independent rows; reg_features: (T,E) of full column rank.
    """
    w0, c_reg = base.double(), reg_features.double()
    c = torch.cat([t.double() for t in targets])  # (s,E)
    values = torch.cat([w.double() @ t.double().T for w, t in zip(weights, targets, strict=True)], 1)  # (R,s)
    gram = c_reg.T @ c_reg
    d = torch.linalg.solve(gram, c.T).T  # G is symmetric: (G⁻¹ Cᵀ)ᵀ = C G⁻¹
    v = torch.linalg.solve((d @ c.T).T, (values - w0 @ c.T).T).T
    return w0 + v @ d


def merge_lagrange_reference(
    base: Tensor, weights: Sequence[Tensor], targets: Sequence[Tensor], reg_features: Tensor
) -> Tensor:
    """The same minimum by its optimality system [[G, Cᵀ], [C, 0]] [ΔWᵀ; -λ] = [0; (V - W0 Cᵀ)ᵀ]: another
    route.
    """
    w0, c_reg = base.double(), reg_features.double()
    c = torch.cat([t.double() for t in targets])
    values = torch.cat([w.double() @ t.double().T for w, t in zip(weights, targets, strict=True)], 1)
    (s, e), gram = c.shape, c_reg.T @ c_reg
    system = torch.cat([torch.cat([gram, c.T], 1), torch.cat([c, c.new_zeros(s, s)], 1)])
    right = torch.cat([c.new_zeros(e, len(w0)), (values - w0 @ c.T).T])
    return w0 + torch.linalg.solve(system, right)[:e].T
