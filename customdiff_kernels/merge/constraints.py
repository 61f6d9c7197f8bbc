"""Which target rows become constraints, and the basis v of the answer: equal rows count once, dependent ones
not at all, contradicting ones are refused.

A causal text encoder gives prompts that begin alike the same features there, and padding repeats; so C has
equal rows, and S = C G⁻¹ Cᵀ would be singular with them. What is decided here is in MATH.md, "Degenerate
constraints".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .problem import Problem

INDEPENDENT = 1e-6  # share of a row (in the G⁻¹ norm) that must lie outside the span of the rows before it
CROWDED = 0.9  # share of the text width that constraints may take before a warning
ON_CONFLICT = ("error", "average", "drop")


class Conflict(NamedTuple):
    """Row ``row`` of ``concept`` asks for another value than row ``other_row`` of ``other`` at the same
    feature. ``token``, ``other_token``: their texts, where the concepts gave them.
    """

    concept: str
    row: int
    other: str
    other_row: int
    difference: float  # of the values, relative to the larger
    token: str | None = None
    other_token: str | None = None

    def __str__(self) -> str:
        this = _named(self.concept, self.row, self.token)
        other = _named(self.other, self.other_row, self.other_token)
        return f"{this} and {other} (values {self.difference:.1%} apart)"


def _named(concept: str, row: int, token: str | None) -> str:
    return f"{concept} row {row}" if token is None else f'"{token}" of {concept} (row {row})'


class ConflictingConstraintsError(ValueError):
    """Concepts ask for different values at the same target feature. ``conflicts`` lists the pairs of token
    rows.
    """

    def __init__(self, conflicts: Sequence[Conflict], remedy: str):
        self.conflicts = tuple(conflicts)
        shown = "; ".join(str(c) for c in self.conflicts[:4])
        more = f"; and {len(conflicts) - 4} more" if len(conflicts) > 4 else ""
        super().__init__(f"the concepts' constraints contradict each other: {shown}{more}. {remedy}")


@dataclass
class Solution:
    """What a merge needs beside the weights: Ŵ = W0 + Σ_n (W_n - W0) targets[n]ᵀ basis[n].

    targets[n]: (k_n,E) the constraints that concept n has a say in, in the dtype of sums. basis[n]: (k_n,E)
        float64.
    r: (k,k) float64 with rᵀr = S of all k constraints.
    dropped[n]: rows of concept n that make no constraint of their own.
    """

    targets: list[Tensor]
    basis: list[Tensor]
    r: Tensor
    dropped: list[list[int]]


# asked[j][n]: the first row of concept n that coincides with row j, the first of all rows with that feature.
# Rows are counted over all concepts, put end to end.
Asked = dict[int, dict[int, int]]


def solve(problem: Problem, factor: Tensor) -> Solution:
    """Decide which of the problem's target rows become constraints and solve for their basis; ``factor`` is L
    (E,E) float64. Differentiable in the target features; what is decided is not.
    """
    features = torch.cat(problem.features)
    rows = features.detach().double()
    origin = [(n, i) for n, given in enumerate(problem.features) for i in range(len(given))]
    with torch.no_grad():
        asked = _asked(problem, rows, origin)
    kept, sure = list(asked), False
    if len(kept) <= rows.shape[1]:
        basis, r = _basis(factor, features, kept)
        sure = bool((r.diagonal().abs() > INDEPENDENT * r.norm(dim=0)).all())  # NaN for dependent rows: no
    if not sure:
        with torch.no_grad():
            kept = _independent(problem, factor, rows, origin, asked)
        basis, r = _basis(factor, features, kept)
    _warn_if_crowded(len(kept), rows.shape[1])
    if len(kept) == len(rows):  # as most often: every row is a constraint of its own concept
        counts = [len(given) for given in problem.features]
        return Solution(problem.features, list(basis.split(counts)), r, [[] for _ in counts])
    shares = torch.tensor([[len(asked[j])] for j in kept], dtype=torch.float64, device=rows.device)
    shared = basis / shares
    members = [[k for k, j in enumerate(kept) if n in asked[j]] for n in range(len(problem.features))]
    sources = {i for j in kept for i in asked[j].values()}
    dropped: list[list[int]] = [[] for _ in problem.features]
    for i, (n, row) in enumerate(origin):
        if i not in sources:
            dropped[n].append(row)
    targets = [features[[kept[k] for k in concept]] for concept in members]
    return Solution(targets, [shared[concept] for concept in members], r, dropped)


def _basis(factor: Tensor, features: Tensor, kept: list[int]) -> tuple[Tensor, Tensor]:
    chosen = features if len(kept) == len(features) else features[kept]
    return torch.ops.customdiff.merge_basis(factor, chosen.double())


def _warn_if_crowded(constraints: int, width: int) -> None:
    if constraints > CROWDED * width:
        warnings.warn(
            f"{constraints} target features leave {width - constraints} of the {width} directions of the "
            "text width E free, too few to keep other captions as they are: give fewer or shorter target "
            "captions, or merge fewer concepts",
            stacklevel=4,
        )


def _asked(problem: Problem, rows: Tensor, origin: list[tuple[int, int]]) -> Asked:
    """The distinct target features and who asks for a value there, by ``on_conflict``."""
    asked: Asked = {}
    for i, j in enumerate(coincident(rows, problem.tolerance).tolist()):
        asked.setdefault(j, {}).setdefault(origin[i][0], i)
    shared = [j for j, by_concept in asked.items() if len(by_concept) > 1]
    if shared and problem.on_conflict == "drop":
        _drop(problem, asked, shared)
    elif shared and problem.on_conflict == "error":
        _check_shared(problem, rows, origin, asked, shared)
        for j in shared:  # they agree: the first speaks for all
            asked[j] = dict([next(iter(asked[j].items()))])
    return asked


def _independent(
    problem: Problem, factor: Tensor, rows: Tensor, origin: list[tuple[int, int]], asked: Asked
) -> list[int]:
    """The distinct features that are in nobody's span; the others must ask for nothing new."""
    candidates = list(asked)
    whitened = torch.linalg.solve_triangular(factor, rows[candidates].T, upper=False)
    kept = [candidates[i] for i in independent(whitened)]
    if not kept:
        raise ValueError("target_features are all zero: they constrain nothing")
    dependent = [j for j in candidates if j not in set(kept)]
    if dependent and len({n for by_concept in asked.values() for n in by_concept}) > 1:
        _check_dependent(problem, factor, rows, origin, asked, kept, dependent)
    return kept


def coincident(rows: Tensor, tolerance: float) -> Tensor:
    """(s,) the first row that each row coincides with: nearer than ``tolerance`` of the larger norm."""
    squares = rows.square().sum(1)
    distance = squares[:, None] + squares[None] - 2 * (rows @ rows.T)
    limit = max(tolerance, 1e-7) ** 2  # 1e-7: what a squared distance in float64 can tell from zero
    close = distance <= limit * torch.maximum(squares[:, None], squares[None])
    close.fill_diagonal_(True)
    first = close.to(torch.uint8).argmax(1)
    while not torch.equal(first, first[first]):  # a chain of near neighbours is one feature
        first = first[first]
    return first


def independent(columns: Tensor) -> list[int]:
    """Indices of the columns (E,k) that lie outside the span of those before them, by ``INDEPENDENT``:
    Gram-Schmidt, twice, skipping what is dependent. Rare, and k is a few hundred at most.
    """
    kept: list[int] = []
    q = torch.zeros((columns.shape[0], min(columns.shape)), dtype=columns.dtype, device=columns.device)
    for i, norm in enumerate(columns.norm(dim=0).tolist()):
        rest, found = columns[:, i], len(kept)
        for _ in range(2):
            rest = rest - q[:, :found] @ (q[:, :found].T @ rest)
        size = float(rest.norm())
        if found < q.shape[1] and size > INDEPENDENT * norm:
            q[:, found] = rest / size
            kept.append(i)
    return kept


def _drop(problem: Problem, asked: Asked, shared: list[int]) -> None:
    """Take away the features that several concepts have; each concept must have one left."""
    for j in shared:
        del asked[j]
    for n, name in enumerate(problem.names):
        if not any(n in by_concept for by_concept in asked.values()):
            raise ValueError(
                f"{name} shares all of its {len(problem.features[n])} target rows with other concepts, and "
                "on_conflict='drop' leaves none: give it a caption with its modifier token"
            )


def _conflict(problem: Problem, this: tuple[int, int], other: tuple[int, int], difference: float) -> Conflict:
    (n, row), (m, other_row) = this, other
    (concept, token), (other_concept, other_token) = problem.label(n, row), problem.label(m, other_row)
    return Conflict(concept, row, other_concept, other_row, difference, token, other_token)


def _check_shared(
    problem: Problem, rows: Tensor, origin: list[tuple[int, int]], asked: Asked, shared: list[int]
) -> None:
    """Concepts that have one feature must agree on its value."""
    at = rows[shared]
    concepts = sorted({n for j in shared for n in asked[j]})
    base = problem.base_values(at).double()
    values = {n: base + problem.residual(n, at).double() for n in concepts}
    conflicts = []
    for column, j in enumerate(shared):
        (n, i), *others = asked[j].items()
        value = values[n][:, column]
        for m, k in others:
            other = values[m][:, column]
            gap, size = float((value - other).norm()), float(max(value.norm(), other.norm()))
            if gap > problem.tolerance * size:
                conflicts.append(_conflict(problem, origin[i], origin[k], gap / size))
    if conflicts:
        raise ConflictingConstraintsError(
            conflicts,
            "Captions that begin alike have the same features there. Leave these rows out of all but one "
            "concept, or take the mean value by on_conflict='average', or leave them to the regularisation "
            "by on_conflict='drop'",
        )


def _check_dependent(
    problem: Problem,
    factor: Tensor,
    rows: Tensor,
    origin: list[tuple[int, int]],
    asked: Asked,
    kept: list[int],
    dependent: list[int],
) -> None:
    """A row in the span of others asks for nothing new if its value is the same combination of theirs."""
    order = kept + dependent
    base = problem.base_values(rows[order]).double()
    change = torch.zeros_like(base)
    for n in sorted({n for j in order for n in asked[j]}):
        columns = [column for column, j in enumerate(order) if n in asked[j]]
        share = torch.tensor([len(asked[order[column]]) for column in columns], device=rows.device)
        change[:, columns] += problem.residual(n, rows[[order[c] for c in columns]]).double() / share
    basis, _ = torch.ops.customdiff.merge_basis(factor, rows[kept])
    combination = basis @ rows[dependent].T  # (kept, dependent): C_dependent = combinationᵀ C_kept
    gap = (change[:, : len(kept)] @ combination - change[:, len(kept) :]).norm(dim=0)
    sizes = (base + change).norm(dim=0)
    scale = sizes[len(kept) :] + combination.abs().T @ sizes[: len(kept)]
    conflicts = []
    for column in (gap > problem.tolerance * scale).nonzero().flatten().tolist():
        j, weights = dependent[column], combination[:, column].abs().tolist()
        foreign = [k for k, other in enumerate(kept) if asked[other].keys() != asked[j].keys()]
        partner = kept[max(foreign or range(len(kept)), key=weights.__getitem__)]
        difference = float(gap[column] / sizes[len(kept) + column])
        conflicts.append(_conflict(problem, origin[j], origin[partner], difference))
    if conflicts:
        raise ConflictingConstraintsError(
            conflicts,
            f"{len(order)} distinct target features span only {len(kept)} directions of the text width "
            f"E={rows.shape[1]}: give fewer target rows, e.g. one caption for each concept",
        )
