"""Merging concept files: what is held, what ordinary captions pay for it, and bad input."""

import warnings

import pytest
import tiny_pipeline
import torch
from diffusers import StableDiffusionPipeline

import customdiff_kernels as ck
from customdiff.merging import merge, regularization_features, renamed, target_features

CAPTIONS = [
    "photo of a dog",
    "a red cat on the grass",
    "two blue car",
    "a cup and a hat",
    "the beach with a car",
]
WORDS = ("<new1>", "<new2>")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny_pipeline.build(tmp_path_factory.mktemp("tiny"))
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.fixture
def concepts(pipe):
    return [tiny_pipeline.concept(pipe, seed, word) for seed, word in enumerate(WORDS)]


def late(word, words=2):
    """A prompt with few tokens from the modifier token on, for a text of 32 numbers and 16 tokens."""
    return " ".join(["photo"] * (tiny_pipeline.LENGTH - 2 - words) + [word] + ["dog"] * (words - 1))


def test_every_target_is_held_and_nothing_is_warned_of_while_room_is_left(pipe, concepts):
    prompts = [[late(word)] for word in WORDS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged, report = merge(concepts, pipe, CAPTIONS, prompts=prompts)
    stack = ck.KVStack.from_unet(pipe.unet)
    weight = ck.reconstruct(stack, merged.delta).weight
    for concept, texts in zip(concepts, prompts, strict=True):
        features = target_features(pipe, texts, concept.modifier_tokens)
        wanted = features @ ck.reconstruct(stack, concept.delta).weight.T
        assert (features @ weight.T - wanted).norm() < 1e-3 * wanted.norm()
    assert report.drift < sum(report.concept_drift.values())
    assert merged.modifier_tokens.keys() == set(WORDS)


def test_a_merge_that_leaves_no_room_says_so(pipe, concepts):
    """Two prompts of almost the whole length fill a text of 32 numbers."""
    prompts = [[f"{word} dog on the grass"] for word in WORDS]
    with pytest.warns(UserWarning, match=r"30 target tokens leave too little free of a text 32 wide"):
        merge(concepts, pipe, CAPTIONS, prompts=prompts)


def test_bad_input(pipe, concepts):
    first, second = concepts
    with pytest.raises(ValueError, match="concepts must be two or more to merge, got 1"):
        merge([first], pipe, CAPTIONS)
    with pytest.raises(ValueError, match="concepts share the modifier token <new1>: rename one"):
        merge([first, first], pipe, CAPTIONS)
    with pytest.raises(ValueError, match="prompts must be a list for each of the 2 concepts, got 1"):
        merge(concepts, pipe, CAPTIONS, prompts=[["<new1>"]])
    with pytest.raises(ValueError, match="'a dog' has none of the modifier tokens <new1>"):
        merge(concepts, pipe, CAPTIONS, prompts=[["a dog"], ["<new2>"]])
    with pytest.raises(ValueError, match="captions must hold at least one caption"):
        merge(concepts, pipe, [])


def test_renamed_gives_each_concept_a_token_of_its_own(pipe):
    same = [tiny_pipeline.concept(pipe, seed, "<new1>") for seed in range(3)]
    found, changes = renamed(same)
    assert [list(concept.modifier_tokens) for concept in found] == [["<new1>"], ["<new2>"], ["<new3>"]]
    assert changes == [(1, "<new1>", "<new2>"), (2, "<new1>", "<new3>")]
    torch.testing.assert_close(found[2].modifier_tokens["<new3>"], same[2].modifier_tokens["<new1>"])


def test_the_start_token_regularizes_nothing(pipe):
    """Its features are alike in all captions, and frozen: it counts among neither rows."""
    assert regularization_features(pipe, CAPTIONS).shape == (len(CAPTIONS) * (tiny_pipeline.LENGTH - 1), 32)
