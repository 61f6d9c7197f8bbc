"""customdiff::kv_project and customdiff::kv_cross_attention against the float64 reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import customdiff_kernels as ck
from customdiff_kernels import _backends
from customdiff_kernels.kv_projection import ops as kv_ops
from customdiff_kernels.kv_projection.reference import kv_cross_attention_reference, kv_project_reference

pytestmark = pytest.mark.usefixtures("poison")
OPS = torch.ops.customdiff
LOW = [torch.float32, torch.bfloat16, torch.float16]


# --- the stacked projection -------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_projection_error_is_at_most_twice_eager(dtype, frozen_tokens, no_worse):
    context, weight = torch.randn(3, 7, 20, dtype=dtype), torch.randn(50, 20, dtype=dtype)
    upstream = torch.randn(3, 7, 50, dtype=dtype)
    results = []
    for function, kind in (
        (ck.kv_project, dtype),
        (kv_project_reference, dtype),
        (kv_project_reference, torch.float64),
    ):
        c, w = (x.to(kind).requires_grad_() for x in (context.detach(), weight.detach()))
        out = function(c, w, frozen_tokens)
        if frozen_tokens == 7 and function is kv_project_reference:  # everything detached
            results.append([out, torch.zeros_like(c), torch.zeros_like(w)])
            continue
        results.append([out, *torch.autograd.grad(out, (c, w), upstream.to(kind))])
    for name, ours, peer, exact in zip(("kv", "d_context", "d_weight"), *results, strict=True):
        no_worse(name, ours, peer, exact)


def test_projection_gradcheck_and_frozen_tokens():
    c = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ck.kv_project, (c, w))
    for frozen in (1, 3):
        g = torch.randn(2, 5, 8, dtype=torch.float64)
        ours = torch.autograd.grad(ck.kv_project(c, w, frozen), (c, w), g)
        expected = torch.autograd.grad(kv_project_reference(c, w, frozen), (c, w), g)
        torch.testing.assert_close(ours, expected)
        assert not ours[0][:, :frozen].any()
    # freezing changes no value, only gradients
    assert torch.equal(ck.kv_project(c, w, 3), ck.kv_project(c, w))


@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=2)), ids=str)
def test_projection_every_combination_of_requires_grad(wants):
    c, w = torch.randn(2, 5, 6, requires_grad=wants[0]), torch.randn(8, 6, requires_grad=wants[1])
    out = ck.kv_project(c, w, 1)
    assert out.requires_grad == any(wants)
    if any(wants):
        out.sum().backward()
    assert ((c.grad is not None), (w.grad is not None)) == wants


def test_projection_promotes_dtypes():
    c, w = torch.randn(2, 5, 6), torch.randn(8, 6)
    assert ck.kv_project(c.bfloat16(), w).dtype is torch.float32
    assert ck.kv_project(c, w.bfloat16()).dtype is torch.float32
    assert ck.kv_project(c.half(), w.half()).dtype is torch.float16


def test_projection_keeps_master_weights_under_autocast():
    c, w = torch.randn(2, 5, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    saved = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            kv = ck.kv_project(c, w, 1)
        kv.float().square().sum().backward()  # inside the block, where autocast is still on
    assert kv.dtype is torch.bfloat16 and c.grad.dtype is w.grad.dtype is torch.float32
    assert any(t.data_ptr() == w.data_ptr() for t in saved)
    assert not any(t.dtype is torch.bfloat16 and t.shape == w.shape for t in saved)  # no cast copy is kept
    low_c, low_w = (x.detach().bfloat16().requires_grad_() for x in (c, w))
    low = ck.kv_project(low_c, low_w, 1)
    low.float().square().sum().backward()
    assert torch.equal(kv, low)
    torch.testing.assert_close(w.grad, low_w.grad.float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"context": None}, TypeError, "context must be a torch.Tensor, got NoneType"),
        ({"context": torch.zeros(5, 6)}, ValueError, r"context must have shape \(B,S,E\)"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight must have shape \(R,E\)"),
        ({"weight": torch.zeros(8, 7)}, ValueError, r"weight must have shape \(8, 6\)"),
        ({"weight": torch.zeros(8, 6, device="meta")}, ValueError, "weight is on meta and context on cpu"),
        ({"context": torch.zeros(2, 5, 6, dtype=torch.int64)}, TypeError, "context must be .* got int64"),
        ({"weight": torch.zeros(8, 6, dtype=torch.int32)}, TypeError, "weight must be .* got int32"),
        ({"frozen_tokens": 6}, ValueError, r"frozen_tokens must lie in 0 … 5 \(S\), got 6"),
        ({"frozen_tokens": -1}, ValueError, "frozen_tokens must lie in"),
        ({"frozen_tokens": 1.5}, TypeError, "frozen_tokens must be an integer, got float"),
        ({"context": torch.zeros(2, 0, 6)}, ValueError, r"context must have at least one .*\(2, 0, 6\)"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else None,
)
def test_projection_names_bad_input(change, error, message):
    good = {"context": torch.zeros(2, 5, 6), "weight": torch.zeros(8, 6)}
    with pytest.raises(error, match=message):
        ck.kv_project(**(good | change))


# --- the attention between frozen projections -------------------------------------------------------


def block(b=2, n=9, s=7, c=10, heads=3, d=8, dtype=torch.float64, device="cpu", bias=None):
    """hidden, key, value (views of one stacked projection), w_q, w_out, b_out and a dense bias or None."""
    inner = heads * d
    make = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)  # noqa: E731
    stacked = make(b, s, 2 * inner + 5)
    key, value = stacked[..., 3 : 3 + inner], stacked[..., 3 + inner : 3 + 2 * inner]
    w_q, w_out, b_out = make(inner, c) / c**0.5, make(c, inner) / inner**0.5, make(c)
    return make(b, n, c), key, value, w_q, w_out, b_out, None if bias is None else make(*bias)


def run(function, tensors, heads, upstream):
    """(y, gradients of hidden, key, value and the bias)"""
    x, k, v, w_q, w_out, b_out, bias = tensors
    leaves = [t.detach().requires_grad_() for t in (x, k, v, bias) if t is not None]
    y = function(*leaves[:3], w_q, w_out, b_out, heads=heads, bias=leaves[3] if bias is not None else None)
    return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 64, 77, 40, 2, 40), (1, 33, 77, 24, 3, 64), (2, 1, 5, 7, 1, 11)], ids=str
)
def test_block_error_is_at_most_twice_eager(shape, dtype, backend, device, no_worse):
    b, n, s, c, heads, d = shape
    tensors = block(b, n, s, c, heads, d, dtype, device, bias=(1, 1, n, s))
    upstream = torch.randn(b, n, c, dtype=dtype, device=device)
    ours = run(ck.kv_cross_attention, tensors, heads, upstream)
    peer = run(kv_cross_attention_reference, tensors, heads, upstream)
    exact = run(kv_cross_attention_reference, [t.double() for t in tensors], heads, upstream)
    for name, o, p, e in zip(("y", "d_hidden", "d_key", "d_value", "d_bias"), ours, peer, exact, strict=True):
        no_worse(name, o, p, e)


@given(
    sizes=st.tuples(*[st.integers(1, m) for m in (3, 20, 90, 12)]),
    heads=st.integers(1, 3),
    d=st.integers(1, 20),
)
def test_block_random_shapes(sizes, heads, d, backend64):
    torch.manual_seed(0)
    b, n, s, c = sizes
    tensors = block(b, n, s, c, heads, d)
    upstream = torch.randn(b, n, c, dtype=torch.float64)
    ours = run(ck.kv_cross_attention, tensors, heads, upstream)
    torch.testing.assert_close(ours, run(kv_cross_attention_reference, tensors, heads, upstream))


@pytest.mark.parametrize("bias", [None, (1, 3, 9, 7)], ids=["none", "dense"])
def test_block_gradcheck(bias, backend64):
    x, k, v, w_q, w_out, b_out, bias = block(bias=bias)
    leaves = [t.detach().requires_grad_() for t in (x, k, v, bias) if t is not None]

    def function(x, k, v, bias=None):
        return ck.kv_cross_attention(x, k, v, w_q, w_out, b_out, heads=3, bias=bias, scale=0.4)

    assert torch.autograd.gradcheck(function, leaves)


def test_block_with_a_layout_equals_its_dense_bias(backend64):
    x, k, v, w_q, w_out, b_out, _ = block()
    table = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    layout = ck.LayoutBias(torch.randint(0, 3, (1, 9)), table, 0.6)
    results = []
    for bias in (layout, layout.dense()):
        y = ck.kv_cross_attention(x, k, v, w_q, w_out, b_out, heads=3, bias=bias)
        results.append([y, *torch.autograd.grad(y.square().sum(), table)])
    torch.testing.assert_close(*results)


def test_block_every_combination_of_requires_grad(backend, device):
    tensors = block(dtype=torch.float32, device=device, bias=(1, 1, 9, 7))
    upstream = torch.randn(2, 9, 10, device=device)
    everything = run(ck.kv_cross_attention, tensors, 3, upstream)[1:]
    for wants in itertools.product([False, True], repeat=4):
        x, k, v, bias = (
            t.detach().requires_grad_(want) for t, want in zip((*tensors[:3], tensors[6]), wants, strict=True)
        )
        y = ck.kv_cross_attention(x, k, v, *tensors[3:6], heads=3, bias=bias)
        assert y.requires_grad == any(wants)
        if any(wants):
            y.backward(upstream)
        for t, want, expected in zip((x, k, v, bias), wants, everything, strict=True):
            assert (t.grad is not None) == want
            assert not want or torch.equal(t.grad, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_block_saves_its_inputs_and_nothing_else(autocast, backend, device):
    x, k, v, w_q, w_out, b_out, _ = block(dtype=torch.float32, device=device)
    x, k, v = (t.detach().requires_grad_() for t in (x, k, v))
    inputs = [x, k, v]
    if autocast:  # the block receives what the layers before it made: activations in autocast's dtype
        inputs = [t.bfloat16() for t in inputs]
    saved = []
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            y = ck.kv_cross_attention(*inputs, w_q, w_out, b_out, heads=3)
    assert y.dtype is (torch.bfloat16 if autocast else torch.float32)
    assert sorted(saved) == sorted(t.data_ptr() for t in (*inputs, w_q, w_out))
    y.float().sum().backward()
    assert x.grad.dtype is k.grad.dtype is torch.float32


@pytest.mark.parametrize("bias", [None, (1, 1, 9, 7), (7, 1, 9, 7)], ids=str)
def test_a_large_batch_is_worked_through_in_parts(bias, monkeypatch):
    """The same results, and between the projections no more than a quarter of the batch at a time."""
    tensors = block(b=7, bias=bias)
    upstream, seen, forward = torch.randn(7, 9, 10, dtype=torch.float64), [], kv_ops.run_forward
    monkeypatch.setattr(kv_ops, "run_forward", lambda q, *rest: seen.append(len(q)) or forward(q, *rest))
    whole = run(ck.kv_cross_attention, tensors, 3, upstream)
    monkeypatch.setattr(kv_ops, "_LARGE", 0)
    for one, other in zip(whole, run(ck.kv_cross_attention, tensors, 3, upstream), strict=True):
        torch.testing.assert_close(other, one)
    assert seen == [7, 2, 2, 2, 1]
    x, *others, fixed = tensors
    x = x.detach().requires_grad_()
    y = ck.kv_cross_attention(x, *others, heads=3, bias=fixed)  # a bias that is not trained: in parts
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], whole[1])


def test_block_reads_keys_and_values_where_they_lie(monkeypatch):
    x, k, v, w_q, w_out, b_out, _ = block(dtype=torch.float32)
    seen = {}
    backend = _backends.for_tensors(query=x)

    class Spy:
        def attention_forward(self, query, key, value, *rest):
            seen.update(key=key.data_ptr(), value=value.data_ptr(), out=rest[-1].transpose(1, 2))
            backend.attention_forward(query, key, value, *rest)

    monkeypatch.setattr(_backends, "load", lambda name: Spy())
    ck.kv_cross_attention(x, k, v, w_q, w_out, b_out, heads=3)
    assert seen["key"] == k.data_ptr() and seen["value"] == v.data_ptr()
    assert seen["out"].is_contiguous()  # (B,N,H,D) memory: the output projection reads it as (B,N,inner)


def test_frozen_weights_that_want_a_gradient_are_an_error(backend64):
    x, k, v, *frozen, _ = block()
    for i, name in enumerate(("w_q", "w_out", "b_out")):
        weights = [w.detach().requires_grad_(i == j) for j, w in enumerate(frozen)]
        with pytest.raises(ValueError, match=rf"{name} is frozen .*call {name}\.requires_grad_\(False\)"):
            ck.kv_cross_attention(x, k, v, *weights, heads=3)
        with torch.no_grad():  # nothing is missed there
            y = ck.kv_cross_attention(x, k, v, *weights, heads=3)
        torch.testing.assert_close(y, kv_cross_attention_reference(x, k, v, *frozen, heads=3))


@pytest.mark.parametrize("low", LOW[1:], ids=str)
def test_block_under_autocast_equals_casting_by_hand(low, backend, device):
    tensors = block(dtype=torch.float32, device=device)
    upstream = torch.randn(2, 9, 10, device=device).to(low)
    with torch.autocast(device, dtype=low):
        auto = run(ck.kv_cross_attention, tensors, 3, upstream)  # backward inside the block, too
    hand = run(ck.kv_cross_attention, [None if t is None else t.to(low) for t in tensors], 3, upstream)
    assert torch.equal(auto[0], hand[0])
    torch.testing.assert_close(auto[1:], [t.float() for t in hand[1:]])


def test_block_takes_weights_of_another_dtype(backend, device):
    x, k, v, w_q, w_out, b_out, _ = block(dtype=torch.bfloat16, device=device)
    mixed = ck.kv_cross_attention(x, k, v, w_q.float(), w_out.float(), b_out.float(), heads=3)
    assert torch.equal(mixed, ck.kv_cross_attention(x, k, v, w_q, w_out, b_out, heads=3))


def test_block_strided_and_empty(backend64):
    x, k, v, w_q, w_out, b_out, _ = block(b=1)
    expected = kv_cross_attention_reference(x, k, v, w_q, w_out, b_out, heads=3)
    channels_first = x.mT.contiguous().mT  # a picture's (B,C,N) memory
    torch.testing.assert_close(
        ck.kv_cross_attention(channels_first, k, v, w_q, w_out, b_out, heads=3), expected
    )
    columns = [t.mT.contiguous().mT for t in (k, v)]
    torch.testing.assert_close(ck.kv_cross_attention(x, *columns, w_q, w_out, b_out, heads=3), expected)
    rows = [t.expand(4, -1, -1) for t in (x, k, v)]  # one prompt for every row of a batch
    torch.testing.assert_close(
        ck.kv_cross_attention(*rows, w_q, w_out, b_out, heads=3), expected.expand(4, -1, -1)
    )
    empty = ck.kv_cross_attention(x[:, :0], k, v, w_q, w_out, heads=3)
    assert empty.shape == (1, 0, 10)
    assert torch.equal(
        ck.kv_cross_attention(x, k, v, w_q, w_out, heads=np.int64(3)),
        ck.kv_cross_attention(x, k, v, w_q, w_out, heads=3),
    )


def test_projection_to_or_from_nothing_has_gradients():
    for rows, width in ((0, 4), (4, 0)):
        context, weight = torch.randn(2, 3, width), torch.randn(rows, width)
        context.requires_grad_(), weight.requires_grad_()
        ck.kv_project(context, weight).sum().backward()
        assert context.grad.shape == context.shape and not context.grad.any()
        assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_opcheck(backend, device):
    x, k, v, w_q, w_out, b_out, bias = block(dtype=torch.float32, device=device, bias=(1, 1, 9, 7))
    x, k, v = (t.detach().requires_grad_() for t in (x, k, v))
    labels = torch.zeros(1, 9, dtype=torch.int32, device=device)
    table = torch.randn(2, 2, 7, device=device, requires_grad=True)
    torch.library.opcheck(
        OPS.kv_cross_attention.default, (x, k, v, w_q, w_out, b_out, 3, bias, None, None, 0.3)
    )
    torch.library.opcheck(
        OPS.kv_cross_attention.default, (x, k, v, w_q, w_out, None, 3, None, labels, table, 0.3)
    )
    x, k, v, table, g = (t.detach() for t in (x, k, v, table, torch.randn(2, 9, 10, device=device)))
    torch.library.opcheck(
        OPS.kv_cross_attention_backward.default,
        (g, x, k, v, w_q, w_out, 3, None, labels, table, 0.3, [True, False, True, False, True]),
    )


def test_opcheck_projection():
    c, w = torch.randn(2, 5, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    torch.library.opcheck(OPS.kv_project.default, (c, w, 1))
    g = torch.randn(2, 5, 8)
    for needed in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(OPS.kv_project_backward.default, (g, c.detach(), w.detach(), 1, needed))


class Layers(torch.nn.Module):
    """Cross-attention layers of each bias on one stacked projection: the project's spine in small."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6 * 24, 6) / 6**0.5)
        for name, shape in (("w_q", (24, 10)), ("w_out", (10, 24)), ("b_out", (10,))):
            self.register_buffer(name, torch.randn(shape) / 5)

        self.table = torch.nn.Parameter(torch.randn(1, 3, 7))
        self.register_buffer("labels", torch.arange(9).view(1, 9) % 3)

    def forward(self, hidden, context):
        k0, v0, k1, v1, k2, v2 = ck.kv_project(context, self.weight, 1).split(24, -1)
        layout, dense = ck.LayoutBias(self.labels, self.table), self.table[:, self.labels[0]].unsqueeze(1)
        for key, value, bias in ((k0, v0, None), (k1, v1, layout), (k2, v2, dense)):
            frozen = self.w_q, self.w_out, self.b_out
            hidden = hidden + ck.kv_cross_attention(hidden, key, value, *frozen, heads=3, bias=bias)
        return hidden


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_without_a_graph_break(autocast, backend, device):
    torch._dynamo.reset()
    model = Layers().to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(2, 9, 10, device=device, requires_grad=True)
    context = torch.randn(2, 7, 6, device=device)
    results = []
    for function in (model, compiled):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            out = function(hidden, context)
        results.append([out, *torch.autograd.grad(out.square().sum(), (hidden, model.weight, model.table))])
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_a_cuda_graph_of_forward_and_backward(backend, device):
    if device == "cpu":
        pytest.skip("what is tested is the GPU's")
    model, plain = Layers().to(device), Layers().to(device)
    plain.load_state_dict(model.state_dict())

    def make():
        hidden = torch.randn(2, 9, 10, device=device, requires_grad=True)
        return hidden, torch.randn(2, 7, 6, device=device)

    captured = torch.cuda.make_graphed_callables(model, make())
    for _ in range(2):
        (hidden, context), results = make(), []
        for function, weights in ((captured, model.parameters()), (plain, plain.parameters())):
            out = function(hidden, context)
            found = torch.autograd.grad(out.square().sum(), (hidden, *weights))
            results.append([x.clone() for x in (out, *found)])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": 1}, TypeError, "hidden must be a torch.Tensor, got int"),
        ({"hidden": torch.zeros(9, 10)}, ValueError, r"hidden must have shape \(B,N,C\)"),
        ({"hidden": torch.zeros(2, 9, 11)}, ValueError, r"w_q must have shape \(24, 11\)"),
        ({"hidden": torch.zeros(2, 9, 10, dtype=torch.int64)}, TypeError, "hidden must be .* got int64"),
        ({"key": torch.zeros(2, 7, 16)}, ValueError, r"key must have shape \(2, 7, 24\)"),
        ({"key": torch.zeros(3, 7, 24)}, ValueError, "key must have shape"),
        (
            {"key": torch.zeros(2, 0, 24), "value": torch.zeros(2, 0, 24)},
            ValueError,
            r"key must have at least one text token .*\(2, 0, 24\) with hidden \(2, 9, 10\)",
        ),
        ({"key": torch.zeros(2, 7, 24).bfloat16()}, TypeError, "key must be float32, got bfloat16"),
        ({"value": torch.zeros(2, 6, 24)}, ValueError, r"value must have shape \(2, 7, 24\) as key"),
        ({"value": torch.zeros(2, 7, 24, device="meta")}, ValueError, "value is on meta and key on cpu"),
        ({"w_q": torch.zeros(24)}, ValueError, r"w_q must have shape \(inner,C\)"),
        ({"w_out": torch.zeros(10, 16)}, ValueError, r"w_out must have shape \(10, 24\)"),
        ({"b_out": torch.zeros(9)}, ValueError, r"b_out must have shape \(10,\)"),
        ({"heads": 5}, ValueError, "heads must divide inner = 24"),
        ({"heads": 0}, ValueError, "heads must divide inner = 24"),
        ({"heads": 2.0}, TypeError, "heads must be an integer, got float"),
        ({"scale": "x"}, TypeError, "scale must be a number, got str"),
        ({"bias": torch.zeros(9, 6)}, ValueError, "bias must be broadcastable"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else None,
)
def test_block_names_bad_input(change, error, message):
    names = ("hidden", "key", "value", "w_q", "w_out", "b_out")
    good = dict(zip(names, block(dtype=torch.float32), strict=False)) | {"heads": 3}
    with pytest.raises(error, match=message):
        ck.kv_cross_attention(**(good | change))


@pytest.mark.slow
def test_compile_by_inductor(backend64):
    torch._dynamo.reset()
    model = Layers()
    compiled = torch.compile(model, fullgraph=True)
    hidden, context = torch.randn(2, 9, 10, requires_grad=True), torch.randn(2, 7, 6)
    results = []
    for function in (model, compiled):
        out = function(hidden, context)
        results.append([out, *torch.autograd.grad(out.square().sum(), (hidden, model.weight))])
    torch.testing.assert_close(*results)
