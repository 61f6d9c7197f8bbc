"""The renderer: flat pictures of dogs, cats, cars and cups, antialiased by drawing four times larger.

A sprite is drawn in its own unit square (x right, y down), as three layers of one size: colour, silhouette
and the part of the silhouette that takes the texture.  Everything always faces the same way, so a picture
never holds two readings of one caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw

RGB = tuple[int, int, int]

OVERSAMPLE = 4
OUTLINE: RGB = (52, 44, 56)
INK: RGB = (34, 30, 38)
WHITE: RGB = (248, 248, 246)
GLASS: RGB = (196, 228, 240)


def _shade(colour: RGB, factor: float) -> RGB:
    return tuple(int(min(255, c * factor)) for c in colour)  # type: ignore[return-value]


class Sprite:
    """Colour, silhouette and textured area of one subject, drawn in unit coordinates."""

    def __init__(self, side: int):
        self.side = side
        self.colour = Image.new("RGB", (side, side))
        self.silhouette = Image.new("L", (side, side))
        self.skin = Image.new("L", (side, side))
        self._colour = ImageDraw.Draw(self.colour)
        self._silhouette = ImageDraw.Draw(self.silhouette)
        self._skin = ImageDraw.Draw(self.skin)

    def _draw(self, method: str, points: Sequence, fill: RGB, skin: bool, **options: int) -> None:
        getattr(self._colour, method)(points, fill=fill, **options)
        getattr(self._silhouette, method)(points, fill=255, **options)
        getattr(self._skin, method)(points, fill=255 if skin else 0, **options)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: RGB, skin: bool = False) -> None:
        n = self.side
        self._draw("ellipse", [x0 * n, y0 * n, x1 * n, y1 * n], fill, skin)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, fill: RGB, radius: float = 0.0, skin: bool = False
    ) -> None:
        n = self.side
        self._draw("rounded_rectangle", [x0 * n, y0 * n, x1 * n, y1 * n], fill, skin, radius=int(radius * n))

    def polygon(self, points: Sequence[tuple[float, float]], fill: RGB, skin: bool = False) -> None:
        n = self.side
        self._draw("polygon", [(x * n, y * n) for x, y in points], fill, skin)

    def line(
        self, points: Sequence[tuple[float, float]], width: float, fill: RGB, skin: bool = False
    ) -> None:
        n = self.side
        self._draw("line", [(x * n, y * n) for x, y in points], fill, skin, width=max(1, int(width * n)))
        for x, y in points:  # round joints and ends
            self.ellipse(x - width / 2, y - width / 2, x + width / 2, y + width / 2, fill, skin)

    def texture(self, name: str, fill: RGB) -> None:
        """Paint stripes, spots or a second half over the textured area."""
        if name == "plain":
            return
        n = self.side
        pattern = Image.new("L", (n, n))
        draw = ImageDraw.Draw(pattern)
        if name == "striped":
            for x in np.arange(0.02, 1.0, 0.19):
                draw.rectangle([x * n, 0, (x + 0.085) * n, n], fill=255)
        elif name == "spotted":
            for row, y in enumerate(np.arange(0.02, 1.0, 0.17)):
                for x in np.arange(0.02 + 0.1 * (row % 2), 1.0, 0.2):
                    draw.ellipse([x * n, y * n, (x + 0.115) * n, (y + 0.115) * n], fill=255)
        elif name == "bicolor":
            box = self.skin.getbbox()
            if box is not None:
                draw.rectangle([0, 0.45 * box[1] + 0.55 * box[3], n, n], fill=255)
        else:
            raise ValueError(f"texture must be plain, striped, spotted or bicolor, not {name!r}")
        self.colour.paste(fill, mask=ImageChops.multiply(pattern, self.skin))


def _hat(sprite: Sprite, x: float, y: float, width: float, colour: RGB) -> None:
    """A top hat whose brim is centred at (x, y)."""
    sprite.box(x - 0.32 * width, y - 0.72 * width, x + 0.32 * width, y, colour)
    sprite.box(x - 0.32 * width, y - 0.24 * width, x + 0.32 * width, y - 0.08 * width, INK)
    sprite.box(x - 0.55 * width, y - 0.08 * width, x + 0.55 * width, y + 0.08 * width, colour, 0.03)


def _dog(s: Sprite, primary: RGB, secondary: RGB, texture: str, accessory: str) -> None:
    ear = _shade(primary, 0.62)
    s.line([(0.13, 0.52), (0.06, 0.36), (0.08, 0.24)], 0.075, primary)  # tail, upright
    for x in (0.12, 0.25, 0.5, 0.62):
        s.box(x, 0.62, x + 0.115, 0.98, primary, 0.05, skin=True)
    s.box(0.1, 0.44, 0.74, 0.78, primary, 0.15, skin=True)
    s.polygon([(0.54, 0.5), (0.58, 0.3), (0.78, 0.38), (0.74, 0.66)], primary, skin=True)  # neck
    s.texture(texture, secondary)
    s.ellipse(0.5, 0.14, 0.84, 0.48, primary)  # head
    s.box(0.68, 0.27, 0.98, 0.46, primary, 0.08)  # snout
    s.ellipse(0.89, 0.25, 0.99, 0.35, INK)  # nose
    s.line([(0.8, 0.415), (0.93, 0.415)], 0.02, INK)
    s.box(0.5, 0.2, 0.63, 0.54, ear, 0.065)  # floppy ear
    s.ellipse(0.675, 0.2, 0.765, 0.29, WHITE)
    s.ellipse(0.705, 0.215, 0.765, 0.275, INK)
    if accessory == "hat":
        _hat(s, 0.665, 0.165, 0.32, secondary)
    elif accessory == "ribbon":
        s.polygon([(0.5, 0.53), (0.54, 0.45), (0.8, 0.5), (0.78, 0.585)], secondary)
        s.polygon([(0.66, 0.53), (0.76, 0.53), (0.8, 0.76), (0.66, 0.74)], secondary)


def _cat(s: Sprite, primary: RGB, secondary: RGB, texture: str, accessory: str) -> None:
    inner = (240, 176, 180)
    s.line([(0.62, 0.92), (0.84, 0.9), (0.92, 0.76), (0.87, 0.6), (0.93, 0.5)], 0.08, primary)  # curled tail
    s.ellipse(0.2, 0.48, 0.74, 1.04, primary, skin=True)
    s.box(0.2, 0.76, 0.74, 0.985, primary, 0.1, skin=True)
    s.texture(texture, secondary)
    for x in (0.3, 0.5):
        s.ellipse(x, 0.88, x + 0.15, 0.985, WHITE)
    for a, b, c in ((0.15, 0.17, 0.42), (0.79, 0.77, 0.52)):  # pointed ears
        s.polygon([(b, 0.02), (a, 0.36), (c, 0.2)], primary)
        s.polygon(
            [
                (b + (0.03 if b < 0.5 else -0.03), 0.09),
                (a + (0.04 if a < 0.5 else -0.04), 0.27),
                (c - (0.08 if c < 0.5 else -0.08), 0.2),
            ],
            inner,
        )
    s.ellipse(0.13, 0.14, 0.81, 0.62, primary)  # head
    for x in (0.27, 0.55):
        s.ellipse(x, 0.28, x + 0.12, 0.43, WHITE)
        s.ellipse(x + 0.035, 0.29, x + 0.09, 0.42, INK)
    s.polygon([(0.43, 0.44), (0.51, 0.44), (0.47, 0.49)], (230, 90, 110))
    for side in (-1, 1):  # whiskers
        for dy in (-0.04, 0.03):
            s.line([(0.47 + side * 0.13, 0.495 + dy / 3), (0.47 + side * 0.42, 0.49 + dy)], 0.016, INK)
    if accessory == "hat":
        _hat(s, 0.47, 0.17, 0.36, secondary)
    elif accessory == "ribbon":
        s.box(0.25, 0.575, 0.69, 0.67, secondary, 0.04)
        s.polygon([(0.47, 0.62), (0.33, 0.56), (0.33, 0.76)], secondary)
        s.polygon([(0.47, 0.62), (0.61, 0.56), (0.61, 0.76)], secondary)


def _car(s: Sprite, primary: RGB, secondary: RGB, texture: str, accessory: str) -> None:
    s.polygon([(0.2, 0.56), (0.3, 0.33), (0.66, 0.33), (0.8, 0.56)], primary)  # cabin
    s.box(0.02, 0.53, 0.98, 0.85, primary, 0.09, skin=True)
    s.texture(texture, secondary)
    s.polygon([(0.27, 0.54), (0.34, 0.38), (0.47, 0.38), (0.47, 0.54)], GLASS)
    s.polygon([(0.52, 0.54), (0.52, 0.38), (0.64, 0.38), (0.73, 0.54)], GLASS)
    s.ellipse(0.9, 0.58, 0.98, 0.67, (255, 240, 150))  # lamp
    s.box(0.0, 0.77, 1.0, 0.84, _shade(primary, 0.6), 0.03)  # sill
    for x in (0.13, 0.63):
        s.ellipse(x, 0.7, x + 0.26, 0.96, INK)
        s.ellipse(x + 0.07, 0.77, x + 0.19, 0.89, (205, 205, 210))
    if accessory == "hat":
        _hat(s, 0.48, 0.32, 0.4, secondary)
    elif accessory == "ribbon":
        s.polygon([(0.455, 0.335), (0.535, 0.335), (0.55, 0.77), (0.44, 0.77)], secondary)
        s.polygon([(0.495, 0.33), (0.34, 0.17), (0.34, 0.34)], secondary)
        s.polygon([(0.495, 0.33), (0.65, 0.17), (0.65, 0.34)], secondary)


def _cup(s: Sprite, primary: RGB, secondary: RGB, texture: str, accessory: str) -> None:
    s.ellipse(0.54, 0.36, 0.96, 0.8, primary)  # handle, whose hole is cut below
    hole = [0.64 * s.side, 0.46 * s.side, 0.86 * s.side, 0.7 * s.side]
    s._silhouette.ellipse(hole, fill=0)
    s.polygon([(0.08, 0.25), (0.72, 0.25), (0.65, 0.9), (0.15, 0.9)], primary, skin=True)
    s.ellipse(0.15, 0.83, 0.65, 0.97, primary, skin=True)
    s.texture(texture, secondary)
    s.ellipse(0.08, 0.15, 0.72, 0.36, _shade(primary, 0.66))  # rim and coffee
    s.ellipse(0.13, 0.18, 0.67, 0.345, (88, 52, 34))
    if accessory == "hat":
        _hat(s, 0.4, 0.24, 0.4, secondary)
    elif accessory == "ribbon":
        s.polygon([(0.108, 0.52), (0.692, 0.52), (0.675, 0.67), (0.126, 0.67)], secondary)
        s.polygon([(0.4, 0.595), (0.22, 0.46), (0.22, 0.74)], secondary)
        s.polygon([(0.4, 0.595), (0.58, 0.46), (0.58, 0.74)], secondary)


_DRAW = {"dog": _dog, "cat": _cat, "car": _car, "cup": _cup}


def draw_sprite(
    category: str, side: int, primary: RGB, secondary: RGB, texture: str, accessory: str
) -> Sprite:
    """The subject as a square sprite of ``side`` pixels."""
    sprite = Sprite(side)
    _DRAW[category](sprite, primary, secondary, texture, accessory)
    return sprite


def stamp(canvas: Image.Image, labels: Image.Image, sprite: Sprite, x: int, y: int, label: int) -> None:
    """Paste a sprite with its dark outline at (x, y) and write its label into the label map."""
    for k in range(8):
        dx, dy = round(3 * math.cos(k * math.pi / 4)), round(3 * math.sin(k * math.pi / 4))
        canvas.paste(OUTLINE, (x + dx, y + dy), sprite.silhouette)
    canvas.paste(sprite.colour, (x, y), sprite.silhouette)
    labels.paste(label, (x, y), sprite.silhouette)


def draw_background(name: str, size: int, shift: float) -> Image.Image:
    """One of five plain places; ``shift`` in -1..1 moves its details a little."""
    n = size
    image = Image.new("RGB", (n, n))
    draw = ImageDraw.Draw(image)

    def rect(x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        draw.rectangle([x0 * n, y0 * n, x1 * n, y1 * n], fill=fill)

    def disc(x: float, y: float, r: float, fill: RGB) -> None:
        draw.ellipse([(x - r) * n, (y - r) * n, (x + r) * n, (y + r) * n], fill=fill)

    dx = 0.03 * shift
    if name == "grass":
        rect(0, 0, 1, 0.5, (188, 226, 246))
        disc(0.2 + dx, 0.5, 0.26, (152, 206, 128))
        disc(0.85 + dx, 0.54, 0.3, (152, 206, 128))
        rect(0, 0.5, 1, 1, (136, 196, 104))
    elif name == "beach":
        rect(0, 0, 1, 0.34, (250, 226, 200))
        disc(0.82 + dx, 0.15, 0.1, (255, 196, 110))
        rect(0, 0.34, 1, 0.56, (96, 190, 206))
        rect(0, 0.56, 1, 1, (242, 218, 160))
    elif name == "street":
        rect(0, 0, 1, 0.6, (206, 208, 214))
        for k, top in enumerate((0.22, 0.08, 0.3, 0.14)):
            x = -0.08 + 0.3 * k + dx
            rect(x, top, x + 0.24, 0.6, (164, 160, 172))
            rect(x + 0.05, top + 0.07, x + 0.1, top + 0.15, (232, 224, 176))
            rect(x + 0.14, top + 0.07, x + 0.19, top + 0.15, (232, 224, 176))
        rect(0, 0.6, 1, 1, (118, 118, 126))
        for k in range(4):
            rect(0.3 * k + dx, 0.9, 0.3 * k + 0.16 + dx, 0.935, (240, 240, 240))
    elif name == "snow":
        rect(0, 0, 1, 0.55, (176, 196, 224))
        for x in (0.1 + dx, 0.88 + dx):
            for top, half in ((0.14, 0.1), (0.26, 0.14)):
                draw.polygon(
                    [
                        (x * n, top * n),
                        ((x - half) * n, (top + 0.24) * n),
                        ((x + half) * n, (top + 0.24) * n),
                    ],
                    fill=(86, 132, 124),
                )
        rect(0, 0.5, 1, 1, (240, 244, 252))
    elif name == "room":
        rect(0, 0, 1, 0.64, (246, 222, 214))
        rect(0.36 + dx, 0.06, 0.68 + dx, 0.36, (255, 252, 246))
        rect(0.39 + dx, 0.09, 0.51 + dx, 0.33, (180, 218, 240))
        rect(0.53 + dx, 0.09, 0.65 + dx, 0.33, (180, 218, 240))
        rect(0, 0.64, 1, 1, (204, 160, 122))
        rect(0, 0.63, 1, 0.66, (255, 250, 244))
    else:
        raise ValueError(f"background must be grass, beach, street, snow or room, not {name!r}")
    return image
