"""Adding low-rank changes to all key/value weights: against a copy of the same bytes and a loop of addmm.

"of limit" is the share of the slower of two limits of this run: copy bandwidth (base read and result written)
and the matrix rate. Up to a rank of some dozens it is memory, for several concepts together arithmetic.
SDXL is 14 of its 140 matrices, in the proportion of their shapes.

    pytest benchmarks/bench_reconstruct.py --benchmark
"""

import pytest
import torch

import customdiff_kernels as ck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SD = [320] * 4 + [640] * 4 + [1280] * 10 + [640] * 6 + [320] * 6 + [1280] * 2  # rows of SD 1.x and 2.1
MODELS = {"sd1": (SD, 768), "sd2": (SD, 1024), "sdxl, 14 of 140": ([640] * 2 + [1280] * 12, 2048)}
CASES = {  # ranks from, to; concepts; dtype of weights and factors
    "rank 16": (16, 16, 1, torch.float32),
    "ranks 8 to 64": (8, 64, 1, torch.float32),
    "3 concepts of rank 16": (16, 16, 3, torch.float32),
    "8 concepts of rank 16": (16, 16, 8, torch.float32),
    "rank 16, bfloat16": (16, 16, 1, torch.bfloat16),
    "rank 16, float16": (16, 16, 1, torch.float16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_reconstruct(compare, smoke, model, case):
    torch.manual_seed(0)
    rows, width = ([16, 32] * 3, 24) if smoke else MODELS[model]
    low, high, concepts, dtype = CASES[case]

    def random(*shape):
        return torch.randn(shape, device=DEVICE).to(dtype)

    weights = {f"{i}": random(n, width) for i, n in enumerate(rows)}
    base = ck.KVStack.from_mapping(weights)
    deltas = []
    for _ in range(concepts):
        ranks = torch.randint(low, high + 1, (len(rows),)).tolist()
        factors = {
            name: (random(len(w), r), random(r, width))
            for (name, w), r in zip(weights.items(), ranks, strict=True)
        }
        deltas.append(ck.LowRankDelta(base.segments, factors))
    scales, out = [0.5] * concepts, base.clone()
    ranks = sum(u.numel() for delta in deltas for u, _ in delta.factors.values())

    def addmm():
        result = {}
        for name, weight in weights.items():
            for delta, scale in zip(deltas, scales, strict=True):
                weight = torch.addmm(weight, *delta.factors[name], alpha=scale)
            result[name] = weight
        return result

    found, near = ck.reconstruct(base, deltas, scales), 1e-3 if dtype is torch.float32 else 0.25
    assert all(torch.allclose(found[n], w, rtol=near / 10, atol=near) for n, w in addmm().items())
    compare(
        f"{model}, {case}",
        {
            "addmm loop": addmm,
            "ours": lambda: ck.reconstruct(base, deltas, scales),
            "ours, out=": lambda: ck.reconstruct(base, deltas, scales, out=out),
            "copy, new": lambda: base.weight.clone(),
            "copy": lambda: out.weight.copy_(base.weight),
        },
        baseline="addmm loop",
        bytes=2 * base.weight.nbytes,
        flops=2 * ranks * width,
    )
