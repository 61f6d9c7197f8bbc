"""The CPU as the machine of the CUDA kernels (``tests/native/cuda_shim``).

Each primitive against its formula, and each mistake that the shim is there to catch.
"""

from __future__ import annotations

import math

import pytest
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(shim, name, out, a=None, b=None, n=0, blocks=1, threads=32, shared_bytes=0):
    """``out`` after the kernel of that name in ``self_test.cu``."""
    tensors = [x for x in (a, b, out) if x is not None]
    assert all(x.is_contiguous() for x in tensors)
    addresses = [0 if x is None else x.data_ptr() for x in (a, b, out)]
    shim.self_test(name, *addresses, n, blocks, threads, shared_bytes)
    return out


def transposes(shim) -> bool:
    x = torch.randn(5, 32, 32)
    return torch.equal(run(shim, "transpose", x.new_empty(x.shape), x, **TRANSPOSE), x.mT)


TRANSPOSE = {"blocks": 5, "threads": 256, "shared_bytes": 32 * 32 * 4}


def copies(shim, name: str = "copy") -> bool:
    rows = torch.randint(1, 1 << 30, (4 * 64, 4), dtype=torch.int32)
    got = run(shim, name, torch.empty_like(rows), rows, n=200, threads=64, shared_bytes=2 * 64 * 16)
    rows[200:] = 0
    return torch.equal(got, rows)


def sums_a_warp(shim) -> bool:
    x = torch.arange(32.0)
    return bool((run(shim, "warp_sum", torch.empty(32), x, shared_bytes=128) == x.sum()).all())


# --- what a correct kernel gets ---


def test_right_in_any_order(shim):
    for seed in range(50):
        shim.set_seed(seed)
        assert transposes(shim) and copies(shim) and sums_a_warp(shim), seed


def test_blocks_on_several_threads(shim, monkeypatch):
    monkeypatch.setenv("CK_SHIM_THREADS", "3")
    for seed in range(10):
        shim.set_seed(seed)
        assert transposes(shim) and copies(shim), seed
    assert shim.barriers_of_last_launch() == 8


@pytest.mark.parametrize("name, dtype", DTYPES.items())
def test_to_float(shim, name, dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    got = run(shim, f"from {name}", torch.empty(1 << 16), every, n=1 << 16, blocks=256, threads=256)
    assert torch.equal(got.nan_to_num(nan=7.0), every.float().nan_to_num(nan=7.0))
    assert torch.equal(got.signbit(), every.signbit())


def floats() -> torch.Tensor:
    """Any bits; every number of 16 bits, what lies halfway to the next, and their neighbours."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    halfway = [(every << 16) + step for step in (-1, 0, 1, 0x7FFF, 0x8000, 0x8001)]
    fp16 = every.to(torch.uint16).view(torch.float16).float().view(torch.int32)
    halfway += [fp16 + step for step in (-1, 0, 1, 0x0FFF, 0x1000, 0x1001)]
    random = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), dtype=torch.int64).to(torch.int32)
    steps = torch.arange(1 << 15, dtype=torch.float32) * 2.0**-26  # halves and quarters of fp16's subnormals
    return torch.cat([*halfway, random, steps.view(torch.int32)]).view(torch.float32)


def run_each(shim, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return run(shim, name, out, x, n=len(x), blocks=-(-len(x) // 256), threads=256)


@pytest.mark.parametrize("name, dtype", DTYPES.items())
def test_from_float(shim, name, dtype):
    x = floats()
    got, wanted = run_each(shim, f"to {name}", x, torch.empty(len(x), dtype=dtype)), x.to(dtype)
    assert torch.equal(got.isnan(), x.isnan()) and wanted.isinf().any()
    numbers = ~x.isnan()
    assert torch.equal(got[numbers].view(torch.int16), wanted[numbers].view(torch.int16))
    assert (got[~numbers].view(torch.int16) == 0x7FFF).all()


def test_pairs(shim):
    x = torch.randn(5000)
    got = run_each(shim, "pack", x, torch.empty(5000, 2, dtype=torch.int32))
    for words, dtype in zip(got.T, DTYPES.values(), strict=True):
        pairs = words.contiguous().view(dtype).view(5000, 2)
        assert torch.equal(pairs, torch.stack([x, -x], 1).to(dtype))


def tf32(x: torch.Tensor) -> torch.Tensor:
    """To the nearest of 10 bits after the leading one, ties away from zero."""
    mantissa, exponent = x.double().frexp()
    rounded = (mantissa.abs() * 2048 + 0.5).floor() / 2048
    return torch.ldexp(rounded.copysign(mantissa), exponent).float()


def test_to_tf32(shim):
    x = floats()
    got = run_each(shim, "to tf32", x, torch.empty(len(x)))
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.isinf(), x.abs().double() >= (2 - 2**-11) * 2.0**127)
    normal = x.isfinite() & (x.abs() >= 2.0**-126)
    assert torch.equal(got[normal], tf32(x[normal]))
    assert (got.view(torch.int32)[~x.isnan()] & 0x1FFF == 0).all()


def test_exp2(shim):
    x = torch.cat([torch.empty(4096).uniform_(-125, 127), torch.tensor([0.0, -0.0, 1e-40, 128, math.inf])])
    got = run_each(shim, "exp2", x, torch.empty(len(x)))
    assert torch.equal(got[-5:], torch.tensor([1, 1, 1, math.inf, math.inf]))
    assert ((got[:-5] / x[:-5].double().exp2() - 1).abs() < 2.0**-22).all()
    x = torch.tensor([-126, -127, -140, -1000, -math.inf, math.nan])
    got = run_each(shim, "exp2", x, torch.empty(len(x)))
    assert torch.equal(got[:5], torch.tensor([2.0**-126, 0, 0, 0, 0])) and got[5].isnan()


def test_ldmatrix(shim):
    rows = torch.randint(0, 1 << 15, (32, 8)).to(torch.int16)
    for seed in range(5):
        shim.set_seed(seed)
        got = run(shim, "load_matrices", torch.empty(4, 4, 32, dtype=torch.int32), rows, shared_bytes=512)
        for load, (count, transposed) in enumerate([(4, False), (4, True), (2, False), (2, True)]):
            for m in range(count):
                matrix = rows[8 * m : 8 * m + 8]
                matrix = matrix.T if transposed else matrix
                pairs = got[load, m].view(torch.int16).view(8, 4, 2)  # lane 4g+t: row g, columns 2t, 2t+1
                assert torch.equal(pairs.reshape(8, 8), matrix)


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("name, dtype", DTYPES.items())
def test_mma(shim, name, dtype, k):
    for depth in (k, 3 * 16):
        a, b, c = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype), torch.randn(16, 8)
        exact = a.double() @ b.double() + c
        size = {"n": depth, "shared_bytes": 24 * depth * 2}
        c = run(shim, f"multiply {name} k{k}", c, a, b, **size)
        assert ((c - exact).abs() <= depth // k * 2.0**-23 * exact.abs().max()).all()


def test_mma_takes_what_is_not_finite(shim):
    a, b = torch.ones(16, 16).bfloat16(), torch.ones(16, 8).bfloat16()
    a[3, 5], b[2, 7] = math.nan, math.inf
    c = run(shim, "multiply bf16 k16", torch.zeros(16, 8), a, b, n=16, shared_bytes=24 * 32)
    wanted = torch.full((16, 8), 16.0)
    wanted[:, 7], wanted[3] = math.inf, math.nan
    assert torch.equal(c.nan_to_num(nan=-1), wanted.nan_to_num(nan=-1))


def test_mma_tf32(shim):
    a, b, c = torch.randn(16, 24), torch.randn(24, 8), torch.randn(16, 8)
    truncate = lambda x: (x.view(torch.int32) & ~0x1FFF).view(torch.float32)  # noqa: E731
    for name, rounded in (("multiply tf32", tf32), ("multiply tf32, truncated", truncate)):
        exact = rounded(a).double() @ rounded(b).double() + c
        got = run(shim, name, c.clone(), a, b, n=24)
        assert (got - exact).abs().max() < 4e-6 < (got - (a @ b + c)).abs().max()


@pytest.mark.parametrize("lane_xor", [1, 2, 16, 21])
def test_shuffles(shim, lane_xor):
    x = torch.randn(96) * 100
    x[32:64] = -x[32:64].abs()
    got = run(shim, "shuffle", torch.empty(3, 96), x, n=lane_xor, threads=96)
    i = torch.arange(96)
    assert torch.equal(got[0], x[i ^ lane_xor])
    assert torch.equal(got[1], x[i ^ lane_xor].int().float() + (i ^ lane_xor))
    assert torch.equal(got[2].view(3, 32), torch.tensor([1.0, 0.0, 1.0])[:, None].expand(3, 32))


# --- what a wrong kernel gets ---


def test_a_missing_barrier_shows(shim):
    assert transposes(shim) and shim.barriers_of_last_launch() == 1
    shim.set_dropped_barrier(0)
    assert not any(seen(shim, transposes))
    shim.set_dropped_barrier(1)  # there is none
    assert all(seen(shim, transposes))


def test_a_barrier_of_one_launch(shim):
    shim.set_dropped_barrier(0, launch=1)
    assert [transposes(shim), transposes(shim), copies(shim)] == [True, False, True]
    assert shim.executed(shim.Sync.barrier) == [1, 1, 8]


def seen(shim, test) -> list[bool]:
    results = []
    for seed in range(10):
        shim.set_seed(seed)
        results.append(test(shim))
    return results


def test_each_barrier_of_a_ring_matters(shim):
    assert copies(shim) and shim.barriers_of_last_launch() == 8
    for n in range(8):
        shim.set_dropped_barrier(n)
        useless = n in (5, 7)  # no copy follows that would overwrite what is read before them
        assert all(seen(shim, copies)) == useless, n


def test_each_warp_barrier_matters(shim):
    assert sums_a_warp(shim)
    count = shim.executed(shim.Sync.warp_barrier)[-1]
    assert count == 10
    for n in range(count):
        shim.set_dropped(shim.Sync.warp_barrier, n)
        assert not all(seen(shim, sums_a_warp)), n


def test_a_missing_wait_shows(shim):
    assert copies(shim) and shim.executed(shim.Sync.copy_wait)[-1] == 5
    assert not any(seen(shim, lambda shim: copies(shim, "copy, no wait")))
    for n in range(4):
        shim.set_dropped(shim.Sync.copy_wait, n)
        assert not any(seen(shim, copies)), n


@pytest.mark.parametrize(
    "name, n, message",
    [
        ("write beyond shared memory", 0, "outside shared memory: at offset 1024 of 1024"),
        ("write beyond shared memory", 4000, "outside shared memory: at offset 5024"),
        ("write before shared memory", 3, "outside shared memory: at offset -3"),
        ("barrier that some skip", 0, r"__syncthreads \(self_test.cu:\d+\) while others are in another"),
        (
            "thread that ends early",
            0,
            r"nobody can go on: threads 0-4 wait in __syncthreads .*threads 5-5 ended",
        ),
        ("two barriers", 0, r"__syncthreads \(self_test.cu:\d+\) while others are in another"),
        ("two calls in a warp", 0, "while lanes of its warp are in __(any|shfl_xor)_sync"),
        ("part of a warp", 0, r"__any_sync \(self_test.cu:\d+\): the mask must name all lanes"),
        ("unaligned row", 0, r"ldmatrix_x2 \(self_test.cu:\d+\): offset \d+ .* not a multiple of 16"),
        ("copy outside", 0, r"copy_async_16 .* outside the block's 1024 bytes"),
        ("unaligned vector", 0, r"an address not aligned for its type \(self_test.cu:\d+\)"),
        ("index outside", 2, r"an index outside its array \(self_test.cu:\d+\)"),
    ],
)
def test_mistakes(shim, name, n, message):
    x = torch.zeros(1024)
    launch = {"n": n, "blocks": 3, "threads": 64, "shared_bytes": 1024}
    for seed in range(3):
        shim.set_seed(seed)
        with pytest.raises(RuntimeError, match=f"block [012].*{message}"):
            run(shim, name, x, x, **launch)
    assert transposes(shim)  # the next launch is as any


@pytest.mark.parametrize(
    "launch, message",
    [
        ({"threads": 48}, "48 threads"),
        ({"threads": 1056}, "1056 threads"),
        ({"threads": 0}, "0 threads"),
        ({"blocks": 0}, "0 blocks"),
        ({"blocks": 1 << 31}, "2147483648 blocks"),
        ({"shared_bytes": 163 * 1024 + 1}, "166913 bytes of shared memory"),
    ],
)
def test_bad_launches(shim, launch, message):
    with pytest.raises(RuntimeError, match=f"launch: {message}"):
        run(shim, "transpose", torch.empty(1024), torch.empty(1024), **{**TRANSPOSE, **launch})


def test_the_same_seed_fails_the_same_way(shim):
    shim.set_dropped_barrier(0)
    x = torch.arange(1024.0)
    launch = {**TRANSPOSE, "blocks": 1}
    orders = set()
    for seed in (1, 2, 3):
        shim.set_seed(seed)
        first, again = (run(shim, "transpose", torch.empty(1024), x, **launch) for _ in range(2))
        assert torch.equal(first.view(torch.int32), again.view(torch.int32))
        orders.add(tuple(first.view(torch.int32).tolist()))
    assert len(orders) == 3
