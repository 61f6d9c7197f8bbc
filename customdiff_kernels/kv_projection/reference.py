"""The specification in plain PyTorch, in the symbols of MATH.md; autograd, float64 capable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cross_attention.reference import cross_attention_reference


def kv_project_reference(c: Tensor, w: Tensor, frozen_tokens: int = 0) -> Tensor:
    """kv = c Wᵀ (B,S,R), with the first ``frozen_tokens`` tokens' keys and values detached."""
    kv = c @ w.T
    return torch.cat([kv[:, :frozen_tokens].detach(), kv[:, frozen_tokens:]], 1)


def kv_cross_attention_reference(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_o: Tensor,
    b: Tensor | None = None,
    *,
    heads: int,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """y = attention(x W_qᵀ, K, V) W_oᵀ + b (B,N,C); ``bias`` dense. No gradient reaches w_q, w_o, b."""
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (x @ w_q.detach().T, k, v))
    a = cross_attention_reference(q, k, v, bias, scale=scale).transpose(1, 2).flatten(2)
    y = a @ w_o.detach().T
    return y if b is None else y + b.detach()
