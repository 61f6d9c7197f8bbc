"""LoRA of keys and values: ``unet.<layer>.lora_A.weight`` (PEFT, diffusers) or kohya's ``lora_unet_…``.

The factors are ours: lora_A or down is v (r,E), lora_B or up is u (rows,r), and the change is
(alpha / r)·u v. What is written has no alpha: then every reader takes alpha = r, while diffusers mistakes an
alpha a layer where ranks differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import _safetensors
from ..low_rank import LowRankDelta
from . import names
from .loaded import LoadedDelta, from_pairs

FILE = "pytorch_lora_weights.safetensors"
_PEFT = re.compile(r"(?:unet\.)?(.+)\.(?:lora_(A|B)|lora\.(down|up))\.weight")
_PROCESSOR = re.compile(r"(?:unet\.)?(.+\.attn2)\.processor\.to_([kv])_lora\.(down|up)\.weight")
_KOHYA = re.compile(r"(lora_unet_.+)\.(?:lora_(down|up)\.weight|(alpha))")
_SIDES = {"A": "v", "down": "v", "B": "u", "up": "u", "alpha": "alpha"}


def parse(tree: Mapping[str, Any], text: Mapping[str, str]) -> LoadedDelta | None:
    """None where ``tree`` is no LoRA."""
    if not any("lora" in re.split(r"[._]", str(name)) for name in tree):
        return None
    if any(str(name).startswith("base_model.model.") for name in tree):
        raise ValueError(
            "it is a LoRA in PEFT's own layout, whose scale stands in another file (adapter_config.json); "
            "save it with diffusers' save_lora_weights"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    left_out = []
    for name, value in tree.items():
        target, side = _place(str(name))
        if target is None or not names.is_key_value(target):
            left_out.append(str(name))
        elif not isinstance(value, Tensor):
            raise TypeError(f"its {name} must be a tensor, got {type(value).__name__}")
        else:
            parts.setdefault(target, {})[side] = value
    factors, common = {}, _scale(text)
    for name, found in parts.items():
        if missing := {"u", "v"} - found.keys():
            raise ValueError(f"its LoRA of {name} lacks {' and '.join(sorted(missing))}")
        u, v = found["u"], found["v"]
        scale = common
        if "alpha" in found:
            if found["alpha"].numel() != 1 or v.dim() != 2 or not v.numel():
                raise ValueError(f"its alpha of {name} must be one number for a rank above 0")
            scale = float(found["alpha"]) / v.shape[0]
        factors[name] = (u if scale == 1 else u * scale, v)
    delta: Any = from_pairs(factors) if factors else {}
    return LoadedDelta(delta, format="lora", left_out=tuple(left_out))


def _place(name: str) -> tuple[str | None, str]:
    """(the weight that it is a factor of, or None where that is not known, which factor)."""
    if match := _PROCESSOR.fullmatch(name):
        return f"{match[1]}.to_{match[2]}.weight", _SIDES[match[3]]
    if match := _KOHYA.fullmatch(name):
        return names.from_kohya(match[1]), _SIDES[match[2] or match[3]]
    if match := _PEFT.fullmatch(name):
        return f"{match[1]}.weight", _SIDES[match[2] or match[3]]
    return None, ""


def _scale(text: Mapping[str, str]) -> float:
    """alpha / rank as newer diffusers records it; 1 without a record."""
    config = json.loads(text.get("lora_adapter_metadata", "{}"))
    if not isinstance(config, dict):
        raise ValueError("its lora_adapter_metadata is no dict")
    given = {name.removeprefix("unet."): value for name, value in config.items() if name.startswith("unet.")}
    for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        if given.get(name):
            raise ValueError(f"its LoRA uses {name}, which is not read")
    rank, alpha = given.get("r", 1), given.get("lora_alpha", given.get("r", 1))
    if not all(isinstance(x, (int, float)) and 0 < x < 1e9 for x in (rank, alpha)):
        raise ValueError(f"its LoRA has r={rank!r} and lora_alpha={alpha!r}, which are no numbers above 0")
    return alpha / rank


def factors_of(loaded: LoadedDelta) -> LoadedDelta:
    """``loaded`` without the segments that it does not change. Raises ValueError for what has no factors."""
    delta = loaded.delta
    if not isinstance(delta, LowRankDelta):
        raise ValueError(
            "a LoRA holds low-rank factors, and this is a full change or whole weights: compress it first "
            "(ck.compress, customdiff compress)"
        )
    if not (factors := {name: (u, v) for name, (u, v) in delta.factors.items() if u.shape[1]}):
        raise ValueError("the delta changes nothing: every rank is 0")
    return replace(loaded, delta=LowRankDelta.from_factors(factors))


def write(delta: LowRankDelta, file: Path, note: str, *, kohya: bool) -> None:
    """Raises ValueError for a segment that is no key or value weight of a UNet."""
    tensors = {}
    for name, (u, v) in delta.factors.items():
        if kohya:
            target, down, up = names.to_kohya(name), "lora_down", "lora_up"
        elif names.is_key_value(name):
            target, down, up = f"unet.{name.removesuffix('.weight')}", "lora_A", "lora_B"
        else:
            raise ValueError(f"{name!r} is no key or value weight of a UNet")
        tensors[f"{target}.{down}.weight"], tensors[f"{target}.{up}.weight"] = v, u
    _safetensors.write(file, tensors, {"format": "pt", "customdiff": note})
