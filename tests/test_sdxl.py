"""SDXL: two text encoders side by side, the pooled text and the sizes beside the time, as in diffusers."""

import copy

import pytest
import torch

import customdiff_kernels as ck

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402

from customdiff import Concept, load_base, sample  # noqa: E402
from customdiff.concept import added_conditions, encode_prompts  # noqa: E402
from customdiff.merging import merge, target_features  # noqa: E402
from customdiff.regularization import merge_solver, regularization_features  # noqa: E402

FAST = {"steps": 3, "output": "latents", "progress": False}
CAPTIONS = ["photo of a dog", "a red cat on the grass", "two blue car", "a cup and a hat", "the beach"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline.build_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture
def pipe(folder):
    return load_base(str(folder), device="cpu")


def assert_close(got, want, rtol=1e-4):
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= rtol * size, f"error {error:.2e}, largest value {size:.2e}"


def theirs(pipe, prompts, **options):
    """(context, pooled) of diffusers."""
    found = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False, **options)
    return found[0], found[2]


def their_latents(pipe, prompts, seeds, **options):
    size = options.get("height", 32) // 2, options.get("width", 32) // 2
    noise = torch.stack([torch.randn(4, *size, generator=torch.Generator().manual_seed(s)) for s in seeds])
    options = {"output_type": "latent", "num_inference_steps": 3, **options}
    return pipe(prompts, latents=noise, **options).images


def test_the_base_is_loaded_as_what_it_is(pipe):
    assert type(pipe) is diffusers.StableDiffusionXLPipeline
    assert pipe.tokenizer_2.pad_token == "!" != pipe.tokenizer.pad_token
    assert pipe.text_encoder_2.config.eos_token_id == 2


def test_plain_prompts_are_encoded_as_by_diffusers(pipe):
    prompts = ["photo of a dog on the beach", "", "two red cups, and a hat"]
    got = encode_prompts(pipe, prompts, {})
    for ours, wanted in zip(got, theirs(pipe, prompts), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
    assert got.context.shape == (3, 16, 80) and got.pooled.shape == (3, 40)


def test_modifier_tokens_are_encoded_as_after_load_into(pipe):
    rows = {"<new1>": (torch.randn(32), torch.randn(48)), "<new2>": (torch.randn(32), torch.randn(48))}
    prompts = ["photo of a <new1> dog", "<new2> cat and a <new1> car", "photo of a dog"]
    tables = [e.get_input_embeddings().weight.clone() for e in (pipe.text_encoder, pipe.text_encoder_2)]
    got = encode_prompts(pipe, prompts, rows)
    for encoder, table in zip((pipe.text_encoder, pipe.text_encoder_2), tables, strict=True):
        assert torch.equal(encoder.get_input_embeddings().weight, table)
    plain = encode_prompts(pipe, ["photo of a dog"], {})
    for ours, wanted in zip(got, plain, strict=True):
        torch.testing.assert_close(ours[2:], wanted, rtol=0, atol=1e-6)
    assert Concept({}, rows).load_into(pipe) == ["<new1>", "<new2>"]
    for ours, wanted in zip(got, theirs(pipe, prompts), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_gradient_reaches_the_rows_of_both_encoders(pipe):
    rows = [torch.randn(width, requires_grad=True) for width in (32, 48)]
    first, pooled = encode_prompts(pipe, ["a <new1> dog"], {"<new1>": tuple(rows)})
    grads = torch.autograd.grad(first[..., :32].square().sum(), rows, retain_graph=True)
    assert grads[0].any() and not grads[1].any()
    grads = torch.autograd.grad(pooled.square().sum(), rows, allow_unused=True)
    assert grads[0] is None and grads[1].any()


@pytest.mark.parametrize(
    ("ours", "wanted"),
    [
        ({}, {}),
        ({"negative_prompt": "blue"}, {"negative_prompt": ["blue"] * 2}),
        ({"negative_prompt": ""}, {"negative_prompt": [""] * 2}),
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ({"size": (24, 40)}, {"height": 24, "width": 40}),
    ],
    ids=str,
)
@pytest.mark.parametrize("zeros", [True, False])
def test_samples_are_those_of_diffusers(pipe, zeros, ours, wanted):
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    prompts = ["photo of a red dog", "two cats"]
    got = sample(pipe, prompts, seeds=3, **{"guidance_scale": 5.0, **FAST, **ours})
    wanted = their_latents(pipe, prompts, [3, 4], **{"guidance_scale": 5.0, **wanted})
    assert_close(got, wanted)


def test_pictures_and_another_scheduler(pipe):
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    got = sample(pipe, "a dog", scheduler=scheduler, guidance_scale=5.0, **{**FAST, "output": "tensor"})
    pipe.scheduler = scheduler
    images = their_latents(pipe, ["a dog"], [0], guidance_scale=5.0, output_type="pt")
    assert_close(got, images)


def test_a_vae_in_float16_decodes_in_float32(pipe):
    pipe.vae.half()
    before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert sample(pipe, "a dog", **{**FAST, "output": "tensor"}).isfinite().all()
    assert seen == [torch.float32]
    after = pipe.vae.state_dict()
    assert all(value.dtype == torch.float16 and torch.equal(value, before[n]) for n, value in after.items())


def test_a_concept_samples_as_after_load_into(pipe):
    concepts = [tiny_pipeline.concept(pipe, 0, low_rank=True), tiny_pipeline.concept(pipe, 1, "<new2>")]
    prompts = ["photo of a <new1> dog", "a <new2> cat", "a dog"]
    got = sample(pipe, prompts, [*concepts, None], guidance_scale=5.0, **FAST)
    for i, concept in enumerate(concepts):
        changed = copy.deepcopy(pipe)
        assert concept.load_into(changed)[-1] == list(concept.modifier_tokens)[0]
        wanted = their_latents(changed, prompts[i : i + 1], [i], guidance_scale=5.0)
        assert_close(got[i : i + 1], wanted, rtol=1e-3)
        plain = their_latents(pipe, ["a dog"], [i], guidance_scale=5.0)
        assert (plain - wanted).abs().max() > 0.1
    assert_close(got[2:], their_latents(pipe, prompts[2:], [2], guidance_scale=5.0))


def test_a_concept_is_saved_with_a_row_for_each_encoder(pipe, tmp_path):
    concept = tiny_pipeline.concept(pipe, 0)
    concept.save(tmp_path / "dog.safetensors")
    found = Concept.load(tmp_path / "dog.safetensors").modifier_tokens["<new1>"]
    assert [row.shape[0] for row in found] == [32, 48]
    assert all(map(torch.equal, found, concept.modifier_tokens["<new1>"]))
    vocabulary = len(pipe.tokenizer), len(pipe.tokenizer_2)
    for row in (torch.zeros(32), (torch.zeros(48), torch.zeros(32))):
        other = Concept(concept.delta, {"<new1>": row}, concept.metadata)
        for use in (other.load_into, lambda p, other=other: sample(p, "a <new1>", other, **FAST)):
            with pytest.raises(ValueError, match="must have one for each, of width 32 and 48 as these text"):
                use(pipe)
    assert (len(pipe.tokenizer), len(pipe.tokenizer_2)) == vocabulary


def test_merged_concepts_keep_their_values(pipe, tmp_path):
    concepts = [tiny_pipeline.concept(pipe, i, word) for i, word in enumerate(("<new1>", "<new2>"))]
    prompts = [["<new1> dog"], ["<new2> cat"]]
    merged, _ = merge(concepts, pipe, CAPTIONS, prompts=prompts, padding=False, ridge=1e-6)
    assert {word: len(rows) for word, rows in merged.modifier_tokens.items()} == {"<new1>": 2, "<new2>": 2}
    stack = ck.KVStack.from_unet(pipe.unet)
    after = ck.reconstruct(stack, merged.delta)
    for concept, texts in zip(concepts, prompts, strict=True):
        features = target_features(pipe, texts, merged.modifier_tokens, padding=False)
        wanted = features @ ck.reconstruct(stack, concept.delta).weight.T
        assert_close(features @ after.weight.T, wanted, rtol=1e-3)
    both = "a <new1> dog and a <new2> cat"
    together, report = merge(concepts, pipe, CAPTIONS, prompts=prompts, together=both, padding=False)
    assert "<new1> together" in report.residual
    assert sample(pipe, both, together, **FAST).isfinite().all()


def test_captions_are_encoded_by_both_and_the_factor_knows_both(pipe, tmp_path):
    features = regularization_features(pipe, CAPTIONS)
    torch.testing.assert_close(features, theirs(pipe, CAPTIONS)[0][:, 1:].flatten(0, 1), rtol=0, atol=1e-6)
    merge_solver(pipe, CAPTIONS, 1e-6, cache=tmp_path)
    pipe.text_encoder_2.get_input_embeddings().weight.data[0, 0] += 1e-3
    merge_solver(pipe, CAPTIONS, 1e-6, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_sizes_stand_beside_the_pooled_text(pipe):
    features = encode_prompts(pipe, ["a dog", "a cat"], {})
    found = added_conditions(pipe, features, (24, 40))
    assert found["text_embeds"] is features.pooled
    assert found["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]] * 2
    originals, crops = torch.tensor([[60, 80], [64, 48]]), torch.tensor([[0, 3], [5, 0]])
    found = added_conditions(pipe, features, (32, 32), original_size=originals, crop=crops)
    assert found["time_ids"].tolist() == [[60, 80, 0, 3, 32, 32], [64, 48, 5, 0, 32, 32]]
