"""The stacked K/V projection and the cross-attention between frozen projections; equations in MATH.md."""

from .api import kv_cross_attention, kv_project

__all__ = ["kv_cross_attention", "kv_project"]
