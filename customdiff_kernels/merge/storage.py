"""A factor on disk: what ``MergeSolver.save`` writes and ``MergeSolver.load`` reads.

One safetensors file with L (E,E) float64, and as metadata the JSON text of ridge, number of rows, key and
library version, and a sha256 of all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _safetensors

FORMAT = "customdiff merge factor 1"
_FIELDS = ("ridge", "rows", "key", "library_version")


class MergeFactorFileError(ValueError):
    """A file that is not a whole factor, or one of another base model or other captions."""


def write(path: Path, factor: Tensor, ridge: float, rows: int, key: Mapping[str, str]) -> None:
    from .. import __version__

    check_key(key)
    factor = factor.cpu().contiguous()
    fields = dict(zip(_FIELDS, (ridge, rows, dict(key), __version__), strict=True))
    text = {"format": FORMAT} | {name: json.dumps(value) for name, value in fields.items()}
    text["content_sha256"] = _content_hash(factor, text)
    _safetensors.write(path, {"factor": factor}, text)


def read(path: Path, key: Mapping[str, str]) -> tuple[Tensor, float, int]:
    """(L, ridge, rows) of a file that ``write`` made with at least the entries of ``key``."""
    check_key(key)
    if not path.is_file():
        raise FileNotFoundError(f"there is no factor file at {path}")
    try:
        tensors, text = _safetensors.read(path)
        factor, fields = _parse(tensors, text)
    except (TypeError, ValueError, RecursionError) as error:
        raise MergeFactorFileError(f"{path} is not a merge factor that can be read: {error}") from error
    for name, value in key.items():
        if (found := fields["key"].get(name)) != value:
            raise MergeFactorFileError(
                f"{path} is of another {name}: {found!r}, and {value!r} is wanted; factor anew by "
                "MergeSolver(reg_features) and save it"
            )
    return factor, fields["ridge"], fields["rows"]


def check_key(key: Mapping[str, str]) -> None:
    if not isinstance(key, Mapping) or not all(
        isinstance(text, str) for pair in key.items() for text in pair
    ):
        raise TypeError(f"key must map strings to strings, got {key!r}")


def _parse(tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> tuple[Tensor, dict[str, Any]]:
    if text.get("format") != FORMAT:
        raise ValueError(f"its metadata does not say format={FORMAT!r}")
    if text.keys() != {"format", "content_sha256", *_FIELDS} or tensors.keys() != {"factor"}:
        raise ValueError(f"it holds {sorted(tensors)} and says {sorted(text)}")
    factor = tensors["factor"]
    if factor.dtype is not torch.float64 or factor.dim() != 2 or factor.shape[0] != factor.shape[1]:
        raise ValueError(f"its factor must be (E,E) float64, got {tuple(factor.shape)} {factor.dtype}")
    if text["content_sha256"] != _content_hash(factor, text):
        raise ValueError("its content was altered (the checksum differs)")
    fields = {name: json.loads(text[name]) for name in _FIELDS}
    check_key(fields["key"])
    ridge, rows = fields["ridge"], fields["rows"]
    if type(ridge) is not float or not 0 <= ridge < math.inf or type(rows) is not int or rows < 1:
        raise ValueError(f"it says ridge {ridge!r} and rows {rows!r}")
    if not (bool(torch.isfinite(factor).all()) and bool((factor.diagonal() > 0).all())):
        raise ValueError("its factor is not a finite triangle with a positive diagonal")
    return factor, fields


def _content_hash(factor: Tensor, text: Mapping[str, str]) -> str:
    described = sorted((name, value) for name, value in text.items() if name != "content_sha256")
    digest = hashlib.sha256(json.dumps([described, list(factor.shape)]).encode())
    digest.update(_safetensors.data_bytes(factor))
    return digest.hexdigest()
