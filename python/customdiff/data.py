"""Pictures and captions on disk, and the latents made of them once."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
SHIFTED_COPIES = 4
RESIZED_COPIES = 12
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow may raise
SMALLER, LARGER = (1 / 3, 1.0), (1.2, 1.4)  # of the side; two pictures of three are made smaller
SMALL = 0.6  # and below it the words say so
SMALL_WORDS, LARGE_WORDS = ("a far away ", "very small "), ("zoomed in ", "close up ")


class Latents(NamedTuple):
    """Posterior of the autoencoder for n pictures, unscaled: mean and std, both (n, c, h, w)."""

    mean: Tensor
    std: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """One sample for each row of `index`; the noise is drawn on the CPU, so alike on every device."""
        noise = torch.randn(index.shape + self.mean.shape[1:], generator=generator)
        index = index.to(self.mean.device)
        return self.mean[index] + self.std[index] * noise.to(self.mean)


def open_picture(path: Path) -> Image.Image:
    """An upright RGB picture, as `upright_rgb`; raises ValueError where it cannot be read."""
    with _readable(path), Image.open(path) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """`image` upright and in RGB; transparency is laid over white, 16 bits are scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def square(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square of `image`, resized to `resolution`."""
    side = min(image.size)
    if image.size == (resolution, resolution):
        return image
    left, top = (image.width - side) // 2, (image.height - side) // 2
    centre = image.crop((left, top, left + side, top + side))
    return centre.resize((resolution, resolution), Image.Resampling.LANCZOS)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """(n, 3, H, W) float32 in -1..1 of n RGB pictures of one size."""
    array = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return array.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def read_pictures(folder: str | Path) -> list[Image.Image]:
    """Every picture of `folder`, in the order of their names; raises as `picture_paths`."""
    return [open_picture(path) for path in picture_paths(folder)]


def picture_paths(folder: str | Path) -> list[Path]:
    """The pictures of `folder`, in the order of their names: looked into, but not yet decoded.

    Raises:
        ValueError: if the folder is missing, holds no picture, or holds one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"picture folder {str(folder)!r} is not a folder; give one that holds PNG or JPEG files"
        )
    names = sorted(path.name for path in folder.iterdir())
    paths = [folder / name for name in names if name.lower().endswith(SUFFIXES)]
    if not paths:
        found = f"{len(names)} other entries, as {', '.join(names[:5])}" if names else "nothing at all"
        raise ValueError(f"picture folder {str(folder)!r} holds no PNG or JPEG picture, but {found}")
    for path in paths:
        with _readable(path), Image.open(path) as image:
            image.verify()
    return paths


def read_captioned(folder: str | Path) -> tuple[list[Path], list[str]]:
    """The pictures of `folder`, as `picture_paths`, and their captions.

    A caption stands in a .txt file beside its picture, or in captions.csv (columns file, caption) or
    captions.jsonl (keys "file" and "caption"; the names "file_name" and "text" are understood too).

    Raises:
        ValueError: if a picture has no caption, or as in `picture_paths`.
    """
    folder = Path(folder)
    paths = picture_paths(folder)
    table = caption_table(folder)
    captions = []
    for path in paths:
        beside = path.with_suffix(".txt")
        caption = read_text(beside).strip() if beside.is_file() else table.get(path.name, "")
        if not caption:
            raise ValueError(
                f"picture {path.name!r} in {str(folder)!r} has no caption; write it into {beside.name!r}, "
                "or into captions.csv (columns file, caption) in the same folder"
            )
        captions.append(caption)
    return paths, captions


def read_captions(path: str | Path) -> list[str]:
    """Captions of a .txt file (one a line), of a .csv or .jsonl file, or of a captioned folder."""
    path = Path(path)
    if path.is_dir():
        return read_captioned(path)[1]
    if not path.is_file():
        raise ValueError(f"captions {str(path)!r} is neither a file nor a folder")
    if path.suffix in (".csv", ".jsonl"):
        captions = [caption for _, caption in _caption_rows(path)]
    else:
        captions = [line.strip() for line in read_text(path).splitlines()]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise ValueError(f"captions file {str(path)!r} holds no caption; write one a line")
    return captions


def shifted(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`pixels` (n, 3, H, W), and copies of them moved by up to `share` of the side, edges repeated."""
    reach = round(share * pixels.shape[-1])
    if reach == 0:
        return pixels
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    copies = [pixels]
    for _ in range(SHIFTED_COPIES - 1):
        offsets = torch.randint(0, 2 * reach + 1, (len(pixels), 2), generator=generator).tolist()
        copies.append(
            torch.stack(
                [
                    image[:, y : y + height, x : x + width]
                    for image, (y, x) in zip(padded, offsets, strict=True)
                ]
            )
        )
    return torch.cat(copies)


def resized(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """Copies of `pixels` (n, 3, H, H) at other sizes, as Custom Diffusion's appendix D makes them.

    Returns:
        RESIZED_COPIES · n pictures: smaller ones anywhere on a canvas of zeros, larger ones cut anywhere;
        their masks (RESIZED_COPIES · n, 1, H, H), 1 where there is picture; and for each the words before
        "photo of" that tell its size, or "".
    """
    side = pixels.shape[-1]
    pictures, masks, words = [], [], []
    for image in pixels.repeat(RESIZED_COPIES, 1, 1, 1).split(1):
        draw = torch.rand(5, generator=generator).tolist()
        low, high = SMALLER if draw[0] < 2 / 3 else LARGER
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
    return torch.cat(pictures), torch.cat(masks), words


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, batch_size: int = 8) -> Latents:
    """The autoencoder's posterior of `pixels` (n, 3, H, W), computed once and kept."""
    parameter = next(vae.parameters())
    means, stds = [], []
    for chunk in pixels.split(batch_size):
        posterior = vae.encode(chunk.to(parameter)).latent_dist
        means.append(posterior.mean.float())
        stds.append(posterior.std.float())
    return Latents(torch.cat(means), torch.cat(stds))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it takes the place of `path` when the block ends well, and goes when
    it does not. What a killed process left there, the next one overwrites.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(
            f"{path.name!r} in {str(path.parent)!r} is not a readable picture ({error}); mend or remove it"
        ) from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark; else ValueError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error}); save it as such") from error


def caption_table(folder: Path) -> dict[str, str]:
    """{file name: caption} of the first of CAPTION_FILES in `folder`; empty where there is none."""
    for name in CAPTION_FILES:
        if (folder / name).is_file():
            return dict(_caption_rows(folder / name))
    return {}


def _caption_rows(path: Path) -> list[tuple[str, str]]:
    """(file name or "", caption) of each row of a .csv or .jsonl file."""
    pairs = []
    for line, row in _rows(path):
        caption = row.get("caption", row.get("text")) if isinstance(row, dict) else None
        if not isinstance(caption, str):
            raise ValueError(f'line {line} of {str(path)!r} has no text as its "caption": {row!r:.80}')
        pairs.append((row.get("file", row.get("file_name", "")), caption.strip()))
    return pairs


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a .csv or .jsonl file."""
    text = read_text(path)
    if path.suffix == ".csv":
        table = csv.DictReader(io.StringIO(text))
        for row in table:
            yield table.line_num, row
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {str(path)!r} is not JSON: {error}") from error
