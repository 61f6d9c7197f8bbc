"""Cones 2 on the embedded base, beside Custom Diffusion: one to six subjects, with layouts and without."""
