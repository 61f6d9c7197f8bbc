"""Concepts of more than keys and values, and of less: in files, on a UNet, in samples and commands."""

import json

import pytest
import torch
from file_samples import LAYERS, sample

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402

import customdiff_kernels as ck  # noqa: E402
from customdiff import Concept, cli, sampler  # noqa: E402
from customdiff.concept import base_metadata  # noqa: E402
from customdiff.merging import merge  # noqa: E402

PARTS = ("to_q.weight", "to_out.0.weight", "to_out.0.bias")
FAST = {"steps": 2, "output": "latents", "progress": False}
EVERYWHERE = ("conv_in.weight", "conv_norm_out.bias", "down_blocks.0.resnets.0.conv1.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipe(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def state(unet):
    return {name: p.detach().clone() for name, p in unet.named_parameters()}


def changes(unet, *names):
    """Random changes of a tenth of all parameters that end in one of `names`."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in unet.named_parameters()
        if name.endswith(names)
    }


def whole_attention(pipe):
    """A change of the whole cross-attention."""
    concept = tiny_pipeline.concept(pipe, 0)
    concept.others = changes(pipe.unet, *(f"attn2.{part}" for part in PARTS))
    assert len(concept.others) == 3 * len(concept.delta) // 2 > 0
    return concept


def changed(unet, concept):
    change = {**concept.delta, **concept.others}
    return {name: value + change.get(name, 0) for name, value in state(unet).items()}


@pytest.mark.parametrize("format", ["customdiff", "delta.bin", "compvis", "diffusers"])
def test_whole_weights_there_and_back_to_the_bit(format, tmp_path):
    held = sample()
    shapes = {"to_q.weight": (4, 4), "to_out.0.weight": (4, 4), "to_out.0.bias": (4,)}
    others = {
        f"{layer}.transformer_blocks.0.attn2.{part}": torch.randn(shape)
        for layer in LAYERS
        for part, shape in shapes.items()
    }
    path = ck.save_delta(held.loaded(), tmp_path / "file", format=format, others=others, prompt="a dog")
    found = ck.load_delta(path)
    assert found.kind == "weights" and found.format == format and found.metadata["prompt"] == "a dog"
    assert same(found.others, others) and same(found.weights, held.weights)
    assert same(found.modifier_tokens, held.tokens)
    alone = ck.load_delta(path, kv_only=True)
    assert not alone.others and alone.left_out == tuple(found.others) and same(alone.weights, held.weights)


@pytest.mark.parametrize("format", ["delta.bin", "diffusers"])
def test_a_change_becomes_whole_weights_and_again_a_change(format, pipe, tmp_path):
    concept = whole_attention(pipe)
    concept.save(tmp_path / "ours.safetensors")
    ours = ck.load_delta(tmp_path / "ours.safetensors")
    assert same(ours.others, concept.others) and same(ours.delta, concept.delta)
    path = ck.save_delta(ours, tmp_path / "theirs", format=format, base=pipe.unet)
    found, wanted = ck.load_delta(path), changed(pipe.unet, concept)
    assert same({**found.weights, **found.others}, {n: wanted[n] for n in (*found.weights, *found.others)})
    again = Concept.load(path).of(pipe.unet)
    assert again.others.keys() == concept.others.keys() and not again.weights
    for name, change in concept.others.items():
        torch.testing.assert_close(again.others[name], change, rtol=0, atol=1e-6)
    assert set(ck.apply_delta(pipe.unet, found)) == {*concept.delta, *concept.others}
    assert same(state(pipe.unet), wanted)
    with pytest.raises(ValueError, match="has these weights already"):
        ck.apply_delta(pipe.unet, found, force=True)


def test_diffusers_loads_the_whole_cross_attention(pipe, tmp_path):
    concept = whole_attention(pipe)
    wanted, name = changed(pipe.unet, concept), "pytorch_custom_diffusion_weights.safetensors"
    held = ck.LoadedDelta(concept.delta, others=concept.others)
    path = ck.save_delta(held, tmp_path / "d", format="diffusers", base=pipe.unet)
    pipe.unet.load_attn_procs(str(path), weight_name=name, _pipeline=pipe)
    processors = pipe.unet.attn_processors
    for layer in {other.partition("attn2")[0] + "attn2" for other in concept.others}:
        for module, value in processors[f"{layer}.processor"].state_dict().items():
            assert torch.equal(value, wanted[f"{layer}.{module.replace('_custom_diffusion', '')}"])
    pipe.unet.save_attn_procs(str(tmp_path / "again"))
    assert same(ck.load_delta(tmp_path / "again").others, ck.load_delta(path).others)


def test_a_scale_weighs_them_too(pipe, folder):
    concept, before = whole_attention(pipe), state(pipe.unet)
    held = ck.LoadedDelta(concept.delta, metadata=concept.metadata, others=concept.others)
    ck.apply_delta(pipe.unet, held, scale=0.5)
    half = state(pipe.unet)
    other = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet
    whole = changed(other, concept)
    weights = ck.LoadedDelta(
        {}, weights={n: whole[n] for n in concept.delta}, others={n: whole[n] for n in concept.others}
    )
    ck.apply_delta(other, weights, scale=0.5)
    for name, value in state(other).items():
        torch.testing.assert_close(half[name], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(value, (before[name] + whole[name]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_live_unet_and_off_bit_for_bit(pipe, dtype):
    unet = pipe.unet.to(dtype)
    others = changes(unet, *EVERYWHERE)
    delta = {name: torch.ones_like(w) for name, w in list(ck.KVStack.from_unet(unet).items())[:2]}
    before = state(unet)
    with ck.applied(unet, [{**delta, **others}, others], [0.5, 1.0]) as on:
        assert set(on.names) == {*delta, *others}
        for name, value in state(unet).items():
            change = 1.5 * others[name] if name in others else 0.5 * delta.get(name, torch.zeros(()))
            torch.testing.assert_close(value, (before[name].float() + change).to(dtype), rtol=1e-6, atol=1e-7)
    assert same(state(unet), before)
    with pytest.raises(ValueError, match=r"segments that the UNet does not have: \['conv_in.wait'\]"):
        ck.applied(unet, {"conv_in.wait": torch.ones(1)})
    with pytest.raises(ValueError, match=r"deltas\[0\]\['conv_in.weight'\] must have shape"):
        ck.applied(unet, {**delta, "conv_in.weight": torch.ones(3)})
    assert same(state(unet), before)


def test_words_alone_and_others_alone(pipe, tmp_path):
    """Textual Inversion has no weights, and a concept may leave keys and values as they are."""
    rows, metadata = {"<new1>": torch.randn(32)}, base_metadata(ck.KVStack.from_unet(pipe.unet))
    Concept({}, rows, metadata).save(tmp_path / "words")
    words = Concept.load(tmp_path / "words")
    assert not (words.delta or words.weights or words.others) and same(words.modifier_tokens, rows)
    assert words.metadata["base_hash"] == metadata["base_hash"]
    others = changes(pipe.unet, *EVERYWHERE)
    Concept({}, {}, metadata, others=others).save(tmp_path / "others")
    found = ck.load_delta(tmp_path / "others")
    assert found.kind == "delta" and same(found.others, others)
    with pytest.raises(ck.DeltaFileError, match="holds neither"):
        ck.load_delta(tmp_path / "others", kv_only=True)
    with pytest.raises(ValueError, match="format='delta.bin' holds weights, and delta modifier tokens alone"):
        ck.save_delta(ck.load_delta(tmp_path / "words"), tmp_path / "x", format="delta.bin")
    path = ck.save_delta(found, tmp_path / "delta.bin", format="delta.bin", base=pipe.unet)
    before = state(pipe.unet)
    assert set(ck.apply_delta(pipe.unet, ck.load_delta(path))) == set(others)
    assert same(state(pipe.unet), {name: value + others.get(name, 0) for name, value in before.items()})


def test_what_cannot_hold_them_says_so(pipe, tmp_path):
    concept = whole_attention(pipe)
    name, before = next(iter(concept.others)), state(pipe.unet)
    delta, others = ck.compress(concept.delta, rank=1), concept.others
    one, elsewhere = {name: others[name]}, changes(pipe.unet, *EVERYWHERE)

    def save(**options):
        return lambda: ck.save_delta(delta, tmp_path / "x", **{"others": others, **options})

    def apply(**wrong):
        return lambda: ck.apply_delta(pipe.unet, ck.LoadedDelta(delta, others=others | wrong), force=True)

    stack = ck.KVStack.from_unet(pipe.unet)
    for call, error, message in (
        (save(format="lora"), ValueError, f"keys and values alone, and delta changes 12 other .*'{name}'"),
        (save(format="kohya"), ValueError, "one of customdiff, delta.bin, compvis, diffusers holds them"),
        (save(format="delta.bin"), ValueError, "format='delta.bin' holds whole weights.* give base="),
        (save(format="delta.bin", base=stack), ValueError, "give the UNet itself as the base"),
        (save(format="diffusers", base=pipe.unet, others=one), ValueError, "has no place in"),
        (save(format="compvis", base=pipe.unet, others=elsewhere), ValueError, "has no name"),
        (save(others={next(iter(stack)): torch.ones(2)}), ValueError, "leave keys and values to delta"),
        (save(others={name: torch.tensor(torch.nan)}), ValueError, "is not finite"),
        (save(others={name: 3}), TypeError, r"others\['.*'\] must be a torch.Tensor, got int"),
        (save(others=[3]), TypeError, "others must map parameter names to tensors, got list"),
        (apply(wrong=torch.ones(1)), ValueError, r"which has no \['wrong'\]: another model"),
        (apply(**{name: torch.ones(1)}), ValueError, "must have shape .* of the UNet's"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert list(tmp_path.iterdir()) == [] and same(state(pipe.unet), before)


def test_samples_are_those_of_the_unet_with_the_changes_in_it(pipe, folder, tmp_path):
    concept = tiny_pipeline.concept(pipe, 0)
    concept.others = changes(pipe.unet, *EVERYWHERE, "attn2.to_q.weight")
    prompts, before = ["a <new1> dog", "red <new1> cat"], state(pipe.unet)
    got = sampler.sample(pipe, prompts, concept, **FAST)
    assert same(state(pipe.unet), before)
    other = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert set(concept.load_into(other)) == {*concept.delta, *concept.others, "<new1>"}
    alone = Concept({}, concept.modifier_tokens)
    torch.testing.assert_close(got, sampler.sample(other, prompts, alone, **FAST), rtol=1e-4, atol=1e-4)
    assert (got - sampler.sample(pipe, prompts, alone, **FAST)).abs().max() > 1e-2
    concept.save(tmp_path / "ours")
    ck.save_delta(
        ck.load_delta(tmp_path / "ours"), tmp_path / "delta.bin", format="delta.bin", base=pipe.unet
    )
    whole = Concept.load(tmp_path / "delta.bin")
    assert whole.weights
    torch.testing.assert_close(got, sampler.sample(pipe, prompts, whole, **FAST), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="<new1> changes .* weights beside keys and values, which all rows"):
        sampler.sample(pipe, prompts, [concept, alone], **FAST)
    with pytest.raises(ValueError, match="eta=1"):  # in the midst of it
        euler = __import__("diffusers").EulerDiscreteScheduler()
        sampler.sample(pipe, prompts, concept, eta=1.0, scheduler=euler, **FAST)
    assert same(state(pipe.unet), before)


def test_commands_keep_or_refuse_them(pipe, folder, tmp_path, capsys):
    concept = whole_attention(pipe)
    concept.metadata["prompt"] = "a <new1> dog"
    concept.save(tmp_path / "dog")

    def run(line):
        status = cli.main(line.format(folder, tmp_path).split())
        return status, *capsys.readouterr()

    status, out, _ = run("inspect {1}/dog --json")
    assert status == 0 and {item["name"] for item in json.loads(out)["others"]} == concept.others.keys()
    _, out, _ = run("inspect {1}/dog --quiet")
    assert "\n12 other weights, first down_blocks" in out
    status, _, err = run("compress {1}/dog --rank 2 --output {1}/small")
    assert status and "changes 12 weights beside keys and values" in err and "--kv-only" in err
    status, out, _ = run("convert {1}/dog --to delta.bin --base {0} --output {1}/delta.bin --quiet")
    assert status == 0 and "8 segments and 12 other weights" in out
    status, out, _ = run("convert {1}/delta.bin --to customdiff --base {0} --output {1}/again --json")
    assert status == 0 and len(json.loads(out)["others"]) == 12
    again = ck.load_delta(tmp_path / "again")
    for name, change in concept.others.items():
        torch.testing.assert_close(again.others[name], change, rtol=0, atol=1e-6)
    second = tiny_pipeline.concept(pipe, 1, "<new2>")
    with pytest.raises(ValueError, match="<new1> changes 12 weights beside keys and values"):
        merge([concept, second], pipe, ["a dog"])
