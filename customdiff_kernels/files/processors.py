"""diffusers' ``pytorch_custom_diffusion_weights``: ``<layer>.processor.to_k_custom_diffusion.weight``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _safetensors
from . import names
from .loaded import LoadedDelta

FILE = "pytorch_custom_diffusion_weights.safetensors"
_WEIGHT = re.compile(r"(.+\.attn2)\.processor\.to_([kv])_custom_diffusion\.weight")


def parse(tree: Mapping[str, Any]) -> LoadedDelta | None:
    """None where ``tree`` has no such weights."""
    if not any("_custom_diffusion." in str(name) for name in tree):
        return None
    weights, left_out = {}, []
    for name, value in tree.items():
        if match := _WEIGHT.fullmatch(str(name)):
            weights[f"{match[1]}.to_{match[2]}.weight"] = value
        elif not (isinstance(value, Mapping) and not value) and not (
            isinstance(value, Tensor) and not value.numel()
        ):  # an empty entry is a self-attention, which has none
            left_out.append(str(name))
    return LoadedDelta({}, weights=weights, format="diffusers", left_out=tuple(left_out))


def write(loaded: LoadedDelta, file: Path, note: str) -> None:
    """Raises ValueError for weights that are no layer's key and value."""
    tensors = {}
    for name, weight in loaded.weights.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        if (
            not names.is_key_value(name)
            or f"{layer}.to_{'v' if part == 'to_k' else 'k'}.weight" not in loaded.weights
        ):
            raise ValueError(
                f"{name!r} has no place in diffusers' layout, which holds to_k and to_v of a layer"
            )
        tensors[f"{layer}.processor.{part}_custom_diffusion.weight"] = weight
        # diffusers wants a processor for every attention, and takes what is empty for one that has no weights
        tensors[f"{layer.removesuffix('attn2')}attn1.processor"] = torch.zeros(0)
    _safetensors.write(file, tensors, {"format": "pt", "customdiff": note})
