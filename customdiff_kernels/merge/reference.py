"""Custom Diffusion's eq. 4-5 as printed, in float64: what the solver is tested against; and the solver's
passes over the data in plain PyTorch, for devices without kernels for them.
"""

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


def residual(out: Tensor, base: Tensor, weight: Tensor, targets: Tensor) -> None:
    """out = (W_n - W0) C_nᵀ (R,s). base, weight (R,E), targets (s,E) of out's dtype."""
    torch.mm(weight.to(out.dtype) - base.to(out.dtype), targets.T, out=out)


def apply(
    out: Tensor, base: Tensor, weights: Sequence[Tensor], targets: Sequence[Tensor], basis: Tensor
) -> None:
    """out = W0 + [(W_n - W0) C_nᵀ]_n v (R,E), in the dtype of basis (Σs,E), rounded once; may be ``base``."""
    old = base.to(basis.dtype)
    change = [(w.to(basis.dtype) - old) @ t.T for w, t in zip(weights, targets, strict=True)]
    out.copy_(torch.addmm(old, torch.cat([old[:, :0], *change], 1), basis))


def gram(features: Tensor) -> Tensor:
    """C_regᵀ C_reg (E,E) float64 of features (T,E), symmetric to the last bit."""
    c_reg = features.double()
    product = c_reg.T @ c_reg
    return product.tril() + product.tril(-1).T
