"""The compiled module ``_C``, which nothing else imports: how it is found, what it was built with, and how
tensors and calls are described to it. Its users leave the friendly errors to their callers; shapes or dtypes
that would make a kernel touch foreign memory are refused by ``_C`` itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
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

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
    torch.int32: "int32",
}


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
    library whose threads are shared with torch, or "own pool"). ``cuda``: False where the CUDA kernels were
    not built, or a dictionary with ``architectures``, such as ["80", "90"]; the driver compiles for later
    ones.
    """
    if _C is None:
        return {"cpu": False, "cuda": False}
    info = _C.build_info()
    cpu = {"compiler": info["compiler"], "isas": info["cpu_isas"], "isa": _C.cpu_isa(), "threads": _threads}
    architectures = info.get("cuda_architectures")
    return {"cpu": cpu, "cuda": {"architectures": architectures.split()} if architectures else False}


def module() -> Any:
    """The compiled module; RuntimeError that says how to build it where there is none."""
    if _C is None:
        raise RuntimeError(
            "the native library of customdiff_kernels is not built"
            f" ({_reason}); build it with: pip install --no-build-isolation -e . (or pip install .)"
        )
    return _C


def describe(module: Any, tensor: Tensor | None) -> Any:
    """A tensor of four dimensions as the native code sees it: address, dtype, sizes and strides."""
    if tensor is None:
        return None
    return tensor.data_ptr(), _dtypes(module)[tensor.dtype], tensor.shape, tensor.stride()


def describe_matrix(module: Any, tensor: Tensor) -> Any:
    """A tensor of two dimensions, as one of four."""
    dtype = _dtypes(module)[tensor.dtype]
    return tensor.data_ptr(), dtype, (1, 1, *tensor.shape), (0, 0, *tensor.stride())


def launch_place(tensor: Tensor) -> tuple[int, int]:
    """Where a CUDA kernel on the tensor runs: its device and that device's current stream."""
    if not tensor.is_cuda:  # the kernels themselves on a CPU, in the tests
        return 0, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


@cache
def _dtypes(module: Any) -> dict[torch.dtype, Any]:
    return {dtype: getattr(module.DType, name) for dtype, name in _DTYPES.items()}


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    scale: float,
) -> Any:
    """The inputs of one attention, as every backend's functions take them; ``out``, described, or the
    :func:`gradients` go into its attributes.
    """
    return module.Attention(
        describe(module, query),
        describe(module, key),
        describe(module, value),
        describe(module, _dense(bias)),
        describe(module, None if labels is None else labels[:, None, :, None]),
        describe(module, _per_region(table)),
        scale,
    )


def low_rank_sum(
    module: Any,
    out: Tensor,
    base: Tensor,
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float],
) -> Any:
    """One low-rank sum, as every backend's functions take it."""
    terms = [
        (describe_matrix(module, left), describe_matrix(module, right), start, scale)
        for left, right, start, scale in zip(u, v, starts, scales, strict=True)
    ]
    return module.LowRankSum(describe_matrix(module, base), terms, describe_matrix(module, out))


def merge(
    module: Any,
    out: Tensor,
    base: Tensor,
    weights: Sequence[Tensor],
    targets: Sequence[Tensor],
    basis: Tensor | None,
) -> Any:
    """One merge, as every backend's functions take it; without a basis of its residuals alone."""
    return module.Merge(
        describe_matrix(module, base),
        [describe_matrix(module, weight) for weight in weights],
        [describe_matrix(module, target) for target in targets],
        None if basis is None else describe_matrix(module, basis),
        describe_matrix(module, out),
    )


def gradients(
    module: Any,
    call: Any,
    grad_out: Tensor,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
    grad_table: Tensor | None,
) -> None:
    """Tell ``call``, made by :func:`attention`, the upstream gradient and where the wanted ones go."""
    call.grad_out = describe(module, grad_out)
    call.grad_query = describe(module, grad_query)
    call.grad_key = describe(module, grad_key)
    call.grad_value = describe(module, grad_value)
    call.grad_bias = describe(module, _dense(grad_bias))
    call.grad_table = describe(module, _per_region(grad_table))


def _dense(bias: Tensor | None) -> Tensor | None:
    """A bias, or its gradient, as (B|1,H|1,N|1,S|1)."""
    return bias if bias is None or bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]


def _per_region(table: Tensor | None) -> Tensor | None:
    """A table, or its gradient, (B|1,G,S) as (B|1,1,G,S)."""
    return None if table is None else table[:, None]
