"""Low-rank changes of the stacked key/value weights: compress and reconstruct. See MATH.md."""

from .api import LowRankDelta, reconstruct
from .compress import CompressedSegment, CompressionReport, compress
from .spectrum import singular_values

__all__ = [
    "CompressedSegment",
    "CompressionReport",
    "LowRankDelta",
    "compress",
    "reconstruct",
    "singular_values",
]
