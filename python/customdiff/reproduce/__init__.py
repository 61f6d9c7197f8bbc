"""``python -m customdiff.reproduce``: the tables of Custom Diffusion, on the embedded base."""
