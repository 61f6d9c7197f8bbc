"""The command line: ``customdiff COMMAND``, whose ``--help`` names the commands."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .base import silence
from .commands import COMMANDS
from .config import Stopped

EXAMPLES = """examples:
  customdiff train --images my_dog/ --prompts "photo of a <new1> dog" --output dog.safetensors
  customdiff retrieve --images laion/ --prompts "photo of a <new1> dog" --output other_dogs/
  customdiff sample --concept dog.safetensors --prompt "photo of a <new1> dog in the snow"
  customdiff edit --concept dog.safetensors --source "photo of a dog" --target "photo of a <new1> dog"
  customdiff evaluate --concept dog.safetensors --pictures my_dog/ --prompts prompts.txt --output scores/
  customdiff analyse weights dog.safetensors --output dog_weights/
  customdiff merge dog.safetensors cat.safetensors --output both.safetensors
  customdiff compress dog.safetensors --energy 0.6 --output small.safetensors
  customdiff convert delta.bin --to customdiff --base sd15/ --output dog.safetensors
  customdiff inspect small.safetensors
"""
OPTIONAL = (
    "PIL",
    "accelerate",
    "diffusers",
    "matplotlib",
    "numpy",
    "torchmetrics",
    "tqdm",
    "transformers",
    "yaml",
)  # not in a plain install


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after a one-line message about bad input."""
    silence()
    options = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            options.run(options)
        except (ValueError, OSError, MemoryError) as error:
            print(f"customdiff {options.command}: error: {error}", file=sys.stderr)
            return 2
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in OPTIONAL:
                raise
            extra = {"matplotlib": "plot", "torchmetrics": "evaluation"}.get(package, "diffusers")
            print(
                f"customdiff {options.command}: error: {options.command} needs {package}: "
                f'pip install "customdiff_kernels[{extra}]"',
                file=sys.stderr,
            )
            return 2
        except Stopped as told:
            print(f"customdiff {options.command}: {told}", file=sys.stderr)
            return 143  # as a process that SIGTERM ended
        except KeyboardInterrupt:
            print(f"customdiff {options.command}: interrupted", file=sys.stderr)
            return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = _parser(
        argparse.ArgumentParser,
        prog="customdiff",
        description="Learn concepts from pictures; sample, merge, compress and inspect them.",
        epilog=EXAMPLES,
    )
    choices = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        made = _parser(
            choices.add_parser,
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=command.EXAMPLES,
        )
        command.add_arguments(made)
        made.set_defaults(run=command.run)
    return top


def _parser(make: Any, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
    return make(*args, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)


def _show_warning(message: Any, category: Any, *where: Any, **more: Any) -> None:
    if not issubclass(category, (FutureWarning, DeprecationWarning)):
        print(f"customdiff: warning: {message}", file=sys.stderr)
