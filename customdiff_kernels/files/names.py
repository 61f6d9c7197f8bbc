"""Names of a cross-attention's weights: diffusers' (which are ours), CompVis', kohya's.

CompVis numbers all blocks in one row. In every UNet of two residual layers a level (SD 1.x, 2.x, SDXL)
``input_blocks.{1 + 3·i + j}.1`` is ``down_blocks.{i}.attentions.{j}``, ``middle_block.1`` is
``mid_block.attentions.0`` and ``output_blocks.{3·i + j}.1`` is ``up_blocks.{i}.attentions.{j}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = "model.diffusion_model."  # of CompVis' UNet in a whole checkpoint
_LAYER = r"\.transformer_blocks\.(\d+)\.attn2\.(to_[qkv]\.weight|to_out\.0\.(?:weight|bias))"
_KEY_VALUE = re.compile(r"(?:.+\.)?attn2\.to_[kv]\.weight")
_DIFFUSERS = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)" + _LAYER)
_COMPVIS = re.compile(r"(?:(input|output)_blocks\.(\d+)|(middle)_block)\.1" + _LAYER)
_KOHYA = re.compile(r"lora_unet_(.+)_transformer_blocks_(\d+)_attn2_to_([kv])")


def is_key_value(name: str) -> bool:
    """Whether it is the name of a key or value weight that a ``KVStack`` has."""
    return _KEY_VALUE.fullmatch(name) is not None


def from_compvis(name: str) -> str | None:
    """diffusers' name of a CompVis parameter (with the prefix or without); None if no cross-attention's."""
    match = _COMPVIS.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        return None
    side, number, middle, layer, part = match.groups()
    index = 0 if middle else int(number) - (side == "input")
    if index < 0:
        return None
    block = {"input": "down_blocks.{}", "output": "up_blocks.{}", None: "mid_block"}[side].format(index // 3)
    return f"{block}.attentions.{index % 3}.transformer_blocks.{layer}.attn2.{part}"


def to_compvis(names: Iterable[str]) -> dict[str, str]:
    """{diffusers' name: CompVis' name with its prefix}. Raises ValueError for a UNet that CompVis lacks."""
    found, down, up = {}, set(), set()
    for name in names:
        if (match := _DIFFUSERS.fullmatch(name)) is None:
            raise ValueError(f"{name!r} has no name in CompVis' layout")
        side, block, middle, attention, layer, part = match.groups()
        j = int(attention)
        if middle:
            where = "middle_block"
        elif side == "down":
            where = f"input_blocks.{1 + 3 * int(block) + j}"
            down.add(j)
        else:
            where = f"output_blocks.{3 * int(block) + j}"
            up.add(j)
        found[name] = f"{PREFIX}{where}.1.transformer_blocks.{layer}.attn2.{part}"
    if (down and down != {0, 1}) or (up and up != {0, 1, 2}):
        raise ValueError(
            "CompVis' names are known for UNets of two layers a level (SD 1.x, 2.x, SDXL), and this one has "
            f"{len(down)} down and {len(up)} up"
        )
    return found


def from_kohya(name: str) -> str | None:
    """diffusers' name of the weight that kohya's ``lora_unet_…`` changes; None if it is no key or value."""
    if (match := _KOHYA.fullmatch(name)) is None:
        return None
    place, layer, part = match.groups()
    tail = f".transformer_blocks.{layer}.attn2.to_{part}.weight"
    if compvis := re.fullmatch(r"(input_blocks_\d+|output_blocks_\d+|middle_block)_1", place):
        return from_compvis(re.sub(r"_(\d+)$", r".\1", compvis[1]) + ".1" + tail)
    if own := re.fullmatch(r"(?:(down|up)_blocks_(\d+)|mid_block)_attentions_(\d+)", place):
        block = f"{own[1]}_blocks.{own[2]}" if own[1] else "mid_block"
        return f"{block}.attentions.{own[3]}{tail}"
    return None


def to_kohya(name: str) -> str:
    """kohya's name, which has underscores only. Raises ValueError where the way back is not known."""
    if _DIFFUSERS.fullmatch(name) is None or not is_key_value(name):
        raise ValueError(f"{name!r} has no name in kohya's layout")
    return "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
