"""``customdiff::kv_project``, ``customdiff::kv_cross_attention`` and their backwards: schema, fake, autograd.

The projections are library GEMMs; the attention between them goes through the backend that ``_backends``
chooses. Weights of another dtype than the activations are cast inside, so that no cast copy outlives a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import _checks
from .._library import register
from ..cross_attention.ops import by_input, empty_gradients, finished, run_backward, run_forward

# --- kv_project -----------------------------------------------------------------------------------


def _project(context: Tensor, weight: Tensor, frozen_tokens: int) -> Tensor:
    _checks.projection(context, weight, frozen_tokens)
    return linear(context, weight.to(context.dtype)).contiguous()


def _project_fake(context: Tensor, weight: Tensor, frozen_tokens: int) -> Tensor:
    _checks.projection(context, weight, frozen_tokens)
    return context.new_empty(*context.shape[:2], weight.shape[0])


def _project_backward(
    grad: Tensor, context: Tensor, weight: Tensor, frozen_tokens: int, needed: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """dc = g W, zero at frozen tokens; dW = gᵀ c without their rows (zeroed in c, the small one)."""
    _checks.projection(context, weight, frozen_tokens)
    expected = (*context.shape[:2], weight.shape[0])
    _checks.shape("grad", grad, expected, "(B,S,R)")
    rows = grad.flatten(0, 1)
    d_context, d_weight = context.new_empty(0), weight.new_empty(0)
    if needed[0]:
        d_context = (rows @ weight.to(rows.dtype)).view(context.shape)
        d_context[:, :frozen_tokens] = 0
    if needed[1]:
        live = context
        if frozen_tokens:
            live = context.clone(memory_format=torch.contiguous_format)
            live[:, :frozen_tokens] = 0
        d_weight = (rows.T @ live.flatten(0, 1)).to(weight.dtype)
    return d_context, d_weight


def _project_backward_fake(
    grad: Tensor, context: Tensor, weight: Tensor, frozen_tokens: int, needed: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    return (
        context.new_empty(context.shape if needed[0] else (0,)),
        weight.new_empty(weight.shape if needed[1] else (0,)),
    )


def _project_setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    context, weight, ctx.frozen_tokens = inputs
    ctx.save_for_backward(context, weight)


def _project_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:2])
    grads = _project_backward_op(grad, *ctx.saved_tensors, ctx.frozen_tokens, needed)
    return (*(g if want else None for g, want in zip(grads, needed, strict=True)), None)


register(
    "kv_project(Tensor context, Tensor weight, int frozen_tokens) -> Tensor",
    _project,
    _project_fake,
    setup_context=_project_setup,
    backward=_project_autograd,
    cast=(0,),
)
_project_backward_op = register(
    "kv_project_backward(Tensor grad, Tensor context, Tensor weight, int frozen_tokens, bool[2] needed)"
    " -> (Tensor, Tensor)",
    _project_backward,
    _project_backward_fake,
)

# --- kv_cross_attention ---------------------------------------------------------------------------

_LARGE = 32 << 20  # bytes of the queries from which on memory counts, and a part of them keeps a GPU busy


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B,N,inner) seen as (B,H,N,D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _parts(hidden: Tensor, w_q: Tensor) -> list[slice]:
    """The batch rows that the block takes together: all, or a quarter of them where they are many.

    Between the projections everything exists for one part at a time.
    """
    batch, n, _ = hidden.shape
    size = batch * n * w_q.shape[0] * hidden.element_size()
    step = -(-batch // 4) if size >= _LARGE else max(batch, 1)
    return [slice(i, i + step) for i in range(0, max(batch, 1), step)]


def _product_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """out (B,N,C) = x (B,N,K) weight (K,C) + bias (C); ``out`` is contiguous."""
    x, out = x.flatten(0, 1), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _rows(bias: Tensor | None, rows: slice) -> Tensor | None:
    """Those batch rows of a bias, its labels or its table; all of one that serves every row."""
    return bias if bias is None or bias.shape[0] == 1 else bias[rows]


def _attend(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    heads: int,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
) -> Tensor:
    _checks.kv_block(hidden, key, value, w_q, w_out, b_out, heads, bias, labels, table)
    dtype = hidden.dtype
    w_q, w_out, b_out = w_q.to(dtype), w_out.to(dtype), None if b_out is None else b_out.to(dtype)
    key, value = _heads(key, heads), _heads(value, heads)

    out = hidden.new_empty(*hidden.shape[:2], w_out.shape[0])

    def attend(rows: slice) -> None:
        query = linear(hidden[rows], w_q).contiguous()
        attended = torch.empty_like(query)
        q, o = _heads(query, heads), _heads(attended, heads)
        some_bias = _rows(bias, rows), _rows(labels, rows), _rows(table, rows)
        run_forward(q, key[rows], value[rows], *some_bias, scale, o)
        _product_into(out[rows], attended, w_out.T, b_out)

    for rows in _parts(hidden, w_q):
        attend(rows)
    return out


def _attend_fake(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    heads: int,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
) -> Tensor:
    _checks.kv_block(hidden, key, value, w_q, w_out, b_out, heads, bias, labels, table)
    return hidden.new_empty(*hidden.shape[:2], w_out.shape[0])


def _attend_backward(
    grad_out: Tensor,
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    heads: int,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    _checks.kv_block(hidden, key, value, w_q, w_out, None, heads, bias, labels, table)
    dtype = hidden.dtype
    w_q, w_out = w_q.to(dtype), w_out.to(dtype)
    grads = empty_gradients((hidden, key, value, bias, table), [False, *needed[1:]])
    grads[0] = hidden.new_empty(hidden.shape) if needed[0] else None  # contiguous, whatever hidden is
    d_hidden, d_key, d_value, *d_bias = grads

    def propagate(rows: slice) -> None:
        query = linear(hidden[rows], w_q).contiguous()
        d_attended = torch.empty_like(query)
        _product_into(d_attended, grad_out[rows], w_out)
        d_query = None if d_hidden is None else torch.empty_like(query)
        q, k, v, g = (_heads(x, heads) for x in (query, key[rows], value[rows], d_attended))
        d_qkv = (d_query, *(None if x is None else x[rows] for x in (d_key, d_value)))
        by_head = [None if x is None else _heads(x, heads) for x in d_qkv]
        some_bias = _rows(bias, rows), _rows(labels, rows), _rows(table, rows)
        run_backward(g, q, k, v, *some_bias, scale, [*by_head, *d_bias])
        if d_hidden is not None and d_query is not None:
            _product_into(d_hidden[rows], d_query, w_q)

    # A bias may be shared by all rows, and its gradient is their sum.
    for rows in _parts(hidden, w_q) if d_bias == [None, None] else [slice(None)]:
        propagate(rows)
    return finished(grads, (hidden, key, value, bias, table))


def _attend_backward_fake(
    grad_out: Tensor,
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    heads: int,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    inputs = (hidden, key, value, bias, table)
    grads = empty_gradients(inputs, needed)
    grads[0] = hidden.new_empty(hidden.shape) if needed[0] else None
    return finished(grads, inputs)


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, key, value, w_q, w_out, b_out, ctx.heads, bias, labels, table, ctx.scale = inputs
    for name, wants in zip(("w_q", "w_out", "b_out"), ctx.needs_input_grad[3:6], strict=True):
        if wants:
            raise ValueError(
                f"{name} is frozen in kv_cross_attention and gets no gradient, but has requires_grad=True; "
                f"call {name}.requires_grad_(False), or train it with cross_attention between projections"
            )
    ctx.save_for_backward(hidden, key, value, w_q, w_out, bias, labels, table)


def _attend_autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 7, 9)]
    *inputs, bias, labels, table = ctx.saved_tensors
    grads = _attend_backward_op(grad_out, *inputs, ctx.heads, bias, labels, table, ctx.scale, needed)
    hidden, key, value, bias, table = by_input(grads, needed)
    return hidden, key, value, None, None, None, None, bias, None, table, None


_INPUTS = "Tensor hidden, Tensor key, Tensor value, Tensor w_q, Tensor w_out"
_BIAS = "Tensor? bias, Tensor? labels, Tensor? table, float scale"
register(
    f"kv_cross_attention({_INPUTS}, Tensor? b_out, int heads, {_BIAS}) -> Tensor",
    _attend,
    _attend_fake,
    setup_context=_attend_setup,
    backward=_attend_autograd,
    cast=(0, 1, 2),
)
_attend_backward_op = register(
    f"kv_cross_attention_backward(Tensor grad_out, {_INPUTS}, int heads, {_BIAS}, bool[5] needed)"
    " -> Tensor[]",
    _attend_backward,
    _attend_backward_fake,
)
