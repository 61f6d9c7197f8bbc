"""The CPU backend: hands torch tensors to the compiled module ``_C`` as addresses, sizes and strides.

Nothing else imports ``_C``. The functions leave the friendly errors to their callers; shapes or dtypes that
would make a kernel touch foreign memory are refused by ``_C``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_C: Any
try:
    from . import _C  # type: ignore[no-redef]
except ImportError as error:
    _C = None
    _reason = str(error)

_DTYPES: dict[torch.dtype, Any] = (
    {}
    if _C is None
    else {
        torch.float32: _C.DType.float32,
        torch.bfloat16: _C.DType.bfloat16,
        torch.float16: _C.DType.float16,
        torch.float64: _C.DType.float64,
        torch.int32: _C.DType.int32,
    }
)


def _host_openmp() -> str | None:
    """Path of the OpenMP library that this process has loaded with torch, or None."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    loaded = dict.fromkeys(fields[5] for fields in lines if len(fields) == 6)  # a path may hold spaces
    found = [path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    return min(found, key=lambda path: "torch" not in path, default=None)  # torch's own before another's


def _share_threads() -> str:
    """Let the kernels run on torch's OpenMP threads; returns the library's name, or what is used instead."""
    path = _host_openmp()
    try:
        entry = getattr(ctypes.CDLL(path), "GOMP_parallel", None) if path else None
    except OSError:  # replaced on disk since it was loaded
        entry = None
    if path is None or entry is None:
        return "own pool"
    _C.use_host_threads(ctypes.cast(entry, ctypes.c_void_p).value)
    return Path(path).name


_threads = "" if _C is None else _share_threads()


def available() -> bool:
    """Whether the compiled module is there and loads."""
    return _C is not None


def build_info() -> dict[str, Any]:
    """What was built and what this machine runs.

    ``cpu``: False, or a dictionary with ``compiler``, ``isas`` (instruction sets that this build and machine
    offer, best first), ``isa`` (the one in use; ``CK_CPU_ISA`` forces one) and ``threads`` (the OpenMP
    library whose threads are shared with torch, or "own pool"). ``cuda``: False, not built.
    """
    if _C is None:
        return {"cpu": False, "cuda": False}
    info = _C.build_info()
    cpu = {"compiler": info["compiler"], "isas": info["cpu_isas"], "isa": _C.cpu_isa(), "threads": _threads}
    return {"cpu": cpu, "cuda": False}


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """out = softmax(query keyᵀ · scale + bias) value, written into ``out``.

    query, out (B,H,N,D), key, value (B,H,S,D): float32, bfloat16, float16 or float64, any strides. The bias
    is either dense, broadcastable to (B,H,N,S), or the row ``table[b, labels[b, i]]`` of table (B|1,G,S)
    chosen by labels (B|1,N) int32; in any of the four dtypes. A row whose every score is -inf gives zeros.
    """
    _module().attention_forward(
        _describe(query),
        _describe(key),
        _describe(value),
        _describe(_dense(bias)),
        _describe(_per_query(labels)),
        _describe(_per_region(table)),
        scale,
        _describe(out),
        torch.get_num_threads(),
    )


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
    grad_table: Tensor | None,
) -> None:
    """The gradients of :func:`attention_forward`, written into those ``grad_*`` that are given.

    ``grad_bias`` has the bias' own shape, ``grad_table`` the table's, both float32 (float64 for a float64
    query). The results do not depend on the number of threads.
    """
    _module().attention_backward(
        _describe(grad_out),
        _describe(query),
        _describe(key),
        _describe(value),
        _describe(_dense(bias)),
        _describe(_per_query(labels)),
        _describe(_per_region(table)),
        scale,
        _describe(grad_query),
        _describe(grad_key),
        _describe(grad_value),
        _describe(_dense(grad_bias)),
        _describe(_per_region(grad_table)),
        torch.get_num_threads(),
    )


def score_moments(query: Tensor, key: Tensor) -> tuple[float, float]:
    """Σ s and Σ s² of s = query keyᵀ over all of (B,H,N,S), in float64 and without building the scores.

    Σ s = Σq · Σk and Σ s² = tr((QᵀQ)(KᵀK)) for each (b, h).
    """
    return _module().score_moments(_describe(query), _describe(key), torch.get_num_threads())


def _module() -> Any:
    if _C is None:
        raise RuntimeError(
            "the native library of customdiff_kernels is not built"
            f" ({_reason}); build it with: pip install --no-build-isolation -e . (or pip install .)"
        )
    return _C


def _describe(tensor: Tensor | None) -> Any:
    if tensor is None:
        return _C.Tensor()
    return _C.Tensor(tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.shape, tensor.stride())


def _dense(bias: Tensor | None) -> Tensor | None:
    """As (B|1,H|1,N|1,S|1)."""
    return bias if bias is None or bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]


def _per_query(labels: Tensor | None) -> Tensor | None:
    """(B|1,N) as (B|1,1,N,1)."""
    return None if labels is None else labels[:, None, :, None]


def _per_region(table: Tensor | None) -> Tensor | None:
    """(B|1,G,S) as (B|1,1,G,S)."""
    return None if table is None else table[:, None]
