"""``customdiff::merge_basis``, ``merge_residual``, ``merge_apply`` and ``merge_apply_out``: schema, fake,
autograd.

The first is the small float64 work; the others stream over the R rows of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _checks
from .._library import register


def _check_basis(factor: Tensor, targets: Tensor) -> None:
    _checks.floating("factor", factor, torch.float64)
    _checks.rank("factor", factor, "E,E")
    _checks.rank("targets", targets, "s,E")
    _checks.floating("targets", targets, torch.float64)
    _checks.shape("factor", factor, (targets.shape[1],) * 2, "(E,E) to go with targets")
    _checks.same_device("targets", targets, "factor", factor)
    if targets.shape[0] > targets.shape[1]:
        raise ValueError(f"targets cannot be {targets.shape[0]} independent rows of width {targets.shape[1]}")


def _basis(factor: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """v = S⁻¹ C G⁻¹ and R with RᵀR = S = C G⁻¹ Cᵀ, from L = ``factor``: never forms S, whose condition is R's
    squared.
    """
    _check_basis(factor, targets)
    q, r = torch.linalg.qr(torch.linalg.solve_triangular(factor, targets.T, upper=False))  # Y = L⁻¹Cᵀ = QR
    d = torch.linalg.solve_triangular(factor.T, q, upper=True)  # (Qᵀ L⁻¹)ᵀ: from the left BLAS is quicker
    basis = torch.linalg.solve_triangular(r.T, d, upper=False, left=False).T
    return basis.contiguous(), r.contiguous()


def _basis_fake(factor: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    _check_basis(factor, targets)
    s, e = targets.shape
    return targets.new_empty((s, e)), targets.new_empty((s, s))


def _basis_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    if inputs[0].requires_grad:
        raise RuntimeError("customdiff::merge_basis does not differentiate the factor: detach it")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], *output)


def _basis_autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[None, Tensor]:
    return None, _basis_backward_op(grad, *ctx.saved_tensors)


def _basis_backward(grad: Tensor, factor: Tensor, basis: Tensor, r: Tensor) -> Tensor:
    weighted = torch.cholesky_solve(grad, r, upper=True)  # S⁻¹ dv
    mixed = weighted @ basis.T
    through_s = (mixed + mixed.T) @ (r.T @ (r @ basis))  # S v = C G⁻¹
    return torch.cholesky_solve(weighted.T, factor).T - through_s


register(
    "merge_basis(Tensor factor, Tensor targets) -> (Tensor, Tensor)",
    _basis,
    _basis_fake,
    setup_context=_basis_setup,
    backward=_basis_autograd,
)
_basis_backward_op = register(  # an operator, for it is not differentiable: r hides how it came from targets
    "merge_basis_backward(Tensor grad, Tensor factor, Tensor basis, Tensor r) -> Tensor",
    _basis_backward,
    lambda grad, factor, basis, r: torch.empty_like(basis),
)


def _check_rows(base: Tensor, weights: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    _checks.floating("base", base)
    _checks.rank("base", base, "R,E")
    if len(weights) != len(targets):
        raise ValueError(f"weights and targets must be of one length, got {len(weights)} and {len(targets)}")
    for i, (weight, target) in enumerate(zip(weights, targets, strict=True)):
        _checks.floating(f"weights[{i}]", weight)
        _checks.shape(f"weights[{i}]", weight, tuple(base.shape), "of base")
        _checks.floating(f"targets[{i}]", target, _checks.sum_dtype(base.dtype))
        _checks.rank(f"targets[{i}]", target, "s,E")
        _checks.shape(f"targets[{i}]", target, (target.shape[0], base.shape[1]), "(s,E) to go with base")
        _checks.same_device(f"weights[{i}]", weight, "base", base)
        _checks.same_device(f"targets[{i}]", target, "base", base)


def _residual(base: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(W_n - W0) C_nᵀ (R,s): the difference first, so that the small change is not lost in two large
    products.
    """
    out = _residual_fake(base, weight, targets)
    _backends.for_weights("merge", base=base).residual(out, base, weight, targets)
    return out


def _residual_fake(base: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    _check_rows(base, [weight], [targets])
    return targets.new_empty((base.shape[0], targets.shape[0]))


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _residual_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    base, weight, targets = ctx.saved_tensors
    need_base, need_weight, need_targets = ctx.needs_input_grad
    change = grad @ targets if need_base or need_weight else grad.new_empty(0)
    return (
        -change.to(base.dtype) if need_base else None,
        change.to(weight.dtype) if need_weight else None,
        grad.T @ (weight.to(grad.dtype) - base.to(grad.dtype)) if need_targets else None,
    )


register(
    "merge_residual(Tensor base, Tensor weight, Tensor targets) -> Tensor",
    _residual,
    _residual_fake,
    setup_context=_residual_setup,
    backward=_residual_backward,
)


def _check_apply(base: Tensor, weights: Sequence[Tensor], targets: Sequence[Tensor], basis: Tensor) -> None:
    _check_rows(base, weights, targets)
    _checks.floating("basis", basis, _checks.sum_dtype(base.dtype))
    _checks.shape("basis", basis, (sum(t.shape[0] for t in targets), base.shape[1]), "(s of all targets, E)")
    _checks.same_device("basis", basis, "base", base)


def _apply(base: Tensor, weights: list[Tensor], targets: list[Tensor], basis: Tensor) -> Tensor:
    out = _apply_fake(base, weights, targets, basis)
    _backends.for_weights("merge", base=base).apply(out, base, weights, targets, basis)
    return out


def _apply_fake(base: Tensor, weights: list[Tensor], targets: list[Tensor], basis: Tensor) -> Tensor:
    _check_apply(base, weights, targets, basis)
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _apply_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, weights, targets, basis = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(base, basis, *weights, *targets)


def _apply_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    base, basis, *rest = ctx.saved_tensors
    weights, targets = rest[: ctx.count], rest[ctx.count :]
    need_base, need_weights, need_targets, need_basis = ctx.needs_input_grad
    sums = basis.dtype
    grad, old = grad.to(sums), base.to(sums)
    grad_base, grad_weights, grad_targets, residuals = grad, [], [], []
    for i, (weight, target, rows) in enumerate(
        zip(weights, targets, basis.split([t.shape[0] for t in targets]), strict=True)
    ):
        grad_residual, change = grad @ rows.T, weight.to(sums) - old
        through = grad_residual @ target
        grad_base = grad_base - through
        grad_weights.append(through.to(weight.dtype) if need_weights[i] else None)
        grad_targets.append(grad_residual.T @ change if need_targets[i] else None)
        residuals.append(change @ target.T)
    grad_basis = torch.cat(residuals, 1).T @ grad if need_basis and residuals else None
    return grad_base.to(base.dtype) if need_base else None, grad_weights, grad_targets, grad_basis


register(
    "merge_apply(Tensor base, Tensor[] weights, Tensor[] targets, Tensor basis) -> Tensor",
    _apply,
    _apply_fake,
    setup_context=_apply_setup,
    backward=_apply_backward,
)


def _apply_(out: Tensor, base: Tensor, weights: list[Tensor], targets: list[Tensor], basis: Tensor) -> None:
    _check_out(out, base, weights, targets, basis)
    _checks.in_place(out, base)
    _backends.for_weights("merge", base=base).apply(out, base, weights, targets, basis)


def _check_out(
    out: Tensor, base: Tensor, weights: list[Tensor], targets: list[Tensor], basis: Tensor
) -> None:
    _check_apply(base, weights, targets, basis)
    _checks.like("out", out, "base", base)


register(
    "merge_apply_out(Tensor(a!) out, Tensor base, Tensor[] weights, Tensor[] targets, Tensor basis) -> ()",
    _apply_,
    _check_out,
)
