"""MergeSolver against Custom Diffusion's equations in float64, and where those have no answer."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from customdiff_kernels import _backends
from customdiff_kernels.low_rank import LowRankDelta, compress, reconstruct
from customdiff_kernels.merge import (
    ConflictingConstraintsError,
    MergeSolver,
    SingularRegularizationError,
    gram,
    problem,
    reference,
)
from customdiff_kernels.merge.reference import merge_lagrange_reference, merge_reference
from customdiff_kernels.stack import KVStack

pytestmark = pytest.mark.usefixtures("poison")
OPS = torch.ops.customdiff

ROWS = {"a": 16, "b": 16, "c": 32, "d": 8}
E = 24
EPS = torch.finfo(torch.float64).eps


def base(dtype=torch.float32) -> KVStack:
    return KVStack.from_mapping({name: torch.randn(rows, E, dtype=dtype) for name, rows in ROWS.items()})


def tuned(stack: KVStack, size: float = 0.1) -> KVStack:
    return KVStack(stack.weight + size * torch.randn_like(stack.weight), stack.segments)


def spread(rows: int, width: int, condition: float) -> torch.Tensor:
    """Features (rows,width) whose Gram matrix has that condition, float64."""
    u, v = (torch.linalg.qr(torch.randn(n, width).double())[0] for n in (rows, width))
    return (u * torch.logspace(0, -torch.tensor(condition).log10().item() / 2, width).double()) @ v.T


def scaled_residual(a: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> float:
    """LAPACK's measure of a solver: ‖Ax - b‖ / (‖A‖ ‖x‖ n eps)."""
    return float((a @ x - b).norm() / (torch.linalg.matrix_norm(a, 2) * x.norm() * len(a) * EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_equation_5_and_the_optimality_system(dtype):
    stack, reg = base(dtype), torch.randn(100, E).double()
    first, second = tuned(stack), tuned(stack)
    c1, c2 = torch.randn(4, E).double(), torch.randn(3, E).double()
    concepts = [(first, c1), (second, c2)]
    exact = merge_reference(stack.weight, [first.weight, second.weight], [c1, c2], reg)
    other = merge_lagrange_reference(stack.weight, [first.weight, second.weight], [c1, c2], reg)
    torch.testing.assert_close(exact, other, rtol=1e-10, atol=1e-10)
    bound = 1e-5 if dtype is torch.float32 else 1e-12
    solver = MergeSolver(reg)
    applied, delta = solver.apply(stack, concepts), solver.merge(stack, concepts)
    assert applied.weight.dtype is dtype and applied.segments == stack.segments
    for found in (applied, reconstruct(stack, delta)):
        assert ((found.weight - exact).norm() / exact.norm()) < bound
    assert all(delta.rank(name) == 7 for name in stack)
    report = solver.report(stack, concepts, applied)
    assert all(float(r.max()) < bound for r in report.residual.values())


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    rows=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    block=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_any_shapes_and_blocks(counts, rows, block, seed):
    torch.manual_seed(seed)
    stack = KVStack.from_mapping({f"s{i}": torch.randn(n, E).double() for i, n in enumerate(rows)})
    weights = [tuned(stack) for _ in counts]
    targets = [torch.randn(n, E).double() for n in counts]
    reg = torch.randn(60, E).double()
    exact = merge_reference(stack.weight, [w.weight for w in weights], targets, reg)
    solver, concepts = MergeSolver(reg), list(zip(weights, targets, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "BLOCK_ROWS", block)
        found = solver.apply(stack, concepts)
        report = solver.report(stack, concepts, found)
    torch.testing.assert_close(found.weight, exact, rtol=1e-9, atol=1e-9)
    size = (stack.weight @ reg.T).norm()
    drifts = [float(((w.weight - stack.weight) @ reg.T).norm() / size) for w in [found, *weights]]
    assert [report.drift, *report.concept_drift.values()] == pytest.approx(drifts, rel=1e-9)
    assert all(float(residual.max()) < 1e-8 for residual in report.residual.values())


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e10, 1e12])
def test_scaled_residuals_over_conditions(condition):
    reg = spread(80, E, condition)
    solver = MergeSolver(reg)
    g = reg.T @ reg
    assert solver.ridge == 0
    assert scaled_residual(solver.factor, solver.factor.T, g) < 30
    targets = reg[:6]  # as real ones do, they lie where the regularisation features do
    inverse = torch.cholesky_solve(targets.T, solver.factor)
    assert scaled_residual(g, inverse, targets.T) < 30
    basis, r = OPS.merge_basis(solver.factor, targets)
    assert scaled_residual(targets, basis.T, torch.eye(6).double()) < 30  # the constraints: v Cᵀ = I
    assert scaled_residual(g, basis.T @ (r.T @ r), targets.T) < 30  # and the optimality: v = S⁻¹ C G⁻¹


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_constraints_are_met_in_float32_weights(condition, low_rank):
    """As well as the float64 answer meets them once it is rounded to float32."""
    stack, reg = base(), spread(80, E, condition)
    concepts = {"one": (tuned(stack), reg[:5]), "two": (tuned(stack), reg[5:9])}
    if low_rank:
        deltas = {name: compress(w - stack, rank=3) for name, (w, _) in concepts.items()}
        concepts = {name: (deltas[name], c) for name, (_, c) in concepts.items()}
        full = [reconstruct(stack, delta) for delta in deltas.values()]
    else:
        full = [w for w, _ in concepts.values()]
    weights, targets = [w.weight for w in full], [c.float() for _, c in concepts.values()]
    rounded = KVStack(merge_reference(stack.weight, weights, targets, reg).float(), stack.segments)
    solver = MergeSolver(reg)

    def worst(merged) -> float:
        return max(float(r.max()) for r in solver.report(stack, concepts, merged).residual.values())

    for merged in (solver.apply(stack, concepts), solver.merge(stack, concepts)):
        assert worst(merged) < 2 * worst(rounded) + 1e-7
    assert worst(rounded) < 1e-5 or condition > 1e8
    report = solver.report(stack, concepts, merged)
    assert 0.5 < report.gram_condition / condition < 2
    assert report.drift < max(report.concept_drift.values())
    drifts = [float(((w.weight - stack.weight) @ reg.T.float()).norm()) for w in full]
    size = float((stack.weight @ reg.T.float()).norm())
    assert list(report.concept_drift.values()) == pytest.approx([d / size for d in drifts], rel=1e-4)


def test_drift_is_the_least_possible():
    """Any other weights that meet the constraints move the regularisation features more."""
    stack, reg = base(torch.float64), torch.randn(60, E).double()
    concept = (tuned(stack), torch.randn(4, E).double())
    solver = MergeSolver(reg)
    merged = solver.apply(stack, [concept])
    drift = ((merged.weight - stack.weight) @ reg.T).norm()
    found = solver.report(stack, [concept], merged).drift
    torch.testing.assert_close(found, float(drift / (stack.weight @ reg.T).norm()))
    free = torch.eye(E).double() - torch.linalg.pinv(concept[1]) @ concept[1]
    for _ in range(5):
        step = 1e-3 * torch.randn_like(stack.weight) @ free  # keeps every Wc
        assert ((merged.weight + step - stack.weight) @ reg.T).norm() > drift


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype, no_worse):
    """Sums are float32 and the result is rounded once: as good as the exact merge rounded to the dtype."""
    stack, reg = base(dtype), torch.randn(80, E)
    first, second = tuned(stack), tuned(stack)
    c1, c2 = torch.randn(4, E), torch.randn(3, E)
    exact = merge_reference(stack.weight, [first.weight, second.weight], [c1, c2], reg)
    found = MergeSolver(reg).apply(stack, [(first, c1), (second, c2)])
    no_worse("merged", found.weight, exact.to(dtype), exact)
    assert MergeSolver(reg).merge(stack, [(first, c1)]).dtype is torch.float32


def test_low_rank_concepts_without_forming_them():
    stack, reg = base(torch.float64), torch.randn(60, E).double()
    first, second = tuned(stack), tuned(stack)
    c1, c2 = torch.randn(3, E).double(), torch.randn(2, E).double()
    factors = compress(first - stack, energy=1.0)
    solver = MergeSolver(reg)
    exact = merge_reference(stack.weight, [first.weight, second.weight], [c1, c2], reg)
    for concepts in (
        [(factors, c1), (second, c2)],
        [(factors, c1), (dict(second), c2)],
        [(factors, c1), (compress(second - stack, energy=1.0), c2)],
    ):
        torch.testing.assert_close(solver.apply(stack, concepts).weight, exact, rtol=1e-9, atol=1e-9)
        merged = reconstruct(stack, solver.merge(stack, concepts))
        torch.testing.assert_close(merged.weight, exact, rtol=1e-9, atol=1e-9)
    part = LowRankDelta(factors.segments, {"c": factors.factors["c"]})  # a delta of one segment
    merged = solver.apply(stack, [(part, c1)])
    assert torch.equal(merged["a"], stack["a"]) and not torch.equal(merged["c"], stack["c"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_low_rank_concept_keeps_the_smaller_of_its_ranks_and_its_constraints(dtype):
    stack, reg = base(), torch.randn(60, E)
    deltas = {rank: compress(tuned(stack) - stack, rank=rank, dtype=dtype) for rank in (1, 2, 4)}
    part = LowRankDelta(deltas[4].segments, {"c": deltas[4].factors["c"]})
    full, rows = tuned(stack), torch.randn(11, E)
    concepts = [(deltas[2], rows[:3]), (deltas[4], rows[3:5]), (part, rows[5:7]), (deltas[1], rows[7:9])]
    solver = MergeSolver(reg)
    for chosen, ranks in (
        (concepts[:1], {"a": 2, "c": 2}),
        (concepts[1:2], {"a": 2, "c": 2}),
        (concepts, {"a": 2 + 2 + 0 + 1, "c": 2 + 2 + 4 + 1}),  # part: one rank a segment on average
        ([*concepts, (full, rows[9:])], {"a": 7, "c": 11}),
    ):
        merged = solver.merge(stack, chosen)
        assert {name: merged.rank(name) for name in ranks} == ranks
        weights = [w if isinstance(w, KVStack) else reconstruct(stack, w) for w, _ in chosen]
        exact = merge_reference(stack.weight, [w.weight for w in weights], [c for _, c in chosen], reg)
        for found in (reconstruct(stack, merged), solver.apply(stack, chosen)):
            assert (found.weight - exact).norm() < 1e-5 * exact.norm()


def test_merge_many_is_merge_of_each():
    stack, solver = base(), MergeSolver(torch.randn(60, E))
    first, second, third = ((tuned(stack), torch.randn(3, E)) for _ in range(3))
    merges = [[first, second], {"a": second, "b": third}]
    for found, concepts in zip(solver.merge_many(dict(stack), merges), merges, strict=True):
        wanted = solver.merge(stack, concepts)
        for name in stack:
            assert all(
                torch.equal(a, b) for a, b in zip(found.factors[name], wanted.factors[name], strict=True)
            )
    assert solver.merge_many(stack, []) == []
    with pytest.raises(TypeError, match="merges must be a list of what merge takes, got int"):
        solver.merge_many(stack, 3)


def test_report_alone_merges():
    stack, solver = base(), MergeSolver(torch.randn(60, E))
    concepts = {"one": (tuned(stack), torch.randn(3, E)), "two": (tuned(stack), torch.randn(4, E))}
    report, wanted = solver.report(stack, concepts), solver.merge(stack, concepts)
    assert report.residual.keys() == {"one", "two"} and max(map(torch.max, report.residual.values())) < 1e-5
    assert all(
        torch.equal(a, b) for a, b in zip(report.merged.factors["a"], wanted.factors["a"], strict=True)
    )
    measured = solver.report(stack, concepts, wanted)
    assert (measured.drift, measured.concept_drift) == (report.drift, report.concept_drift)


def test_one_concept_comes_back_on_its_own_words():
    stack, reg = base(), torch.randn(60, E)
    concept, targets = tuned(stack), torch.randn(5, E)
    merged = MergeSolver(reg).apply(stack, [(concept, targets)])
    torch.testing.assert_close(targets @ merged.weight.T, targets @ concept.weight.T, rtol=1e-5, atol=1e-5)


def test_base_type_order_and_out():
    stack, reg = base(), torch.randn(60, E)
    concepts = [(tuned(stack), torch.randn(3, E))]
    solver = MergeSolver(reg)
    wanted = solver.apply(stack, concepts)
    mapping = solver.apply(dict(stack), concepts)
    assert type(mapping) is dict and all(torch.equal(mapping[n], wanted[n]) for n in stack)
    shuffled = dict(reversed(list(concepts[0][0].items())))
    assert torch.equal(solver.apply(stack, [(shuffled, concepts[0][1])]).weight, wanted.weight)
    out = KVStack(torch.full_like(stack.weight, float("nan")), stack.segments)
    assert solver.apply(stack, concepts, out=out) is out and torch.equal(out.weight, wanted.weight)
    low = [(compress(concepts[0][0] - stack, energy=1.0), concepts[0][1])]
    solver.apply(stack, low, out=out)
    torch.testing.assert_close(out.weight, wanted.weight)
    assert solver.apply(stack, concepts, out=stack) is stack and torch.equal(stack.weight, wanted.weight)
    buffer = torch.randn(len(stack.weight) + 1, E)
    concepts = [(KVStack(buffer[:-1], stack.segments), concepts[0][1])]
    for out in (concepts[0][0], KVStack(buffer[1:], stack.segments)):
        with pytest.raises(ValueError, match="out must not share memory with the weights of a concept"):
            solver.apply(stack, concepts, out=out)
    meets = KVStack(buffer[:-1], stack.segments), KVStack(buffer[1:], stack.segments)
    with pytest.raises(ValueError, match="out must be base itself, or share no memory with it"):
        solver.apply(meets[0], [(tuned(stack), torch.randn(3, E))], out=meets[1])
    out = KVStack(torch.empty_like(stack.weight), stack.segments)
    with pytest.raises(ValueError, match="out must be a KVStack"):
        solver.apply(stack, concepts, out=KVStack(stack.weight, [("all", 0, len(stack.weight))]))
    with pytest.raises(ValueError, match="out= is not differentiable"):
        solver.apply(KVStack(stack.weight.clone().requires_grad_(), stack.segments), concepts, out=out)
    trained = low[0][0] * torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="out= is not differentiable"):
        solver.apply(stack, [(trained, low[0][1])], out=out)


def test_equal_rows_count_once():
    stack, reg = base(torch.float64), torch.randn(60, E).double()
    concept, rows = tuned(stack), torch.randn(3, E).double()
    wanted = MergeSolver(reg).apply(stack, [(concept, rows)])
    noisy = rows[1:2] + 1e-9 * torch.randn(1, E)
    padded = torch.cat([rows, rows[:2], noisy, rows, torch.zeros(2, E).double()])
    solver = MergeSolver(reg)
    found = solver.apply(stack, [(concept, padded)])
    torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-9, atol=1e-9)
    report = solver.report(stack, [(concept, padded)], found)
    assert report.dropped == {"concept 0": [3, 4, 5, 6, 7, 8, 9, 10]}
    assert solver.merge(stack, [(concept, padded)]).rank("a") == 3


def test_the_same_concept_twice_is_no_conflict():
    stack, reg = base(torch.float64), torch.randn(60, E).double()
    concept, rows = tuned(stack), torch.randn(4, E).double()
    solver = MergeSolver(reg)
    wanted = solver.apply(stack, [(concept, rows)])
    found = solver.apply(stack, [(concept, rows), (concept.clone(), rows[1:])])
    torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-9, atol=1e-9)


@pytest.fixture
def sharing():
    """Two concepts whose captions begin alike: the first two target features are the same, the values are
    not.
    """
    stack = base(torch.float64)
    start = torch.randn(2, E).double()
    rows = [torch.cat([start, torch.randn(n, E).double()]) for n in (2, 3)]
    concepts = {"ktn dog": (tuned(stack), rows[0]), "sks cat": (tuned(stack), rows[1])}
    return stack, concepts, MergeSolver(torch.randn(60, E).double())


def test_conflict_names_concepts_and_rows(sharing):
    stack, concepts, solver = sharing
    for call in (solver.apply, solver.merge):
        with pytest.raises(ConflictingConstraintsError, match="ktn dog row 1 and sks cat row 1") as caught:
            call(stack, concepts)
    found = [(c.concept, c.row, c.other, c.other_row) for c in caught.value.conflicts]
    assert found == [("ktn dog", 0, "sks cat", 0), ("ktn dog", 1, "sks cat", 1)]
    assert all(c.difference > 0.01 for c in caught.value.conflicts)
    assert "on_conflict='average'" in str(caught.value)
    low = {n: (compress(w - stack, energy=1.0), c) for n, (w, c) in concepts.items()}
    with pytest.raises(ConflictingConstraintsError, match="concept 0 row 0 and concept 1 row 0"):
        solver.merge(stack, list(low.values()))


def test_conflict_names_tokens(sharing):
    stack, concepts, solver = sharing
    words = {"ktn dog": "photo of ktn dog".split(), "sks cat": "photo of sks cat now".split()}
    named = {name: (*concept, words[name]) for name, concept in concepts.items()}
    message = r'"photo" of ktn dog \(row 0\) and "photo" of sks cat \(row 0\) \(values .*; "of" of ktn dog'
    with pytest.raises(ConflictingConstraintsError, match=message) as caught:
        solver.merge(stack, named)
    assert [(c.token, c.other_token) for c in caught.value.conflicts] == [("photo", "photo"), ("of", "of")]
    named["sks cat"] = concepts["sks cat"]
    with pytest.raises(ConflictingConstraintsError, match=r'"photo" of ktn dog \(row 0\) and sks cat row 0'):
        solver.merge(stack, named)
    named["sks cat"] = (*concepts["sks cat"], ["one"])
    with pytest.raises(ValueError, match="sks cat tokens must be a text for each of the 5 .* got 1"):
        solver.merge(stack, named)


def test_average_takes_the_mean_value(sharing):
    stack, concepts, solver = sharing
    merged = solver.apply(stack, concepts, on_conflict="average").weight
    (w1, c1), (w2, c2) = concepts.values()
    mean = (w1.weight + w2.weight) / 2
    torch.testing.assert_close(merged @ c1[:2].T, mean @ c1[:2].T)
    torch.testing.assert_close(merged @ c1[2:].T, w1.weight @ c1[2:].T)
    torch.testing.assert_close(merged @ c2[2:].T, w2.weight @ c2[2:].T)
    as_factors = reconstruct(stack, solver.merge(stack, concepts, on_conflict="average"))
    torch.testing.assert_close(as_factors.weight, merged)


def test_drop_leaves_shared_rows_to_the_regularisation(sharing):
    stack, concepts, solver = sharing
    merged = solver.apply(stack, concepts, on_conflict="drop")
    without = {name: (w, c[2:]) for name, (w, c) in concepts.items()}
    torch.testing.assert_close(merged.weight, solver.apply(stack, without).weight)
    report = solver.report(stack, concepts, merged, on_conflict="drop")
    assert report.dropped == {"ktn dog": [0, 1], "sks cat": [0, 1]}
    assert report.residual["sks cat"][:2].min() > 1e-3 > 1e-9 > report.residual["sks cat"][2:].max()
    only = {"ktn dog": concepts["ktn dog"], "sks cat": (concepts["sks cat"][0], concepts["sks cat"][1][:2])}
    with pytest.raises(ValueError, match="sks cat shares all of its 2 target rows"):
        solver.apply(stack, only, on_conflict="drop")


def test_more_rows_than_the_text_width():
    """One concept's rows always agree: they then determine all of its weights. Two concepts' cannot."""
    stack, reg = base(torch.float64), torch.randn(60, E).double()
    concept, rows = tuned(stack), torch.randn(2 * E, E).double()
    solver = MergeSolver(reg)
    with pytest.warns(UserWarning, match="24 target features leave 0 of the 24 directions"):
        merged = solver.apply(stack, [(concept, rows)])
    torch.testing.assert_close(merged.weight, concept.weight, rtol=1e-7, atol=1e-7)
    with pytest.warns(UserWarning, match="22 target features leave 2 of the 24 directions") as caught:
        solver.merge(stack, [(concept, rows[:22])])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver.merge(stack, [(concept, rows[:21])])
    with pytest.raises(ConflictingConstraintsError, match="48 distinct .* only 24 directions .* E=24"):
        solver.apply(stack, [(concept, rows[:E]), (tuned(stack), rows[E:])])


def test_a_row_in_the_span_of_another_concept():
    stack, solver = base(torch.float64), MergeSolver(torch.randn(60, E).double())
    first, second, rows = tuned(stack), tuned(stack), torch.randn(4, E).double()
    inside = rows[:1] - 0.5 * rows[1:2]
    with pytest.raises(ConflictingConstraintsError, match="sks row 1 and ktn row 0"):
        solver.apply(stack, {"ktn": (first, rows[:2]), "sks": (second, torch.cat([rows[2:3], inside]))})
    agreeing = {"ktn": (first, rows[:2]), "sks": (first, torch.cat([rows[2:], inside]))}
    merged = solver.apply(stack, agreeing)
    report = solver.report(stack, agreeing, merged)
    assert report.dropped == {"ktn": [], "sks": [2]} and report.residual["sks"].max() < 1e-10


@pytest.mark.parametrize(
    "features",
    [
        lambda: torch.randn(10, E),
        lambda: torch.randn(10, E).repeat(20, 1),
        lambda: torch.randn(200, 10).double() @ torch.randn(10, E).double(),
        lambda: torch.randn(200, 10).double() @ torch.randn(10, E).double() * torch.logspace(0, -6, E),
        lambda: torch.cat([torch.randn(200, 10), torch.zeros(200, E - 10)], 1),
    ],
)
def test_too_few_independent_features(features):
    found = features()
    with pytest.raises(
        SingularRegularizationError, match="only 10 independent .* E=24.*ridge='auto'"
    ) as caught:
        MergeSolver(found)
    assert (caught.value.rank, caught.value.width) == (10, E)
    solver = MergeSolver(found, ridge="auto")
    assert 0 < solver.ridge < 1e-9 and torch.linalg.cond(solver.factor) ** 2 < 2e12
    stack = base(torch.float64)
    concept = (tuned(stack), torch.randn(3, E).double())
    merged = solver.apply(stack, [concept])  # the ridge does not loosen the constraints
    report = solver.report(stack, [concept], merged)
    assert report.residual["concept 0"].max() < 1e-6 and report.ridge == solver.ridge


def test_zero_features_are_singular_too():
    for ridge in (0.0, "auto", 1.0):
        with pytest.raises(SingularRegularizationError, match="only 0 independent"):
            MergeSolver(torch.zeros(50, E), ridge=ridge)


def test_ridge_is_a_share_of_the_mean_diagonal():
    reg = torch.randn(60, E).double()
    assert MergeSolver(reg, ridge="auto").ridge == 0
    g = reg.T @ reg
    factor = MergeSolver(reg, ridge=0.5).factor
    torch.testing.assert_close(factor @ factor.T, g + 0.5 * g.diagonal().mean() * torch.eye(E).double())


@given(
    rows=st.integers(1, 400),
    width=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    turned=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gram(rows, width, dtype, turned, seed):
    shape = (width, rows) if turned else (rows, width)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    features = features.T if turned else features
    found = gram.gram(features)
    torch.testing.assert_close(found, features.double().T @ features.double(), rtol=1e-13, atol=1e-12)
    assert torch.equal(found, found.T)


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    rows=st.integers(0, 150),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    turned=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_one_pass_over_the_rows(no_worse, counts, rows, width, dtype, turned, seed):
    """merge_apply and merge_residual against float64, by the rule for low precision; also in place."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.promote_types(dtype, torch.float32)

    def matrix():
        shape = (width, rows) if turned else (rows, width)
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.T if turned else values

    base, weights = matrix(), [matrix() for _ in counts]
    targets = [torch.randn(n, width, generator=generator).to(sums) for n in counts]
    basis = torch.randn(sum(counts), width, generator=generator).to(sums) / width

    def passes(dtype):
        old = base.to(dtype)
        found = [(w.to(dtype) - old) @ t.to(dtype).T for w, t in zip(weights, targets, strict=True)]
        return [old + torch.cat(found, 1) @ basis.to(dtype), *found]

    exact, eager = passes(torch.float64), passes(sums)
    found = [
        OPS.merge_apply(base, weights, targets, basis),
        *(OPS.merge_residual(base, w, t) for w, t in zip(weights, targets, strict=True)),
    ]
    eager[0] = eager[0].to(dtype)
    for what, ours, theirs, wanted in zip("arrr", found, eager, exact, strict=False):
        if dtype is torch.float64:
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
        else:
            no_worse(what, ours, theirs, wanted, slack=2)
    out = base.clone()
    OPS.merge_apply_out(out, out, weights, targets, basis)
    assert torch.equal(out, found[0])


def test_the_number_of_threads_changes_nothing():
    base, weights = torch.randn(300, 48), [torch.randn(300, 48) for _ in "ab"]
    targets, basis = [torch.randn(3, 48) for _ in "ab"], torch.randn(6, 48)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((OPS.merge_apply(base, weights, targets, basis), gram.gram(base)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_gradients_of_the_whole_merge():
    weight, w1, w2 = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    c1, c2 = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    solver = MergeSolver(torch.randn(30, 6).double())
    segments = [("a", 0, 2), ("b", 2, 5)]

    def concepts(w1, c1, w2, c2):
        return [(KVStack(w1, segments), c1), (KVStack(w2, segments), c2)]

    def apply(weight, *rest):
        return solver.apply(KVStack(weight, segments), concepts(*rest)).weight

    def merge(weight, *rest):
        return torch.cat(list(solver.merge(KVStack(weight, segments), concepts(*rest)).dense().values()))

    for call in (apply, merge):
        assert torch.autograd.gradcheck(call, (weight, w1, c1, w2, c2))
        (grad,) = torch.autograd.grad(call(weight, w1, c1, w2, c2).square().sum(), c1, create_graph=True)
        with pytest.raises(RuntimeError, match="not differentiable"):
            grad.sum().backward()


def test_gradients_of_a_merge_of_factors():
    weight, c = torch.randn(5, 6).double(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    u = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    solver, stack = MergeSolver(torch.randn(30, 6).double()), KVStack(weight, [("a", 0, 5)])

    for rows in (1, 2):  # as many constraints as ranks, and more: either form of the product

        def call(u, v, c, rows=rows):
            delta = LowRankDelta(stack.segments, {"a": (u, v)})
            concepts = [(delta, c[:rows]), (KVStack(2 * weight, stack.segments), c[rows:])]
            return solver.merge(stack, concepts).dense()["a"], solver.apply(stack, concepts).weight

        assert torch.autograd.gradcheck(call, (u, v, c))


def test_opcheck():
    weight, w1, w2 = (torch.randn(5, 6, requires_grad=True) for _ in range(3))
    c1, c2 = torch.randn(2, 6, requires_grad=True), torch.randn(1, 6)
    factor = MergeSolver(torch.randn(30, 6)).factor
    targets = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.merge_basis, (factor, targets))
    found = OPS.merge_basis(factor, targets.detach())
    torch.library.opcheck(OPS.merge_basis_backward, (torch.randn_like(found[0]), factor, *found))
    torch.library.opcheck(OPS.merge_residual, (weight, w1, c1))
    basis = torch.randn(3, 6, requires_grad=True)
    torch.library.opcheck(OPS.merge_apply, (weight, [w1, w2.detach()], [c1, c2], basis))
    plain = [t.detach() for t in (weight, w1, w2, c1, c2, basis)]
    out = torch.empty(5, 6)
    torch.library.opcheck(OPS.merge_apply_out, (out, plain[0], plain[1:3], plain[3:5], plain[5]))
    with pytest.raises(RuntimeError, match="does not differentiate the factor"):
        OPS.merge_basis(factor.clone().requires_grad_(), targets)


def test_compile_fullgraph():
    weight, w1, w2 = (torch.randn(5, 6) for _ in range(3))
    targets, factor = torch.randn(3, 6).double(), MergeSolver(torch.randn(30, 6)).factor

    def call(weight, w1, w2, targets):
        basis, _ = OPS.merge_basis(factor, targets)
        rows = [targets[:2].float(), targets[2:].float()]
        left = OPS.merge_residual(weight, w1, rows[0])
        return OPS.merge_apply(weight, [w1, w2], rows, basis.float()).sin(), left

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, w1, w2, targets), call(weight, w1, w2, targets))


def test_two_runs_give_the_same_bits():
    stack, reg = base(), torch.randn(60, E)
    concepts = [(tuned(stack), torch.randn(3, E)), (tuned(stack), torch.randn(4, E))]
    first, second = (MergeSolver(reg).apply(stack, concepts).weight for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(dtype):
    stack, reg = base(), torch.randn(60, E)
    first, second = tuned(stack), compress(tuned(stack) - stack, rank=2)
    concepts = [(first, torch.randn(3, E)), (second, torch.randn(4, E))]
    stack = stack.to(dtype)
    target = concepts[0][1].clone().requires_grad_()

    def results():
        solver = MergeSolver(reg)
        merged = solver.apply(stack, concepts)
        in_place = solver.apply(stack, concepts[:1], out=stack.clone())
        delta = solver.merge(stack, concepts)
        loss = solver.apply(stack, [(first, target)]).weight.float().square().sum()
        gradient = torch.autograd.grad(loss, target)[0]  # inside the block, as training scripts do
        rebuilt = reconstruct(stack, delta).weight
        drift = torch.tensor(solver.report(stack, concepts, delta).drift)
        return merged.weight, in_place.weight, rebuilt, gradient, drift

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


@given(rows=st.integers(1, 12), extra=st.integers(0, 6), seed=st.integers(0, 2**16))
def test_any_mixture_of_repeated_rows_of_one_concept(rows, extra, seed):
    torch.manual_seed(seed)
    stack = base(torch.float64)
    concept, features = tuned(stack), torch.randn(rows, E).double()
    again = features[torch.randint(rows, (extra,))] * torch.randint(1, 3, (extra, 1))  # equal or dependent
    assume(rows + extra <= E)
    mixed = torch.cat([features, again])[torch.randperm(rows + extra)]
    solver = MergeSolver(torch.randn(60, E).double())
    wanted = solver.apply(stack, [(concept, features)])
    torch.testing.assert_close(
        solver.apply(stack, [(concept, mixed)]).weight, wanted.weight, rtol=1e-8, atol=1e-8
    )


def solve(concepts=None, stack=None, **options):
    stack = stack or base()
    return MergeSolver(torch.randn(60, E)).merge(stack, concepts or [(stack, torch.randn(2, E))], **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MergeSolver([[1.0]]), TypeError, "reg_features must be a torch.Tensor, got list"),
        (
            lambda: MergeSolver(torch.ones(3)),
            ValueError,
            r"reg_features must have shape \(rows,E\), got \(3,\)",
        ),
        (lambda: MergeSolver(torch.ones(3, 2).int()), TypeError, "reg_features must be float32"),
        (lambda: MergeSolver(torch.ones(0, 2)), ValueError, "reg_features must have at least one row"),
        (lambda: MergeSolver(torch.full((3, 2), float("inf"))), ValueError, "reg_features is not finite"),
        (
            lambda: MergeSolver(torch.randn(9, 2, requires_grad=True)),
            ValueError,
            "give reg_features.detach()",
        ),
        (lambda: MergeSolver(torch.randn(9, 2), ridge=-1), ValueError, "ridge must be .* got -1"),
        (lambda: MergeSolver(torch.randn(9, 2), ridge="yes"), ValueError, "ridge must be .* got 'yes'"),
        (
            lambda: MergeSolver(torch.randn(60, E)).merge(base(), []),
            ValueError,
            "concepts must hold at least one",
        ),
        (
            lambda: solve([base()]),
            TypeError,
            r"concept 0 must be \(weights, target_features\) or .* got KVStack",
        ),
        (
            lambda: solve([(base(), torch.ones(2, E + 1))]),
            ValueError,
            r"concept 0 target_features .* \(2, 24\)",
        ),
        (
            lambda: solve([(base(), torch.ones(0, E))]),
            ValueError,
            "concept 0 target_features must have at least one row",
        ),
        (
            lambda: solve({"x": (base(), torch.full((2, E), float("nan")))}),
            ValueError,
            "x target_features is not finite",
        ),
        (lambda: solve([(base(), torch.zeros(2, E))]), ValueError, "target_features are all zero"),
        (
            lambda: solve([({"a": torch.ones(16, E)}, torch.ones(1, E))]),
            ValueError,
            r"missing \['b', 'c', 'd'\]",
        ),
        (
            lambda: solve([(compress({"z": torch.ones(2, E)}, rank=1), torch.ones(1, E))]),
            ValueError,
            "concept 0 weights has the unknown segment 'z'",
        ),
        (
            lambda: solve([(compress({"a": torch.ones(2, E)}, rank=1), torch.ones(1, E))]),
            ValueError,
            r"concept 0 weights\['a'\] must have shape \(16, 1\)",
        ),
        (
            lambda: solve(stack=KVStack(torch.ones(4, E - 1), [("a", 0, 4)])),
            ValueError,
            "base has text width 23, reg_features have 24",
        ),
        (lambda: MergeSolver(torch.eye(E)).merge(base(), 5), TypeError, "concepts must be a list .* got int"),
        (lambda: solve(on_conflict="ignore"), ValueError, "on_conflict must be one of .* got 'ignore'"),
        (lambda: solve(tolerance="x"), TypeError, "tolerance must be a number, got str"),
        (lambda: solve(tolerance=2), ValueError, r"tolerance must be in \[0, 1\), got 2"),
        (
            lambda: OPS.merge_apply(
                torch.ones(4, 3), [torch.ones(4, 3)], [torch.ones(2, 3)], torch.ones(3, 3)
            ),
            ValueError,
            r"basis must have shape \(2, 3\)",
        ),
        (
            lambda: OPS.merge_residual(torch.ones(4, 3), torch.ones(5, 3), torch.ones(2, 3)),
            ValueError,
            r"weights\[0\] must have shape \(4, 3\)",
        ),
        (
            lambda: OPS.merge_basis(torch.eye(3).double(), torch.ones(4, 3).double()),
            ValueError,
            "cannot be 4 independent rows of width 3",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_gpu_without_kernels_of_ours_merges_in_plain_pytorch(monkeypatch):
    """There are none for a merge, so none are missed; a low-rank sum has some, and says so."""
    monkeypatch.delenv("CK_BACKEND", raising=False)
    for missing in ("has_cuda", "has_triton"):
        monkeypatch.setattr(_backends, missing, lambda: False)
    _backends._choose.cache_clear()
    try:
        with FakeTensorMode():
            there = torch.empty(4, 4, device="cuda")
        assert _backends.for_weights("merge", base=there) is reference
        with pytest.raises(RuntimeError, match="CUDA kernels are not built"):
            _backends.for_weights("low_rank", base=there)
    finally:
        _backends._choose.cache_clear()


SDXL = """
import json, resource, torch
import customdiff_kernels as ck
rows = [640] * 20 + [1280] * 120  # to_k and to_v of 10 and of 60 layers: 166,400
ends = torch.tensor(rows).cumsum(0).tolist()
segments = [(str(i), end - n, end) for i, (n, end) in enumerate(zip(rows, ends))]
weight = torch.empty(ends[-1], 2048).uniform_(-0.02, 0.02)  # 1.36 GB
base, reg, targets = ck.KVStack(weight, segments), torch.randn(4000, 2048), torch.randn(40, 2048)
pairs = [
    (ck.KVStack(base.weight * 1.01, segments), targets[:20]),
    (ck.KVStack(base.weight * 0.98, segments), targets[20:]),
]
solver = ck.MergeSolver(reg)
merged = solver.apply(base, pairs)
report = solver.report(base, pairs, merged)
residual = max(float(rows.max()) for rows in report.residual.values())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([ends[-1], residual, peak]))
"""


@pytest.mark.slow
def test_sdxl_is_merged_within_8_gb():
    """Two full concepts of 1.36 GB each into new weights, and the report of it."""
    done = subprocess.run([sys.executable, "-c", SDXL], capture_output=True, text=True, check=True)
    rows, residual, peak = json.loads(done.stdout)
    assert rows == 166_400 and residual < 1e-5
    assert peak < 8e9
