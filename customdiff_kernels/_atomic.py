"""Files and folders that appear at their path whole, or not at all.

What is written lies beside the path as ``.<name>.<host>.<process>.<random>.customdiff-tmp`` until it is whole
and on the disk. Names of their own keep two savers of one path apart without locks, which not every file
system has; what a killed process left is known by its number and goes with the next save of that path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_SUFFIX = ".customdiff-tmp"


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which replaces ``path`` when the block ends well and vanishes when it does not."""
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.absolute().parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which replaces the folder ``path`` when the block ends well."""
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder in (temporary, *(entry for entry in temporary.rglob("*") if entry.is_dir())):
            _sync(folder)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _exchange(temporary, path)  # afterwards the old folder bears the temporary name
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.absolute().parent)


def _beside(path: Path) -> Path:
    """A name for what will be ``path``, after what killed processes left of it is gone."""
    start = f".{path.name.encode()[:100].decode(errors='ignore')}.{socket.gethostname()[:60]}."
    if path.absolute().parent.is_dir():
        for name in os.listdir(path.absolute().parent):
            process = name.removeprefix(start).partition(".")[0]
            if (
                name.startswith(start)
                and name.endswith(_SUFFIX)
                and process.isdecimal()
                and _is_dead(int(process))
            ):
                left = path.with_name(name)
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f"{start}{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OverflowError, PermissionError):
        return False
    return False


def _exchange(first: Path, second: Path) -> None:
    """Swap two names in one step (Linux; ``os`` has no call for it)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(first), os.fsencode(second)
    if rename is None or rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        code = ctypes.get_errno() if rename else errno.ENOSYS
        raise OSError(
            code, f"cannot replace a folder here ({os.strerror(code)}); name a new one", str(second)
        )


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
