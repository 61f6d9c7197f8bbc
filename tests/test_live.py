"""Changes on a live UNet, and off again bit for bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import customdiff_kernels as ck

E, INNER = 24, (8, 16)


class Attention(nn.Module):
    def __init__(self, inner: int):
        super().__init__()
        self.to_q = nn.Linear(inner, inner, bias=False)
        self.to_k, self.to_v = (nn.Linear(E, inner, bias=False) for _ in "kv")


def unet(dtype=torch.float32) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Module() for _ in INNER)
    for block, inner in zip(model.blocks, INNER, strict=True):
        block.attn2 = Attention(inner)
    return model.to(dtype)


def delta(model: nn.Module, *ranks: int) -> ck.LowRankDelta:
    """Ranks of the first segments; the others do not change."""
    stack = ck.KVStack.from_unet(model)
    pairs = {
        name: (torch.randn(len(stack[name]), r), torch.randn(r, E))
        for name, r in zip(stack, ranks, strict=False)
    }
    return ck.LowRankDelta(stack.segments, pairs)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, wanted: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_on_and_off(dtype):
    model = unet(dtype)
    with torch.no_grad():
        model.blocks[0].attn2.to_k.weight[0, :3] = torch.tensor([-0.0, torch.nan, torch.inf])
    before, stack, change = state(model), ck.KVStack.from_unet(model), delta(model, 2, 0, 3)
    wanted = ck.reconstruct(stack, change, 0.7)
    with ck.applied(model, change, 0.7) as on:
        assert on.names == (list(stack)[0], list(stack)[2])
        torch.testing.assert_close(
            ck.KVStack.from_unet(model).weight, wanted.weight, rtol=0, atol=0, equal_nan=True
        )
    bits = [p.detach().view(torch.uint8) for p in model.parameters()]
    assert all(torch.equal(a, b.view(torch.uint8)) for a, b in zip(bits, before.values(), strict=True))


def test_several_at_once_and_dense_changes():
    model = unet()
    before, stack = state(model), ck.KVStack.from_unet(model)
    name = list(stack)[1]
    deltas = [delta(model, 2), {name: torch.randn_like(stack[name])}, delta(model, 0)]
    wanted = ck.reconstruct(stack, deltas, [0.5, 2.0, 1.0])
    on = ck.applied(model, deltas, [0.5, 2.0, 1.0])
    torch.testing.assert_close(ck.KVStack.from_unet(model).weight, wanted.weight)
    on.remove()
    assert same(model, before)


def test_nested_changes_come_off_last_to_first():
    model = unet()
    before = state(model)
    first = ck.applied(model, delta(model, 1, 2))
    between = state(model)
    second = ck.applied(model, delta(model, 3, 3, 3, 3))
    with pytest.raises(RuntimeError, match="1 later changes are still on"):
        first.remove()
    second.remove()
    assert same(model, between)
    first.remove()
    assert same(model, before)
    with torch.no_grad():
        model.blocks[0].attn2.to_k.weight.zero_()
    after = state(model)
    for on in (first, second):  # what is off stays off
        on.remove()
    assert same(model, after)


def test_an_error_within_takes_it_off():
    model = unet()
    before = state(model)
    with pytest.raises(KeyError), ck.applied(model, delta(model, 1)):
        assert not same(model, before)
        raise KeyError
    assert same(model, before)


def test_a_cast_in_between():
    """The originals come back in the dtype that the UNet has by then."""
    model = unet()
    wanted = {name: p.to(torch.bfloat16) for name, p in state(model).items()}
    on = ck.applied(model, delta(model, 1, 1, 1, 1))
    model.to(torch.bfloat16)
    on.remove()
    assert same(model, wanted)


def test_bad_input_leaves_the_unet_alone():
    model = unet()
    before, change = state(model), delta(model, 2)
    name = next(iter(change.factors))
    foreign = ck.LowRankDelta.from_factors({"other.attn2.to_k.weight": (torch.ones(8, 1), torch.ones(1, E))})
    wrong = ck.LowRankDelta.from_factors({name: (torch.ones(9, 1), torch.ones(1, E))})
    for deltas, scales, message in [
        (foreign, None, r"deltas\[0\] has segments that the UNet does not have: \['other"),
        ([change, wrong], None, r"deltas\[1\].* must be \(8, 24\)"),
        (change, [1.0, 2.0], "one number for each of the 1 deltas"),
        ([], None, "change nothing"),
        (delta(model, 0), None, "change nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            ck.applied(model, deltas, scales)
    assert same(model, before)
    with pytest.raises(TypeError, match="unet must be"):
        ck.applied({}, change)
    with pytest.raises(TypeError, match="deltas"):
        ck.applied(model, [3])
    assert same(model, before)


def test_a_unet_that_changed_its_shape_is_left_alone():
    model = unet()
    on = ck.applied(model, delta(model, 1, 1, 1))
    model.blocks[1].attn2 = Attention(32)
    before = state(model)
    with pytest.raises(ValueError, match="no blocks.1.attn2.to_k.weight of shape"):
        on.remove()
    assert same(model, before)


def test_a_change_does_not_keep_the_unet_alive():
    model = unet()
    on, gone = ck.applied(model, delta(model, 1)), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    on.remove()
