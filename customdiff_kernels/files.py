"""A concept on disk: ``save_delta``, ``load_delta``, ``apply_delta``.

One safetensors file. Tensors: ``<segment>.u`` and ``<segment>.v`` for low-rank factors or ``<segment>`` for a
full change, and ``modifier_token.<word>``, the word's embedding (E,) (``modifier_token_2.<word>`` for a
second text encoder, and so on). Metadata: JSON text, described at ``save_delta``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, _safetensors
from .low_rank import LowRankDelta, reconstruct
from .stack import KVStack, Segment, check_matrices, tile

FORMAT, FORMAT_VERSION = "customdiff", 1
_TOKEN = re.compile(r"modifier_token(?:_([2-9]|[1-9]\d+))?\.(.+)", re.DOTALL)
_OURS = ("format", "format_version", "library_version", "kind", "segments", "content_sha256")
_KNOWN: dict[str, tuple[type | tuple[type, ...], str]] = {
    "base_name": (str, "a string"),
    "prompt": (str, "a string"),
    "training": (dict, "a dict"),
    "resolution": ((int, list, tuple), "an integer or [height, width]"),
}

ModifierTokens = Mapping[str, Tensor | Sequence[Tensor]]


class DeltaFileError(ValueError):
    """A file that is not a whole delta which this version can read."""


class BaseMismatchError(ValueError):
    """The delta was made for other base weights than those it is applied to."""


@dataclass
class LoadedDelta:
    """What a file holds.

    delta: a ``LowRankDelta``, or {segment name: (rows,E)} for a full change.
    modifier_tokens: {word: embedding (E,)}; a tuple of embeddings where there are several text encoders.
    metadata: what ``save_delta`` was given, and format_version and library_version.
    """

    delta: LowRankDelta | dict[str, Tensor]
    modifier_tokens: dict[str, Tensor | tuple[Tensor, ...]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def save_delta(
    delta: LowRankDelta | Mapping[str, Tensor],
    path: str | PathLike[str],
    *,
    modifier_tokens: ModifierTokens | None = None,
    **metadata: Any,
) -> Path:
    """Write a change of the weights to ``path``; returns the path.

    delta: a ``LowRankDelta``, a ``KVStack`` difference, or {segment name: change (rows,E)}.
    modifier_tokens: {word: its embedding (E,)}, or a sequence of them, one for each text encoder.
    metadata: ``base_hash`` (``KVStack.hash()`` of the base: what loading checks), ``base_name``,
        ``resolution``, ``prompt``, ``training`` (the configuration, a dict), and whatever else JSON can hold.
        None is left out.

    The write is atomic: a crash at any moment leaves the old file or the new one, whole.
    Raises TypeError or ValueError naming the argument, before anything is written, and OSError from the disk.
    """
    from . import __version__

    path = Path(path)
    tensors, segments, kind = _delta_tensors(delta)
    tensors.update(_token_tensors(modifier_tokens or {}))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite; it is not saved")
    fields = {name: value for name, value in metadata.items() if value is not None}
    _check_metadata(fields)
    fields |= {"kind": kind, "segments": [list(segment) for segment in segments]}
    fields |= {"format_version": FORMAT_VERSION, "library_version": __version__}
    text = {"format": FORMAT} | {name: json.dumps(value) for name, value in fields.items()}
    text["content_sha256"] = json.dumps(_content_hash(tensors, text))
    _safetensors.write(path, tensors, text)
    return path


def load_delta(path: str | PathLike[str]) -> LoadedDelta:
    """Read what ``save_delta`` wrote, whatever the file's name, to the CPU.

    Raises FileNotFoundError where there is no file, DeltaFileError where it is not a delta, not whole,
    altered, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no delta file at {path}" + (": it is a folder" if path.is_dir() else "")
        )
    try:
        tensors, text = _safetensors.read(path)
        if text.get("format") != FORMAT:
            raise DeltaFileError(f"its metadata does not say format={FORMAT!r} (it has {sorted(text)[:5]})")
        return _parse(tensors, text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DeltaFileError(f"{path} is not a delta that can be read: {error}") from error


def apply_delta(
    unet: nn.Module, loaded: LoadedDelta, *, scale: float = 1.0, force: bool = False
) -> list[str]:
    """Add a loaded delta to the keys and values of ``unet``; returns the names of the weights that it
    changed.

    Raises BaseMismatchError where the UNet's key/value weights are not those that the delta was made for
    (another model, or another delta on it), unless ``force``; ValueError for segments that the UNet does not
    have, and where there is nothing to apply. Everything is checked before anything is written.
    """
    if not isinstance(loaded, LoadedDelta):
        raise TypeError(f"loaded must be what load_delta returns, got {type(loaded).__name__}")
    base, delta = KVStack.from_unet(unet), loaded.delta
    if not force:
        _check_base(base, loaded.metadata)
    if isinstance(delta, LowRankDelta):
        delta = delta.to(base.weight.device)
        changed = [segment.name for segment in delta.segments if delta.rank(segment.name)]
    else:
        delta = {name: change.to(base.weight.device) for name, change in delta.items()}
        changed = [name for name, change in delta.items() if bool(change.any())]
    with torch.no_grad():
        merged = reconstruct(base, delta, scale)
    if not changed or scale == 0:
        raise ValueError(
            "the delta changes nothing: every segment is zero" if scale else "scale=0 changes nothing"
        )
    merged.load_into(unet)
    return changed


def _delta_tensors(
    delta: LowRankDelta | Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[Segment], str]:
    if isinstance(delta, LowRankDelta):
        tensors = {}
        for name, (u, v) in delta.factors.items():
            tensors[f"{name}.u"], tensors[f"{name}.v"] = u, v
        kind, segments = "low_rank", list(delta.segments)
    else:
        check_matrices("delta", delta)
        tensors, kind, segments, start = dict(delta), "full", [], 0
        for name, change in delta.items():
            segments.append(Segment(name, start, start + len(change)))
            start += len(change)
    if empty := [segment for segment in segments if not segment.name]:
        raise ValueError(f"delta has a segment without a name, rows {empty[0].start} to {empty[0].stop}")
    for name in tensors:
        if _TOKEN.fullmatch(name) or name == "__metadata__":
            raise ValueError(f"delta would be stored as {name!r}, which the file format keeps for itself")
    return tensors, segments, kind


def _token_tensors(modifier_tokens: ModifierTokens) -> dict[str, Tensor]:
    if not isinstance(modifier_tokens, Mapping):
        raise TypeError(f"modifier_tokens must map words to embeddings, got {type(modifier_tokens).__name__}")
    tensors = {}
    for word, embeddings in modifier_tokens.items():
        if not isinstance(word, str) or not word:
            raise TypeError(f"modifier_tokens must have words as keys, got {word!r}")
        label = f"modifier_tokens[{word!r}]"
        rows = [embeddings] if isinstance(embeddings, Tensor) else list(embeddings)
        if not rows:
            raise ValueError(f"{label} must be an embedding, or one a text encoder, got none")
        for i, embedding in enumerate(rows):
            _checks.is_tensor(label, embedding)
            _checks.floating(label, embedding)
            if embedding.dim() != 1:
                raise ValueError(f"{label} must have shape (E,), got {tuple(embedding.shape)}")
            tensors[f"modifier_token{'' if i == 0 else f'_{i + 1}'}.{word}"] = embedding
    return tensors


def _check_metadata(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in _OURS:
            raise ValueError(f"metadata {name!r} is written by the library and cannot be given")
        kinds, wanted = _KNOWN.get(name, (object, ""))
        if not isinstance(value, kinds):
            raise TypeError(f"metadata {name!r} must be {wanted}, got {value!r}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"metadata {name!r} must be what JSON can hold, got {value!r} ({error})"
            ) from error
    base_hash = fields.get("base_hash")
    if base_hash is not None and not (
        isinstance(base_hash, str) and re.fullmatch(r"[0-9a-f]{64}", base_hash)
    ):
        raise ValueError(
            f"metadata 'base_hash' must be a KVStack.hash() (64 hexadecimal digits), got {base_hash!r}"
        )


def _content_hash(tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> str:
    """sha256 of the metadata and of every tensor, contiguous on the CPU: a flipped bit is an error and not a
    strange picture.
    """
    described = sorted((name, value) for name, value in text.items() if name != "content_sha256")
    digest = hashlib.sha256(json.dumps(described).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_safetensors.data_bytes(tensor))
    return digest.hexdigest()


def _parse(tensors: dict[str, Tensor], text: Mapping[str, str]) -> LoadedDelta:
    fields = {name: json.loads(value) for name, value in text.items() if name != "format"}
    version = fields.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"it has format_version {version!r}, this library reads 1 to {FORMAT_VERSION}: update it"
        )
    found = fields.pop("content_sha256", None)
    if found != _content_hash(tensors, text):
        raise ValueError("its content does not match the checksum that it was saved with: it is damaged")
    segments = _parse_segments(fields.pop("segments", None))
    words: dict[str, dict[int, Tensor]] = {}
    for name in list(tensors):
        if token := _TOKEN.fullmatch(name):
            number, word = token.groups()
            words.setdefault(word, {})[int(number or 1)] = tensors.pop(name)
    for word, rows in words.items():
        if sorted(rows) != list(range(1, len(rows) + 1)):
            raise ValueError(f"its modifier token {word!r} is there for text encoders {sorted(rows)} only")
    tokens = {word: tuple(rows[i] for i in sorted(rows)) for word, rows in words.items()}
    kind = fields.pop("kind", None)
    suffixes = {"low_rank": (".u", ".v"), "full": ("",)}.get(kind)
    if suffixes is None:
        raise ValueError(f"it has kind {kind!r}, which is neither 'low_rank' nor 'full'")
    expected = {segment.name + suffix for segment in segments for suffix in suffixes}
    if tensors.keys() != expected:
        raise ValueError(
            f"its tensors are not those of its segments: unknown {sorted(tensors.keys() - expected)[:3]}, "
            f"missing {sorted(expected - tensors.keys())[:3]}"
        )
    delta: LowRankDelta | dict[str, Tensor]
    if kind == "low_rank":
        delta = LowRankDelta(
            segments, {s.name: (tensors[f"{s.name}.u"], tensors[f"{s.name}.v"]) for s in segments}
        )
    else:
        delta = {segment.name: tensors[segment.name] for segment in segments}
        check_matrices("the delta", delta)
        for name, start, stop in segments:
            if len(delta[name]) != stop - start:
                raise ValueError(
                    f"its segment {name!r} has {len(delta[name])} rows and announces {stop - start}"
                )
    _check_metadata({name: value for name, value in fields.items() if name not in _OURS})
    return LoadedDelta(
        delta, {word: rows[0] if len(rows) == 1 else rows for word, rows in tokens.items()}, fields
    )


def _parse_segments(value: object) -> tuple[Segment, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("it does not say which segments it changes")
    for segment in value:
        if not (isinstance(segment, list) and [type(part) for part in segment] == [str, int, int]):
            raise ValueError(f"its segments must be [name, start, stop], got {segment!r}")
    return tile(value)


def _check_base(base: KVStack, metadata: Mapping[str, Any]) -> None:
    recorded, name = metadata.get("base_hash"), metadata.get("base_name", "its base")
    if recorded is None:
        raise BaseMismatchError(
            "the delta does not record the base that it was made for: force=True applies it anyway"
        )
    if (found := base.hash()) != recorded:
        raise BaseMismatchError(
            f"the delta was made for {name} (key/value hash {recorded[:12]}…), this UNet has "
            f"{found[:12]}…: another model, a delta on it already, or bfloat16 weights "
            "(load them as float16 or float32). force=True applies it anyway"
        )
