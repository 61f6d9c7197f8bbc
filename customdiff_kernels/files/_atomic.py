"""Files and folders that appear at their path whole, or not at all.

What is written lies beside the path as ``.<name>.customdiff-tmp`` until it is whole and on the disk. The name
is always the same, so what a killed process leaves is overwritten by the next save; a lock, which dies with
its process, keeps two savers of one path apart.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which replaces ``path`` when the block ends well and vanishes when it does not."""
    temporary = _beside(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(_locked(temporary, flags), "wb") as file:
        try:
            file.truncate(0)
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
    lock = _locked(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for entry in list(temporary.iterdir()):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield temporary
        for folder in (temporary, *(entry for entry in temporary.rglob("*") if entry.is_dir())):
            _sync(folder)
        if path.exists():
            _exchange(temporary, path)  # afterwards the old folder bears the temporary name
            shutil.rmtree(temporary)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    _sync(path.absolute().parent)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.customdiff-tmp")


def _locked(temporary: Path, flags: int) -> int:
    """A descriptor of ``temporary``, made if need be, that this process alone holds locked."""
    while True:
        if flags & os.O_DIRECTORY:
            temporary.mkdir(exist_ok=True)
        descriptor = os.open(temporary, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # another saver may have renamed it to its path while this one waited for the lock
            if _is_at(descriptor, temporary):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _exchange(first: Path, second: Path) -> None:
    """Swap two names in one step (Linux; ``os`` has no call for it)."""
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    names = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(
            code, f"cannot replace a folder here ({os.strerror(code)}); name a new one", str(second)
        )


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
