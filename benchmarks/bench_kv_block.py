"""The K/V-only block, forward and backward, and the most memory that it holds beside its inputs.

``block``: the bare operation between frozen projections, with the gradients of hidden, key and value,
against the same written with ``linear`` and PyTorch's attention. ``processors``: ``ck.patch_unet`` on an
``Attention`` of diffusers against diffusers' own Custom Diffusion processors; same weights and inputs, same
trainable matrices (to_k, to_v, start token detached); the gradient also flows to the hidden states, as it
does in all layers but the first, and to the text, as it does for V*. On a GPU the peers also run compiled.

``floor``: both projections inside the attention, hidden and the result moved once in each direction.

    pytest benchmarks/bench_kv_block.py --benchmark [-k processors]
"""

import copy
from collections.abc import Callable

import pytest
import torch
from backends import ours
from bench_cross_attention import (
    BF16,
    FLOAT,
    FP16,
    SD1,
    compiled,
    fresh_compiler,  # noqa: F401  (a fixture of every test here)
    grid,
    name,
    plain,
    sdpa,
    shape_of,
    tensors,
)
from roofline import Shape, Work, block_backward, block_forward
from timing import DEVICE
from torch.nn.functional import linear

import customdiff_kernels as ck

TEXT_WIDTH = 768
CUDA = [(level, 16, BF16) for level in (*SD1, "sd2 96x96", "sdxl 64x64")]
FEW = [("sd1 64x64", 2, BF16), ("sd1 64x64", 8, BF16), ("sd1 64x64", 16, FP16), ("sd1 64x64", 16, FLOAT)]


def with_compiled(cases: dict[str, Callable], wrap: Callable, smoke: bool) -> dict[str, Callable]:
    """``wrap(function)`` by label, on a GPU also of the compiled function."""
    found = {label: wrap(function) for label, function in cases.items()}
    if DEVICE == "cuda" or smoke:
        found |= {f"{label} compiled": wrap(compiled(f, smoke)) for label, f in cases.items()}
    return found


@grid([(level, 2, dtype) for level in SD1[:2] for dtype in (FLOAT, BF16)], [*CUDA, *FEW])
def test_block(level, batch, dtype, compare, smoke):
    for direction in ("fwd", "fwd+bwd"):
        if direction == "fwd+bwd" or DEVICE == "cuda" or smoke:
            measure_block(level, batch, dtype, direction, compare, smoke)


def measure_block(level, batch, dtype, direction, compare, smoke):
    grad = direction == "fwd+bwd"
    query, key, value = tensors(level, batch, dtype, smoke, False)
    shape = shape_of(query)
    inputs = [x.transpose(1, 2).flatten(2).requires_grad_(grad) for x in (query, key, value)]
    upstream = torch.randn_like(inputs[0])
    width, heads = shape.width, shape.heads
    w_q, w_out = (torch.randn(width, width, dtype=dtype, device=DEVICE) / width**0.5 for _ in range(2))

    def wrap(block):
        if not grad:
            return lambda: block(*inputs)
        return lambda: torch.autograd.grad(block(*inputs), inputs, upstream)

    def peer(attention):
        def block(hidden, key, value):
            split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (linear(hidden, w_q), key, value))
            return linear(attention(*split).transpose(1, 2).flatten(2), w_out)

        return block

    def kv_block(hidden, key, value):
        return ck.kv_cross_attention(hidden, key, value, w_q, w_out, heads=heads)

    cases = ours(wrap(kv_block), dtype)
    cases |= with_compiled({"SDPA": peer(sdpa), "plain": peer(plain)}, wrap, smoke)
    title = f"block {level} batch {batch} {direction} {name(dtype)}"
    compare(title, cases, **work(shape, grad)._asdict(), dtype=dtype, memory=True)


@grid([("sd1 64x64", 2, FLOAT), ("sd1 64x64", 2, BF16)], [*CUDA, *FEW])
def test_processors(level, batch, dtype, compare, smoke):
    pytest.importorskip("diffusers")
    query = tensors(level, batch, dtype, smoke, False)[0]
    shape, text_width = shape_of(query), 32 if smoke else TEXT_WIDTH
    model = attention(shape.heads, shape.dim, text_width).to(DEVICE, dtype)
    hidden = query.transpose(1, 2).flatten(2).requires_grad_()
    context = torch.randn(shape.batch, shape.keys, text_width, dtype=dtype, device=DEVICE).requires_grad_()
    upstream = torch.randn_like(hidden)

    def wrap(model):
        inputs = [hidden, context, *trained(model)]
        return lambda: torch.autograd.grad(model(hidden, context), inputs, upstream)

    models = {label: with_processors(model, cls) for label, cls in processors().items()}
    patched = with_processors(model, processors()["diffusers 2_0"])
    ck.patch_unet(patched)
    cases = ours(wrap(patched["attn2"]), dtype, "patch_unet")
    if DEVICE == "cuda" or smoke:
        cases |= ours(wrap(compiled(patched["attn2"], smoke)), dtype, "patch_unet compiled")
    cases |= with_compiled({label: model["attn2"] for label, model in models.items()}, wrap, smoke)
    least = work(shape, True)
    # to_k and to_v with the gradients of the weights and of the text
    least = least.plus(3 * 2 * 2 * shape.batch * shape.keys * text_width * shape.width)
    title = f"processors {level} batch {batch} fwd+bwd {name(dtype)}"
    compare(title, cases, **least._asdict(), dtype=dtype, memory=True)


def work(shape: Shape, grad: bool) -> Work:
    return block_forward(shape).plus(*block_backward(shape)) if grad else block_forward(shape)


def attention(heads: int, dim: int, text_width: int) -> torch.nn.ModuleDict:
    """A cross-attention of diffusers under the name that a UNet gives it."""
    from diffusers.models.attention_processor import Attention

    width = heads * dim
    made = Attention(width, cross_attention_dim=text_width, heads=heads, dim_head=dim)
    return torch.nn.ModuleDict({"attn2": made})


def processors() -> dict[str, type]:
    from diffusers.models import attention_processor

    return {
        "diffusers": attention_processor.CustomDiffusionAttnProcessor,
        "diffusers 2_0": attention_processor.CustomDiffusionAttnProcessor2_0,
    }


def with_processors(model: torch.nn.Module, cls: type) -> torch.nn.Module:
    """A frozen copy of ``model`` with diffusers' processors, set as its training script sets them."""
    from diffusers.models.attention_processor import Attention

    model = copy.deepcopy(model).requires_grad_(False)
    for path, attn in model.named_modules():
        if not isinstance(attn, Attention):
            continue
        cross = path.endswith("attn2")
        processor = cls(cross, False, attn.to_q.out_features, attn.cross_attention_dim if cross else None)
        if cross:
            for kind in ("to_k", "to_v"):
                weights = getattr(attn, kind).state_dict()
                getattr(processor, f"{kind}_custom_diffusion").load_state_dict(weights)
        attn.set_processor(processor.to(attn.to_q.weight.device, attn.to_q.weight.dtype))
    return model


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
