"""Where a result goes: looked at before the work, so that the work is not lost after it."""

from __future__ import annotations

import os
from pathlib import Path


def nearest_folder(path: Path) -> Path:
    """What exists nearest above `path`: a folder, or a file in the way."""
    return next(folder for folder in path.absolute().parents if os.path.lexists(folder))


def check_writable(file: Path, folder: bool = False) -> None:
    """Raises before the work what writing `file`, or a `folder`, would raise after it; makes nothing."""
    if file.is_dir():
        if not folder:
            raise ValueError(f"output {str(file)!r} is a folder; name a file")
        file /= "file"
    nearest = nearest_folder(file)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"output {str(file)!r} cannot be written: {str(nearest)!r} is no folder to write to")
