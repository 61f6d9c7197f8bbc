"""Layouts as pictures: colour maps and masks read as regions, and regions drawn over a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from .data import open_picture, readable, upright_rgb

if TYPE_CHECKING:
    from .layouts import Layout

Colour = tuple[int, int, int]
BACKGROUND = ((255, 255, 255), (0, 0, 0))
TOLERANCE = 16  # of 255: what resizing and lossy compression move a colour by
OVERSHOOT = 0.125  # of the step at an edge: how far sharp resizing filters ring beyond it
INKS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")  # Okabe and Ito's
SIDE = 512  # pictures are enlarged to it before names are written on them


def colour(value: str | Iterable[int]) -> Colour:
    """Of "255,192,0" as in the published legend, (255, 192, 0), "#ffc000" or "orange"; else ValueError."""
    try:
        if isinstance(value, str) and "," not in value:
            parts = ImageColor.getrgb(value)[:3]
        else:
            parts = tuple(int(x) for x in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError, OverflowError):
        parts = ()
    if len(parts) != 3 or not all(0 <= x <= 255 for x in parts):
        raise ValueError(f'colour {value!r} must be "red,green,blue" of 0 to 255, or as "#ffc000"')
    return parts


def colour_map(
    image: Image.Image,
    legend: Mapping[str | Colour, str],
    background: Sequence[str | Colour] | str | None = None,
) -> dict[str, Tensor]:
    """Masks ``{subject: (height, width)}`` float32 in 0..1 of a picture that paints regions in colours.

    Args:
        image: of any mode and size; what is transparent counts as background.
        legend: ``{colour: subject}``, a colour as in ``colour``.
        background: the colours of no region; default: white and black, unless the legend has them.

    Colours within 16 of 255 of one that is known count as it. At an edge, a pixel mixed of the two colours
    that meet there belongs to each with its share: an anti-aliased map has the area of the shape it shows.

    Raises ValueError naming the subject whose colour is missing, or the colours that are in no legend.
    """
    subjects = _subjects(legend)
    if background is None:
        plain = [c for c in BACKGROUND if c not in subjects]
    else:
        plain = [colour(c) for c in (background if isinstance(background, (list, tuple)) else [background])]
    for both in set(plain) & set(subjects):
        raise ValueError(
            f"subject {subjects[both]!r}: its colour {_text(both)} is declared as background too"
        )
    known = [*subjects, *plain]
    pixels = np.asarray(upright_rgb(image, plain[0] if plain else "white"))
    shares, stray = _shares(pixels, np.array(known, np.float32))
    found = {name: torch.from_numpy(share) for name, share in zip(subjects.values(), shares, strict=False)}
    if len(stray):
        raise ValueError(_stray_colours(stray, known, subjects))
    for (value, name), mask in zip(subjects.items(), found.values(), strict=True):
        if not mask.any():
            present = sorted({_text(c) for c, share in zip(known, shares, strict=True) if share.any()})
            raise ValueError(
                f"subject {name!r}: no pixel of the layout has its colour {_text(value)}, there are "
                f"{'; '.join(present)}; paint its region in that colour, or change the legend"
            )
    return found


def read_colour_map(
    path: Path, legend: Mapping[str | Colour, str], background: Sequence[str | Colour] | str | None = None
) -> dict[str, Tensor]:
    """`colour_map` of a file."""
    with readable(path), Image.open(path) as image:
        image.load()
    return colour_map(image, legend, background)


def read_mask(path: Path) -> Tensor:
    """(height, width) float32 in 0..1 of a picture: white is inside; black or transparent is outside."""
    return torch.from_numpy(np.asarray(open_picture(path, paper="black").convert("L"), np.float32) / 255)


def drawn(picture: Image.Image, layout: Layout) -> Image.Image:
    """A copy of `picture` with the outline and the name of every region; a small one is enlarged first."""
    factor = max(1, -(-SIDE // min(picture.size)))
    size = picture.width * factor, picture.height * factor
    canvas = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
    line = max(2, min(size) // 170)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=max(16, min(size) // 24))
    written: list[tuple[float, float, float, float]] = []
    for i, (name, region) in enumerate(layout.regions.items()):
        ink = INKS[i % len(INKS)]
        if isinstance(region, Tensor):
            x, y = _outline(canvas, region, ink, line)
        else:
            x0, y0, x1, y1 = (side * part for side, part in zip(size * 2, region, strict=True))
            draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=ink, width=line)
            x, y = x0, y0
        _write(draw, font, name, (x, y), ink, size, written)
    return canvas


def _subjects(legend: Mapping[str | Colour, str]) -> dict[Colour, str]:
    if not legend:
        raise ValueError("the legend is empty; give each colour its subject, as {'255,0,0': 'dog'}")
    found: dict[Colour, str] = {}
    for key, name in legend.items():
        value = colour(key)
        if value in found:
            raise ValueError(
                f"colour {_text(value)} is of {found[value]!r} and of {name!r}; give each its own"
            )
        if name in found.values():
            raise ValueError(
                f"subject {name!r} is in the legend twice; paint it in one colour, or name the second "
                f"of the prompt {name + '#2'!r}"
            )
        found[value] = name
    return found


def _shares(pixels: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each `known` colour (K,3) its share in every pixel (K,h,w); and the colours (n,3) of no such mix."""
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    unique, where = np.unique(packed, return_inverse=True)
    palette = np.stack([unique >> 16, unique >> 8 & 255, unique & 255], -1).astype(np.float32)
    away = np.stack([np.abs(palette - one).max(-1) for one in known])  # (K, colours)
    label = np.where(away.min(0) <= TOLERANCE, away.argmin(0), -1)[where].reshape(packed.shape)
    shares = (label == np.arange(len(known))[:, None, None]).astype(np.float32)
    ys, xs = np.nonzero(label < 0)
    if not len(ys):
        return shares, np.empty((0, 3), np.uint8)
    reach = max(3, max(label.shape) // 32)  # how wide an edge may be: more where the map was enlarged
    near = np.stack([_near(label == k, ys, xs, reach) for k in range(len(known))])
    mixed = pixels[ys, xs].astype(np.float32)
    best = np.full(len(ys), TOLERANCE, np.float32)  # off the line between two colours, the least so far
    mix = np.zeros((len(known), len(ys)), np.float32)
    for a, b in itertools.combinations(range(len(known)), 2):
        step = known[b] - known[a]
        part = (mixed - known[a]) @ step / (step @ step)
        off = np.abs(mixed - known[a] - part[:, None] * step).max(-1)
        held = near[a] & near[b] & (np.abs(part - 0.5) <= 0.5 + OVERSHOOT) & (off <= best)
        best[held] = off[held]
        mix[:, held] = 0
        mix[b, held] = part[held].clip(0, 1)
        mix[a, held] = 1 - mix[b, held]
    # where three colours meet, each has a little: the nearest of those there takes the pixel
    corner = (mix.sum(0) == 0) & (near.sum(0) >= 3)
    distance = np.where(near, np.abs(mixed - known[:, None]).max(-1), np.inf)
    mix[distance.argmin(0)[corner], corner.nonzero()[0]] = 1
    shares[:, ys, xs] = mix
    return shares, pixels[ys, xs][mix.sum(0) == 0]


def _near(mask: np.ndarray, ys: np.ndarray, xs: np.ndarray, reach: int) -> np.ndarray:
    """Whether `mask` (h,w) holds anywhere in the square of `reach` about each of the pixels."""
    sums = np.pad(mask.astype(np.int32), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    (top, bottom), (left, right) = (
        ((i - reach).clip(0), (i + reach + 1).clip(max=n)) for i, n in zip((ys, xs), mask.shape, strict=True)
    )
    return sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left] > 0


def _stray_colours(stray: np.ndarray, known: list[Colour], subjects: Mapping[Colour, str]) -> str:
    colours, counts = np.unique(stray, axis=0, return_counts=True)
    lines = []
    for i in counts.argsort()[::-1][:4]:
        one = tuple(int(x) for x in colours[i])
        near = min(known, key=lambda c: sum((x - y) ** 2 for x, y in zip(c, one, strict=True)))
        owner = f"of {subjects[near]!r}" if near in subjects else "the background"
        lines.append(f"{_text(one)} ({counts[i]} pixels; nearest is {_text(near)}, {owner})")
    more = f", and {len(colours) - 4} more" if len(colours) > 4 else ""
    lossy = "; if it was saved as JPEG, save it as PNG" if len(colours) > 100 else ""
    return (
        f"the layout has colours that are not in the legend: {', '.join(lines)}{more}; paint them in a "
        f"colour of the legend, or add them to the legend or the background{lossy}"
    )


def _text(value: Iterable[int]) -> str:
    return ",".join(map(str, value))


def _outline(canvas: Image.Image, mask: Tensor, ink: str, line: int) -> tuple[float, float]:
    """Paints the inner edge of a mask; returns where its topmost row begins."""
    area = mask.detach().to("cpu", torch.float32)[None, None]
    area = F.interpolate(area, canvas.size[::-1], mode="area")
    inside = (area >= min(0.5, float(area.max()))).float()
    rim = F.pad(1 - inside, (line,) * 4, value=1)  # the picture's own border closes a region too
    thick = 2 * line + 1
    edge = (inside * F.max_pool2d(F.max_pool2d(rim, (thick, 1), 1), (1, thick), 1))[0, 0]
    canvas.paste(ink, (0, 0), Image.fromarray((edge * 255).byte().numpy()))
    y, x = inside[0, 0].nonzero()[0].tolist()
    return x, y


def _write(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    name: str,
    at: tuple[float, float],
    ink: str,
    size: tuple[int, int],
    written: list[tuple[float, float, float, float]],
) -> None:
    """A name on a plate of its colour, within the picture and clear of the names `written` before."""
    left, top, right, bottom = draw.textbbox((0, 0), name, font=font)
    width, height = right - left + 8, bottom - top + 8
    x = max(0, min(at[0], size[0] - width))
    room = max(1, size[1] - height)
    for k in range(int(room / height) + 1):
        y = (min(at[1], room - 1) + k * height) % room
        if not any(x < x1 and x0 < x + width and y < y1 and y0 < y + height for x0, y0, x1, y1 in written):
            break
    draw.rectangle((x, y, x + width, y + height), fill=ink)
    draw.text((x + 4 - left, y + 4 - top), name, fill="black", font=font)
    written.append((x, y, x + width, y + height))
