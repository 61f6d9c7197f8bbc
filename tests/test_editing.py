"""Prompt-to-prompt: its maps against their definition, its pictures against the sampler's."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402
from test_attention import Keep  # noqa: E402
from test_sampler import assert_close  # noqa: E402

from customdiff import editing, load_base  # noqa: E402
from customdiff.attention import Layer, prompt_words, steered  # noqa: E402
from customdiff.editing import Blend, PromptToPrompt, align, edit, invert  # noqa: E402
from customdiff.sampler import sample  # noqa: E402
from tinysd import detector  # noqa: E402

FAST = {"steps": 4, "output": "latents", "progress": False}
CROSS, SELF = Layer("attn2", True, 9), Layer("attn1", False, 9)
S = tiny_pipeline.LENGTH


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load_base(str(tiny_pipeline.build(tmp_path_factory.mktemp("tiny"))), "cpu")


@pytest.fixture(scope="module")
def base():
    return load_base(None, "cpu")


@pytest.fixture
def words(pipe):
    return lambda *prompts: [prompt_words(pipe.tokenizer, prompt, ["<new1>"]) for prompt in prompts]


def probabilities(rows, keys=S):
    return torch.rand(rows, 2, 9, keys).softmax(-1)


# align


@pytest.mark.parametrize(
    "source, target, pairs, added",
    [
        ("photo of a dog", "photo of a cat", [(1, 1), (2, 2), (3, 3), (4, 4)], []),
        ("photo of a dog", "photo of a <new1> dog", [(1, 1), (2, 2), (3, 3), (4, 5)], [4]),
        ("photo of a dog", "photo of a <new1> cat", [(1, 1), (2, 2), (3, 3), (4, 5)], [4]),
        ("a red dog", "a dog on the beach", [(1, 1), (3, 2)], [3, 4, 5]),
        ("a red dog", "a <new1> cat", [(1, 1), (2, 2), (3, 3)], []),
        ("", "dog", [], [1]),
    ],
)
def test_words_are_matched_in_their_order(words, source, target, pairs, added):
    mapper = align(*words(source, target), S)
    end_source, end_target = len(source.split()) + 1, len(target.split()) + 1
    wanted = torch.zeros(S, S)
    tail = min(S - end_source, S - end_target)
    for i, j in [(0, 0), *pairs, *((end_source + k, end_target + k) for k in range(tail))]:
        wanted[i, j] = 1
    assert torch.equal(mapper, wanted)
    more = range(end_target + tail, S)  # padding that only the target has
    assert [j for j in range(S) if not mapper[:, j].any()] == [*added, *more]


def test_a_word_of_other_tokens_gets_all_of_the_attention(words):
    mapper = align(*words("a dog", "a kxq"), S)
    assert mapper[2, 2:5].tolist() == [pytest.approx(1 / 3)] * 3
    mapper = align(*words("a kxq", "a dog"), S)
    assert mapper[2:5, 2].tolist() == [1, 1, 1]
    mapper = align(*words("a kxq", "a uvw"), S)
    assert torch.equal(mapper, torch.eye(S))


# the control


def test_swapped_words_have_the_sources_maps(words):
    control = PromptToPrompt(words("a red dog", "a red cat", "a blue dog"), S, cross_steps=2)
    given = probabilities(6)  # unconditional: 3, conditional: source, two targets
    for control.step in (0, 1):
        got = control(given, CROSS)
        assert torch.equal(got[:4], given[:4])
        assert torch.equal(got[4], given[3]) and torch.equal(got[5], given[3])
        assert not torch.equal(given[4], given[3])
    control.step = 2
    assert not control.wants(CROSS)


def test_added_words_keep_their_own_maps(words):
    source, target = words("photo of a dog", "photo of a <new1> dog")
    control, given = PromptToPrompt([source, target], S, cross_steps=1), probabilities(2)
    got = control(given, CROSS)[1]
    assert torch.equal(got[..., 4], given[1, ..., 4]), "<new1>"
    assert torch.equal(got[..., :4], given[0, ..., :4]) and torch.equal(got[..., 5:], given[0, ..., 4:-1])


def test_a_weight_scales_exactly_the_words_column(words):
    prompts = words("a dog on the beach", "a dog on the beach", "a <new1> dog")
    for steps in (0, 4):
        control = PromptToPrompt(prompts, S, cross_steps=steps, reweight={"beach": -2.5})
        plain, given = PromptToPrompt(prompts, S, cross_steps=steps), probabilities(3)
        got, want = control(given, CROSS), plain(given, CROSS)
        others = [j for j in range(S) if j != 5]
        assert torch.equal(got[1, ..., 5], -2.5 * want[1, ..., 5])
        assert torch.equal(got[1][..., others], want[1][..., others])
        assert torch.equal(got[2], want[2]) and torch.equal(got[0], given[0])
        control.step = 1000
        assert control.wants(CROSS), "to the last step"


def test_words_may_have_steps_of_their_own(words):
    prompts = words("a red dog on the beach", "a red cat on the beach")
    control, given = PromptToPrompt(prompts, S, cross_steps=3, word_steps={"cat": 1}), probabilities(2)
    for control.step in range(3):
        got = control(given, CROSS)[1]
        assert torch.equal(got[..., 2], given[0, ..., 2])
        assert torch.equal(got[..., 3], given[0 if control.step < 1 else 1, ..., 3])
    control = PromptToPrompt(prompts, S, word_steps={"cat": 2})
    control.step = 1
    assert control.wants(CROSS) and torch.equal(control(given, CROSS)[1, ..., 3], given[0, ..., 3])
    assert torch.equal(control(given, CROSS)[1, ..., 2], given[1, ..., 2])


def test_self_attention_is_the_sources_in_small_layers(words):
    control = PromptToPrompt(words("a dog", "a cat", "a car"), S, self_steps=1, self_pixels=9)
    given = probabilities(3, keys=9)
    got = control(given, SELF)
    assert all(torch.equal(row, given[0]) for row in got)
    assert control.wants(SELF) and not control.wants(SELF._replace(pixels=10)) and not control.wants(CROSS)
    control.step = 1
    assert not control.wants(SELF)


def test_outside_of_the_words_the_source_stays(words):
    blend = Blend(words("a dog", "a cat"), ["dog", "cat"], start=1, most_pixels=64)
    p = torch.full((4, 2, 64, S), 1e-3)
    p[2, :, 0, 2] = 1  # the source's dog is at the upper left, the target's cat at the lower right
    p[3, :, 63, 2] = 1
    blend.recorder(p, Layer("attn2", True, 64))
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(blend(0, x), x)
    got, near = blend(1, x), torch.zeros(8, 8, dtype=torch.bool)
    near[:2, :2] = near[-2:, -2:] = True
    assert torch.equal(got[0], x[0])
    assert torch.equal(got[1][:, near], x[1][:, near]) and torch.equal(got[1][:, ~near], x[0][:, ~near])


# through the pipeline


@pytest.mark.parametrize("shares", [{"cross_steps": 0, "self_steps": 0}, {"cross_steps": 1, "self_steps": 1}])
def test_the_same_prompt_gives_the_samplers_picture(pipe, shares):
    want = sample(pipe, "a red dog", seeds=3, **FAST)
    got = edit(pipe, "a red dog", "a red dog", seed=3, self_side=16, reweight={"dog": 1}, **shares, **FAST)
    assert got.shape[0] == 2
    for row in got:
        assert_close(row[None], want)


def test_a_concept_belongs_to_its_own_rows(pipe):
    concept = tiny_pipeline.concept(pipe, 0)
    source, targets = "a red dog", ["a <new1> dog", "a blue cat"]
    got = edit(pipe, source, targets, concept, seed=3, cross_steps=0, self_steps=0, **FAST)
    want = sample(pipe, [source, *targets], [None, concept, None], seeds=[3] * 3, **FAST)
    assert_close(got, want)
    steered_ = edit(pipe, source, targets, [None, concept, None], seed=3, **FAST)
    assert_close(steered_[:1], want[:1])  # the source is never changed
    assert (steered_[1:] - want[1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    both = edit(pipe, "a <new1> dog", "a <new1> cat", concept, seed=3, **FAST)
    assert_close(both[:1], sample(pipe, "a <new1> dog", concept, seeds=3, **FAST))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_with_full_replacement_the_targets_maps_are_the_sources(pipe, guidance_scale):
    keep = Keep()
    with steered(pipe.unet, keep):
        edit(
            pipe,
            "a red dog",
            "a blue cat",
            cross_steps=1,
            self_steps=1,
            self_side=16,
            guidance_scale=guidance_scale,
            **FAST,
        )
    assert len(keep.seen) == len(pipe.unet.attn_processors)
    for p in keep.seen.values():
        assert torch.equal(p[-1], p[-2])
    if guidance_scale != 1:
        assert not torch.equal(p[0], p[-1]), "the unconditional rows are left alone"


def test_sdxl(tmp_path):
    pipe = load_base(str(tiny_pipeline.build_xl(tmp_path)), "cpu")
    concept, keep = tiny_pipeline.concept(pipe, 0), Keep()
    prompts = ["a red dog", "a <new1> cat"]
    got = edit(pipe, *prompts, concept, seed=3, cross_steps=0, self_steps=0, **FAST)
    assert_close(got, sample(pipe, prompts, [None, concept], seeds=[3, 3], **FAST))
    with steered(pipe.unet, keep):
        edit(pipe, *prompts, concept, cross_steps=1, self_steps=1, self_side=16, **FAST)
    assert all(torch.equal(p[-1], p[-2]) for p in keep.seen.values()) and keep.seen


def test_the_unet_is_left_as_it_was(pipe, monkeypatch):
    processors = dict(pipe.unet.attn_processors)
    edit(pipe, "a dog", "a cat", blend=["dog"], **FAST)
    monkeypatch.setattr(editing, "sample", lambda *a, **b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edit(pipe, "a dog", "a cat", **FAST)
    assert all(pipe.unet.attn_processors[k] is v for k, v in processors.items())


def test_bad_input(pipe):
    concept = tiny_pipeline.concept(pipe, 0)
    for options, message in [
        ({"targets": []}, "targets is empty"),
        ({"concepts": [concept]}, "concepts has 1 entries for 2 prompts; give one each"),
        ({"cross_steps": 1.5}, "cross_steps must be a share of the steps, from 0 to 1, got 1.5"),
        ({"self_steps": -1}, "self_steps must be a share"),
        ({"self_steps": math.nan}, "self_steps must be a share"),
        ({"word_steps": {"cat": 2}}, "word_steps must be a share"),
        ({"word_steps": {"dog": 0.5}}, "word_steps: none of the targets has the word 'dog'; .* a blue cat"),
        ({"reweight": {"hat": 2}}, "reweight: none of the targets has the word 'hat'"),
        ({"reweight": {"cat": math.inf}}, "reweight must be finite, got inf for 'cat'"),
        ({"blend": ["hat"]}, "blend: none of the prompts has the word 'hat'; they read: a dog; a blue cat"),
        ({"picture": Image.new("RGB", (9, 9)), "size": (32, 32)}, "size must be left out with picture"),
        ({"targets": "a <new1> cat"}, "names the modifier token <new1>, and it has no concept"),
    ]:
        with pytest.raises(ValueError, match=message):
            edit(**{"pipe": pipe, "source": "a dog", "targets": "a blue cat", **FAST, **options})
    with pytest.raises(TypeError, match="pipe must be a StableDiffusionPipeline, got str"):
        edit("sd", "a dog", "a cat")
    with pytest.raises(TypeError, match="concepts has an entry of type str"):
        edit(pipe, "a dog", "a cat", ["dog.safetensors", None])
    with pytest.raises(TypeError, match="picture must be a PIL image, got str"):
        edit(pipe, "a dog", "a cat", picture="dog.png")
    with pytest.raises(ValueError, match=r"latents must be \(1, 4, h, w\), a row for each prompt, got"):
        sample(pipe, "a dog", latents=torch.zeros(2, 4, 16, 16), **FAST)


# on the embedded base


def test_injection_keeps_the_background(base):
    """dog -> car, the place unnamed: where no subject is, the edit differs from the source half as much as
    the sample of the same seed does, at most.
    """
    prompts, seeds = ["photo of a dog", "photo of a car"], [3, 4, 5]
    options = {"steps": 8, "guidance_scale": 3.0, "progress": False}
    flat = [s for s in seeds for _ in prompts]
    pairs = {
        "sampled": sample(base, prompts * len(seeds), seeds=flat, **options),
        "edited": [p for s in seeds for p in edit(base, *prompts, self_steps=0.8, seed=s, **options)],
    }
    difference = {}
    for name, pictures in pairs.items():
        found = [[subject.category for subject in subjects] for subjects in detector.load().detect(pictures)]
        assert found == [["dog"], ["car"]] * len(seeds), name
        a, b = (np.stack([np.asarray(p) / 255.0 for p in pictures[k::2]]) for k in (0, 1))
        free = (detector.categories(pictures[::2]) == 0) & (detector.categories(pictures[1::2]) == 0)
        difference[name] = np.abs(a - b)[free].mean()
    assert difference["edited"] < difference["sampled"] / 2, difference


def test_a_negative_weight_drives_the_word_out(base):
    prompt = "photo of a red dog on the beach"
    options = {"steps": 8, "guidance_scale": 3.0, "progress": False}
    for seed in (0, 1):
        before, after = edit(base, prompt, prompt, reweight={"red": -2}, seed=seed, **options)
        (one,), (other,) = detector.load().detect([before, after])
        assert (one.category, one.colour) == ("dog", "red") and other.category == "dog"
        assert other.colour != "red"


def test_a_real_picture_is_inverted(base):
    from tinysd import world

    ((picture, caption),) = world.concept_pictures("teal_dog", 1, 3)
    options = {"steps": 20, "progress": False}
    latents = invert(base, picture, caption, **options)
    assert latents.shape == (1, 8, 16, 16)
    (back,) = sample(base, caption, latents=latents, guidance_scale=1, output="tensor", **options)
    (drawn,) = sample(base, caption, guidance_scale=1, output="tensor", **options)
    wanted = torch.from_numpy(np.asarray(picture) / 255.0).permute(2, 0, 1)
    error, other = ((x - wanted).square().mean().sqrt() for x in (back, drawn))
    assert error < other / 3, (error, other)
    for row in edit(base, caption, caption, picture=picture, output="tensor", **options):
        assert_close(row, back)
