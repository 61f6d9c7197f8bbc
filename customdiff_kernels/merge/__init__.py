"""Closed-form merging of concepts (Custom Diffusion, eq. 4-5). See MATH.md."""

from .api import MergeSolver
from .constraints import Conflict, ConflictingConstraintsError
from .gram import SingularRegularizationError
from .report import MergeReport
from .storage import MergeFactorFileError

__all__ = [
    "Conflict",
    "ConflictingConstraintsError",
    "MergeFactorFileError",
    "MergeReport",
    "MergeSolver",
    "SingularRegularizationError",
]
