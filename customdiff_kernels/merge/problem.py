"""One merge: its checked arguments, and the products with the weights that its steps need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from ..low_rank import LowRankDelta
from ..stack import KVStack, as_stack
from .constraints import ON_CONFLICT, Solution

Weights = Mapping[str, Tensor] | LowRankDelta
Concept = tuple[Weights, Tensor] | tuple[Weights, Tensor, Sequence[str]]
Concepts = Sequence[Concept] | Mapping[str, Concept]

# Products of W0 with wide features take so many rows at a time: their results, and the rows in the dtype of
# sums, are megabytes and not another stack (1.4 GB for SDXL).
BLOCK_ROWS = 4096


@dataclass
class Problem:
    """Concept n: ``names[n]``, its ``weights[n]``, target ``features[n]`` (s_n,E) in the dtype of sums, and
    ``tokens[n]``, the texts by which errors name them.
    """

    stack: KVStack
    names: list[str]
    weights: list[KVStack | LowRankDelta]
    features: list[Tensor]
    tokens: list[Sequence[str] | None]
    on_conflict: str = "error"
    tolerance: float = 1e-3

    @classmethod
    def checked(
        cls,
        base: Mapping[str, Tensor],
        concepts: Concepts,
        factor: Tensor,
        on_conflict: str,
        tolerance: float,
    ) -> Problem:
        """The arguments of ``MergeSolver.merge``; a TypeError or ValueError names one that will not do."""
        stack, width = as_stack("base", base), factor.shape[0]
        if stack.weight.shape[1] != width:
            raise ValueError(f"base has text width {stack.weight.shape[1]}, reg_features have {width}")
        _checks.same_device("base", stack.weight, "reg_features", factor)
        if on_conflict not in ON_CONFLICT:
            raise ValueError(f"on_conflict must be one of {ON_CONFLICT}, got {on_conflict!r}")
        _checks.number("tolerance", tolerance)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
        if not isinstance(concepts, (Mapping, Sequence)):
            raise TypeError(
                "concepts must be a list or mapping of (weights, target_features), "
                f"got {type(concepts).__name__}"
            )
        if not isinstance(concepts, Mapping):
            concepts = {f"concept {n}": concept for n, concept in enumerate(concepts)}
        if not concepts:
            raise ValueError("concepts must hold at least one (weights, target_features), got none")
        problem = cls(stack, [], [], [], [], on_conflict, tolerance)
        for name, concept in concepts.items():
            problem._add(name, concept)
        return problem

    def _add(self, name: str, concept: Concept) -> None:
        if not isinstance(concept, Sequence) or len(concept) not in (2, 3):
            raise TypeError(
                f"{name} must be (weights, target_features) or (weights, target_features, tokens), "
                f"got {type(concept).__name__}"
            )
        weights = checked_weights(f"{name} weights", concept[0], self.stack)
        argument, features = f"{name} target_features", concept[1]
        check_features(argument, features)
        check_finite(argument, features)
        shape = (len(features), self.stack.weight.shape[1])
        _checks.shape(argument, features, shape, "(s,E) to go with reg_features")
        _checks.same_device(argument, features, "base", self.stack.weight)
        tokens = concept[2] if len(concept) == 3 else None
        if tokens is not None and len(tokens) != len(features):
            raise ValueError(
                f"{name} tokens must be a text for each of the {len(features)} target features, "
                f"got {len(tokens)}"
            )
        self.names.append(name)
        self.weights.append(weights)
        self.features.append(features.to(self.sums))
        self.tokens.append(tokens)

    @property
    def sums(self) -> torch.dtype:
        return _checks.sum_dtype(self.stack.weight.dtype)

    def label(self, n: int, row: int) -> tuple[str, str | None]:
        """A target row's concept and, where given, its token."""
        tokens = self.tokens[n]
        return self.names[n], None if tokens is None else tokens[row]

    def residual(self, n: int, features: Tensor) -> Tensor:
        """(W_n - W0) cᵀ for every row c of ``features``: (R,k). For factors, without ever forming W_n."""
        weights, features = self.weights[n], features.to(self.sums)
        if isinstance(weights, KVStack):
            return torch.ops.customdiff.merge_residual(self.stack.weight, weights.weight, features)
        u, v = self._factors(weights)
        with _full_precision(features):
            projected = (torch.cat(v) @ features.T).split([len(rows) for rows in v])
            return torch.cat([left @ right for left, right in zip(u, projected, strict=True)])

    def base_values(self, features: Tensor) -> Tensor:
        """W0 cᵀ for every row c: (R,k)."""
        right = features.to(self.sums).T
        with _full_precision(features):
            return torch.cat([block.to(self.sums) @ right for block in self.stack.weight.split(BLOCK_ROWS)])

    def base_norm(self, root: Tensor) -> float:
        """‖W0 L‖_F."""
        right = root.to(self.sums)
        blocks = self.stack.weight.split(BLOCK_ROWS)
        with _full_precision(root):
            return _root_of_squares(block.to(self.sums) @ right for block in blocks)

    def change_norm(self, n: int, root: Tensor) -> float:
        """‖(W_n - W0) L‖_F, of factors from U's triangle R alone: ‖U V L‖ = ‖R (V L)‖."""
        weights, right = self.weights[n], root.to(self.sums)
        if isinstance(weights, KVStack):
            blocks = zip(weights.weight.split(BLOCK_ROWS), self.stack.weight.split(BLOCK_ROWS), strict=True)
            with _full_precision(root):
                return _root_of_squares(
                    (new.to(self.sums) - old.to(self.sums)) @ right for new, old in blocks
                )
        u, v = self._factors(weights)
        with _full_precision(root):
            projected = (torch.cat(v) @ right).split([len(rows) for rows in v])
            triangles = (torch.linalg.qr(left, mode="r").R for left in u)
            return _root_of_squares(r @ rows for r, rows in zip(triangles, projected, strict=True))

    def change(self, solution: Solution) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Factors u (rows,k) and v (k,E) of Σ_n (W_n - W0) C_nᵀ v_n for each segment, in the dtype of sums.

        A concept's product has two forms: (W_n - W0) C_nᵀ with v_n, which all segments share; and, for a
        low-rank concept with fewer ranks than constraints, U_n with (V_n C_nᵀ) v_n.
        """
        values: list[Tensor] = []  # of the first form: (R,k_n), and v_n
        bases: list[Tensor] = []
        lefts: list[Sequence[Tensor]] = []  # of both: for each segment
        rights: list[Sequence[Tensor]] = []
        for n, (targets, basis) in enumerate(zip(solution.targets, solution.basis, strict=True)):
            weights = self.weights[n]
            if isinstance(weights, LowRankDelta):
                u, v = self._factors(weights)
                ranks = [len(rows) for rows in v]
                if sum(ranks) < len(ranks) * len(targets):
                    with _full_precision(targets):
                        # (C Vᵀ)ᵀ: with few target rows BLAS is quicker than at V Cᵀ
                        projected = (targets @ torch.cat(v).T).T @ basis.to(self.sums)
                    lefts.append(u)
                    rights.append(projected.split(ranks))
                    continue
            values.append(self.residual(n, targets))
            bases.append(basis)
        if values:
            rows = [stop - start for _, start, stop in self.stack.segments]
            lefts.append(torch.cat(values, 1).split(rows))
            rights.append([torch.cat(bases).to(self.sums)] * len(rows))
            if len(lefts) == 1:
                return lefts[0], rights[0]
        return (
            [torch.cat(columns, 1) for columns in zip(*lefts, strict=True)],
            [torch.cat(rows) for rows in zip(*rights, strict=True)],
        )

    def _factors(self, delta: LowRankDelta) -> tuple[list[Tensor], list[Tensor]]:
        """u and v of every segment of the stack, in the dtype of sums; of rank 0 where the delta has none."""
        pairs: Iterable[tuple[Tensor, Tensor]] = delta.factors.values()
        if delta.segments != self.stack.segments:
            weight = self.stack.weight
            none = weight.new_zeros((0, weight.shape[1]), dtype=delta.dtype)
            pairs = [
                delta.factors.get(name, (none.new_zeros((stop - start, 0)), none))
                for name, start, stop in self.stack.segments
            ]
        u, v = map(list, zip(*pairs, strict=True))
        if delta.dtype is self.sums:
            return u, v
        return [left.to(self.sums) for left in u], [right.to(self.sums) for right in v]

    def check_out(self, out: KVStack, solution: Solution) -> None:
        if not isinstance(out, KVStack) or out.segments != self.stack.segments:
            raise ValueError("out must be a KVStack with the segments of base")
        sources = [weights.weight for weights in self.weights if isinstance(weights, KVStack)]
        low_rank = [weights for weights in self.weights if isinstance(weights, LowRankDelta)]
        factors = [factor for delta in low_rank for pair in delta.factors.values() for factor in pair]
        tensors = (out.weight, self.stack.weight, *sources, *factors, *solution.targets)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise ValueError("out= is not differentiable: leave it out, or call within torch.no_grad()")
        if any(_checks.overlap(out.weight, weight) for weight in sources):
            raise ValueError("out must not share memory with the weights of a concept, which are still read")


def check_features(argument: str, features: Tensor) -> None:
    _checks.is_tensor(argument, features)
    _checks.floating(argument, features)
    _checks.rank(argument, features, "rows,E")
    if 0 in features.shape:
        raise ValueError(f"{argument} must have at least one row, got shape {tuple(features.shape)}")


def check_finite(argument: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{argument} is not finite")


def checked_weights(argument: str, weights: Weights, base: KVStack) -> KVStack | LowRankDelta:
    if not isinstance(weights, LowRankDelta):
        return as_stack(argument, weights, like=base)
    if weights.segments != base.segments:  # a delta's factors fit its own segments: LowRankDelta saw to it
        for name, (u, _) in weights.factors.items():
            if name not in base:
                raise ValueError(
                    f"{argument} has the unknown segment {name!r}; the base has e.g. {next(iter(base))!r}"
                )
            _checks.shape(
                f"{argument}[{name!r}]", u, (len(base[name]), u.shape[1]), "(rows of the base, rank)"
            )
    if weights.width != base.weight.shape[1]:
        raise ValueError(f"{argument} has text width {weights.width}, the base has {base.weight.shape[1]}")
    if weights.device != base.weight.device:
        raise ValueError(
            f"{argument} is on {weights.device} and base on {base.weight.device}: move one of them"
        )
    return weights


def _root_of_squares(blocks: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(block.norm()) ** 2 for block in blocks))


def _full_precision(like: Tensor) -> torch.autocast:
    """Products in their own dtype, whatever a surrounding autocast says."""
    return torch.autocast(like.device.type, enabled=False)
