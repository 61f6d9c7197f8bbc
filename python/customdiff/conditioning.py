"""What the rows of a batch tell the UNet: keys and values of each row's prompt, concept and residuals."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import customdiff_kernels as ck

from .concept import Concept, added_conditions, encode_prompts
from .residual import Residual, add_residuals


class Conditions(NamedTuple):
    """context (B,S,E), kv {module: (key, value)} and ``added_conditions`` of B rows, or of 2B with the
    unconditional ones first.
    """

    context: Tensor
    kv: dict[str, tuple[Tensor, Tensor]]
    added: dict[str, Tensor]


def conditions(
    pipe: Any,
    stack: ck.KVStack,
    prompts: Sequence[str],
    concepts: Sequence[Concept | None],
    residuals: Sequence[Mapping[str, Residual]],
    *,
    negative_prompt: str | None = None,
    unconditional: bool = True,
    pixels: tuple[int, int],
) -> Conditions:
    """Each row's, once for all layers and steps; ``pixels``: (height, width) of the pictures.

    An unconditional row has its row's concept, and no residual: these belong to the words of the prompt.
    """
    first = len(prompts) if unconditional else 0
    texts = [negative_prompt or ""] * first + list(prompts)
    concepts = [*concepts[:first], *concepts]
    words = [concept.modifier_tokens if concept else {} for concept in concepts]
    features = encode_prompts(pipe, texts, words)
    if negative_prompt is None and pipe.config.get("force_zeros_for_empty_prompt"):
        for part in features:  # context and pooled
            part[:first] = 0
    context = add_residuals(pipe, texts, features.context, [{}] * first + list(residuals), words)
    context = context.to(pipe.unet.dtype)
    return Conditions(
        context, stack.views(project(stack, context, concepts)), added_conditions(pipe, features, pixels)
    )


def fitting(
    pipe: Any, stack: ck.KVStack, prompts: Sequence[str], concepts: Sequence[Concept | None]
) -> list[Concept | None]:
    """``concepts``, one for each prompt, as changes of the pipeline's UNet; else ValueError."""
    others = [concept for concept in distinct(concepts) if concept.others]
    if others and any(concept is not others[0] for concept in concepts):
        raise ValueError(
            f"concept {others[0]} changes {len(others[0].others)} weights beside keys and values, which all "
            "rows share: sample its prompts without other concepts, and without rows that have none"
        )
    known = {id(c): c.of(pipe.unet if c.others else stack) for c in distinct(concepts)}
    found = [concept and known[id(concept)] for concept in concepts]
    for prompt, concept in zip(prompts, found, strict=True):
        if concept is not None:
            concept.check_prompt(prompt)
    return found


def project(stack: ck.KVStack, context: Tensor, concepts: Sequence[Concept | None]) -> Tensor:
    """Keys and values (B,S,R) of all layers, row i by the weights of ``concepts[i]``, never built."""
    kv = ck.kv_project(context, stack.weight)
    columns = {name: slice(start, stop) for name, start, stop in stack.segments}
    for concept in distinct(concepts):
        rows = [i for i, other in enumerate(concepts) if other is concept]
        delta = concept.delta
        low_rank = isinstance(delta, ck.LowRankDelta)
        for name, factors in (delta.factors if low_rank else {n: (w,) for n, w in delta.items()}).items():
            change = context[rows]
            for factor in reversed(factors):  # (c·Vᵀ)·Uᵀ, or c·ΔWᵀ
                change = change @ factor.to(change).T
            kv[rows, :, columns[name]] += change
    return kv


def others_on(unet: torch.nn.Module, concept: Concept | None) -> Any:
    """The concept's changes beside keys and values on the UNet, and off again."""
    if concept is None or not concept.others:
        return contextlib.nullcontext()
    return ck.applied(unet, {name: change.to(unet.device) for name, change in concept.others.items()})


def distinct(concepts: Sequence[Concept | None]) -> list[Concept]:
    return list({id(concept): concept for concept in concepts if concept is not None}.values())


def one_each(name: str, given: Any, count: int, kind: Any) -> list:
    """``given`` as a list of ``count`` entries of type ``kind``, repeated where it is one of these itself."""
    given = [given] * count if isinstance(given, kind) else list(given)
    if len(given) != count:
        raise ValueError(
            f"{name} has {len(given)} entries for {count} prompts; give one each, or one for all"
        )
    for item in given:
        if not isinstance(item, kind):
            raise TypeError(f"{name} has an entry of type {type(item).__name__}")
    return given
