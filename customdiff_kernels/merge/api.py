"""``MergeSolver``: several concepts in one set of weights, in closed form (Custom Diffusion, eq. 4-5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from .. import _checks
from ..low_rank import LowRankDelta
from ..stack import KVStack, as_stack
from . import constraints, gram, ops
from .problem import Problem

Base = TypeVar("Base", bound=Mapping[str, Tensor])
Weights = Mapping[str, Tensor] | LowRankDelta
Concepts = Sequence[tuple[Weights, Tensor]] | Mapping[str, tuple[Weights, Tensor]]


@dataclass
class MergeReport:
    """How well a merge came out.

    residual: {concept: (s_n,)} ‖Ŵc - W_n c‖ / ‖W_n c‖ at each target row given, dropped ones included.
    drift: ‖(Ŵ - W0)C_regᵀ‖_F / ‖W0 C_regᵀ‖_F, what the merge changed on the regularisation features.
    concept_drift: {concept: the same of W_n}, for comparison.
    gram_condition, constraint_condition: 2-norm conditions of G (ridge included) and of S = C G⁻¹ Cᵀ.
    ridge: share of the mean diagonal of G that was added to it.
    dropped: {concept: target rows that made no constraint of their own}: equal to or in the span of others.
    """

    residual: dict[str, Tensor]
    drift: float
    concept_drift: dict[str, float]
    gram_condition: float
    constraint_condition: float
    ridge: float
    dropped: dict[str, list[int]]


class MergeSolver:
    """min ‖(Ŵ - W0)C_regᵀ‖_F subject to Ŵ c = W_n c at every target feature c of every concept n.

    Custom Diffusion (Kumari et al., 2023), eq. 4-5: Ŵ = W0 + vᵀ d, in closed form.

    reg_features: (T,E) text features of the regularisation captions (the paper: about 1000), any floating
        dtype. Their G = C_regᵀ C_reg is factored here, once, in float64, and serves every merge on this base
        model.
    ridge: added to G as a share of its mean diagonal; "auto" takes the smallest that brings its condition to
        1e12 (0 where it is better already). ``solver.ridge`` is what was added.

    Raises SingularRegularizationError where the features leave directions of the text width undetermined.
    """

    def __init__(self, reg_features: Tensor, *, ridge: float | str = 0.0):
        _features("reg_features", reg_features)
        if reg_features.requires_grad:
            raise ValueError("reg_features is not differentiated: give reg_features.detach()")
        if ridge != "auto" and not (isinstance(ridge, (int, float)) and 0 <= ridge < math.inf):
            raise ValueError(f"ridge must be a number of at least 0 or 'auto', got {ridge!r}")
        matrix = gram.gram(reg_features)
        _finite("reg_features", matrix.diagonal())  # as they are: a pass over E numbers and not over T·E
        self.factor, self.ridge = gram.factorize(matrix, len(reg_features), ridge)

    def merge(
        self,
        base: Mapping[str, Tensor],
        concepts: Concepts,
        *,
        on_conflict: str = "error",
        tolerance: float = 1e-3,
    ) -> LowRankDelta:
        """The change Ŵ - W0 as factors of rank at most the number of target rows, float32 (float64 for
        float64).

        base: ``KVStack`` (the fast path) or {name: (rows,E)}, which is stacked first.
        concepts: [(weights, target_features (s_n,E)), ...] or {name: (weights, target_features)}; weights are
            a full ``KVStack`` or {name: tensor}, or a ``LowRankDelta`` from ``base``. Targets are the text
            features of the concept's captions at every token after the start token, padding included (it is
            attended to): ``context[:, 1:].flatten(0, 1)``.
        on_conflict: what to do at a feature that several concepts have (captions that begin alike) with
            different values: "error" names the token rows, "average" takes the mean value, "drop" leaves the
            feature to the regularisation.
        tolerance: features nearer than this share of their norm are one feature, values likewise.

        Differentiable in base, weights and target features.
        Raises ConflictingConstraintsError where constraints contradict each other, ValueError for bad input.
        """
        stack, problem = self._problem(base, concepts, on_conflict, tolerance)
        targets, basis = problem.solve(self.factor)
        columns = [problem.residual(n, t) for n, t in enumerate(targets)]
        u = torch.cat(columns, 1)
        return LowRankDelta(stack.segments, {name: (u[a:b], basis) for name, a, b in stack.segments})

    def apply(
        self,
        base: Base,
        concepts: Concepts,
        *,
        on_conflict: str = "error",
        tolerance: float = 1e-3,
        out: KVStack | None = None,
    ) -> Base:
        """The merged weights Ŵ themselves, of ``base``'s type and dtype, in one pass over the rows.

        Arguments as for ``merge``. out: a ``KVStack`` to write to (``base`` itself for in place); then
        nothing is allocated and nothing differentiable.
        """
        stack, problem = self._problem(base, concepts, on_conflict, tolerance)
        targets, basis = problem.solve(self.factor)
        if out is not None:
            problem.check_out(out, targets)
        full = [weights.weight for weights in problem.weights if isinstance(weights, KVStack)]
        if len(full) == len(problem.weights):
            if out is not None:
                torch.ops.customdiff.merge_apply_out(out.weight, stack.weight, full, targets, basis)
                return cast(Base, out)
            weight = torch.ops.customdiff.merge_apply(stack.weight, full, targets, basis)
        else:
            u = torch.cat([problem.residual(n, t) for n, t in enumerate(targets)], 1).split(ops.BLOCK_ROWS)
            starts = list(range(0, stack.weight.shape[0], ops.BLOCK_ROWS))
            if out is not None:
                torch.ops.customdiff.reconstruct_out(out.weight, stack.weight, u, [basis] * len(u), starts)
                return cast(Base, out)
            weight = torch.ops.customdiff.reconstruct(stack.weight, u, [basis] * len(u), starts)
        merged = KVStack(weight, stack.segments)
        return cast(Base, merged if isinstance(base, KVStack) else dict(merged))

    def report(
        self,
        base: Mapping[str, Tensor],
        concepts: Concepts,
        merged: Weights,
        *,
        on_conflict: str = "error",
        tolerance: float = 1e-3,
    ) -> MergeReport:
        """Measure ``merged`` (what ``merge`` or ``apply`` returned for the same arguments) against what was
        asked.
        """
        with torch.no_grad():
            stack, problem = self._problem(base, concepts, on_conflict, tolerance)
            selected = constraints.select(problem, self.factor)
            _, r = torch.ops.customdiff.merge_basis(
                self.factor, torch.cat(problem.features)[selected.rows].double()
            )
            answer = Problem(stack, ["merged"], [_weights("merged", merged, stack)], [], "error", tolerance)
            residual = {}
            for n, (name, features) in enumerate(zip(problem.names, problem.features, strict=True)):
                asked = problem.residual(n, features)
                norm = (problem.base_values(features) + asked).norm(dim=0)
                residual[name] = (answer.residual(0, features) - asked).norm(dim=0) / norm
            root = self.factor.to(_checks.sum_dtype(stack.weight.dtype))  # ‖ΔW C_regᵀ‖_F = ‖ΔW L‖_F
            size = float(problem.base_values(root.T).norm())
            return MergeReport(
                residual=residual,
                drift=float(answer.residual(0, root.T).norm()) / size,
                concept_drift={
                    name: float(problem.residual(n, root.T).norm()) / size
                    for n, name in enumerate(problem.names)
                },
                gram_condition=float(torch.linalg.cond(self.factor)) ** 2,
                constraint_condition=float(torch.linalg.cond(r)) ** 2,
                ridge=self.ridge,
                dropped=dict(zip(problem.names, selected.dropped, strict=True)),
            )

    def _problem(
        self, base: Mapping[str, Tensor], concepts: Concepts, on_conflict: str, tolerance: float
    ) -> tuple[KVStack, Problem]:
        """Check the arguments; the concepts in the base's order, their features in the dtype of sums."""
        stack = as_stack("base", base)
        width = self.factor.shape[0]
        if stack.weight.shape[1] != width:
            raise ValueError(f"base has text width {stack.weight.shape[1]}, reg_features have {width}")
        _checks.same_device("base", stack.weight, "reg_features", self.factor)
        if on_conflict not in constraints.ON_CONFLICT:
            raise ValueError(f"on_conflict must be one of {constraints.ON_CONFLICT}, got {on_conflict!r}")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
        if not isinstance(concepts, (Mapping, Sequence)):
            raise TypeError(
                "concepts must be a list or mapping of (weights, target_features), "
                f"got {type(concepts).__name__}"
            )
        named = (
            concepts if isinstance(concepts, Mapping) else {f"concept {n}": c for n, c in enumerate(concepts)}
        )
        if not named:
            raise ValueError("concepts must hold at least one (weights, target_features), got none")
        weights, features = [], []
        for name, concept in named.items():
            if not isinstance(concept, Sequence) or len(concept) != 2:
                raise TypeError(
                    f"{name} must be a pair (weights, target_features), got {type(concept).__name__}"
                )
            weights.append(_weights(f"{name} weights", concept[0], stack))
            argument = f"{name} target_features"
            _features(argument, concept[1])
            _finite(argument, concept[1])
            _checks.shape(argument, concept[1], (len(concept[1]), width), "(s,E) to go with reg_features")
            _checks.same_device(argument, concept[1], "base", stack.weight)
            features.append(concept[1].to(_checks.sum_dtype(stack.weight.dtype)))
        return stack, Problem(stack, list(named), weights, features, on_conflict, tolerance)


def _features(argument: str, features: Tensor) -> None:
    _checks.is_tensor(argument, features)
    _checks.floating(argument, features)
    _checks.rank(argument, features, "rows,E")
    if 0 in features.shape:
        raise ValueError(f"{argument} must have at least one row, got shape {tuple(features.shape)}")


def _finite(argument: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{argument} is not finite")


def _weights(argument: str, weights: Weights, base: KVStack) -> KVStack | LowRankDelta:
    if not isinstance(weights, LowRankDelta):
        return as_stack(argument, weights, like=base)
    for name, (u, v) in weights.factors.items():
        if name not in base:
            raise ValueError(
                f"{argument} has the unknown segment {name!r}; the base has e.g. {next(iter(base))!r}"
            )
        _checks.shape(f"{argument}[{name!r}]", u, (len(base[name]), u.shape[1]), "(rows of the base, rank)")
        _checks.shape(f"{argument}[{name!r}]", v, (v.shape[0], base.weight.shape[1]), "(rank, E of the base)")
        _checks.same_device(argument, u, "base", base.weight)
    return weights
