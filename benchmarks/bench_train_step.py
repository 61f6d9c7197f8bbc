"""One K/V-only training step: this library against diffusers' Custom Diffusion processors.

Forward and backward of the attention module alone, at the largest level of SD 1.x, and of a UNet of SD's
make. Same weights, same inputs, same trainable matrices (to_k, to_v, start token detached); the gradient also
flows to the hidden states, as it does in all layers but the first, and to the text, as it does for V*.
"""

import copy

import pytest
import torch

import customdiff_kernels as ck

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_processor import (  # noqa: E402
    Attention,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = {"diffusers": CustomDiffusionAttnProcessor, "diffusers 2_0": CustomDiffusionAttnProcessor2_0}


def with_processors(model: torch.nn.Module, cls: type) -> torch.nn.Module:
    """A frozen copy of ``model`` with diffusers' processors, set as its training script sets them."""
    model = copy.deepcopy(model).requires_grad_(False)
    for name, attn in model.named_modules():
        if not isinstance(attn, Attention):
            continue
        cross = name.endswith("attn2")
        processor = cls(cross, False, attn.to_q.out_features, attn.cross_attention_dim if cross else None)
        if cross:
            for kind in ("to_k", "to_v"):
                getattr(processor, f"{kind}_custom_diffusion").load_state_dict(
                    getattr(attn, kind).state_dict()
                )
        attn.set_processor(processor.to(attn.to_q.weight.dtype))
    return model


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_attention_block(compare, smoke, dtype):
    batch, tokens, width, text = (1, 64, 40, 32) if smoke else (2, 4096, 320, 768)
    block = torch.nn.ModuleDict(
        {"attn2": Attention(width, cross_attention_dim=text, heads=8, dim_head=width // 8)}
    ).to(dtype)
    hidden = torch.randn(batch, tokens, width, dtype=dtype, requires_grad=True)
    context = torch.randn(batch, 77, text, dtype=dtype, requires_grad=True)
    direction = torch.randn_like(hidden)

    def case(model):
        inputs = [hidden, context, *trained(model)]
        return lambda: torch.autograd.grad(model.attn2(hidden, context), inputs, direction)

    cases = {label: case(with_processors(block, cls)) for label, cls in PEERS.items()}
    ours = with_processors(block, CustomDiffusionAttnProcessor2_0)
    ck.patch_unet(ours)
    compare(
        f"block {batch}x{tokens}x{width} {str(dtype).removeprefix('torch.')}",
        {**cases, "ours, patch_unet": case(ours)},
        baseline="diffusers 2_0",
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_train_step(compare, smoke, dtype):
    widths, side, text = ((32, 64), 8, 32) if smoke else ((80, 160), 32, 768)
    unet = diffusers.UNet2DConditionModel(
        sample_size=side,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=text,
        attention_head_dim=(2, 4),  # heads: 40 wide at full size, as in SD 1.x
    ).requires_grad_(False)
    unet = unet.to(dtype)
    latents, context = torch.randn(2, 4, side, side, dtype=dtype), torch.randn(2, 77, text, dtype=dtype)
    context.requires_grad_()
    timesteps, noise = torch.tensor([100, 800]), torch.randn_like(latents)

    def step(model, inputs, kv=lambda: None):
        out = model(latents, timesteps, encoder_hidden_states=context, cross_attention_kwargs=kv()).sample
        return torch.autograd.grad(torch.nn.functional.mse_loss(out, noise), inputs)

    def case(model):
        return lambda: step(model, [context, *trained(model)])

    cases = {label: case(with_processors(unet, cls)) for label, cls in PEERS.items()}
    taken_over = with_processors(unet, CustomDiffusionAttnProcessor2_0)
    ck.patch_unet(taken_over)
    cases["ours, patch_unet"] = case(taken_over)

    ck.patch_unet(unet)
    stack = ck.KVStack.from_unet(unet)
    weight = stack.weight.requires_grad_()

    def kv():
        return {"kv": stack.views(ck.kv_project(context, weight, frozen_tokens=1))}

    cases["ours, stacked K/V"] = lambda: step(unet, [context, weight], kv)
    shape = f"{side}x{side} widths {'-'.join(map(str, widths))}"
    compare(f"UNet {shape} {str(dtype).removeprefix('torch.')}", cases, baseline="diffusers 2_0")
