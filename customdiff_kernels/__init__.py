"""customdiff_kernels: the operations that Custom Diffusion and Cones 2 are made of."""

from .cross_attention import cross_attention, score_std
from .kv_projection import kv_cross_attention, kv_project
from .layout import LayoutBias
