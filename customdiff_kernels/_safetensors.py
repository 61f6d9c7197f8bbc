"""Delta files as safetensors: read by the format's own library, written here.

Its writer needs numpy, refuses tensors that share memory (a merged delta's segments share their right
factor) and does not replace a file atomically. The format itself is 8 bytes of little-endian header length, a
JSON header {name: {dtype, shape, data_offsets}} and the data without gaps.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def data_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor as a buffer; ``tensor`` must outlive it."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous floating CPU tensors atomically: whole under another name in the same folder, flushed
    to disk, then renamed over ``path``.
    """
    # wide dtypes first: every tensor stays aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        offsets = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": _DTYPES[tensor.dtype], **offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(data_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors with memory of their own, metadata). Raises ValueError for anything but a whole file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a whole safetensors file ({error})") from error
