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
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PUBLISHED_LISTS = ("images.txt", "caption.txt")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow may raise


class Latents(NamedTuple):
    """Posterior of the autoencoder for n pictures, unscaled: mean and std, both (n, c, h, w)."""

    mean: Tensor
    std: Tensor

    def at(self, index: Tensor, noise: Tensor) -> Tensor:
        """The sample of each row of `index` that standard normal `noise` (len(index), c, h, w) makes."""
        index = index.to(self.mean.device)
        return self.mean[index] + self.std[index] * noise.to(self.mean)


def open_picture(path: Path, paper: str | tuple[int, int, int] = "white") -> Image.Image:
    """An upright RGB picture, as `upright_rgb`; raises ValueError where it cannot be read."""
    with readable(path), Image.open(path) as image:
        return upright_rgb(image, paper)


def upright_rgb(image: Image.Image, paper: str | tuple[int, int, int] = "white") -> Image.Image:
    """`image` upright and in RGB; transparency is laid over `paper`, 16 bits are scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
    return image.convert("RGB")


def square(image: Image.Image, resolution: int, crop: str = "centre") -> Image.Image:
    """The "centre" square of `image`, or all of it "squash"ed to one, resized to `resolution`."""
    side = min(image.size)
    if image.size == (resolution, resolution):
        return image
    if crop == "squash":
        return image.resize((resolution, resolution), Image.Resampling.LANCZOS)
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
        with readable(path), Image.open(path) as image:
            image.verify()
    return paths


def read_captioned(folder: str | Path, otherwise: str | None = None) -> tuple[list[Path], list[str]]:
    """The pictures of `folder`, as `picture_paths`, and their captions.

    A caption stands in a .txt file beside its picture, or in captions.csv (columns file, caption) or
    captions.jsonl (keys "file" and "caption"; the names "file_name" and "text" are understood too). A folder
    of the published retrieval is understood: images.txt and caption.txt, line by line, of those in images/.

    Args:
        otherwise: the caption of all pictures where the folder holds none at all.

    Raises:
        ValueError: if a picture has no caption, or as in `picture_paths`.
    """
    folder = Path(folder)
    if all((folder / name).is_file() for name in PUBLISHED_LISTS):
        return _read_published(folder)
    paths = picture_paths(folder)
    table = caption_table(folder)
    if otherwise and not table and not any(path.with_suffix(".txt").is_file() for path in paths):
        return paths, [otherwise] * len(paths)
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


def _read_published(folder: Path) -> tuple[list[Path], list[str]]:
    names, captions = (
        [x.strip() for x in read_text(folder / n).splitlines() if x.strip()] for n in PUBLISHED_LISTS
    )
    if len(names) != len(captions):
        raise ValueError(
            f"{str(folder)!r} has {len(names)} lines in {PUBLISHED_LISTS[0]} and {len(captions)} in "
            f"{PUBLISHED_LISTS[1]}; they must be one a picture"
        )
    there = {path.name: path for path in picture_paths(folder / "images")}
    if missing := [name for name in names if Path(name).name not in there]:
        raise ValueError(f"{str(folder / 'images')!r} lacks {missing[0]!r}, which {PUBLISHED_LISTS[0]} names")
    return [there[Path(name).name] for name in names], captions


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


def scaled(vae: Any, latents: Tensor) -> Tensor:
    """`latents` of the autoencoder (n, c, h, w) as the UNet takes them."""
    return (latents - _shift(vae)) * vae.config.scaling_factor


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """What `scaled` was given."""
    return latents / vae.config.scaling_factor + _shift(vae)


def _shift(vae: Any) -> float:
    return vae.config.get("shift_factor") or 0.0


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, batch_size: int = 8) -> Latents:
    """The autoencoder's posterior of `pixels` (n, 3, H, W), computed once and kept."""
    half, means, stds = vae.dtype == torch.float16, [], []
    if half:
        vae.float()  # SDXL's overflows in float16
    try:
        for chunk in pixels.split(batch_size):
            posterior = vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
    finally:
        if half:
            vae.half()
    return Latents(torch.cat(means), torch.cat(stds))


def beside(output: Path, what: str) -> Path:
    """The folder of a file's further files: concept.validation of concept.safetensors."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.{what}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it takes the place of `path` when the block ends well, and goes when
    it does not. What a killed process left there, the next one overwrites.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())  # else a power cut could leave the name without the content
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What Pillow raises in the block, as a ValueError that names the file."""
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
