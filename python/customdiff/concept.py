"""A concept: a change of the K/V weights, and one embedding row for each of its modifier tokens (V*).

Trainer and sampler share the encoding below. A modifier token such as ``<new1>`` is one position of the
prompt whose input embedding is the concept's row, put there while the text encoder runs: the tokenizer and
the encoder's embedding table are those of the base model before, during and after, so every row of a batch
can belong to another concept.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

import customdiff_kernels as ck

Row = Tensor | tuple[Tensor, ...]  # (E,), or one for each text encoder
Rows = Mapping[str, Row]  # modifier token -> its embedding


class Tokens(NamedTuple):
    """Token ids (B,S) of prompts, and where a modifier token stands: (row, position, word)."""

    ids: Tensor
    places: list[tuple[int, int, str]]


def tokenize(tokenizer: Any, prompts: Sequence[str], words: Sequence[Iterable[str]]) -> Tokens:
    """Token ids of ``prompts``, padded to the tokenizer's length; ``words[i]``: prompt i's modifier tokens.

    Raises ValueError if a prompt names a ``<token>`` that is none of its words, or is so long that the text
    encoder would not read its modifier token; a prompt that is cut elsewhere only warns.
    """
    size, places, ids = tokenizer.model_max_length, [], []
    for i, (prompt, known) in enumerate(zip(prompts, words, strict=True)):
        row: list[int] = []
        for piece, is_word in split_words(prompt, list(known)):
            if is_word:
                places.append((i, 1 + len(row), piece))
                row.append(tokenizer.bos_token_id)  # any id: the embedding looked up here is replaced
            elif unknown := re.search(r"<[\w-]+>", piece):
                has = f"its concept has {', '.join(known)}" if known else "it has no concept"
                raise ValueError(f"prompt {prompt!r} names the modifier token {unknown[0]}, and {has}")
            elif piece.strip():
                row += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        if len(row) > size - 2:
            if lost := [word for at, position, word in places if at == i and position > size - 2]:
                raise ValueError(
                    f"prompt {prompt!r}: the modifier token {lost[0]} comes after the {size - 2} tokens that "
                    "the text encoder reads; shorten what stands before it"
                )
            warnings.warn(f"prompt {prompt!r} is cut to {size - 2} of its {len(row)} tokens", stacklevel=2)
            del row[size - 2 :]
        row = [tokenizer.bos_token_id, *row, tokenizer.eos_token_id]
        ids.append(row + [tokenizer.pad_token_id] * (size - len(row)))
    return Tokens(torch.tensor(ids), places)


class TextFeatures(NamedTuple):
    """context (B,S,E): what the UNet attends to. pooled (B,P): of whole prompts, where the UNet reads it."""

    context: Tensor
    pooled: Tensor | None


def text_encoders(pipe: Any) -> list[tuple[Any, torch.nn.Module]]:
    """The pipeline's (tokenizer, text encoder): one pair, or the two of SDXL."""
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if getattr(pipe, "text_encoder_2", None) is not None:
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    return pairs


def encode_prompts(pipe: Any, prompts: Sequence[str], rows: Rows | Sequence[Rows]) -> TextFeatures:
    """The features of ``prompts`` by the pipeline; ``rows``: one each, or one for all, also with gradient."""
    rows = [rows] * len(prompts) if isinstance(rows, Mapping) else rows
    return encode(pipe, [tokenize(tokenizer, prompts, rows) for tokenizer, _ in text_encoders(pipe)], rows)


def encode(pipe: Any, tokens: Sequence[Tokens], rows: Sequence[Rows]) -> TextFeatures:
    """The features of ``tokens``, one for each text encoder. ``rows[i]``: prompt i's modifier tokens.

    As the pipelines do it: the last hidden state of one text encoder; of two, the next to last of both side
    by side, and the projected text of the second.
    """
    encoders = [encoder for _, encoder in text_encoders(pipe)]
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders]
    for i, word in {(i, word) for i, _, word in tokens[0].places}:
        _check_row(word, rows[i][word], widths)
    outputs = [_run(encoder, tokens[k], rows, k) for k, encoder in enumerate(encoders)]
    if len(outputs) == 1:
        return TextFeatures(outputs[0].last_hidden_state, None)
    return TextFeatures(torch.cat([out.hidden_states[-2] for out in outputs], -1), outputs[-1].text_embeds)


def _run(encoder: torch.nn.Module, tokens: Tokens, rows: Sequence[Rows], part: int) -> Any:
    """The output of the text encoder number ``part``, each modifier token's embedding in its place."""
    ids, places = tokens.ids.to(encoder.device), tokens.places
    if not places:
        return encoder(ids, output_hidden_states=True)
    at = torch.tensor([place[:2] for place in places], device=ids.device).unbind(1)

    def substitute(module: torch.nn.Module, args: tuple, embedded: Tensor) -> Tensor:
        values = [_parts(rows[i][word])[part].to(embedded) for i, _, word in places]
        return embedded.index_put(at, torch.stack(values))

    handle = encoder.get_input_embeddings().register_forward_hook(substitute)
    try:
        return encoder(ids, output_hidden_states=True)
    finally:
        handle.remove()


def added_conditions(
    pipe: Any,
    features: TextFeatures,
    size: tuple[int, int] | Tensor,
    *,
    original_size: tuple[int, int] | Tensor | None = None,
    crop: tuple[int, int] | Tensor = (0, 0),
) -> dict[str, Tensor]:
    """What the UNet takes as ``added_cond_kwargs`` with the features of B prompts: {} but for SDXL.

    size, original_size, crop: of the picture, of the photo that it was cut from (default: the same) and the
        cut's top left corner, each (height, width) or (top, left) in pixels, of all rows or integer (B,2).
    """
    if pipe.unet.config.get("addition_embed_type") != "text_time" or features.pooled is None:
        return {}
    rows, device = len(features.pooled), features.pooled.device
    sizes = [torch.as_tensor(pair) for pair in (size if original_size is None else original_size, crop, size)]
    ids = torch.cat([pair.expand(rows, 2).to(device, torch.float32) for pair in sizes], 1)
    return {"text_embeds": features.pooled, "time_ids": ids}


def _parts(row: Row) -> tuple[Tensor, ...]:
    return row if isinstance(row, tuple) else (row,)


def _check_row(word: str, row: Row, widths: Sequence[int]) -> None:
    """One embedding for each text encoder, of its width."""
    shapes = [tuple(part.shape) for part in _parts(row)]
    if shapes != [(width,) for width in widths]:
        many = len(widths) > 1
        raise ValueError(
            f"modifier token {word} has embeddings of shape {', '.join(map(str, shapes))}; it must have one"
            f"{' for each' * many}, of width {' and '.join(map(str, widths))} as "
            f"{'these text encoders have' if many else 'this text encoder has'}: the concept is of another "
            "base model"
        )


def base_metadata(stack: ck.KVStack) -> dict[str, str]:
    """What a concept remembers of its base, in float32 or float16, and of the same rounded to bfloat16."""
    dtypes = (stack.weight.dtype, torch.bfloat16)
    return {_hash_key(dtype): stack.to(dtype).hash() for dtype in dtypes}


def check_base(what: str, metadata: Mapping[str, Any], stack: ck.KVStack) -> None:
    """Raise ck.BaseMismatchError where ``what`` has the ``base_metadata`` of others than ``stack``."""
    key = _hash_key(stack.weight.dtype)
    expected = metadata.get(key)
    if expected is None and "base_hash" in metadata:
        warnings.warn(f"{what} cannot tell its base in bfloat16: its file has no {key}", stacklevel=3)
    elif expected is not None and expected != stack.hash():
        raise ck.BaseMismatchError(
            f"{what} is of the base model {metadata.get('base_name', '(no name)')}, {key} "
            f"{str(expected)[:12]}, and the K/V weights of this UNet have {stack.hash()[:12]}: load that "
            "base, without another delta in it"
        )


@dataclass
class Concept:
    """What one training run learned, or several merged.

    delta: the change of the K/V weights by segment, {name: (rows,E)} or ck.LowRankDelta; {} for modifier
        tokens or others alone.
    modifier_tokens: {word: (E,)}, with a tuple of these for several text encoders.
    metadata: what JSON can hold; among it ``base_metadata`` of the weights that the delta belongs to.
    weights: the changed weights themselves in the place of ``delta``, where a file holds these.
    others: the change of other parameters of the UNet by their names; beside ``weights`` these themselves.
    """

    delta: Mapping[str, Tensor] | ck.LowRankDelta
    modifier_tokens: dict[str, Row] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | PathLike) -> Concept:
        """Read a file that ``save`` wrote, or any format that ``ck.load_delta`` knows."""
        found = ck.load_delta(path)
        return cls(
            found.delta, dict(found.modifier_tokens), dict(found.metadata), found.weights, found.others
        )

    def of(self, base: ck.KVStack | torch.nn.Module) -> Concept:
        """The concept as a change of ``base``, whose base it must be (`check_base`); mostly itself.

        ``base``: the keys and values, or the UNet, which ``others`` beside whole ``weights`` need.
        """
        stack = base if isinstance(base, ck.KVStack) else ck.KVStack.from_unet(base)
        self.check_base(stack)
        if not self.weights:
            return self
        # the base is checked above, in the dtype of the stack
        found = ck.LoadedDelta({}, weights=self.weights, others=self.others).relative_to(base)
        metadata = {**self.metadata, **base_metadata(stack)}
        return Concept(found.delta, self.modifier_tokens, metadata, others=found.others)

    def save(self, path: str | PathLike) -> None:
        """Write a safetensors file, whole or not at all."""
        own = {"format_version", "library_version"}  # written anew with every file
        metadata = {name: value for name, value in self.metadata.items() if name not in own}
        ck.save_delta(self._held(), path, modifier_tokens=self.modifier_tokens, **metadata)

    def _held(self) -> ck.LoadedDelta:
        return ck.LoadedDelta(self.delta, weights=self.weights, others=self.others)

    def check_base(self, stack: ck.KVStack) -> None:
        """Raise ck.BaseMismatchError unless ``stack`` holds the very weights that the delta is of."""
        check_base(f"concept {self}", self.metadata, stack)

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError if the prompt has none of the modifier tokens."""
        words = list(self.modifier_tokens)
        if words and not mentions(prompt, words):
            raise ValueError(
                f"prompt {prompt!r} has no modifier token of its concept ({', '.join(words)}); write "
                f"{words[0]} where the subject is named, as in 'photo of a {words[0]} dog'"
            )

    def load_into(self, pipe: Any) -> list[str]:
        """Write the weights into ``pipe.unet`` and the modifier tokens into its tokenizers and text encoders.

        For users of diffusers' own pipelines. Returns the names of the segments and the words that were
        written; raises ValueError, before anything is written, if there are none or the pipeline is of
        another base.
        """
        self.check_base(ck.KVStack.from_unet(pipe.unet))
        held = self._held()
        if held.kind == "tokens" and not self.modifier_tokens:
            raise ValueError(
                "concept has neither a weight delta nor a modifier token: there is nothing to load"
            )
        pairs = text_encoders(pipe)
        widths = [encoder.get_input_embeddings().weight.shape[1] for _, encoder in pairs]
        for word, row in self.modifier_tokens.items():
            _check_row(word, row, widths)
        names = [] if held.kind == "tokens" else ck.apply_delta(pipe.unet, held, force=True)
        for k, (tokenizer, encoder) in enumerate(pairs):
            _add_words(
                tokenizer, encoder, {word: _parts(row)[k] for word, row in self.modifier_tokens.items()}
            )
        return [*names, *self.modifier_tokens]

    def __str__(self) -> str:
        return " ".join(self.modifier_tokens) or "without a modifier token"


def match(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[Concept | None]:
    """The concept that each prompt names by a modifier token; else the one that has none, or None.

    Raises ValueError if that would be several, which only their merge could serve.
    """
    nameless = [concept for concept in concepts if not concept.modifier_tokens]
    found: list[Concept | None] = []
    for prompt in prompts:
        fit = [concept for concept in concepts if mentions(prompt, list(concept.modifier_tokens))] or nameless
        if len(fit) > 1:
            raise ValueError(
                f"prompt {prompt!r} fits {len(fit)} concepts ({'; '.join(map(str, fit))}): merge them "
                "first, or give it one alone"
            )
        found.append(fit[0] if fit else None)
    return found


def split_words(prompt: str, words: list[str]) -> list[tuple[str, bool]]:
    """``prompt`` in pieces of (text, False) and (modifier token, True)."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompts must be strings, got {type(prompt).__name__}")
    if not words:
        return [(prompt, False)]
    # a word that begins or ends in a letter must not match inside another; longer words come first
    edges = [(r"(?<!\w)" * w[0].isalnum(), re.escape(w), r"(?!\w)" * w[-1].isalnum()) for w in words]
    pattern = "|".join(sorted(map("".join, edges), key=len, reverse=True))
    return [(piece, i % 2 == 1) for i, piece in enumerate(re.split(f"({pattern})", prompt))]


def mentions(prompt: str, words: list[str]) -> bool:
    """Whether ``prompt`` has one of the modifier tokens as a word of its own."""
    return any(is_word for _, is_word in split_words(prompt, words))


def without_words(prompt: str, words: Iterable[str]) -> str:
    """`prompt` without the modifier tokens `words`: "photo of a <new1> dog" becomes "photo of a dog"."""
    kept = [piece for piece, is_word in split_words(prompt, list(words)) if not is_word]
    return " ".join(" ".join(kept).split())


def _hash_key(dtype: torch.dtype) -> str:
    # KVStack.hash rounds to float16: equal for float32 and float16 loads of one file, not for bfloat16 ones
    return "base_hash_bfloat16" if dtype == torch.bfloat16 else "base_hash"


def _add_words(tokenizer: Any, encoder: torch.nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Write each word's row into the text encoder's table, a new one where it is not in the tokenizer."""
    tokenizer.add_tokens([word for word in rows if _token_id(tokenizer, word) is None])
    table = encoder.get_input_embeddings().weight
    if len(tokenizer) > table.shape[0]:
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        for word, row in rows.items():
            table[_token_id(tokenizer, word)] = row.to(table)
    # Published configurations say 2, by which transformers takes the highest id of a prompt for its end and
    # pools there; a new word's is higher still.
    for part in [encoder.config, *encoder.modules()] if rows else []:
        if getattr(part, "eos_token_id", None) == 2:
            part.eos_token_id = tokenizer.eos_token_id


def _token_id(tokenizer: Any, word: str) -> int | None:
    """The id of ``word`` where it is one token."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None
