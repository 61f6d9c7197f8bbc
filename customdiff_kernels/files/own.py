"""Our own layout: one safetensors file that holds all that a concept is.

Tensors: ``<segment>.u`` and ``<segment>.v`` for low-rank factors or ``<segment>`` for a full change or whole
weights, and ``modifier_token.<word>``, the word's embedding (E,) (``modifier_token_2.<word>`` for a second
text encoder, and so on), and ``other.<parameter>``, of more than keys and values. Metadata: JSON text,
described at ``save_delta``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import _safetensors
from ..low_rank import LowRankDelta
from ..stack import Segment, check_matrices, tile
from .loaded import LoadedDelta

FORMAT, FORMAT_VERSION = "customdiff", 1
_TOKEN = re.compile(r"modifier_token(?:_([2-9]|[1-9]\d+))?\.(.+)", re.DOTALL)
_OTHER = "other."
_OURS = ("format", "format_version", "library_version", "kind", "segments", "content_sha256")
_KNOWN: dict[str, tuple[type | tuple[type, ...], str]] = {
    "base_name": (str, "a string"),
    "prompt": (str, "a string"),
    "training": (dict, "a dict"),
    "resolution": ((int, list, tuple), "an integer or [height, width]"),
}


def write(loaded: LoadedDelta, path: Path) -> None:
    """Write a checked delta atomically."""
    from .. import __version__

    tensors, segments, kind = _tensors(loaded)
    fields = dict(loaded.metadata)
    fields |= {"kind": kind, "segments": [list(segment) for segment in segments]}
    fields |= {"format_version": FORMAT_VERSION, "library_version": __version__}
    text = {"format": FORMAT} | {name: json.dumps(value) for name, value in fields.items()}
    text["content_sha256"] = json.dumps(content_hash(tensors, text))
    _safetensors.write(path, tensors, text)


def note(loaded: LoadedDelta, files: Mapping[str, str]) -> str:
    """What a file in another layout says beside its tensors: the metadata, a checksum of what it holds, and
    {name: sha256} of the files that lie with it.
    """
    digest = content_hash(_tensors(loaded)[0], {})
    return json.dumps({"metadata": loaded.metadata, "content_sha256": digest, "files": dict(files)})


def parse_note(text: str, found: LoadedDelta) -> dict[str, str]:
    """Puts the note's metadata into what was read with it; returns its files. Raises ValueError where it is
    malformed, or the content another than it was written with.
    """
    fields = json.loads(text)
    metadata, files = (
        (fields.get(name) for name in ("metadata", "files")) if isinstance(fields, dict) else (0, 0)
    )
    if not isinstance(metadata, dict) or not isinstance(files, dict):
        raise ValueError(f"its 'customdiff' note is malformed: {text[:40]!r}")
    for name in files:
        if not re.fullmatch(r"(embeddings/)?[^/.\0][^/\0]*", name):
            raise ValueError(f"its note lists files beyond its folder: {name!r}")
    check_metadata(metadata)
    if fields.get("content_sha256") != content_hash(_tensors(found)[0], {}):
        raise ValueError(
            "its content does not match the checksum that it was saved with: it is damaged, or was edited by "
            "a program that kept its 'customdiff' note; without the note it is read as it is"
        )
    found.metadata = metadata
    return files


def _tensors(loaded: LoadedDelta) -> tuple[dict[str, Tensor], list[Segment], str]:
    delta = loaded.delta
    if isinstance(delta, LowRankDelta):
        tensors = {}
        for name, (u, v) in delta.factors.items():
            tensors[f"{name}.u"], tensors[f"{name}.v"] = u, v
        kind, segments = "low_rank", list(delta.segments)
    else:
        tensors, segments, start = dict(delta or loaded.weights), [], 0
        kind = "weights" if loaded.weights else "full"
        for name, matrix in tensors.items():
            segments.append(Segment(name, start, start + len(matrix)))
            start += len(matrix)
    if empty := [segment for segment in segments if not segment.name]:
        raise ValueError(f"delta has a segment without a name, rows {empty[0].start} to {empty[0].stop}")
    for name in tensors:
        if _TOKEN.fullmatch(name) or name.startswith(_OTHER) or name == "__metadata__":
            raise ValueError(f"delta would be stored as {name!r}, which the file format keeps for itself")
    for word, rows in loaded.modifier_tokens.items():
        for i, row in enumerate([rows] if isinstance(rows, Tensor) else rows):
            tensors[f"modifier_token{'' if i == 0 else f'_{i + 1}'}.{word}"] = row
    tensors |= {_OTHER + name: tensor for name, tensor in loaded.others.items()}
    return tensors, segments, kind


def check_metadata(fields: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for metadata that a file cannot hold."""
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


def content_hash(tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> str:
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


def parse(tensors: dict[str, Tensor], text: Mapping[str, str]) -> LoadedDelta:
    """What a file of this layout holds. Raises TypeError or ValueError where it is not whole."""
    fields = {name: json.loads(value) for name, value in text.items() if name != "format"}
    version = fields.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"it has format_version {version!r}, this library reads 1 to {FORMAT_VERSION}: update it"
        )
    found = fields.pop("content_sha256", None)
    if found != content_hash(tensors, text):
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
    suffixes = {"low_rank": (".u", ".v"), "full": ("",), "weights": ("",)}.get(kind)
    if suffixes is None:
        raise ValueError(f"it has kind {kind!r}, which is none of 'low_rank', 'full' and 'weights'")
    expected = {segment.name + suffix for segment in segments for suffix in suffixes}
    others = {
        name.removeprefix(_OTHER): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(_OTHER) and name not in expected
    }
    if tensors.keys() != expected:
        raise ValueError(
            f"its tensors are not those of its segments: unknown {sorted(tensors.keys() - expected)[:3]}, "
            f"missing {sorted(expected - tensors.keys())[:3]}"
        )
    check_metadata({name: value for name, value in fields.items() if name not in _OURS})
    rows_of = {word: rows[0] if len(rows) == 1 else rows for word, rows in tokens.items()}
    found = LoadedDelta({}, rows_of, fields, others=others)
    if kind == "low_rank":
        found.delta = LowRankDelta(
            segments, {s.name: (tensors[f"{s.name}.u"], tensors[f"{s.name}.v"]) for s in segments}
        )
        return found
    matrices = {segment.name: tensors[segment.name] for segment in segments}
    if not matrices:  # words, or others, alone
        return found
    check_matrices("the delta", matrices)
    for name, start, stop in segments:
        if len(matrices[name]) != stop - start:
            raise ValueError(
                f"its segment {name!r} has {len(matrices[name])} rows and announces {stop - start}"
            )
    if kind == "weights":
        found.weights = matrices
    else:
        found.delta = matrices
    return found


def _parse_segments(value: object) -> tuple[Segment, ...]:
    if not isinstance(value, list):
        raise ValueError("it does not say which segments it changes")
    for segment in value:
        if not (isinstance(segment, list) and [type(part) for part in segment] == [str, int, int]):
            raise ValueError(f"its segments must be [name, start, stop], got {segment!r}")
    return tile(value)
