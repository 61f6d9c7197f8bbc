"""``save_delta``: what is given is checked, turned into what the format holds, and written whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _atomic, _checks
from ..low_rank import LowRankDelta
from ..stack import KVStack, check_matrices
from . import lora, names, own, processors, published, tokens
from .loaded import (
    BaseMismatchError,
    LoadedDelta,
    check_base,
    check_other_names,
    check_others,
    moved,
    split_base,
)
from .loading import _contents, load_delta

FULL = ("customdiff", "delta.bin", "compvis", "diffusers")  # hold others too
FORMATS = (*FULL, "lora", "kohya", "webui")
ModifierTokens = Mapping[str, Tensor | Sequence[Tensor]]


def save_delta(
    delta: LowRankDelta | Mapping[str, Tensor] | LoadedDelta,
    path: str | PathLike[str],
    *,
    modifier_tokens: ModifierTokens | None = None,
    others: Mapping[str, Tensor] | None = None,
    format: str = "customdiff",
    base: KVStack | nn.Module | None = None,
    checkpoint: str | PathLike[str] | None = None,
    **metadata: Any,
) -> Path:
    """Write a concept to ``path``, in our format or in a published one (docs/formats.md); returns the path.

    delta: a ``LowRankDelta``, a ``KVStack`` difference, {segment name: change (rows,E)}, or what
        ``load_delta`` returned, whose modifier tokens, others and metadata are kept. {} where there are only
        modifier tokens or others ("customdiff").
    modifier_tokens: {word: its embedding (E,)}, or a sequence of them, one for each text encoder.
    others: {parameter name of the UNet: its change}, of parameters beside keys and values; beside whole
        weights the whole parameters. "customdiff" holds any, "delta.bin" too; "compvis" and "diffusers" those
        of the cross-attention.
    format: "customdiff", "delta.bin" and "compvis" are one file; "diffusers", "lora", "kohya" and "webui" a
        folder with the modifier tokens in files of their own.
    base: the weights that a change belongs to, needed where the format holds whole weights. The low-rank
        factors of "delta.bin" and "compvis" are written as their compressed form without it, as whole weights
        with it. "customdiff" makes a change of whole weights with it. It must be the base recorded, if any,
        and where there are others the UNet itself.
    checkpoint: for "webui": the base model as one file in CompVis' layout, which is written anew with the
        keys and values of the concept.
    metadata: ``base_hash`` (``KVStack.hash()`` of the base: what loading checks), ``base_name``,
        ``resolution``, ``prompt``, ``training`` (the configuration, a dict), and whatever else JSON can hold.
        None is left out.

    The write is atomic: a crash at any moment leaves the old file or folder or the new one, whole. A folder
    is replaced only if it holds nothing but such a concept.
    Raises TypeError or ValueError naming the argument, or what the format cannot hold, before anything is
    written, BaseMismatchError for another base than the one recorded, and OSError from the disk.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if base is not None and not isinstance(base, (KVStack, nn.Module)):
        raise TypeError(f"base must be a KVStack or a UNet, got {type(base).__name__}")
    if (checkpoint is None) == (format == "webui"):
        raise ValueError(
            "checkpoint must be the base model's file for format='webui', and is for no other format"
        )
    if checkpoint is not None and base is not None:
        raise ValueError("base must be left out with checkpoint, whose keys and values are the base's")
    loaded = _checked(delta, modifier_tokens, others, metadata)
    state: dict[str, Tensor] = {}
    if checkpoint is not None:
        whole = load_delta(checkpoint, kv_only=True)
        if whole.modifier_tokens:
            raise ValueError(f"checkpoint {checkpoint} has modifier tokens of its own: give the base model's")
        base, state = KVStack.from_mapping(whole.weights), _checkpoint(Path(checkpoint))
    loaded = _converted(loaded, format, base)
    if format == "customdiff":
        own.write(loaded, path)
    elif format == "delta.bin":
        published.write_delta_bin(loaded, path, own.note(loaded, {}))
    elif format == "compvis":
        published.write_compvis(loaded, path, own.note(loaded, {}))
    else:
        _write_folder(loaded, path, format, state)
    return path


def _checked(
    delta: Any,
    modifier_tokens: ModifierTokens | None,
    others: Mapping[str, Tensor] | None,
    metadata: Mapping[str, Any],
) -> LoadedDelta:
    """What is to be written, on the CPU and finite, with its own words and metadata added."""
    kept: dict[str, Any] = {}
    if isinstance(delta, LoadedDelta):
        kept = {n: v for n, v in delta.metadata.items() if n not in ("format_version", "library_version")}
        modifier_tokens = delta.modifier_tokens if modifier_tokens is None else modifier_tokens
        others = delta.others if others is None else others
        loaded = LoadedDelta(delta.delta, weights=delta.weights)
    else:
        loaded = LoadedDelta(delta)
    if (recorded := kept.get("base_hash")) not in (None, metadata.get("base_hash", recorded)):
        raise BaseMismatchError(
            f"base_hash must be that of the file, {recorded}, got {metadata['base_hash']}"
        )
    fields = {name: value for name, value in {**kept, **metadata}.items() if value is not None}
    own.check_metadata(fields)
    loaded.metadata, loaded.modifier_tokens = fields, _token_rows(modifier_tokens or {})
    check_other_names(others or {})
    loaded.others = {name: _plain(name, value) for name, value in (others or {}).items()}
    if isinstance(loaded.delta, LowRankDelta):
        pairs = {}
        for name, (u, v) in loaded.delta.factors.items():
            pairs[name] = (_plain(f"{name}.u", u), _plain(f"{name}.v", v))
        loaded.delta = LowRankDelta(loaded.delta.segments, pairs)
    elif loaded.weights:
        check_matrices("weights", loaded.weights)
        loaded.weights = {name: _plain(name, matrix) for name, matrix in loaded.weights.items()}
    else:
        empty = isinstance(loaded.delta, Mapping) and not loaded.delta
        if not empty or not (loaded.others or loaded.modifier_tokens):
            check_matrices("delta", loaded.delta)
        loaded.delta = {name: _plain(name, matrix) for name, matrix in loaded.delta.items()}
    return loaded


def _token_rows(modifier_tokens: ModifierTokens) -> dict[str, Tensor | tuple[Tensor, ...]]:
    if not isinstance(modifier_tokens, Mapping):
        raise TypeError(f"modifier_tokens must map words to embeddings, got {type(modifier_tokens).__name__}")
    found: dict[str, Tensor | tuple[Tensor, ...]] = {}
    for word, embeddings in modifier_tokens.items():
        if not isinstance(word, str) or not word:
            raise TypeError(f"modifier_tokens must have words as keys, got {word!r}")
        label = f"modifier_tokens[{word!r}]"
        rows = [embeddings] if isinstance(embeddings, Tensor) else list(embeddings)
        if not rows:
            raise ValueError(f"{label} must be an embedding, or one a text encoder, got none")
        for embedding in rows:
            _checks.is_tensor(label, embedding)
            _checks.floating(label, embedding)
            if embedding.dim() != 1 or not embedding.numel():
                raise ValueError(f"{label} must have shape (E,), got {tuple(embedding.shape)}")
        plain = tuple(_plain(f"modifier_token.{word}", row) for row in rows)
        found[word] = plain[0] if len(plain) == 1 else plain
    return found


def _plain(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU, contiguous, without memory beside its own (which a pickle would hold too)."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} is not finite; it is not saved")
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _converted(loaded: LoadedDelta, format: str, base: KVStack | nn.Module | None) -> LoadedDelta:
    """``loaded`` as the change or the whole weights that ``format`` holds."""
    if loaded.others and format not in FULL:
        raise ValueError(
            f"format={format!r} holds keys and values alone, and delta changes {len(loaded.others)} other "
            f"weights, first {next(iter(loaded.others))!r}: one of {', '.join(FULL)} holds them"
        )
    if loaded.kind == "tokens" and format != "customdiff":
        raise ValueError(
            f"format={format!r} holds weights, and delta modifier tokens alone: use 'customdiff'"
        )
    stack, parameters = (None, {}) if base is None else split_base(base)
    if stack is not None:
        check_base(stack, loaded.metadata)
        loaded.metadata["base_hash"] = stack.hash()
    if format in ("lora", "kohya") or (format == "customdiff" and base is None):
        return loaded
    if format == "customdiff":
        assert base is not None
        return loaded.relative_to(base)
    if stack is not None:
        weights, others = loaded.weights_on(stack), loaded.others
        if not loaded.weights:
            check_others(parameters, others)
            others = {n: moved(parameters[n], change, 1.0, whole=False) for n, change in others.items()}
        return replace(
            loaded,
            delta={},
            weights={name: _plain(name, weight) for name, weight in weights.items()},
            others={name: _plain(name, weight) for name, weight in others.items()},
        )
    if loaded.weights:
        return loaded
    if isinstance(loaded.delta, LowRankDelta) and format in ("delta.bin", "compvis") and not loaded.others:
        return loaded
    raise ValueError(
        f"format={format!r} holds whole weights, and delta is a change of them: give base=, the weights that "
        "it changes"
    )


def _checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a whole model in CompVis' layout, views of its file."""
    tree, _ = _contents(path)
    state = tree.get("state_dict", tree) if isinstance(tree, Mapping) else {}
    found = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not any(str(name).startswith(names.PREFIX) for name in found):
        raise ValueError(f"checkpoint {path} is no model in CompVis' layout: it has no {names.PREFIX}…")
    return found


def _write_folder(loaded: LoadedDelta, path: Path, format: str, state: dict[str, Tensor]) -> None:
    """The weights in one file, each word in another, which the first lists."""
    main = {
        "diffusers": processors.FILE,
        "lora": lora.FILE,
        "kohya": f"{path.name}.safetensors",
        "webui": "model.safetensors",
    }[format]
    webui = format in ("kohya", "webui")
    if format in ("lora", "kohya"):
        loaded = lora.factors_of(loaded)
    if not webui and main in map(tokens.file_name, loaded.modifier_tokens):
        raise ValueError(
            f"modifier token {main.removesuffix('.safetensors')!r} has the name of the weights' file"
        )
    _check_replaceable(path)
    with _atomic.new_folder(path) as folder:
        files = {}
        for word, rows in loaded.modifier_tokens.items():
            name = f"embeddings/{tokens.file_name(word)}" if webui else tokens.file_name(word)
            (folder / name).parent.mkdir(exist_ok=True)
            tokens.write(word, rows, folder / name, webui=webui)
            files[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        note = own.note(replace(loaded, modifier_tokens={}), files)
        if format == "diffusers":
            processors.write(loaded, folder / main, note)
        elif format == "webui":
            published.write_checkpoint(loaded, state, folder / main, note)
        else:
            assert isinstance(loaded.delta, LowRankDelta)
            lora.write(loaded.delta, folder / main, note, kohya=format == "kohya")


def _check_replaceable(path: Path) -> None:
    """Raises FileExistsError unless ``path`` is free, or a folder of one saved concept and no more."""
    if not path.exists():
        return
    if path.is_dir():
        there = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
        if not there or any(there == {name, *_listed(path / name)} for name in there if "/" not in name):
            return
    raise FileExistsError(f"{path} exists and is not a folder of one saved concept alone: name a new folder")


def _listed(file: Path) -> Iterable[str]:
    """The names of the files that ``file`` was saved with, and a name that is none where it does not say."""
    try:
        _, text = _contents(file)
        return list(json.loads(text["customdiff"])["files"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return [""]
