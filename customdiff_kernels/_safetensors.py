"""safetensors files: read by the format's own library, written here.

Its writer needs numpy, refuses tensors that share memory (a merged delta's segments share their right
factor) and does not replace a file atomically. The format itself is 8 bytes of little-endian header length, a
JSON header {name: {dtype, shape, data_offsets}} and the data without gaps.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _atomic

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",  # the rest: of a whole checkpoint, which is copied but for its keys and values
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def data_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor as a buffer; ``tensor`` must outlive it."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write CPU tensors atomically."""
    # wide dtypes first: every tensor stays aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}, which is not written to safetensors")
        start, end = end, end + tensor.nbytes
        offsets = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": _DTYPES[tensor.dtype], **offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _atomic.new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].contiguous()
            file.write(data_bytes(tensor))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, which may be views of the file, and metadata). Raises ValueError for what is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a whole safetensors file ({error})") from error
