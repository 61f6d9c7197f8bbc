"""``MergeSolver``: several concepts in one set of weights, in closed form (Custom Diffusion, eq. 4-5)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from ..low_rank import LowRankDelta
from ..stack import KVStack, as_stack
from . import constraints, gram, ops, storage  # noqa: F401  ops registers torch.ops.customdiff.*
from .problem import Concepts, Problem, Weights, check_features, check_finite, checked_weights
from .report import MergeReport, measure

Base = TypeVar("Base", bound=Mapping[str, Tensor])


class MergeSolver:
    """min ‖(Ŵ - W0)C_regᵀ‖_F subject to Ŵ c = W_n c at every target feature c of every concept n.

    Custom Diffusion (Kumari et al., 2023), eq. 4-5: Ŵ = W0 + vᵀ d, in closed form.

    reg_features: (T,E) text features of the regularisation captions (the paper: about 1000), any floating
        dtype. Their G = C_regᵀ C_reg is factored here, once, in float64, and serves every merge on this base
        model; ``save`` keeps it.
    ridge: added to G as a share of its mean diagonal; "auto" takes the smallest that brings its condition to
        1e12 (0 where it is better already). ``solver.ridge`` is what was added.

    Raises SingularRegularizationError where the features leave directions of the text width undetermined.
    """

    factor: Tensor  # L (E,E) float64
    ridge: float
    rows: int  # T

    def __init__(self, reg_features: Tensor, *, ridge: float | str = 0.0):
        check_features("reg_features", reg_features)
        if reg_features.requires_grad:
            raise ValueError("reg_features is not differentiated: give reg_features.detach()")
        if ridge != "auto" and not (isinstance(ridge, numbers.Real) and 0 <= ridge < math.inf):
            raise ValueError(f"ridge must be a number of at least 0 or 'auto', got {ridge!r}")
        matrix = gram.gram(reg_features)
        check_finite("reg_features", matrix.diagonal())  # as they are: a pass over E numbers and not over T·E
        self.rows = len(reg_features)
        factor, self.ridge = gram.factorize(matrix, self.rows, ridge)
        self.factor = factor.contiguous()  # by rows, as a file has it: the same bits from a loaded one

    def save(self, path: str | PathLike[str], *, key: Mapping[str, str] | None = None) -> Path:
        """Write the factor to a safetensors file, atomically; returns the path.

        key: by what the factor is known again, e.g. {"text encoder": a hash of its weights, "captions": a
            hash of them}. The UNet does not matter: one factor serves all that read the same text encoder.
        """
        path = Path(path)
        storage.write(path, self.factor, self.ridge, self.rows, key or {})
        return path

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        key: Mapping[str, str] | None = None,
        device: str | torch.device = "cpu",
    ) -> MergeSolver:
        """The solver that ``save`` wrote, with the same bits.

        key: what the file must have been saved with; entries that are not named here are not compared.
        Raises FileNotFoundError, or MergeFactorFileError where the file is damaged, truncated, or of another
        key.
        """
        solver = cls.__new__(cls)
        factor, solver.ridge, solver.rows = storage.read(Path(path), key or {})
        solver.factor = factor.to(device)
        return solver

    def merge(
        self,
        base: Mapping[str, Tensor],
        concepts: Concepts,
        *,
        on_conflict: str = "error",
        tolerance: float = 1e-3,
    ) -> LowRankDelta:
        """The change Ŵ - W0 as factors, float32 (float64 for float64), of rank at most the number of target
        rows, or of the low-rank concepts' ranks where they are fewer.

        base: ``KVStack`` (the fast path) or {name: (rows,E)}, which is stacked first.
        concepts: [(weights, target_features (s_n,E)), ...] or {name: (weights, target_features)}; weights are
            a full ``KVStack`` or {name: tensor}, or a ``LowRankDelta`` from ``base``, of which W_n is never
            formed. Targets are the text features of the concept's captions at every token after the start
            token, padding included (it is attended to): ``context[:, 1:].flatten(0, 1)``. A third member,
            the texts of these s_n tokens, lets errors name words instead of rows.
        on_conflict: what to do at a feature that several concepts have (captions that begin alike) with
            different values: "error" names the tokens, "average" takes the mean value, "drop" leaves the
            feature to the regularisation.
        tolerance: features nearer than this share of their norm are one feature, values likewise.

        Differentiable in base, weights and target features. Warns where the targets leave less than a tenth
        of the text width free.
        Raises ConflictingConstraintsError where constraints contradict each other, ValueError for bad input.
        """
        problem = Problem.checked(base, concepts, self.factor, on_conflict, tolerance)
        return self._merge(problem, constraints.solve(problem, self.factor))

    def merge_many(
        self,
        base: Mapping[str, Tensor],
        merges: Sequence[Concepts],
        *,
        on_conflict: str = "error",
        tolerance: float = 1e-3,
    ) -> list[LowRankDelta]:
        """``merge`` of each of several choices of concepts on one base."""
        if not isinstance(merges, Sequence):
            raise TypeError(f"merges must be a list of what merge takes, got {type(merges).__name__}")
        stack = as_stack("base", base)
        return [
            self.merge(stack, concepts, on_conflict=on_conflict, tolerance=tolerance) for concepts in merges
        ]

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
        problem = Problem.checked(base, concepts, self.factor, on_conflict, tolerance)
        solution = constraints.solve(problem, self.factor)
        stack = problem.stack
        if out is not None:
            problem.check_out(out, solution)
        full = [weights.weight for weights in problem.weights if isinstance(weights, KVStack)]
        if len(full) == len(problem.weights):
            basis = torch.cat(solution.basis).to(problem.sums)
            if out is not None:
                torch.ops.customdiff.merge_apply_out(out.weight, stack.weight, full, solution.targets, basis)
                return cast(Base, out)
            weight = torch.ops.customdiff.merge_apply(stack.weight, full, solution.targets, basis)
        else:
            (u, v), starts = problem.change(solution), [start for _, start, _ in stack.segments]
            if out is not None:
                torch.ops.customdiff.reconstruct_out(out.weight, stack.weight, u, v, starts)
                return cast(Base, out)
            weight = torch.ops.customdiff.reconstruct(stack.weight, u, v, starts)
        merged = KVStack(weight, stack.segments)
        return cast(Base, merged if isinstance(base, KVStack) else dict(merged))

    def report(
        self,
        base: Mapping[str, Tensor],
        concepts: Concepts,
        merged: Weights | None = None,
        *,
        on_conflict: str = "error",
        tolerance: float = 1e-3,
    ) -> MergeReport:
        """Measure ``merged`` (what ``merge`` or ``apply`` returned for the same arguments) against what was
        asked; without it what ``merge`` would return, as ``report.merged``, solved for once.
        """
        with torch.no_grad():
            problem = Problem.checked(base, concepts, self.factor, on_conflict, tolerance)
            solution = constraints.solve(problem, self.factor)
            if merged is None:
                merged = self._merge(problem, solution)
            found = checked_weights("merged", merged, problem.stack)
            return measure(problem, solution, found, self.factor, self.ridge)

    def _merge(self, problem: Problem, solution: constraints.Solution) -> LowRankDelta:
        segments, (u, v) = problem.stack.segments, problem.change(solution)
        return LowRankDelta(
            segments, {s.name: pair for s, pair in zip(segments, zip(u, v, strict=True), strict=True)}
        )
