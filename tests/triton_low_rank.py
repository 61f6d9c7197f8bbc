"""Low-rank sums in Triton against float64; run by test_triton.py as triton_kernels.py is."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_kernels import DEVICE, bfloat16_products  # noqa: F401  (a fixture, and the interpreter's switch)

from customdiff_kernels.low_rank.triton import low_rank_sum

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter rounds bfloat16 towards zero.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def check(base, terms):
    columns = [list(column) for column in zip(*terms, strict=True)] if terms else [[]] * 4
    exact, size = base.double(), base.double().abs()
    for u, v, start, scale in terms:
        exact[start : start + len(u)] += scale * (u.double() @ v.double())
        size[start : start + len(u)] += abs(scale) * (u.double().abs() @ v.double().abs())
    out = torch.full_like(base, float("nan"))
    low_rank_sum(out, base, *columns)
    assert bool(((out.double() - exact).abs() <= TOLERANCE[base.dtype] * size).all())
    low_rank_sum(base, base, *columns)
    assert torch.equal(base, out)


def term(rows, rank, width, start, dtype, scale=1.0):
    u, v = torch.randn(rows, rank, device=DEVICE), torch.randn(rank, width, device=DEVICE)
    return u.to(dtype), v.to(dtype), start, scale


@pytest.mark.parametrize("weight", TYPES, ids=str)
@pytest.mark.parametrize("factor", TYPES, ids=str)
def test_every_dtype(weight, factor):
    for rows, width, rank in [(63, 64, 16), (130, 100, 33), (1, 1, 1)]:
        terms = [term(rows, rank, width, 3, factor), term(rows // 2 + 1, 8, width, 2, factor, -0.5)]
        check(torch.randn(rows + 5, width, device=DEVICE).to(weight), terms)
    check(torch.randn(70, 40, device=DEVICE).to(weight), [])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_random_sums(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    rows, width, dtype = choose.randrange(1, 150), choose.randrange(1, 140), choose.choice(TYPES[::2])
    terms = []
    for _ in range(choose.randrange(5)):
        n = choose.randrange(rows + 1)
        size = n, choose.randrange(50), width, choose.randrange(rows - n + 1)
        terms.append(term(*size, dtype, choose.choice([1.0, 0.0, -2.0, 0.3])))
    check(torch.randn(rows, width + 3, device=DEVICE)[:, :width], terms)
