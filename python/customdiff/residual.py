"""A residual: what turns a word of the prompt into one subject (Cones 2, section 3.2).

It is the mean shift of the word's tokens in the text encoder's output (equation 5), a few KB, and is added to
them in any prompt (equation 6): no weight changes, so any number of them meet in one picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import customdiff_kernels as ck

from .concept import Rows, check_base, text_encoders
from .data import replacing
from .subjects import find_subject

FORMAT = "customdiff residual"
VERSION = 1


@dataclass(frozen=True, eq=False)
class Residual:
    """The subject that ``word`` is to mean.

    shift: (tokens,E) float32 on the CPU, for each token of the word what is added to its features; (E,) is
        taken for one token.
    metadata: what JSON can hold; among it ``base_metadata`` of the base model, whose text encoder it is of.
    """

    word: str
    shift: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.word, str) or not self.word.strip():
            raise ValueError(f"word must be the subject's, as 'dog', got {self.word!r}")
        if not isinstance(self.shift, Tensor) or not self.shift.is_floating_point():
            raise TypeError(f"shift must be a floating tensor, got {_kind(self.shift)}")
        if self.shift.ndim not in (1, 2) or not self.shift.numel():
            raise ValueError(f"shift must be (tokens, E), got {tuple(self.shift.shape)}")
        if not self.shift.isfinite().all():
            raise ValueError(f"shift of {self.word!r} is not finite")
        plain = self.shift.detach().to("cpu", torch.float32).view(-1, self.shift.shape[-1])
        object.__setattr__(self, "shift", plain.clone())

    @classmethod
    def load(cls, path: str | PathLike, word: str | None = None) -> Residual:
        """Read a file that ``save`` wrote, or the tensor that the published code of Cones 2 saves (.pt).

        word: of the subject; a .pt does not know it, and one of ours is then taken for another word.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: naming the file, if it is not a residual, not whole, altered, or lacks ``word``.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no residual file at {path}")
        try:
            own, shift, metadata = _read(path)
            if word is None and own is None:
                raise ValueError("it does not know its word: give word=, as 'dog'")
            return cls(word or own or "", shift, metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(f"residual file {str(path)!r}: {error}") from error

    def save(self, path: str | PathLike) -> None:
        """Write a safetensors file, whole or not at all: 4 bytes a number, and the metadata."""
        from safetensors.torch import save_file

        try:
            metadata = json.dumps(self.metadata, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata must be what JSON can hold ({error})") from error
        header = {"format": FORMAT, "version": str(VERSION), "word": self.word, "metadata": metadata}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({"shift": self.shift}, partial, header | {"sha256": _checksum(self.shift, header)})

    def check_base(self, stack: ck.KVStack) -> None:
        """Raise ck.BaseMismatchError unless ``stack`` is of the base model that it was learned with."""
        check_base(f"residual {self.word!r}", self.metadata, stack)


def add_residuals(
    pipe: Any,
    prompts: Sequence[str],
    context: Tensor,
    rows: Sequence[Mapping[str, Residual]],
    modifiers: Sequence[Rows] | None = None,
) -> Tensor:
    """``context`` (B,S,E) of ``prompts`` with each row's residuals at their subjects' tokens (equation 6).

    rows: a mapping for each prompt, {subject as ``find_subject`` takes it: its residual}; {} for none.
    modifiers: each prompt's modifier tokens, where it has a Custom Diffusion concept as well.

    Raises ValueError, naming the subject, if the prompt lacks it, two subjects share a token, or a residual
    does not fit its word or the text encoder.
    """
    if any(rows) and len(text_encoders(pipe)) > 1:
        raise ValueError(
            "residuals are of one text encoder, and this pipeline (SDXL) has two: use SD 1.x or 2.x"
        )
    context = context.clone()
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        taken: dict[int, str] = {}
        for name, residual in row.items():
            at = find_subject(pipe.tokenizer, prompt, name, modifiers[i] if modifiers else ())
            tokens, width = residual.shift.shape
            if width != context.shape[2]:
                raise ValueError(
                    f"subject {name!r}: its residual is {width} wide and the features of this text encoder "
                    f"{context.shape[2]}: it is of another base model"
                )
            if tokens != len(at):
                raise ValueError(
                    f"subject {name!r}: its residual, of {residual.word!r}, is for {tokens} tokens, and the "
                    f"subject is {len(at)} in the prompt {prompt!r}; name the subject by the residual's word"
                )
            if shared := [other for p, other in taken.items() if p in at]:
                raise ValueError(f"subjects {shared[0]!r} and {name!r} are the same word of {prompt!r}")
            taken |= dict.fromkeys(at, name)
            context[i, list(at)] += residual.shift.to(context)
    return context


def _read(path: Path) -> tuple[str | None, Tensor, dict[str, Any]]:
    """(word, shift, metadata) of a file of ours or a published one. Raises ValueError where it is neither."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] != b"{":  # of a safetensors header
        return None, _read_published(path), {}
    try:
        with safe_open(path, "pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
            if header.get("format") != FORMAT:
                raise ValueError("it is no residual; a concept's file is for concepts")
            if header.get("version") != str(VERSION):
                raise ValueError(
                    f"it has version {header.get('version')!r}, and this library reads {VERSION}"
                )
            if names != ["shift"]:
                raise ValueError(f"it must hold the tensor 'shift' alone, and holds {names[:3]}")
            shift = file.get_tensor("shift")
    except SafetensorError as error:
        raise ValueError(f"it is not a whole safetensors file ({error})") from error
    if header.pop("sha256", None) != _checksum(shift, header):
        raise ValueError("its content does not match the checksum that it was saved with: it is damaged")
    metadata = json.loads(header.get("metadata", "null"))
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is malformed")
    return header.get("word"), shift, metadata


def _read_published(path: Path) -> Tensor:
    """The tensor of a file of ``torch.save``, (E,) or (1,…,tokens,E)."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler of a malformed file stumbles over
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"it is no residual: torch.load(weights_only=True) refuses it ({first})") from error
    if not isinstance(found, Tensor) or found.ndim == 0 or any(n != 1 for n in found.shape[:-2]):
        raise ValueError(f"it must hold one tensor (tokens, E), and holds {_kind(found)}")
    return found.reshape(-1, found.shape[-1])


def _kind(thing: object) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}, {str(thing.dtype).removeprefix('torch.')}"
    return type(thing).__name__


def _checksum(shift: Tensor, header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    digest.update(shift.numpy().tobytes())
    return digest.hexdigest()
