"""Stage 3: the denoiser, v-prediction on cached latents, with the text encoder trained along."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from transformers import CLIPTextModel

import tinysd

from . import clip, common, data, tokenizer, vae

HERE = Path(__file__).resolve().parent
GAMMA = 5.0
PROMPTS = (
    "photo of a red dog on the beach",
    "photo of a blue cat in the snow",
    "a yellow car on the street",
    "a green cup in the room",
    "a striped purple dog with a hat on the grass",
    "photo of a dog and a cat in the room",
    "a red car and a blue cup on the beach",
    "photo of a cat",
    "photo of a pink cup on the grass",
    "a brown dog with a ribbon in the snow",
    "a green cat and a red dog on the street",
    "very small photo of a car in the snow",
)
MORE_PROMPTS = (
    "photo of a dog",
    "a yellow spotted cat on the grass",
    "a blue bicolor car in the snow",
    "an orange cup with a ribbon in the room",
    "a purple car with a hat on the beach",
    "a pink cat with a hat in the room",
    "a yellow dog and a purple cat on the grass",
    "two cars on the street",
    "a red cup and a green cup in the room",
    "close up photo of a blue dog on the beach",
    "a far away photo of an orange cat on the grass",
    "a red striped cup",
)


def build_unet() -> UNet2DConditionModel:
    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=vae.LATENTS,
        out_channels=vae.LATENTS,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Zero terminal SNR, or a flat background's colour would leak into the start."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


# --- latents ------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_chunk(model, index: int) -> Path:  # noqa: ANN001 - AutoencoderKL
    """Posterior means, (CHUNK, 8, 16, 16) float16, unscaled, of one chunk of pictures."""
    path = data.CACHE / "latents" / f"{index:04d}.npy"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    (images,) = data.load(range(index, index + 1), "images")
    latents = np.concatenate(
        [
            model.encode(vae.to_model(part)).latent_dist.mode().half().numpy()
            for part in np.array_split(images, 40)
        ]
    )
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, latents)
    os.replace(temporary, path)
    return path


def encode(chunks: range) -> None:
    """Render and encode what is missing."""
    model = vae.trained()
    for index in chunks:
        path = encode_chunk(model, index)
        print(time.strftime("%H:%M:%S"), "encoded", path.name, flush=True)


class Latents:
    """The latents and captions that are on disk; more may arrive while training runs."""

    def __init__(self, ids) -> None:  # noqa: ANN001 - CLIPTokenizer
        self.ids = ids
        self.scale = common.load("scale.pt")["scale"]
        self.read: list[Path] = []
        self.latents: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    def refresh(self) -> None:
        for path in sorted((data.CACHE / "latents").glob("[0-9][0-9][0-9][0-9].npy")):
            if path not in self.read:
                self.read.append(path)
                (captions,) = data.load(range(int(path.stem), int(path.stem) + 1), "captions")
                flat = [c for row in captions.tolist() for c in row]
                self.tokens.append(tokenizer.encode(self.ids, flat).view(*captions.shape, -1))
                self.latents.append(torch.from_numpy(np.load(path)))

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        chunk = torch.randint(len(self.latents), (size,)).tolist()
        row = torch.randint(data.CHUNK, (size,)).tolist()
        which = torch.randint(data.CAPTIONS, (size,)).tolist()
        latents = (
            torch.stack([self.latents[c][r] for c, r in zip(chunk, row, strict=True)]).float() * self.scale
        )
        return latents, torch.stack([self.tokens[c][r, w] for c, r, w in zip(chunk, row, which, strict=True)])


# --- training -----------------------------------------------------------------------------------------------


def train(finish_at: str, batch: int = 64, rate: float = 1e-3) -> None:
    """Train until ``finish_at``; under torchrun the batch is shared out and gradients are averaged by gloo.

    Two processes of one thread keep two busy cores better filled than one process of two threads, which
    waits at every small operation.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if ranks > 1 else 0
    ids = clip.make_tokenizer()
    torch.manual_seed(5)
    text = CLIPTextModel(clip.text_config(len(ids)))
    unet = build_unet()
    unet.set_attn_processor(AttnProcessor())
    parts = torch.nn.ModuleDict({"unet": unet, "text": text})
    groups = [
        {"params": list(unet.parameters()), "scale": 1.0},
        {"params": list(text.parameters()), "scale": 0.7},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = copy.deepcopy(parts).requires_grad_(False)
    step = seen = begun = 0
    if (state := common.load("unet.pt")) is not None:
        parts.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
            for group in optimizer.param_groups:
                group["fused"] = True
        else:
            begun = state["step"]
        step, seen = state["step"], state["samples"]
    store = Latents(ids)
    store.refresh()
    alphas = scheduler().alphas_cumprod
    schedule = common.Schedule(rate, finish_at, warmup=150, decay=0.75)
    torch.manual_seed(4 + ranks * step + rank)
    share = batch // ranks
    empty = tokenizer.encode(ids, [""])
    mean, since, saved = 0.0, time.time(), time.time()
    live, averaged = list(parts.parameters()), list(ema.parameters())
    progress = torch.tensor([schedule.progress])
    while progress < 1:
        latents, tokens = store.batch(share)
        tokens = torch.where(torch.rand(share, 1) < 0.1, empty, tokens)
        noise = torch.randn_like(latents)
        steps = torch.randint(len(alphas), (share,))
        alpha = alphas[steps][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        snr = alphas[steps] / (1 - alphas[steps])
        for group in optimizer.param_groups:
            group["lr"] = schedule(step - begun, float(progress)) * group["scale"]
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(noisy, steps, encoder_hidden_states=text(tokens).last_hidden_state).sample
        error = (out.float() - velocity).pow(2).mean((1, 2, 3))
        loss = (error * (GAMMA / (snr + 1)).clamp(max=1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        progress = torch.tensor([schedule.progress])
        if ranks > 1:  # the clock travels with the gradients, so that all ranks decay and stop together
            _average([*(p.grad for p in live if p.grad is not None), progress], ranks)
        torch.nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        step, seen = step + 1, seen + batch
        rate_of_average = min(0.998, (1 + step) / (20 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in live], 1 - rate_of_average)
        mean += loss.item()
        if step % 100 == 0:
            if rank == 0:
                speed = 100 * batch / (time.time() - since)
                now = schedule(step - begun, float(progress))
                common.log(
                    "unet",
                    step=step,
                    samples=seen,
                    loss=mean / 100,
                    rate=now,
                    images_per_second=speed,
                )
            mean, since = 0.0, time.time()
            store.refresh()
        if rank == 0 and time.time() - saved > 200:
            _save(parts, ema, optimizer, step, seen)
            saved = time.time()
    if rank == 0:
        _save(parts, ema, optimizer, step, seen)


def _average(tensors: list[torch.Tensor], ranks: int) -> None:
    """Replace every tensor by its mean over the ranks, in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= ranks
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _save(
    parts: torch.nn.Module, ema: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, samples: int
) -> None:
    common.save(
        {
            "model": parts.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "samples": samples,
        },
        "unet.pt",
    )


def adopt() -> None:
    """Make the weights that ship the last checkpoint, to train them further; their optimizer is not kept."""
    shipped = StableDiffusionPipeline.from_pretrained(tinysd.path())
    parts = torch.nn.ModuleDict({"unet": shipped.unet, "text": shipped.text_encoder}).state_dict()
    log = map(json.loads, (HERE / "training_log.jsonl").read_text().splitlines())
    last = [entry for entry in log if entry["stage"] == "unet"][-1]
    common.save({"model": parts, "ema": parts, "step": last["step"], "samples": last["samples"]}, "unet.pt")
    common.save({"model": shipped.vae.state_dict(), "step": 0}, "vae.pt")
    common.save({"scale": shipped.vae.config.scaling_factor}, "scale.pt")
    shutil.copy(HERE / "training_log.jsonl", common.LOG)


# --- sampling and export ------------------------------------------------------------------------------------


def pipeline() -> StableDiffusionPipeline:
    """The pipeline of the averaged weights in the last checkpoint."""
    state = common.load("unet.pt")
    if state is None:
        raise FileNotFoundError("the UNet has not been trained: run `python -m tinysd.train unet` first")
    ids = clip.make_tokenizer()
    parts = torch.nn.ModuleDict({"unet": build_unet(), "text": CLIPTextModel(clip.text_config(len(ids)))})
    parts.load_state_dict(state["ema"])
    autoencoder = vae.trained()
    autoencoder.register_to_config(scaling_factor=common.load("scale.pt")["scale"])
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=parts["text"].eval(),
        tokenizer=ids,
        unet=parts["unet"].eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sheet(images: list[Image.Image], columns: int = 6, side: int = 128) -> Image.Image:
    """A contact sheet of enlarged pictures."""
    rows = -(-len(images) // columns)
    out = Image.new("RGB", (columns * (side + 2), rows * (side + 2)), "white")
    for k, image in enumerate(images):
        corner = ((k % columns) * (side + 2), (k // columns) * (side + 2))
        out.paste(image.resize((side, side), Image.Resampling.NEAREST), corner)
    return out


def sample(
    pipe: StableDiffusionPipeline, prompts: list[str], seed: int = 0, guidance: float = 3.0, steps: int = 20
) -> list:
    """DDIM samples, one a prompt, each from its own seeded noise."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), 40):
        part = list(prompts[start : start + 40])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(part))]
        images += pipe(part, generator=generators, guidance_scale=guidance, num_inference_steps=steps).images
    return images
