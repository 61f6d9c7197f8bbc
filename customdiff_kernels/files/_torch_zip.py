"""What ``torch.save`` wrote, from strangers: a zip archive of a pickle and of the tensors' bytes.

It is unpickled by ``torch.load(weights_only=True)`` alone, after the archive was found whole and its pickle
found to name nothing but tensors and containers. ``weights_only`` by itself runs no code, yet it lets a file
of a few bytes ask for any amount of memory (``bytearray(10**12)``), and it believes a tensor's declared size.
What refers to one value many times over is small in the file and of any size to who walks it: it is measured
before it is hashed, and before it is looked at.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in _KINDS),
}
# What a pickle puts into its memo and takes out again at no cost: no tuples, which are hashed as dict keys.
_CHEAP = {"GLOBAL", "BINUNICODE", "SHORT_BINSTRING", "EMPTY_DICT", "EMPTY_LIST", "REDUCE"}
_MOST_STEPS = 10**8  # of hashing; seconds
_MOST_VALUES = 3 * 10**6  # and characters, each counted as often as it is referred to
_MOST_TIMES = 8  # the file's bytes


def is_zip(start: bytes) -> bool:
    return start.startswith(b"PK\x03\x04")


def is_legacy(start: bytes) -> bool:
    """Whether a file begins as ``torch.save`` wrote before PyTorch 1.6, or as any other bare pickle."""
    # safetensors may begin alike, with the length of its header, and then has a brace
    return start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[8:] != b"{"


def write(file: IO[bytes], tree: dict[str, Any]) -> None:
    torch.save(tree, file)


def read(path: Path) -> Any:
    """The saved object; its tensors are views of the file. Raises ValueError for what is refused."""
    _check_program(_program(path))
    try:
        # mmap: a tensor that declares more than its record holds then ends at the file's end, and not in
        # whatever memory comes after
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler of a malformed program stumbles over
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"torch.load(weights_only=True) refuses it ({type(error).__name__}: {first})"
        ) from error
    _check_tensors(tree, path.stat().st_size)
    return tree


def _program(path: Path) -> bytes:
    """The pickle in the archive, all of whose records are there, uncompressed, with the right checksum."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("it is a compressed archive, which torch.save does not write")
            if sum(record.file_size for record in records) > size:
                raise ValueError(f"its records claim more than the file's {size:,} bytes")
            names = [record.filename for record in records]
            pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
            # torch looks records up in either case: of two that differ in that alone it may read the other
            if len(pickles) != 1 or len({name.lower() for name in names}) != len(names):
                raise ValueError("it is a zip archive, and not of torch.save")
            if damaged := archive.testzip():
                raise ValueError(f"its record {damaged!r} does not match its checksum: it is damaged")
            return archive.read(pickles[0])
    except ValueError:
        raise
    except Exception as error:  # zipfile has no one exception for malformed archives
        raise ValueError(f"not a whole archive of torch.save ({type(error).__name__}: {error})") from error


def _check_program(program: bytes) -> None:
    """It names what is allowed alone, and no tuple in it takes more than ``_MOST_STEPS`` to hash: one that is
    memoized holds at most what was pushed before it.
    """
    steps, sizes, previous = 0, {}, ""
    try:
        for opcode, argument, _ in pickletools.genops(program):
            steps += 1
            if opcode.name.endswith("PUT") and previous not in _CHEAP:
                sizes[argument] = steps
            elif opcode.name.endswith("GET"):
                steps += sizes.get(argument, 0)
            if steps > _MOST_STEPS:
                raise ValueError("its pickle repeats one tuple without end, and is refused")
            previous = opcode.name
            if opcode.name in ("GLOBAL", "INST") and argument not in _ALLOWED:
                raise ValueError(
                    f"it is a pickle that names {str(argument).replace(' ', '.')}, and is refused: of a "
                    "stranger's file only tensors are read. Where you trust it, load it with PyTorch and "
                    "save its tensors alone, best as safetensors"
                )
    except (IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"its pickle is malformed ({error})") from error


def _check_tensors(tree: Any, size: int) -> None:
    """The tree ends, every tensor is dense and no larger than its bytes in the file, whatever size and stride
    it claims, and all together are little more than the file's ``size``: tensors may be tied.
    """
    waiting, count, claimed = [tree], 0, 0
    while waiting:
        value = waiting.pop()
        count += 1 + (len(value) if isinstance(value, str) else 0)
        if count + len(waiting) > _MOST_VALUES:
            raise ValueError("it holds one value within itself, or so often that there is no end to it")
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_quantized:
                raise ValueError(f"it holds a {value.layout} tensor, and only dense ones are read")
            if value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(
                    f"it holds a tensor that claims {value.nbytes:,} bytes and has "
                    f"{value.untyped_storage().nbytes():,}"
                )
            claimed += value.nbytes
            if claimed > _MOST_TIMES * size:
                raise ValueError(f"its tensors are more than {_MOST_TIMES} times its {size:,} bytes")
        elif isinstance(value, dict):
            waiting += value
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
