"""One merge: its checked arguments, and the products with the weights that its steps need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from ..low_rank import LowRankDelta
from ..stack import KVStack
from .constraints import select


@dataclass
class Problem:
    """Concept n: ``names[n]``, its ``weights[n]`` and target ``features[n]`` (s_n,E) in the dtype of sums."""

    stack: KVStack
    names: list[str]
    weights: list[KVStack | LowRankDelta]
    features: list[Tensor]
    on_conflict: str
    tolerance: float

    def residual(self, n: int, features: Tensor) -> Tensor:
        """(W_n - W0) cᵀ for every row c of ``features``: (R,k). For factors, without ever forming W_n."""
        weights, sums = self.weights[n], _checks.sum_dtype(self.stack.weight.dtype)
        features = features.to(sums)
        if isinstance(weights, KVStack):
            return torch.ops.customdiff.merge_residual(self.stack.weight, weights.weight, features)
        changed = [s for s in self.stack.segments if s.name in weights.factors and weights.rank(s.name)]
        u = [weights.factors[s.name][0].to(sums) for s in changed]
        v = [weights.factors[s.name][1].to(sums) for s in changed]
        projected = _product(torch.cat(v), features).split([len(rows) for rows in v]) if v else []
        zero = features.new_zeros((self.stack.weight.shape[0], len(features)))
        return torch.ops.customdiff.reconstruct(zero, u, projected, [s.start for s in changed])

    def base_values(self, features: Tensor) -> Tensor:
        """W0 cᵀ for every row c: (R,k)."""
        sums = _checks.sum_dtype(self.stack.weight.dtype)
        return _product(self.stack.weight.to(sums), features.to(sums))

    def solve(self, factor: Tensor) -> tuple[list[Tensor], Tensor]:
        """Each concept's constraint features (k_n,E), and the basis that their residuals multiply."""
        with torch.no_grad():
            found = select(self, factor)
        features = torch.cat(self.features)[found.rows]
        basis, _ = torch.ops.customdiff.merge_basis(factor, features.double())
        shared = basis / found.shares[:, None]
        targets = [features[members] for members in found.members]
        return targets, torch.cat([shared[members] for members in found.members]).to(features.dtype)

    def check_out(self, out: KVStack, targets: Sequence[Tensor]) -> None:
        if not isinstance(out, KVStack) or out.segments != self.stack.segments:
            raise ValueError("out must be a KVStack with the segments of base")
        sources = [weights.weight for weights in self.weights if isinstance(weights, KVStack)]
        low_rank = [weights for weights in self.weights if isinstance(weights, LowRankDelta)]
        factors = [factor for delta in low_rank for pair in delta.factors.values() for factor in pair]
        tensors = (out.weight, self.stack.weight, *sources, *factors, *targets)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise ValueError("out= is not differentiable: leave it out, or call within torch.no_grad()")
        if any(_overlap(out.weight, weight) for weight in sources):
            raise ValueError("out must not share memory with the weights of a concept, which are still read")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory between the first and the last element of both meets."""
    (first, last), (start, stop) = (
        (
            t.data_ptr(),
            t.data_ptr()
            + t.element_size() * sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)),
        )
        for t in (a, b)
    )
    return first <= stop and start <= last


def _product(rows: Tensor, features: Tensor) -> Tensor:
    """rows featuresᵀ in their own dtype, whatever a surrounding autocast says."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ features.T
