"""customdiff_kernels: the operations that Custom Diffusion and Cones 2 are made of.

    context (B,S,E) ── kv_project ──► every layer's K, V ── kv_cross_attention(hidden, K, V) ──► hidden

A concept is another K/V for the same frozen UNet. ``kv_project`` computes all layers' keys and values once a
prompt, ``cross_attention`` and ``kv_cross_attention`` use them, ``compress``, ``reconstruct`` and
``MergeSolver`` handle the change of the weights that is the concept, ``patch_unet`` puts all of it into a
diffusers UNet. Every operation is also ``torch.ops.customdiff.*``; each folder's MATH.md has its equations.

Only torch is needed. Triton and diffusers are optional and imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ._backends import build_info, explain
from .cross_attention import cross_attention, score_std
from .files import (
    BaseMismatchError,
    DeltaFileError,
    LoadedDelta,
    apply_delta,
    load_delta,
    save_delta,
)
from .kv_projection import kv_cross_attention, kv_project
from .layout import LayoutBias
from .low_rank import (
    AppliedDelta,
    CompressedSegment,
    CompressionReport,
    LowRankDelta,
    applied,
    compress,
    reconstruct,
    singular_values,
)
from .merge import (
    ConflictingConstraintsError,
    MergeFactorFileError,
    MergeReport,
    MergeSolver,
    SingularRegularizationError,
)
from .stack import KVStack, Segment

__version__ = "0.1.0"

_LAZY = dict.fromkeys(("patch_unet", "patched", "unpatch_unet"), ".diffusers")  # diffusers is optional

__all__ = [
    "AppliedDelta",
    "BaseMismatchError",
    "CompressedSegment",
    "CompressionReport",
    "ConflictingConstraintsError",
    "DeltaFileError",
    "KVStack",
    "LayoutBias",
    "LoadedDelta",
    "LowRankDelta",
    "MergeFactorFileError",
    "MergeReport",
    "MergeSolver",
    "Segment",
    "SingularRegularizationError",
    "applied",
    "apply_delta",
    "build_info",
    "compress",
    "cross_attention",
    "explain",
    "kv_cross_attention",
    "kv_project",
    "load_delta",
    "patch_unet",
    "patched",
    "reconstruct",
    "save_delta",
    "score_std",
    "singular_values",
    "unpatch_unet",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
