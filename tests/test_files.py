"""Saving, loading and applying a delta; every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from torch import nn

from customdiff_kernels import _safetensors
from customdiff_kernels.files import (
    BaseMismatchError,
    DeltaFileError,
    LoadedDelta,
    apply_delta,
    load_delta,
    own,
    save_delta,
)
from customdiff_kernels.low_rank import LowRankDelta, compress, reconstruct
from customdiff_kernels.stack import KVStack

E = 12


def unet(*inners: int) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList()
    for inner in inners:
        block = nn.Module()
        block.attn2 = nn.ModuleDict(
            {"to_k": nn.Linear(E, inner, bias=False), "to_v": nn.Linear(E, inner, bias=False)}
        )
        model.blocks.append(block)
    return model


def change_named(name: str) -> LowRankDelta:
    return LowRankDelta.from_factors({name: (torch.ones(2, 1), torch.ones(1, 3))})


def change(stack: KVStack, rank: int = 2) -> LowRankDelta:
    return compress(KVStack(torch.randn_like(stack.weight), stack.segments), rank=rank)


def equal(first: LowRankDelta, second: LowRankDelta) -> bool:
    return first.segments == second.segments and all(
        a.dtype is b.dtype and torch.equal(a, b)
        for name in first.factors
        for a, b in zip(first.factors[name], second.factors[name], strict=True)
    )


@pytest.fixture
def saved(tmp_path):
    """(path, delta, base): a delta with everything that a file can hold."""
    base = KVStack.from_unet(unet(4, 8))
    delta = change(base)
    path = save_delta(
        delta,
        tmp_path / "dog.safetensors",
        modifier_tokens={"<new1>": torch.randn(E), "ktn": [torch.randn(E), torch.randn(E + 4)]},
        base_hash=base.hash(),
        base_name="tiny",
        resolution=[64, 96],
        prompt="photo of a <new1> dog – «é»",
        training={"steps": 250, "learning_rate": 8e-5},
        note=None,
    )
    return path, delta, base


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_low_rank_round_trip_to_the_bit(dtype, tmp_path):
    base = KVStack.from_unet(unet(4, 8))
    delta = LowRankDelta(base.segments, {n: f for n, f in change(base).factors.items() if "to_k" in n}).to(
        dtype
    )
    loaded = load_delta(save_delta(delta, tmp_path / "x"))
    assert isinstance(loaded, LoadedDelta) and equal(loaded.delta, delta)
    assert [loaded.delta.rank(s.name) for s in base.segments] == [2, 0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_full_round_trip_to_the_bit(dtype, tmp_path):
    base = KVStack.from_unet(unet(4, 8))
    difference = KVStack(torch.randn_like(base.weight).to(dtype), base.segments)
    strided = {name: m.T.contiguous().T for name, m in difference.items()}
    for delta in (difference, dict(difference), strided):
        loaded = load_delta(save_delta(delta, tmp_path / "x")).delta
        assert list(loaded) == list(difference)
        assert all(torch.equal(loaded[n], difference[n]) and loaded[n].dtype is dtype for n in difference)


def test_tokens_and_metadata_round_trip(saved):
    path, _, base = saved
    loaded = load_delta(str(path))
    assert list(loaded.modifier_tokens) == ["<new1>", "ktn"] or set(loaded.modifier_tokens) == {
        "<new1>",
        "ktn",
    }
    assert loaded.modifier_tokens["<new1>"].shape == (E,)
    assert [t.shape for t in loaded.modifier_tokens["ktn"]] == [(E,), (E + 4,)]
    assert loaded.metadata.pop("library_version")
    assert loaded.metadata == {
        "base_hash": base.hash(),
        "base_name": "tiny",
        "resolution": [64, 96],
        "prompt": "photo of a <new1> dog – «é»",
        "training": {"steps": 250, "learning_rate": 8e-5},
        "format_version": 1,
    }


def test_the_file_is_plain_safetensors(saved, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path, delta, base = saved
    tensors = load_file(path)
    name = base.segments[0].name
    assert torch.equal(tensors[f"{name}.u"], delta.factors[name][0]) and "modifier_token.<new1>" in tensors
    assert "modifier_token_2.ktn" in tensors
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "customdiff" and json.loads(metadata["base_hash"]) == base.hash()
    save_file(tensors, tmp_path / "again", metadata=metadata)  # and what the library writes is read back
    assert equal(load_delta(tmp_path / "again").delta, delta)


def test_write_is_atomic(saved, monkeypatch):
    path, delta, base = saved
    before = path.read_bytes()

    def full(fd):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_delta(change(base), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="blocks.0.attn2.to_k.weight.u is not finite"):
        save_delta(delta * float("nan"), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    newer = change(base)
    save_delta(newer, path)
    assert equal(load_delta(path).delta, newer) and os.listdir(path.parent) == [path.name]


def test_apply_changes_what_it_says_and_nothing_else(tmp_path):
    model = unet(4, 8)
    base = KVStack.from_unet(model)
    delta = change(base)
    part = LowRankDelta(base.segments, {n: f for n, f in delta.factors.items() if "to_v" in n})
    loaded = load_delta(save_delta(part, tmp_path / "x", base_hash=base.hash()))
    names = apply_delta(model, loaded, scale=0.5)
    assert names == ["blocks.0.attn2.to_v.weight", "blocks.1.attn2.to_v.weight"]
    wanted = reconstruct(base, part, 0.5)
    assert torch.equal(KVStack.from_unet(model).weight, wanted.weight)
    assert not torch.equal(wanted.weight, base.weight)


def test_apply_full_delta_to_half_precision(tmp_path):
    model = unet(4)
    base = KVStack.from_unet(model)
    dense = {"blocks.0.attn2.to_k.weight": torch.randn(4, E)}
    loaded = load_delta(save_delta(dense, tmp_path / "x", base_hash=base.hash()))
    model.half()  # the hash of the float16 load of the same weights agrees
    assert apply_delta(model, loaded) == list(dense)
    found = KVStack.from_unet(model)
    torch.testing.assert_close(
        found.weight.float()[:4], base.weight[:4] + dense[list(dense)[0]], rtol=1e-3, atol=1e-3
    )


def test_apply_to_another_base_is_refused_unless_forced(saved):
    path, delta, base = saved
    loaded, other = load_delta(path), unet(4, 8)
    before = KVStack.from_unet(other)
    with pytest.raises(BaseMismatchError, match="made for tiny .* force=True"):
        apply_delta(other, loaded)
    assert torch.equal(KVStack.from_unet(other).weight, before.weight)
    assert len(apply_delta(other, loaded, force=True)) == 4
    own = unet(4, 8)
    base.load_into(own)
    apply_delta(own, loaded)
    with pytest.raises(BaseMismatchError, match="a delta on it already"):
        apply_delta(own, loaded)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda base: ({"z": torch.ones(4, E)}, {}), ValueError, "unknown segment 'z'"),
        (
            lambda base: ({"blocks.0.attn2.to_k.weight": torch.ones(5, E)}, {}),
            ValueError,
            r"must be \(4, 12\)",
        ),
        (lambda base: ({"blocks.0.attn2.to_k.weight": torch.zeros(4, E)}, {}), ValueError, "changes nothing"),
        (lambda base: (change(base), {"scale": 0}), ValueError, "scale=0 changes nothing"),
    ],
)
def test_apply_refuses_before_writing(make, error, message):
    model = unet(4, 8)
    base = KVStack.from_unet(model)
    delta, options = make(base)
    with pytest.raises(error, match=message):
        apply_delta(model, LoadedDelta(delta, {}, {"base_hash": base.hash()}), **options)
    assert torch.equal(KVStack.from_unet(model).weight, base.weight)


def test_apply_needs_a_loaded_delta():
    with pytest.raises(TypeError, match="loaded must be what load_delta returns, got int"):
        apply_delta(unet(4), 3)


def test_apply_needs_a_recorded_base():
    model = unet(4)
    with pytest.raises(BaseMismatchError, match="does not record the base"):
        apply_delta(model, LoadedDelta(change(KVStack.from_unet(model))))


ONE = {"a": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: save_delta({}, p), ValueError, "delta must name at least one matrix"),
        (lambda p: save_delta(torch.ones(2, 2), p), TypeError, "delta must be a KVStack or a mapping"),
        (lambda p: save_delta({"modifier_token.x": torch.ones(2, 3)}, p), ValueError, "keeps for itself"),
        (lambda p: save_delta(change_named("modifier_token"), p), ValueError, "stored as 'modifier_token.u'"),
        (lambda p: save_delta({"": torch.ones(2, 3)}, p), ValueError, "segment without a name, rows 0 to 2"),
        (lambda p: save_delta(ONE, p, modifier_tokens={"x": []}), ValueError, "'x'.* must be an embedding"),
        (lambda p: save_delta(ONE, p, modifier_tokens=[1]), TypeError, "modifier_tokens must map words"),
        (
            lambda p: save_delta(ONE, p, modifier_tokens={"": torch.ones(3)}),
            TypeError,
            "words as keys, got ''",
        ),
        (
            lambda p: save_delta(ONE, p, modifier_tokens={"x": torch.ones(1, 3)}),
            ValueError,
            r"must have shape \(E,\)",
        ),
        (
            lambda p: save_delta(ONE, p, modifier_tokens={"x": torch.ones(3).int()}),
            TypeError,
            "must be float32",
        ),
        (
            lambda p: save_delta(ONE, p, modifier_tokens={"x": torch.tensor([float("inf")])}),
            ValueError,
            "modifier_token.x is not finite",
        ),
        (lambda p: save_delta(ONE, p, base_hash="abc"), ValueError, "'base_hash' must be .* got 'abc'"),
        (lambda p: save_delta(ONE, p, prompt=3), TypeError, "'prompt' must be a string, got 3"),
        (lambda p: save_delta(ONE, p, training="x"), TypeError, "'training' must be a dict"),
        (lambda p: save_delta(ONE, p, other=object()), TypeError, "'other' must be what JSON can hold"),
        (lambda p: save_delta(ONE, p, format="x"), ValueError, "format must be one of .* got 'x'"),
        (lambda p: save_delta(ONE, p / "no" / "such"), FileNotFoundError, None),
        (lambda p: load_delta(p), FileNotFoundError, "it is a folder"),
        (lambda p: load_delta(p / "none"), FileNotFoundError, "there is no delta file"),
    ],
)
def test_bad_input_leaves_no_file(call, error, message, tmp_path):
    target = tmp_path / "file" if error is not FileNotFoundError else tmp_path
    with pytest.raises(error, match=message):
        call(target)
    assert os.listdir(tmp_path) == []


def rewrite(path, edit) -> None:
    """Alter the file's tensors and metadata and keep its checksum right, as a hostile or foreign writer
    would.
    """
    from safetensors.torch import save_file

    tensors, text = _safetensors.read(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # views of the file otherwise
    edit(tensors, text)
    if "content_sha256" in text:
        text["content_sha256"] = json.dumps(own.content_hash(tensors, text))
    save_file(tensors, path, metadata=text)


FIRST = "blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, m: m.pop("format"), "does not say format='customdiff'"),
        (lambda t, m: m.update(format_version="2"), "format_version 2, this library reads 1 to 1: update it"),
        (lambda t, m: m.update(format_version='"1"'), "format_version '1'"),
        (lambda t, m: m.pop("content_sha256"), "does not match the checksum"),
        (lambda t, m: m.update(kind='"other"'), "kind 'other'"),
        (lambda t, m: m.update(segments="{}"), "does not say which segments"),
        (lambda t, m: m.update(segments='[["a", 0]]'), r"must be \[name, start, stop\]"),
        (lambda t, m: m.update(segments='[["a", 0, 4], ["a", 4, 8]]'), "'a' twice"),
        (lambda t, m: m.update(prompt="{"), "Expecting property name"),
        (lambda t, m: m.update(prompt="[" * 100_000), "not a delta that can be read"),
        (lambda t, m: m.update(base_hash='"x"'), "'base_hash' must be"),
        (lambda t, m: t.pop(f"{FIRST}.u"), rf"missing \['{FIRST}.u'\]"),
        (lambda t, m: t.update(stranger=torch.ones(2)), r"unknown \['stranger'\]"),
        (lambda t, m: t.update({"modifier_token_1.x": torch.ones(2)}), r"unknown \['modifier_token_1.x'\]"),
        (
            lambda t, m: t.update({"modifier_token_3.ktn": t.pop("modifier_token_2.ktn")}),
            r"encoders \[1, 3\] only",
        ),
        (lambda t, m: t.update({f"{FIRST}.u": t[f"{FIRST}.u"][:3]}), r"must have shape \(4, 2\)"),
        (lambda t, m: t.update({f"{FIRST}.v": t[f"{FIRST}.v"].half()}), "must be float"),
        (lambda t, m: t.update({f"{FIRST}.u": t[f"{FIRST}.u"].int()}), "must be float32"),
    ],
)
def test_wrong_content_is_refused(edit, message, saved):
    rewrite(saved[0], edit)
    with pytest.raises(DeltaFileError, match=message) as caught:
        load_delta(saved[0])
    assert str(saved[0]) in str(caught.value)


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header too small"),
        (b"PK\x03\x04" + bytes(100), "not a whole archive of torch.save"),
        (b"\x80\x02}q\x00.", "a pickle of PyTorch before 1.6"),
        (
            (0x010280).to_bytes(8, "little") + b"{}".ljust(0x010280),
            "none of the layouts",
        ),  # begins as a pickle
        ((10**15).to_bytes(8, "little") + b"{}", "header too large"),
        ((2).to_bytes(8, "little") + b"{]", "header"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "header"),
        (header({"__metadata__": {"format": 3}}), "header"),
        (header({"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}, b"0"), "F8"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, b"0" * 8), "header"),
        (header({"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}), "not a whole"),
        (header({}), "does not say format='customdiff', and its names are \\[\\]"),
    ],
)
def test_malformed_files_are_refused(content, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DeltaFileError, match=f"{path} is not a delta that can be read: .*{message}"):
        load_delta(path)


def test_damage_anywhere_is_an_error(saved):
    """Cut short, or with bits flipped: never loaded, never another exception."""
    path, generator = saved[0], random.Random(0)
    whole = path.read_bytes()
    for case in range(600):
        damaged = bytearray(whole)
        if case % 3 == 0:
            del damaged[generator.randrange(len(damaged)) :]
        else:
            for _ in range(generator.choice([1, 1, 1, 8])):
                position = generator.randrange(len(damaged) if case % 3 == 1 else 2000)
                damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        if damaged == whole:
            continue
        with pytest.raises(DeltaFileError):
            load_delta(path)
