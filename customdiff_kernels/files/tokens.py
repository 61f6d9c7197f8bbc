"""Modifier tokens in files of their own, as diffusers and the A1111 webui keep them.

``{word: embedding}`` (diffusers), ``{"emb_params": embedding}`` or ``{"clip_l": …, "clip_g": …}`` for two
text encoders (webui, safetensors; the file's name is the word), or ``{"string_to_param": {"*": embedding},
"name": word}`` (webui, ``.pt``). An embedding is (E,) or (1,E).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import _safetensors
from .loaded import LoadedDelta

_ENCODERS = ("clip_l", "clip_g")  # SDXL's first and second


def parse(tree: Mapping[str, Any], stem: str) -> LoadedDelta | None:
    """The modifier tokens in ``tree``, or None. ``stem``: the file's name, where that is the word."""
    if isinstance(parameters := tree.get("string_to_param"), Mapping):
        if not isinstance(word := tree.get("name", stem), str) or not word:
            raise TypeError(f"its name must be a word, got {type(word).__name__}")
        if len(parameters) != 1:
            raise ValueError(f"its string_to_param must hold one embedding, got {len(parameters)}")
        return _loaded({word: _row(word, next(iter(parameters.values())))})
    if not tree or not all(isinstance(value, Tensor) and value.dim() in (1, 2) for value in tree.values()):
        return None
    if set(tree) == set(_ENCODERS):
        return _loaded({stem: tuple(_row(stem, tree[name]) for name in _ENCODERS)})
    if set(tree) == {"emb_params"}:
        return _loaded({stem: _row(stem, tree["emb_params"])})
    if any(not isinstance(name, str) or name.endswith((".weight", ".bias")) for name in tree):
        return None
    if len(tree) > 1 and any(value.dim() == 2 and value.shape[0] > 1 for value in tree.values()):
        return None
    return _loaded({word: _row(word, value) for word, value in tree.items()})


def _loaded(words: dict[str, Tensor | tuple[Tensor, ...]]) -> LoadedDelta:
    return LoadedDelta({}, words, format="embedding")


def _row(word: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"its embedding of {word!r} must be a tensor, got {type(value).__name__}")
    if value.dim() == 2 and value.shape[0] == 1:
        return value[0]
    if value.dim() != 1:
        raise ValueError(
            f"its embedding of {word!r} must have shape (E,) or (1,E), got {tuple(value.shape)}: a modifier "
            "token is one vector"
        )
    return value


def write(word: str, rows: Tensor | tuple[Tensor, ...], file: Path, *, webui: bool) -> None:
    """Raises ValueError for a word of more than two text encoders."""
    rows = (rows,) if isinstance(rows, Tensor) else rows
    if len(rows) > len(_ENCODERS):
        raise ValueError(f"modifier token {word!r} has {len(rows)} embeddings; its file holds one or two")
    if len(rows) == 2:
        named = dict(zip(_ENCODERS, (row[None] for row in rows), strict=True))
    else:
        named = {"emb_params": rows[0][None]} if webui else {word: rows[0]}
    _safetensors.write(file, named, {"format": "pt"})


def file_name(word: str) -> str:
    """The name of a word's file. Raises ValueError for a word that cannot be one."""
    if "/" in word or "\0" in word or word.startswith(".") or len(word.encode()) > 200:
        raise ValueError(
            f"modifier token {word!r} cannot be the name of a file; rename it, or use another format"
        )
    return f"{word}.safetensors"
