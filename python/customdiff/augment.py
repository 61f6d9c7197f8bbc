"""A few pictures made into many: moved, mirrored, at other sizes (Custom Diffusion, appendix D), and two
side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGER = (1.2, 1.4)  # of the side, for one resized picture in three; the others are made smaller
SMALL = 0.6  # and below it the words say so
BESIDE = 0.7  # of the side, for each of two pictures that share one
SMALL_WORDS, LARGE_WORDS = ("far away", "very small"), ("zoomed in", "close up")


class Resized(NamedTuple):
    """Pictures (n,3,H,H); masks (n,1,H,H), 1 where there is picture; the words for each one's size, or ""."""

    pictures: Tensor
    masks: Tensor
    words: list[str]


def shifted(pixels: Tensor, copies: int, share: float, generator: torch.Generator) -> Tensor:
    """`pixels` (n,3,H,W) first, and then `copies` - 1 of each moved by up to `share` of the side, edges
    repeated; nothing more where that is not a pixel.
    """
    reach = round(share * pixels.shape[-1])
    if reach == 0:
        return pixels
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    made = [pixels]
    for _ in range(copies - 1):
        offsets = torch.randint(0, 2 * reach + 1, (len(pixels), 2), generator=generator).tolist()
        windows = zip(padded, offsets, strict=True)
        made.append(torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in windows]))
    return torch.cat(made)


def resized(pixels: Tensor, copies: int, smallest: float, generator: torch.Generator) -> Resized:
    """`copies` of each of `pixels` (n,3,H,H) at other sizes: one in three enlarged and cut anywhere, the
    others made smaller, down to `smallest` of the side, anywhere on a canvas of zeros.
    """
    side = pixels.shape[-1]
    pictures, masks, words = [], [], []
    for image in pixels.repeat(copies, 1, 1, 1).split(1):
        draw = torch.rand(5, generator=generator).tolist()
        low, high = (smallest, 1.0) if draw[0] < 2 / 3 else LARGER
        scale = low + draw[1] * (high - low)
        new = max(1, round(scale * side))
        scaled = F.interpolate(image, (new, new), mode="bicubic", antialias=True).clamp(-1, 1)
        y, x = (round(place * abs(new - side)) for place in draw[2:4])
        picture, mask = torch.zeros_like(image), torch.zeros_like(image[:, :1])
        if new <= side:
            picture[..., y : y + new, x : x + new] = scaled
            mask[..., y : y + new, x : x + new] = 1
        else:
            picture, mask = scaled[..., y : y + side, x : x + side], mask + 1
        pictures.append(picture)
        masks.append(mask)
        choice = SMALL_WORDS if scale < SMALL else LARGE_WORDS if scale > 1 else ("",)
        words.append(choice[int(draw[4] * len(choice))])
    return Resized(torch.cat(pictures), torch.cat(masks), words)


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Each of `left` and `right` (n,3,H,H) made smaller, its middle cut to half the width, at the bottom, its
    upper edge repeated above.
    """
    side = left.shape[-1]
    new, half = round(BESIDE * side), side // 2
    parts = []
    for pixels, width in ((left, half), (right, side - half)):
        scaled = F.interpolate(pixels, (new, new), mode="bicubic", antialias=True).clamp(-1, 1)
        start = (new - width) // 2
        parts.append(F.pad(scaled[..., start : start + width], (0, 0, side - new, 0), mode="replicate"))
    return torch.cat(parts, -1)


def flipped(pixels: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`pixels` (n,3,H,W) and `masks` (n,1,H,W), each pair mirrored or not by a fair draw."""
    chosen = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    return tuple(torch.where(chosen, part.flip(-1), part) for part in (pixels, masks))


def sized(prompt: str, words: str, place: str) -> str:
    """`prompt` with the words of size `place`d "after" it, or "before" one that begins with "photo of"."""
    if not words:
        return prompt
    if place == "after":
        return f"{prompt}, {words}"
    article = "a " if words == SMALL_WORDS[0] else ""
    return f"{article}{words} {prompt}"
