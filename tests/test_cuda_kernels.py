"""What is particular to the CUDA kernels (``csrc/cuda``), whose own source runs here on the CPU.

Every variant, memory that is not theirs, every order and split of the work, every barrier: against float64.
test_cross_attention.py runs the same kernels behind the operators.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cross_attention import LOW, cases, gradients, inputs

from customdiff_kernels.cross_attention.reference import cross_attention_reference

NAMES = ("out", "grad_query", "grad_key", "grad_value", "grad_bias", "grad_table")
MARGIN = 4096  # elements: more than a row, and 16-byte alignment is kept
FOREIGN = 0x7F817F81  # a NaN in every dtype, and not the one that arithmetic gives


def foreign(count, dtype):
    words = count // 2 + 1 if dtype.itemsize == 2 else count
    return torch.full((words,), FOREIGN, dtype=torch.int32).view(dtype)


def framed(x, order=None, gaps=(0,), offset=0):
    """A copy of ``x`` amid foreign memory: its dimensions in that order, outermost first, from the innermost
    on so many elements left out after each, the whole ``offset`` further. What is expanded stays so.
    """
    strides, once, step = [0] * x.dim(), [1] * x.dim(), 1
    for axis, gap in zip(list(order or range(x.dim()))[::-1], itertools.cycle(gaps), strict=False):
        if x.stride(axis) or x.shape[axis] == 1:
            strides[axis], once[axis] = step, x.shape[axis]
            step = step * x.shape[axis] + gap
    memory, first = foreign(2 * MARGIN + offset + step, x.dtype), MARGIN + offset
    memory.as_strided(once, strides, first).copy_(x[tuple(map(slice, once))])
    return memory.as_strided(x.shape, strides, first)


def untouched(x) -> bool:
    """Whether the memory around what framed() gave is as it was."""
    words = x._base.view(torch.int32).clone()
    own = words.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
    own.copy_(foreign(x.numel(), x.dtype)[: x.numel()].view(x.shape))
    return bool((words == FOREIGN).all())


@pytest.fixture
def run(cuda_on_cpu, monkeypatch):
    """``run(args, scale, upstream)``: the result and the gradients of what has one.

    Everything lies amid foreign memory, the kernels' own scratch included. What they write is NaN before, and
    around it nothing may change. ``place(x, order)`` puts a tensor there whose dimensions may be in "any"
    order, have to be contiguous "rows", or "contiguous" as a whole.
    """
    written = []

    def room(shape, dtype, order="contiguous", place=lambda x, order: framed(x)):
        written.append(place(torch.full(shape, math.nan, dtype=dtype), order))
        return written[-1]

    def run(args, scale, upstream, wanted=(True,) * 5, place=lambda x, order: framed(x)):
        written.clear()
        orders = ("rows", "rows", "rows", "any", "rows", "any")
        placed = [None if x is None else place(x, order) for x, order in zip(args, orders, strict=True)]
        out, grads = room(upstream.shape, upstream.dtype, "rows", place), []
        orders = ("rows", "rows", "rows", "contiguous", "any")
        for x, order, want in zip((*args[:4], args[5]), orders, wanted, strict=True):
            dtype = upstream.dtype if order == "rows" else torch.float32
            grads.append(room(x.shape, dtype, order, place) if want and x is not None else None)
        cuda_on_cpu.attention_forward(*placed, scale, out)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda size, dtype, device: room((size,), dtype))
            cuda_on_cpu.attention_backward(place(upstream, "rows"), *placed, scale, *grads)
        assert all(map(untouched, written))
        return [out, *grads]

    return run


def formula(args, scale, upstream, dtype=torch.float64):
    args = [x if x is None or x.dtype is torch.int32 else x.to(dtype) for x in args]
    out, grads = gradients(cross_attention_reference, args, scale, upstream)
    return out, *grads


@pytest.fixture
def compare(run, no_worse):
    """Holds the result and all gradients to the 2x rule: plain PyTorch in query's dtype against float64."""

    def compare(args, scale=None, slack=0, **memory):
        scale = args[0].shape[-1] ** -0.5 if scale is None else scale
        upstream = torch.randn(args[0].shape).to(args[0].dtype)
        plain, exact = (formula(args, scale, upstream, dtype) for dtype in (upstream.dtype, torch.float64))
        found = zip(NAMES, run(args, scale, upstream, **memory), strict=True)
        found = {name: x for name, x in found if x is not None}
        for (name, x), y, z in zip(found.items(), plain, exact, strict=True):
            if name == "grad_bias" and x.shape[-1] == 1:
                assert not x.any()  # the softmax does not see a shift of a whole row
                continue
            # Some sums are float32; slack counts in units of what they are computed in.
            dtype = y.dtype if slack else x.dtype
            no_worse(f"{name} of {[x.shape for x in args[:2]]}", x.to(dtype), y.to(dtype), z, slack)
        return list(found.values())

    return compare


def same(found, right) -> bool:
    """Bit by bit, where both are there."""
    pairs = ((x, y) for x, y in zip(found, right, strict=True) if x is not None)
    return all(torch.equal(x, y) for x, y in pairs)


def biased(shape, dtype, pattern):
    """Inputs with a float32 bias of that pattern, such as "B1NS"."""
    sizes = dict(zip("BHNSD1", (*shape, 1), strict=True))
    args = inputs(shape, dtype, grad=False)
    args[3] = torch.randn([sizes[c] for c in pattern])
    return args


# --- every variant --------------------------------------------------------------------------------


def kernels(shim) -> dict[int, str]:
    """The kernels of the product by their offset in the library."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    symbols = subprocess.run(["nm", "-C", shim.__file__], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) \w void ck::.*?(\w+_kernel<.*>)\(\S+.*Params\)$", symbols, re.M)
    return {int(offset, 16): name.replace("ck::cuda::", "") for offset, name in found}


@pytest.mark.parametrize("dtype, name", [*zip(LOW, ("float", "bf16", "fp16"), strict=True)], ids=str)
def test_every_variant(dtype, name, shim, compare, cuda_on_cpu):
    """Head dimensions and lengths at, below and above each of the kernels' own; then none has not run."""
    slack = 4 if dtype is torch.float32 else 0  # short sums of eager are at times almost exact
    shim.set_dropped_barrier(-1)
    patterns = itertools.cycle(["BHNS", "11NS", "B11S", "1H1S", "BHN1"])
    lengths = itertools.cycle([(77, 100, 129), (7, 81, 154), (80, 128, 300), (1, 100, 154)])
    for dim in (8, 24, 36, 40, 64, 72, 80, 96, 128, 160, 200, 256):
        for n_keys in next(lengths):
            n = 40 if n_keys > 128 or dim > 160 else 90
            compare(inputs((1, 1, n, n_keys, dim), dtype, grad=False), slack=slack)
            compare(inputs((2, 1, 20, n_keys, dim), dtype, bias="layout", grad=False), slack=slack)
            compare(biased((2, 1, 20, n_keys, dim), dtype, next(patterns)), slack=slack)
        cuda_on_cpu.score_moments(*inputs((1, 1, 70, 7, dim), dtype, grad=False)[:2])
    have_run = set(shim.launched())
    assert {name for at, name in kernels(shim).items() if at not in have_run and f"<{name}" in name} == set()


# --- memory ---------------------------------------------------------------------------------------


def anywhere(choose: random.Random):
    """A ``place`` for ``run``: random orders, gaps and offsets, half of them in steps of 16 bytes or more."""

    def place(x, order):
        unit = choose.choice([1, 8])
        gaps = [unit * choose.randrange(3) for _ in x.shape]
        if order == "contiguous":
            return framed(x, offset=gaps[0])
        axes = list(range(x.dim() - (order == "rows")))
        choose.shuffle(axes)
        return framed(x, axes + list(range(len(axes), x.dim())), gaps, unit * choose.randrange(4))

    return place


@settings(max_examples=500)
@given(case=cases(), seed=st.integers(0, 1 << 30))
def test_500_random_shapes_and_strides(case, seed, shim, compare, monkeypatch):
    (batch, heads, n, n_keys, dim), memory, dtype, pattern, layout, scale = case
    choose, heads = random.Random(seed), min(heads, 4 // batch)
    torch.manual_seed(seed)
    shim.set_seed(seed)
    monkeypatch.setenv(PROCESSORS, choose.choice(["0", "1", "4", "30"]))
    dim = choose.choice([dim, -(-dim // 8) * 8])
    q, k, v = (torch.randn(batch, heads, m, dim).to(dtype) for m in (n, n_keys, n_keys))
    k, v = (x[:1].expand_as(x) if "one" in where else x for x, where in zip((k, v), memory, strict=False))
    bias = labels = table = None
    if pattern is not None:
        sizes = batch, heads, n, n_keys
        bias = torch.randn([1 if one else full for one, full in zip(pattern, sizes, strict=True)])
        bias = bias.to(choose.choice([dtype, torch.float32]))
    if layout is not None:
        one_labels, one_table, regions = layout
        labels = torch.randint(0, regions, (1 if one_labels else batch, n), dtype=torch.int32)
        table = torch.randn(1 if one_table else batch, regions, n_keys)
    slack = 16 if batch * heads * n >= 32 else 128
    compare([q, k, v, bias, labels, table], scale, slack, place=anywhere(choose))


# The table in shared memory; too large for it; of several tiles of keys.
@pytest.mark.parametrize("n_keys, regions", [(77, 3), (77, 90), (154, 3)])
def test_a_label_outside_the_table_counts_as_the_nearest(n_keys, regions, run):
    q, k, v, *_ = inputs((2, 2, 40, n_keys, 40), torch.bfloat16, grad=False)
    stray = torch.randint(0, regions, (2, 40), dtype=torch.int32)
    stray[:, ::5], stray[:, 1::5], stray[:, 2::10] = -(2**31), 2**31 - 1, regions
    table, upstream = torch.randn(2, regions, n_keys), torch.randn_like(q)
    found, right = (
        run([q, k, v, None, labels, table], 0.2, upstream) for labels in (stray, stray.clamp(0, regions - 1))
    )
    assert same(found, right)


# --- the same, however it is run ------------------------------------------------------------------

# Several blocks of queries for each block of threads, if there are no PROCESSORS to fill; one tile of keys or
# several; q and g in one stage or two.
WALKS = [
    ((1, 2, 170, 77, 40), torch.bfloat16, "layout"),
    ((1, 2, 170, 77, 128), torch.float16, "none"),
    ((1, 2, 150, 154, 64), torch.bfloat16, "dense"),
    ((2, 1, 170, 77, 80), torch.float32, "layout"),
    ((1, 2, 100, 77, 40), torch.float32, "111S"),
]
PROCESSORS = "CK_SHIM_PROCESSORS"


def walk(shape, dtype, kind):
    args = biased(shape, dtype, kind) if "S" in kind else inputs(shape, dtype, bias=kind, grad=False)
    return args, 0.2, torch.randn(args[0].shape).to(dtype)


@pytest.mark.parametrize("case", WALKS, ids=str)
def test_each_subset_of_the_gradients(case, run):
    """Any gradient may be left out, and the others do not change by a bit."""
    args, scale, upstream = walk(*case)
    args, upstream = [x if x is None else x[:1] for x in args], upstream[:1]
    everything = run(args, scale, upstream)
    given = [x is not None for x in everything[1:]]
    for wanted in set(itertools.product(*((False, x) for x in given))):
        found = run(args, scale, upstream, wanted)
        assert tuple(x is not None for x in found[1:]) == wanted
        assert same(found, everything), wanted


@pytest.mark.parametrize("processors", ["0", "1", "4", "200"])
@pytest.mark.parametrize("case", WALKS, ids=str)
def test_any_split_of_the_work_and_any_order(case, processors, compare, run, shim, monkeypatch):
    monkeypatch.setenv(PROCESSORS, processors)
    call = walk(*case)
    compare(call[0])
    right = run(*call)
    for seed in (0, 1, 2):
        shim.set_seed(seed)
        monkeypatch.setenv("CK_SHIM_THREADS", str(1 + seed))
        assert same(run(*call), right), seed


def useless(function, shim) -> list:
    """Barriers and waits of the kernels that ``function`` launches that its results do not need."""
    names, found = kernels(shim), []

    def changes(right, *dropped) -> bool:
        for seed in range(12):
            shim.set_seed(seed)
            shim.set_dropped(*dropped)
            try:
                if not same(function(), right):
                    return True
            except RuntimeError:
                return True
        return False

    for sync in (shim.Sync.barrier, shim.Sync.copy_wait):
        shim.set_dropped(sync, -1)
        right = function()
        for launch, (at, count) in enumerate([*zip(shim.launched(), shim.executed(sync), strict=True)]):
            every = [(sync, n, launch) for n in range(count)]
            found += [(names[at], *one) for one in every if not changes(right, *one)]
        shim.set_dropped(sync, -1)
    return found


@pytest.mark.parametrize("case", WALKS, ids=str)
def test_every_barrier_and_wait_matters(case, shim, run, cuda_on_cpu, monkeypatch):
    """Without any one of them the result is another, or an error, in some order of the threads."""
    monkeypatch.setenv(PROCESSORS, "0")
    call = walk(*case)
    assert not useless(lambda: run(*call), shim)
    assert not useless(lambda: [x.view(1) for x in cuda_on_cpu.score_moments(*call[0][:2])], shim)


# --- what the numbers may be ----------------------------------------------------------------------


@pytest.mark.parametrize("n_keys", [77, 154])
@pytest.mark.parametrize("low", [-math.inf, -1e8, "lowest"])
@pytest.mark.parametrize("dtype", LOW[:2], ids=str)
def test_masked_keys_and_rows(dtype, low, n_keys, compare):
    """Some keys masked, all but one, every key: -inf gives zeros there, a finite value what softmax gives."""
    low = torch.finfo(dtype).min if low == "lowest" else low
    args = inputs((1, 2, 33, n_keys, 40), dtype, grad=False)
    args[3] = torch.zeros(1, 1, 33, n_keys)
    args[3][..., 3, : n_keys - 2] = low  # the first tile wholly
    args[3][..., 5, 1:] = low
    args[3][..., 7, :] = low
    out, dq, *_ = compare(args)
    assert low != -math.inf or not (out[:, :, 7].any() or dq[:, :, 7].any())
    args[3] = torch.full((1, 1, 1, 1), low)
    results = compare(args)
    assert low != -math.inf or not any(x.any() for x in results)
    args[3:] = None, (torch.arange(33, dtype=torch.int32) % 3)[None], torch.zeros(1, 3, n_keys)
    args[5][:, 1, 2:], args[5][:, 2] = low, low
    compare(args, slack=4)


@pytest.mark.parametrize("n_keys", [77, 154])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_nan_goes_where_it_goes_in_the_formula(dtype, n_keys, run):
    for at in range(4):
        args = inputs((1, 1, 33, n_keys, 40), dtype, bias="dense", grad=False)
        args[at][0, 0, 2, 3] = math.nan
        call = args, 0.2, torch.randn(args[0].shape).to(dtype)
        for name, found, right in zip(NAMES, run(*call), formula(*call), strict=False):
            assert torch.equal(found.isnan(), right.isnan()), (at, name)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_large_scores_stay_finite(dtype, run):
    size = 100 if dtype is torch.float16 else 1e4
    args = inputs((1, 1, 33, 154, 40), dtype, grad=False)
    args[:2] = (x * size for x in args[:2])
    exact = cross_attention_reference(*(x.double() for x in args[:3]), scale=1.0)
    found = run(args, 1.0, torch.randn_like(args[0]))
    assert all(x.isfinite().all() for x in found if x is not None)
    torch.testing.assert_close(found[0].double(), exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.5, 3.0, 1e-30])
def test_any_scale(scale, compare):
    for dtype in LOW:
        compare(inputs((1, 2, 40, 100, 24), dtype, bias="layout", grad=False), scale, slack=16)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("n_keys, dim", [(77, 40), (1, 8), (77, 80), (154, 36), (77, 160), (300, 256)])
def test_score_moments(n_keys, dim, dtype, shim, cuda_on_cpu, monkeypatch):
    q, k = (framed(x + 0.5) for x in inputs((2, 2, 150, n_keys, dim), dtype, grad=False)[:2])
    scores = q.double() @ k.double().mT
    for processors in ("0", "4"):
        monkeypatch.setenv(PROCESSORS, processors)
        total, squares = cuda_on_cpu.score_moments(q, k)
        assert total.dtype == squares.dtype == torch.float64 and total.dim() == squares.dim() == 0
        torch.testing.assert_close(total, scores.sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(squares, scores.square().sum(), rtol=1e-6, atol=0)


# --- what is refused ------------------------------------------------------------------------------

zeros = torch.zeros
QUERY, KEY, BIAS, LABELS, TABLE = (
    zeros(1, 2, 6, 8),
    zeros(1, 2, 5, 8),
    zeros(5),
    zeros(1, 6).int(),
    zeros(1, 3, 5),
)
GOOD = {"query": QUERY, "key": KEY, "value": KEY, "bias": None, "labels": None, "table": None, "out": QUERY}
GOOD |= {"grad_out": QUERY, "grad_query": QUERY, "grad_key": KEY, "grad_value": KEY}
ROWS = [name for name, x in GOOD.items() if x is not None]


def all_rows(change) -> dict:
    return {name: change(GOOD[name]) for name in ROWS}


REFUSED = [
    *((f"{name} .*(match|dtype)", {name: GOOD[name].half()}) for name in ROWS[1:]),
    *((f"{name} .*must|key .*match", {name: GOOD[name][:, :1]}) for name in ROWS[1:]),
    *((f"{name} must be contiguous", {name: GOOD[name].mT.contiguous().mT}) for name in ROWS),
    ("query must be float32, bfloat16 or float16", all_rows(torch.Tensor.double)),
    (r"query \(1,2,6,8\): must be floating", all_rows(torch.Tensor.int)),
    ("query has a head dimension of 264, more than 256", all_rows(lambda x: zeros(*x.shape[:3], 264))),
    ("query has a dimension of 0", all_rows(lambda x: x[:0])),
    ("key has no tokens", all_rows(lambda x: x[:, :, :0])),
    ("query has a dimension of 4194304", all_rows(lambda x: x[:, :, :1].expand(-1, -1, 1 << 22, -1))),
    ("bias .* must be floating and broadcast", {"bias": BIAS[:4]}),
    ("a bias of 16 bits must have query's dtype", {"bias": BIAS.half()}),
    ("a bias cannot be float64", {"bias": BIAS.double()}),
    ("bias .* cannot be given with a table", {"bias": BIAS, "labels": LABELS, "table": TABLE}),
    ("labels .* must come with a table", {"labels": LABELS}),
    ("labels .* must be int32 of", {"labels": LABELS[:, :5], "table": TABLE}),
    ("labels .* must be int32 of", {"labels": LABELS.float(), "table": TABLE}),
    ("labels must be contiguous", {"labels": zeros(1, 6, 2).int()[..., 0], "table": TABLE}),
    ("table .* must be floating of", {"labels": LABELS, "table": TABLE[..., :4]}),
    ("grad_bias must be contiguous", {"bias": zeros(6, 5), "grad_bias": zeros(5, 6).T}),
    ("grad_bias .*dtype", {"bias": BIAS, "grad_bias": BIAS.half()}),
]


@pytest.mark.parametrize("message, change", REFUSED)
def test_refused_before_anything_is_read(message, change, cuda_on_cpu):
    given = {**GOOD, "grad_bias": None, "grad_table": None, **change}
    *inputs, out, grad_out, dq, dk, dv, d_bias, d_table = given.values()
    if "query" in change or not any("grad" in name for name in change):
        with pytest.raises(ValueError, match=message):
            cuda_on_cpu.attention_forward(*inputs, 1.0, out)
    if "out" not in change or "query" in change:
        with pytest.raises(ValueError, match=message):
            cuda_on_cpu.attention_backward(grad_out, *inputs, 1.0, dq, dk, dv, d_bias, d_table)


def test_a_grid_too_large_and_rows_for_no_moments(cuda_on_cpu):
    q, k = (x[:1, :1, :1].expand(1 << 20, 1 << 12, -1, -1) for x in (QUERY, KEY))
    with pytest.raises(RuntimeError, match="launch: 4294967296 blocks"):
        cuda_on_cpu.attention_forward(q, k, k, None, None, None, 1.0, q)
    for rows in (QUERY.double(), QUERY.int(), QUERY.mT, QUERY[:, :0], zeros(1, 1, 2, 264)):
        with pytest.raises(ValueError, match="rows (must be|has a)"):
            cuda_on_cpu.score_moments(rows, rows)
