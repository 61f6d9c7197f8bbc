"""What ``customdiff analyse KIND`` finds out, one module each: ``SUMMARY``, ``EXAMPLES``,
``add_arguments(parser)``, ``run(options)``, and the functions that return the data, draw and tabulate it.

They import what they need only when they run: help must not wait for torch.
"""

from . import attention, compression, spectrum, steps, weights

KINDS = {
    "weights": weights,
    "spectrum": spectrum,
    "attention": attention,
    "steps": steps,
    "compression": compression,
}
