"""Contact sheets: rows of pictures with a label above each row."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Row = tuple[str, Sequence[Image.Image]]
INK, PAPER, GAP, LINE = (30, 30, 30), (255, 255, 255), 6, 20


def contact_sheet(rows: Sequence[Row], *, side: int = 128, title: str = "") -> Image.Image:
    """One picture of all `rows`, each (label, its pictures); every picture is drawn `side` pixels wide."""
    if not rows or not any(pictures for _, pictures in rows):
        raise ValueError("rows must hold at least one picture")
    font = ImageFont.load_default(size=13)
    longest = max(font.getlength(text) for text in [title, *(label for label, _ in rows)])
    columns = max(len(pictures) for _, pictures in rows)
    width = max(columns * (side + GAP), round(longest) + GAP) + GAP
    top = LINE + GAP if title else GAP
    sheet = Image.new("RGB", (width, top + len(rows) * (LINE + side + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, INK, font)
    for i, (label, pictures) in enumerate(rows):
        y = top + i * (LINE + side + GAP)
        draw.text((GAP, y), label, INK, font)
        for j, picture in enumerate(pictures):
            # small pictures are enlarged pixel by pixel: nothing is drawn that the model did not
            method = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            height = min(side, round(side * picture.height / picture.width))
            sheet.paste(picture.resize((side, height), method), (GAP + j * (side + GAP), y + LINE))
    return sheet
