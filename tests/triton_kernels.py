"""The Triton kernels against a float64 formula; run by test_triton.py in a process of its own.

With a GPU they run on it, otherwise on the CPU under Triton's interpreter. The interpreter multiplies in full
float32, so it proves the algorithm, the masks and the addresses, and says nothing of "tf32x3" rounding.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import triton.language as tl
from triton.runtime import interpreter

from customdiff_kernels.cross_attention import configs
from customdiff_kernels.cross_attention import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as its bits and multiplies those as integers: decode them first."""
    if DEVICE == "cuda":
        return
    multiply = interpreter.InterpreterBuilder.create_dot

    def decoded(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, decoded(a), decoded(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def formula(query, key, value, bias=None, labels=None, table=None, scale=1.0):
    """softmax(q kᵀ·scale + bias) v in the inputs' dtype, zero where every score of a row is -inf."""
    if labels is not None:
        batch = max(labels.shape[0], table.shape[0])
        rows = labels.long().expand(batch, -1)
        bias = torch.stack([table.expand(batch, -1, -1)[b, rows[b]] for b in range(batch)]).unsqueeze(1)
    scores = query @ key.mT * scale
    if bias is not None:
        scores = scores + bias
    dead = (scores == -INF).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0) @ value


def gradients(inputs, grad_out, labels, scale):
    """Result and gradients of (query, key, value, bias, table) by autograd through the formula."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    query, key, value, bias, table = leaves
    out = formula(query, key, value, bias, labels, table, scale)
    given = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(out, given, grad_out))
    return [out.detach(), *(None if x is None else next(found) for x in leaves)]


def heads(n, dim, dtype, batch=1, n_heads=2, interleaved=True):
    """(B,H,n,D), a view of (B,n,H,D) memory as the attention layers have it, or contiguous."""
    if interleaved:
        return torch.randn(batch, n, n_heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    return torch.randn(batch, n_heads, n, dim, device=DEVICE).to(dtype)


def poisoned(x, dtype=None):
    return None if x is None else torch.empty_like(x, dtype=dtype).fill_(NAN)


def run(query, key, value, bias, labels, table, scale, grad_out):
    """Result and gradients by the kernels, into memory filled with NaN."""
    out = poisoned(query)
    kernels.attention_forward(query, key, value, bias, labels, table, scale, out)
    grads = [poisoned(x) for x in (query, key, value)] + [poisoned(x, torch.float32) for x in (bias, table)]
    kernels.attention_backward(grad_out, query, key, value, bias, labels, table, scale, *grads)
    return [out, *grads]


NAMES = ("out", "grad_query", "grad_key", "grad_value", "grad_bias", "grad_table")


def compare(no_worse, query, key, value, bias=None, labels=None, table=None, scale=None, slack=0):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grad_out = torch.randn_like(query)
    inputs = (query, key, value, bias, table)
    double = [None if x is None else x.double() for x in inputs]
    exact = gradients(double, grad_out.double(), labels, scale)
    if bias is not None or table is not None:  # one dtype for the formula; more exact than eager in 16 bits
        inputs = [None if x is None else x.float() for x in inputs]
    eager = gradients(inputs, grad_out.to(inputs[0].dtype), labels, scale)
    ours = run(query, key, value, bias, labels, table, scale, grad_out)
    for name, got, plain, right in zip(NAMES, ours, eager, exact, strict=True):
        if got is not None:
            no_worse(name, got, plain.to(got.dtype), right, slack)


SHAPES = [
    pytest.param(n_keys, dim, marks=[] if n_keys == 77 or dim == 40 else pytest.mark.slow)
    for n_keys in (1, 7, 77, 80, 128, 154, 512)
    for dim in (24, 40, 56, 64, 80, 128, 160, 256)
]


@pytest.mark.parametrize("n_keys, dim", SHAPES)
def test_shapes_in_float32(no_worse, n_keys, dim):
    compare(no_worse, *(heads(n, dim, torch.float32, n_heads=1) for n in (33, n_keys, n_keys)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "n_keys, dim", [(77, 40), (77, 64), (77, 80), (77, 160), (7, 24), (64, 80), (128, 128), (154, 56)]
)
def test_shapes_in_16_bits(no_worse, dtype, n_keys, dim):
    compare(no_worse, *(heads(n, dim, dtype, n_heads=1) for n in (40, n_keys, n_keys)))


@pytest.mark.parametrize(
    "dim",
    [
        pytest.param(n, marks=[] if n <= 96 or n in (128, 136, 160, 200, 248, 256) else pytest.mark.slow)
        for n in range(8, 257, 8)
    ],
)
def test_every_head_dimension(no_worse, dim):
    compare(no_worse, *(heads(n, dim, torch.float16, n_heads=1) for n in (17, 20, 20)))


@pytest.mark.parametrize(
    "n_keys", [pytest.param(n, marks=[] if n % 16 in (0, 1, 15) else pytest.mark.slow) for n in range(1, 145)]
)
def test_every_length_of_the_context(no_worse, n_keys):
    compare(no_worse, *(heads(n, 24, torch.float16, n_heads=1) for n in (17, n_keys, n_keys)))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


CASES = st.tuples(
    st.tuples(*[st.integers(1, most) for most in (2, 2, 24, 100, 80)]),
    st.sampled_from(DTYPES),
    st.tuples(*[st.booleans()] * 3),
    st.none() | st.sampled_from(["BHNS", "1H1S", "B1N1", "layout"]),
)


def check_case(no_worse, case):
    torch.manual_seed(0)
    (batch, n_heads, n, n_keys, dim), dtype, memory, bias = case
    q, k, v = (
        heads(rows, dim, dtype, batch, n_heads, interleaved)
        for rows, interleaved in zip((n, n_keys, n_keys), memory, strict=True)
    )
    more = {}
    if bias == "layout":
        more["labels"] = torch.randint(0, 4, (1, n), dtype=torch.int32, device=DEVICE)
        more["table"] = torch.randn(batch, 4, n_keys, device=DEVICE)
    elif bias:
        full = {"B": batch, "H": n_heads, "N": n, "S": n_keys, "1": 1}
        more["bias"] = torch.randn([full[c] for c in bias], device=DEVICE)
    compare(no_worse, q, k, v, **more, slack=16 if q.numel() >= 32 * dim else 128)


@settings(max_examples=12)
@given(case=CASES)
def test_random_shapes(no_worse, case):
    check_case(no_worse, case)


@pytest.mark.slow
@settings(max_examples=500)
@given(case=CASES)
def test_500_random_shapes(no_worse, case):
    check_case(no_worse, case)


@pytest.mark.parametrize("n_keys", [20, 77])
@pytest.mark.parametrize(
    "shape", ["BHNS", "B1NS", "1HNS", "11NS", "BH1S", "B11S", "111S", "BHN1", "1111", "NS", "S"]
)
def test_dense_bias(no_worse, shape, n_keys):
    """A bias of each broadcast shape, and its gradient summed to that shape."""
    sizes = {"B": 2, "H": 2, "N": 20, "S": n_keys, "1": 1}
    bias = torch.randn([sizes[c] for c in shape], device=DEVICE)
    q, k, v = (heads(n, 24, torch.float16, 2) for n in (20, n_keys, n_keys))
    compare(no_worse, q, k, v, bias=bias)


@pytest.mark.parametrize(
    "batch_labels, batch_table, n_keys", [(1, 1, 77), (1, 2, 20), (2, 1, 154), (2, 2, 77)]
)
def test_layout_bias(no_worse, batch_labels, batch_table, n_keys):
    """Labels and table gathered in the kernel; more regions than one tile of 16 in the table's gradient."""
    labels = torch.randint(0, 19, (batch_labels, 20), dtype=torch.int32, device=DEVICE)
    labels[labels == 5] = 0  # a region without a pixel has gradient 0
    table = torch.randn(batch_table, 19, n_keys, device=DEVICE)
    q, k, v = (heads(n, 40, torch.float16, 2) for n in (20, n_keys, n_keys))
    compare(no_worse, q, k, v, labels=labels, table=table)


def test_a_label_outside_the_table_means_no_bias(no_worse):
    """Nothing is read or written out of bounds, whatever the labels hold."""
    labels = torch.randint(0, 3, (1, 20), dtype=torch.int32, device=DEVICE)
    table = torch.randn(1, 3, 77, device=DEVICE)
    q, k, v, g = (heads(n, 40, torch.float16) for n in (20, 77, 77, 20))
    stray = labels.clone()
    for i, label in enumerate((-1, 3, 1 << 20, 2**31 - 1, -(2**31))):
        stray[0, 4 * i], labels[0, 4 * i] = label, 3
    right = run(q, k, v, None, labels, torch.cat([table, torch.zeros_like(table)], 1), 0.2, g)
    right[-1] = right[-1][:, :3]
    for name, got, expected in zip(NAMES, run(q, k, v, None, stray, table, 0.2, g), right, strict=True):
        assert got is expected is None or torch.equal(got, expected), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bias_in_every_dtype(no_worse, dtype):
    q, k, v = (heads(n, 64, dtype) for n in (20, 77, 77))
    compare(no_worse, q, k, v, bias=torch.randn(1, 2, 20, 77, device=DEVICE))
    labels = torch.randint(0, 3, (1, 20), dtype=torch.int32, device=DEVICE)
    compare(no_worse, q, k, v, labels=labels, table=torch.randn(1, 3, 77, device=DEVICE))


def test_16_bit_bias_and_table(no_worse):
    q, k, v = (heads(n, 40, torch.bfloat16) for n in (33, 77, 77))
    compare(no_worse, q, k, v, bias=torch.randn(1, 1, 33, 77, device=DEVICE).half())
    labels = torch.randint(0, 3, (1, 33), dtype=torch.int32, device=DEVICE)
    compare(no_worse, q, k, v, labels=labels, table=torch.randn(1, 3, 77, device=DEVICE).bfloat16())


@pytest.mark.parametrize("n_keys, dtype", [(77, torch.float16), (154, torch.float16), (77, torch.float32)])
@pytest.mark.parametrize("low", [-INF, -1e8, torch.finfo(torch.float32).min])
def test_masked_rows(no_worse, low, n_keys, dtype):
    """Some keys masked, all but one, every key: -inf gives zeros there, a finite value what softmax gives."""
    bias = torch.zeros(1, 1, 33, n_keys, device=DEVICE)
    bias[..., 3, : n_keys - 2] = low  # the first tile wholly
    bias[..., 5, 1:] = low
    bias[..., 7, :] = low
    q, k, v = (heads(n, 40, dtype, n_heads=1) for n in (33, n_keys, n_keys))
    compare(no_worse, q, k, v, bias=bias)
    if low == -INF:
        out, dq, *_ = run(q, k, v, bias, None, None, 1.0, torch.randn_like(q))
        assert not out[:, :, 7].any() and not dq[:, :, 7].any()


def test_extreme_scores_stay_finite():
    q, k, v = (heads(n, 40, torch.float32, n_heads=1) * size for n, size in ((33, 1e4), (77, 1e4), (77, 1)))
    exact = formula(q.double(), k.double(), v.double())
    found = run(q, k, v, None, None, None, 1.0, torch.randn_like(q))[:4]
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-3, atol=1e-3)


def test_strides(no_worse):
    """Contiguous, sliced rows, odd offsets, keys shared by the batch through a 0-stride."""
    q = heads(20, 40, torch.float16, 2, 2, interleaved=False)
    wide = torch.randn(2, 77, 2, 2, 41, device=DEVICE).half()  # rows 41 apart: aligned to nothing
    k, v = (wide[..., i, 1:].transpose(1, 2) for i in (0, 1))
    compare(no_worse, q, k, v)
    k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    compare(no_worse, torch.randn(2, 2, 40, 40, device=DEVICE).half()[:, :, ::2], k, v)


def test_writes_only_its_own_rows():
    """Strided outputs: what lies between their rows stays as it was."""
    q, k, v, g = (heads(n, 40, torch.float16, 2) for n in (20, 77, 77, 20))
    memory = [torch.full((2, n, 2, 48), 7.0, device=DEVICE).half() for n in (20, 20, 77, 77)]
    out, *grads = (x[..., :40].transpose(1, 2) for x in memory)
    kernels.attention_forward(q, k, v, None, None, None, 0.2, out)
    kernels.attention_backward(g, q, k, v, None, None, None, 0.2, *grads, None, None)
    for got, right in zip((out, *grads), run(q, k, v, None, None, None, 0.2, g), strict=False):
        assert torch.equal(got, right)
    assert all((x[..., 40:] == 7.0).all() for x in memory)


@pytest.mark.parametrize("n_keys, layout", [(20, True), (90, False)])
def test_each_subset_of_the_gradients(n_keys, layout):
    """Any gradient may be left out, and the others do not change by a bit."""
    q, k, v, g = (heads(n, 24, torch.float16, n_heads=1) for n in (20, n_keys, n_keys, 20))
    biases = [torch.randn(1, 1, 20, n_keys, device=DEVICE), None, None]
    if layout:
        labels = torch.randint(0, 3, (1, 20), dtype=torch.int32, device=DEVICE)
        biases = [None, labels, torch.randn(1, 3, n_keys, device=DEVICE)]
    together = run(q, k, v, *biases, 0.2, g)[1:]
    for wanted in itertools.product([False, True], repeat=4):
        wanted = [*wanted[:3], wanted[3] and not layout, wanted[3] and layout]
        grads = [poisoned(x) if want else None for x, want in zip(together, wanted, strict=True)]
        kernels.attention_backward(g, q, k, v, *biases, 0.2, *grads)
        for got, right, want in zip(grads, together, wanted, strict=True):
            assert not want or torch.equal(got, right)


@pytest.mark.parametrize("n_keys", [77, 154])
def test_repeatable_and_split_anyhow(monkeypatch, n_keys):
    """Two runs give the same bits; another split of the queries gives the same numbers to rounding."""
    labels = torch.randint(0, 3, (1, 50), dtype=torch.int32, device=DEVICE)
    table = torch.randn(1, 3, n_keys, device=DEVICE)
    q, k, v, g = (heads(n, 40, torch.float16, n_heads=1) for n in (50, n_keys, n_keys, 50))
    first, second = (run(q, k, v, None, labels, table, 0.2, g) for _ in range(2))
    monkeypatch.setattr(kernels, "_processors", lambda x: 1)
    other = run(q, k, v, None, labels, table, 0.2, g)
    for a, b, c in zip(first, second, other, strict=True):
        if a is not None:
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_keys, dim", [(77, 40), (77, 160), (1, 24), (154, 64)])
def test_score_moments(dtype, n_keys, dim):
    q, k = heads(70, dim, dtype) + 0.5, heads(n_keys, dim, dtype) + 0.25
    scores = q.double() @ k.double().mT
    total, squares = kernels.score_moments(q, k)
    assert total.dtype == squares.dtype == torch.float64 and total.dim() == squares.dim() == 0
    torch.testing.assert_close(total, scores.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(squares, scores.square().sum(), rtol=1e-6, atol=0)


def test_head_dimension_limit():
    q, k, v = (heads(n, 272, torch.float32) for n in (16, 7, 7))
    with pytest.raises(ValueError, match="head dimension 272"):
        kernels.attention_forward(q, k, v, None, None, None, 1.0, torch.empty_like(q))


def test_tiles_cover_exactly():
    """77 keys cost 80 columns, head dimension 40 costs 48; no cover by two powers of two is cheaper."""
    tiles = {
        1: (16,),
        24: (32,),
        40: (32, 16),
        64: (64,),
        77: (64, 16),
        80: (64, 16),
        128: (128,),
        160: (128, 32),
    }
    assert {n: configs.split_dimension(n) for n in tiles} == tiles
    powers = [0, 16, 32, 64, 128, 256]
    for n in range(1, 257):
        assert sum(configs.split_dimension(n)) == min(a + b for a in powers for b in powers if a + b >= n)
    assert configs.split_keys(154, 128) == (64, 16)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", "--durations=5"]))
