"""Short-context cross-attention with an optional layout bias; equations in MATH.md."""

from .api import cross_attention, score_std

__all__ = ["cross_attention", "score_std"]
