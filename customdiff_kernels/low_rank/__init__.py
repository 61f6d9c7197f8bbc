"""Low-rank changes of the stacked key/value weights: compress and reconstruct. See MATH.md."""

from .api import LowRankDelta, compress, reconstruct
from .live import Applied, applied

__all__ = ["Applied", "LowRankDelta", "applied", "compress", "reconstruct"]
