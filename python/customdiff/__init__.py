"""customdiff: learn a concept from a few pictures and sample with it, on customdiff_kernels."""

from importlib import import_module
from typing import Any

_HOME = {  # imported on first use: the command line's --help needs no torch
    "Concept": ".concept",
    "Layout": ".layouts",
    "LayoutGuidance": ".guidance",
    "Residual": ".residual",
    "TrainConfig": ".config",
    "edit": ".editing",
    "encode_prompts": ".concept",
    "evaluate": ".evaluation",
    "invert": ".editing",
    "load_base": ".base",
    "load_layout": ".layout_files",
    "match": ".concept",
    "sample": ".sampler",
    "train": ".trainer",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
