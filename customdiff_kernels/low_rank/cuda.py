"""Low-rank sums on the GPU, compiled (``csrc/cuda``): float32, bfloat16 and float16 on tensor cores, every
segment and every concept in one launch on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._native import launch_place, module
from .._native import low_rank_sum as describe_sum
from .factors import alike


def low_rank_sum(
    out: Tensor,
    base: Tensor,
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float],
) -> None:
    """out = base + sum_i scale_i u_i v_i as in ``cpu.py``; base and out with contiguous rows.

    Factors of several dtypes are multiplied as float32, which is tf32x3: about 2**-21 relative.
    """
    native = module()
    u, v = alike(u, v)  # kept until the launch: a call holds addresses alone
    call = describe_sum(native, out, base, u, v, starts, scales)
    native.cuda_low_rank_sum(call, *launch_place(base))
