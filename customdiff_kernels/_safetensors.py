"""The safetensors format, read and written with torch alone.

8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data without
gaps. Everything that a file says is checked against its size before a byte of data is used.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # as the format's own library


class FormatError(ValueError):
    """Not a whole, valid safetensors file; the message says what is wrong."""


def data_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor as a buffer; ``tensor`` must outlive it."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: whole under another name in the same folder, flushed to disk, then renamed over
    ``path``.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    names = sorted(plain, key=lambda name: (-plain[name].dtype.itemsize, name))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + plain[name].nbytes
        header[name] = {
            "dtype": NAMES[plain[name].dtype],
            "shape": list(plain[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(data_bytes(plain[name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises FormatError for anything that is not a whole, valid file."""
    with open(path, "rb") as file:
        header, size = _header(file)
        entries = _entries(header, size)
        data = bytearray(size)
        if file.readinto(data) != size:
            raise FormatError("it changed while it was read")
    tensors = {}
    for name, (dtype, shape, start, end) in entries.items():
        raw = (
            torch.frombuffer(data, dtype=torch.uint8, count=end - start, offset=start)
            if end > start
            else None
        )
        tensors[name] = (
            torch.empty(shape, dtype=dtype) if raw is None else raw.clone().view(dtype).view(shape)
        )
    return tensors, header.get("__metadata__", {})


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The parsed header and the size of the data after it."""
    total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if total < 8 or not 2 <= length <= min(MAX_HEADER, total - 8):
        raise FormatError(f"{total} bytes do not hold the header of {length} bytes that they announce")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise FormatError(f"its header is a JSON {type(header).__name__}, not an object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("its metadata is not a map of strings")
    return header, total - 8 - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("its header names a thing twice")
    return found


def _entries(header: dict[str, Any], size: int) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """{name: (dtype, shape, start, end)}, tiling the ``size`` bytes of data."""
    entries = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise FormatError(f"tensor {name!r} has the unknown dtype {dtype!r}")
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise FormatError(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
        if len(shape) > 8 or math.prod(max(n, 1) for n in shape) >= 2**48:
            raise FormatError(f"tensor {name!r} has the impossible shape {shape!r}")
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != needed:
            raise FormatError(f"tensor {name!r} of {needed} bytes has {offsets[1] - offsets[0]}")
        entries[name] = (DTYPES[dtype], shape, *offsets)
    end = 0
    for start, stop in sorted((start, stop) for _, _, start, stop in entries.values()):
        if start != end:
            raise FormatError(f"its tensors overlap or leave a gap at byte {end} of the data")
        end = stop
    if end != size:
        raise FormatError(
            f"its tensors have {end} bytes and the file holds {size}: it is truncated or has a tail"
        )
    return entries


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)
