"""Singular values and eigenvectors against LAPACK in float64: which decomposition is used, and its errors."""

from __future__ import annotations

import pytest
import torch
from spectra import LARGE, SPECTRA, decaying, paper, with_values

from customdiff_kernels import _native
from customdiff_kernels.low_rank import compress, singular_values, spectrum
from customdiff_kernels.low_rank.ranks import energy_is_certain, share_bounds
from customdiff_kernels.low_rank.reference import energy_rank_reference

pytestmark = pytest.mark.usefixtures("poison")
NATIVE = pytest.mark.skipif(not _native.available(), reason="needs the native library")


@pytest.fixture
def exact_calls(monkeypatch) -> list[str]:
    """The names of the float64 decompositions that are run."""
    calls = []
    for name in ("eigh", "svd"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k)
        )
    return calls


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("rule", [{"energy": 0.6}, {"energy": 0.95}, {"rank": 30}], ids=str)
def test_large_matrices_of_every_spectrum(shape, kind, rule):
    """The rank is that of exact singular values, and all that are kept are right to 1e-5."""
    matrix = with_values(*shape, SPECTRA[kind](min(shape)), torch.float32)
    exact = torch.linalg.svdvals(matrix.double())
    u, v = compress({"x": matrix}, **rule).factors["x"]
    rank = u.shape[1]
    if "energy" in rule:
        assert rank == energy_rank_reference(exact, rule["energy"])
    else:  # float32 rounding makes any matrix one of full rank
        assert rank == 30
    q, r = torch.linalg.qr(u.double())
    found = torch.linalg.svdvals(r @ v.double())
    torch.testing.assert_close(found, exact[:rank], rtol=1e-5, atol=0)
    torch.testing.assert_close(u.double().norm(dim=0), exact[:rank], rtol=2e-5, atol=0)
    torch.testing.assert_close(v @ v.T, torch.eye(rank), rtol=0, atol=1e-5)
    best = exact[rank:].norm()
    assert (matrix.double() - u.double() @ v.double()).norm() <= best * (1 + 1e-5) + 1e-6 * exact.norm()


@NATIVE
def test_the_paper_s_spectrum_needs_no_float64(exact_calls):
    for shape in LARGE:
        compress({"x": paper(*shape)}, energy=0.6)
    assert not exact_calls
    compress({"x": with_values(160, 192, torch.ones(160).double(), torch.float32)}, energy=0.5)
    assert exact_calls, "equal singular values leave the rank open"


@NATIVE
@pytest.mark.parametrize("shape", [*LARGE, (320, 384)])
@pytest.mark.parametrize("kind", [*SPECTRA, "equal entries"])
def test_float32_shares_are_within_their_bounds(kind, shape):
    for seed in range(3):
        torch.manual_seed(seed)
        if kind == "equal entries":
            matrix = torch.full(shape, 0.1 * (seed + 1))
        else:
            matrix = with_values(*shape, SPECTRA[kind](min(shape)), torch.float32)
        (batch,) = spectrum.dense_spectra({"x": matrix})
        assert batch["x"].limit == spectrum.FLOAT_LIMIT
        least, most = share_bounds(batch["x"].values, batch["x"].error)
        values = torch.linalg.svdvals(matrix.double())
        shares = values.cumsum(0) / values.sum()
        assert bool((least - 1e-12 <= shares).all() and (shares <= most + 1e-12).all())
        assert float((most - least).max()) < 0.5 or kind in ("one", "equal entries", "rank 20", "steep")


@NATIVE
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_eigenvalues_that_overflowed_are_not_used(factor, monkeypatch):
    from customdiff_kernels.low_rank import eigen

    matrix, real = paper(160, 192), eigen.symmetric_eigen
    wanted = compress({"x": matrix}, energy=0.6).dense()["x"]
    monkeypatch.setattr(
        eigen,
        "symmetric_eigen",
        lambda a: [eigen.Eigen(e.reflectors, e.numbers * factor) for e in real(a)],
    )
    torch.testing.assert_close(compress({"x": matrix}, energy=0.6).dense()["x"], wanted)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_backend_gives_the_same(backend, monkeypatch):
    matrix = paper(160, 192)
    wanted = compress({"x": matrix}, energy=0.6).dense()["x"]
    monkeypatch.setenv("CK_BACKEND", backend)
    torch.testing.assert_close(compress({"x": matrix}, energy=0.6).dense()["x"], wanted)


def test_products_of_low_precision_are_not_used(monkeypatch):
    matrix = paper(160, 192)
    wanted = compress({"x": matrix}, energy=0.6).dense()["x"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compress({"x": matrix}, energy=0.6).dense()["x"], wanted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = compress({"x": matrix}, energy=0.6).factors["x"]
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found[0] @ found[1], wanted)


@pytest.mark.parametrize("size", [2, 3, 17, 33, 100])
@pytest.mark.parametrize("isa", (_native.build_info()["cpu"] or {"isas": []})["isas"])
def test_symmetric_eigen(isa, size, monkeypatch):
    from customdiff_kernels.low_rank.eigen import symmetric_eigen

    monkeypatch.setenv("CK_CPU_ISA", isa)
    a = torch.randn(3, size, size)
    a = a + a.mT
    garbage = torch.full_like(a, float("nan")).triu(1)
    for matrix, eigen in zip(a, symmetric_eigen(a.tril() + garbage), strict=True):
        values = torch.linalg.eigvalsh(matrix.double()).flip(0)
        scale = float(values.abs().max())
        torch.testing.assert_close(eigen.values.double(), values, rtol=0, atol=2e-6 * scale)
        count = (size + 1) // 2
        q = eigen.vectors(count).double()
        torch.testing.assert_close(q.T @ q, torch.eye(count).double(), rtol=0, atol=1e-4)
        residual = matrix.double() @ q - q * values[:count]
        assert float(residual.abs().max()) <= 1e-5 * scale


@NATIVE
def test_symmetric_eigen_of_special_matrices_and_threads(monkeypatch):
    from customdiff_kernels.low_rank.eigen import symmetric_eigen

    low_rank = [torch.randn(200, r) for r in (1, 2, 7)]
    ones, zeros = torch.full((200, 200), 50.0), torch.zeros(40, 40)
    for matrix in (zeros, torch.eye(40), torch.diag(torch.arange(40.0)), ones, *(x @ x.T for x in low_rank)):
        (eigen,) = symmetric_eigen(matrix[None])
        wanted = torch.linalg.eigvalsh(matrix.double()).flip(0).float()
        torch.testing.assert_close(eigen.values, wanted, rtol=1e-6, atol=3e-6 * float(wanted[0]) + 1e-30)
    a = torch.randn(5, 130, 130)
    a = a @ a.mT
    runs = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        runs.append([(e.values, e.vectors(40)) for e in symmetric_eigen(a)])
    assert all(torch.equal(x, y) for p, q in zip(*runs, strict=True) for x, y in zip(p, q, strict=True))


def test_energy_is_certain_only_where_every_possible_value_agrees():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0]).double()
    assert energy_is_certain(values, 0.65, 1e-4)
    assert not energy_is_certain(values, 0.7, 1e-4)  # reached exactly by two
    assert energy_is_certain(values, 0.7, 0.0)
    assert not energy_is_certain(values, 0.69, 0.05)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("shape", [*LARGE, (12, 20)])
def test_tiny_and_huge_changes(shape, scale):
    matrix = paper(*shape)
    wanted, found = (compress({"x": m}, energy=0.6) for m in (matrix, matrix * scale))
    assert found.rank("x") == wanted.rank("x")
    torch.testing.assert_close(found.dense()["x"] / scale, wanted.dense()["x"], rtol=1e-4, atol=1e-6)


def test_a_change_whose_squares_are_no_numbers_is_not_lost():
    for scale in (1e-300, 1e300):
        found = compress({"x": paper(12, 20).double() * scale}, energy=0.6)
        assert found.rank("x") == compress({"x": paper(12, 20).double()}, energy=0.6).rank("x")


@pytest.mark.parametrize("shape", [(20, 32), (32, 20), (24, 24)])
def test_kept_singular_values_are_accurate(shape):
    """To 1e-5 of each, down to 1e-11 of the largest: where the Gram matrix has lost them, LAPACK's SVD steps
    in.
    """
    matrix = decaying(*shape, decay=0.3)
    exact = torch.linalg.svdvals(matrix)
    for rank in (3, 10, 20):
        u, v = compress({"x": matrix}, rank=rank).factors["x"]
        torch.testing.assert_close(u.norm(dim=0), exact[:rank], rtol=1e-5, atol=0)
        torch.testing.assert_close(v @ v.T, torch.eye(rank).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 24), (10, 24), (160, 192), (5, 5)])
def test_singular_values(shape):
    matrix = decaying(*shape)
    for scale in (1.0, 1e-12):
        found = singular_values({"x": matrix * scale})["x"]
        wanted = torch.linalg.svdvals(matrix * scale)
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-8 * scale)
    delta = compress({"x": matrix}, rank=4)
    torch.testing.assert_close(singular_values(delta)["x"], torch.linalg.svdvals(matrix)[:4])
    with pytest.raises(ValueError, match=r"delta\['x'\] is not finite"):
        singular_values({"x": matrix / 0})


def test_opcheck():
    torch.library.opcheck(torch.ops.customdiff.spectrum, (torch.randn(3, 4, 6),))


def test_compress_is_one_eigenproblem_a_shape(monkeypatch):
    calls = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: calls.append(tuple(a.shape)) or real(a))
    rows = {"a": 32, "b": 32, "c": 16, "d": 48, "e": 48, "f": 48, "g": 1}
    compress({name: torch.randn(n, 24) for name, n in rows.items()}, rank=1)
    assert sorted(calls) == [(1, 1, 1), (1, 16, 16), (2, 24, 24), (3, 24, 24)]
