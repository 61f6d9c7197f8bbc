"""Custom Diffusion's training (section 3.1): one stacked K/V matrix and one embedding row are learned.

All cross-attention layers' keys and values are one matrix W. A step is: text features c of the prompts, one
projection ``kv = c Wᵀ`` for all layers, the frozen UNet on noisy latents with views of ``kv``, the loss on
the concept's pictures plus ``prior_weight`` times that on the regularization pictures. Latents, and the text
features of the regularization captions, do not depend on what is learned: they are computed once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import customdiff_kernels as ck

from . import data
from .base import EMBEDDED, is_embedded, load_base
from .concept import Concept, Rows, base_metadata, encode_prompts, mentions
from .config import TrainConfig

FROZEN_TOKENS = 1  # the start token: Custom Diffusion lets no gradient through its keys and values
TEXT_BATCH = 32
CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class TrainResult:
    """What a run returns: the concept and its file, the loss of each step, seconds, pictures a second."""

    concept: Concept
    output: Path
    losses: tuple[float, ...]
    seconds: float
    images_per_second: float


def train(config: TrainConfig, pipeline: Any = None, *, progress: bool = True) -> TrainResult:
    """Learns the concept of `config` and writes it to ``config.output``, whole or not at all.

    Args:
        config: everything that the result depends on, but the base's weights.
        pipeline: a loaded base, in place of the one that ``config.base`` names; it is left as it was. In
            float16 or bfloat16, what is learned is float32 still. One loaded from the embedded base's folder,
            as by ``load_base()``, has that base's learning rates by default; any other has the paper's.
        progress: show a bar with the loss, pictures a second and the time left.

    Raises:
        ValueError: for pictures, captions, an output or a base that cannot be used, an initializer word that
            is not one token, or a checkpoint that is damaged or of another run. Nothing is written then.
        FileExistsError: if the output is there already and ``config.overwrite`` is not set.
    """
    started = time.perf_counter()
    output = _usable_output(config)
    pictures = Pictures.read(config)  # before the base: a wrong folder should not cost a model's loading
    pipeline = load_base(config.base, config.device) if pipeline is None else pipeline
    checkpoint = output.with_name(output.name + ".checkpoint")
    with ck.patched(pipeline.unet), frozen(pipeline):
        training = Training(config, pipeline, pictures)
        if config.resume:
            training.restore(checkpoint)
        losses, rate = [], 0.0
        bar = tqdm(
            total=config.steps,
            initial=training.steps_done,
            desc="training",
            unit="step",
            disable=not progress,
        )
        with bar, _deterministic():
            looped = time.perf_counter()
            while training.steps_done < config.steps:
                losses.append(training.step())
                rate = len(losses) * training.images_per_step / (time.perf_counter() - looped)
                recent = losses[-20:]
                bar.set_postfix_str(
                    f"loss {sum(recent) / len(recent):.4f}, {rate:.1f} images/s", refresh=False
                )
                bar.update()
                if config.checkpoint_every and training.steps_done % config.checkpoint_every == 0:
                    training.checkpoint(checkpoint)
    concept = training.concept()
    output.parent.mkdir(parents=True, exist_ok=True)
    concept.save(output)
    checkpoint.unlink(missing_ok=True)
    return TrainResult(concept, output, tuple(losses), time.perf_counter() - started, rate)


@dataclass(frozen=True)
class Pictures:
    """The files a run learns from: the concept's pictures, and the captioned ones that keep the prior."""

    concept: list[Path]
    regularization: list[Path]
    captions: list[str]

    @classmethod
    def read(cls, config: TrainConfig) -> Pictures:
        concept = data.picture_paths(config.images)
        if config.regularization is None:
            return cls(concept, [], [])
        regularization, captions = data.read_captioned(config.regularization)
        for caption in captions:
            if mentions(caption, [config.modifier_token]):
                raise ValueError(
                    f"regularization caption {caption!r} holds the modifier token {config.modifier_token!r}; "
                    "these pictures stand for what the base knows already, so caption them without it"
                )
        return cls(concept, regularization, captions)


class Training:
    """A run in progress on a patched, frozen base: two parameters, an optimizer, a generator of all draws."""

    def __init__(self, config: TrainConfig, pipeline: Any, pictures: Pictures):
        from diffusers import DDPMScheduler

        self.config, self.pipeline, self.steps_done = config, pipeline, 0
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction = self.scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"base predicts {self.prediction!r}; the trainer knows 'epsilon' and 'v_prediction'"
            )
        self.device = pipeline.unet.device
        source = pipeline.name_or_path or config.base or "unnamed"
        self.embedded = is_embedded(source)
        self.base_name = EMBEDDED if self.embedded else Path(source).resolve().name
        self.generator = torch.Generator().manual_seed(config.seed)

        self.base = ck.KVStack.from_unet(pipeline.unet).to(torch.float32)
        self.weight = nn.Parameter(self.base.weight.clone())
        self.row = nn.Parameter(self._initial_row())
        groups = [{"params": [self.weight]}, {"params": [self.row]}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)

        factor = pipeline.vae_scale_factor
        size = pipeline.unet.config.sample_size
        self.resolution = config.resolution or factor * (size if isinstance(size, int) else min(size))
        if self.resolution % factor:
            raise ValueError(f"resolution must be a multiple of {factor}, got {self.resolution}")
        sized = [words + config.prompts[0] for words in data.SMALL_WORDS + data.LARGE_WORDS]
        # a bad prompt fails now, not at the step that draws it
        self._contexts([*config.prompts, *(sized if config.resize else [])], self._rows)
        contexts = self._contexts([*pictures.captions, ""], {})
        self.prior_context, self.empty_context = contexts[:-1], contexts[-1]
        pixels = self._pixels(pictures.concept)
        prior = self._pixels(pictures.regularization) if pictures.regularization else pixels[:0]
        self.pictures_hash = _hash(pixels, prior, pictures.captions)
        whole = data.shifted(pixels, config.shift, self.generator)
        self.whole, self.masks = len(whole), None
        self.sizes = [""] * self.whole
        if config.resize:
            copies, masks, sizes = data.resized(pixels, self.generator)
            masks = torch.cat([torch.ones_like(whole[:, :1]), masks])
            self.masks = (F.avg_pool2d(masks, factor) == 1).float().to(self.device)
            self.sizes, whole = self.sizes + sizes, torch.cat([whole, copies])
        self.latents = data.encode(pipeline.vae, whole)
        self.prior_latents = data.encode(pipeline.vae, prior) if len(prior) else None

    @property
    def images_per_step(self) -> int:
        return self.config.batch_size * (1 if self.prior_latents is None else 2)

    def step(self) -> float:
        """One step of the optimizer; returns its loss."""
        count = self.config.batch_size
        views = self._choose_views(count)
        latents = self.latents.draw(views, self.generator)
        context = self._instance_context(views, self._choose(len(self.config.prompts), count))
        masks = None if self.masks is None else self.masks[views.to(self.device)]
        if self.prior_latents is not None:
            chosen = self._choose(len(self.prior_latents.mean), count)
            latents = torch.cat([latents, self.prior_latents.draw(chosen, self.generator)])
            captions = self.prior_context[chosen.to(self.device)]
            empty = torch.rand(count, generator=self.generator) < self.config.caption_dropout
            captions[empty.to(self.device)] = self.empty_context
            context = torch.cat([context, captions])
            masks = None if masks is None else torch.cat([masks, torch.ones_like(masks)])
        losses = self._losses(latents * self.pipeline.vae.config.scaling_factor, context, masks)
        loss = losses[:count].mean()
        if len(losses) > count:
            loss = loss + self.config.prior_weight * losses[count:].mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        rates = self.config.rates(self.steps_done, self.embedded)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.step()
        self.steps_done += 1
        return float(loss.detach())

    def concept(self) -> Concept:
        """What was learned so far."""
        weight, base = self.weight.detach(), self.base
        metadata = {
            **base_metadata(base),
            "base_name": self.base_name,
            "resolution": self.resolution,
            "prompt": self.config.prompts[0],
            "prompts": list(self.config.prompts),
            "training": asdict(self.config),
        }
        delta = {name: (weight[start:stop] - base[name]).cpu() for name, start, stop in base.segments}
        return Concept(delta, {self.config.modifier_token: self.row.detach().cpu().clone()}, metadata)

    def checkpoint(self, path: Path) -> None:
        """Writes all that `restore` needs for the same bits as an unbroken run."""
        state = {
            "format": CHECKPOINT_FORMAT,
            "config": json.dumps(self.config.mathematics()),
            "base_hash": self.base.hash(),
            "pictures_hash": self.pictures_hash,
            "steps_done": self.steps_done,
            "weight": self.weight.detach(),
            "row": self.row.detach(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with data.replacing(path) as partial:
            torch.save(state, partial)

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint of the same configuration, base and pictures."""
        if not path.is_file():
            raise ValueError(
                f"resume: there is no checkpoint {str(path)!r}; start without resume, with checkpoint_every"
            )
        try:
            if part := zipfile.ZipFile(path).testzip():  # torch checks no sums
                raise ValueError(f"{part} has another checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            version = state.get("format")
        except Exception as error:  # of a damaged file torch raises nearly anything
            raise ValueError(
                f"resume: checkpoint {str(path)!r} is damaged ({error}); start without resume"
            ) from error
        if version != CHECKPOINT_FORMAT:
            raise ValueError(
                f"resume: checkpoint {str(path)!r} is of format {version}, and this version reads "
                f"{CHECKPOINT_FORMAT}; start without resume"
            )
        theirs, ours = json.loads(state["config"]), json.loads(json.dumps(self.config.mathematics()))
        if changed := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            raise ValueError(
                f"resume: checkpoint {str(path)!r} was made with other values of {', '.join(changed)}"
            )
        if state["base_hash"] != self.base.hash():
            raise ValueError(f"resume: checkpoint {str(path)!r} belongs to another base model")
        if state["pictures_hash"] != self.pictures_hash:
            raise ValueError(
                f"resume: checkpoint {str(path)!r} was made with other pictures or captions; "
                "put them back, or start without resume"
            )
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.row.copy_(state["row"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.steps_done = state["steps_done"]

    def _losses(self, latents: Tensor, context: Tensor, masks: Tensor | None = None) -> Tensor:
        """The weighted squared error (B,) of the UNet at random timesteps (paper, eq. 2), where the masks
        (B,1,h,w) are 1.
        """
        noise = torch.randn(latents.shape, generator=self.generator).to(latents)
        timesteps = self._choose(self.scheduler.config.num_train_timesteps, len(latents)).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        kv = ck.kv_project(context, self.weight, frozen_tokens=FROZEN_TOKENS)
        unet = self.pipeline.unet
        views = ck.KVStack(self.weight, self.base.segments).views(kv.to(unet.dtype))
        output = unet(
            noisy.to(unet.dtype),
            timesteps,
            encoder_hidden_states=context.to(unet.dtype),
            cross_attention_kwargs={"kv": views},
        ).sample.float()
        v = self.prediction == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if v else noise
        errors = F.mse_loss(output, target, reduction="none").mean(1, keepdim=True)
        if masks is None:
            masks = torch.ones_like(errors)
        losses = (errors * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)
        return losses if self.config.min_snr_gamma is None else losses * self._snr_weight(timesteps, v)

    def _snr_weight(self, timesteps: Tensor, v: bool) -> Tensor:
        """min(SNR, γ) on the error in x0, for a loss that is written in v or ε (Hang et al., 2023)."""
        alpha = self.scheduler.alphas_cumprod.to(self.device)[timesteps]
        snr = alpha / (1 - alpha)
        return snr.clamp(max=self.config.min_snr_gamma) / (snr + 1 if v else snr)

    def _choose_views(self, count: int) -> Tensor:
        """Of the concept's latents: whole pictures, and a share of ``config.resize`` of resized ones."""
        chosen, resized = self._choose(self.whole, count), len(self.sizes) - self.whole
        if not resized:
            return chosen
        other = self.whole + self._choose(resized, count)
        return torch.where(torch.rand(count, generator=self.generator) < self.config.resize, other, chosen)

    def _instance_context(self, views: Tensor, chosen: Tensor) -> Tensor:
        """Text features (B,S,E) of the chosen prompts, of the first with size words for a view that has them;
        each prompt runs through the text encoder once.
        """
        prompts = [
            self.sizes[view] + self.config.prompts[0] if self.sizes[view] else self.config.prompts[prompt]
            for view, prompt in zip(views.tolist(), chosen.tolist(), strict=True)
        ]
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        return encode_prompts(self.pipeline, distinct, self._rows).context[rows]

    @property
    def _rows(self) -> Rows:
        return {self.config.modifier_token: self.row}

    @torch.no_grad()
    def _contexts(self, texts: Sequence[str], rows: Rows) -> Tensor:
        chunks = [texts[i : i + TEXT_BATCH] for i in range(0, len(texts), TEXT_BATCH)]
        return torch.cat([encode_prompts(self.pipeline, chunk, rows).context for chunk in chunks])

    def _initial_row(self) -> Tensor:
        word, tokenizer = self.config.initializer_token, self.pipeline.tokenizer
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"initializer_token {word!r} is {len(ids)} tokens to this base; "
                "give a rare word that is one, as ktn or sks"
            )
        return self.pipeline.text_encoder.get_input_embeddings().weight[ids[0]].detach().float().clone()

    def _pixels(self, paths: list[Path]) -> Tensor:
        # each is cut to size as it is read: two hundred photos at full size are 10 GB
        return data.to_tensor([data.square(data.open_picture(path), self.resolution) for path in paths])

    def _choose(self, among: int, count: int) -> Tensor:
        return torch.randint(among, (count,), generator=self.generator)


@contextmanager
def frozen(pipeline: Any) -> Iterator[None]:
    """No gradient for the base's weights and no dropout in it within; every flag is put back."""
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    training = [(module, module.training) for model in models for module in model.modules()]
    gradients = [(weight, weight.requires_grad) for model in models for weight in model.parameters()]
    try:
        for model in models:
            model.requires_grad_(False).eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for weight, flag in gradients:
            weight.requires_grad_(flag)


def _usable_output(config: TrainConfig) -> Path:
    """``config.output``, where a file can be written; nothing is made yet."""
    output = Path(config.output)
    if output.is_dir():
        raise ValueError(
            f"output {str(output)!r} is a folder; name a file, as {str(output / 'concept.safetensors')!r}"
        )
    if output.exists() and not config.overwrite:
        raise FileExistsError(
            f"output {str(output)!r} exists; name another, or replace it with overwrite (--overwrite)"
        )
    there = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"output {str(output)!r} cannot be written ({error}); name another place") from error
    return output


def _hash(pixels: Tensor, prior: Tensor, captions: list[str]) -> str:
    """sha256 of all that is learned from."""
    digest = hashlib.sha256(json.dumps(captions).encode())
    for tensor in (pixels, prior):
        digest.update(tensor.flatten().numpy().data)
    return digest.hexdigest()


def _deterministic() -> Any:
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=torch.backends.cudnn.allow_tf32
    )
