"""Low-rank sums by the CUDA kernel (``csrc/cuda/low_rank.cu``), whose own source runs here on the CPU: every
variant amid foreign memory, any terms, every order of the threads, every barrier.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from conftest import GPU, NVCC
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cross_attention import LOW
from test_cuda_kernels import framed, kernels, same, untouched, useless

from customdiff_kernels import _backends
from customdiff_kernels.low_rank import LowRankDelta, reconstruct
from customdiff_kernels.stack import KVStack

TILE, SPANS, TERMS = 64, 160, 320  # rows and columns of a tile; what one launch takes


@pytest.fixture
def cuda(shim, monkeypatch):
    from customdiff_kernels.low_rank import cuda

    monkeypatch.setattr(cuda, "module", lambda: shim)
    return cuda


def exact(base, terms, dtype=torch.float64):
    result = base.to(dtype, copy=True)
    for u, v, start, scale in terms:
        result[start : start + len(u)] += scale * (u.to(dtype) @ v.to(dtype))
    return result


@pytest.fixture
def check(cuda, no_worse):
    """``check(base, terms)``: new and in place, against float64; eager PyTorch may err half as much."""

    def check(base, terms, slack=0, place=framed):
        terms = [(place(u), place(v), start, scale) for u, v, start, scale in terms]
        columns = [list(column) for column in zip(*terms, strict=True)] if terms else [[]] * 4
        out, own = place(torch.full_like(base, math.nan)), place(base)
        cuda.low_rank_sum(out, own, *columns)
        assert untouched(out) and untouched(own) and torch.equal(own, base)
        cuda.low_rank_sum(own, own, *columns)
        assert untouched(own) and torch.equal(own, out)
        no_worse("out", out, exact(base, terms, base.dtype), exact(base, terms), slack)
        return out

    return check


def term(rows, rank, width, start, dtype, scale=1.0):
    return torch.randn(rows, rank).to(dtype), torch.randn(rank, width).to(dtype), start, scale


@pytest.mark.parametrize("weight", LOW, ids=str)
@pytest.mark.parametrize("factor", LOW, ids=str)
def test_every_variant(weight, factor, shim, check):
    """Ranks and sizes at, below and above a tile's; rows that many terms change, one, or none."""
    shim.set_dropped_barrier(-1)
    for rows, width, rank in itertools.product((1, 63, 130), (1, 64, 100), (1, 16, 33)):
        terms = [term(rows, rank, width, 3, factor), term(rows // 2 + 1, 8, width, 2, factor, -0.5)]
        check(torch.randn(rows + 5, width).to(weight), terms, slack=8)
    check(torch.randn(70, 40).to(weight), [], slack=8)
    short = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
    name = f"low_rank_kernel<{short[factor]}, {short[weight]}>"
    by_place = kernels(shim)
    assert name in {by_place[at] for at in shim.launched()}


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 30))
def test_random_sums(seed, shim, check):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    shim.set_seed(seed)
    rows, width, (factor, weight) = (
        choose.randrange(1, 150),
        choose.randrange(1, 140),
        choose.choices(LOW, k=2),
    )
    terms = []
    for _ in range(choose.randrange(6)):
        n = choose.randrange(rows + 1)
        size = n, choose.randrange(50), width, choose.randrange(rows - n + 1)
        terms.append(term(*size, factor, choose.choice([1.0, 0.0, -2.0, 0.3])))

    def place(x):
        unit = choose.choice([1, 8])
        return framed(x, gaps=(unit * choose.randrange(3), 0), offset=unit * choose.randrange(4))

    check(torch.randn(rows, width).to(weight), terms, slack=32, place=place)


def test_more_than_one_launch_takes(check, shim):
    base = torch.randn(SPANS + 40, 8)
    shim.set_dropped_barrier(-1)
    check(base, [term(1, 2, 8, i, torch.float32) for i in range(0, len(base), 2)], slack=8)
    check(
        base,
        [term(len(base) // 2, 1, 8, i % 2 * 100, torch.float32, 0.1) for i in range(TERMS + 8)],
        slack=32,
    )
    assert len(shim.launched()) == 2 + 1 + 2 + 2  # in place, rows that nothing changes are left out
    with pytest.raises(ValueError, match=f"more than {TERMS} change one row"):
        check(base, [term(2, 1, 8, 0, torch.float32)] * (TERMS + 1))


def test_any_order_and_every_barrier(cuda, shim):
    """Rows that several terms change, and rows that none does."""
    base, terms = (
        torch.randn(150, 70),
        [term(*size, torch.bfloat16) for size in [(60, 40, 70, 3), (70, 8, 70, 0)]],
    )
    columns = [list(column) for column in zip(*terms, strict=True)]

    def run():
        out = torch.full_like(base, math.nan)
        cuda.low_rank_sum(out, base, *columns)
        return [out]

    right = run()
    for seed in range(4):
        shim.set_seed(seed)
        assert same(run(), right)
    assert not useless(run, shim)


def test_behind_the_public_function(cuda, monkeypatch):
    """Several dtypes of factors are multiplied as float32; factors of any strides are taken."""
    choice = _backends.Choice("cuda", "its kernels run on the CPU")
    monkeypatch.setattr(_backends, "choose", lambda device, dtype: choice)
    stack = KVStack.from_mapping({"a": torch.randn(40, 24), "b": torch.randn(80, 24)})
    factors = {
        "a": (torch.randn(40, 4), torch.randn(4, 24)),
        "b": (torch.randn(3, 80).T, torch.randn(24, 3).T),
    }
    delta = LowRankDelta(stack.segments, factors)
    wanted = stack.weight.double()
    for name, start, stop in stack.segments:
        u, v = factors[name]
        wanted[start:stop] += 0.5 * u.double() @ v.double() - 2 * u.half().double() @ v.half().double()
    found = reconstruct(stack, [delta, delta.to(torch.float16)], [0.5, -2.0])
    torch.testing.assert_close(found.weight.double(), wanted, rtol=1e-5, atol=1e-5)


DOUBLE = torch.zeros(6, 8, dtype=torch.float64)
REFUSED = [
    ("out: of another dtype", {"out": torch.zeros(6, 8).half()}),
    (r"v \(2,7\): must be a floating matrix", {"v": torch.zeros(2, 7)}),
    (r"v \(3,8\): must be a floating matrix", {"v": torch.zeros(3, 8)}),
    ("start: rows 1 to 7 are not within base", {"start": 1}),
    ("base must be float32, bfloat16 or float16", {"base": DOUBLE, "out": DOUBLE}),
    ("base must be contiguous in its rows", {"base": torch.zeros(8, 6).T}),
]


@pytest.mark.parametrize("message, change", REFUSED)
def test_refused_before_anything_is_read(message, change, cuda):
    given = {
        "out": torch.zeros(6, 8),
        "base": torch.zeros(6, 8),
        "u": torch.zeros(6, 2),
        "v": torch.zeros(2, 8),
    }
    given |= {"start": 0} | change
    with pytest.raises(ValueError, match=message):
        cuda.low_rank_sum(given["out"], given["base"], [given["u"]], [given["v"]], [given["start"]], [1.0])


@pytest.mark.parametrize(
    "backend", [pytest.param("cuda", marks=[*GPU, NVCC]), pytest.param("triton", marks=GPU)]
)
@pytest.mark.parametrize("weight", LOW, ids=str)
@pytest.mark.parametrize("factor", LOW, ids=str)
def test_on_a_gpu(backend, weight, factor, monkeypatch, no_worse):
    """The weights of SD 1.x, three concepts of several ranks; the compiled kernel in a CUDA graph, too."""
    monkeypatch.setenv("CK_BACKEND", backend)
    rows = [320] * 4 + [640] * 4 + [1280] * 10 + [640] * 6 + [320] * 6 + [1280] * 2
    base = torch.randn(sum(rows), 768, device="cuda").to(weight)
    starts = [sum(rows[:i]) for i in range(len(rows))] * 3
    ranks = [8 + i % 57 for i in range(len(starts))]
    u = [torch.randn(n, r, device="cuda").to(factor) / 9 for n, r in zip(rows * 3, ranks, strict=True)]
    v = [torch.randn(r, 768, device="cuda").to(factor) / 9 for r in ranks]
    scales = [1.0, -0.5, 2.0] * len(rows)
    terms = list(zip(u, v, starts, scales, strict=True))

    def run():
        return torch.ops.customdiff.reconstruct(base, u, v, starts, scales)

    found = run()
    no_worse("out", found, exact(base, terms, weight), exact(base, terms), 16)
    assert torch.equal(run(), found)
    if backend == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = run()
        graph.replay()
        assert torch.equal(again, found)
