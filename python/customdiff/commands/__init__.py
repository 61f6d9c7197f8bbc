"""The commands, one module each: ``SUMMARY``, ``EXAMPLES``, ``add_arguments(parser)`` and ``run(options)``.

They import what they need only when they run: help must not wait for torch.
"""

from . import analyse, compress, convert, edit, evaluate, inspect, merge, retrieve, sample, train

COMMANDS = {
    "train": train,
    "retrieve": retrieve,
    "sample": sample,
    "edit": edit,
    "evaluate": evaluate,
    "analyse": analyse,
    "merge": merge,
    "compress": compress,
    "convert": convert,
    "inspect": inspect,
}
