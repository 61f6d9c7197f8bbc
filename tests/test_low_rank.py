"""reconstruct against one matrix at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customdiff_kernels.low_rank import LowRankDelta, reconstruct
from customdiff_kernels.low_rank.reference import reconstruct_reference
from customdiff_kernels.stack import KVStack

pytestmark = pytest.mark.usefixtures("poison")
OPS = torch.ops.customdiff

ROWS = {"a": 32, "b": 32, "c": 16, "d": 48, "e": 48, "f": 48, "g": 1}
E = 24


def base(dtype=torch.float32, width: int = E) -> KVStack:
    return KVStack.from_mapping({name: torch.randn(rows, width, dtype=dtype) for name, rows in ROWS.items()})


def low(ranks: dict[str, int], dtype=torch.float32, width: int = E) -> LowRankDelta:
    stack = base(dtype, width)
    factors = {
        name: (torch.randn(ROWS[name], r, dtype=dtype), torch.randn(r, width, dtype=dtype) / 4)
        for name, r in ranks.items()
    }
    return LowRankDelta(stack.segments, factors)


def factors64(delta: LowRankDelta) -> dict:
    return {name: (u.double(), v.double()) for name, (u, v) in delta.factors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float16])
def test_reconstruct_against_the_reference(dtype, factor_dtype, no_worse):
    stack = base(dtype)
    deltas = [
        low({"a": 3, "b": 5, "c": 2, "d": 1, "e": 8, "f": 8, "g": 1}, factor_dtype),
        low({"c": 4, "f": 24}, factor_dtype),  # some segments only
    ]
    scales = [0.5, -2.0]
    exact = reconstruct_reference(
        {n: w.double() for n, w in stack.items()}, [factors64(d) for d in deltas], scales
    )
    in_dtype = [{n: (u.to(dtype), v.to(dtype)) for n, (u, v) in d.factors.items()} for d in deltas]
    eager = reconstruct_reference(stack, in_dtype, scales)
    found = reconstruct(stack, deltas, scales)
    assert isinstance(found, KVStack) and found.segments == stack.segments
    for name in stack:
        if dtype is torch.float64:  # eager is the reference itself
            torch.testing.assert_close(found[name], exact[name], rtol=1e-14, atol=1e-14)
        else:
            no_worse(name, found[name], eager[name], exact[name])
    as_mapping = reconstruct(dict(stack), deltas, scales)
    assert type(as_mapping) is dict and all(torch.equal(as_mapping[n], found[n]) for n in stack)


@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    ranks=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_reconstruct_any_shapes(rows, ranks, width, seed):
    generator = torch.Generator().manual_seed(seed)
    weights, factors = {}, {}
    for i, (n, r) in enumerate(zip(rows, ranks, strict=False)):
        weights[f"s{i}"] = torch.randn(n, width, generator=generator)
        factors[f"s{i}"] = (
            torch.randn(n, r, generator=generator),
            torch.randn(r, width, generator=generator),
        )
    stack = KVStack.from_mapping(weights)
    found = reconstruct(stack, LowRankDelta(stack.segments, factors))
    for name, exact in reconstruct_reference(weights, [factors], [1.0]).items():
        torch.testing.assert_close(found[name], exact, rtol=1e-5, atol=1e-5)


@given(
    terms=st.lists(
        st.tuples(st.integers(0, 150), st.integers(0, 150), st.integers(0, 9), st.floats(-3, 3)), max_size=6
    ),
    width=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    factor_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    in_place=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_terms_of_any_rows(no_worse, terms, width, dtype, factor_dtype, in_place, seed):
    """Overlapping, nested, empty, beyond a block of the kernel, of every mix of dtypes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(150, width, generator=generator).to(dtype)
    u, v, starts, scales = [], [], [], []
    exact = weight.to(torch.float64, copy=True)
    eager = weight.clone()
    for start, rows, rank, scale in terms:
        start = min(start, 150 - rows)
        u.append(torch.randn(rows, rank, generator=generator).to(factor_dtype))
        v.append(torch.randn(rank, width, generator=generator).to(factor_dtype))
        starts.append(start)
        scales.append(scale)
        exact[start : start + rows] += scale * (u[-1].double() @ v[-1].double())
        eager[start : start + rows] += scale * (u[-1].to(dtype) @ v[-1].to(dtype))
    if in_place:
        found = weight.clone()
        OPS.reconstruct_out(found, found, u, v, starts, scales)
    else:
        found = OPS.reconstruct(weight, u, v, starts, scales)
    if dtype is torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-12)
    else:
        no_worse("sum", found, eager, exact, slack=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    stack, deltas = base(dtype), [low(dict.fromkeys(ROWS, r), dtype) for r in (3, 8)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(reconstruct(stack, deltas, [0.5, 2.0]).weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_large_result_is_written_whole():
    """Beyond the caches results go past them, in memory of huge pages; and over what is read they do not."""
    rows, width = 9000, 512
    weight, u, v = torch.randn(rows, width), torch.randn(rows, 2), torch.randn(2, width)
    wanted = torch.addmm(weight, u, v)
    found = OPS.reconstruct(weight, [u], [v], [0])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    OPS.reconstruct_out(weight, weight, [u], [v], [0])
    assert torch.equal(weight, found)


def test_the_reference_runs_where_it_is_asked_for(monkeypatch):
    stack, deltas = base(torch.bfloat16), [low({"a": 3, "g": 1}), low({"a": 2})]
    native = reconstruct(stack, deltas, [0.5, 2.0]).weight
    monkeypatch.setenv("CK_BACKEND", "reference")
    torch.testing.assert_close(reconstruct(stack, deltas, [0.5, 2.0]).weight, native)
    monkeypatch.setenv("CK_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="CK_BACKEND=cuda cannot run"):
        reconstruct(stack, deltas)


def test_factors_are_not_copied():
    """Whatever their number and scales, the operator gets the very tensors that the deltas hold."""
    stack, deltas = base(), [low({"a": 2, "c": 3}), low({"a": 5})]
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        reconstruct(stack, deltas, [0.5, -1.0])
    (args,) = (args for func, args in seen if func is OPS.reconstruct.default)
    held = {t.data_ptr() for d in deltas for pair in d.factors.values() for t in pair if t.numel()}
    assert {t.data_ptr() for t in (*args[1], *args[2])} == held
    assert args[4] == [0.5, 0.5, -1.0]


def test_dense_deltas_and_many_of_both_kinds():
    stack, delta = base(torch.float64), low({"a": 2, "d": 3}, torch.float64)
    dense = {"b": torch.randn(32, E).double(), "d": torch.randn(48, E).double()}
    found = reconstruct(stack, [delta, dense], [2.0, 3.0])
    change = delta.dense()
    for name, weight in stack.items():
        wanted = weight + 2 * change[name] + 3 * dense.get(name, 0)
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-12)
    difference = found - stack
    torch.testing.assert_close(reconstruct(stack, difference).weight, found.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_deltas_are_rounded_once(dtype):
    stack, dense = base(dtype), [dict(base() - base()) for _ in range(3)]
    low_rank = low({"a": 2})
    wanted = reconstruct(stack.to(torch.float32), [*dense, low_rank]).weight.to(dtype)
    out = KVStack(torch.full_like(stack.weight, float("nan")), stack.segments)
    assert torch.equal(reconstruct(stack, [*dense, low_rank]).weight, wanted)
    assert torch.equal(reconstruct(stack, [*dense, low_rank], out=out).weight, wanted)
    with pytest.raises(TypeError, match="out must be .*, got float32"):
        reconstruct(stack, dense, out=out.to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing_in_place_or_backward(dtype):
    stack, delta = base(dtype), low(dict.fromkeys(ROWS, 3))
    scale = torch.ones((), requires_grad=True)

    def results():
        out = reconstruct(stack, delta, out=stack.clone())
        loss = reconstruct(stack, delta * scale).weight.float().square().sum()
        return out.weight, torch.autograd.grad(loss, scale)[0]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_no_delta_is_a_copy():
    stack = base()
    found = reconstruct(stack, [])
    assert torch.equal(found.weight, stack.weight) and found.weight.data_ptr() != stack.weight.data_ptr()


def test_out_and_in_place():
    stack, delta = base(), low(dict.fromkeys(ROWS, 3))
    wanted = reconstruct(stack, delta).weight
    out = KVStack(torch.full_like(stack.weight, float("nan")), stack.segments)
    assert reconstruct(stack, delta, out=out) is out and torch.equal(out.weight, wanted)
    assert reconstruct(stack, delta, out=stack) is stack and torch.equal(stack.weight, wanted)
    with pytest.raises(ValueError, match="out= is not differentiable"):
        reconstruct(stack, delta * torch.ones((), requires_grad=True), out=out)
    with pytest.raises(ValueError, match="out must be a KVStack"):
        reconstruct(stack, delta, out=KVStack(stack.weight, [("all", 0, len(stack.weight))]))
    with pytest.raises(TypeError, match="out must be float32, got float64"):
        reconstruct(stack, delta, out=stack.to(torch.float64))
    buffer = torch.randn(len(stack.weight) + 1, E)
    meets = KVStack(buffer[:-1], stack.segments), KVStack(buffer[1:], stack.segments)
    with pytest.raises(ValueError, match="out must be base itself, or share no memory with it"):
        reconstruct(meets[0], delta, out=meets[1])


@pytest.mark.parametrize(
    ("scales", "error", "message"),
    [
        ("x", TypeError, "scales must be one number for each delta, got str"),
        (object(), TypeError, "scales must be one number for each delta, got object"),
        ([None], TypeError, r"scales\[0\] must be a number, got NoneType"),
        ([math.inf], ValueError, r"scales\[0\] must be finite"),
        (torch.ones(1, 2), ValueError, r"scales\[0\] must be one number, got shape \(2,\)"),
        (torch.ones(2), ValueError, "scales must have one number for each of the 1 deltas, got 2"),
    ],
)
def test_bad_scales(scales, error, message):
    with pytest.raises(error, match=message):
        reconstruct(base(), low(dict.fromkeys(ROWS, 3)), scales)


def test_numpy_s_numbers_are_numbers():
    stack, delta, np = base(), low(dict.fromkeys(ROWS, 3)), pytest.importorskip("numpy")
    wanted = reconstruct(stack, delta, 0.5).weight
    for scales in (np.float32(0.5), np.array([0.5], np.float32)):
        assert torch.equal(reconstruct(stack, delta, scales).weight, wanted)


def test_strided_base_and_factors():
    stack, delta = base(), low(dict.fromkeys(ROWS, 3))
    wanted = reconstruct(stack, delta).weight
    strided = KVStack(stack.weight.T.contiguous().T, stack.segments)
    turned = {n: (u.T.contiguous().T, v.T.contiguous().T) for n, (u, v) in delta.factors.items()}
    found = reconstruct(strided, LowRankDelta(delta.segments, turned)).weight
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted)


def test_gradients():
    stack = base(torch.float64, width=5)
    factors = low({"a": 2, "c": 3, "d": 2, "e": 2}, torch.float64, width=5).factors
    names = ["a", "c", "d", "e"]
    leaves = [t.detach().requires_grad_() for name in names for t in factors[name]]
    weight = stack.weight.detach().requires_grad_()
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def call(weight, scales, *leaves):
        pairs = dict(zip(names, zip(leaves[::2], leaves[1::2], strict=True), strict=True))
        delta = LowRankDelta(stack.segments, pairs)
        return reconstruct(KVStack(weight, stack.segments), [delta, delta], scales).weight[::7]

    assert torch.autograd.gradcheck(call, (weight, scales, *leaves), fast_mode=True)
    leaves[0].requires_grad_(False)
    found = torch.autograd.grad(call(weight, scales, *leaves).sum(), [leaves[1]])
    assert found[0].abs().sum() > 0


def test_opcheck():
    delta = low({"a": 2, "b": 2, "c": 3, "e": 1})
    stack = base()
    u, v = ([delta.factors[n][i].requires_grad_() for n in "abce"] for i in (0, 1))
    starts = [s.start for s in stack.segments if s.name in "abce"]
    torch.library.opcheck(OPS.reconstruct, (stack.weight.requires_grad_(), u, v, starts))
    torch.library.opcheck(OPS.reconstruct, (stack.weight, u, v, starts, [0.5, 2.0, -1.0, 0.0]))
    u[1].requires_grad_(False)
    torch.library.opcheck(OPS.reconstruct, (stack.weight, u, v, starts))
    torch.library.opcheck(OPS.reconstruct, (stack.weight, [], [], []))
    torch.library.opcheck(OPS.reconstruct, (stack.weight, [], [], [], []))
    plain = [[t.detach() for t in ts] for ts in (u, v)]
    out, weight = torch.empty_like(stack.weight), stack.weight.detach()
    torch.library.opcheck(OPS.reconstruct_out, (out, weight, *plain, starts, [2.0] * 4))


def test_compile_fullgraph():
    stack, delta = base(), low(dict.fromkeys(ROWS, 3))

    def call(weight, scales):
        return reconstruct(KVStack(weight, stack.segments), [delta, delta], scales).weight.sin()

    scales = torch.tensor([0.5, 0.25])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(stack.weight, scales), call(stack.weight, scales))


def test_two_runs_give_the_same_bits():
    stack, delta = base(), low(dict.fromkeys(ROWS, 7))
    assert torch.equal(reconstruct(stack, delta).weight, reconstruct(stack, delta).weight)


def test_delta_arithmetic():
    first, second = low({"a": 2, "d": 3}, torch.float64), low({"a": 1, "g": 1}, torch.float64)
    total = (2 * first + second * 0.5).dense()
    for name, change in total.items():
        wanted = 2 * first.dense()[name] + 0.5 * second.dense()[name]
        torch.testing.assert_close(change, wanted)
    assert (first + second).rank("a") == 3 and first.rank("b") == 0
    assert first.nbytes == 8 * (2 * (32 + E) + 3 * (48 + E))
    assert first.to(torch.float16).nbytes * 4 == first.nbytes
    assert "rank 0 to 3" in repr(first)


DELTA = {"a": torch.ones(32, E)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reconstruct(DELTA, 5), TypeError, "deltas must be one or many LowRankDelta .* got int"),
        (lambda: reconstruct(DELTA, torch.ones(2, 3)), TypeError, "deltas must be one or many .* got Tensor"),
        (lambda: reconstruct(DELTA, [5]), TypeError, r"deltas\[0\] must be a LowRankDelta or .* got int"),
        (lambda: LowRankDelta([("a", 0, 1)], [1]), TypeError, "factors must map segment names .* got list"),
        (
            lambda: reconstruct(base(), {"z": torch.ones(2, E)}),
            ValueError,
            "unknown segment 'z'; the base has",
        ),
        (
            lambda: reconstruct(base(), {"a": torch.ones(2, E)}),
            ValueError,
            r"must be \(32, 24\) .* got \(2, 24\)",
        ),
        (
            lambda: reconstruct(base(), low({"a": 2}, width=E + 1)),
            ValueError,
            r"deltas\[0\]\['a'\] must be \(32, 24\)",
        ),
        (lambda: reconstruct(base(), low({"a": 2}), [1.0, 2.0]), ValueError, "each of the 1 deltas, got 2"),
        (lambda: reconstruct(base(), low({"a": 2}), float("nan")), ValueError, r"scales\[0\] must be finite"),
        (
            lambda: reconstruct(torch.ones(2, 2), low({"a": 2})),
            TypeError,
            "base must be a KVStack or a mapping",
        ),
        (lambda: low({"a": 2}).rank("z"), ValueError, "no segment named 'z'"),
        (lambda: LowRankDelta([("a", 0, 2)], {}), ValueError, "at least one segment's"),
        (lambda: LowRankDelta([("a", 0, 2)], {"a": (DELTA["a"], 1)}), TypeError, r"'a'\] v must be a torch"),
        (lambda: LowRankDelta([("a", 0, 2)], {"a": (DELTA["a"], DELTA["a"][0])}), ValueError, r"\(r,E\)"),
        (
            lambda: LowRankDelta([("a", 0, 2)], {"b": (torch.ones(2, 1), torch.ones(1, 3))}),
            ValueError,
            r"segments that do not exist: \['b'\]",
        ),
        (
            lambda: LowRankDelta([("a", 0, 2)], {"a": (torch.ones(3, 1), torch.ones(1, 3))}),
            ValueError,
            r"factors\['a'\] u must have shape \(2, 1\)",
        ),
        (
            lambda: LowRankDelta([("a", 0, 2)], {"a": (torch.ones(2, 2), torch.ones(1, 3))}),
            ValueError,
            r"factors\['a'\] v must have shape \(2, 3\)",
        ),
        (
            lambda: LowRankDelta([("a", 0, 2)], {"a": (torch.ones(2, 1).half(), torch.ones(1, 3))}),
            TypeError,
            r"factors\['a'\] u must be float32, got float16",
        ),
        (
            lambda: OPS.reconstruct(torch.ones(4, 3), [torch.ones(3, 1)], [torch.ones(1, 3)], [2]),
            ValueError,
            r"starts\[0\] must leave room .* within the 4 of base, got rows 2 to 5",
        ),
        (
            lambda: OPS.reconstruct(torch.ones(4, 3), [torch.ones(3, 1)], [torch.ones(2, 3)], [0]),
            ValueError,
            r"v\[0\] must have shape \(1, 3\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_deltas_of_other_segments_do_not_add():
    other = LowRankDelta.from_factors({"b": (torch.ones(32, 1), torch.ones(1, E))})
    with pytest.raises(ValueError, match="only deltas of the same segments"):
        low({"a": 1}) + other
