"""The base model: a Stable Diffusion pipeline folder, or the one that comes with the library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EMBEDDED = "tinysd"


def load_base(folder: str | None = None, device: str | None = None) -> Any:
    """The ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline`` of `folder` in float32; the embedded
    one by default.

    Raises:
        ValueError: if `folder` holds no pipeline, or `device` is none that can be used here.
    """
    import diffusers
    from torch import nn

    path = _pipeline_folder(folder)
    place = usable_device(device)
    name = json.loads((path / "model_index.json").read_text()).get("_class_name", "")
    large = name.startswith("StableDiffusionXL")
    loader = diffusers.StableDiffusionXLPipeline if large else diffusers.StableDiffusionPipeline
    options = {} if large else {"safety_checker": None, "requires_safety_checker": False}
    with without_bars():
        pipeline = loader.from_pretrained(path, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.float()
    return pipeline.to(place)


def load_text_encoder(
    folder: str | None = None, clip: str | None = None, device: str | None = None
) -> tuple[Any, Any]:
    """(tokenizer, CLIP text encoder in float32) in whose space texts are compared; loads nothing else.

    `clip`: a saved ``CLIPModel`` or ``CLIPTextModelWithProjection`` with its tokenizer. Without one it is the
    text encoder of the pipeline `folder`, the second where there are two, which has a projection. That of the
    embedded base has not learned which texts are alike; the CLIP pair that comes with it is taken instead.

    Raises:
        ValueError: if there is no such folder, its text encoder is no CLIP, or `device` cannot be used here.
    """
    import transformers

    if clip is None and (folder is None or is_embedded(folder)):
        import tinysd

        clip = tinysd.clip_path()
    if clip is not None:
        encoder = words = Path(clip)
    else:
        path = _pipeline_folder(folder)
        second = "_2" if (path / "text_encoder_2").is_dir() else ""
        encoder, words = path / f"text_encoder{second}", path / f"tokenizer{second}"
    if not (encoder / "config.json").is_file():
        raise ValueError(f"{str(encoder)!r} holds no text encoder: it has no config.json")
    name = (json.loads((encoder / "config.json").read_text()).get("architectures") or ["no model"])[0]
    name = "CLIPTextModelWithProjection" if name == "CLIPModel" else name  # its half that reads texts
    if name not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ValueError(
            f"{str(encoder)!r} holds {name}, which is no CLIP text encoder; name a folder of one with clip"
        )
    place = usable_device(device)
    parent = getattr(transformers, name)
    reader = type(name, (parent,), {"_keys_to_ignore_on_load_unexpected": [r"^vision|^visual|^logit_scale"]})
    with without_bars():
        model = reader.from_pretrained(encoder, local_files_only=True)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(words, local_files_only=True)
    return tokenizer, model.float().eval().to(place)


@contextmanager
def without_bars() -> Iterator[None]:
    """Loading takes a moment; the bars of both libraries would say so in four lines."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [log for log in (of_diffusers, of_transformers) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def silence() -> None:
    """For a program: only errors of transformers and diffusers, not what they looked for in vain."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def is_embedded(folder: str) -> bool:
    """Whether `folder` is the embedded base's own."""
    import tinysd

    return Path(folder).resolve() == Path(tinysd.path()).resolve()


def default_guidance(embedded: bool) -> float:
    """The guidance scale that suits a base: the paper's 6, and half of it for the small embedded one."""
    return 3.0 if embedded else 6.0


def embedded_captions(count: int = 1000, seed: int = 0) -> list[str]:
    """True captions of random scenes of the embedded base's world."""
    import numpy as np

    from tinysd import world

    rng = np.random.default_rng(seed)
    return [world.sample(rng)[1] for _ in range(count)]


def _pipeline_folder(folder: str | None) -> Path:
    """`folder`, which must be a pipeline's; by default the embedded one."""
    if folder is None:
        import tinysd

        folder = tinysd.path()
    if not (Path(folder) / "model_index.json").is_file():
        raise ValueError(
            f"base {str(folder)!r} is no pipeline folder: it has no model_index.json; give a folder that "
            "save_pretrained of a StableDiffusionPipeline or StableDiffusionXLPipeline wrote"
        )
    return Path(folder)


def usable_device(name: Any = None) -> Any:
    """`name` as a device, by default the GPU where there is one; ValueError if it cannot be used here."""
    import torch  # not above: --help needs no torch

    available = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    name = name or available[0]
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # a name may be good, and the machine without such a device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"device {name!r} is none that PyTorch can use here; give {' or '.join(available)}"
        ) from error
    return device
