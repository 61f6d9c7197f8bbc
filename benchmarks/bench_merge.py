"""Merging concepts, as full weights (two of SD 1.x, R = 24,960 and E = 768: 308 MB read and written at least)
and as low-rank changes of rank 16.

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
WIDTHS = {"SD 1.x": 768, "SD 2.1": 1024}
CASES = {  # model, target rows of each concept
    "words": ("SD 1.x", 20),
    "words and padding": ("SD 1.x", 76),
    "words, SD 2.1": ("SD 2.1", 20),
}
SDXL = [640] * 20 + [1280] * 120


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


def problem(rows, width, counts, captions):
    """Base, full concepts, the same number of rank 16, their target features, and regularisation features."""
    torch.manual_seed(0)
    base = stack(torch.randn(sum(rows), width, device=DEVICE) / width**0.5, rows)
    full = [stack(base.weight + 0.05 * torch.randn_like(base.weight) / width**0.5, rows) for _ in counts]
    targets = [torch.randn(n, width, device=DEVICE) for n in counts]
    low = [(low_rank(base, 16), t) for t in targets]
    return base, full, low, targets, torch.randn(captions, width, device=DEVICE)


@pytest.mark.parametrize("case", CASES)
def test_two_concepts(compare, smoke, case):
    model, count = CASES[case]
    shape = ([16, 32] * 2, 48, [4] * 2, 80) if smoke else (LAYERS, WIDTHS[model], [count] * 2, 200 * 76)
    base, (first, second), low, targets, reg = problem(*shape)
    concepts = [(first, targets[0]), (second, targets[1])]
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


@pytest.mark.parametrize("count", [1, 4, 8])
def test_number_of_concepts(compare, smoke, count):
    shape = ([16, 32] * 2, 48, [4] * count, 80) if smoke else (LAYERS, 768, [20] * count, 200 * 76)
    base, full, low, targets, reg = problem(*shape)
    concepts, weights = list(zip(full, targets, strict=True)), [w.weight for w in full]
    solver, out, gram = ck.MergeSolver(reg), base.clone(), reg.T @ reg
    compare(
        f"words, {count} x 20 target rows",
        {
            "Gram shared": lambda: [
                equation_5(base[n], [w[n] for w in full], targets, reg, gram) for n in base
            ],
            "one solve": lambda: one_solve(base.weight, weights, targets, reg),
            "ours, apply(out=)": lambda: solver.apply(base, concepts, out=out),
            "ours, merge": lambda: solver.merge(base, concepts),
            "ours, merge of rank 16": lambda: solver.merge(base, low),
        },
        baseline="Gram shared",
        bytes=(count + 2) * base.weight.nbytes,
    )


def test_sdxl_low_rank(compare, smoke):
    """R = 166,400, E = 2048. The peer is one float64 solve with G, the least that a merge takes without a
    kept factor; the published tool's, for each of 140 matrices, takes minutes.
    """
    shape = ([16, 32] * 2, 48, [], 80) if smoke else (SDXL, 2048, [], 4000)
    base, _, _, _, reg = problem(*shape)
    width = shape[1]
    low = [(low_rank(base, 16), torch.randn(4 if smoke else 20, width, device=DEVICE)) for _ in "ab"]
    solver, gram = ck.MergeSolver(reg), reg.T.double() @ reg.double()
    targets = torch.cat([t for _, t in low]).double()
    compare(
        "SDXL, 2 x 20 target rows, rank 16",
        {
            "solve(G, Cᵀ) alone": lambda: torch.linalg.solve(gram, targets.T),
            "ours, merge of rank 16": lambda: solver.merge(base, low),
            "ours, merge_many of 4 x rank 16": lambda: solver.merge_many(base, [low] * 4),
        },
        baseline="solve(G, Cᵀ) alone",
    )
