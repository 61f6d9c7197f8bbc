"""What Custom Diffusion's published code writes: ``delta.bin`` and CompVis' ``delta*.ckpt``.

``delta.bin``: {"unet": {diffusers' name: weight}, "modifier_token": {word: embedding, or a list of them}}.
CompVis: {"state_dict": {CompVis' name: weight, "embed": (words,E)}}, or a whole model, in which the words are
the rows of the token embedding after CLIP's own 49408. It knows words by their number alone, ``<new1>`` and
so on, so ours are written beside ``state_dict``, where its readers do not look. The compressed form of
both has {"u": (rows,r), "v": (r,E)}, a change, in the place of each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _atomic, _safetensors
from ..low_rank import LowRankDelta
from . import _torch_zip, names
from .loaded import LoadedDelta, from_pairs

VOCABULARY = 49408  # CLIP's, in SD 1.x, 2.x and both of SDXL's encoders
_TOKEN_EMBEDDINGS = (
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",  # SD 1.x
    "cond_stage_model.model.token_embedding.weight",  # SD 2.x
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",  # SDXL
    "conditioner.embedders.1.model.token_embedding.weight",
)


def parse_delta_bin(tree: Mapping[str, Any]) -> LoadedDelta | None:
    """None where ``tree`` is no ``delta.bin``."""
    if not isinstance(unet := tree.get("unet"), Mapping):
        return None
    ours = {name: value for name, value in unet.items() if names.is_key_value(str(name))}
    found = _loaded(ours, "delta.bin")
    found.others = {name: value for name, value in unet.items() if name not in ours}
    found.left_out = tuple(str(name) for name in tree if str(name).startswith("text_encoder"))
    words = tree.get("modifier_token", {})
    if not isinstance(words, Mapping):
        raise TypeError(f"its modifier_token must map words to embeddings, got {type(words).__name__}")
    for word, rows in words.items():
        found.modifier_tokens[word] = tuple(rows) if isinstance(rows, (list, tuple)) else rows
    return found


def parse_compvis(tree: Mapping[str, Any]) -> LoadedDelta | None:
    """None where ``tree`` is no CompVis checkpoint."""
    state = tree.get("state_dict", tree)
    if not isinstance(state, Mapping):
        raise TypeError(f"its state_dict must be a dict, got {type(state).__name__}")
    known = {name: names.from_compvis(name) for name in state if isinstance(name, str)}
    held = {ours: state[name] for name, ours in known.items() if ours is not None}
    matrices = {name: value for name, value in held.items() if names.is_key_value(name)}
    if not matrices and not any(name.startswith(names.PREFIX) for name in known):
        return None
    found = _loaded(matrices, "compvis")
    if "embed" in state:
        embed = state["embed"]
        if (
            isinstance(embed, Tensor) and embed.dim() == 1 and matrices
        ):  # published conversions string them up
            first = next(iter(matrices.values()))
            like = first["v"] if isinstance(first, Mapping) else first
            if not isinstance(like, Tensor) or like.dim() != 2:
                raise ValueError(f"its {next(iter(matrices))} must be a matrix")
            embed = embed.reshape(-1, like.shape[1])
        rows: list[Any] = _embeddings("embed", embed, 0)
        whole = False
    else:
        tables = [_embeddings(name, state[name], VOCABULARY) for name in _TOKEN_EMBEDDINGS if name in state]
        rows = list(zip(*tables, strict=True)) if len(tables) > 1 else sum(tables, [])
        whole = bool(tables) or any("first_stage_model" in name for name in known)
    words = tree.get("modifier_token", [f"<new{i + 1}>" for i in range(len(rows))])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise TypeError("its modifier_token must be a list of words")
    if len(words) != len(rows) or len(set(words)) != len(words):
        raise ValueError(f"its modifier_token must name {len(rows)} different words, got {len(words)}")
    found.modifier_tokens = dict(zip(words, rows, strict=True))
    if not whole:  # else all that is not a key or value is taken to be the base model's
        found.others = {name: value for name, value in held.items() if name not in matrices}
        found.left_out = tuple(
            name for name, ours in known.items() if ours is None and name.startswith(names.PREFIX)
        )
    return found


def _embeddings(name: str, value: Any, start: int) -> list[Tensor]:
    if not isinstance(value, Tensor) or value.dim() != 2:
        raise ValueError(f"its {name} must be a matrix of embeddings")
    return list(value[start:].unbind(0))


def _loaded(matrices: dict[str, Any], layout: str) -> LoadedDelta:
    """Weights, or the factors of the compressed form; not both, or it would be a partial load."""
    factors = {name: value for name, value in matrices.items() if isinstance(value, Mapping)}
    if not factors:
        return LoadedDelta({}, weights=matrices, format=layout)
    for name in matrices:
        if name not in factors or set(factors[name]) != {"u", "v"}:
            raise ValueError(f"its {name} must be {{'u', 'v'}} as the others are")
    pairs = {name: (value["u"], value["v"]) for name, value in factors.items()}
    return LoadedDelta(from_pairs(pairs), format=layout)


def write_delta_bin(loaded: LoadedDelta, path: Path, note: str) -> None:
    tokens = {
        word: rows if isinstance(rows, Tensor) else list(rows)
        for word, rows in loaded.modifier_tokens.items()
    }
    _write({"unet": _tensors(loaded), "modifier_token": tokens, "customdiff": note}, path)


def write_compvis(loaded: LoadedDelta, path: Path, note: str) -> None:
    """Raises ValueError for words of two text encoders, or weights that have no CompVis name."""
    tensors = _tensors(loaded)
    names_of = names.to_compvis(tensors)
    state: dict[str, Any] = {names_of[name]: value for name, value in tensors.items()}
    tree: dict[str, Any] = {"state_dict": state, "customdiff": note}
    if loaded.modifier_tokens:
        rows = list(loaded.modifier_tokens.values())
        if not all(isinstance(row, Tensor) for row in rows):
            raise ValueError("a CompVis delta holds words of one text encoder, and these are of several")
        state["embed"] = torch.stack([row for row in rows if isinstance(row, Tensor)])
        tree["modifier_token"] = list(loaded.modifier_tokens)
    _write(tree, path)


def _tensors(loaded: LoadedDelta) -> dict[str, Any]:
    if isinstance(loaded.delta, LowRankDelta):
        return {name: {"u": u, "v": v} for name, (u, v) in loaded.delta.factors.items()}
    return {**loaded.weights, **loaded.others}


def _write(tree: dict[str, Any], path: Path) -> None:
    with _atomic.new_file(path) as file:
        _torch_zip.write(file, tree)


def write_checkpoint(loaded: LoadedDelta, state: Mapping[str, Tensor], file: Path, note: str) -> None:
    """A whole model with the concept's keys and values, as safetensors."""
    ours = {compvis: loaded.weights[name] for name, compvis in names.to_compvis(loaded.weights).items()}
    if missing := sorted(ours.keys() - state.keys()):
        raise ValueError(f"checkpoint has no {missing[0]}: it is another model")
    _safetensors.write(file, {**state, **ours}, {"format": "pt", "customdiff": note})
