"""diffusers' ``pytorch_custom_diffusion_weights``: ``<layer>.processor.to_k_custom_diffusion.weight``.

Of the whole cross-attention also ``to_q_custom_diffusion.weight``, ``to_out_custom_diffusion.0.weight`` and
``.bias``.
"""

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
_WEIGHT = re.compile(r"(.+\.attn2\.)processor\.(to_(?:[qkv]|out))_custom_diffusion\.(.+)")
_KEY_VALUE = ("to_k.weight", "to_v.weight")
_QUERY_OUT = ("to_q.weight", "to_out.0.weight", "to_out.0.bias")


def parse(tree: Mapping[str, Any]) -> LoadedDelta | None:
    """None where ``tree`` has no such weights."""
    if not any("_custom_diffusion." in str(name) for name in tree):
        return None
    found: dict[str, Any] = {}
    left_out = []
    for name, value in tree.items():
        match = _WEIGHT.fullmatch(str(name))
        if match and (part := f"{match[2]}.{match[3]}") in _KEY_VALUE + _QUERY_OUT:
            found[match[1] + part] = value
        elif not (isinstance(value, Mapping) and not value) and not (
            isinstance(value, Tensor) and not value.numel()
        ):  # an empty entry is a self-attention, which has none
            left_out.append(str(name))
    weights = {name: value for name, value in found.items() if names.is_key_value(name)}
    others = {name: value for name, value in found.items() if name not in weights}
    return LoadedDelta({}, weights=weights, format="diffusers", left_out=tuple(left_out), others=others)


def write(loaded: LoadedDelta, file: Path, note: str) -> None:
    """Raises ValueError for weights that are no layer's key and value, or not all of its query and output."""
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
    for name, weight in loaded.others.items():
        layer, _, part = name.rpartition("attn2.")
        layer += "attn2"
        missing = {f"{layer}.{other}" for other in _QUERY_OUT} - loaded.others.keys()
        if part not in _QUERY_OUT or missing or f"{layer}.to_k.weight" not in loaded.weights:
            raise ValueError(
                f"{name!r} has no place in diffusers' layout, which holds to_k and to_v of a layer, or all "
                "of its cross-attention"
            )
        side, leaf = part.split(".", 1)
        tensors[f"{layer}.processor.{side}_custom_diffusion.{leaf}"] = weight
    _safetensors.write(file, tensors, {"format": "pt", "customdiff": note})
