"""customdiff_kernels: the operations that Custom Diffusion and Cones 2 are made of."""
from .cross_attention import cross_attention, score_std
from .layout import LayoutBias
