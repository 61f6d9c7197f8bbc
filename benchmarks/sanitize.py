"""Every operator with kernels on small shapes, forward and backward; attention with each kind of bias.

What compute-sanitizer watches (``benchmarks/gpu.sh sanitize``). Exit status 1 where a result is not the
reference's.

    compute-sanitizer --tool racecheck python benchmarks/sanitize.py [--backend cuda] [-k bfloat16]

Where there is no GPU, ``--backend cpu`` checks this script.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator

import torch

import customdiff_kernels as ck

SHAPES = [  # B, H, N, S, D: each head dimension with a fast path, others, a long context, one of one token
    (2, 3, 130, 77, 40),
    (1, 2, 65, 77, 64),
    (1, 2, 100, 77, 80),
    (1, 1, 33, 128, 128),
    (1, 2, 70, 77, 160),
    (1, 2, 17, 1, 8),
    (1, 1, 40, 300, 72),
    (1, 1, 20, 64, 256),
]
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of the largest entry
Results = dict[str, torch.Tensor]


def biases(b: int, h: int, n: int, s: int, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """The tensors of each kind of bias; those that are floating get a gradient."""
    hidden = torch.randn(b, h, n, s).masked_fill(torch.rand(b, h, n, s) < 0.3, -torch.inf)
    hidden[0, 0, 0] = -torch.inf  # a row that sees nothing
    return {
        "no bias": [],
        "layout": [torch.randint(0, 5, (b, n)), torch.randn(b, 5, s)],
        "shared layout": [torch.randint(0, 3, (1, n)), torch.randn(1, 3, s)],
        "dense bias": [hidden.to(dtype)],
        "broadcast bias": [torch.randn(1, 1, n, s)],
        "bias a key": [torch.randn(s)],
    }


def cases(shape: tuple, dtype: torch.dtype, strided: bool) -> Iterator[tuple[str, Callable, list]]:
    """(name, function, its tensors): every operator, kind of bias and set of wanted gradients."""
    b, h, n, s, d = shape
    query, key, value = (heads(b, h, m, d, dtype, strided) for m in (n, s, s))
    for kind, bias in biases(b, h, n, s, dtype).items():
        yield f"cross_attention, {kind}", attention, [query, key, value, *bias]
    yield "score_std", ck.score_std, [query, key]

    def frozen_query(key, value):
        return ck.cross_attention(query.to(key), key, value)

    yield "cross_attention, dK and dV alone", frozen_query, [key, value]
    yield (
        "reconstruct",
        low_rank_sum,
        [x.to(dtype) for x in (torch.randn(n + 3, s), torch.randn(n, d), torch.randn(d, s))],
    )
    if strided:
        return
    hidden, context = torch.randn(b, n, 48), torch.randn(b, s, 32)
    weight, w_q = torch.randn(2 * h * d, 32) / 32**0.5, torch.randn(h * d, 48) / 48**0.5

    def block(hidden, context, weight):
        key, value = ck.kv_project(context, weight, frozen_tokens=1).split(h * d, dim=-1)
        frozen = w_q.to(hidden)
        return ck.kv_cross_attention(hidden, key, value, frozen, frozen.T.contiguous(), heads=h)

    yield "kv_cross_attention", block, [x.to(dtype) for x in (hidden, context, weight)]


def attention(query, key, value, *bias):
    """``bias``: nothing, a dense one, or a layout's labels and table."""
    layout = ck.LayoutBias(*bias) if len(bias) == 2 else None
    return ck.cross_attention(query, key, value, layout or (bias[0] if bias else None))


def low_rank_sum(base, u, v):
    """Some rows change once, one twice, some not at all."""
    return torch.ops.customdiff.reconstruct(base, [u, u[:1]], [v, v], [1, 1], [0.5, -1.0])


def heads(b: int, h: int, n: int, d: int, dtype: torch.dtype, strided: bool) -> torch.Tensor:
    """(B,H,N,D) as a UNet has it, or with rows that start at odd places."""
    gap = 3 if strided else 0
    rows = torch.randn(b, n, h * d + gap, dtype=dtype)[..., gap // 2 : gap // 2 + h * d]
    return rows.unflatten(-1, (h, d)).transpose(1, 2)


def placed(x: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A copy with the same strides and offset, which ``to`` would not keep."""
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=dtype, device=device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def run(backend: str, device: str, function: Callable, tensors: list, exact: bool = False) -> Results:
    """The result and every gradient, with ``CK_BACKEND`` forced; ``exact``: in float64."""
    os.environ["CK_BACKEND"] = backend
    dtypes = [torch.float64 if exact and x.is_floating_point() else x.dtype for x in tensors]
    inputs = [placed(x, device, dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
    wanted = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    out = function(*inputs)
    torch.manual_seed(1)
    upstream = torch.randn(out.shape).to(out)
    grads = torch.autograd.grad(out, wanted, upstream)
    found = {"result": out, **{f"gradient {i}": grad for i, grad in enumerate(grads)}}
    return {what: x.detach().double().cpu() for what, x in found.items()}


def wrong(found: Results, exact: Results, tolerance: float) -> list[str]:
    return [
        f"{what} is off by {(found[what] - x).abs().max():.2g} of {x.abs().max():.2g}"
        for what, x in exact.items()
        if not (found[what] - x).abs().max() <= tolerance * max(1.0, x.abs().max())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton", "cpu", "reference"))
    parser.add_argument("-k", default="", help="only cases whose name has this in it")
    options = parser.parse_args()
    device = "cuda" if options.backend in ("cuda", "triton") else "cpu"
    checked = failed = 0
    for shape, dtype, strided in itertools.product(SHAPES, TOLERANCE, (False, True)):
        torch.manual_seed(0)
        for what, function, tensors in cases(shape, dtype, strided):
            name = f"{what} {shape} {str(dtype).removeprefix('torch.')}{' strided' * strided}"
            if options.k not in name:
                continue
            found = run(options.backend, device, function, tensors)
            exact = run("reference", "cpu", function, tensors, exact=True)
            errors = wrong(found, exact, TOLERANCE[dtype])
            for error in errors:
                print(f"WRONG {name}: {error}", flush=True)
            checked, failed = checked + 1, failed + bool(errors)
    print(f"{checked} cases on {options.backend}, {failed} wrong")
    return 1 if failed or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
