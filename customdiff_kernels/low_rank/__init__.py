"""Low-rank changes of the stacked key/value weights: compress and reconstruct. See MATH.md."""

from .api import LowRankDelta, reconstruct
from .compress import CompressedSegment, CompressionReport, compress
from .live import AppliedDelta, applied
from .spectrum import singular_values

__all__ = [
    "AppliedDelta",
    "CompressedSegment",
    "CompressionReport",
    "LowRankDelta",
    "applied",
    "compress",
    "reconstruct",
    "singular_values",
]
