"""Closed-form merging of concepts (Custom Diffusion, eq. 4-5). See MATH.md."""

from .api import MergeReport, MergeSolver
from .constraints import Conflict, ConflictingConstraintsError
from .gram import SingularRegularizationError

__all__ = [
    "Conflict",
    "ConflictingConstraintsError",
    "MergeReport",
    "MergeSolver",
    "SingularRegularizationError",
]
