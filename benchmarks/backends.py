"""Our rows of a comparison: one for each backend that runs at hand."""

import os
from collections.abc import Callable

import torch
from timing import DEVICE

import customdiff_kernels as ck


def forced(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    """``call`` with ``CK_BACKEND`` set for its length."""

    def run():
        before = os.environ.get("CK_BACKEND")
        os.environ["CK_BACKEND"] = backend
        try:
            return call()
        finally:
            if before is None:
                del os.environ["CK_BACKEND"]
            else:
                os.environ["CK_BACKEND"] = before

    return run


def available(dtype: torch.dtype) -> list[str]:
    """The backends of a GPU that run such tensors; ``CK_BACKEND`` leaves one."""
    names = [os.environ["CK_BACKEND"]] if "CK_BACKEND" in os.environ else ["cuda", "triton"]
    reasons = {name: forced(name, lambda: ck.explain("cuda", dtype))() for name in names}
    return [name for name, reason in reasons.items() if not reason.startswith("none")]


def ours(call: Callable[[], object], dtype: torch.dtype, what: str = "") -> dict[str, Callable[[], object]]:
    """``{"ours, cuda": ..., "ours, triton": ...}`` on a GPU, ``{"ours": ...}`` on a CPU."""
    suffix = f", {what}" if what else ""
    if DEVICE == "cpu":
        return {f"ours{suffix}": call}
    return {f"ours, {name}{suffix}": forced(name, call) for name in available(dtype)}
