"""The compiled kernels through ``_native`` alone, on every instruction set, against float64."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from customdiff_kernels import _native
from customdiff_kernels.cross_attention import cpu
from customdiff_kernels.low_rank import cpu as low_rank
from customdiff_kernels.merge import cpu as merge

ROOT = Path(__file__).resolve().parent.parent
ISAS = _native.build_info()["cpu"]["isas"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [  # B, H, N, D, S
    (2, 3, 100, 40, 77),
    (1, 2, 70, 80, 77),
    (1, 1, 45, 160, 77),
    (2, 2, 33, 64, 80),
    (1, 2, 45, 5, 1),
    (1, 2, 17, 128, 128),
    (2, 1, 90, 13, 512),
    (1, 9, 300, 8, 3),
    (1, 1, 1, 1, 2),
]
BIASES = ["none", "full", "heads", "queries", "keys", "one key", "table", "one table"]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("CK_CPU_ISA", request.param)
    assert _native.build_info()["cpu"]["isa"] == request.param
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Case:
    """Inputs of one attention; ``q``, ``v`` and the upstream gradient lie in (B,N,H,D) memory."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, bias: str = "none") -> None:
        B, H, N, D, S = shape
        self.scale = D**-0.5
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.query = torch.randn(B, N, H, D).to(dtype).transpose(1, 2)
        self.key = torch.randn(B, H, S, D).to(dtype)
        self.value = torch.randn(B, S, H, D).to(dtype).transpose(1, 2)
        self.grad_out = torch.randn(B, N, H, D).to(dtype).transpose(1, 2)
        sizes = {
            "full": (B, H, N, S),
            "heads": (B, 1, N, S),
            "queries": (1, H, 1, S),
            "keys": (1, 1, N, S),
            "one key": (B, 1, N, 1),
        }
        self.bias = torch.randn(sizes[bias]).to(wide) if bias in sizes else None
        self.labels = self.table = None
        if "table" in bias:
            self.labels = torch.randint(0, 4, (B, N), dtype=torch.int32)
            self.table = torch.randn(1 if bias == "one table" else B, 4, S).to(wide)

    def leaves(self) -> list[torch.Tensor | None]:
        return [self.query, self.key, self.value, self.bias, self.table]

    def formula(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """Output and gradients of query, key, value, bias, table in plain PyTorch, computed in ``dtype``."""
        leaves = [None if x is None else x.to(dtype).detach().requires_grad_() for x in self.leaves()]
        query, key, value, bias, table = leaves
        if table is not None:
            rows = torch.arange(len(self.labels))[:, None] if len(table) > 1 else 0
            bias = table[rows, self.labels.long()][:, None]
        scores = query @ key.transpose(-1, -2) * self.scale
        out = torch.softmax(scores if bias is None else scores + bias, -1) @ value
        given = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad(out, given, self.grad_out.to(dtype)))
        return [out.detach(), *(None if x is None else next(grads) for x in leaves)]

    def native(self) -> list[torch.Tensor | None]:
        """The same from the kernels, written over NaN."""
        results = [None if x is None else torch.full_like(x, math.nan) for x in [self.query, *self.leaves()]]
        for i in (4, 5):  # sums are kept in at least float32
            wide = torch.promote_types(self.query.dtype, torch.float32)
            results[i] = None if results[i] is None else results[i].to(wide)
        out, *grads = results
        inputs = (self.query, self.key, self.value, self.bias, self.labels, self.table, self.scale)
        cpu.attention_forward(*inputs, out)
        cpu.attention_backward(self.grad_out, *inputs, *grads)
        return results


def worst(got: torch.Tensor, exact: torch.Tensor) -> float:
    assert got.shape == exact.shape
    return (got.double() - exact).abs().max().item() if got.numel() else 0.0


def rms(got: torch.Tensor, exact: torch.Tensor) -> float:
    return (got.double() - exact).square().mean().sqrt().item() if got.numel() else 0.0


def check_against_eager(case: Case, eager: list[torch.Tensor | None], about: object) -> None:
    """Errors against float64 are at most twice those of ``eager``."""
    dtype, one_key = case.query.dtype, case.bias is not None and case.bias.shape[-1] == 1
    exact = case.formula(torch.float64)
    for name, ours, theirs, truth in zip(
        ["out", "query", "key", "value", "bias", "table"], case.native(), eager, exact, strict=True
    ):
        if ours is None:
            continue
        # Eager may happen to be exact, and in float64 it is the truth itself: some units are allowed too.
        # A bias that all keys share has no gradient: there the unit is that of the terms that cancel.
        size = 1 if name == "bias" and one_key else max(truth.abs().max().item(), 1e-2)
        unit = torch.finfo(ours.dtype).eps * size * (16 if dtype == torch.float64 else 1)
        for norm, factor, units in ((rms, 2, 1), (worst, 3, 4)):
            allowed = factor * norm(theirs, truth) + units * unit
            assert norm(ours, truth) <= allowed, (name, about, norm(ours, truth), allowed)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_error_is_at_most_twice_eager(dtype, bias, isa):
    for shape in SHAPES:
        case = Case(shape, dtype, bias)
        check_against_eager(case, case.formula(dtype), shape)


def test_same_bits_at_any_thread_count(isa, threads):
    for bias in BIASES:
        case = Case((2, 5, 450, 16, 13), torch.float32, bias)
        threads(1)
        wanted = case.native()
        moments = cpu.score_moments(case.query, case.key)
        for count in (2, 3, 7):
            threads(count)
            for ours, first in zip(case.native(), wanted, strict=True):
                assert ours is None or torch.equal(ours, first), (bias, count)
            assert cpu.score_moments(case.query, case.key) == moments


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_any_strides(dtype, isa):
    """Rows whose elements are not adjacent, on the way in and on the way out."""
    case = Case((2, 3, 41, 24, 19), dtype, "full")
    wanted = case.native()

    def spread(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
        view = wide[..., ::2]
        return view.copy_(x)

    for name in ("query", "key", "value", "grad_out", "bias"):
        setattr(case, name, spread(getattr(case, name)))
    results = [spread(torch.full_like(x, math.nan)) for x in (case.query, *case.leaves()[:4])]
    inputs = (case.query, case.key, case.value, case.bias, None, None, case.scale)
    cpu.attention_forward(*inputs, results[0])
    cpu.attention_backward(case.grad_out, *inputs, *results[1:], None)
    for ours, first in zip(results, wanted, strict=False):
        assert torch.equal(ours, first)
        assert ours._base[..., 1::2].isnan().all()  # and nothing between them was touched


@pytest.mark.parametrize("missing", range(5))
def test_gradients_that_are_not_wanted(missing, isa):
    case = Case((1, 2, 50, 12, 7), torch.float32, "heads")
    wanted = case.native()[1:5]
    inputs = (case.query, case.key, case.value, case.bias, None, None, case.scale)
    kept = {missing} if missing < 4 else set()
    grads = [torch.full_like(x, math.nan) if i in kept else None for i, x in enumerate(case.leaves()[:4])]
    cpu.attention_backward(case.grad_out, *inputs, *grads, None)
    for i in kept:
        assert torch.equal(grads[i], wanted[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_masks(dtype, isa):
    """A key behind -inf has no influence; a row of -inf gives zeros and sends nothing back."""
    case = Case((2, 2, 50, 12, 20), dtype, "heads")
    case.bias[:, :, 9] = -1e8
    case.bias[:, :, :, 5] = -math.inf
    case.bias[:, :, 7] = -math.inf
    first = case.native()
    case.key[:, :, 5] = 100
    second = case.native()
    for x in first:
        assert x is None or x.isfinite().all()
    assert torch.equal(first[0], second[0])
    out, grad_query, grad_key, grad_value, grad_bias, _ = first
    assert (out[:, :, 7] == 0).all() and (grad_query[:, :, 7] == 0).all() and (grad_bias[:, :, 7] == 0).all()
    assert (grad_key[:, :, 5] == 0).all() and (grad_value[:, :, 5] == 0).all()
    case.bias[:, :, 7] = 0  # the formula gives NaN there
    assert worst(case.native()[0][:, :, 10:], case.formula(torch.float64)[0][:, :, 10:]) < 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_propagates(dtype, value, isa):
    case = Case((1, 2, 50, 12, 20), dtype)
    case.query[0, 1, 3, 4] = value
    out, grad_query, grad_key, *_ = case.native()
    assert out[0, 1, 3].isnan().all() and grad_query[0, 1, 3].isnan().all()
    assert grad_key[0, 1].isnan().any() and out[0, 0].isfinite().all() and out[0, 1, 4:].isfinite().all()
    case = Case((1, 2, 50, 12, 20), dtype)
    case.value[0, 1, 3, 4] = value
    out = case.native()[0]
    assert not out[0, 1, :, 4].isfinite().any()
    assert out[0, 1, :, 5:].isfinite().all() and out[0, 0].isfinite().all()


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, 0x7FC00041, -0x3FFF81])
def test_nan_propagates_whatever_its_payload(bits, isa):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert nan.isnan()
    case = Case((1, 2, 50, 12, 20), torch.float32)
    case.query[0, 1, 3, 4] = nan
    assert case.query[0, 1, 3, 4].view(torch.int32) == bits
    out, grad_query, grad_key, *_ = case.native()
    assert out[0, 1, 3].isnan().all() and grad_query[0, 1, 3].isnan().all() and grad_key[0, 1].isnan().all()
    case = Case((1, 2, 50, 12, 20), torch.float32, "full")
    case.bias[0, 1, 3, 4] = nan
    assert case.native()[0][0, 1, 3].isnan().all()


@pytest.mark.parametrize("bias", ["full", "heads", "queries", "keys", "table"])
@pytest.mark.parametrize("of", ["float32", "query"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_finite_bias_counts(dtype, of, bias, isa):
    """Only -inf hides a key: rows of finfo.min alone, or of finfo.max, have the softmax that float64 has."""
    case = Case((2, 2, 50, 12, 20), dtype, bias)
    name = "bias" if case.table is None else "table"
    rows = getattr(case, name)
    rows = rows.to(dtype) if of == "query" else rows.float()
    least, greatest = torch.finfo(rows.dtype).min, torch.finfo(rows.dtype).max
    rows[..., 7] = least
    rows[..., 0, :] = least
    if rows.shape[-2] > 1:
        rows[..., 1, :] = greatest
        rows[..., 2, :], rows[..., 2, 5] = least, -math.inf
        rows[..., 3, :], rows[..., 3, 4:7] = least, greatest
    if rows.shape[-2] > 4:
        rows[..., 4, :], rows[..., 4, 6:8] = least, least * 0.75
        rows[..., 5, :], rows[..., 5, 6:8] = greatest, greatest * 0.75
        rows[..., 6, :], rows[..., 6, 9] = -math.inf, least
    setattr(case, name, rows)
    check_against_eager(case, case.formula(torch.promote_types(dtype, torch.float32)), bias)


@pytest.mark.parametrize("bias", ["full", "queries", "table"])
def test_a_float64_bias_beyond_float32_is_its_greatest(bias, isa):
    case = Case((2, 2, 50, 12, 20), torch.float32, bias)
    rows = (case.bias if case.table is None else case.table).double()
    rows[..., 0, :], rows[..., 0, 5] = torch.finfo(torch.float64).min, -math.inf
    case.bias, case.table = (rows, None) if case.table is None else (None, rows)
    out = torch.full_like(case.query, math.nan)
    inputs = (case.query, case.key, case.value, case.bias, case.labels, case.table, case.scale)
    cpu.attention_forward(*inputs, out)
    assert worst(out, case.formula(torch.float64)[0]) < 1e-5


def test_large_scores_do_not_overflow(isa):
    case = Case((1, 1, 40, 8, 9), torch.float32)
    case.query *= 300
    assert worst(case.native()[0], case.formula(torch.float64)[0]) < 1e-3
    for extreme in (torch.finfo(torch.float32).min, torch.finfo(torch.float32).max):
        case = Case((1, 1, 40, 8, 9), torch.float32, "full")
        case.query *= 1e18
        case.key *= 1e18
        case.bias[:] = extreme  # a score of 1e36 beside it still decides
        assert worst(case.native()[0], case.formula(torch.float64)[0]) < 1e-6


@pytest.mark.parametrize("shape", [(0, 2, 3, 8, 4), (2, 0, 3, 8, 4), (2, 2, 0, 8, 4)])
@pytest.mark.parametrize("bias", BIASES)
def test_nothing_to_do(shape, bias, isa):
    """No queries: gradients that are sums over queries are zero."""
    for x in Case(shape, torch.float32, bias).native():
        assert x is None or (x == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_score_moments(dtype, isa):
    for shape in [*SHAPES, (2, 0, 3, 8, 4), (1, 2, 0, 8, 4)]:
        case = Case(shape, dtype)
        scores = case.query.double() @ case.key.double().transpose(-1, -2)
        total, squares = cpu.score_moments(case.query, case.key)
        scale = scores.abs().sum().item()
        assert abs(total - scores.sum().item()) <= 1e-12 * scale
        assert squares == pytest.approx((scores * scores).sum().item(), rel=1e-12)


WIDTHS = [1, 33, 64, 112]  # below a vector, odd, whole tiles, tiles and vectors


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_low_rank_sum(dtype, width, isa, no_worse):
    """Against float64: overlapping terms, factors of another dtype, any strides, over NaN and in place."""
    base = torch.randn(width, 150).to(dtype).T
    terms = [(0, 150, 5, 1.0, dtype), (30, 101, 16, -0.5, torch.float16), (149, 1, 0, 2.0, torch.float64)]
    u = [torch.randn(rank, rows).to(of).T for _, rows, rank, _, of in terms]
    v = [torch.randn(rank, width).to(of) for _, _, rank, _, of in terms]
    starts, scales = [t[0] for t in terms], [t[3] for t in terms]

    def formula(dtype):
        total = base.to(dtype, copy=True)
        for left, right, (start, rows, _, scale, _) in zip(u, v, terms, strict=True):
            total[start : start + rows] += scale * (left.to(dtype) @ right.to(dtype))
        return total

    out = torch.full((150, width), math.nan, dtype=dtype)
    low_rank.low_rank_sum(out, base, u, v, starts, scales)
    if dtype is torch.float64:
        assert worst(out, formula(torch.float64)) < 1e-13
    else:
        no_worse("sum", out, formula(dtype), formula(torch.float64), slack=2)
    low_rank.low_rank_sum(base, base, u, v, starts, scales)
    assert torch.equal(base, out)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_merge_passes(dtype, width, isa, no_worse):
    sums = torch.promote_types(dtype, torch.float32)

    def close(what, found, eager, exact):
        if dtype is torch.float64:  # eager is the reference itself
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-11)
        else:
            no_worse(what, found, eager, exact, slack=2)

    base, *weights = (torch.randn(70, width).to(dtype) for _ in range(3))
    targets, basis = [torch.randn(n, width).to(sums) for n in (3, 17)], torch.randn(20, width).to(sums)
    old = base.double()
    exact = [(w.double() - old) @ t.double().T for w, t in zip(weights, targets, strict=True)]
    eager = [(w.to(sums) - base.to(sums)) @ t.to(sums).T for w, t in zip(weights, targets, strict=True)]
    for weight, target, wanted, theirs in zip(weights, targets, exact, eager, strict=True):
        found = torch.full((70, len(target)), math.nan, dtype=sums)
        merge.residual(found, base, weight, target)
        close("residual", found, theirs, wanted)
    out = torch.full_like(base, math.nan)
    merge.apply(out, base, weights, targets, basis)
    theirs = (base.to(sums) + torch.cat(eager, 1) @ basis).to(dtype)
    close("merged", out, theirs, old + torch.cat(exact, 1) @ basis.double())
    gram = merge.gram(base)
    assert worst(gram, old.T @ old) < 1e-12 * 70 and torch.equal(gram, gram.T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.ones(5, 4)}, r"out \(5,4\): must be a floating matrix \(5,3\)"),
        ({"out": torch.ones(5, 3).double()}, "out: of another dtype"),
        ({"v": [torch.ones(1, 3)]}, r"v \(1,3\): must be a floating matrix \(2,3\)"),
        ({"starts": [2]}, "start: rows 2 to 6 are not within base"),
        ({"starts": [-1]}, "start: rows -1 to 3 are not within base"),
    ],
)
def test_a_sum_that_does_not_fit_is_refused(change, message):
    call = {"out": torch.ones(5, 3), "base": torch.ones(5, 3), "u": [torch.ones(4, 2)]}
    call |= {"v": [torch.ones(2, 3)], "starts": [1], "scales": [1.0]} | change
    with pytest.raises(ValueError, match=message):
        low_rank.low_rank_sum(**call)


def replaced(case: Case, name: str, value: torch.Tensor) -> Case:
    setattr(case, name, value)
    return case


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("key", torch.randn(2, 3, 7, 5), "key .2,3,7,5."),
        ("key", torch.randn(2, 3, 7, 8, dtype=torch.float64), "key"),
        ("key", torch.randn(2, 3, 0, 8), "no tokens|value"),
        ("value", torch.randn(2, 3, 6, 8), "value"),
        ("bias", torch.randn(2, 3, 7), "bias"),
        ("bias", torch.randn(2, 1, 4, 7), "bias"),
        ("grad_out", torch.randn(2, 3, 4, 8), "grad_out"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(name, value, message):
    case = replaced(Case((2, 3, 5, 8, 7), torch.float32), name, value)
    with pytest.raises(ValueError, match=message):
        case.native()


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_outside_the_table_is_refused(label, isa, threads):
    threads(2)
    case = Case((2, 3, 500, 8, 7), torch.float32, "table")
    case.labels[1, 321] = label
    with pytest.raises(IndexError, match=f"labels hold {label} but the table has 4 regions"):
        case.native()
    case.labels[1, 321] = 0
    case.native()  # and the pool is still in order


def test_unknown_isa_is_refused(monkeypatch):
    monkeypatch.setenv("CK_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="CK_CPU_ISA=sse9 cannot run here.*portable"):
        cpu.score_moments(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))


def test_a_missing_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_reason", "no module", raising=False)
    assert not _native.available() and _native.build_info()["cpu"] is False
    with pytest.raises(RuntimeError, match="not built .no module.*pip install"):
        Case((1, 1, 2, 3, 4), torch.float32).native()


def _in_child(case: Case, wanted: list[torch.Tensor | None], connection) -> None:
    torch.set_num_threads(2)
    same = all(x is None or torch.equal(x, y) for x, y in zip(case.native(), wanted, strict=True))
    connection.send(same)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking with threads alive is the point
def test_a_forked_child_computes(threads):
    import multiprocessing

    threads(2)
    case = Case((2, 3, 300, 8, 7), torch.float32, "table")
    wanted = case.native()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(case, wanted, there))
    child.start()
    try:
        assert here.poll(60), "the child hangs"
        assert here.recv()
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("shared", [True, False], ids=["torch's threads", "own pool"])
def test_threads_of_either_kind_give_the_same_bits(threads, shared):
    _native._share_threads() if shared else _native._C.use_host_threads(0)
    try:
        case = Case((2, 3, 300, 8, 7), torch.float32, "table")
        threads(1)
        wanted = case.native()
        threads(2)
        assert all(x is None or torch.equal(x, y) for x, y in zip(case.native(), wanted, strict=True))
    finally:
        _native._share_threads()


def test_the_kernels_run_on_the_threads_that_torch_has():
    if "libgomp" in torch.__config__.parallel_info() or "OpenMP" in torch.__config__.parallel_info():
        assert _native.build_info()["cpu"]["threads"].startswith(("libgomp", "libiomp", "libomp"))


def test_torch_may_live_under_a_path_with_a_space(monkeypatch, tmp_path):
    """A copy of the library there is found; one that is gone since it was loaded leaves the own pool."""
    library = tmp_path / "Ann Lee" / "torch" / "libgomp.so.1"
    library.parent.mkdir(parents=True)
    line = f"7f0000000000-7f0000001000 r-xp 00000000 08:01 42                         {library}\n"
    read = Path.read_text
    fake = lambda path: line if path == Path("/proc/self/maps") else read(path)  # noqa: E731
    monkeypatch.setattr(Path, "read_text", fake)
    assert _native._host_openmp() == str(library)
    assert _native._share_threads() == "own pool"


def test_calls_from_several_threads(threads):
    from concurrent.futures import ThreadPoolExecutor

    threads(2)
    cases = [Case((1, 3, 200, 8, 7), torch.float32, bias) for bias in BIASES]
    wanted = [case.native() for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, first in zip(pool.map(Case.native, cases), wanted, strict=True):
                assert all(x is None or torch.equal(x, y) for x, y in zip(got, first, strict=True))


def _tool(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    assert found, f"{name} is needed; pip install {name}"
    return found


def test_sanitizers_find_nothing(tmp_path):
    """The driver in ``tests/native``, with exact-size heap blocks, under AddressSanitizer and UBSan."""
    source = ROOT / "tests" / "native"
    cmake, ninja = _tool("cmake"), _tool("ninja")
    configure = [cmake, "-S", source, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, [cmake, "--build", tmp_path], [tmp_path / "native_test"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[0]) >= 300
