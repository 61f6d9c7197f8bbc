"""customdiff: learn a concept from a few pictures and sample with it, on customdiff_kernels."""

from .concept import Concept, encode_prompts, match
from .sampler import sample

__all__ = ["Concept", "encode_prompts", "match", "sample"]
