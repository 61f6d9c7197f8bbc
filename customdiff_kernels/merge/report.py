"""``MergeReport``: how well a merge came out, measured on the weights or factors that it gave."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..low_rank import LowRankDelta
from ..stack import KVStack
from .constraints import Solution
from .problem import Problem


@dataclass
class MergeReport:
    """How well a merge came out.

    residual: {concept: (s_n,)} ‖Ŵc - W_n c‖ / ‖W_n c‖ at each target row given, dropped ones included.
    drift: ‖(Ŵ - W0)C_regᵀ‖_F / ‖W0 C_regᵀ‖_F, what the merge changed on the regularisation features.
    concept_drift: {concept: the same of W_n}, for comparison.
    gram_condition, constraint_condition: 2-norm conditions of G (ridge included) and of S = C G⁻¹ Cᵀ.
    ridge: share of the mean diagonal of G that was added to it.
    dropped: {concept: target rows that made no constraint of their own}: equal to or in the span of others.
    merged: what was measured.
    """

    residual: dict[str, Tensor]
    drift: float
    concept_drift: dict[str, float]
    gram_condition: float
    constraint_condition: float
    ridge: float
    dropped: dict[str, list[int]]
    merged: KVStack | LowRankDelta = field(repr=False)


def measure(
    problem: Problem, solution: Solution, merged: KVStack | LowRankDelta, factor: Tensor, ridge: float
) -> MergeReport:
    """``factor`` is L, by which ‖ΔW C_regᵀ‖_F = ‖ΔW L‖_F; no (R,E) matrix is made."""
    answer = Problem(problem.stack, ["merged"], [merged], [], [])
    residual = {}
    for n, (name, features) in enumerate(zip(problem.names, problem.features, strict=True)):
        asked = problem.residual(n, features)
        size = (problem.base_values(features) + asked).norm(dim=0)
        residual[name] = (answer.residual(0, features) - asked).norm(dim=0) / size
    size = problem.base_norm(factor)
    return MergeReport(
        residual=residual,
        drift=answer.change_norm(0, factor) / size,
        concept_drift={name: problem.change_norm(n, factor) / size for n, name in enumerate(problem.names)},
        gram_condition=float(torch.linalg.cond(factor)) ** 2,
        constraint_condition=float(torch.linalg.cond(solution.r)) ** 2,
        ridge=ridge,
        dropped=dict(zip(problem.names, solution.dropped, strict=True)),
        merged=merged,
    )
