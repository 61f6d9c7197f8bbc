"""Layouts: where each subject of a prompt goes, by boxes or masks, checked and ready for the attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

from torch import Tensor

import customdiff_kernels as ck

from .documents import nearest
from .options import NUMBER, typed
from .subjects import find_subject, split_subject

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each subject of one prompt goes. Regions may overlap, and be boxes and masks mixed.

    Args:
        regions: ``{subject: (x0, y0, x1, y1)}`` as fractions of the picture, x to the right and y down, or
            ``{subject: mask}``, (height, width) of any size, bool or 0..1. A subject is its word in the
            prompt, "dog", or "dog#2" for the second dog.
        strengths: a subject's own γ⁺, where it has one.

    Raises TypeError or ValueError, naming the subject and what to change.
    """

    regions: Mapping[str, Box | Tensor]
    strengths: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, value in (("regions", self.regions), ("strengths", self.strengths)):
            if not isinstance(value, Mapping):
                raise TypeError(f"{what} must map each subject to its own, got {type(value).__name__}")
        if not self.regions:
            raise ValueError("regions is empty; give at least one subject a box or a mask")
        checked: dict[str, Box | Tensor] = {}
        for name, region in self.regions.items():
            split_subject(name)
            mask = isinstance(region, Tensor)
            checked[name] = _checked_mask(name, region) if mask else checked_box(name, region)
        object.__setattr__(self, "regions", checked)
        for name, strength in self.strengths.items():
            if name not in self.regions:
                raise ValueError(
                    f"subject {name!r} has a strength but no region; give it a box or a mask"
                    + nearest(name, self.regions)
                )
            _check_strength(name, strength)

    def check(self, prompt: str, tokenizer: Any, modifiers: Sequence[str] = ()) -> dict[str, tuple[int, ...]]:
        """The token positions of every subject in ``prompt``, as ``bias`` takes them.

        ``modifiers``: the prompt's modifier tokens, as in ``find_subject``.

        Raises ValueError, naming the subject, if one is not in the prompt, or two are the same word of it.
        """
        tokens: dict[str, tuple[int, ...]] = {}
        for name in self.regions:
            found = find_subject(tokenizer, prompt, name, modifiers)
            for other, positions in tokens.items():
                if positions == found:
                    raise ValueError(
                        f"subjects {other!r} and {name!r} are the same word of the prompt {prompt!r}; keep "
                        f"one of them, or name the second of two {split_subject(name)[0] + '#2'!r}"
                    )
            tokens[name] = found
        return tokens

    def bias(
        self,
        tokens: Mapping[str, Sequence[int]],
        size: tuple[int, int],
        n_tokens: int,
        positive: float,
        negative: float,
        outside: float | None = None,
    ) -> ck.LayoutBias:
        """The layout at an attention level of ``size`` (h, w): ``ck.LayoutBias.from_regions``, on the CPU.

        ``tokens`` as ``check`` gives them; ``positive``: γ⁺ of the subjects without a strength of their own.
        """
        strengths = {**dict.fromkeys(self.regions, positive), **self.strengths}
        return ck.LayoutBias.from_regions(
            self.regions, tokens, size, n_tokens, strengths, negative, outside=outside
        )


def parse_box(text: str) -> tuple[str, Box]:
    """The subject and the box of "dog=0.05,0.4,0.45,0.95": left, top, right, bottom; else ValueError."""
    name, equals, numbers = text.rpartition("=")
    if not equals:
        raise ValueError(f"box {text!r} must be subject=left,top,right,bottom, as dog=0.05,0.4,0.45,0.95")
    split_subject(name)
    return name.strip(), checked_box(name.strip(), numbers.split(","))


def parse_boxes(texts: Iterable[str]) -> Layout:
    """The layout of boxes as ``parse_box`` reads them; ValueError for a subject that has two."""
    regions: dict[str, Box | Tensor] = {}
    for text in texts:
        name, box = parse_box(text)
        if name in regions:
            raise ValueError(
                f"subject {name!r} has two boxes; keep one, or name the second of the prompt {name + '#2'!r}"
            )
        regions[name] = box
    return Layout(regions)


def checked_box(name: str, box: Any) -> Box:
    """The box of subject `name` as four floats; ValueError where it is no box within the picture."""
    what = f"subject {name!r}: box {short(box)}"
    if isinstance(box, str) or not isinstance(box, Sequence) or len(box) != 4:
        raise ValueError(f"{what} must be four numbers, left, top, right, bottom, as [0.05, 0.4, 0.45, 0.95]")
    x0, y0, x1, y1 = parts = tuple(typed(what, part, NUMBER) for part in box)
    if not all(0 <= part <= 1 for part in parts):
        raise ValueError(
            f"{what} reaches outside the picture; give fractions of it, 0 to 1 (pixels divided by its size)"
        )
    if not (x0 < x1 and y0 < y1):
        low, high = ("left", "right") if x0 >= x1 else ("top", "bottom")
        raise ValueError(f"{what} is empty: {low} must be less than {high}; swap or mend them")
    return x0, y0, x1, y1


def _checked_mask(name: str, mask: Tensor) -> Tensor:
    what = f"subject {name!r}: its mask"
    if mask.ndim != 2 or not mask.numel():
        raise ValueError(f"{what} must be (height, width), got {tuple(mask.shape)}; give one number a pixel")
    if mask.is_complex() or not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(f"{what} must be bool or 0..1, got {_values(mask)}; divide bytes by 255")
    if not mask.any():
        raise ValueError(f"{what} is empty, 0 everywhere; mark its region with 1 (white in a picture)")
    return mask


def _values(mask: Tensor) -> str:
    low, high = ("complex numbers",) * 2 if mask.is_complex() else (mask.min().item(), mask.max().item())
    return f"{str(mask.dtype).removeprefix('torch.')} of {low} to {high}"


def _check_strength(name: str, strength: Any) -> None:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"subject {name!r}: its strength must be a number, got {type(strength).__name__}")
    if not math.isfinite(strength):
        raise ValueError(f"subject {name!r}: its strength must be finite, got {strength}; 2.5 is usual")
