"""Several concepts in one model, by Custom Diffusion's closed form (section 3.2, equations 4 and 5)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

import customdiff_kernels as ck

from .concept import (
    Concept,
    Row,
    Rows,
    Tokens,
    base_metadata,
    encode,
    mentions,
    split_words,
    text_encoders,
    tokenize,
)
from .conditioning import project
from .regularization import merge_solver

# Text features come out of a layer normalization, so one direction of the text width is all but empty.
# Without a ridge the answer is large along it, which float32 cannot hold: residuals of 1e-1 instead of 1e-5.
RIDGE = 1e-6
ORDINARY_WORDS = (
    32  # of the vocabulary, over which the move from one place of a prompt to another is averaged
)


def merge(
    concepts: Sequence[Concept],
    pipeline: Any,
    captions: Sequence[str],
    *,
    prompts: Sequence[Sequence[str]] | None = None,
    together: str | Sequence[str] = (),
    padding: bool = True,
    ridge: float | str = RIDGE,
    on_conflict: str = "error",
    tolerance: float = 1e-3,
    cache: str | PathLike[str] | None = None,
    progress: bool = False,
) -> tuple[Concept, ck.MergeReport]:
    """One concept with all modifier tokens: on a concept's own words the merged weights do what its own do.

    Args:
        concepts: two or more of one base, with modifier tokens of their own (`renamed` gives them such).
        pipeline: that base.
        captions: about 1000 ordinary ones, on whose text the weights are to change least.
        prompts: the target captions of each concept, which together name all its modifier tokens (default:
            for each of them the first that it was trained with). Every token of every one must hold exactly:
            as many as the text is wide leave nothing free, and ordinary captions suffer, of which a
            UserWarning then tells.
        together: prompts that name several of the concepts, as "photo of a <new1> dog and a <new2> cat". To a
            text encoder the second subject of a prompt is not what the same words are alone, and no concept
            was trained on it: there each concept's words keep the values that they have alone, moved as the
            base moves those of ordinary words (see ``words_together``).
        padding: whether the padding after `prompts` must hold too. Pictures attend to it, but it has nearly
            the same features after every prompt, and to hold each apart takes large weights along the
            differences: in a narrow text, leave it to the captions.
        on_conflict, tolerance: as for ``ck.MergeSolver.merge``.
        ridge: as for ``ck.MergeSolver``; the default is below what the captions determine, above rounding.
        cache: a folder in which the captions' part, which is the long one, is kept for the next merge.
        progress: show a progress bar over the captions.

    Returns:
        The merged concept on the CPU, and the report of how well it keeps the values asked for and what else
        it moved; what `together` asks of a concept stands there as "<new1> together".

    Raises:
        ValueError: if concepts share a modifier token or have none, belong to another base or contradict one
            another, if a prompt names no modifier token, or the captions hold too few different tokens.
    """
    rows = _modifier_tokens(concepts)
    for concept in concepts:
        if concept.others:
            raise ValueError(
                f"concept {concept} changes {len(concept.others)} weights beside keys and values, first "
                f"{next(iter(concept.others))!r}, for which there is no closed form: train it on these alone"
            )
    stack = ck.KVStack.from_unet(pipeline.unet).to(torch.float32)
    concepts = [concept.of(stack) for concept in concepts]
    prompts = _target_prompts(concepts, prompts)
    together = [together] if isinstance(together, str) else together
    pairs: dict[str, Any] = {}
    for concept, texts in zip(concepts, prompts, strict=True):
        features, tokens = _targets(pipeline, texts, concept.modifier_tokens, padding)
        pairs[str(concept)] = (_weights(stack, concept), features, tokens)
    names = list(pairs)
    for concept, texts in zip(concepts, prompts, strict=True) if together else ():
        alone, beside, shift = words_together(pipeline, together, texts, concept.modifier_tokens, rows)
        if len(beside):
            change = project(stack, alone[None], [concept])[0] + (shift - beside) @ stack.weight.T
            pairs[f"{concept} together"] = (_holding(stack, beside, change), beside)
    first = concepts[0].metadata
    metadata = {
        **base_metadata(stack),
        **{key: first[key] for key in ("base_name", "resolution") if key in first},
        "prompt": prompts[0][0],
        "prompts": [prompt for texts in prompts for prompt in texts],
    }
    # after the prompts, which may be bad: about 1000 captions are the long part
    solver = merge_solver(pipeline, captions, ridge, cache=cache, progress=progress)
    report = solver.report(stack, pairs, on_conflict=on_conflict, tolerance=tolerance)
    added = sum(report.concept_drift[name] for name in names)
    targets = sum(len(features) for _, features, *_ in pairs.values())
    _warn_of_drift(report.drift, added, targets, stack.weight.shape[1])
    return Concept(report.merged.to("cpu"), rows, metadata), report


def renamed(concepts: Sequence[Concept]) -> tuple[list[Concept], list[tuple[int, str, str]]]:
    """`concepts` with modifier tokens of their own; (index, old word, new word) of each that changed."""
    taken: set[str] = set()
    result, changes = [], []
    for index, concept in enumerate(concepts):
        words = {}
        for word in concept.modifier_tokens:
            free = (f"<new{n}>" for n in range(1, 10**6) if f"<new{n}>" not in taken)
            words[word] = word if word not in taken else next(free)
            taken.add(words[word])
        result.append(_rename(concept, words))
        changes += [(index, old, new) for old, new in words.items() if old != new]
    return result, changes


def training_prompts(concept: Concept) -> list[str]:
    """The prompts that the concept was trained with, or else its modifier tokens alone."""
    if prompts := concept.metadata.get("prompts"):
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(
                f"concept {concept} has prompts {prompts!r:.80} in its file, not a list of texts"
            )
        return list(prompts)
    prompt = concept.metadata.get("prompt")
    return [prompt] if prompt else list(concept.modifier_tokens)


def target_features(pipeline: Any, prompts: Sequence[str], rows: Rows, *, padding: bool = True) -> Tensor:
    """Text features (s,E) that must keep the concept's values: every token from the first modifier token on,
    with `padding` or without.

    What stands before the modifier token is not among them: a causal text encoder gives "photo of a" the same
    features in every prompt, and they cannot keep two values.
    """
    return _targets(pipeline, prompts, rows, padding)[0]


@torch.no_grad()
def _targets(pipeline: Any, prompts: Sequence[str], rows: Rows, padding: bool) -> tuple[Tensor, list[str]]:
    """``target_features``, and the text of each one's token, for errors."""
    features, texts = [], []
    tokens, context = _encoded(pipeline, "prompts", prompts, rows)
    named = {(i, position): word for i, position, word in tokens.places}
    for i in range(len(prompts)):
        start = min(position for row, position, _ in tokens.places if row == i)
        end = _end(pipeline, tokens.ids[i])
        features.append(context[i, start : None if padding else end])
        words = [named.get((i, k)) or pipeline.tokenizer.decode(tokens.ids[i, k]) for k in range(start, end)]
        texts += [word.strip() for word in words]
        if padding:
            texts += ["end of text"] + ["padding"] * (len(context[i]) - end - 1)
    return torch.cat(features), texts


@torch.no_grad()
def words_together(
    pipeline: Any, together: Sequence[str], prompts: Sequence[str], own: Rows, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """A concept's words in the prompts `together`, which name other concepts too.

    They are each modifier token of `own`, and of what stands after it the words that follow it in `prompts`.

    Returns:
        three (s,E): their text features alone, in `prompts`; in `together`; and how far ordinary words move
        from the one place to the other: the mean over words of the vocabulary in place of all modifier
        tokens. One word moves much as another does, but a learned token, far from all words, does not.
    """
    alone, alone_context = _encoded(pipeline, "prompts", prompts, own)
    tokens, context = _encoded(pipeline, "together", together, rows)
    starts = {word: (i, position) for i, position, word in reversed(alone.places)}
    here, there = [], []  # (prompt, position) of every word, alone and together
    for i, position, word in tokens.places:
        if word in own:
            j, start = starts[word]
            phrase = alone.ids[j, start : _end(pipeline, alone.ids[j])]
            found = tokens.ids[i, position : position + len(phrase)]
            same = int((found == phrase[: len(found)]).long().cumprod(0).sum())
            here += [(j, start + k) for k in range(same)]
            there += [(i, position + k) for k in range(same)]
    if not here:
        return (alone_context[0, :0],) * 3

    tables = [encoder.get_input_embeddings().weight for _, encoder in text_encoders(pipeline)]
    generator, shift = torch.Generator().manual_seed(0), 0.0
    for _ in range(ORDINARY_WORDS):
        ids = torch.randint(len(tables[0]), (len(rows),), generator=generator).tolist()
        words = {word: tuple(table[i] for table in tables) for word, i in zip(rows, ids, strict=True)}
        moved = (
            _encoded(pipeline, "together", together, words)[1],
            _encoded(pipeline, "prompts", prompts, words)[1],
        )
        shift = shift + moved[0][_index(there)] - moved[1][_index(here)]
    return alone_context[_index(here)], context[_index(there)], shift / ORDINARY_WORDS


def _index(places: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    prompts, positions = zip(*places, strict=True)
    return list(prompts), list(positions)


def _holding(stack: ck.KVStack, features: Tensor, change: Tensor) -> ck.LowRankDelta:
    """The smallest change of the weights by which the values at features (s,E) change by (s,R)."""
    v = torch.linalg.pinv(features.double()).T.float()
    return ck.LowRankDelta(stack.segments, {name: (change[:, a:b].T, v) for name, a, b in stack.segments})


def _encoded(pipeline: Any, argument: str, prompts: Sequence[str], rows: Rows) -> tuple[Tokens, Tensor]:
    """Tokens and text features (B,S,E) of prompts that each name a modifier token."""
    words = [rows] * len(prompts)
    encoded = [tokenize(tokenizer, prompts, words) for tokenizer, _ in text_encoders(pipeline)]
    tokens = encoded[0]  # a second tokenizer differs in the padding alone
    for missing in set(range(len(prompts))) - {i for i, _, _ in tokens.places}:
        raise ValueError(
            f"{argument}: {prompts[missing]!r} has none of the modifier tokens {', '.join(rows)}"
        )
    return tokens, encode(pipeline, encoded, words).context.float()


def _end(pipeline: Any, ids: Tensor) -> int:
    """The position of the end token, after the words of a prompt."""
    return 1 + int((ids[1:] == pipeline.tokenizer.eos_token_id).long().argmax())


def _first_prompts(concept: Concept) -> list[str]:
    """For every modifier token the first training prompt that names it, where there is one."""
    prompts = training_prompts(concept)
    naming = [[prompt for prompt in prompts if mentions(prompt, [word])] for word in concept.modifier_tokens]
    return list(dict.fromkeys(found[0] for found in naming if found))


def _modifier_tokens(concepts: Sequence[Concept]) -> dict[str, Row]:
    """All concepts' modifier tokens and their rows; raises where a merge could not tell them apart."""
    if len(concepts) < 2:
        raise ValueError(f"concepts must be two or more to merge, got {len(concepts)}")
    rows: dict[str, Row] = {}
    for i, concept in enumerate(concepts):
        if not concept.modifier_tokens:
            raise ValueError(
                f"concepts[{i}] has no modifier token, by which a merge tells its prompts from others"
            )
        if shared := rows.keys() & concept.modifier_tokens.keys():
            raise ValueError(
                f"concepts share the modifier token {', '.join(shared)}: rename one (merging.renamed)"
            )
        rows |= concept.modifier_tokens
    return rows


def _target_prompts(
    concepts: Sequence[Concept], prompts: Sequence[Sequence[str]] | None
) -> Sequence[Sequence[str]]:
    """The target captions of each concept; raises where they leave a modifier token out."""
    prompts = [_first_prompts(concept) for concept in concepts] if prompts is None else prompts
    if len(prompts) != len(concepts):
        raise ValueError(
            f"prompts must be a list for each of the {len(concepts)} concepts, got {len(prompts)}"
        )
    for concept, texts in zip(concepts, prompts, strict=True):
        for word in concept.modifier_tokens:
            if not any(mentions(text, [word]) for text in texts):
                raise ValueError(
                    f"no prompt of concept {concept} names its modifier token {word}, which the merge would "
                    f"lose; give prompts= with one that does, as in 'photo of a {word} dog'"
                )
    return prompts


def _weights(stack: ck.KVStack, concept: Concept) -> ck.KVStack | ck.LowRankDelta:
    """The concept's weights beside the stack's: those of a file are read to the CPU."""
    device, delta = stack.weight.device, concept.delta
    if not delta:  # modifier tokens alone
        return stack
    if isinstance(delta, ck.LowRankDelta):
        return delta.to(device)
    return ck.reconstruct(stack, {name: change.to(device) for name, change in delta.items()})


def _warn_of_drift(drift: float, added: float, targets: int, width: int) -> None:
    """A merge that moves ordinary captions further than the concepts' changes, added up, is no gain."""
    if drift > added:
        warnings.warn(
            f"the merge moves the keys and values of ordinary captions by {drift:.0%}, adding up the "
            f"concepts' changes by at most {added:.0%}: {targets} target tokens leave too little free of a "
            f"text {width} wide; give fewer or shorter prompts, or merge fewer concepts",
            stacklevel=3,
        )


def _rename(concept: Concept, new: dict[str, str]) -> Concept:
    metadata = dict(concept.metadata)
    if new and metadata.keys() & {"prompt", "prompts"}:
        parts = [split_words(prompt, list(new)) for prompt in training_prompts(concept)]
        prompts = ["".join(new[text] if is_word else text for text, is_word in part) for part in parts]
        metadata |= {"prompt": prompts[0], "prompts": prompts}
    rows = {new[word]: row for word, row in concept.modifier_tokens.items()}
    return replace(concept, modifier_tokens=rows, metadata=metadata)
