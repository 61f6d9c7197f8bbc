"""customdiff::cross_attention and customdiff::score_std on every backend, against the float64 reference."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import customdiff_kernels as ck
from customdiff_kernels import _backends
from customdiff_kernels.cross_attention.reference import cross_attention_reference, score_std_reference

pytestmark = pytest.mark.usefixtures("poison")
OPS = torch.ops.customdiff

# (B, H, N, S, D): the levels of SD 1.x, SD 2.1 and SDXL with fewer image tokens; longer contexts; odd sizes
SHAPES = [
    (2, 8, 128, 77, 40),
    (1, 8, 96, 77, 80),
    (1, 8, 64, 77, 160),
    (1, 5, 300, 77, 64),
    (1, 10, 100, 77, 64),
    (1, 2, 64, 154, 64),
    (1, 2, 33, 512, 64),
    (1, 1, 1, 1, 8),
    (3, 2, 17, 5, 24),
    (1, 2, 7, 128, 36),
    (1, 2, 65, 81, 33),
    (1, 2, 40, 77, 128),
    (1, 1, 24, 100, 256),
]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def eager(query, key, value, bias, labels, table, scale):
    """The peer of the 2x rule: what a user would write, in the tensors' own dtype."""
    s = query @ key.mT * scale
    if labels is not None:
        rows = labels.long().expand(query.shape[0], -1)
        bias = torch.stack(
            [t[r] for t, r in zip(table.expand(query.shape[0], -1, -1), rows, strict=True)]
        ).unsqueeze(1)
    if bias is not None:
        s = s + bias.to(s.dtype)
    return s.softmax(-1) @ value


def inputs(shape, dtype, device="cpu", bias="none", grad=True):
    """(query, key, value, bias, labels, table) for the operators; query, key, value as views of (B,N,H,D)."""
    b, h, n, s, d = shape
    q, k, v = (torch.randn(b, m, h, d, dtype=dtype, device=device).transpose(1, 2) for m in (n, s, s))
    dense = torch.randn(b, 1, n, s, dtype=dtype, device=device) if bias == "dense" else None
    labels = torch.randint(0, 5, (1, n), dtype=torch.int32, device=device) if bias == "layout" else None
    sums = torch.float64 if dtype is torch.float64 else torch.float32
    table = torch.randn(b, 5, s, dtype=sums, device=device) if bias == "layout" else None
    found = [q, k, v, dense, labels, table]
    return [x.detach().requires_grad_() if grad and x is not None and x is not labels else x for x in found]


def gradients(function, args, scale, upstream):
    """(output, gradients of the floating arguments) with leaves of our own."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) if x is not None else None for x in args]
    out = function(*leaves, scale)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return out, torch.autograd.grad(out, wanted, upstream.to(out.dtype))


def check_against_eager(args, scale, no_worse, slack=0):
    exact_args = [x.double() if x is not None and x.is_floating_point() else x for x in args]
    upstream = torch.randn_like(args[0]).to(args[0].dtype)
    exact, exact_grads = gradients(cross_attention_reference, exact_args, scale, upstream)
    peer, peer_grads = gradients(eager, args, scale, upstream)
    ours, our_grads = gradients(OPS.cross_attention.default, args, scale, upstream)
    no_worse("output", ours, peer, exact, slack)
    names = [
        n for n, x in zip("query key value bias labels table".split(), args, strict=True) if x is not None
    ]
    names = [n for n in names if n != "labels"]
    for name, o, p, e in zip(names, our_grads, peer_grads, exact_grads, strict=True):
        if (
            name == "bias" and o.shape[-1] == 1
        ):  # a bias of all keys alike changes nothing: zero but for rounding
            assert o.abs().max() <= 2 * p.abs().max() + (1e-4 if o.dtype is torch.float32 else 1e-2)
            continue
        no_worse(f"gradient of {name}", o, p, e, slack)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_eager(shape, dtype, backend, device, no_worse):
    kind = ("none", "dense", "layout")[SHAPES.index(shape) % 3]
    check_against_eager(inputs(shape, dtype, device, kind), shape[-1] ** -0.5, no_worse)


@pytest.mark.parametrize("kind", ["none", "dense", "layout"])
def test_sd_levels_with_every_bias(kind, backend, device, no_worse):
    for shape in SHAPES[:4]:
        check_against_eager(inputs(shape, torch.float32, device, kind), shape[-1] ** -0.5, no_worse)


@st.composite
def cases(draw):
    b, h, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 70))
    s, d = draw(st.integers(1, 140)), draw(st.integers(1, 100) | st.sampled_from([128, 160, 256]))
    memory = draw(
        st.tuples(*[st.sampled_from(["bhnd", "bnhd", "sliced", "one batch", "one head", "bhdn"])] * 3)
    )
    dtype = draw(st.sampled_from(LOW))
    pattern = draw(st.none() | st.tuples(*[st.booleans()] * 4))  # which dimensions of a dense bias are 1
    layout = (
        draw(st.none() | st.tuples(st.booleans(), st.booleans(), st.integers(1, 9)))
        if pattern is None
        else None
    )
    return (b, h, n, s, d), memory, dtype, pattern, layout, draw(st.sampled_from([0.05, 0.3, -0.2]))


def strided(shape, memory, dtype, device):
    b, h, n, d = shape
    if memory == "bnhd":
        return torch.randn(b, n, h, d, dtype=dtype, device=device).transpose(1, 2)
    if memory == "sliced":  # a layer's part of the stacked projection
        return torch.randn(b, n + 2, 3, h, d + 3, dtype=dtype, device=device)[:, 1:-1, 1, :, 2:-1].transpose(
            1, 2
        )
    if memory == "bhdn" and device == "cpu":
        return torch.randn(b, h, d, n, dtype=dtype).mT
    if memory == "one batch":
        return torch.randn(1, h, n, d, dtype=dtype, device=device).expand(b, -1, -1, -1)
    if memory == "one head":
        return torch.randn(b, 1, n, d, dtype=dtype, device=device).expand(-1, h, -1, -1)
    return torch.randn(b, h, n, d, dtype=dtype, device=device)


HAS_CUDA = torch.cuda.is_available() and _backends.has_cuda()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs the CUDA kernels and a device")]


# triton_kernels.py has Triton's, which compiles for each shape; the reference is held by the grid above
@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=CUDA)], indirect=True)
@settings(max_examples=500)
@given(case=cases())
def test_500_random_shapes_and_strides(case, backend, device, no_worse):
    (b, h, n, s, d), memory, dtype, pattern, layout, scale = case
    torch.manual_seed(0)
    q, k, v = (
        strided((b, h, m, d), where, dtype, device) for m, where in zip((n, s, s), memory, strict=True)
    )
    bias = labels = table = None
    if pattern is not None:
        sizes = [1 if one else full for one, full in zip(pattern, (b, h, n, s), strict=True)]
        bias = torch.randn(sizes, dtype=dtype, device=device)
    if layout is not None:
        one_labels, one_table, regions = layout
        labels = torch.randint(0, regions, (1 if one_labels else b, n), dtype=torch.int32, device=device)
        table = torch.randn(1 if one_table else b, regions, s, device=device)
    slack = 16 if b * h * n >= 32 else 128
    check_against_eager([q, k, v, bias, labels, table], scale, no_worse, slack)


@pytest.mark.parametrize("kind", ["none", "dense", "layout"])
def test_gradcheck(kind, backend64):
    args = inputs((2, 2, 5, 4, 3), torch.float64, bias=kind)
    assert torch.autograd.gradcheck(lambda *x: OPS.cross_attention.default(*x, 0.7), args)


@pytest.mark.parametrize("pattern", [(1, 2, 1, 4), (2, 1, 5, 1), (1, 1, 1, 1)], ids=str)
def test_gradcheck_broadcast_bias(pattern, backend64):
    q, k, v, *_ = inputs((2, 2, 5, 4, 3), torch.float64)
    bias = torch.randn(pattern, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: OPS.cross_attention.default(*x, None, None, 0.7), (q, k, v, bias)
    )


def test_every_combination_of_requires_grad(backend, device):
    for kind, fourth in (("dense", 3), ("layout", 5)):
        args = inputs((2, 2, 9, 6, 8), torch.float32, device, kind, grad=False)
        upstream = torch.randn(2, 2, 9, 8, device=device)
        _, everything = gradients(OPS.cross_attention.default, args, 0.4, upstream)
        for wants in itertools.product([False, True], repeat=4):
            leaves = list(args)
            for i, want in zip((0, 1, 2, fourth), wants, strict=True):
                leaves[i] = args[i].detach().requires_grad_(want)
            out = OPS.cross_attention.default(*leaves, 0.4)
            assert out.requires_grad == any(wants)
            if any(wants):
                out.backward(upstream)
            for i, want, expected in zip((0, 1, 2, fourth), wants, everything, strict=True):
                assert (leaves[i].grad is not None) == want
                assert not want or torch.equal(leaves[i].grad, expected)


def test_one_tensor_in_every_place(backend, device):
    x = torch.randn(1, 2, 9, 8, device=device, requires_grad=True)
    apart = [x.detach().clone().requires_grad_() for _ in range(3)]
    for function in (ck.cross_attention, lambda q, k, v: ck.cross_attention(q, k, k) * ck.score_std(q, v)):
        out, expected = function(x, x, x), function(*apart)
        assert torch.equal(out, expected)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        torch.testing.assert_close(grad, sum(torch.autograd.grad(expected.square().sum(), apart)))


def test_expanded_and_transposed_upstream_gradients(backend, device):
    q, k, v, *_ = inputs((2, 2, 9, 6, 8), torch.float32, device)
    out = ck.cross_attention(q, k, v)
    ones = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    summed = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    transposed = torch.autograd.grad(out, (q, k, v), torch.ones(2, 2, 8, 9, device=device).mT)
    for a, b, c in zip(ones, summed, transposed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_scale_defaults_to_one_over_sqrt_d_and_bias_comes_after_it(backend, device):
    q, k, v, *_ = inputs((1, 2, 6, 5, 16), torch.float32, device, grad=False)
    bias = torch.randn(6, 5, device=device)
    expected = (q @ k.mT / 4 + bias).softmax(-1) @ v
    torch.testing.assert_close(ck.cross_attention(q, k, v, bias), expected)
    torch.testing.assert_close(ck.cross_attention(q, k, v, bias, scale=0.25), expected)


def test_result_keeps_the_memory_order_of_query(backend, device):
    q, k, v, *_ = inputs((2, 3, 6, 5, 8), torch.float32, device, grad=False)
    assert ck.cross_attention(q, k, v).transpose(1, 2).is_contiguous()
    assert ck.cross_attention(q.contiguous(), k, v).is_contiguous()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_masked_rows_are_zero_and_masked_keys_are_gone(dtype, backend, device):
    q, k, v, *_ = inputs((1, 2, 6, 5, 8), dtype, device)
    mask = torch.zeros(1, 1, 6, 5, device=device)
    mask[..., 3:] = -torch.inf
    mask[:, :, 2] = -torch.inf
    out = ck.cross_attention(q, k, v, mask)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert not out[:, :, 2].any() and not grads[0][:, :, 2].any()
    assert not grads[1][:, :, 3:].any() and not grads[2][:, :, 3:].any()
    assert all(g.isfinite().all() for g in grads)
    short = ck.cross_attention(q, k[:, :, :3], v[:, :, :3])
    tolerance = 4 * torch.finfo(dtype).eps
    live = [0, 1, 3, 4, 5]
    torch.testing.assert_close(out[:, :, live], short[:, :, live], atol=tolerance, rtol=tolerance)


def test_a_row_of_equal_large_negative_biases_is_unbiased(backend, device):
    q, k, v, *_ = inputs((1, 1, 4, 5, 8), torch.float32, device, grad=False)
    some = torch.zeros(4, 5, device=device)
    some[:, 2:] = -1e8
    torch.testing.assert_close(
        ck.cross_attention(q, k, v, some), ck.cross_attention(q, k[:, :, :2], v[:, :, :2])
    )
    whole = torch.full((4, 5), -1e8, device=device)  # scores round away beside it: the mean of the values
    torch.testing.assert_close(ck.cross_attention(q, k, v, whole), v.mean(2, keepdim=True).expand_as(q))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (1, 0, 3, 4, 8), (1, 2, 0, 4, 8)], ids=str)
def test_empty(shape, backend, device):
    q, k, v, *_ = inputs(shape, torch.float32, device)
    out = ck.cross_attention(q, k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and not out.any()
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize("kind", ["none", "dense", "layout"])
def test_same_bits_on_every_run_and_at_any_thread_count(kind, backend, device):
    args = inputs((2, 3, 500, 77, 40), torch.float32, device, kind, grad=False)
    upstream = torch.randn(2, 3, 500, 40, device=device)
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            out, grads = gradients(OPS.cross_attention.default, args, 0.2, upstream)
            seen.append([out, *grads])
    finally:
        torch.set_num_threads(threads)
    if backend == "reference":  # library products: the same only at one thread count
        seen = seen[1::2]
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("kind", ["none", "dense", "layout"])
def test_opcheck(kind, backend, device):
    args = inputs((2, 2, 5, 4, 8), torch.float32, device, kind)
    torch.library.opcheck(OPS.cross_attention.default, (*args, 0.3))
    grads = [x.detach() if x is not None else None for x in args]
    for needed in ([True] * 3 + [kind == "dense", kind == "layout"], [False, True, True, False, False]):
        torch.library.opcheck(
            OPS.cross_attention_backward.default,
            (torch.randn(2, 2, 5, 8, device=device), *grads, 0.3, needed),
        )


def test_opcheck_score_std(backend, device):
    q, k, *_ = inputs((2, 2, 5, 4, 8), torch.float32, device)
    torch.library.opcheck(OPS.score_std.default, (q, k))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic, backend, device):
    def guided(q, k, v, layout, bias, sigma):
        scale = 0.1 * torch.log1p(sigma**2) * ck.score_std(q, k)
        biased = ck.cross_attention(q, k, v, layout.with_scale(scale)) + ck.cross_attention(q, k, v, bias)
        return biased + ck.cross_attention(q, k, v)

    torch._dynamo.reset()
    compiled = torch.compile(guided, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (9, 12):
        q, k, v, _, labels, table = inputs((2, 2, n, 6, 8), torch.float32, device, "layout")
        layout, bias = ck.LayoutBias(labels, table), torch.randn(n, 6, device=device, requires_grad=True)
        sigma = torch.tensor(2.0, device=device)
        results = []
        for function in (guided, compiled):
            out = function(q, k, v, layout, bias, sigma)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, table, bias))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(2, 2, 9, 5), (2, 1, 9, 5), (1, 2, 1, 5), (2, 2, 9, 1)], ids=str)
def test_a_bias_in_any_memory_order(shape, backend, device):
    q, k, v, *_ = inputs((2, 2, 9, 5, 8), torch.float32, device)
    upstream, bias = torch.randn(q.shape, device=device), torch.randn(shape, device=device)
    expected = gradients(OPS.cross_attention.default, (q, k, v, bias, None, None), 0.3, upstream)
    for order in ((0, 1, 3, 2), (3, 2, 1, 0), (2, 0, 1, 3)):
        back = [order.index(i) for i in range(4)]
        moved = bias.permute(order).contiguous().permute(back)
        found = gradients(OPS.cross_attention.default, (q, k, v, moved, None, None), 0.3, upstream)
        torch.testing.assert_close(found, expected)


def test_gradient_of_a_gradient_is_refused(backend, device):
    q, k, v, *_ = inputs((1, 1, 4, 4, 8), torch.float32, device)
    (grad,) = torch.autograd.grad(ck.cross_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("low", LOW[1:], ids=str)
@pytest.mark.parametrize("given_dtypes", [LOW, [*LOW[1:], LOW[0]]], ids=["float32 query", "bfloat16 query"])
def test_autocast_casts_to_its_dtype_and_gradients_come_back(given_dtypes, low, backend, device):
    q, k, v = (
        x.detach().to(dtype).requires_grad_()
        for x, dtype in zip(inputs((1, 2, 9, 6, 8), torch.float32, device), given_dtypes, strict=False)
    )
    bias = torch.randn(9, 6, device=device)
    with torch.autocast(device, dtype=low):
        out = ck.cross_attention(q, k, v, bias)
        out.float().sum().backward()  # inside the block, where autocast is still on
        assert ck.score_std(q, k).dtype is torch.float32
    assert out.dtype is low and [x.grad.dtype for x in (q, k, v)] == given_dtypes
    assert torch.equal(out, ck.cross_attention(q.to(low), k.to(low), v.to(low), bias))


GOOD = {"query": (1, 2, 6, 8), "key": (1, 2, 5, 8), "value": (1, 2, 5, 8)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"query": torch.zeros(6, 8)}, ValueError, r"query must have shape \(B,H,N,D\), got \(6, 8\)"),
        ({"query": torch.zeros(1, 2, 6, 8, dtype=torch.int64)}, TypeError, "query must be .*got int64"),
        ({"key": torch.zeros(1, 2, 8)}, ValueError, "key must have shape"),
        ({"key": torch.zeros(1, 3, 5, 8)}, ValueError, r"key must have shape \(1, 2, 5, 8\)"),
        ({"key": torch.zeros(1, 2, 5, 4)}, ValueError, "key must have shape"),
        (
            {"key": torch.zeros(1, 2, 0, 8), "value": torch.zeros(1, 2, 0, 8)},
            ValueError,
            r"key must have at least one text token .*\(1, 2, 0, 8\) with query \(1, 2, 6, 8\)",
        ),
        (
            {"key": torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16)},
            TypeError,
            "key must be float32, got bfloat16",
        ),
        ({"key": torch.zeros(1, 2, 5, 8, device="meta")}, ValueError, "key is on meta and query on cpu"),
        ({"value": torch.zeros(1, 2, 6, 8)}, ValueError, "value must have shape .* as key"),
        ({"value": torch.zeros(1, 2, 5, 8, dtype=torch.float64)}, TypeError, "value must be float32"),
        ({"bias": torch.zeros(6, 4)}, ValueError, r"bias must be broadcastable to \(B,H,N,S\)"),
        ({"bias": torch.zeros(1, 1, 1, 6, 5)}, ValueError, "bias must be broadcastable"),
        ({"bias": torch.zeros(6, 5, dtype=torch.bool)}, TypeError, "got bool; use 0 and -inf"),
        ({"bias": torch.zeros(6, 5, dtype=torch.float64)}, TypeError, "bias must be float32"),
        ({"bias": 0.5}, TypeError, "bias must be a torch.Tensor, a LayoutBias or None, got float"),
        ({"scale": "x"}, TypeError, "scale must be a number, got str"),
        ({"scale": torch.tensor(0.3, requires_grad=True)}, TypeError, "scale must be a number, got Tensor"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else None,
)
def test_bad_input_is_named(change, error, message):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | change
    with pytest.raises(error, match=message):
        ck.cross_attention(**arguments)


@pytest.mark.parametrize(
    ("labels", "table", "message"),
    [
        ((1, 7), (1, 3, 5), r"labels must have shape \(2 or 1, 6\)"),
        ((3, 6), (1, 3, 5), "labels must have shape"),
        ((1, 6), (1, 3, 4), r"table must have shape \(2 or 1, regions, 5\)"),
        ((1, 6), (3, 3, 5), "table must have shape"),
    ],
)
def test_layout_of_another_size_is_named(labels, table, message):
    q, k = torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 5, 8)
    layout = ck.LayoutBias(torch.zeros(labels, dtype=torch.int64), torch.zeros(table))
    with pytest.raises(ValueError, match=message):
        ck.cross_attention(q, k, k, layout)


def test_a_backend_that_needs_contiguous_rows_refuses_others(monkeypatch):
    monkeypatch.setenv("CK_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_backends, "has_triton", lambda: True)
    q, k = torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 8, 6).mT
    for name, arguments in (("query", (k, q, q)), ("key", (q, k, q)), ("value", (q, q, k))):
        with pytest.raises(
            ValueError, match=rf"{name} must be contiguous in its last .*{name}\.contiguous\(\)"
        ):
            ck.cross_attention(*arguments)


def test_operators_check_their_arguments_too():
    q, k = torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 5, 8)
    labels, table = torch.zeros(1, 6, dtype=torch.int32), torch.zeros(1, 1, 5)
    with pytest.raises(ValueError, match="labels and table come together"):
        OPS.cross_attention(q, k, k, None, labels, None, 1.0)
    with pytest.raises(TypeError, match="labels must be int32"):
        OPS.cross_attention(q, k, k, None, labels.long(), table, 1.0)
    with pytest.raises(ValueError, match="got both"):
        OPS.cross_attention(q, k, k, torch.zeros(1, 1, 6, 5), labels, table, 1.0)
    for stray in (-1, 1, 2**31 - 1):  # past LayoutBias: checked where the kernels are called
        labels[0, 3] = stray
        with pytest.raises(
            ValueError, match=rf"labels must lie in 0 … 0 \(table has 1 regions\), got {stray}"
        ):
            OPS.cross_attention(q, k, k, None, labels, table, 1.0)
        with pytest.raises(ValueError, match="labels must lie in"):
            OPS.cross_attention_backward(q, q, k, k, None, labels, table, 1.0, [True] * 3 + [False] * 2)
    with pytest.raises(ValueError, match="grad_out must have shape"):
        OPS.cross_attention_backward(k, q, k, k, None, None, None, 1.0, [True] * 3 + [False] * 2)


# --- score_std ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:4], (3, 2, 17, 5, 24), (1, 1, 1, 2, 8)], ids=str)
def test_score_std(shape, dtype, backend, device):
    if dtype is torch.float64 and backend not in ("reference", "cpu"):
        pytest.skip("no float64 there")
    q, k, *_ = inputs(shape, dtype, device, grad=False)
    q = q + 0.5  # a mean, so that the second term counts
    found = ck.score_std(q, k)
    assert found.shape == () and found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), score_std_reference(q.double(), k.double()), rtol=1e-5, atol=0)


def test_score_std_gradcheck_and_edges(backend64):
    q, k, *_ = inputs((2, 2, 5, 4, 3), torch.float64)
    assert torch.autograd.gradcheck(ck.score_std, (q, k))
    assert ck.score_std(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 3)).isnan()
    flat = torch.ones(1, 2, 4, 3, requires_grad=True)
    std = ck.score_std(flat, torch.ones(1, 2, 5, 3))
    std.backward()
    assert std == 0 and not flat.grad.any()  # as torch.std, not 0/0
    plain = torch.autograd.grad(ck.score_std(q.float(), k.float()), q)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = torch.autograd.grad(ck.score_std(q.float(), k.float()), q)[0]
        low = q.detach().bfloat16()
        assert torch.equal(ck.score_std(low, k.float()), ck.score_std(low.float(), k.float()))
    assert torch.equal(plain, mixed)
    with pytest.raises(TypeError, match="key must be bfloat16, got float32"):
        ck.score_std(low, k.float())
    with pytest.raises(ValueError, match="key must have shape"):
        ck.score_std(torch.ones(1, 2, 4, 3), torch.ones(1, 2, 5, 4))
    with pytest.raises(ValueError, match="key must have at least one text token"):
        ck.score_std(torch.ones(1, 2, 4, 3), torch.ones(1, 2, 0, 3))
    with pytest.raises(TypeError, match="query must be a torch.Tensor"):
        ck.score_std(None, k)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def gpu(backend, device, monkeypatch) -> str:
    if device == "cpu":
        pytest.skip("what is tested is the GPU's")
    monkeypatch.delenv("CK_DEBUG", raising=False)
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "dense", "layout"])
def test_a_cuda_graph_of_forward_and_backward(kind, gpu):
    *_, labels, _ = inputs((2, 3, 200, 77, 40), torch.bfloat16, gpu, kind)

    def step(q, k, v, *bias):
        if labels is not None:
            bias = [ck.LayoutBias(labels, *bias, ck.score_std(q, k))]
        return ck.cross_attention(q, k, v, *bias)

    def leaves():
        return tuple(
            x
            for x in inputs((2, 3, 200, 77, 40), torch.bfloat16, gpu, kind)
            if x is not None and x.requires_grad
        )

    captured = torch.cuda.make_graphed_callables(step, leaves())
    for _ in range(2):
        given, upstream = leaves(), torch.randn(2, 3, 200, 40, device=gpu).bfloat16()
        results = []
        for function in (step, captured):
            out = function(*given)
            results.append([x.clone() for x in (out, *torch.autograd.grad(out, given, upstream))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "dense", "layout"])
def test_the_current_stream_is_used(kind, gpu):
    args = inputs((2, 3, 200, 77, 40), torch.bfloat16, gpu, kind, grad=False)
    upstream = torch.randn(2, 3, 200, 40, device=gpu).bfloat16()
    expected = gradients(OPS.cross_attention.default, args, 0.2, upstream), ck.score_std(*args[:2])
    late = [None if x is None else torch.zeros_like(x) for x in args]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # cycles; another stream would read zeros
        for x, y in zip(late, args, strict=True):
            if x is not None:
                x.copy_(y)
        found = gradients(OPS.cross_attention.default, late, 0.2, upstream), ck.score_std(*late[:2])
    torch.cuda.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(gpu):
    args = inputs((2, 3, 200, 77, 40), torch.bfloat16, gpu, "layout", grad=False)
    upstream, found = torch.randn(2, 3, 200, 40, device=gpu).bfloat16(), []
    for device in ("cuda:0", "cuda:1"):
        moved = [None if x is None else x.to(device) for x in args]
        out, grads = gradients(OPS.cross_attention.default, moved, 0.2, upstream.to(device))
        found.append([x.cpu() for x in (out, *grads, ck.score_std(*moved[:2]))])
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.gpu
def test_stray_labels_on_a_gpu_are_named_in_debug_mode_and_harmless_without(gpu, monkeypatch):
    q, k, v, _, labels, table = inputs((1, 2, 40, 77, 40), torch.bfloat16, gpu, "layout")
    labels[0, ::3], labels[0, 1::3] = 2**31 - 1, -(2**31)
    out = ck.cross_attention(q, k, v, ck.LayoutBias(labels, table))
    grads = torch.autograd.grad(out.float().sum(), (q, k, v, table))
    assert all(x.isfinite().all() for x in (out, *grads))
    monkeypatch.setenv("CK_DEBUG", "1")
    with pytest.raises(ValueError, match="labels must lie in 0 … 4 .*, got -2147483648"):
        ck.LayoutBias(labels, table)
    with pytest.raises(ValueError, match="labels must lie in 0 … 4"):
        OPS.cross_attention(q, k, v, None, labels, table, 1.0)


# --- which backend --------------------------------------------------------------------------------


def test_backend_choice_and_its_reasons(monkeypatch):
    monkeypatch.delenv("CK_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 1, 2, 8)
    assert ck.explain(q).startswith("cpu: ") and ck.explain("cpu", torch.float64).startswith("cpu: ")
    monkeypatch.setenv("CK_BACKEND", "reference")
    assert ck.explain(q) == "reference: CK_BACKEND forces it"
    monkeypatch.setenv("CK_BACKEND", "triton")
    assert "TRITON_INTERPRET=1" in ck.explain(q)
    with pytest.raises(RuntimeError, match="CK_BACKEND=triton cannot run: it takes CUDA tensors"):
        ck.cross_attention(q, q, q)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "float64" in ck.explain("cpu", torch.float64)
    monkeypatch.setenv("CK_BACKEND", "fast")
    with pytest.raises(ValueError, match="must be one of reference, cpu, cuda, triton, got 'fast'"):
        ck.cross_attention(q, q, q)


def test_a_missing_backend_is_an_error_that_names_the_remedy(monkeypatch):
    monkeypatch.delenv("CK_BACKEND", raising=False)
    monkeypatch.setattr(_backends, "is_built", lambda: False)
    monkeypatch.setattr(_backends, "has_cuda", lambda: False)
    monkeypatch.setattr(_backends, "has_triton", lambda: False)
    monkeypatch.setattr(_backends, "_choose", _backends._choose.__wrapped__)  # past the cache
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match="native library is not built; pip install"):
        ck.cross_attention(q, q, q)
    assert "CUSTOMDIFF_CUDA=ON pip install" in ck.explain("cuda")
    assert "pip install -U triton" in ck.explain("cuda")
    assert "no backend for mps" in ck.explain("mps")


def test_build_info_names_versions():
    info = ck.build_info()
    assert info["version"] == ck.__version__ and info["torch"] == torch.__version__
    assert info["native"] and "triton" in info


def test_build_info_of_a_triton_from_another_distribution(monkeypatch):
    monkeypatch.setattr("customdiff_kernels._backends.has_triton", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.9.0+nightly"))
    assert ck.build_info()["triton"] == "3.9.0+nightly"
