"""Stable Diffusion pipelines of random weights, for tests that need their shape and not their pictures."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import customdiff_kernels as ck
from customdiff.concept import Concept, base_metadata, text_encoders

WORDS = "photo of a red blue dog cat car cup on the grass beach and with hat two ktn pll ucd sks".split()
LENGTH = 16


def tokenizer(folder: Path, **options) -> CLIPTokenizer:
    """Byte-pair encoding in which each of WORDS is one token; any other text falls into characters."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair, pieces = (pieces[0], pieces[1]), ["".join(pieces[:2]), *pieces[2:]]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(pieces[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
    )
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=LENGTH, **options)


def text_config(words: CLIPTokenizer, width: int, **options) -> CLIPTextConfig:
    given = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, **options}
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        **given,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def build(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Writes the pipeline into `folder`, and returns it."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer(folder)
    text_encoder, auto_encoder = CLIPTextModel(text_config(words, 32)), vae()
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=auto_encoder,
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type=prediction_type, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def build_xl(folder: Path) -> Path:
    """The same of SDXL's shape: two text encoders of their own widths, text and sizes added to the time."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer(folder)
    # as published: the second tokenizer pads with "!", and the second encoder is told that texts end with 2
    second = CLIPTextModelWithProjection(text_config(words, 48, projection_dim=40, eos_token_id=2))
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 40,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(words, 32)),
        text_encoder_2=second,
        tokenizer=words,
        tokenizer_2=tokenizer(folder, pad_token="!"),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    pipeline.save_pretrained(folder)
    return folder


def concept(pipe, seed: int, *words: str, low_rank: bool = False) -> Concept:
    """Random changes of a tenth, and random rows for the modifier tokens `words` (default: <new1>)."""
    stack, g = ck.KVStack.from_unet(pipe.unet), torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(shape, generator=g)

    if low_rank:
        factors = {n: (matrix(w.shape[0], 2), 0.1 * matrix(2, w.shape[1])) for n, w in stack.items()}
        delta = ck.LowRankDelta(stack.segments, factors)
    else:
        delta = {name: 0.1 * matrix(*w.shape) for name, w in stack.items()}
    widths = [encoder.get_input_embeddings().weight.shape[1] for _, encoder in text_encoders(pipe)]
    rows = {word: tuple(matrix(width) for width in widths) for word in words or ["<new1>"]}
    rows = {word: row if len(row) > 1 else row[0] for word, row in rows.items()}
    return Concept(delta, rows, base_metadata(stack))


def pictures(folder: Path, count, seed, caption=None, size=(40, 52)):
    """Writes random pictures of a size, perhaps with a caption beside each; returns the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        image.save(folder / f"{i}.{'jpg' if i == 0 else 'png'}")
        if caption:
            (folder / f"{i}.txt").write_text(caption)
    return str(folder)
