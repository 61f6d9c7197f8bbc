"""Stage 1: the autoencoder.  Its encoder is constructed, its decoder is trained.

The encoder computes, exactly and inside the ordinary ``AutoencoderKL`` architecture, the first eight
principal components of 4×4 patches, each divided by the square root of its standard deviation.  So latents
exist before any training and never change, the denoiser can be trained at the same time as the decoder, and
flat colours survive: a trained encoder has to learn first to see past its group normalisation.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from . import common, data

HELD_OUT = range(9000, 9001)
LATENTS = 8
LEVEL = 40.0  # the constants that keep the group normalisation's denominator fixed


def build() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENTS,
        sample_size=64,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )


def to_model(images: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 → (B, 3, 64, 64) float32 in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def patch_components(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (48,) and scaled components (LATENTS, 48) of 4×4 patches, ordered (row, column, channel)."""
    x = images.astype(np.float64) / 127.5 - 1
    x = x.reshape(len(x), 16, 4, 16, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    values, vectors = values[::-1][:LATENTS], vectors[:, ::-1][:, :LATENTS]
    vectors = vectors * np.sign(vectors.sum(0) + 1e-9)  # eigenvectors have no sign of their own
    return x.mean(0), (vectors / values**0.25).T


@torch.no_grad()
def construct_encoder(vae: AutoencoderKL, mean: np.ndarray, components: np.ndarray) -> None:
    """Write the projection into the encoder's weights.

    The residual branches are silenced.  Two strided convolutions take the 2×2 neighbourhoods apart (3 → 12 →
    48 numbers) and project; the result is carried as +z and -z beside constants ±LEVEL, so that the
    normalisation divides by a known number; and silu(z) - silu(-z) = z undoes the last non-linearity.
    """
    encoder = vae.encoder
    resnets = [*(r for block in encoder.down_blocks for r in block.resnets), *encoder.mid_block.resnets]
    for resnet in resnets:
        resnet.conv2.weight.zero_()
        resnet.conv2.bias.zero_()
        if resnet.conv_shortcut is not None:
            resnet.conv_shortcut.weight.zero_()
            resnet.conv_shortcut.bias.zero_()
            for c in range(resnet.conv_shortcut.in_channels):
                resnet.conv_shortcut.weight[c, c] = 1
    first, second = (block.downsamplers[0].conv for block in encoder.down_blocks[:2])
    for conv in (encoder.conv_in, first, second, encoder.conv_out, vae.quant_conv):
        conv.weight.zero_()
        conv.bias.zero_()
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1
        for k, (y, x) in enumerate(np.ndindex(2, 2)):
            first.weight[3 * k + c, c, y, x] = 1
    projection = torch.from_numpy(components).float()
    offset = -projection @ torch.from_numpy(mean).float()
    for k, (y, x) in enumerate(np.ndindex(2, 2)):  # the position inside a 2×2 block of pixels
        for by, bx in np.ndindex(2, 2):  # and of the block inside the patch
            column = ((2 * by + y) * 4 + 2 * bx + x) * 3
            weights = projection[:, column : column + 3]
            second.weight[:LATENTS, 3 * k : 3 * k + 3, by, bx] = weights
            second.weight[LATENTS : 2 * LATENTS, 3 * k : 3 * k + 3, by, bx] = -weights
    second.bias[:LATENTS], second.bias[LATENTS : 2 * LATENTS] = offset, -offset
    constants = torch.tensor([LEVEL, -LEVEL]).repeat(8)
    second.bias[16:32] = constants
    norm = encoder.conv_norm_out
    norm.weight.fill_(LEVEL / 2**0.5)  # half of the group's 32 channels are ±LEVEL
    norm.bias.zero_()
    for c in range(LATENTS):
        encoder.conv_out.weight[c, c, 1, 1] = 1
        encoder.conv_out.weight[c, LATENTS + c, 1, 1] = -1
        vae.quant_conv.weight[c, c] = 1
    vae.quant_conv.bias[LATENTS:] = -12.0  # log-variance: as good as deterministic


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean PSNR in dB of reconstructions through the posterior mean, pictures in 0..255."""
    vae.eval()
    values = []
    for batch in np.array_split(images, max(1, len(images) // 50)):
        x = to_model(batch)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((x - y) / 2).pow(2).mean((1, 2, 3))))
    vae.train()
    return float(torch.cat(values).mean())


def initialise() -> AutoencoderKL:
    """The constructed encoder, an untrained decoder, and the scaling factor, kept as the first checkpoint."""
    vae = build()
    (images,) = data.load(range(1), "images")
    construct_encoder(vae, *patch_components(images))
    with torch.no_grad():
        latents = vae.encode(to_model(images[:200])).latent_dist.mode()
    common.save({"scale": float(1 / latents.std())}, "scale.pt")
    common.save({"model": vae.state_dict(), "step": 0}, "vae.pt")
    return vae


def train(finish_at: str, chunks: int, batch: int = 24, rate: float = 2e-3) -> None:
    (images,) = data.load(range(chunks), "images")
    held_out = data.load(HELD_OUT, "images")[0][:200]
    if common.load("vae.pt") is None:
        initialise()
    vae, state = build(), common.load("vae.pt")
    vae.load_state_dict(state["model"])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trained_part = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained_part, lr=rate, betas=(0.9, 0.98), weight_decay=0)
    step = state["step"]
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    schedule = common.Schedule(rate, finish_at, warmup=50, decay=0.5)
    rng = np.random.default_rng((1, step))
    while schedule.progress < 1:
        size, count = (64, batch // 3) if schedule.progress > 0.85 else (32, batch)
        picks = np.sort(rng.integers(len(images), size=count))
        y, x = 4 * rng.integers(0, (64 - size) // 4 + 1, 2)
        target = to_model(images[picks, y : y + size, x : x + size])
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        with torch.no_grad():
            latents = vae.encode(target).latent_dist.mode()
            strength = 0.15 * torch.rand(count, 1, 1, 1)  # samples of the denoiser are never exact
            latents += strength * torch.randn_like(latents)
        out = vae.decode(latents).sample
        edges = sum((out.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (2, 3))
        mse = F.mse_loss(out, target)
        loss = F.l1_loss(out, target) + 0.5 * edges + 2 * mse
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained_part, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            common.log(
                "vae", step=step, loss=loss.item(), batch_psnr=float(-10 * torch.log10(mse.detach() / 4))
            )
        if step % 300 == 0:
            common.log("vae", step=step, psnr=psnr(vae, held_out))
            common.save(
                {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "vae.pt"
            )
    common.log("vae", step=step, psnr=psnr(vae, held_out))
    common.save({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "vae.pt")


def trained() -> AutoencoderKL:
    vae = build()
    state = common.load("vae.pt")
    if state is None:
        raise FileNotFoundError("there is no autoencoder yet: run `python -m tinysd.train vae` first")
    vae.load_state_dict(state["model"])
    return vae.eval().requires_grad_(False)
