"""compress: ranks by energy, by number and by bytes, storage, the report."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import decaying, paper

from customdiff_kernels.low_rank import LowRankDelta, compress, singular_values
from customdiff_kernels.low_rank.reference import compress_reference, energy_rank_reference
from customdiff_kernels.stack import KVStack

pytestmark = pytest.mark.usefixtures("poison")

ROWS = {"a": 32, "b": 32, "c": 16, "d": 48, "e": 48, "f": 48, "g": 1}
E = 24


def base(dtype=torch.float32) -> KVStack:
    return KVStack.from_mapping({name: torch.randn(rows, E, dtype=dtype) for name, rows in ROWS.items()})


@pytest.mark.parametrize("energy", [0.01, 0.3, 0.6, 0.99, 1.0])
def test_energy_takes_the_smallest_rank_that_reaches_the_share(energy):
    change = {f"{rows}x{width}": decaying(rows, width) for rows, width in [(20, 24), (24, 24)]}
    change |= {"40x24": decaying(40, 24), "again": decaying(20, 24, decay=0.5)}
    delta = compress(change, energy=energy)
    for name, matrix in change.items():
        values = torch.linalg.svdvals(matrix)
        assert delta.rank(name) == energy_rank_reference(values, energy) >= 1
        u, v = compress_reference(matrix, delta.rank(name))
        torch.testing.assert_close(delta.dense()[name], u @ v, rtol=1e-9, atol=1e-9)


def test_energy_reached_exactly_is_reached():
    """Three equal singular values: a third of the sum is one of them, a hair more is two."""
    matrix = torch.zeros(4, 6, dtype=torch.float64)
    matrix[0, 0] = matrix[1, 1] = matrix[2, 2] = 5.0
    assert compress({"x": matrix}, energy=1 / 3).rank("x") == 1
    assert compress({"x": matrix}, energy=1 / 3 + 1e-6).rank("x") == 2
    assert compress({"x": matrix}, energy=1.0).rank("x") == 3


@pytest.mark.parametrize("shape", [(8, 6), (160, 192)])
@pytest.mark.parametrize("rule", [{"energy": 1e-9}, {"rank": 4}, {"max_bytes": 10_000}], ids=str)
def test_zero_has_rank_zero_and_anything_else_has_not(shape, rule):
    delta = compress({"zero": torch.zeros(shape), "tiny": torch.full(shape, 1e-20)}, **rule)
    assert delta.rank("zero") == 0 and delta.rank("tiny") == 1
    assert delta.dense()["zero"].abs().sum() == 0


def test_exact_rank_is_found_behind_rounding():
    matrix = torch.randn(30, 4).double() @ torch.randn(4, 20).double()
    for rule in ({"energy": 1.0}, {"rank": 20}, {"max_bytes": 10**6}):
        delta = compress({"x": matrix}, **rule)
        assert delta.rank("x") == 4
        torch.testing.assert_close(delta.dense()["x"], matrix)


def test_one_row_one_column_and_none():
    change = {"row": torch.randn(1, E), "none": torch.randn(0, E), "zero": torch.zeros(3, E)}
    delta = compress(change, energy=1.0)
    assert [delta.rank(name) for name in change] == [1, 0, 0]
    torch.testing.assert_close(delta.dense()["row"], change["row"])
    column = torch.randn(9, 1)
    torch.testing.assert_close(compress({"x": column}, rank=3).dense()["x"], column)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.just(15)), min_size=1, max_size=5),
    share=st.floats(0.05, 1.2),
    seed=st.integers(0, 2**16),
)
def test_budget_is_kept_and_well_spent(shapes, share, seed):
    """Within the budget, and no exchange of one singular value for a cheaper or equal unused one gains."""
    generator = torch.Generator().manual_seed(seed)
    change = {f"s{i}": torch.randn(*s, generator=generator).double() for i, s in enumerate(shapes)}
    budget = int(share * sum(8 * (r + e) * min(r, e) for r, e in shapes))
    smallest = min(8 * (r + e) for r, e in shapes)
    if budget < smallest:
        with pytest.raises(ValueError, match="max_bytes must hold a singular value"):
            compress(change, max_bytes=budget)
        return
    delta = compress(change, max_bytes=budget)
    assert delta.nbytes <= budget
    values = {n: torch.linalg.svdvals(m) for n, m in change.items()}
    cost = {n: 8 * sum(m.shape) for n, m in change.items()}
    left = budget - delta.nbytes
    for name in change:
        rank = delta.rank(name)
        assert rank == len(values[name]) or cost[name] > left  # nothing that still fits is left out
        for other in change:
            kept = delta.rank(other)
            if rank < len(values[name]) and kept and cost[name] <= cost[other]:
                assert values[name][rank] <= values[other][kept - 1] * (1 + 1e-9)


def test_budget_spends_on_the_largest_of_all_segments():
    change = {"strong": decaying(16, E) * 100, "weak": decaying(16, E)}
    delta = compress(change, max_bytes=8 * (16 + E) * 6)
    assert (delta.rank("strong"), delta.rank("weak")) == (6, 0)


def brute_force(values: list[torch.Tensor], costs: list[int], budget: int) -> float:
    """The most that can be taken off the squared error."""
    best = 0.0
    for ranks in itertools.product(*(range(len(v) + 1) for v in values)):
        if sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget:
            best = max(best, sum(float(v[:r].square().sum()) for r, v in zip(ranks, values, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_budget_against_brute_force(seed):
    """Costs that differ, budgets between: nothing better exists."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 14, (4,), generator=generator).tolist()
    change = {f"s{i}": torch.randn(n, 5, generator=generator).double() for i, n in enumerate(rows)}
    values = [torch.linalg.svdvals(m) for m in change.values()]
    costs = [8 * (n + 5) for n in rows]
    for share in (0.1, 0.3, 0.5, 0.8, 2.0):
        budget = max(min(costs), int(share * sum(c * len(v) for c, v in zip(costs, values, strict=True))))
        delta = compress(change, max_bytes=budget)
        assert delta.nbytes <= budget
        kept = sum(
            float(v[: delta.rank(name)].square().sum()) for name, v in zip(change, values, strict=True)
        )
        assert kept == pytest.approx(brute_force(values, costs, budget), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_in_the_dtype_asked_for(dtype):
    change = base() - base()
    delta, report = compress(change, max_bytes=8000, dtype=dtype, report=True)
    assert delta.dtype is dtype and 0 < delta.nbytes <= 8000 and report.bytes == delta.nbytes
    assert delta.segments == change.segments
    again = compress(delta.to(torch.float32), rank=1)
    assert max(again.rank(name) for name in ROWS) == 1


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_float16_keeps_its_digits(scale):
    """Also where the singular values alone would overflow or lose theirs."""
    change = {"x": decaying(40, E) * scale}
    delta, report = compress(change, rank=8, dtype=torch.float16, report=True)
    u, v = (factor.double() for factor in delta.factors["x"])
    best = compress_reference(change["x"], 8)
    torch.testing.assert_close(u @ v, best[0] @ best[1], rtol=0, atol=2e-3 * scale)
    assert report.segments[0].error == pytest.approx(0.8**8, rel=1e-2)


@pytest.mark.parametrize("scale", [1e-14, 1e10])
def test_what_float16_cannot_hold_is_refused(scale):
    change = {"fine": torch.eye(4), "beyond": torch.eye(4) * scale}
    with pytest.raises(ValueError, match=r"delta\['beyond'\] is beyond the range of torch.float16"):
        compress(change, rank=2, dtype=torch.float16)
    assert compress(change, rank=2, dtype=torch.bfloat16).rank("beyond") == 2


def test_low_rank_input_is_never_dense(monkeypatch):
    factors = {name: (torch.randn(rows, 9), torch.randn(9, E)) for name, rows in ROWS.items()}
    factors["c"] = (torch.randn(16, 0), torch.randn(0, E))
    delta = LowRankDelta.from_factors(factors)
    dense = delta.dense()
    monkeypatch.setattr(LowRankDelta, "dense", None)
    for rule in ({"energy": 0.6}, {"rank": 3}, {"max_bytes": 5000}):
        found, report = compress(delta, **rule, report=True)
        wanted, wanted_report = compress(
            {n: m.double() for n, m in dense.items()}, **(rule | ({"dtype": torch.float32})), report=True
        )
        assert found.dtype is torch.float32
        for name in ROWS:
            assert found.rank(name) == wanted.rank(name)
            torch.testing.assert_close(
                found.factors[name][0] @ found.factors[name][1],
                wanted.factors[name][0] @ wanted.factors[name][1],
                rtol=1e-4,
                atol=1e-4,
            )
        for ours, theirs in zip(report.segments, wanted_report.segments, strict=True):
            assert (ours.rank, ours.bytes) == (theirs.rank, theirs.bytes)
            assert ours.energy == pytest.approx(theirs.energy, abs=1e-5)
            assert ours.error == pytest.approx(theirs.error, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_report(dtype):
    change = {"a": decaying(30, E), "zero": torch.zeros(5, E).double(), "b": 3 * decaying(16, E, decay=0.5)}
    delta, report = compress(change, rank=3, dtype=dtype, report=True)
    total = wrong = kept = whole = 0.0
    for name, found in zip(change, report.segments, strict=True):
        matrix, (u, v) = change[name], delta.factors[name]
        values, error = torch.linalg.svdvals(matrix), (matrix - u.double() @ v.double()).norm()
        assert (found.name, found.rows, found.rank) == (name, len(matrix), delta.rank(name))
        assert (found.full_rank, found.bytes) == (min(matrix.shape), u.nbytes + v.nbytes)
        if name == "zero":
            assert (found.rank, found.energy, found.error) == (0, 1.0, 0.0)
        else:
            assert found.energy == pytest.approx(float(values[:3].sum() / values.sum()))
            assert found.error == pytest.approx(float(error / matrix.norm()), rel=1e-6)
        total, wrong = total + float(matrix.norm()) ** 2, wrong + float(error) ** 2
        kept, whole = kept + float(values[: found.rank].sum()), whole + float(values.sum())
    assert report.bytes == delta.nbytes
    assert report.energy == pytest.approx(kept / whole)
    assert report.error == pytest.approx((wrong / total) ** 0.5, rel=1e-6)


def test_progress_counts_every_segment():
    for change in (base() - base(), compress(base(), rank=1)):
        counts: list[int] = []
        compress(change, rank=1, progress=counts.append)
        singular_values(change, progress=counts.append)
        assert sum(counts) == 2 * len(ROWS) and min(counts) > 0


def test_two_runs_give_the_same_bits_and_leave_the_random_state():
    change = {"small": paper(20, 192), "large": paper(160, 192)}
    before = torch.get_rng_state()
    first, second = (compress(change, energy=0.6).factors for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for n in first for a, b in zip(first[n], second[n], strict=True))


def test_factors_carry_no_gradient():
    change = {"x": torch.randn(8, E, requires_grad=True), "y": torch.randn(160, E, requires_grad=True)}
    delta = compress(change, rank=2)
    again = compress(
        LowRankDelta.from_factors({"x": (torch.randn(8, 4, requires_grad=True), torch.randn(4, E))}), rank=2
    )
    assert not any(t.requires_grad for d in (delta, again) for pair in d.factors.values() for t in pair)


DELTA = {"a": torch.ones(32, E)}


def test_integers_of_numpy_are_integers():
    numpy = pytest.importorskip("numpy")
    small, wanted = compress(DELTA, rank=numpy.int64(2)), compress(DELTA, rank=2)
    assert all(torch.equal(small.factors[n][0], wanted.factors[n][0]) for n in wanted.factors)
    assert compress(DELTA, max_bytes=numpy.int32(500)).nbytes <= 500


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compress(DELTA, energy="0.5"), TypeError, "energy must be a number, got str"),
        (lambda: compress(DELTA), ValueError, "exactly one of energy, rank and max_bytes"),
        (lambda: compress(DELTA, rank=1, energy=0.5), ValueError, "exactly one of"),
        (lambda: compress(DELTA, energy=0.0), ValueError, r"energy must be in \(0, 1\], got 0.0"),
        (lambda: compress(DELTA, energy=60), ValueError, r"energy must be in \(0, 1\], got 60"),
        (lambda: compress(DELTA, rank=0), ValueError, "rank must be an integer of at least 1, got 0"),
        (lambda: compress(DELTA, rank=2.5), ValueError, "rank must be an integer of at least 1, got 2.5"),
        (lambda: compress(DELTA, max_bytes=-1), ValueError, "max_bytes must be a positive integer, got -1"),
        (lambda: compress(DELTA, max_bytes=10), ValueError, r"hold a singular value .*\(224\), got 10"),
        (lambda: compress(DELTA, rank=1, dtype=torch.int8), TypeError, "dtype must be floating"),
        (
            lambda: compress({"a": torch.full((2, 2), float("nan"))}, rank=1),
            ValueError,
            r"delta\['a'\] is not finite",
        ),
        (lambda: compress(torch.ones(2, 2), rank=1), TypeError, "delta must be a KVStack or a mapping"),
        (
            lambda: compress({"a": torch.ones(2)}, rank=1),
            ValueError,
            r"delta\['a'\] must have shape \(rows,E\)",
        ),
        (
            lambda: compress(
                LowRankDelta.from_factors({"a": (torch.ones(2, 1), torch.full((1, 2), float("inf")))}), rank=1
            ),
            ValueError,
            r"delta\['a'\] is not finite",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
