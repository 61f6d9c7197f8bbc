"""Short-context cross-attention against PyTorch's own, at the levels of SD 1.x, SD 2.1 and SDXL (77 text
tokens).

Peers: ``scaled_dot_product_attention`` and plain PyTorch (matmul, softmax, matmul). The baseline of a case is
the faster of the two there, found by a short timing in the same process. ``of limit`` is the share of the
float32 GEMM rate measured in this run (bfloat16 has hardware of its own and may pass 100%).

    pytest benchmarks/bench_cross_attention.py --benchmark [-k "sd1 and float32"]
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

import customdiff_kernels as ck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S = 77
LEVELS = {  # name: batch, heads, image tokens, head dimension
    "sd1 64x64": (2, 8, 4096, 40),
    "sd1 32x32": (2, 8, 1024, 80),
    "sd1 16x16": (2, 8, 256, 160),
    "sd1 8x8": (2, 8, 64, 160),
    "sd2 96x96": (1, 5, 9216, 64),
    "sd2 48x48": (1, 10, 2304, 64),
    "sd2 24x24": (1, 20, 576, 64),
    "sd2 12x12": (1, 20, 144, 64),
    "sdxl 64x64": (1, 10, 4096, 64),
    "sdxl 32x32": (1, 20, 1024, 64),
}
DTYPES = [torch.float32, torch.bfloat16]


def plain(query, key, value, bias=None):
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ value


def masked_sdpa(query, key, value, bias=None):
    return scaled_dot_product_attention(query, key, value, attn_mask=bias)


def tensors(level, dtype, smoke, grad):
    """query, key, value as a UNet has them: heads read from (B,N,inner) memory."""
    b, h, n, d = LEVELS[level]
    n = min(n, 64) if smoke else n
    torch.manual_seed(0)
    made = [torch.randn(b, m, h, d, dtype=dtype, device=DEVICE).transpose(1, 2) for m in (n, S, S)]
    return [t.requires_grad_(grad) for t in made]


def call(function: Callable, args: list, bias, backward: bool) -> Callable[[], object]:
    if not backward:
        return lambda: function(*args, bias)
    upstream = torch.randn_like(args[0])
    return lambda: torch.autograd.grad(function(*args, bias), args, upstream)


def better(peers: dict[str, Callable], smoke: bool) -> str:
    """The label of the fastest, by the median of seven calls."""
    if smoke:
        return next(iter(peers))

    def median(function):
        function()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return min(peers, key=lambda label: median(peers[label]))


def flops(query: torch.Tensor, backward: bool) -> float:
    """Useful work: two products forward, four more backward; what is computed again does not count."""
    b, h, n, d = query.shape
    return (12 if backward else 4) * b * h * n * S * d


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("level", LEVELS)
def test_attention(level, backward, dtype, compare, smoke):
    args = tensors(level, dtype, smoke, backward)
    peers = {name: call(f, args, None, backward) for name, f in (("SDPA", masked_sdpa), ("plain", plain))}
    ours = {"ours": call(ck.cross_attention, args, None, backward)}
    case = f"{level} {'fwd+bwd' if backward else 'fwd'} {str(dtype).removeprefix('torch.')}"
    compare(case, ours | peers, baseline=better(peers, smoke), flops=flops(args[0], backward))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("level", ["sd1 64x64", "sd1 16x16"])
def test_layout_bias(level, backward, dtype, compare, smoke):
    """Four boxes; the peers get the (N,S) matrix ready-made, its building is not timed."""
    args = tensors(level, dtype, smoke, backward)
    side = int(args[0].shape[2] ** 0.5)
    corners = {"a": (0, 0, 0.5, 0.5), "b": (0.5, 0, 1, 0.5), "c": (0, 0.5, 0.5, 1), "d": (0.5, 0.5, 1, 1)}
    tokens = {name: [2 * i + 1, 2 * i + 2] for i, name in enumerate(corners)}
    layout = ck.LayoutBias.from_boxes(corners, tokens, (side, side), S, 2.5, -10.0).to(DEVICE)
    dense = layout.dense().to(dtype)
    peers = {name: call(f, args, dense, backward) for name, f in (("SDPA", masked_sdpa), ("plain", plain))}
    ours = {"ours": call(ck.cross_attention, args, layout, backward)}
    ours["ours, dense bias"] = call(ck.cross_attention, args, dense, backward)
    case = f"layout {level} {'fwd+bwd' if backward else 'fwd'} {str(dtype).removeprefix('torch.')}"
    compare(case, ours | peers, baseline=better(peers, smoke), flops=flops(args[0], backward))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ["sd1 64x64", "sd1 32x32"])
def test_frozen_block(level, dtype, compare, smoke):
    """The whole block between frozen projections, with the gradients of hidden, key and value."""
    query, key, value = tensors(level, dtype, smoke, False)
    b, h, n, d = query.shape
    width = h * d
    hidden = torch.randn(b, n, width, dtype=dtype, device=DEVICE, requires_grad=True)
    key, value = (x.transpose(1, 2).reshape(b, S, width).requires_grad_() for x in (key, value))
    w_q, w_out = (torch.randn(width, width, dtype=dtype, device=DEVICE) / width**0.5 for _ in range(2))
    upstream = torch.randn_like(hidden)

    def peer(attention):
        def block():
            heads = (x.unflatten(-1, (h, d)).transpose(1, 2) for x in (linear(hidden, w_q), key, value))
            out = linear(attention(*heads).transpose(1, 2).flatten(2), w_out)
            return torch.autograd.grad(out, (hidden, key, value), upstream)

        return block

    def ours():
        out = ck.kv_cross_attention(hidden, key, value, w_q, w_out, heads=h)
        return torch.autograd.grad(out, (hidden, key, value), upstream)

    peers = {"SDPA": peer(masked_sdpa), "plain": peer(plain)}
    work = flops(query, True) + 8 * b * n * width * width
    case = f"frozen block {level} fwd+bwd {str(dtype).removeprefix('torch.')}"
    compare(case, {"ours": ours} | peers, baseline=better(peers, smoke), flops=work)


@pytest.mark.parametrize("level", ["sd1 64x64", "sd1 32x32"])
def test_score_std(level, compare, smoke):
    query, key, _ = tensors(level, torch.float32, smoke, False)
    cases = {"ours": lambda: ck.score_std(query, key), "plain": lambda: (query @ key.mT).std()}
    compare(f"score_std {level}", cases, baseline="plain", bytes=query.nbytes + key.nbytes)
