"""Adding low-rank changes to all key/value weights: against a copy of the same bytes and a loop of addmm.

"of limit" is the share of this run's copy bandwidth, base read and result written.

    pytest benchmarks/bench_reconstruct.py --benchmark
"""

import pytest
import torch

import customdiff_kernels as ck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SD = [320] * 4 + [640] * 4 + [1280] * 10 + [640] * 6 + [320] * 6 + [1280] * 2  # rows of SD 1.x and 2.1
MODELS = {"sd1": (SD, 768), "sd2": (SD, 1024)}
CASES = {"rank 16": (16, 16, 1), "ranks 8 to 64": (8, 64, 1), "3 concepts of rank 16": (16, 16, 3)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_reconstruct(compare, smoke, model, case):
    torch.manual_seed(0)
    (rows, width), (low, high, concepts) = ([16, 32] * 3, 24) if smoke else MODELS[model], CASES[case]
    weights = {f"{i}": torch.randn(n, width, device=DEVICE) for i, n in enumerate(rows)}
    base = ck.KVStack.from_mapping(weights)
    deltas = []
    for _ in range(concepts):
        ranks = torch.randint(low, high + 1, (len(rows),)).tolist()
        factors = {
            name: (torch.randn(len(w), r, device=DEVICE), torch.randn(r, width, device=DEVICE))
            for (name, w), r in zip(weights.items(), ranks, strict=True)
        }
        deltas.append(ck.LowRankDelta(base.segments, factors))
    out = base.clone()

    def addmm():
        result = {}
        for name, weight in weights.items():
            for delta in deltas:
                weight = torch.addmm(weight, *delta.factors[name])
            result[name] = weight
        return result

    found = ck.reconstruct(base, deltas)
    assert all(torch.allclose(found[n], w, rtol=1e-4, atol=1e-3) for n, w in addmm().items())
    compare(
        f"{model}, {case}",
        {
            "addmm loop": addmm,
            "ours": lambda: ck.reconstruct(base, deltas),
            "ours, out=": lambda: ck.reconstruct(base, deltas, out=out),
            "copy, new": lambda: base.weight.clone(),
            "copy": lambda: out.weight.copy_(base.weight),
        },
        baseline="addmm loop",
        bytes=2 * base.weight.nbytes,
    )
