"""One layout-guided sampling step (Cones 2) at the shapes of SD 2.1-base, and its cross-attention alone.

A batch of two for classifier-free guidance, of which the conditional row is guided by the layout of three
subjects. Random weights. Against "plain": the equations written out in processors of diffusers, on every
attention as the published code does it, so with the scores of self-attention too; keys and values of the text
at every step, the dense (N,S) layout, the scores and their standard deviation. "plain, SDPA" leaves
self-attention to diffusers. FlexAttention gathers the layout in a ``score_mod``; it needs the scores for
their standard deviation.

    pytest benchmarks/bench_layout_sampling.py --benchmark --rounds 5
"""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import ours
from bench_cross_attention import FLOAT, compiled, name
from timing import DEVICE
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import customdiff_kernels as ck

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from customdiff.attention import level_size, patched  # noqa: E402
from customdiff.guidance import Guide, LayoutGuidance, noise_levels  # noqa: E402
from customdiff.layouts import Layout  # noqa: E402

TOKENS, STEP = 77, 10  # of 50
LAYOUT = Layout({"dog": (0.05, 0.4, 0.45, 0.95), "mug": (0.5, 0.5, 0.8, 0.9), "cat": (0.6, 0.1, 1, 0.6)})
AT = {"dog": (2,), "mug": (5, 6), "cat": (9,)}
GUIDANCE = LayoutGuidance()
LEVELS = [(5, 64), (10, 32), (20, 16), (20, 8)]  # heads of 64, side
SMOKE = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 16,
}
SMOKE |= {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
SD21 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
}


class Plain:
    """An attention processor with equation 7 written out; without a ``strength`` nothing is guided.

    ``attend``: (query, key, value, M, η) -> what replaces values' rows, in the place of the plain products.
    """

    def __init__(self, attend: Callable, strength: float, size: tuple[int, int]):
        self.attend, self.strength, self.size = attend, strength, size
        self.layouts: dict[int, ck.LayoutBias] = {}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        query, key, value = (
            linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for linear, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        out = self.attend(query, key, value, self.layout(query) if cross else None, self.strength)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))

    def layout(self, query: torch.Tensor) -> ck.LayoutBias:
        n = query.shape[2]
        if n not in self.layouts:
            self.layouts[n] = layout_at(level_size(n, self.size))
        return self.layouts[n]


def layout_at(size: tuple[int, int]) -> ck.LayoutBias:
    """That of the unconditional row, which is zero, and of the conditional one."""
    one = LAYOUT.bias(AT, size, TOKENS, GUIDANCE.positive, GUIDANCE.negative).to(DEVICE)
    return ck.LayoutBias.stack([None, one])


def plain(query, key, value, layout, strength):
    scores = query @ key.mT
    if layout is not None:  # η(t)·M of the conditional row, built anew as η is
        scores[1:] += strength * scores[1:].std() * layout.dense()[1:]
    return (scores * query.shape[-1] ** -0.5).softmax(-1) @ value


def plain_sdpa(query, key, value, layout, strength):
    if layout is None:
        return scaled_dot_product_attention(query, key, value)
    return plain(query, key, value, layout, strength)


def flex(smoke: bool) -> Callable:
    def attention(query, key, value, labels, table):
        def bias(score, batch, head, image, text):
            return score + table[batch, labels[batch, image], text]

        return flex_attention(query, key, value, score_mod=bias)

    fast = compiled(attention, smoke)

    def attend(query, key, value, layout, strength):
        if layout is None:
            return scaled_dot_product_attention(query, key, value)
        scale = strength * (query[1:] @ key[1:].mT).std() * query.shape[-1] ** -0.5
        return fast(query, key, value, layout.labels, layout.table * scale)

    return attend


def peers(smoke: bool) -> dict[str, Callable]:
    return {"plain": plain, "plain, SDPA": plain_sdpa, "FlexAttention compiled": flex(smoke)}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@torch.no_grad()
def test_sampling_step(compare, smoke):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **(SMOKE if smoke else SD21), cross_attention_dim=32 if smoke else 1024, use_linear_projection=True
    )
    unet = unet.to(DEVICE).eval().requires_grad_(False)
    side = unet.config.sample_size
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(50)
    sigmas = noise_levels(scheduler)
    strength = GUIDANCE.strengths(sigmas)[STEP]
    x = torch.randn(1, 4, side, side, device=DEVICE)
    context = torch.randn(2, TOKENS, unet.config.cross_attention_dim, device=DEVICE)
    stack = ck.KVStack.from_unet(unet)
    kv = stack.views(ck.kv_project(context, stack.weight))
    guide = Guide(unet, [None, (LAYOUT, AT)], TOKENS, (side, side), GUIDANCE, sigmas)
    before = unet.attn_processors

    @torch.no_grad()
    def step(**options):
        t = scheduler.timesteps[STEP]
        out = unet(torch.cat([x, x]), t, encoder_hidden_states=context, **options).sample
        unconditional, conditional = out.chunk(2)
        out = unconditional + 7.5 * (conditional - unconditional)
        return copy.copy(scheduler).step(out, t, x).prev_sample

    def our_step():
        unet.set_attn_processor(dict(before))
        with patched(unet), guide.on(STEP):
            return step(cross_attention_kwargs={"kv": kv})

    def step_with(attend):
        processor = Plain(attend, strength, (side, side))

        def run():
            unet.set_attn_processor(processor)
            return step()

        return run

    cases = ours(our_step, FLOAT) | {label: step_with(attend) for label, attend in peers(smoke).items()}
    check(cases, 1e-3)
    compare(f"UNet step {side}x{side} {name(FLOAT)}", cases, baseline="plain")


@pytest.mark.parametrize("heads,side", LEVELS)
@torch.no_grad()
def test_cross_attention(heads, side, compare, smoke):
    side = 4 if smoke else side
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, n, heads, 64, device=DEVICE).transpose(1, 2) for n in (side * side, TOKENS, TOKENS)
    )
    strength = GUIDANCE.weight * math.log1p(4.0)
    unet: Any = SimpleNamespace(device=torch.device(DEVICE))  # all that is asked of it here
    guide = Guide(unet, [None, (LAYOUT, AT)], TOKENS, (side, side), GUIDANCE, [2.0, 0])
    layout = layout_at((side, side))

    def our_attention():
        return ck.cross_attention(query, key, value, guide.bias(query, key, strength, 64**-0.5))

    cases = ours(our_attention, FLOAT) | {
        label: lambda attend=attend: attend(query, key, value, layout, strength)
        for label, attend in peers(smoke).items()
        if label != "plain, SDPA"  # the same here
    }
    check(cases, 1e-4)
    compare(f"cross-attention {heads}x{side}x{side} batch 2 {name(FLOAT)}", cases, baseline="plain")


def check(cases: dict[str, Callable], tolerance: float) -> None:
    """All compute the same."""
    found = {label: call() for label, call in cases.items()}
    want = found["plain"]
    for label, got in found.items():
        assert (got - want).abs().max() <= tolerance * want.abs().max(), label
