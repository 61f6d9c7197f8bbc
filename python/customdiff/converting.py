"""From one file format to another: what ``customdiff convert`` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import customdiff_kernels as ck

from .concept import base_metadata


def convert(
    source: str | Path,
    output: str | Path,
    format: str,
    *,
    base: str | None = None,
    checkpoint: str | None = None,
    kv_only: bool = False,
) -> dict[str, Any]:
    """Write the concept in `source` to `output` in another format; returns what was read and written.

    base: a pipeline folder: the weights that a change belongs to. Formats of whole weights need it, and so
        does a change from whole weights; the embedded base is taken unasked where the concept is of it.
    checkpoint, format, kv_only: as for ``ck.save_delta`` and ``ck.load_delta``.

    Raises:
        ValueError: if the file is none that can be read, is of another base, or the format cannot hold it.
    """
    found = ck.load_delta(source, kv_only=kv_only)
    low_rank = isinstance(found.delta, ck.LowRankDelta)
    unet = None
    if base is not None:
        unet = _unet(Path(base))
        found = replace(found, metadata={"base_name": Path(base).resolve().name, **found.metadata})
    elif found.kind == "delta" and (
        format == "diffusers" or (format in ("delta.bin", "compvis") and (found.others or not low_rank))
    ):
        unet = _embedded(found, format)
    notes = {} if unet is None else base_metadata(ck.KVStack.from_unet(unet))
    notes.pop("base_hash", None)  # save_delta compares it with the recorded one and writes it
    path = ck.save_delta(found, output, format=format, base=unet, checkpoint=checkpoint, **notes)
    return {
        "input": str(source),
        "read": found.format,
        "held": found.kind,
        "output": str(path),
        "written": format,
        "segments": len(found.delta.factors if low_rank else found.delta or found.weights),
        "others": list(found.others),
        "modifier_tokens": list(found.modifier_tokens),
        "left_out": list(found.left_out),
        "bytes": size(path),
    }


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _unet(folder: Path) -> Any:
    """The UNet of a pipeline folder in float32; the rest is not loaded."""
    from diffusers import UNet2DConditionModel

    from .base import without_bars

    if not (folder / "unet" / "config.json").is_file():
        raise ValueError(f"base {str(folder)!r} is no pipeline folder: it has no unet/config.json")
    with without_bars():
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True)
    return unet.float()


def _embedded(found: ck.LoadedDelta, format: str) -> Any:
    import tinysd

    unet = _unet(Path(tinysd.path()))
    if found.metadata.get("base_hash") != ck.KVStack.from_unet(unet).hash():
        raise ValueError(
            f"{format} holds whole weights, and the file a change of its base: give --base, the pipeline "
            f"folder of {found.metadata.get('base_name', 'the model that it was made for')}"
        )
    return unet
