"""Image and text alignment in CLIP space, as Custom Diffusion measures them (section 4, appendix C)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .base import without_bars
from .concept import split_words

BATCH = 32


class Clip:
    """A CLIP pair that scores pictures against pictures and prompts.

    Args:
        folder: a saved ``transformers.CLIPModel`` with its tokenizer and image processor.
        device: where it computes.
    """

    def __init__(self, folder: str, device: str = "cpu"):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        with without_bars():
            self.model = CLIPModel.from_pretrained(folder).float().eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.processor = CLIPImageProcessor.from_pretrained(folder)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, d) unit vectors of n pictures."""
        features = []
        for chunk in _chunks(images):
            pixels = self.processor(images=chunk, return_tensors="pt")["pixel_values"]
            features.append(_tensor(self.model.get_image_features(pixel_values=pixels.to(self.model.device))))
        return F.normalize(torch.cat(features), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(n, d) unit vectors of n prompts."""
        features = []
        for chunk in _chunks(prompts):
            tokens = self.tokenizer(chunk, padding="max_length", truncation=True, return_tensors="pt")
            tokens = tokens.to(self.model.device)
            features.append(_tensor(self.model.get_text_features(tokens.input_ids, tokens.attention_mask)))
        return F.normalize(torch.cat(features), dim=-1)

    def image_alignment(self, samples: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> float:
        """Mean cosine between every sample and every one of the concept's pictures."""
        return float((self.image_features(samples) @ self.image_features(pictures).T).mean())

    def text_alignment(
        self, samples: Sequence[Image.Image], prompts: Sequence[str], modifier_tokens: Iterable[str] = ()
    ) -> float:
        """Mean cosine between each sample and its own prompt, the modifier tokens taken out of it."""
        if len(samples) != len(prompts):
            raise ValueError(f"prompts must be one a sample: got {len(prompts)} for {len(samples)} samples")
        texts = self.text_features([without_modifiers(prompt, modifier_tokens) for prompt in prompts])
        return float((self.image_features(samples) * texts).sum(-1).mean())


def without_modifiers(prompt: str, modifier_tokens: Iterable[str]) -> str:
    """`prompt` without the modifier tokens: "photo of a <new1> dog" becomes "photo of a dog"."""
    kept = [piece for piece, is_word in split_words(prompt, list(modifier_tokens)) if not is_word]
    return " ".join(" ".join(kept).split())


def _chunks(items: Sequence[Any]) -> Iterable[list[Any]]:
    if not items:
        raise ValueError("nothing to score: got an empty list")
    return (list(items[i : i + BATCH]) for i in range(0, len(items), BATCH))


def _tensor(output: Any) -> Tensor:
    # transformers 4 returns the projected features themselves, 5 an output that holds them
    return output if isinstance(output, Tensor) else output.pooler_output
