"""Low-rank changes of the stacked key/value weights: compress and reconstruct. See MATH.md."""

from .api import LowRankDelta, compress, reconstruct

__all__ = ["LowRankDelta", "compress", "reconstruct"]
