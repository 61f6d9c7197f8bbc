"""``load_delta``: the layout is known by the content, and everything is checked before it counts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _safetensors
from ..low_rank import LowRankDelta
from ..stack import check_matrices
from . import _torch_zip, lora, own, processors, published, tokens
from .loaded import DeltaFileError, LoadedDelta, check_other_names


def load_delta(path: str | PathLike[str], *, kv_only: bool = False) -> LoadedDelta:
    """Read a concept in our format or a published one (docs/formats.md), to the CPU.

    path: a file, whatever its name: the layout is known by the content. Where words lie in files of their own
        (diffusers, LoRA, the webui), the folder of them all, or the file of weights, beside which they are
        found.
    kv_only: take keys, values and modifier tokens alone; the names of the rest are in ``left_out``. Otherwise
        other weights of the UNet, as of the whole cross-attention, are read into ``others``, and what has no
        place there (a text encoder, LoRA of other layers) is an error.

    Of pickled files only tensors and containers are read, by ``torch.load(weights_only=True)``; prefer
    safetensors.
    Raises FileNotFoundError where there is nothing, DeltaFileError where it is not a delta, not whole,
    altered, not finite, or of a newer version. There are no partial loads.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, kv_only)
    if not path.is_file():
        raise FileNotFoundError(f"there is no delta file at {path}")
    found, listed = _file(path, kv_only)
    if listed is not None:
        _add_tokens(path, found, _whole(path, listed))
    elif found.format == "diffusers":
        beside = path.parent.iterdir()
        _add_tokens(
            path, found, sorted(f for f in beside if re.fullmatch(r"<.+>\.(bin|safetensors)", f.name))
        )
    return found


def _folder(path: Path, kv_only: bool) -> LoadedDelta:
    files = sorted(file for file in path.iterdir() if file.is_file() and _may_be_ours(file))
    read = {file: _file(file, kv_only) for file in files}
    main = [file for file, (found, _) in read.items() if found.kind != "tokens"]
    if not read and not (path / "embeddings").is_dir():
        raise FileNotFoundError(f"there is no delta file at {path}: it is a folder that holds none")
    if len(main) != 1:
        names = ", ".join(file.name for file in main[:3])
        raise DeltaFileError(
            f"{path} holds {len(main)} files of weights{': name one: ' + names if names else ''}"
        )
    found, listed = read[main[0]]
    if listed is not None:
        _add_tokens(main[0], found, _whole(main[0], listed))
        return found
    embeddings = (file for file in (path / "embeddings").glob("*") if file.is_file() and _may_be_ours(file))
    _add_tokens(main[0], found, [*(file for file in files if file != main[0]), *sorted(embeddings)])
    return found


def _may_be_ours(file: Path) -> bool:
    with open(file, "rb") as opened:
        start = opened.read(9)
    return _torch_zip.is_zip(start) or start[8:] == b"{"


def _whole(path: Path, listed: Mapping[str, str]) -> list[Path]:
    """The files that were saved with ``path``, after a look that they are there and the same."""
    for name, digest in listed.items():
        file = path.parent / name
        if not file.is_file():
            raise DeltaFileError(f"{path} lacks the files that it was saved with, first {file}")
        if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise DeltaFileError(
                f"{file} is not the file that {path} was saved with: it is damaged, or another's"
            )
    return [path.parent / name for name in listed]


def _add_tokens(path: Path, found: LoadedDelta, files: Iterable[Path]) -> None:
    for file in files:
        other, _ = _file(file, False)
        if other.kind != "tokens":
            raise DeltaFileError(f"{file} lies with {path} and holds weights too: name one of them")
        if twice := sorted(other.modifier_tokens.keys() & found.modifier_tokens.keys()):
            raise DeltaFileError(f"{file} holds the modifier token {twice[0]} of {path} once more")
        found.modifier_tokens |= other.modifier_tokens


def _file(path: Path, kv_only: bool) -> tuple[LoadedDelta, dict[str, str] | None]:
    """(what it holds, {name: sha256} of the files that it was saved with or None where it does not say)."""
    try:
        tree, text = _contents(path)
        found = _parse(tree, text, path.stem)
        if found.left_out and not kv_only:
            raise ValueError(
                f"it also holds {len(found.left_out)} other weights, first {found.left_out[0]!r}, which are "
                "not read; kv_only=True (--kv-only) reads keys, values and modifier tokens alone"
            )
        found = _checked(found)
        listed = own.parse_note(text["customdiff"], found) if "customdiff" in text else None
        if kv_only:
            found = replace(found, others={}, left_out=(*found.left_out, *found.others))
        _check_some(found)
        return found, listed
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        said = "".join(c if c.isprintable() else "?" for c in str(error))  # a stranger's names are among it
        said = said if len(said) <= 500 else said[:500] + " …"
        raise DeltaFileError(f"{path} is not a delta that can be read: {said}") from error


def _contents(path: Path) -> tuple[Any, Mapping[str, str]]:
    """(names and tensors, metadata)."""
    with open(path, "rb") as file:
        start = file.read(9)
    if _torch_zip.is_zip(start):
        tree = _torch_zip.read(path)
        note = tree.get("customdiff") if isinstance(tree, Mapping) else None
        return tree, {"customdiff": note} if isinstance(note, str) else {}
    if _torch_zip.is_legacy(start):
        raise ValueError(
            "it is a pickle of PyTorch before 1.6 or of another program; where you trust it, load it with "
            "PyTorch and torch.save its tensors again"
        )
    return _safetensors.read(path)


def _parse(tree: Any, text: Mapping[str, str], stem: str) -> LoadedDelta:
    if text.get("format") == own.FORMAT:
        return own.parse(tree, text)
    if text.get("format", "").startswith(own.FORMAT):  # else the one tensor of a residual is read as a word
        raise ValueError(f"its metadata says that it is a {text['format']}")
    if not isinstance(tree, Mapping):
        raise ValueError(f"it holds a {type(tree).__name__}, where a delta is a dict of tensors")
    found = (
        published.parse_delta_bin(tree)
        or published.parse_compvis(tree)
        or processors.parse(tree)
        or lora.parse(tree, text)
        or tokens.parse({name: value for name, value in tree.items() if name != "customdiff"}, stem)
    )
    if found is not None and found.others and not found.weights:
        # a change and whole weights do not go together, and without keys and values nothing says which it is
        found = replace(found, others={}, left_out=(*found.left_out, *map(str, found.others)))
    if found is None:
        raise ValueError(
            f"it has none of the layouts that are known (docs/formats.md): its metadata does not say "
            f"format={own.FORMAT!r}, and its names are {sorted(map(str, tree))[:3]}"
        )
    return found


def _checked(found: LoadedDelta) -> LoadedDelta:
    """``found`` with memory of its own, after a look at every tensor."""
    if isinstance(found.delta, LowRankDelta):
        pairs = {}
        for name, (u, v) in found.delta.factors.items():
            pairs[name] = (_own(f"{name} u", u), _own(f"{name} v", v))
        found.delta = LowRankDelta(found.delta.segments, pairs)
    elif found.delta:
        found.delta = _matrices(found.delta)
    if found.weights:
        found.weights = _matrices(found.weights)
    check_other_names(found.others)
    found.others = {name: _own(name, value) for name, value in found.others.items()}
    for word, rows in found.modifier_tokens.items():
        if not isinstance(word, str) or not word:
            got = "an empty one" if word == "" else type(word).__name__
            raise TypeError(f"its modifier tokens must be words, got {got}")
        single = not isinstance(rows, (list, tuple))
        copies = tuple(_row(word, row) for row in ([rows] if single else rows))
        if not copies:
            raise ValueError(f"its modifier token {word!r} has no embedding")
        found.modifier_tokens[word] = copies[0] if len(copies) == 1 else copies
    return found


def _check_some(found: LoadedDelta) -> None:
    if not (found.delta or found.weights or found.modifier_tokens or found.others):
        raise ValueError("it holds neither key and value weights nor a modifier token")


def _matrices(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    check_matrices("its weights", matrices)
    return {name: _own(name, matrix) for name, matrix in matrices.items()}


def _row(word: str, row: Any) -> Tensor:
    label = f"its embedding of {word!r}"
    _checks.is_tensor(label, row)
    if row.dim() == 2 and row.shape[0] == 1:
        row = row[0]
    if row.dim() != 1 or not row.numel():
        raise ValueError(f"{label} must have shape (E,), got {tuple(row.shape)}")
    return _own(label, row)


def _own(label: str, tensor: Tensor) -> Tensor:
    _checks.floating(label, tensor)
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{label} is not finite")
    return tensor
