"""One K/V-only training step of a UNet of SD's make: this library against diffusers' Custom Diffusion
processors (their modules alone: ``bench_kv_block.py``).

Same weights, same inputs, same trainable matrices; the gradient also flows to the text, as it does for V*.

    pytest benchmarks/bench_train_step.py --benchmark
"""

import pytest
import torch
from backends import ours
from bench_cross_attention import BF16, FLOAT, name
from bench_kv_block import processors, trained, with_processors
from timing import DEVICE

import customdiff_kernels as ck

diffusers = pytest.importorskip("diffusers")

SIZES = {  # batch, side of the latents, widths, heads (on a GPU 40 and 80 wide: SD 1.x), width of the text
    "smoke": (2, 8, (32, 64), (2, 4), 32),
    "cpu": (2, 32, (80, 160), (2, 4), 768),
    "cuda": (4, 64, (320, 640), (8, 8), 768),
}


def unet(side: int, widths: tuple[int, int], heads: tuple[int, int], text: int) -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=side,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=text,
        attention_head_dim=heads,  # diffusers' name for their number
    ).requires_grad_(False)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=name)
def test_train_step(compare, smoke, dtype):
    batch, side, widths, heads, text = SIZES["smoke" if smoke else DEVICE]
    model = unet(side, widths, heads, text).to(DEVICE, dtype)
    latents = torch.randn(batch, 4, side, side, dtype=dtype, device=DEVICE)
    context = torch.randn(batch, 77, text, dtype=dtype, device=DEVICE).requires_grad_()
    timesteps, noise = torch.linspace(100, 800, batch, device=DEVICE).long(), torch.randn_like(latents)

    def step(model, inputs, kv=lambda: None):
        out = model(latents, timesteps, encoder_hidden_states=context, cross_attention_kwargs=kv()).sample
        return torch.autograd.grad(torch.nn.functional.mse_loss(out, noise), inputs)

    def case(model):
        return lambda: step(model, [context, *trained(model)])

    cases = {label: case(with_processors(model, cls)) for label, cls in processors().items()}
    taken_over = with_processors(model, processors()["diffusers 2_0"])
    ck.patch_unet(taken_over)
    cases |= ours(case(taken_over), dtype, "patch_unet")

    ck.patch_unet(model)
    stack = ck.KVStack.from_unet(model)
    weight = stack.weight.requires_grad_()

    def kv():
        return {"kv": stack.views(ck.kv_project(context, weight, frozen_tokens=1))}

    cases |= ours(lambda: step(model, [context, weight], kv), dtype, "stacked K/V")
    shape = f"batch {batch} {side}x{side} widths {'-'.join(map(str, widths))}"
    compare(f"UNet {shape} {name(dtype)}", cases, baseline="diffusers 2_0", memory=True)
