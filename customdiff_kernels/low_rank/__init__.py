"""Low-rank changes of the stacked key/value weights: compress and reconstruct. See MATH.md."""

from .api import LowRankDelta, compress, reconstruct
from .live import AppliedDelta, applied

__all__ = ["AppliedDelta", "LowRankDelta", "applied", "compress", "reconstruct"]
