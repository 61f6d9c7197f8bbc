"""A small Stable-Diffusion-shaped model of a procedural world, trained by ``python -m tinysd.train``."""

from __future__ import annotations

from pathlib import Path

__all__ = ["clip_path", "path"]

_HERE = Path(__file__).resolve().parent


def path() -> str:
    """The folder that ``diffusers.StableDiffusionPipeline.from_pretrained`` opens."""
    return str(_HERE / "pipeline")


def clip_path() -> str:
    """The folder of the separate CLIP pair (``CLIPModel``, tokenizer, image processor) that metrics use."""
    return str(_HERE / "clip")
