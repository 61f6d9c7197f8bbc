"""Merging two full-weight concepts of SD 1.x (R = 24,960, E = 768): 308 MB read and written at least.

Peers, written from the paper's equation 5: "a layer at a time" evaluates it for each of the 32 matrices, with
the Gram matrix, its LU factorisation and the explicit inverse of d Cᵀ in each, as the published tool does;
"Gram shared" spares it the Gram matrix; "one solve" is the optimality system, once, for all rows. They
compute in float32; ours takes the float64 that the conditioning of G asks for. 200 regularisation captions,
every token after the start token, as in the published tool.

    pytest benchmarks/bench_merge.py --benchmark
"""

import pytest
import torch

import customdiff_kernels as ck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = (
    [320] * 4 + [640] * 4 + [1280] * 10 + [640] * 6 + [320] * 6 + [1280] * 2
)  # rows of SD 1.x, to_k and to_v
CASES = {"words": 20, "words and padding": 76}  # target rows of each concept


def stack(weight, rows):
    ends = torch.tensor(rows).cumsum(0).tolist()
    return ck.KVStack(
        weight, [(f"{i}", end - n, end) for i, (n, end) in enumerate(zip(rows, ends, strict=True))]
    )


def low_rank(base, rank):
    return ck.LowRankDelta(
        base.segments,
        {
            name: (
                0.01 * torch.randn(len(w), rank, device=DEVICE),
                torch.randn(rank, w.shape[1], device=DEVICE),
            )
            for name, w in base.items()
        },
    )


def equation_5(base, weights, targets, reg, gram=None):
    """W0 + vᵀd for one matrix; ``gram`` where it is given rather than computed here."""
    c = torch.cat(targets)
    values = torch.cat([w @ t.T for w, t in zip(weights, targets, strict=True)], 1)
    lu = torch.linalg.lu_factor(reg.T @ reg if gram is None else gram)
    d = torch.linalg.lu_solve(*lu, c.T).T
    return base + (values - base @ c.T) @ torch.linalg.inv((d @ c.T).T).T @ d


def one_solve(base, weights, targets, reg):
    """[[G, Cᵀ], [C, 0]] [ΔWᵀ; ·] = [0; (V - W0 Cᵀ)ᵀ] for all R rows at once."""
    c = torch.cat(targets)
    values = torch.cat([w @ t.T for w, t in zip(weights, targets, strict=True)], 1)
    e, s = reg.shape[1], len(c)
    system = torch.cat([torch.cat([reg.T @ reg, c.T], 1), torch.cat([c, c.new_zeros(s, s)], 1)])
    right = torch.cat([c.new_zeros(e, len(base)), (values - base @ c.T).T])
    return base + torch.linalg.solve(system, right)[:e].T


@pytest.mark.parametrize("case", CASES)
def test_two_concepts(compare, smoke, case):
    torch.manual_seed(0)
    rows, width, count = ([16, 32] * 2, 48, 4) if smoke else (LAYERS, 768, CASES[case])
    base = stack(torch.randn(sum(rows), width, device=DEVICE) / width**0.5, rows)
    first, second = (
        stack(base.weight + 0.05 * torch.randn_like(base.weight) / width**0.5, rows) for _ in "ab"
    )
    reg = torch.randn(80 if smoke else 200 * 76, width, device=DEVICE)
    targets = [torch.randn(count, width, device=DEVICE) for _ in "ab"]
    concepts = [(first, targets[0]), (second, targets[1])]
    low = [(low_rank(base, 16), t) for t in targets]
    solver, out = ck.MergeSolver(reg), base.clone()
    gram = reg.T @ reg
    names = list(base)

    def layer_by_layer(gram=None):
        return [equation_5(base[n], [first[n], second[n]], targets, reg, gram) for n in names]

    exact = solver.apply(base, concepts).weight
    for found in (
        torch.cat(layer_by_layer()),
        one_solve(base.weight, [first.weight, second.weight], targets, reg),
    ):
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-3)
    compare(
        f"{case}, 2 x {count} target rows",
        {
            "a layer at a time": layer_by_layer,
            "Gram shared": lambda: layer_by_layer(gram),
            "one solve": lambda: one_solve(base.weight, [first.weight, second.weight], targets, reg),
            "ours, apply with the factorisation": lambda: ck.MergeSolver(reg).apply(base, concepts),
            "ours, apply": lambda: solver.apply(base, concepts),
            "ours, apply(out=)": lambda: solver.apply(base, concepts, out=out),
            "ours, merge": lambda: solver.merge(base, concepts),
            "ours, merge of rank 16": lambda: solver.merge(base, low),
        },
        baseline="a layer at a time",
        bytes=4 * base.weight.nbytes,
    )
