"""The one place that decides which backend runs an operation, and says why.

| backend | module | runs |
|---|---|---|
| ``cpu`` | ``cross_attention/cpu.py`` (compiled, ``csrc/cpu``) | CPU tensors |
| ``cuda`` | ``cross_attention/cuda.py`` (compiled, ``csrc/cuda``) | CUDA tensors where built, sm_80 on |
| ``triton`` | ``cross_attention/triton.py`` | other CUDA tensors; CPU ones under ``TRITON_INTERPRET=1`` |
| ``reference`` | ``cross_attention/reference.py`` | anything, when forced |

The operations on weights (``low_rank/``, ``merge/``) have modules of the same names; devices without one run
plain PyTorch there. ``CK_BACKEND=reference|cpu|cuda|triton`` forces one. What is forced and cannot run is an
error that names the remedy.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import _checks

NAMES = ("reference", "cpu", "cuda", "triton")
CONTIGUOUS_ROWS = frozenset({"cuda", "triton"})  # they read the head dimension with stride 1, others any
CANDIDATES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # by device, the first that can run is chosen
OF_WEIGHTS = {"low_rank": ("cpu", "cuda", "triton"), "merge": ("cpu",)}  # who has kernels of their own
NO_FLOAT64 = "it takes float32, bfloat16 and float16, got float64; CK_BACKEND=reference takes float64"
BUILD = "pip install --no-build-isolation -e . in the source folder (or pip install . for a copy)"


class Choice(NamedTuple):
    name: str
    reason: str


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend for tensors of this device and dtype, and why. RuntimeError where none can run."""
    forced = os.environ.get("CK_BACKEND")
    interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return _choose(device, dtype, forced, interpreted)


@cache
def _choose(device: torch.device, dtype: torch.dtype, forced: str | None, interpreted: bool) -> Choice:
    if forced:
        if forced not in NAMES:
            raise ValueError(f"CK_BACKEND must be one of {', '.join(NAMES)}, got {forced!r}")
        refusal = _refuses(forced, device, dtype, interpreted)
        if refusal:
            raise RuntimeError(f"CK_BACKEND={forced} cannot run: {refusal}")
        return Choice(forced, "CK_BACKEND forces it")
    candidates = CANDIDATES.get(device.type)
    if candidates is None:
        raise RuntimeError(f"no backend for {device.type} tensors; CK_BACKEND=reference runs plain PyTorch")
    refusals: list[str] = []
    for name in candidates:
        refusal = _refuses(name, device, dtype, interpreted)
        if refusal is None:
            reason = f"{device.type} tensors, {str(dtype).removeprefix('torch.')}"
            return Choice(name, "; ".join([reason, *refusals]))
        refusals.append(f"{name} cannot run: {refusal}")
    raise RuntimeError(f"no backend for {device.type} tensors: {'; '.join(refusals)}")


def _refuses(name: str, device: torch.device, dtype: torch.dtype, interpreted: bool) -> str | None:
    """Why backend ``name`` cannot run such tensors and what would help; None if it can."""
    if name == "cpu":
        if device.type != "cpu":
            return f"it takes CPU tensors, got {device.type}"
        return None if is_built() else f"the native library is not built; {BUILD}"
    if name == "cuda":
        if device.type != "cuda":
            return f"it takes CUDA tensors, got {device.type}"
        if dtype is torch.float64:
            return NO_FLOAT64
        if not has_cuda():
            return f"the CUDA kernels are not built; CUSTOMDIFF_CUDA=ON {BUILD}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
            return "it takes sm_80 and later, got sm_{}{}".format(*torch.cuda.get_device_capability(device))
        return None
    if name == "triton":
        if device.type != "cuda" and not (device.type == "cpu" and interpreted):
            return f"it takes CUDA tensors (CPU tensors under TRITON_INTERPRET=1), got {device.type}"
        if dtype is torch.float64:
            return NO_FLOAT64
        return None if has_triton() else "triton 3.3 or later is not installed; pip install -U triton"
    return None


@cache
def is_built() -> bool:
    """Whether the compiled module is there and loads."""
    from . import _native

    return _native.available()


@cache
def has_cuda() -> bool:
    """Whether the compiled module has the CUDA kernels."""
    from . import _native

    return bool(_native.build_info()["cuda"])


@cache
def has_triton() -> bool:
    """Whether a Triton is there that knows tuples in kernels (3.3, torch 2.7)."""
    if importlib.util.find_spec("triton") is None:
        return False
    version = importlib.import_module("triton").__version__
    return tuple(map(int, version.split(".")[:2])) >= (3, 3)


@cache
def load(name: str, op: str = "cross_attention") -> ModuleType:
    """The module of a backend: for attention ``attention_forward``, ``attention_backward`` and
    ``score_moments``.
    """
    return importlib.import_module(f"{__package__}.{op}.{name}")


def for_weights(op: str, **tensors: torch.Tensor) -> ModuleType:
    """The module of ``low_rank`` or ``merge`` that runs tensors like the first.

    What a device has no kernels for runs in plain PyTorch, unless a backend is forced that cannot run.
    """
    first = next(iter(tensors.values()))
    forced, narrow = os.environ.get("CK_BACKEND"), first.dtype is not torch.float64
    known = set(CANDIDATES.get(first.device.type, ())) & set(OF_WEIGHTS[op])
    own = forced or (known and (narrow or not first.is_cuda))
    name = choose(first.device, first.dtype).name if own else "reference"
    name = name if name in OF_WEIGHTS[op] else "reference"
    if name in CONTIGUOUS_ROWS:
        for argument, tensor in tensors.items():
            _checks.contiguous_rows(argument, tensor)
    return load(name, op)


def for_tensors(**tensors: torch.Tensor) -> ModuleType:
    """The module of the backend chosen for these tensors, which agree in device and dtype."""
    first = next(iter(tensors.values()))
    name = choose(first.device, first.dtype).name
    if name in CONTIGUOUS_ROWS:
        for argument, tensor in tensors.items():
            _checks.contiguous_rows(argument, tensor)
    return load(name)


def explain(tensor: torch.Tensor | torch.device | str = "cpu", dtype: torch.dtype | None = None) -> str:
    """Which backend would run an attention on such tensors, and why; or why none can.

    ``tensor``: an example query, or a device with an optional ``dtype`` (default float32).
    """
    if isinstance(tensor, torch.Tensor):
        device, dtype = tensor.device, dtype or tensor.dtype
    else:
        device, dtype = torch.device(tensor), dtype or torch.float32
    try:
        name, reason = choose(device, dtype)
    except (RuntimeError, ValueError) as refusal:
        return f"none: {refusal}"
    return f"{name}: {reason}"


def build_info() -> dict[str, Any]:
    """What this installation consists of; ``native`` says what was compiled."""
    from . import __version__, _native

    return {
        "version": __version__,
        "torch": torch.__version__,
        "native": _native.build_info(),
        # asked of the module: nightly builds of torch install it as another distribution
        "triton": importlib.import_module("triton").__version__ if has_triton() else None,
    }
