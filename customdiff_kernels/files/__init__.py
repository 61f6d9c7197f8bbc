"""A concept on disk, in our format and in the published ones: see docs/formats.md."""

from .loaded import BaseMismatchError, DeltaFileError, LoadedDelta, apply_delta
from .loading import load_delta
from .saving import save_delta

__all__ = ["BaseMismatchError", "DeltaFileError", "LoadedDelta", "apply_delta", "load_delta", "save_delta"]
