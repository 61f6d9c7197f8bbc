"""The trainer's configuration: one frozen dataclass, from which the command line takes its options."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any

PAPER_LEARNING_RATE = 8e-5  # Custom Diffusion, section 3.2: 1e-5 times a batch of 8
# The embedded base is small: its matrices have to move further, and a row of 128 numbers further still.
EMBEDDED_LEARNING_RATE, EMBEDDED_EMBEDDING_RATE = 1e-3, 1.5e-2


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """What one training run depends on; equal configurations give equal bits.

    Raises:
        ValueError: if a number is out of range, the modifier token is no word, or a prompt lacks it.
    """

    images: str = option(help="folder with the concept's pictures (PNG or JPEG, any size)")
    prompts: tuple[str, ...] = option(
        help='one or more prompts for these pictures, each with the modifier token: "photo of a <new1> dog"'
    )
    output: str = option("concept.safetensors", help="the concept file to write")
    base: str | None = option(None, help="folder of a Stable Diffusion pipeline (default: the embedded one)")
    modifier_token: str = option("<new1>", help="the word that comes to mean the concept, V* in the paper")
    initializer_token: str = option("ktn", help="rare word whose embedding V* starts from; one token")
    regularization: str | None = option(
        None,
        help="folder of real pictures of the category, captioned (.txt beside each, or captions.csv/.jsonl); "
        "customdiff retrieve makes one",
    )
    prior_weight: float = option(1.0, help="weight of the loss on the regularization pictures")
    caption_dropout: float = option(
        0.1, help="share of regularization captions left empty, so that guidance keeps its unconditional side"
    )
    steps: int = option(250, help="optimizer steps")
    batch_size: int = option(4, help="concept pictures a step, and as many regularization pictures")
    learning_rate: float | None = option(
        None,
        help=f"of AdamW on K/V (default: {EMBEDDED_LEARNING_RATE:g} for the embedded base, the paper's "
        f"{PAPER_LEARNING_RATE:g} for any other)",
    )
    embedding_learning_rate: float | None = option(
        None,
        help=f"of AdamW on V* (default: {EMBEDDED_EMBEDDING_RATE:g} for the embedded base, as for K/V, which "
        "is the paper's way, for any other)",
    )
    cooldown: float = option(0.0, help="share of the steps, the last ones, in which the rate falls to zero")
    weight_decay: float = option(1e-2, help="of AdamW, on K/V and on V*; no other embedding is a parameter")
    min_snr_gamma: float | None = option(None, help="weigh the loss by min(SNR, gamma); 5 is usual")
    shift: float = option(0.05, help="move a concept picture at random by up to this share of its side")
    resize: float = option(
        0.0,
        help="share of concept pictures shown smaller or larger, with size words before the first prompt, "
        'which should begin with "photo of"',
    )
    resolution: int | None = option(None, help="side of the training pictures (default: the base's own)")
    seed: int = option(0, help="of every random draw")
    device: str | None = option(None, help="torch device (default: cuda where there is one, else cpu)")
    checkpoint_every: int = option(0, help="keep a resumable checkpoint every so many steps; 0: none")
    resume: bool = option(False, help="go on from the checkpoint beside --output")
    overwrite: bool = option(False, help="replace --output if it exists")

    def __post_init__(self) -> None:
        from .concept import mentions  # here: torch is not needed to describe the options

        if self.modifier_token.split() != [self.modifier_token]:
            raise ValueError(f"modifier_token must be one word, as '<new1>', got {self.modifier_token!r}")
        if isinstance(self.prompts, str):
            object.__setattr__(self, "prompts", (self.prompts,))
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not self.prompts:
            raise ValueError(
                f'prompts is empty; give at least one, as "photo of a {self.modifier_token} dog"'
            )
        for prompt in self.prompts:
            if not mentions(prompt, [self.modifier_token]):
                raise ValueError(
                    f"prompt {prompt!r} has no modifier token {self.modifier_token!r} as a word of its own; "
                    f'write "photo of a {self.modifier_token} dog", or name another modifier_token'
                )
        for name, low in (("steps", 1), ("batch_size", 1), ("checkpoint_every", 0), ("seed", 0)):
            _at_least(name, getattr(self, name), low)
        for name in ("prior_weight", "weight_decay", "shift"):
            _at_least(name, getattr(self, name), 0.0)
        for name in ("learning_rate", "embedding_learning_rate", "min_snr_gamma", "resolution"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("cooldown", "caption_dropout", "resize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share, 0 to 1, got {getattr(self, name)}")
        if self.shift > 0.5:
            raise ValueError(f"shift must be at most 0.5 of the picture's side, got {self.shift}")

    def rates(self, step: int, embedded: bool) -> tuple[float, float]:
        """The learning rates of K/V and of V* at a step, counted from 0: constant, then linear to zero.

        `embedded`: whether the base is the embedded one, for the defaults.
        """
        weight, row = self.learning_rate, self.embedding_learning_rate
        if weight is None:
            weight = EMBEDDED_LEARNING_RATE if embedded else PAPER_LEARNING_RATE
        if row is None:
            row = EMBEDDED_EMBEDDING_RATE if embedded else weight
        last = self.cooldown * self.steps
        share = min(1.0, (self.steps - step) / last) if last else 1.0
        return share * weight, share * row

    def mathematics(self) -> dict[str, Any]:
        """The fields that the result depends on: what a checkpoint must agree with to be resumed."""
        control = {"output", "checkpoint_every", "resume", "overwrite"}
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in control}


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` one option a field of TrainConfig, `--like-this`."""
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        kind, many = _scalar(hints[field.name])
        text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        required = field.default is dataclasses.MISSING
        if not required and field.default is not None:
            text += f" (default: {field.default})"
        parser.add_argument(
            flag,
            type=kind,
            nargs="+" if many else None,
            required=required,
            default=None if required else field.default,
            metavar=kind.__name__.upper() if kind is not str else "TEXT",
            help=text,
        )


def from_arguments(arguments: argparse.Namespace) -> TrainConfig:
    """The configuration in a namespace parsed with `add_arguments`."""
    return TrainConfig(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(TrainConfig)}
    )


def _scalar(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether there may be several) of a field: X, X | None, or tuple[X, ...]."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(argument for argument in typing.get_args(hint) if argument is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
