"""The attention of a live UNet: by the kernels, its probabilities recorded by word, or changed on their way.

The fused kernels never build the probabilities P = softmax(QKᵀ·scale + bias). Under ``steered`` they are
built plainly, but only in the layers and steps that a ``Control`` asks for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import customdiff_kernels as ck
from customdiff_kernels.diffusers import attentions, processor_for

from .concept import Rows, tokenize


def patched(unet: torch.nn.Module) -> AbstractContextManager[list[str]]:
    """``ck.patched`` of cross-attention; on a CPU, where the kernels are the faster there too, of all."""
    return ck.patched(unet, self_attention=unet.device.type == "cpu")


class Layer(NamedTuple):
    """One attention of the UNet, in one call: its module's name, what it attends to, and its N pixels."""

    name: str
    cross: bool
    pixels: int


class Control(Protocol):
    """Sees the probabilities of the layers that it wants."""

    def wants(self, layer: Layer) -> bool: ...

    def __call__(self, probabilities: Tensor, layer: Layer) -> Tensor:
        """What the values are multiplied with in the place of ``probabilities`` (B,H,N,S), float32."""
        ...


@contextmanager
def steered(unet: torch.nn.Module, *controls: Control) -> Iterator[None]:
    """For the length of a ``with`` block, ``controls`` see the attention of ``unet``, one after the other.

    For UNets of SD 1.x, 2.x and SDXL, patched by ``ck.patch_unet`` or not: cross-attention (attn2) and
    self-attention (attn1). In a layer that no control wants, the fused kernels run as ever. Blocks may stand
    in one another: the outer controls see what the inner ones made. Afterwards every module has the very
    processor that it had before.

    Raises ValueError if a processor does more than softmax attention.
    """
    with patched(unet):
        modules = {
            name: attn for name, attn in attentions(unet).items() if name.endswith((".attn1", ".attn2"))
        }
        before = {name: attn.processor for name, attn in modules.items()}
        ours = {name: copy.copy(processor_for(name, attn)) for name, attn in modules.items()}
        for name, processor in ours.items():
            outer = processor.attention.controls if isinstance(processor.attention, _Attention) else ()
            processor.attention = _Attention((*controls, *outer), name, modules[name].is_cross_attention)
        try:
            for name, attn in modules.items():
                attn.set_processor(ours[name])
            yield
        finally:
            for name, attn in modules.items():
                attn.set_processor(before[name])


class _Attention(NamedTuple):
    """Takes the place of ``ck.cross_attention``, and of self-attention."""

    controls: tuple[Control, ...]
    name: str
    cross: bool

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Any = None, scale: float | None = None
    ) -> Tensor:
        layer = Layer(self.name, self.cross, query.shape[2])
        wanting = [control for control in self.controls if control.wants(layer)]
        if not wanting and self.cross:
            return ck.cross_attention(query, key, value, bias=bias, scale=scale)
        bias = bias.dense() if isinstance(bias, ck.LayoutBias) else bias
        if not wanting:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        probabilities = attention_probabilities(query, key, bias, scale)
        for control in wanting:
            probabilities = control(probabilities, layer)
        return (probabilities @ value.to(probabilities.dtype)).to(query.dtype)


def attention_probabilities(
    query: Tensor, key: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(QKᵀ·scale + bias) (B,H,N,S) of query (B,H,N,D) and key (B,H,S,D), at least in float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.to(dtype) @ key.to(dtype).mT * scale
    return (scores if bias is None else scores + bias).softmax(dim=-1)


class Recorder:
    """A control that averages cross-attention over heads, layers and steps, and changes nothing.

    Args:
        rows: how many rows of the batch to keep, from its end: under classifier-free guidance the
            unconditional ones come first.
        most_pixels: layers of more are left out.
    """

    def __init__(self, rows: int, most_pixels: int | None = None):
        self.rows, self.most_pixels = rows, most_pixels
        self.sums: dict[int, Tensor] = {}  # by pixels N: (rows,N,S)
        self.counts: dict[int, int] = {}

    def wants(self, layer: Layer) -> bool:
        return layer.cross and (self.most_pixels is None or layer.pixels <= self.most_pixels)

    def __call__(self, probabilities: Tensor, layer: Layer) -> Tensor:
        seen = probabilities[-self.rows :].mean(dim=1)
        self.sums[layer.pixels] = self.sums[layer.pixels] + seen if layer.pixels in self.sums else seen
        self.counts[layer.pixels] = self.counts.get(layer.pixels, 0) + 1
        return probabilities

    def maps(self, size: tuple[int, int], pixels: int | None = None) -> Tensor:
        """The average (rows,S,h,w) for latents of ``size`` (h,w); every pixel's sum over S is 1.

        Smaller layers are enlarged bilinearly. ``pixels``: the layers of this N alone.
        """
        chosen = [n for n in self.sums if pixels in (None, n)]
        if not chosen:
            raise ValueError(f"pixels={pixels}: nothing was recorded there, but at {sorted(self.sums)}")
        total: Any = 0
        for n in chosen:
            grid = self.sums[n].mT.unflatten(-1, level_size(n, size))
            total = total + F.interpolate(grid, size, mode="bilinear", align_corners=False)
        return total / sum(self.counts[n] for n in chosen)


def level_size(pixels: int, size: tuple[int, int]) -> tuple[int, int]:
    """(h,w) of the level of a UNet that has so many pixels, where its input has ``size``."""
    height, width = size
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != pixels:
        raise ValueError(f"size must be (height, width) of the latents, got {size}: a layer has {pixels}")
    return height, width


class Word(NamedTuple):
    """A word of a prompt, and the positions of its tokens in the context."""

    text: str
    positions: tuple[int, ...]


def prompt_words(tokenizer: Any, prompt: str, modifiers: Rows | Sequence[str] = ()) -> list[Word]:
    """The words of ``prompt`` as the CLIP tokenizer reads them; a modifier token is one."""
    ids, places = tokenize(tokenizer, [prompt], [list(modifiers)])
    named = {position: word for _, position, word in places}
    row, words, text, start = ids[0].tolist(), [], "", 1
    end = row.index(tokenizer.eos_token_id)
    for position, piece in enumerate(tokenizer.convert_ids_to_tokens(row[:end])):
        if position == 0:
            continue
        text += named.get(position, piece.removesuffix("</w>"))
        if position in named or piece.endswith("</w>") or position == end - 1:
            words.append(Word(text, tuple(range(start, position + 1))))
            text, start = "", position + 1
    return words


def word_positions(words: Sequence[Word], text: str) -> list[int]:
    """The positions of the tokens of every word that is ``text``; none where there is no such word."""
    return [p for word in words if word.text in (text, text.lower()) for p in word.positions]
