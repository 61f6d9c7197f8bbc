"""Attention probabilities of a live UNet, recorded and steered, against a float64 softmax."""

import copy

import pytest
import torch

import customdiff_kernels as ck

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402
from test_diffusers import SD1, SD2, SDXL, assert_all_close, custom_diffusion, inputs, tiny_unet  # noqa: E402

from customdiff.attention import Layer, Recorder, prompt_words, steered, word_positions  # noqa: E402


class Keep:
    """Keeps what it sees by layer; wants the layers for which `chosen` is true."""

    def __init__(self, chosen=lambda layer: True):
        self.wants, self.seen = chosen, {}

    def __call__(self, probabilities, layer):
        self.seen[layer.name] = probabilities
        return probabilities


def set_up(config):
    unet = tiny_unet(**config)
    given = inputs(unet)
    stack = ck.KVStack.from_unet(unet)
    kv = stack.views(ck.kv_project(given["encoder_hidden_states"], stack.weight))
    return unet, given, kv


@torch.no_grad()
def exact_probabilities(unet, given):
    """softmax(q kᵀ·scale) of every attention, in float64, from what its to_q and to_k put out."""
    unet, found = copy.deepcopy(unet).double(), {}
    given = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
    if "added_cond_kwargs" in given:
        given["added_cond_kwargs"] = {k: v.double() for k, v in given["added_cond_kwargs"].items()}
    for name, module in unet.named_modules():
        if name.endswith((".to_q", ".to_k")):
            module.register_forward_hook(lambda m, args, out, name=name: found.__setitem__(name, out))
    unet(**given)
    exact = {}
    for name, attn in unet.named_modules():
        if name.endswith((".attn1", ".attn2")):
            q, k = (
                found[f"{name}.{part}"].unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for part in ("to_q", "to_k")
            )
            exact[name] = (q @ k.mT * attn.scale).softmax(-1)
    return exact


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("config", [SD1, SD2, SDXL])
@torch.no_grad()
def test_recorded_probabilities_are_the_softmax(config, patched):
    unet, given, kv = set_up(config)
    want = unet(**given).sample
    if patched:
        ck.patch_unet(unet)
    keep = Keep()
    with steered(unet, keep):
        got = unet(**given, cross_attention_kwargs={"kv": kv}).sample
    assert_all_close([got], [want])
    exact = exact_probabilities(tiny_unet(**config), given)
    assert keep.seen.keys() == exact.keys()
    for name, p in keep.seen.items():
        assert p.dtype == torch.float32 and p.shape == exact[name].shape
        assert (p - exact[name]).abs().max() < 1e-5, name
        assert (p.sum(-1) - 1).abs().max() < 1e-5, name


@torch.no_grad()
def test_a_layer_that_nobody_wants_runs_as_ever():
    unet, given, kv = set_up(SD1)
    want, everything = unet(**given).sample, len(unet.attn_processors)
    for chosen, count in (
        (lambda layer: False, 0),
        (lambda layer: layer.cross, everything // 2),
        (lambda layer: not layer.cross, everything // 2),
    ):
        keep = Keep(chosen)
        with steered(unet, keep):
            got = unet(**given, cross_attention_kwargs={"kv": kv}).sample
        assert_all_close([got], [want])
        assert len(keep.seen) == count


@torch.no_grad()
def test_what_a_control_returns_meets_the_values():
    class Uniform(Keep):
        def __call__(self, probabilities, layer):
            return torch.full_like(probabilities, 1 / probabilities.shape[-1])

    unet, given, _ = set_up(SD1)
    unet.eval()
    name, attn = next((n, m) for n, m in unet.named_modules() if n.endswith("attn2"))
    hidden, context = torch.randn(2, 16, attn.to_q.in_features), given["encoder_hidden_states"]
    keep = Keep()
    with steered(unet, keep), steered(unet, Uniform(lambda layer: layer.name == name)):
        got = attn(hidden, context)
    want = attn.to_out[0](attn.to_v(context).mean(1, keepdim=True).expand(-1, 16, -1))
    assert_all_close([got], [want])
    assert (keep.seen[name] == 1 / 7).all(), "an outer control sees what the inner one made"


@torch.no_grad()
def test_masks_and_biases_are_in_the_probabilities():
    unet, given, _ = set_up(SD1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    bias = {n: torch.randn(1, 1, n, 7) for n in (64, 16, 4)}
    with ck.patched(unet):
        want = unet(**given, encoder_attention_mask=mask, cross_attention_kwargs={"bias": bias}).sample
        keep = Keep()
        with steered(unet, keep):
            got = unet(**given, encoder_attention_mask=mask, cross_attention_kwargs={"bias": bias}).sample
    assert_all_close([got], [want])
    for p in (p for name, p in keep.seen.items() if name.endswith("attn2")):
        assert not p[0, ..., 4:].any() and p[1].all()


@pytest.mark.parametrize("patched", [False, True])
def test_the_very_processors_are_restored_also_after_an_error(patched):
    unet, given, _ = set_up(SD1)
    if patched:
        ck.patch_unet(unet)
    processors = dict(unet.attn_processors)
    hooks = {n: dict(m._forward_pre_hooks) for n, m in unet.named_modules()}
    with pytest.raises(RuntimeError, match="stopped"), steered(unet, Keep()):
        assert all(unet.attn_processors[k] is not v for k, v in processors.items())
        raise RuntimeError("stopped")
    assert all(unet.attn_processors[k] is v for k, v in processors.items())
    assert hooks == {n: dict(m._forward_pre_hooks) for n, m in unet.named_modules()}

    class Other:
        def __call__(self, attn, hidden_states, **more):
            return hidden_states

    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.set_processor(other := Other())
    processors = dict(unet.attn_processors)
    with pytest.raises(ValueError, match="attn1 has the processor Other, which does more"):
        with steered(unet, Keep()):
            pass
    assert attn.processor is other and all(unet.attn_processors[k] is v for k, v in processors.items())


@torch.no_grad()
def test_processors_with_projections_of_their_own():
    unet = tiny_unet()
    custom_diffusion(unet, train_q_out=True)
    given = inputs(unet)
    want, processors, keep = unet(**given).sample, dict(unet.attn_processors), Keep()
    with steered(unet, keep):
        got = unet(**given).sample
    assert_all_close([got], [want])
    assert keep.seen and all(unet.attn_processors[k] is v for k, v in processors.items())


@torch.no_grad()
def test_recorder_averages_heads_layers_and_steps():
    unet, given, _ = set_up(SD1)
    keep, recorder, small = Keep(), Recorder(1), Recorder(2, most_pixels=16)
    with steered(unet, keep, recorder, small):
        unet(**given)
        first = dict(keep.seen)
        unet(**{**given, "timestep": 5})
    cross = [p for seen in (first, keep.seen) for name, p in seen.items() if name.endswith("attn2")]
    for pixels, side in ((64, 8), (16, 4)):
        level = torch.stack([p[-1:].mean(1) for p in cross if p.shape[2] == pixels]).mean(0)
        got = recorder.maps((side, side), pixels=pixels)
        assert_all_close([got], [level.mT.unflatten(-1, (side, side))], rtol=1e-5)
    whole = recorder.maps((8, 8))
    assert whole.shape == (1, 7, 8, 8) and (whole.sum(1) - 1).abs().max() < 1e-5
    assert set(small.sums) == {16} and small.maps((8, 8)).shape == (2, 7, 8, 8)
    with pytest.raises(ValueError, match="pixels=9: nothing was recorded there, but at .16, 64."):
        recorder.maps((8, 8), pixels=9)
    with pytest.raises(ValueError, match="size must be .height, width. of the latents, got .9, 8."):
        recorder.maps((9, 8))


def test_recorder_knows_the_grid_of_pictures_that_are_not_square():
    recorder = Recorder(1)
    for height, width in ((6, 10), (3, 5), (2, 3)):  # each side halved, rounded up, as the UNet does it
        p = torch.zeros(1, 1, height * width, 2)
        p[0, 0, width - 1, 1] = 1  # the upper right corner
        recorder(p, Layer("attn2", True, height * width))
        found = recorder.maps((6, 10), pixels=height * width)[0, 1]
        assert found[0, 9] == 1 and not found[:, :5].any() and not found[4:].any()


def test_words_and_their_positions(tmp_path):
    tokenizer = tiny_pipeline.tokenizer(tmp_path)
    words = prompt_words(tokenizer, "A dog, kxq <new1> cat", ["<new1>"])
    assert [word.text for word in words] == ["a", "dog", ",", "kxq", "<new1>", "cat"]
    assert [word.positions for word in words] == [(1,), (2,), (3,), (4, 5, 6), (7,), (8,)]
    assert word_positions(words, "Dog") == [2] and word_positions(words, "kxq") == [4, 5, 6]
    assert word_positions(words, "beach") == []
    assert word_positions(prompt_words(tokenizer, "a dog and a cat"), "a") == [1, 4]
    assert prompt_words(tokenizer, "") == []
    with pytest.warns(UserWarning, match="cut to 14"):
        assert len(prompt_words(tokenizer, "dog " * 20)) == 14
