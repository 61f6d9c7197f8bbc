"""Merging concept files: what is held, what ordinary captions pay for it, and bad input."""

import copy
import warnings

import pytest
import tiny_pipeline
import torch
from diffusers import StableDiffusionPipeline

import customdiff_kernels as ck
from customdiff import merging
from customdiff.concept import Concept, encode_prompts
from customdiff.merging import merge, renamed, target_features
from customdiff.regularization import merge_solver, regularization_features

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


def test_a_concept_with_two_tokens_keeps_both(pipe, concepts):
    """A merged file, merged again: each of its tokens brings the first prompt that names it."""
    third = tiny_pipeline.concept(pipe, 2, "<new3>")
    for concept, word in zip((*concepts, third), (*WORDS, "<new3>"), strict=True):
        concept.metadata["prompts"] = [late(word), f"{word} on the grass"]
    both, _ = merge(concepts, pipe, CAPTIONS)
    both.metadata["prompts"] += [late(word, 3) for word in WORDS]  # later prompts add no constraint
    merged, _ = merge([both, third], pipe, CAPTIONS)
    assert merged.metadata["prompts"] == [late(word) for word in ("<new1>", "<new2>", "<new3>")]
    stack = ck.KVStack.from_unet(pipe.unet)
    weight = ck.reconstruct(stack, merged.delta).weight
    for concept, word in ((concepts[1], "<new2>"), (third, "<new3>")):
        features = target_features(pipe, [late(word)], concept.modifier_tokens)
        wanted = features @ ck.reconstruct(stack, concept.delta).weight.T
        assert (features @ weight.T - wanted).norm() < 1e-3 * wanted.norm()


def test_a_conflict_is_told_in_words(pipe, concepts):
    """Two modifier tokens with one embedding: the text encoder cannot tell the prompts apart."""
    concepts[1].modifier_tokens["<new2>"] = concepts[0].modifier_tokens["<new1>"]
    words = r'"<new1>" of <new1> \(row 0\) and "<new2>" of <new2> \(row 0\)'
    other = r'"dog" of <new1> \(row 1\) and "dog" of <new2> \(row 1\)'
    end = r'"end of text" of <new1> \(row 2\) .*"padding" of <new1> \(row 3\)'
    with pytest.raises(ck.ConflictingConstraintsError, match=f"{words} .*{other} .*{end}"):
        merge(concepts, pipe, CAPTIONS, prompts=[["<new1> dog"], ["<new2> dog"]])


def test_a_token_that_no_training_prompt_names_is_refused(pipe, concepts):
    lost = tiny_pipeline.concept(pipe, 2, "<new3>", "<new4>")
    lost.metadata["prompts"] = ["photo of a <new3> dog"]
    with pytest.raises(ValueError, match="names its modifier token <new4>, .* give prompts="):
        merge([*concepts, lost], pipe, CAPTIONS)


@pytest.mark.parametrize("low_rank", [False, True])
def test_concepts_are_moved_to_where_the_base_is(pipe, monkeypatch, low_rank):
    """As read from files, they are on the CPU. The base is on the meta device, which every machine has."""
    concepts = [tiny_pipeline.concept(pipe, seed, word, low_rank=low_rank) for seed, word in enumerate(WORDS)]
    given = {}

    class Solver:
        def __init__(self, reg_features, *, ridge):
            given["captions"] = reg_features.device.type

        def report(self, stack, pairs, **options):
            for name, (weights, features, _) in pairs.items():
                device = weights.device if low_rank else weights.weight.device
                given[name] = device.type, features.device.type
            merged = tiny_pipeline.concept(pipe, 2, low_rank=True).delta
            return ck.MergeReport({}, 0.0, dict.fromkeys(pairs, 0.0), 1.0, 1.0, 0.0, {}, merged)

    for concept in concepts:
        concept.metadata = {}  # the hash of a base on the meta device would have to read it
    monkeypatch.setattr(merging, "base_metadata", lambda stack: {})
    monkeypatch.setattr(merging.ck, "MergeSolver", Solver)
    away = copy.deepcopy(pipe)
    away.unet.to("meta")
    away.text_encoder.to("meta")
    merged, _ = merge(concepts, away, CAPTIONS)
    assert given == {"captions": "meta", "<new1>": ("meta", "meta"), "<new2>": ("meta", "meta")}
    assert merged.delta.device.type == "cpu"


def test_bad_input(pipe, concepts):
    first, second = concepts
    with pytest.raises(ValueError, match="concepts must be two or more to merge, got 1"):
        merge([first], pipe, CAPTIONS)
    with pytest.raises(ValueError, match="concepts share the modifier token <new1>: rename one"):
        merge([first, first], pipe, CAPTIONS)
    with pytest.raises(ValueError, match="prompts must be a list for each of the 2 concepts, got 1"):
        merge(concepts, pipe, CAPTIONS, prompts=[["<new1>"]])
    with pytest.raises(ValueError, match="'a dog' has none of the modifier tokens <new1>"):
        merge(concepts, pipe, CAPTIONS, prompts=[["<new1>", "a dog"], ["<new2>"]])
    with pytest.raises(ValueError, match="no prompt of concept <new2> names its modifier token <new2>"):
        merge(concepts, pipe, CAPTIONS, prompts=[["<new1>"], []])
    with pytest.raises(ValueError, match="together: 'a dog' has none of the modifier tokens <new1>, <new2>"):
        merge(concepts, pipe, CAPTIONS, prompts=[["<new1>"], ["<new2>"]], together="a dog")
    with pytest.raises(ValueError, match=r"concepts\[1\] has no modifier token"):
        merge([first, Concept(second.delta)], pipe, CAPTIONS)
    with pytest.raises(ValueError, match="captions must hold at least one caption"):
        merge(concepts, pipe, [])


@pytest.mark.parametrize("prompts", [5, "a <new2> dog", [5], {"a": 1}])
def test_a_file_s_prompts_are_texts(pipe, concepts, prompts):
    concepts[1].metadata["prompts"] = prompts
    for use in (lambda: merge(concepts, pipe, CAPTIONS), lambda: renamed([concepts[1]])):
        with pytest.raises(ValueError, match="concept <new2> has prompts .* not a list of texts"):
            use()


def test_renamed_gives_each_concept_a_token_of_its_own(pipe):
    same = [tiny_pipeline.concept(pipe, seed, "<new1>") for seed in range(3)]
    found, changes = renamed(same)
    assert [list(concept.modifier_tokens) for concept in found] == [["<new1>"], ["<new2>"], ["<new3>"]]
    assert changes == [(1, "<new1>", "<new2>"), (2, "<new1>", "<new3>")]
    torch.testing.assert_close(found[2].modifier_tokens["<new3>"], same[2].modifier_tokens["<new1>"])


def test_renamed_prompts_name_the_new_tokens(pipe):
    same = [tiny_pipeline.concept(pipe, seed, "sks") for seed in range(2)]
    for concept in same:
        concept.metadata["prompts"] = ["a sks dog, asks"]
    found, _ = renamed(same)
    assert [concept.metadata["prompts"] for concept in found] == [["a sks dog, asks"], ["a <new1> dog, asks"]]


def test_the_start_token_regularizes_nothing(pipe):
    """Its features are alike in all captions, and frozen: it counts among neither rows."""
    assert regularization_features(pipe, CAPTIONS).shape == (len(CAPTIONS) * (tiny_pipeline.LENGTH - 1), 32)


def test_the_factor_is_kept_for_its_text_encoder_captions_and_ridge(pipe, tmp_path):
    def files(pipe, captions=CAPTIONS, ridge=1e-6):
        solver = merge_solver(pipe, captions, ridge, cache=tmp_path)
        assert torch.equal(solver.factor, merge_solver(pipe, captions, ridge).factor)
        return len(list(tmp_path.iterdir()))

    assert [files(pipe), files(pipe)] == [1, 1]
    assert [files(pipe, CAPTIONS[::-1]), files(pipe, ridge="auto")] == [2, 3]
    other = copy.deepcopy(pipe)
    other.unet.conv_in.weight.data += 1
    assert files(other) == 3, "the UNet does not matter"
    other.text_encoder.get_input_embeddings().weight.data[0, 0] += 1e-3
    assert files(other) == 4


def context_of(pipe, prompt, rows):
    return encode_prompts(pipe, [prompt], rows).context[0].detach()


def test_each_concept_stays_itself_where_a_prompt_names_both(pipe, concepts):
    """In "<new1> dog and a <new2> dog" each has its values of alone, moved as the base moves plain words."""
    prompts, both = [["<new1> dog"], ["<new2> dog"]], "<new1> dog and a <new2> dog on the grass"
    merged, report = merge(concepts, pipe, CAPTIONS, prompts=prompts, together=both, padding=False)
    stack = ck.KVStack.from_unet(pipe.unet)
    weight = ck.reconstruct(stack, merged.delta).weight
    context = context_of(pipe, both, merged.modifier_tokens)
    for concept, texts, words in zip(concepts, prompts, (slice(1, 3), slice(5, 7)), strict=True):
        own, rows = ck.reconstruct(stack, concept.delta).weight, concept.modifier_tokens
        alone, beside, shift = merging.words_together(pipe, [both], texts, rows, merged.modifier_tokens)
        assert torch.equal(alone, context_of(pipe, texts[0], rows)[1:3])
        assert torch.equal(beside, context[words])
        assert (shift.abs().max() < 1e-5) == (words.start == 1), "the first subject stands where it stood"
        wanted = alone @ own.T + shift @ stack.weight.T
        assert (context[words] @ weight.T - wanted).norm() < 1e-3 * wanted.norm()
        untouched = context[words] @ stack.weight.T
        assert (untouched - wanted).norm() > 1e-2 * wanted.norm()
    assert [len(rows) for rows in report.residual.values()] == [2, 2, 2, 2], "the words, not the padding"


def test_the_shift_is_that_of_ordinary_words(pipe, concepts):
    """Drawn words tell what the whole vocabulary's mean is."""
    rows = concepts[0].modifier_tokens | concepts[1].modifier_tokens
    both, alone = "a <new1> dog and a <new2> dog", "a <new2> dog"
    _, _, shift = merging.words_together(pipe, [both], [alone], concepts[1].modifier_tokens, rows)
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    moves = [
        context_of(pipe, both, {"<new1>": table[-1 - i], "<new2>": row})[6:8]
        - context_of(pipe, alone, {"<new2>": row})[2:4]
        for i, row in enumerate(table)
    ]
    mean = torch.stack(moves).mean(0)
    assert (shift - mean).norm() < 0.5 * mean.norm() and mean.norm() > 1e-2


def test_a_phrase_is_followed_as_far_as_the_prompt_together_follows_it(pipe, concepts):
    own = concepts[0].modifier_tokens
    rows = own | concepts[1].modifier_tokens
    given = ["a <new1> dog on the grass"]
    for together, count in (
        (["<new1> dog on the beach"], 4),
        (["<new2> and <new1> cup", "a <new1> dog"], 3),
        (["a <new2> cup"], 0),
    ):
        parts = merging.words_together(pipe, together, given, own, rows)
        assert [len(part) for part in parts] == [count] * 3
