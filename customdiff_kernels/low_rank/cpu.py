"""Low-rank sums on the CPU, compiled (``csrc/cpu``): float32, bfloat16, float16 and float64, any strides. The
results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native


def low_rank_sum(
    out: Tensor,
    base: Tensor,
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float],
) -> None:
    """out = base + sum_i scale_i u_i v_i, each on its own rows from starts_i on; ``out`` may be ``base``.

    base, out (R,E) of one dtype; u_i (rows,r), v_i (r,E) of any. ``base`` is read once and ``out`` written
    once, whatever the number of terms.
    """
    native = _native.module()
    call = _native.low_rank_sum(native, out, base, u, v, starts, scales)
    native.low_rank_sum(call, torch.get_num_threads())
