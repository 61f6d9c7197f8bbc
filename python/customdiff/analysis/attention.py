"""``customdiff analyse attention``: where a prompt's words are attended to (Custom Diffusion, figure 16)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..commands.common import add_base, add_drawing, existing, guidance_scale
from .report import add_report, begin, save, show, tabulated

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..concept import Concept

SUMMARY = "Attention maps by word, averaged over steps and layers, with the concept and without (figure 16)."
EXAMPLES = """The maps are of the first picture, drawn from 0 to the largest value of each. Printed is how
much two words' maps overlap, from 0 (nowhere) to 1 (one and the same), on average over the pictures: subjects
whose words overlap are drawn into one another. The base has the prompt without the modifier tokens.

examples:
  customdiff analyse attention both.safetensors --prompt "a <new1> dog and a <new2> cat" \\
      --words dog cat --output both_attention/
"""


class WordMaps(NamedTuple):
    """pictures: n of a prompt. maps (n,W,h,w): the share of a pixel's attention that goes to each word."""

    prompt: str
    words: list[str]
    pictures: list[Image.Image]
    maps: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concept", metavar="FILE", help="the concept file")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="with the modifier tokens")
    parser.add_argument("--words", nargs="+", default=(), metavar="WORD", help="of the prompt (default: all)")
    add_drawing(parser)
    add_report(parser)
    add_base(parser)


def run(options: argparse.Namespace) -> None:
    from ..base import load_base
    from ..concept import Concept, without_words

    stem, figure = begin(options)
    concept = Concept.load(existing(options.concept))
    concept.check_prompt(options.prompt)
    plain = without_words(options.prompt, concept.modifier_tokens)
    pipeline = load_base(options.base, options.device)
    versions = {
        name: attention_maps(
            pipeline,
            prompt,
            learned,
            words=[word for word in options.words if learned or word not in concept.modifier_tokens],
            seeds=range(options.seed, options.seed + options.count),
            steps=options.steps,
            guidance_scale=guidance_scale(options),
            progress=not options.quiet,
        )
        for name, prompt, learned in (("base", plain, None), ("concept", options.prompt, concept))
    }
    data = {
        "concept": options.concept,
        "rows": [{"weights": name, **row} for name, found in versions.items() for row in overlaps(found)],
        "maps": {
            name: {
                "prompt": found.prompt,
                "words": {
                    word: shown.double().numpy().round(6).tolist()
                    for word, shown in zip(found.words, found.maps[0], strict=True)
                },
            }
            for name, found in versions.items()
        },
    }
    plot(figure, versions)
    table = tabulated(data["rows"]) if data["rows"] else [["weights", "word", "other", "overlap"]]
    save(stem, data, table, figure)
    show(options, data, table)


def attention_maps(
    pipe: Any,
    prompt: str,
    concept: Concept | None = None,
    *,
    words: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    steps: int = 50,
    guidance_scale: float = 6.0,
    progress: bool = True,
) -> WordMaps:
    """Pictures of ``prompt``, one a seed, and where each word was attended to: cross-attention averaged over
    heads, layers and steps, of the latents' size, and summed over the word's tokens.

    ``words``: default: every word of the prompt, once. Raises ValueError if the prompt lacks one of them.
    """
    import torch

    from ..attention import Recorder, prompt_words, steered, word_positions
    from ..sampler import latent_size, sample

    found = prompt_words(pipe.tokenizer, prompt, concept.modifier_tokens if concept else ())
    words = list(words) or list(dict.fromkeys(word.text for word in found))
    positions = [word_positions(found, word) for word in words]
    if not all(positions):
        raise ValueError(f"words: {words[positions.index([])]!r} is no word of the prompt {prompt!r}")
    recorder = Recorder(len(seeds))
    with steered(pipe.unet, recorder):
        pictures: Any = sample(
            pipe,
            [prompt] * len(seeds),
            concept,
            seeds=list(seeds),
            steps=steps,
            guidance_scale=guidance_scale,
            progress=progress,
        )
    maps = recorder.maps(latent_size(pipe, None))
    by_word = torch.stack([maps[:, at].sum(dim=1) for at in positions], dim=1)
    return WordMaps(prompt, words, pictures, by_word.cpu())


def overlaps(found: WordMaps) -> list[dict[str, Any]]:
    """For each pair of words the part of their maps, each of sum 1, that is common: Σ min, averaged over the
    pictures.
    """
    shares = found.maps / found.maps.sum(dim=(-2, -1), keepdim=True)
    return [
        {
            "word": word,
            "other": found.words[j],
            "overlap": float(shares[:, i].minimum(shares[:, j]).sum(dim=(-2, -1)).mean()),
        }
        for i, word in enumerate(found.words)
        for j in range(i + 1, len(found.words))
    ]


def plot(figure: Any, versions: dict[str, WordMaps]) -> None:
    """Draws a row for each version: its first picture, and that picture's map of every word."""
    from ..plotting import draw_maps

    draw_maps(
        figure,
        [
            (name, found.pictures[0], list(zip(found.words, found.maps[0], strict=True)))
            for name, found in versions.items()
        ],
    )
