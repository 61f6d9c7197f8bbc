"""Pictures and captions on disk, and the latents made of them once."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
SHIFTED_COPIES = 4


class Latents(NamedTuple):
    """Posterior of the autoencoder for n pictures, unscaled: mean and std, both (n, c, h, w)."""

    mean: Tensor
    std: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """One sample for each row of `index`; the noise is drawn on the CPU, so alike on every device."""
        noise = torch.randn(index.shape + self.mean.shape[1:], generator=generator)
        index = index.to(self.mean.device)
        return self.mean[index] + self.std[index] * noise.to(self.mean)


def open_picture(path: Path | str) -> Image.Image:
    """An upright RGB picture; transparency is laid over white."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
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
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0


def read_pictures(folder: str | Path) -> list[Image.Image]:
    """Every picture of `folder`, in the order of their names.

    Raises:
        ValueError: if the folder is missing, holds no picture, or holds one that cannot be read.
    """
    return [_open(path) for path in _picture_paths(Path(folder))]


def read_captioned(folder: str | Path) -> tuple[list[Image.Image], list[str]]:
    """Pictures of `folder` and their captions.

    A caption stands in a .txt file beside its picture, or in captions.csv (columns file, caption) or
    captions.jsonl (keys "file" and "caption"; the names "file_name" and "text" are understood too).

    Raises:
        ValueError: if a picture has no caption, or as in `read_pictures`.
    """
    folder = Path(folder)
    paths = _picture_paths(folder)
    table = _caption_table(folder)
    captions = []
    for path in paths:
        beside = path.with_suffix(".txt")
        caption = beside.read_text(encoding="utf-8").strip() if beside.is_file() else table.get(path.name, "")
        if not caption:
            raise ValueError(
                f"picture {path.name!r} in {str(folder)!r} has no caption; write it into {beside.name!r}, "
                "or into captions.csv (columns file, caption) in the same folder"
            )
        captions.append(caption)
    return [_open(path) for path in paths], captions


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
        captions = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
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


def _picture_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(
            f"picture folder {str(folder)!r} is not a folder; give one that holds PNG or JPEG files"
        )
    names = sorted(path.name for path in folder.iterdir())
    paths = [folder / name for name in names if name.lower().endswith(SUFFIXES)]
    if not paths:
        found = f"{len(names)} other entries, as {', '.join(names[:5])}" if names else "nothing at all"
        raise ValueError(f"picture folder {str(folder)!r} holds no PNG or JPEG picture, but {found}")
    return paths


def _open(path: Path) -> Image.Image:
    try:
        return open_picture(path)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"{path.name!r} in {str(path.parent)!r} is not a readable picture ({error}); mend or remove it"
        ) from error


def _caption_table(folder: Path) -> dict[str, str]:
    for name in CAPTION_FILES:
        if (folder / name).is_file():
            return dict(_caption_rows(folder / name))
    return {}


def _caption_rows(path: Path) -> list[tuple[str, str]]:
    """(file name or "", caption) of each row of a .csv or .jsonl file."""
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            rows: list[dict[str, str]] = list(csv.DictReader(file))
        else:
            rows = [json.loads(line) for line in file if line.strip()]
    pairs = []
    for number, row in enumerate(rows, 1):
        caption = row.get("caption", row.get("text"))
        if caption is None:
            raise ValueError(f'row {number} of {str(path)!r} has no "caption", but {sorted(map(str, row))}')
        pairs.append((row.get("file", row.get("file_name", "")), caption.strip()))
    return pairs
