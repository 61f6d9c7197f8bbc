"""Concepts and the sampler, against diffusers' own pipeline with the same weights written into it."""

import copy
from unittest import mock

import numpy
import pytest
import torch

import customdiff_kernels as ck

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402

from customdiff import sampler  # noqa: E402
from customdiff.concept import Concept, encode_prompts, match, tokenize  # noqa: E402
from customdiff.conditioning import project  # noqa: E402
from customdiff.sampler import sample  # noqa: E402

FAST = {"steps": 3, "output": "latents", "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipe(folder):
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def assert_close(got, want, rtol=1e-4):
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= rtol * size, f"error {error:.2e}, largest value {size:.2e}"


def diffusers_latents(pipe, prompts, seeds, **options):
    noise = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])
    return pipe(prompts, latents=noise, output_type="latent", num_inference_steps=3, **options).images


@pytest.mark.parametrize(
    "prompt", ["photo of a dog on the beach", "Red  CAR, with two hats!", "", "it's 24 cats"]
)
def test_tokens_of_a_plain_prompt_are_the_tokenizers(pipe, prompt):
    want = pipe.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
    tokens = tokenize(pipe.tokenizer, [prompt], [["<new1>"]])
    assert torch.equal(tokens.ids, want) and tokens.places == []


@pytest.mark.parametrize("prompt", ["photo of a <new1> dog", "<new1>, red", "<new2> cat and <new1>cat's hat"])
def test_modifier_tokens_stand_where_an_added_token_would(pipe, prompt):
    tokens = tokenize(pipe.tokenizer, [prompt], [["<new1>", "<new2>"]])
    before = len(pipe.tokenizer)
    pipe.tokenizer.add_tokens(["<new1>", "<new2>"])
    want = pipe.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
    added = [(0, int(p), pipe.tokenizer.decode([int(want[0, p])])) for p in (want[0] >= before).nonzero()]
    assert tokens.places == added != []
    at = [position for _, position, _ in added]
    want[0, at] = tokens.ids[0, at]
    assert torch.equal(tokens.ids, want)


def test_a_word_matches_only_as_a_word(pipe):
    tokens = tokenize(pipe.tokenizer, ["a sks dog, askst, sks."], [["sks"]])
    assert [word for _, _, word in tokens.places] == ["sks", "sks"]
    tokens = tokenize(pipe.tokenizer, ["<a> <a>b"], [["<a>", "<a>b"]])
    assert [word for _, _, word in tokens.places] == ["<a>", "<a>b"]


def test_encoding_puts_each_prompts_own_rows_in(pipe):
    rows = [{"<new1>": torch.randn(32)}, {}, {"<new1>": torch.randn(32), "<new2>": torch.randn(32)}]
    prompts = ["photo of a <new1> dog", "photo of a dog", "<new2> cat and <new1> car"]
    table = pipe.text_encoder.get_input_embeddings().weight.clone()
    got, pooled = encode_prompts(pipe, prompts, rows)
    assert pooled is None
    after = pipe.text_encoder.get_input_embeddings()
    assert torch.equal(after.weight, table) and not after._forward_hooks
    for i, prompt in enumerate(prompts):
        merged = copy.deepcopy(pipe)
        if rows[i]:
            assert Concept({}, rows[i]).load_into(merged) == list(rows[i])
        ids = merged.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
        assert_close(got[i : i + 1], merged.text_encoder(ids).last_hidden_state)


def test_gradient_reaches_the_modifier_rows_alone(pipe):
    pipe.text_encoder.requires_grad_(False)
    row, unused = (torch.randn(32, requires_grad=True) for _ in range(2))
    direction = torch.randn(16, 32)

    def loss(row):
        rows = {"<new1>": row, "<new2>": unused}
        return encode_prompts(pipe, ["a <new1> dog", "a dog"], rows).context @ direction.T

    losses = loss(row)
    assert not torch.autograd.grad(losses[1].sum(), row, retain_graph=True)[0].any()
    (grad,) = torch.autograd.grad(losses[0].trace(), row)
    step = 1e-2 * torch.nn.functional.normalize(grad, dim=0)
    rise = (loss(row + step)[0].trace() - loss(row - step)[0].trace()) / 2
    assert_close(rise, (grad * step).sum(), rtol=1e-2)


def test_rows_survive_an_encoder_in_bfloat16(pipe):
    pipe.text_encoder.to(torch.bfloat16)
    row = torch.randn(32, requires_grad=True)
    context = encode_prompts(pipe, ["a <new1> dog"], {"<new1>": row}).context
    (grad,) = torch.autograd.grad(context.float().square().sum(), row)
    assert grad.dtype == torch.float32 and grad.any()


def test_prompt_errors(pipe):
    concept = tiny_pipeline.concept(pipe, 0)
    with pytest.raises(ValueError, match="prompt 'a dog' has no modifier token of its concept .<new1>."):
        sample(pipe, "a dog", concept, **FAST)
    with pytest.raises(ValueError, match="names the modifier token <new2>, and its concept has <new1>"):
        sample(pipe, "a <new1> dog and a <new2> cat", concept, **FAST)
    with pytest.raises(
        ValueError, match="'a <new1> dog' names the modifier token <new1>, and it has no concept"
    ):
        sample(pipe, "a <new1> dog", **FAST)
    long = "photo of a dog " * 4
    with pytest.raises(ValueError, match="modifier token <new1> comes after the 14 tokens"):
        sample(pipe, long + "<new1>", concept, **FAST)
    with pytest.warns(UserWarning, match="cut to 14 of its 17 tokens"):
        tokens = tokenize(pipe.tokenizer, ["<new1> " + long], [["<new1>"]])
    assert tokens.ids.shape == (1, 16) and tokens.ids[0, -1] == pipe.tokenizer.eos_token_id
    with pytest.raises(TypeError, match="prompts must be strings, got int"):
        sample(pipe, [3], **FAST)


def test_argument_errors(pipe):
    concept = tiny_pipeline.concept(pipe, 0)
    for options, message in [
        ({"concepts": [concept, concept]}, "concepts has 2 entries for 1 prompts"),
        ({"seeds": [1, 2]}, "seeds has 2 entries for 1 prompts"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"eta": 2.0}, r"eta must be from 0 .DDIM. to 1 .DDPM., got 2.0"),
        ({"eta": -0.1}, "eta must be from 0"),
        ({"eta": float("nan")}, "eta must be from 0 .* got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite, got inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite, got nan"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be from 0 \(none\) to 1 \(all of it\), got 1.5"),
        ({"size": (30, 31)}, r"size must be .height, width. in multiples of 2, got .30, 31."),
        ({"output": "np"}, "output must be 'pil', 'tensor' or 'latents', got 'np'"),
        ({"scheduler": diffusers.EulerDiscreteScheduler(), "eta": 1.0}, "EulerDiscreteScheduler has none"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(pipe, "a dog", **{**FAST, **options})
    with pytest.raises(ValueError, match="prompts is empty"):
        sample(pipe, [], **FAST)
    with pytest.raises(TypeError, match="pipe must be a StableDiffusionPipeline, got str without unet"):
        sample("runwayml/stable-diffusion", "a dog")
    with pytest.raises(TypeError, match="concepts has an entry of type str"):
        sample(pipe, ["a dog"], ["delta.safetensors"], **FAST)


def test_a_concept_of_another_base_is_refused(pipe):
    concept = tiny_pipeline.concept(pipe, 0)
    attn = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attn.to_k.weight.data += 1
    before = ck.KVStack.from_unet(pipe.unet).weight
    for use in (lambda: sample(pipe, "a <new1> dog", concept, **FAST), lambda: concept.load_into(pipe)):
        with pytest.raises(ValueError, match=f"base_hash {concept.metadata['base_hash'][:12]}"):
            use()
    assert torch.equal(ck.KVStack.from_unet(pipe.unet).weight, before)
    assert "<new1>" not in pipe.tokenizer.get_vocab()


def test_load_into_says_what_it_did(pipe):
    concept = tiny_pipeline.concept(pipe, 0)
    names = [segment.name for segment in ck.KVStack.from_unet(pipe.unet).segments]
    with pytest.raises(ValueError, match="nothing to load"):
        Concept({}).load_into(pipe)
    for row, shapes in ((torch.zeros(31), r"\(31,\)"), ((torch.zeros(32),) * 2, r"\(32,\), \(32,\)")):
        other = Concept(concept.delta, {"<new1>": row}, concept.metadata)
        for use in (lambda o=other: o.load_into(pipe), lambda o=other: sample(pipe, "a <new1>", o, **FAST)):
            with pytest.raises(ValueError, match=f"<new1> has embeddings of shape {shapes}; .* of width 32"):
                use()
    assert "<new1>" not in pipe.tokenizer.get_vocab()
    assert concept.load_into(pipe) == [*names, "<new1>"]
    with pytest.raises(ValueError, match="without another delta in it"):
        concept.load_into(pipe)


def test_load_into_overwrites_a_word_that_the_tokenizer_knows(pipe):
    size, row = len(pipe.tokenizer), torch.randn(32)
    Concept({}, {"ktn": row}).load_into(pipe)
    assert len(pipe.tokenizer) == size == pipe.text_encoder.get_input_embeddings().weight.shape[0]
    (token,) = pipe.tokenizer("ktn", add_special_tokens=False).input_ids
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[token], row)


def test_match_finds_the_concept_that_a_prompt_names():
    first, second = (Concept({}, {word: torch.zeros(32)}) for word in ("<new1>", "<new2>"))
    prompts = ["a <new2> dog", "a dog", "a <new1> cat"]
    assert match(prompts, [first, second]) == [second, None, first]
    with pytest.raises(ValueError, match="fits 2 concepts .<new1>; <new2>.: merge them first"):
        match(["a <new1> dog and a <new2> cat"], [first, second])


def test_a_concept_without_a_modifier_token_serves_what_no_other_does():
    first, style, other = Concept({}, {"<new1>": torch.zeros(32)}), Concept({}), Concept({})
    assert match(["a <new1> dog", "a dog"], [first, style]) == [first, style]
    with pytest.raises(ValueError, match="'a dog' fits 2 concepts"):
        match(["a dog"], [style, other])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_batch_of_four_concepts_is_four_separate_runs(pipe, eta):
    concepts = [
        tiny_pipeline.concept(pipe, 0, "<new1>"),
        tiny_pipeline.concept(pipe, 1, "<new1>", low_rank=True),
        tiny_pipeline.concept(pipe, 2, "<cat>", "<dog>", low_rank=True),
        None,
    ]
    prompts = ["a <new1> dog", "photo of a <new1> cat", "a <cat> and a <dog>", "a red car"]
    seeds = [5, 5, 6, 7]
    with (
        mock.patch.object(pipe.unet, "forward", wraps=pipe.unet.forward) as unet,
        mock.patch.object(sampler.ck, "kv_project", wraps=ck.kv_project) as projection,
    ):
        batch = sample(pipe, prompts, concepts, seeds=seeds, eta=eta, **FAST)
    assert unet.call_count == FAST["steps"] and projection.call_count == 1
    for i in range(4):
        alone = sample(pipe, prompts[i], concepts[i], seeds=seeds[i], eta=eta, **FAST)
        assert_close(batch[i : i + 1], alone)
    assert (batch[0] - batch[1]).abs().max() > 0.1


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_same_latents_as_diffusers_with_the_concept_loaded(pipe, prediction, low_rank):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    concept, merged = tiny_pipeline.concept(pipe, 0, low_rank=low_rank), copy.deepcopy(pipe)
    concept.load_into(merged)
    prompts, options = ["a <new1> dog", "photo of a <new1> cat"], {"guidance_scale": 4.0}
    want = diffusers_latents(merged, prompts, [3, 4], negative_prompt=["blue"] * 2, **options)
    got = sample(pipe, prompts, concept, seeds=3, negative_prompt="blue", **options, **FAST)
    assert_close(got, want)
    base = sample(pipe, ["a ktn dog", "photo of a ktn cat"], seeds=3, **options, **FAST)
    assert (got - base).abs().max() > 0.1


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_any_scheduler(pipe, name):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    want = diffusers_latents(pipe, ["a dog"], [3], generator=[torch.Generator().manual_seed(3)])
    scheduler = copy.deepcopy(pipe.scheduler)
    got = sample(pipe, "a dog", seeds=3, guidance_scale=7.5, scheduler=scheduler, **FAST)
    again = sample(pipe, "a dog", seeds=3, guidance_scale=7.5, scheduler=scheduler, **FAST)
    assert torch.equal(got, again)
    if name != "DDPMScheduler":  # whose noise ours draws after the latents', from the same generator
        assert_close(got, want)


def test_guidance_is_rescaled_row_by_row_as_in_diffusers(pipe):
    options = {"guidance_scale": 9.0, "guidance_rescale": 0.7}
    got = sample(pipe, ["a dog", "photo of a cat"], seeds=[3, 9], **options, **FAST)
    assert_close(got, diffusers_latents(pipe, ["a dog", "photo of a cat"], [3, 9], **options))
    plain = sample(pipe, ["a dog", "photo of a cat"], seeds=[3, 9], guidance_scale=9.0, **FAST)
    assert got.std() < plain.std()


def test_without_guidance_one_row_a_prompt(pipe):
    with mock.patch.object(pipe.unet, "forward", wraps=pipe.unet.forward) as unet:
        got = sample(pipe, "a dog", guidance_scale=1.0, **FAST)
    assert all(call.args[0].shape[0] == 1 for call in unet.call_args_list)
    assert_close(got, diffusers_latents(pipe, ["a dog"], [0], guidance_scale=1.0))


def test_outputs_and_size(pipe):
    options = {"steps": 1, "progress": False}
    tensor = sample(pipe, ["a dog", "a cat"], output="tensor", **options)
    assert tensor.shape == (2, 3, 32, 32) and tensor.dtype == torch.float32
    assert 0 <= tensor.min() < tensor.max() <= 1
    images = sample(pipe, ["a dog", "a cat"], **options)
    assert [image.size for image in images] == [(32, 32)] * 2
    assert numpy.abs(numpy.asarray(images[1]) / 255 - tensor[1].permute(1, 2, 0).numpy()).max() < 0.51 / 255
    assert sample(pipe, "a dog", size=(16, 48), **options)[0].size == (48, 16)


def test_the_pipeline_is_left_as_it_was(pipe):
    processors, config = pipe.unet.attn_processors, dict(pipe.scheduler.config)
    state = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    concept = tiny_pipeline.concept(pipe, 0)
    sample(pipe, "a <new1> dog", concept, **FAST)
    with mock.patch.object(sampler, "denoise", side_effect=RuntimeError("stopped")):
        with pytest.raises(RuntimeError, match="stopped"):
            sample(pipe, "a dog", **FAST)
    assert all(pipe.unet.attn_processors[k] is v for k, v in processors.items())
    assert dict(pipe.scheduler.config) == config and pipe.scheduler.num_inference_steps is None
    assert all(torch.equal(v, state[k]) for k, v in pipe.unet.state_dict().items())
    patched = ck.patch_unet(pipe.unet)
    sample(pipe, "a dog", **FAST)
    assert ck.unpatch_unet(pipe.unet) == patched  # a UNet that was patched before stays so


def test_bfloat16(pipe):
    concept = tiny_pipeline.concept(pipe, 0, low_rank=True)
    want = sample(pipe, "a <new1> dog", concept, **FAST)
    pipe.to(torch.bfloat16)
    got = sample(pipe, "a <new1> dog", concept, **FAST)
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.1 * want.norm()
    pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.data += 1
    with pytest.raises(ValueError, match="base_hash_bfloat16"):
        sample(pipe, "a <new1> dog", concept, **FAST)
    del concept.metadata["base_hash_bfloat16"]
    with pytest.warns(UserWarning, match="cannot tell its base in bfloat16"):
        sample(pipe, "a <new1> dog", concept, **FAST)


def test_projection_is_that_of_the_changed_weights(pipe):
    stack, context = ck.KVStack.from_unet(pipe.unet), torch.randn(4, 16, 32)
    full, low = tiny_pipeline.concept(pipe, 0), tiny_pipeline.concept(pipe, 1, low_rank=True)
    part = Concept(dict(list(full.delta.items())[:1]))
    got = project(stack, context, [full, low, None, part])
    for i, concept in enumerate([full, low, None, part]):
        weight = stack.weight if concept is None else ck.reconstruct(stack, concept.delta).weight
        assert_close(got[i], context[i] @ weight.T, rtol=1e-5)


def test_a_concept_file_round_trip(pipe, tmp_path):
    for low_rank in (False, True):
        concept = tiny_pipeline.concept(pipe, 0, "<new1>", "sks", low_rank=low_rank)
        concept.metadata["prompt"] = "photo of a <new1> sks dog"
        path = tmp_path / f"{low_rank}.safetensors"
        concept.save(path)
        Concept.load(path).save(path)  # a file that was read can be written again
        loaded = Concept.load(path)
        assert loaded.metadata.items() >= concept.metadata.items()
        assert loaded.modifier_tokens.keys() == {"<new1>", "sks"}
        prompt = "a <new1> sks dog"
        assert torch.equal(sample(pipe, prompt, loaded, **FAST), sample(pipe, prompt, concept, **FAST))
