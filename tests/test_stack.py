"""KVStack: the rows of a UNet's cross-attention as one matrix, there and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from customdiff_kernels.stack import KVStack, Segment

E = 12


class Attention(nn.Module):
    def __init__(
        self, inner: int, width: int = E, bias: bool = False, parts: tuple[str, ...] = ("to_k", "to_v")
    ):
        super().__init__()
        self.to_q = nn.Linear(inner, inner, bias=False)
        for part in parts:
            self.add_module(part, nn.Linear(width, inner, bias=bias))


class Block(nn.Module):
    def __init__(self, inner: int, **kwargs):
        super().__init__()
        self.attn1 = Attention(inner, width=inner)  # self-attention: never part of a stack
        self.attn2 = Attention(inner, **kwargs)


def unet(*inners: int, **kwargs) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(Block(inner, **kwargs) for inner in inners)
    return model


def test_rows_are_the_layers_in_order_keys_before_values():
    model = unet(4, 8)
    stack = KVStack.from_unet(model)
    assert stack.segments == (
        Segment("blocks.0.attn2.to_k.weight", 0, 4),
        Segment("blocks.0.attn2.to_v.weight", 4, 8),
        Segment("blocks.1.attn2.to_k.weight", 8, 16),
        Segment("blocks.1.attn2.to_v.weight", 16, 24),
    )
    parameters = dict(model.named_parameters())
    assert list(stack) == [segment.name for segment in stack.segments] and len(stack) == 4
    for name, rows in stack.items():
        assert torch.equal(rows, parameters[name])
        assert rows.data_ptr() == stack.weight[stack._index[name].start :].data_ptr()  # a view
    stack.weight.zero_()
    assert all(p.abs().sum() > 0 for p in model.parameters())  # a copy of the UNet's


def test_values_before_keys_in_the_module_change_nothing():
    model = unet(4, parts=("to_v", "to_k"))
    assert [s.name.split(".")[-2] for s in KVStack.from_unet(model).segments] == ["to_k", "to_v"]


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_of_a_diffusers_unet(model):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is optional")
    extra = {"sd": {}, "sdxl": {"transformer_layers_per_block": (1, 2), "use_linear_projection": True}}[model]
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=E,
        attention_head_dim=4,
        norm_num_groups=4,
        **extra,
    )
    stack = KVStack.from_unet(net)
    wanted = {n for n, _ in net.named_parameters() if ".attn2.to_k." in n or ".attn2.to_v." in n}
    assert set(stack) == wanted and len(wanted) == {"sd": 14, "sdxl": 22}[model]
    context = torch.randn(2, 5, E)
    modules = dict(net.named_modules())
    for name, (key, value) in stack.views(context @ stack.weight.T).items():
        torch.testing.assert_close(key, modules[name].to_k(context))
        torch.testing.assert_close(value, modules[name].to_v(context))


def test_views_share_the_memory_of_the_projection():
    stack = KVStack.from_unet(unet(4, 8))
    kv = torch.randn(2, 5, 24)
    views = stack.views(kv)
    assert list(views) == ["blocks.0.attn2", "blocks.1.attn2"]
    key, value = views["blocks.1.attn2"]
    assert key.shape == value.shape == (2, 5, 8)
    assert value.data_ptr() == kv[..., 16:].data_ptr() and value._base is kv
    pairs = stack.views(kv.requires_grad_()).values()
    assert len({tensor.grad_fn for pair in pairs for tensor in pair}) == 1  # one gradient of kv, not four
    with pytest.raises(ValueError, match=r"R=24 .* got shape \(2, 5, 23\)"):
        stack.views(kv[..., 1:])


def test_load_into_writes_every_name_and_nothing_else():
    model = unet(4, 8)
    before = {n: p.clone() for n, p in model.named_parameters()}
    stack = KVStack.from_unet(model)
    changed = KVStack(stack.weight + 1, stack.segments)
    assert changed.load_into(model) == list(stack)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] + 1 if name in stack else before[name])
    assert torch.equal(KVStack.from_unet(model).weight, changed.weight)


def test_load_into_casts_to_the_unet_and_takes_compiled_ones():
    model = unet(4).half()
    stack = KVStack.from_unet(model).to(torch.float32)
    compiled = torch.compile(model)
    assert KVStack(stack.weight * 2, stack.segments).load_into(compiled) == list(stack)
    assert torch.equal(KVStack.from_unet(compiled).weight, stack.weight.half() * 2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: unet(4), "2 segments unknown to the UNet"),
        (lambda: unet(4, 8, 8), "2 of its parameters missing from the stack"),
        (lambda: unet(4, 16), r"\(8, 12\) here and \(16, 12\) in the UNet"),
        (lambda: unet(4, 8, width=E + 1), r"\(4, 12\) here and \(4, 13\) in the UNet"),
    ],
)
def test_load_into_another_unet_writes_nothing(other, message):
    stack, model = KVStack.from_unet(unet(4, 8)), other()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        stack.load_into(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_difference_is_the_change_in_float32():
    stack = KVStack.from_unet(unet(4, 8)).to(torch.float16)
    moved = KVStack(stack.weight + 0.25, stack.segments)
    change = moved - stack
    assert change.weight.dtype is torch.float32 and change.segments == stack.segments
    torch.testing.assert_close(stack.weight.float() + change.weight, moved.weight.float())
    with pytest.raises(ValueError, match="must have the segments of this one"):
        stack - KVStack.from_unet(unet(8, 4)).to(torch.float16)


def test_clone_and_to_leave_the_original():
    stack = KVStack(nn.Parameter(torch.randn(4, E)), [("a", 0, 4)])
    copy = stack.clone()
    copy.weight.zero_()
    assert stack.weight.abs().sum() > 0 and not copy.weight.requires_grad
    assert stack.to(torch.float64).weight.dtype is torch.float64
    assert isinstance(stack.weight, nn.Parameter)  # never replaced by a plain tensor


def test_hash_knows_values_names_and_shapes_and_nothing_else():
    model = unet(4, 8)
    stack = KVStack.from_unet(model)
    found = stack.hash()
    assert len(found) == 64 and found == stack.clone().hash()
    assert found == stack.to(torch.float16).hash() == stack.to(torch.float16).to(torch.float32).hash()
    assert found == KVStack(stack.weight.T.contiguous().T, stack.segments).hash()  # any strides
    assert found == KVStack.from_mapping(dict(reversed(list(stack.items())))).hash()  # any order
    altered = stack.clone()
    altered.weight[5, 3] *= 1.01
    renamed = KVStack(stack.weight, [("x" + s.name, s.start, s.stop) for s in stack.segments])
    reshaped = KVStack(stack.weight.reshape(12, 24), [("a", 0, 12)])
    assert len({found, altered.hash(), renamed.hash(), reshaped.hash()}) == 4


def test_mapping_round_trip():
    weights = {"b": torch.randn(3, E), "a": torch.randn(5, E)}
    stack = KVStack.from_mapping(weights)
    assert list(stack) == ["b", "a"] and "R=8, E=12" in repr(stack)
    assert all(torch.equal(stack[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: KVStack.from_unet(nn.Linear(2, 2)),
            ValueError,
            r"no parameter named \*\.attn2\.to_k\.weight",
        ),
        (lambda: KVStack.from_unet({"a": 1}), TypeError, "must be a torch.nn.Module, got dict"),
        (
            lambda: KVStack.from_unet(unet(4, bias=True)),
            ValueError,
            "bias in its keys or values .*attn2.to_k.bias",
        ),
        (lambda: KVStack.from_unet(unet(4, parts=("to_k",))), ValueError, "only one of .* in blocks.0.attn2"),
        (lambda: KVStack(torch.ones(2, 2), [("a", 0)]), TypeError, r"\(name, start, stop\), got \('a', 0\)"),
        (lambda: KVStack([[1.0]], [("a", 0, 1)]), TypeError, "weight must be a torch.Tensor"),
        (lambda: KVStack(torch.ones(2, 2).int(), [("a", 0, 2)]), TypeError, "weight must be float32"),
        (lambda: KVStack(torch.ones(2), [("a", 0, 2)]), ValueError, r"weight must have shape \(R,E\)"),
        (lambda: KVStack(torch.ones(2, 2), [("a", 0, 1)]), ValueError, "cover the R=2 rows of weight, got 1"),
        (lambda: KVStack(torch.ones(2, 2), [("a", 0, 1), ("b", 0, 2)]), ValueError, "without gaps"),
        (lambda: KVStack(torch.ones(2, 2), [("a", 0, 1), ("a", 1, 2)]), ValueError, "'a' twice"),
        (lambda: KVStack.from_mapping({}), ValueError, "at least one matrix"),
        (lambda: KVStack.from_mapping([torch.ones(2, 2)]), TypeError, "mapping {name: tensor}, got list"),
        (
            lambda: KVStack.from_mapping({"a": torch.ones(2, 2), "b": torch.ones(2, 3)}),
            ValueError,
            "share one text width E: a has 2, b has 3",
        ),
        (
            lambda: KVStack.from_mapping({"a": torch.ones(2, 2), "b": torch.ones(2, 2).half()}),
            TypeError,
            "share one dtype",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_layers_of_different_text_width():
    model = unet(4)
    model.more = unet(4, width=E + 4)
    with pytest.raises(ValueError, match="share one text width E: blocks.0.attn2.to_k.weight has 12"):
        KVStack.from_unet(model)


def test_views_need_both_of_a_module():
    stack = KVStack(torch.ones(4, E), [("x.attn2.to_k.weight", 0, 4)])
    with pytest.raises(ValueError, match="only one of them of"):
        stack.views(torch.ones(1, 2, 4))
