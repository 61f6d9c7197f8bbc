"""Short-context cross-attention against PyTorch's own, at the levels of SD 1.x, SD 2.1 and SDXL (77 text
tokens).

Peers: ``scaled_dot_product_attention`` (on a GPU each of its backends), FlexAttention compiled, and plain
PyTorch (matmul, softmax, matmul), on a GPU compiled too. One that refuses a case is left out and noted. The
baseline of a case is the fastest peer there. ``floor`` and ``of limit``: the slower of the bytes (every
input read, every result written once) and the useful FLOPs (two products forward, four backward; what is
computed again does not count), at the copy bandwidth and the matrix rate of that dtype measured in this run.

    pytest benchmarks/bench_cross_attention.py --benchmark [-k "sd1 and float32"]
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from backends import ours
from roofline import LEVELS, TOKENS, Shape, Work, attention_backward, attention_forward
from timing import DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import customdiff_kernels as ck

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
FLOAT, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SD1 = [level for level in LEVELS if level.startswith("sd1")]
CPU = [(level, 2 if level in SD1 else 1, dtype) for level in LEVELS for dtype in (FLOAT, BF16)]
CUDA = [(level, 16, BF16) for level in LEVELS]
FEW = [(level, 16, dtype) for level in ("sd1 64x64", "sd1 32x32") for dtype in (FP16, FLOAT)]
SMALL_BATCHES = [(level, batch, BF16) for level in SD1 for batch in (2, 8)]
# Compiling takes most of a run: on a GPU where most of a model's time goes, on a CPU (forward only) once.
COMPILED = [(level, 16, BF16) for level in (*SD1, "sd2 96x96", "sdxl 64x64")] + [("sd1 64x64", 2, FLOAT)]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def grid(cpu: list[tuple], cuda: list[tuple]) -> pytest.MarkDecorator:
    """Parametrises (level, batch, dtype) by the cases of a CPU and those of a GPU; a smoke run takes both."""
    params = []
    for case in dict.fromkeys([*cpu, *cuda]):
        on = [device for device, listed in (("cpu", cpu), ("cuda", cuda)) if case in listed]
        label = f"{case[0]} batch {case[1]} {name(case[2])}"
        params.append(pytest.param(*case, marks=pytest.mark.on(*on), id=label))
    return pytest.mark.parametrize("level,batch,dtype", params)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No code compiled for another shape; a compiled backward pass may run again on the same graph."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def compiled(function: Callable, smoke: bool) -> Callable:
    return function if smoke else torch.compile(function, dynamic=False)


def plain(query, key, value, bias=None):
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ value


def sdpa(query, key, value, bias=None, backend=None):
    if backend is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=bias)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, attn_mask=bias)


def flex(layout: ck.LayoutBias | None) -> Callable:
    """FlexAttention; the layout gathered in a ``score_mod``."""
    if layout is None:
        return flex_attention
    labels, table = layout.labels[0], layout.scaled_table(FLOAT)[0]

    def bias(score, batch, head, image, text):
        return score + table[labels[image], text]

    return partial(flex_attention, score_mod=bias)


def peers(case: tuple, layout: ck.LayoutBias | None, dense, smoke: bool) -> dict[str, Callable]:
    """Functions of (query, key, value) by label. The dense bias is ready-made: its building is not timed."""
    found = {"plain": partial(plain, bias=dense)}
    if DEVICE == "cpu":
        found = {"SDPA": partial(sdpa, bias=dense)} | found
    if DEVICE == "cuda" or smoke:
        found |= {label: partial(sdpa, bias=dense, backend=backend) for label, backend in SDPA.items()}
    if case in COMPILED or smoke:
        found["FlexAttention compiled"] = compiled(flex(layout), smoke)
        if DEVICE == "cuda" or smoke:
            found["plain compiled"] = compiled(partial(plain, bias=dense), smoke)
    return found


def tensors(level: str, batch: int, dtype: torch.dtype, smoke: bool, grad: bool) -> list[torch.Tensor]:
    """query, key, value as a UNet has them: heads read from (B,N,inner) memory."""
    h, n, d = LEVELS[level]
    b, n = (min(batch, 2), min(n, 64)) if smoke else (batch, n)
    torch.manual_seed(0)
    made = [torch.randn(b, m, h, d, dtype=dtype, device=DEVICE).transpose(1, 2) for m in (n, TOKENS, TOKENS)]
    return [t.requires_grad_(grad) for t in made]


def shape_of(query: torch.Tensor) -> Shape:
    b, h, n, d = query.shape
    return Shape(b, h, n, TOKENS, d, query.element_size())


def call(function: Callable, args: list, direction: str) -> Callable[[], object]:
    """``fwd`` alone, ``bwd`` alone (of a graph that is kept) or both."""
    if direction == "fwd":
        return lambda: function(*args)
    upstream, kept = torch.randn_like(args[0]), []
    if direction == "fwd+bwd":
        return lambda: torch.autograd.grad(function(*args), args, upstream)

    def backward():
        if not kept:
            kept.append(function(*args))
        return torch.autograd.grad(kept[0], args, upstream, retain_graph=True)

    return backward


def work(query: torch.Tensor, direction: str) -> Work:
    forward, backward = attention_forward(shape_of(query)), attention_backward(shape_of(query))
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward.plus(*backward)}[direction]


def measure(what: str, case: tuple, biases: dict, layout, dense, compare, smoke) -> None:
    """Every direction of ours with each of ``biases`` {said of it: bias} against the peers."""
    level, batch, dtype = case
    functions = peers(case, layout, dense, smoke)
    for direction in ("fwd", "bwd", "fwd+bwd"):
        if direction == "bwd" and DEVICE == "cpu" and not smoke:
            continue
        args = tensors(*case, smoke, grad=direction != "fwd")
        cases = {}
        for said, bias in biases.items():
            cases |= ours(call(partial(ck.cross_attention, bias=bias), args, direction), dtype, said)
        cases |= {label: call(function, args, direction) for label, function in functions.items()}
        least = work(args[0], direction)
        if layout is not None:
            least = least.plus(bytes=layout.labels.nbytes + layout.table.nbytes)
        title = f"{what}{level} batch {batch} {direction} {name(dtype)}"
        compare(title, cases, **least._asdict(), dtype=dtype)


@grid(CPU, [*CUDA, *FEW, *SMALL_BATCHES])
def test_attention(level, batch, dtype, compare, smoke):
    measure("", (level, batch, dtype), {"": None}, None, None, compare, smoke)


@grid([case for case in CPU if case[0] in ("sd1 64x64", "sd1 16x16")], CUDA)
def test_layout_bias(level, batch, dtype, compare, smoke):
    """Four boxes; the peers' (N,S) matrix has rows of 80, which the efficient backend takes as they are."""
    case = (level, batch, dtype)
    side = int(tensors(*case, smoke, False)[0].shape[2] ** 0.5)
    corners = {"a": (0, 0, 0.5, 0.5), "b": (0.5, 0, 1, 0.5), "c": (0, 0.5, 0.5, 1), "d": (0.5, 0.5, 1, 1)}
    tokens = {name: [2 * i + 1, 2 * i + 2] for i, name in enumerate(corners)}
    layout = ck.LayoutBias.from_boxes(corners, tokens, (side, side), TOKENS, 2.5, -10.0).to(DEVICE)
    dense = torch.empty(1, 1, side * side, 80, dtype=dtype, device=DEVICE)[..., :TOKENS]
    dense.copy_(layout.dense())
    biases = {"": layout, "dense bias": dense, "without bias": None}
    measure("layout ", case, biases, layout, dense, compare, smoke)


@grid(
    [(level, 2, FLOAT) for level in SD1[:2]],
    [(level, 16, dtype) for level in SD1[:2] for dtype in (BF16, FLOAT)],
)
def test_score_std(level, batch, dtype, compare, smoke):
    query, key, _ = tensors(level, batch, dtype, smoke, False)
    cases = ours(lambda: ck.score_std(query, key), dtype)
    cases["plain"] = lambda: (query @ key.mT).std()
    title = f"score_std {level} batch {batch} {name(dtype)}"
    compare(title, cases, baseline="plain", bytes=query.nbytes + key.nbytes)
