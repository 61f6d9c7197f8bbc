"""A concept of an SD 1.x-shaped UNet in miniature, and a file of it in every format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import customdiff_kernels as ck

E, ROWS = 6, 4
LAYERS = [
    *(f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)),
]
NAMES = [f"{layer}.transformer_blocks.0.attn2.to_{part}.weight" for layer in LAYERS for part in "kv"]
WORDS = ("<new1>", "<new2>")


@dataclass
class Sample:
    """base: the base's weights. weights: the concept's, all changed. delta: the same change, of rank 2."""

    base: ck.KVStack
    weights: dict[str, Tensor]
    delta: ck.LowRankDelta
    tokens: dict[str, Tensor]

    def unet(self) -> nn.Module:
        """A module with the base's weights under the UNet's names."""
        root = nn.Module()
        for name, weight in self.base.items():
            module = root
            for part in name.split(".")[:-1]:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.weight = nn.Parameter(weight.clone())
        return root

    def loaded(self) -> ck.LoadedDelta:
        return ck.LoadedDelta({}, dict(self.tokens), weights=dict(self.weights))

    def checkpoint(self, folder: Path) -> Path:
        """The base as a whole model in CompVis' layout."""
        from customdiff_kernels.files import names

        compvis = names.to_compvis(self.base)
        state = {compvis[name]: weight.clone() for name, weight in self.base.items()}
        state["first_stage_model.encoder.weight"] = torch.randn(3, 3)
        state["model.diffusion_model.time_embed.0.weight"] = torch.randn(2, 2).half()
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(state, folder / "base.safetensors")
        return folder / "base.safetensors"


def sample(seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = ck.KVStack.from_mapping({name: matrix(ROWS + i % 3, E) for i, name in enumerate(NAMES)})
    factors = {
        n: (matrix(w.shape[0], 1 + i % 3), matrix(1 + i % 3, E)) for i, (n, w) in enumerate(base.items())
    }
    delta = ck.LowRankDelta(base.segments, factors)
    weights = {name: weight + delta.dense()[name] for name, weight in base.items()}
    return Sample(base, weights, delta, {word: matrix(E) for word in WORDS})


def every_format(folder: Path, held: Sample) -> dict[str, Path]:
    """{what it is: a file or folder of it}."""
    tokens = held.tokens
    checkpoint = held.checkpoint(folder)
    note = {"base_hash": held.base.hash(), "prompt": "a <new1> dog"}

    def save(what: str, delta, **options) -> tuple[str, Path]:
        return what, ck.save_delta(delta, folder / what, modifier_tokens=tokens, **options)

    return dict(
        [
            save("customdiff", held.delta, **note),
            save("customdiff-full", held.delta.dense(), **note),
            save("customdiff-weights", held.loaded()),
            save("delta.bin", held.loaded(), format="delta.bin", **note),
            save("delta.bin-compressed", held.delta, format="delta.bin", **note),
            save("compvis", held.loaded(), format="compvis"),
            save("compvis-compressed", held.delta, format="compvis", **note),
            save("diffusers", held.loaded(), format="diffusers"),
            save("lora", held.delta, format="lora", **note),
            save("kohya", held.delta, format="kohya", **note),
            save("webui", held.loaded(), format="webui", checkpoint=checkpoint),
        ]
    )
