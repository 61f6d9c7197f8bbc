"""patch_unet against diffusers' own processors: outputs, gradients, and what must not change."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import customdiff_kernels as ck

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")
from diffusers.loaders import AttnProcsLayers  # noqa: E402
from diffusers.models.attention_processor import (  # noqa: E402
    Attention,
    AttnProcessor,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
)
from safetensors.torch import load_file  # noqa: E402

SD1 = {"attention_head_dim": 2}  # the published configuration calls the number of heads so
SD2 = {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
SDXL = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}


def tiny_unet(dtype=torch.float32, **config) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        **{**SD1, **config},
    )
    return unet.requires_grad_(False).to(dtype)


def inputs(unet, batch=2, tokens=7, seed=1):
    g = torch.Generator().manual_seed(seed)
    dtype = unet.dtype
    found = {
        "sample": torch.randn(batch, 4, 8, 8, generator=g).to(dtype).requires_grad_(),
        "timestep": torch.tensor([3, 700][:batch]),
        "encoder_hidden_states": torch.randn(batch, tokens, 32, generator=g).to(dtype).requires_grad_(),
    }
    if unet.config.addition_embed_type == "text_time":
        embeds = torch.randn(batch, 16, generator=g).to(dtype)
        found["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": torch.ones(batch, 6)}
    return found


def run(unet, given, trained=(), **more):
    """Output and the gradients of sample, text and ``trained`` parameters, for a fixed direction."""
    tensors = [given["sample"], given["encoder_hidden_states"], *trained]
    out = unet(**given, **more).sample
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out, *torch.autograd.grad((out.float() * direction).sum(), tensors)]


def assert_all_close(got, want, rtol=2e-4):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        error, size = (a - b).abs().max().item(), b.abs().max().item()
        assert error <= rtol * size + 1e-7, f"tensor {i}: error {error:.2e}, largest value {size:.2e}"


def kv_weights(unet) -> list[nn.Parameter]:
    ends = "attn2.to_k.weight", "attn2.to_v.weight"
    return [p.requires_grad_() for n, p in unet.named_parameters() if n.endswith(ends)]


def custom_diffusion(
    unet, cls=CustomDiffusionAttnProcessor2_0, train_q_out=False, dtype=None
) -> list[nn.Parameter]:
    """Set diffusers' Custom Diffusion processors as its training script does; returns what they train."""
    processors, trained, dtype = {}, [], dtype or unet.dtype
    for name, attn in unet.named_modules():
        if not isinstance(attn, Attention):
            continue
        cross = name.endswith("attn2")
        width = attn.to_q.weight.shape[0]
        processor = cls(cross, train_q_out and cross, width, attn.cross_attention_dim if cross else None)
        if cross:
            for kind in ("k", "v"):
                weight = getattr(attn, f"to_{kind}").weight
                noise = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
                linear = getattr(processor, f"to_{kind}_custom_diffusion")
                linear.weight.data = weight.detach() + noise.to(weight)
            if processor.train_q_out:
                processor.to_q_custom_diffusion.load_state_dict(attn.to_q.state_dict())
                processor.to_out_custom_diffusion.load_state_dict(attn.to_out.state_dict())
        processors[f"{name}.processor"] = processor.to(dtype)
        trained += processor.parameters()
    unet.set_attn_processor(processors)
    return trained


@pytest.mark.parametrize("config", [SD1, SD2, SDXL], ids=["sd1", "sd2", "sdxl"])
def test_same_outputs_and_gradients(config):
    unet = tiny_unet(**config)
    weights, given = kv_weights(unet), inputs(unet)
    want = run(unet, given, weights)
    assert len(ck.patch_unet(unet)) == len(weights) // 2 > 4
    assert_all_close(run(unet, given, weights), want)


def test_names_and_state_are_unchanged_and_unpatch_restores():
    unet = tiny_unet()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())
    processors, state = unet.attn_processors, unet.state_dict()
    names = [n for n, _ in unet.named_parameters()]
    patched = ck.patch_unet(unet)
    first = unet.attn_processors
    assert all(name.endswith("attn2") for name in patched)
    assert ck.patch_unet(unet) == patched
    assert all(unet.attn_processors[k] is v for k, v in first.items())
    assert list(unet.state_dict()) == list(state) and [n for n, _ in unet.named_parameters()] == names
    for name, processor in unet.attn_processors.items():
        assert (processor is processors[name]) == ("attn1" in name)
    assert ck.unpatch_unet(unet) == patched
    assert all(unet.attn_processors[k] is v for k, v in processors.items())
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in unet.modules())
    assert ck.unpatch_unet(unet) == []


@pytest.mark.parametrize("config", [SD1, SD2, SDXL], ids=["sd1", "sd2", "sdxl"])
def test_self_attention_too(config):
    unet = tiny_unet(**config)
    weights, given, processors = kv_weights(unet), inputs(unet), unet.attn_processors
    want = run(unet, given, weights)
    names = ck.patch_unet(unet, self_attention=True)
    assert {f"{name}.processor" for name in names} == processors.keys()
    assert ck.patch_unet(unet, self_attention=True) == names
    stack = ck.KVStack.from_unet(unet)
    kv = stack.views(ck.kv_project(given["encoder_hidden_states"], stack.weight))
    assert_all_close(run(unet, given, weights), want)
    assert_all_close([unet(**given, cross_attention_kwargs={"kv": kv}).sample], want[:1])
    assert ck.unpatch_unet(unet) == names
    assert all(unet.attn_processors[k] is v for k, v in processors.items())


def test_self_attention_with_a_processor_of_its_own_is_left_alone():
    unet = tiny_unet()
    custom_diffusion(unet)
    processors = unet.attn_processors
    assert all(name.endswith("attn2") for name in ck.patch_unet(unet, self_attention=True))
    assert all((unet.attn_processors[k] is v) == ("attn1" in k) for k, v in processors.items())


def test_a_copy_is_independent():
    unet = tiny_unet()
    ck.patch_unet(unet)
    twin = copy.deepcopy(unet)
    ck.unpatch_unet(twin)
    given = inputs(unet)
    assert not any("Cross" in type(p).__name__ for p in twin.attn_processors.values())
    assert sum("Cross" in type(p).__name__ for p in unet.attn_processors.values()) == len(ck.patch_unet(unet))
    assert_all_close(run(unet, given), run(twin, given))


@pytest.mark.parametrize("cls", [CustomDiffusionAttnProcessor, CustomDiffusionAttnProcessor2_0])
@pytest.mark.parametrize("train_q_out", [False, True])
def test_takes_over_custom_diffusion(cls, train_q_out):
    unet = tiny_unet()
    trained, given = custom_diffusion(unet, cls, train_q_out), inputs(unet)
    want, state, processors = run(unet, given, trained), unet.state_dict(), unet.attn_processors
    for name in ck.patch_unet(unet):
        assert isinstance(unet.get_submodule(name).processor, cls)
    assert list(unet.state_dict()) == list(state)
    assert sum(p.requires_grad for p in unet.parameters()) == len(trained)
    got = run(unet, given, trained)
    assert_all_close(got, want)
    assert not got[2][:, 0].any() and want[2][:, 1:].any()  # the start token is frozen
    ck.unpatch_unet(unet)
    assert all(unet.attn_processors[k] is v for k, v in processors.items())


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_patched_unet_can_be_pickled(taken_over):
    unet = tiny_unet()
    if taken_over:
        custom_diffusion(unet)
    ck.patch_unet(unet)
    copied, given = pickle.loads(pickle.dumps(unet)), inputs(unet)
    assert {type(p) for p in copied.attn_processors.values()} == {
        type(p) for p in unet.attn_processors.values()
    }
    with torch.no_grad():
        assert torch.equal(copied(**given).sample, unet(**given).sample)
    assert ck.unpatch_unet(copied) == ck.unpatch_unet(unet)
    assert {type(p) for p in copied.attn_processors.values()} == {
        type(p) for p in unet.attn_processors.values()
    }


def test_diffusers_saves_the_same_file_after_a_take_over(tmp_path):
    unet, files = tiny_unet(), []
    custom_diffusion(unet)
    for folder in (tmp_path / "before", tmp_path / "after"):
        unet.save_attn_procs(folder, safe_serialization=False)
        files.append(torch.load(folder / "pytorch_custom_diffusion_weights.bin"))
        ck.patch_unet(unet)
    before, after = files
    assert list(before) == list(after) and any(
        name.endswith("to_v_custom_diffusion.weight") for name in after
    )
    assert all(torch.equal(w, after[name]) for name, w in before.items() if isinstance(w, torch.Tensor))


class Text(nn.Module):
    """Stands for the text encoder, of which the script trains the embeddings."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(20, 32)

    def forward(self, ids):
        return (self.tokens(ids),)


def train_as_the_script_does(
    folder, patch, precision="no", checkpointing=False, train_q_out=False, safe=True
):
    """Diffusers' examples/custom_diffusion/train_custom_diffusion.py, step by step, on random latents.

    ``patch``: with the one line that this library asks for. Returns the losses, the trained weights by name,
    before and after, and what ``save_attn_procs`` wrote.
    """
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)
    unet, text = tiny_unet(torch.bfloat16 if precision == "bf16" else torch.float32), Text()
    custom_diffusion(unet, train_q_out=train_q_out, dtype=torch.float32)
    if patch:
        ck.patch_unet(unet)
    layers = AttnProcsLayers(unet.attn_processors)
    accelerator.register_for_checkpointing(layers)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    # an epsilon far above Adam's usual one, which would turn the rounding of gradients near zero into steps
    optimizer = torch.optim.AdamW([*text.parameters(), *layers.parameters()], lr=0.01, eps=0.01)
    layers, text, optimizer = accelerator.prepare(layers, text, optimizer)

    def weights():
        return {name: w.clone() for name, w in (layers.state_dict() | text.state_dict()).items()}

    losses, before, g = [], weights(), torch.Generator().manual_seed(4)
    unet.train()
    for _ in range(3):
        with accelerator.accumulate(unet), accelerator.accumulate(text):
            latents, noise = torch.randn(2, 2, 4, 8, 8, generator=g).to(unet.dtype)
            ids = torch.randint(0, 20, (2, 7), generator=g)
            predicted = unet(latents, torch.tensor([3, 700]), text(ids)[0]).sample
            loss = nn.functional.mse_loss(predicted.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_([*text.parameters(), *layers.parameters()], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    after = weights()

    accelerator.save_state(folder)
    for weight in layers.parameters():
        weight.data.zero_()
    accelerator.load_state(folder)  # --resume_from_checkpoint
    unet = unet.to(torch.float32)
    unet.save_attn_procs(folder, safe_serialization=safe)
    file = folder / f"pytorch_custom_diffusion_weights.{'safetensors' if safe else 'bin'}"
    unet.load_attn_procs(folder, weight_name=file.name)
    return losses, before, after, load_file(file) if safe else torch.load(file)


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16", "checkpointing": True, "safe": False}, {"train_q_out": True}],
    ids=["plain", "bf16", "crossattn"],
)
def test_diffusers_training_script_with_one_added_line(options, tmp_path):
    theirs = train_as_the_script_does(tmp_path / "theirs", False, **options)
    ours = train_as_the_script_does(tmp_path / "ours", True, **options)
    tolerance = 0.05 if "precision" in options else 1e-3
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    (_, before, want, _), (_, _, got, file) = theirs, ours
    assert got.keys() == want.keys() and file.keys() == theirs[3].keys()
    for name, weight in want.items():
        moved, error = (weight - before[name]).norm(), (got[name] - weight).norm()
        assert 0 < moved and error <= tolerance * moved, f"{name}: moved {moved:.3g}, error {error:.3g}"
        assert "tokens" in name or torch.equal(file[name], got[name])


def test_stacked_projection_matches_custom_diffusion():
    """Our training step (one stacked weight, start token frozen) is diffusers' training step."""
    unet = tiny_unet()
    theirs = copy.deepcopy(unet)
    want = run(theirs, inputs(unet), custom_diffusion(theirs))
    stack, names = ck.KVStack.from_unet(unet), ck.patch_unet(unet)
    custom = {
        f"{name}.{to}.weight": getattr(theirs.get_submodule(name).processor, f"{to}_custom_diffusion").weight
        for name in names
        for to in ("to_k", "to_v")
    }
    weight = torch.cat([custom[s.name].detach() for s in stack.segments]).requires_grad_()
    given = inputs(unet)
    kv = stack.views(ck.kv_project(given["encoder_hidden_states"], weight, frozen_tokens=1))
    got = run(unet, given, [weight], cross_attention_kwargs={"kv": kv})
    assert_all_close(got[:3], want[:3])
    grads = dict(zip([id(p) for p in custom_diffusion_order(theirs)], want[3:], strict=True))
    assert_all_close(got[3:], [torch.cat([grads[id(custom[s.name])] for s in stack.segments])])


def custom_diffusion_order(unet):
    return [p for n, p in unet.named_parameters() if "custom_diffusion" in n]


def test_bfloat16_error_within_twice_diffusers():
    exact, low = tiny_unet(), tiny_unet(torch.bfloat16)
    exact.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    trained, low_trained = custom_diffusion(exact), custom_diffusion(low)
    for a, b in zip(trained, low_trained, strict=True):
        a.data = b.detach().float()
    given = inputs(low)
    high = {k: v.detach().float().requires_grad_() if v.is_floating_point() else v for k, v in given.items()}
    want, theirs = run(exact, high, trained), run(low, given, low_trained)
    ck.patch_unet(low)
    ours = run(low, given, low_trained)

    def errors(got):
        return torch.stack([(a.float() - b).norm() / b.norm() for a, b in zip(got, want, strict=True)])

    assert ours[0].dtype == torch.bfloat16
    assert (errors(ours) <= 2 * errors(theirs) + 1e-3).all()


def test_encoder_attention_mask():
    unet = tiny_unet()
    given = inputs(unet)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4], dtype=torch.bool)
    want = run(unet, given, encoder_attention_mask=mask)
    ck.patch_unet(unet)
    assert_all_close(run(unet, given, encoder_attention_mask=mask), want)


class Lora(nn.Module):
    """The shape of PEFT's wrapper: a base layer and a trained low-rank branch."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def test_wrapped_and_trainable_projections_still_train():
    unet = tiny_unet()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attn.to_q, attn.to_v = Lora(attn.to_q), Lora(attn.to_v)
    other, third = (unet.up_blocks[0].attentions[i].transformer_blocks[0].attn2 for i in (0, 1))
    trained = [*attn.to_q.down.parameters(), *attn.to_q.up.parameters(), *attn.to_v.up.parameters()]
    third.to_out[0] = Lora(third.to_out[0])
    trained += third.to_out[0].up.parameters()
    trained += [other.to_q.weight.requires_grad_(), other.to_out[0].bias.requires_grad_()]
    given = inputs(unet)
    want = run(unet, given, trained)
    ck.patch_unet(unet)
    assert_all_close(run(unet, given, trained), want)


class Quantised(torch.Tensor):
    """A weight that only its own ``linear`` can use: what it holds must not be read as numbers."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = (a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args)
            return function(x, 2 * weight, *bias)
        return super().__torch_function__(function, types, args, kwargs)


def test_weights_of_another_class_are_left_to_their_own_linear():
    unet = tiny_unet()
    for attn in (m for n, m in unet.named_modules() if n.endswith("attn2")):
        weight = attn.to_q.weight.detach().as_subclass(Quantised)
        attn.to_q.weight = nn.Parameter(weight, requires_grad=False)
    given = inputs(unet)
    want = run(unet, given)
    ck.patch_unet(unet)
    assert_all_close(run(unet, given), want)


def test_inference_with_weights_that_require_grad():
    unet = tiny_unet().requires_grad_()
    given = inputs(unet)
    with torch.no_grad():
        want = unet(**given).sample
        ck.patch_unet(unet)
        assert_all_close([unet(**given).sample], [want])


def test_forward_hooks_on_projections_are_honoured():
    unet = tiny_unet()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attn.to_q.register_forward_hook(lambda module, args, out: 2 * out)
    given = inputs(unet)
    want = run(unet, given)
    ck.patch_unet(unet)
    assert_all_close(run(unet, given), want)


def test_cached_keys_and_values_are_used_quietly(caplog):
    unet = tiny_unet()
    given = inputs(unet)
    want = run(unet, given)
    ck.patch_unet(unet)
    stack = ck.KVStack.from_unet(unet)
    with pytest.raises(ValueError, match="kv has no entry for 'down_blocks"):
        unet(**given, cross_attention_kwargs={"kv": {}})
    kv = stack.views(ck.kv_project(given["encoder_hidden_states"], stack.weight))
    for weight in kv_weights(unet):
        weight.data.zero_()
    caplog.clear()
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    got = run(unet, given, cross_attention_kwargs={"kv": kv})
    logger.removeHandler(caplog.handler)
    assert_all_close(got, want)
    assert not caplog.records


def test_layout_bias_by_number_of_image_tokens():
    unet = tiny_unet()
    ck.patch_unet(unet)
    given = inputs(unet)
    table = torch.randn(2, 3, 7)
    layouts = {n: ck.LayoutBias(torch.arange(n).view(1, n).int() % 3, table, scale=0.5) for n in (64, 16)}
    got = run(unet, given, cross_attention_kwargs={"bias": layouts})
    dense = {n: layout.dense() for n, layout in layouts.items()}
    assert_all_close(got, run(unet, given, cross_attention_kwargs={"bias": dense}))
    assert (got[0] - run(unet, given)[0]).abs().max() > 1e-3
    masked = {"cross_attention_kwargs": {"bias": layouts}, "encoder_attention_mask": torch.ones(2, 7)}
    assert_all_close(run(unet, given, **masked), got)
    with pytest.raises(ValueError, match="bias has no entry for 16 image tokens"):
        unet(**given, cross_attention_kwargs={"bias": {64: layouts[64]}})


class Holder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        shape = {"query_dim": 32, "cross_attention_dim": 16, "heads": 4, "dim_head": 8}
        self.attn2 = Attention(**shape, processor=AttnProcessor(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"residual_connection": True, "rescale_output_factor": 1.5, "norm_num_groups": 8},
        {"cross_attention_norm": "layer_norm", "bias": True, "out_bias": False},
        {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4, "upcast_softmax": True},
        {"spatial_norm_dim": 6, "scale_qk": False},
        {"dropout": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_every_option_of_the_attention_module(options, frozen):
    grid = "spatial_norm_dim" in options or "residual_connection" in options
    holder = Holder(**options).requires_grad_(not frozen)
    hidden = torch.randn(2, 32, 4, 4) if grid else torch.randn(2, 16, 32)
    call = {"encoder_hidden_states": torch.randn(2, 5, 16), "attention_mask": torch.randn(2, 1, 5)}
    if "spatial_norm_dim" in options:
        call["temb"] = torch.randn(2, 6, 4, 4)
    torch.manual_seed(1)  # for dropout
    want = holder.attn2(hidden, **call)
    ck.patch_unet(holder)
    torch.manual_seed(1)
    assert_all_close([holder.attn2(hidden, **call)], [want])
    torch.manual_seed(1)
    per_head = call["attention_mask"].repeat_interleave(4, dim=0)
    assert_all_close([holder.attn2(hidden, **{**call, "attention_mask": per_head})], [want])


def test_boolean_mask_drops_keys():
    holder = Holder().requires_grad_(False)
    hidden, context = torch.randn(2, 16, 32), torch.randn(2, 5, 16)
    ck.patch_unet(holder)
    keep = torch.tensor([[True, True, True, False, False]] * 2)
    got = holder.attn2(hidden, context, attention_mask=keep)
    assert_all_close([got], [holder.attn2(hidden, context[:, :3])])


def test_gradient_checkpointing():
    unet = tiny_unet().train()
    weights, given = kv_weights(unet), inputs(unet)
    ck.patch_unet(unet)
    stack = ck.KVStack.from_unet(unet)
    want = run(unet, given, weights)
    unet.enable_gradient_checkpointing()
    assert_all_close(run(unet, given, weights), want)
    weight = stack.weight.detach().requires_grad_()
    kv = stack.views(ck.kv_project(given["encoder_hidden_states"], weight))
    out, *_, grad = run(unet, given, [weight], cross_attention_kwargs={"kv": kv})
    assert_all_close([out], want[:1])
    grads = dict(zip([n for n, p in unet.named_parameters() if p.requires_grad], want[3:], strict=True))
    assert_all_close([grad], [torch.cat([grads[s.name] for s in stack.segments])])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trainable_query", [False, True])
def test_autocast(trainable_query, low):
    unet = tiny_unet()
    weights, given = kv_weights(unet), inputs(unet)
    if trainable_query:
        weights += [p.requires_grad_() for n, p in unet.named_parameters() if n.endswith("attn2.to_q.weight")]
    exact = run(unet, given, weights)
    with torch.autocast("cpu", low):
        theirs = run(unet, given, weights)
        ck.patch_unet(unet)
        ours = run(unet, given, weights)
    for a, b, want in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - want).norm() <= 2 * (b.float() - want).norm() + 1e-3 * want.norm()


def test_float32_deltas_on_a_bfloat16_unet():
    unet = tiny_unet(torch.bfloat16)
    ck.patch_unet(unet)
    stack, given = ck.KVStack.from_unet(unet), inputs(unet)
    weight = stack.weight.float().requires_grad_()
    kv = stack.views(ck.kv_project(given["encoder_hidden_states"].float(), weight))
    out, *_, grad = run(unet, given, [weight], cross_attention_kwargs={"kv": kv})
    assert out.dtype == torch.bfloat16 and grad.dtype == torch.float32 and grad.any()


@pytest.mark.parametrize("frozen", [True, False])
def test_compiles_without_a_graph_break(frozen):
    holder = Holder().requires_grad_(not frozen)
    ck.patch_unet(holder)
    hidden, context = torch.randn(2, 16, 32), torch.randn(2, 5, 16)
    compiled = torch.compile(holder.attn2, fullgraph=True, backend="aot_eager")
    assert_all_close([compiled(hidden, context)], [holder.attn2(hidden, context)])
    kv = {"attn2": (torch.randn(2, 5, 32), torch.randn(2, 5, 32))}
    assert_all_close([compiled(hidden, context, kv=kv)], [holder.attn2(hidden, context, kv=kv)])


@pytest.mark.slow
def test_a_whole_training_step_compiles_without_a_graph_break():
    unet = tiny_unet()
    ck.patch_unet(unet)
    stack = ck.KVStack.from_unet(unet)
    weight = stack.weight.requires_grad_()

    def step(sample, timestep, encoder_hidden_states):
        kv = stack.views(ck.kv_project(encoder_hidden_states, weight, frozen_tokens=1))
        kwargs = {"cross_attention_kwargs": {"kv": kv}}
        return unet(sample, timestep, encoder_hidden_states, **kwargs).sample.square().mean()

    given, compiled = inputs(unet), torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = ([f(**given), *torch.autograd.grad(f(**given), [weight])] for f in (compiled, step))
    assert_all_close(got, want)


def test_a_compiled_unet_keeps_its_names():
    unet = tiny_unet()
    assert ck.patch_unet(torch.compile(unet)) == ck.unpatch_unet(unet)


def test_nothing_to_patch_is_an_error():
    with pytest.raises(ValueError, match="no text cross-attention"):
        ck.patch_unet(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="unet must be a UNet2DConditionModel, not dict"):
        ck.patch_unet({})


def test_a_processor_that_does_more_is_refused_and_nothing_changes():
    class IPAdapterAttnProcessor(AttnProcessor):
        pass

    unet = tiny_unet()
    last = unet.up_blocks[-1].attentions[-1].transformer_blocks[0].attn2
    last.set_processor(IPAdapterAttnProcessor())
    before = unet.attn_processors
    with pytest.raises(ValueError, match="IPAdapterAttnProcessor"):
        ck.patch_unet(unet)
    assert all(unet.attn_processors[k] is v for k, v in before.items())
