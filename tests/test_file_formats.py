"""Every published layout: as others write it, as others read it, and there and back with changed weights."""

from __future__ import annotations

import json
import os

import pytest
import torch
from file_samples import NAMES, WORDS, E, every_format, sample
from safetensors.torch import load_file, save_file

import customdiff_kernels as ck
from customdiff_kernels.files import names

FIRST = NAMES[0]
LAYER = FIRST.removesuffix(".to_k.weight")
COMPVIS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def held():
    return sample()


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype is second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


def same_factors(first: ck.LowRankDelta, second: ck.LowRankDelta) -> bool:
    parts = [
        {(n, i): f for n, pair in d.factors.items() for i, f in enumerate(pair)} for d in (first, second)
    ]
    return same(*parts)


def test_round_trips_to_the_bit(held, tmp_path):
    for what, path in every_format(tmp_path, held).items():
        found = ck.load_delta(path)
        assert same(found.modifier_tokens, held.tokens), what
        if what == "customdiff-full":
            assert found.kind == "delta" and same(found.delta, held.delta.dense())
        elif what in ("customdiff", "delta.bin-compressed", "compvis-compressed", "lora", "kohya"):
            assert found.kind == "delta" and same_factors(found.delta, held.delta), what
            assert found.metadata["base_hash"] == held.base.hash(), what
        else:
            assert found.kind == "weights" and not found.delta and same(found.weights, held.weights), what
        unet = held.unet()
        assert sorted(ck.apply_delta(unet, found)) == sorted(NAMES), what
        for name, weight in ck.KVStack.from_unet(unet).items():
            torch.testing.assert_close(weight, held.weights[name], rtol=0, atol=1e-5)


def test_the_name_of_a_file_says_nothing(held, tmp_path):
    for i, (what, path) in enumerate(every_format(tmp_path, held).items()):
        before = ck.load_delta(path)
        renamed = path.rename(tmp_path / f"{i}.png")
        after = ck.load_delta(renamed)
        assert (after.format, after.kind) == (before.format, before.kind), what
        assert same(after.modifier_tokens, before.modifier_tokens), what


@pytest.mark.parametrize("format", ["delta.bin", "compvis", "diffusers"])
def test_a_change_becomes_whole_weights_with_its_base(format, held, tmp_path):
    for delta in (held.delta, held.delta.dense()):
        path = ck.save_delta(
            delta, tmp_path / "out", format=format, base=held.base, modifier_tokens=held.tokens
        )
        found = ck.load_delta(path)
        for name in NAMES:
            torch.testing.assert_close(found.weights[name], held.weights[name], rtol=0, atol=1e-6)
        back = found.relative_to(held.base)
        assert back.kind == "delta" and back.metadata["base_hash"] == held.base.hash()
        wanted = held.delta.dense()
        for name in NAMES:
            torch.testing.assert_close(back.delta[name], wanted[name], rtol=0, atol=1e-6)
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()


def test_names_of_compvis_are_those_that_diffusers_maps():
    """SD 1.x and SDXL, by diffusers' own conversion of a checkpoint."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    for attentions, depth in (((1, 2, 4, 5, 7, 8), 1), ((4, 5, 7, 8), 2)):
        outputs = range(3, 12) if depth == 1 else range(6)
        places = [f"input_blocks.{i}.1" for i in attentions] + ["middle_block.1"]
        places += [f"output_blocks.{i}.1" for i in outputs]
        state = {f"input_blocks.{i}.0.in_layers.0.weight": torch.zeros(1) for i in range(3 * (5 - depth))}
        state |= {f"output_blocks.{i}.0.in_layers.0.weight": torch.zeros(1) for i in range(3 * (5 - depth))}
        state |= {f"middle_block.{i}.in_layers.0.weight": torch.zeros(1) for i in (0, 2)}
        ours = [
            f"{place}.transformer_blocks.{layer}.attn2.to_{part}.weight"
            for place in places
            for layer in range(depth)
            for part in "kv"
        ]
        state |= {name: torch.tensor([float(i)]) for i, name in enumerate(ours)}
        state = {names.PREFIX + name: value for name, value in state.items()}
        wanted = {
            name: ours[int(value)]
            for name, value in convert_ldm_unet_checkpoint(state, {"layers_per_block": 2}).items()
            if "attn2" in name
        }
        assert len(wanted) == len(ours)
        for name, compvis in wanted.items():
            assert names.from_compvis(compvis) == names.from_compvis(names.PREFIX + compvis) == name
        assert names.to_compvis(wanted) == {name: names.PREFIX + compvis for name, compvis in wanted.items()}
        for name in wanted:
            assert names.from_kohya(names.to_kohya(name)) == name
            sgm = "lora_unet_" + wanted[name].removesuffix(".weight").replace(".", "_")
            assert names.from_kohya(sgm) == name


def test_delta_bin_as_published(held, tmp_path):
    """Two encoders, a text encoder beside, the compressed form."""
    path = tmp_path / "delta.bin"
    tree = {
        "unet": {n: torch.nn.Parameter(w) for n, w in held.weights.items()},
        "modifier_token": held.tokens,
    }
    torch.save(tree, path)
    found = ck.load_delta(path)
    assert (found.format, found.kind) == ("delta.bin", "weights") and same(found.weights, held.weights)
    assert not any(w.requires_grad for w in found.weights.values())
    pairs = {word: [row, torch.randn(E + 4)] for word, row in held.tokens.items()}
    torch.save(tree | {"modifier_token": pairs}, path)
    assert [t.shape for t in ck.load_delta(path).modifier_tokens["<new2>"]] == [(E,), (E + 4,)]
    torch.save(tree | {"text_encoder": {"a": torch.ones(2)}}, path)
    with pytest.raises(ck.DeltaFileError, match="1 other weights, first 'text_encoder'.* kv_only=True"):
        ck.load_delta(path)
    assert ck.load_delta(path, kv_only=True).left_out == ("text_encoder",)
    query = LAYER + ".to_q.weight"
    torch.save({"unet": tree["unet"] | {query: torch.ones(4, 4)}}, path)
    assert same(ck.load_delta(path).others, {query: torch.ones(4, 4)})
    found = ck.load_delta(path, kv_only=True)
    assert same(found.weights, held.weights) and found.modifier_tokens == {}
    assert found.left_out == (query,) and not found.others
    compressed = {name: {"u": u, "v": v} for name, (u, v) in held.delta.factors.items()}
    torch.save({"unet": compressed | {query: torch.ones(4, 4)}}, path)
    with pytest.raises(ck.DeltaFileError, match=f"first '{query}'"):  # a change and a whole weight
        ck.load_delta(path)
    mixed = {FIRST: {"u": torch.ones(4, 1), "v": torch.ones(1, E)}, NAMES[1]: held.weights[NAMES[1]]}
    torch.save({"unet": mixed}, path)
    with pytest.raises(ck.DeltaFileError, match="must be {'u', 'v'} as the others"):
        ck.load_delta(path)


def test_what_others_read_of_delta_bin(held, tmp_path):
    tree = torch.load(every_format(tmp_path, held)["delta.bin"], weights_only=True)
    assert same(tree["unet"], held.weights) and same(tree["modifier_token"], held.tokens)
    tree = torch.load(tmp_path / "compvis-compressed", weights_only=True)["state_dict"]
    change = tree[COMPVIS]["u"] @ tree[COMPVIS]["v"]
    torch.testing.assert_close(change, held.delta.dense()[FIRST])
    assert torch.equal(tree["embed"], torch.stack([*held.tokens.values()]))


def test_compvis_as_published(held, tmp_path):
    path = tmp_path / "delta_epoch=000004.ckpt"
    state = {name: held.weights[ours] for ours, name in names.to_compvis(NAMES).items()}
    assert COMPVIS in state
    torch.save({"state_dict": state | {"embed": torch.stack([*held.tokens.values()])}}, path)
    found = ck.load_delta(path)
    assert found.format == "compvis" and same(found.weights, held.weights)
    assert same(found.modifier_tokens, held.tokens)
    torch.save({"state_dict": state | {"embed": torch.cat([*held.tokens.values()])}}, path)
    assert same(ck.load_delta(path).modifier_tokens, held.tokens)  # as "diffuser-to-compvis" writes it
    # a whole model with two words more than CLIP has, as it is trained, in both containers
    table = torch.zeros(49408 + 2, E)
    table[49408:] = torch.stack([*held.tokens.values()])
    whole = state | {
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": table,
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight": torch.ones(4, 4),
        "first_stage_model.encoder.conv_in.weight": torch.ones(2),
    }
    torch.save({"state_dict": whole, "global_step": 250}, path)
    save_file(whole, tmp_path / "model.safetensors")
    for file in (path, tmp_path / "model.safetensors"):
        found = ck.load_delta(file)
        assert same(found.weights, held.weights) and same(found.modifier_tokens, held.tokens)


def test_compvis_knows_no_other_unet(held, tmp_path):
    narrow = {name: w for name, w in held.weights.items() if "attentions.1" not in name}
    with pytest.raises(ValueError, match="UNets of two layers a level .* has 1 down and 2 up"):
        ck.save_delta(ck.LoadedDelta({}, weights=narrow), tmp_path / "x", format="compvis")
    with pytest.raises(ValueError, match="'a.attn2.to_k.weight' has no name in CompVis"):
        ck.save_delta(
            ck.LoadedDelta({}, weights={"a.attn2.to_k.weight": torch.ones(2, 3)}),
            tmp_path / "x",
            format="compvis",
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_diffusers_files_as_published(kind, held, tmp_path):
    """What ``save_attn_procs`` and the training script write: the weights, and beside them the words."""
    weights = {}
    for name, weight in held.weights.items():
        layer, part = name.removesuffix(".weight").rsplit(".", 1)
        weights[f"{layer}.processor.{part}_custom_diffusion.weight"] = weight

    def write(value: dict, name: str) -> None:
        if kind == "bin":
            torch.save(value, tmp_path / f"{name}.bin")
        else:
            save_file(value, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})

    empty = {LAYER.replace("attn2", "attn1") + ".processor": {}} if kind == "bin" else {}
    write(weights | empty, "pytorch_custom_diffusion_weights")
    for word, row in held.tokens.items():
        write({word: row}, word)
    (tmp_path / "README.md").write_text("# a model")
    (tmp_path / "checkpoint-250").mkdir()
    for path in (tmp_path, tmp_path / f"pytorch_custom_diffusion_weights.{kind}"):
        found = ck.load_delta(path)
        assert found.format == "diffusers" and same(found.weights, held.weights)
        assert same(found.modifier_tokens, held.tokens)
    alone = ck.load_delta(tmp_path / f"<new1>.{kind}")
    assert (alone.kind, alone.format) == ("tokens", "embedding") and list(alone.modifier_tokens) == ["<new1>"]
    with pytest.raises(ValueError, match="holds no weights to apply, only the modifier tokens <new1>"):
        ck.apply_delta(held.unet(), alone)
    parts = ("to_q_custom_diffusion.weight", "to_out_custom_diffusion.0.bias")
    write(weights | {f"{LAYER}.processor.{part}": torch.ones(4) for part in parts}, "whole")
    found = ck.load_delta(tmp_path / f"whole.{kind}").others
    assert found.keys() == {f"{LAYER}.to_q.weight", f"{LAYER}.to_out.0.bias"}
    write(weights | {f"{LAYER}.processor.to_out_custom_diffusion.weight": torch.ones(4, 4)}, "odd")
    with pytest.raises(ck.DeltaFileError, match="first .*to_out_custom_diffusion.weight"):
        ck.load_delta(tmp_path / f"odd.{kind}")


def test_embeddings_of_the_webui(tmp_path):
    row = torch.randn(E)
    torch.save(
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": row[None].requires_grad_()},
            "name": "ktn",
            "step": 249,
            "sd_checkpoint": "7460a6fa",
            "sd_checkpoint_name": "sd-v1-4",
        },
        tmp_path / "any.pt",
    )
    save_file({"emb_params": row[None]}, tmp_path / "dog.safetensors")
    save_file({"clip_g": torch.ones(1, 8), "clip_l": row[None]}, tmp_path / "cat.safetensors")
    found = ck.load_delta(tmp_path / "any.pt")
    assert found.kind == "tokens" and same(found.modifier_tokens, {"ktn": row})
    assert same(ck.load_delta(tmp_path / "dog.safetensors").modifier_tokens, {"dog": row})
    first, second = ck.load_delta(tmp_path / "cat.safetensors").modifier_tokens["cat"]
    assert torch.equal(first, row) and second.shape == (8,)
    save_file({"emb_params": torch.ones(3, E)}, tmp_path / "many.safetensors")
    with pytest.raises(ck.DeltaFileError, match="a modifier token is one vector"):
        ck.load_delta(tmp_path / "many.safetensors")


def test_a_webui_checkpoint_is_the_base_s_but_for_keys_and_values(held, tmp_path):
    base = held.checkpoint(tmp_path)
    path = ck.save_delta(held.delta, tmp_path / "out", format="webui", checkpoint=base)
    before, after = load_file(base), load_file(path / "model.safetensors")
    changed = names.to_compvis(NAMES)
    assert before.keys() == after.keys()
    rest = before.keys() - set(changed.values())
    assert len(rest) == 3 and same({n: before[n] for n in rest}, {n: after[n] for n in rest})
    for name in NAMES:
        torch.testing.assert_close(after[changed[name]], held.weights[name], rtol=0, atol=1e-6)
    other = sample(1)
    with pytest.raises(ck.BaseMismatchError, match="made for its base"):
        ck.save_delta(
            held.delta, tmp_path / "no", format="webui", checkpoint=base, base_hash=other.base.hash()
        )
    with pytest.raises(ValueError, match="base must be left out with checkpoint"):
        ck.save_delta(held.delta, tmp_path / "no", format="webui", checkpoint=base, base=held.base)
    assert not (tmp_path / "no").exists()


def test_lora_as_others_write_it(held, tmp_path):
    u, v = held.delta.factors[FIRST]
    ours = FIRST.removesuffix(".weight")
    kohya = "lora_unet_" + ours.replace(".", "_")
    path = tmp_path / "x.safetensors"
    processor = f"{LAYER}.processor.to_k_lora"
    half = json.dumps({"unet.r": 4, "unet.lora_alpha": 2})
    for tensors, text, scale in (
        ({f"unet.{ours}.lora_A.weight": v, f"unet.{ours}.lora_B.weight": u}, {}, 1),
        (
            {f"unet.{ours}.lora_A.weight": v, f"unet.{ours}.lora_B.weight": u},
            {"lora_adapter_metadata": half},
            0.5,
        ),
        ({f"unet.{ours}.lora.down.weight": v, f"unet.{ours}.lora.up.weight": u}, {}, 1),
        ({f"{processor}.down.weight": v, f"{processor}.up.weight": u}, {}, 1),
        ({f"{kohya}.lora_down.weight": v, f"{kohya}.lora_up.weight": u}, {}, 1),
        (
            {
                f"{kohya}.lora_down.weight": v,
                f"{kohya}.lora_up.weight": u,
                f"{kohya}.alpha": torch.tensor(0.25),
            },
            {},
            0.25 / v.shape[0],
        ),
    ):
        save_file(tensors, path, metadata=text)
        found = ck.load_delta(path)
        assert found.format == "lora" and list(found.delta.factors) == [FIRST]
        assert torch.equal(found.delta.factors[FIRST][0], u * scale)
        assert torch.equal(found.delta.factors[FIRST][1], v)
        with pytest.raises(ck.BaseMismatchError, match="does not record the base"):
            ck.apply_delta(held.unet(), found)
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    save_file({f"{kohya}.lora_down.weight": v, f"{kohya}.lora_up.weight": u, text: v.clone()}, path)
    with pytest.raises(ck.DeltaFileError, match=f"1 other weights, first '{text}'"):
        ck.load_delta(path)
    save_file({f"unet.{ours}.lora_A.weight": v}, path)
    with pytest.raises(ck.DeltaFileError, match="lacks u"):
        ck.load_delta(path)
    save_file({f"base_model.model.{ours}.lora_A.weight": v}, path)
    with pytest.raises(ck.DeltaFileError, match="adapter_config.json"):
        ck.load_delta(path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "delta.bin"}, ValueError, "format='delta.bin' holds whole weights.* give base="),
        ({"format": "diffusers"}, ValueError, "format='diffusers' holds whole weights"),
        ({"format": "lora"}, ValueError, "compress it first"),
        ({"format": "kohya"}, ValueError, "compress it first"),
        ({"format": "webui"}, ValueError, "checkpoint must be the base model's file"),
        ({"checkpoint": "x"}, ValueError, "is for no other format"),
        ({"base": 3}, TypeError, "base must be a KVStack or a UNet, got int"),
        (
            {"format": "lora", "modifier_tokens": {"a/b": torch.ones(3)}},
            ValueError,
            "cannot be the name of a file",
        ),
        (
            {"format": "lora", "modifier_tokens": {"a": [torch.ones(3)] * 3}},
            ValueError,
            "has 3 embeddings; its file holds one or two",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(options, error, message, held, tmp_path):
    delta = held.delta if "modifier_tokens" in options else held.delta.dense()
    with pytest.raises(error, match=message):
        ck.save_delta(delta, tmp_path / "x", **options)
    assert os.listdir(tmp_path) == []


def test_words_of_two_encoders(held, tmp_path):
    words = {"<new1>": (torch.randn(E), torch.randn(E + 2))}
    checkpoint = held.checkpoint(tmp_path)
    for format in ("customdiff", "delta.bin", "diffusers", "webui"):
        options = {"checkpoint": checkpoint} if format == "webui" else {}
        path = tmp_path / format
        ck.save_delta(held.loaded(), path, format=format, modifier_tokens=words, **options)
        found = ck.load_delta(path).modifier_tokens
        assert list(found) == ["<new1>"]
        assert all(torch.equal(a, b) for a, b in zip(found["<new1>"], words["<new1>"], strict=True)), format
    with pytest.raises(ValueError, match="words of one text encoder"):
        ck.save_delta(held.loaded(), tmp_path / "x", format="compvis", modifier_tokens=words)


def test_whole_weights_replace_after_a_look_at_names_and_shapes(held, tmp_path):
    loaded, unet = held.loaded(), held.unet()
    half = ck.LoadedDelta({}, weights={FIRST: held.weights[FIRST]})
    assert ck.apply_delta(unet, half, scale=0.5) == [FIRST]
    found = ck.KVStack.from_unet(unet)[FIRST]
    torch.testing.assert_close(found, (held.weights[FIRST] + held.base[FIRST]) / 2)
    ck.apply_delta(unet, loaded)
    with pytest.raises(ValueError, match="has these weights already"):
        ck.apply_delta(unet, loaded)
    for weights, message in (
        ({"other.attn2.to_k.weight": torch.ones(4, E)}, r"which has no \['other.attn2.to_k.weight'\]"),
        ({FIRST: torch.ones(3, E)}, r"must have shape \(4, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ck.apply_delta(unet, ck.LoadedDelta({}, weights=weights))
    assert same(dict(ck.KVStack.from_unet(unet)), held.weights)
    path = ck.save_delta(loaded, tmp_path / "x", format="delta.bin", base=held.base)
    with pytest.raises(ck.BaseMismatchError):
        ck.apply_delta(sample(1).unet(), ck.load_delta(path))
    with pytest.raises(ck.BaseMismatchError):
        ck.load_delta(path).relative_to(sample(1).base)
    with pytest.raises(ck.BaseMismatchError, match="base_hash must be that of the file"):
        ck.save_delta(ck.load_delta(path), tmp_path / "y", base_hash=sample(1).base.hash())


def test_a_folder_is_replaced_only_if_it_is_one_concept(held, tmp_path):
    path = ck.save_delta(held.delta, tmp_path / "out", format="lora", modifier_tokens=held.tokens)
    ck.save_delta(held.delta, path, format="lora", modifier_tokens={"<new9>": torch.ones(E)})
    assert sorted(os.listdir(path)) == ["<new9>.safetensors", "pytorch_lora_weights.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    ck.save_delta(held.loaded(), path, format="diffusers", modifier_tokens={})
    assert os.listdir(path) == ["pytorch_custom_diffusion_weights.safetensors"]
    (path / "picture.png").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder of one saved concept alone"):
        ck.save_delta(held.delta, path, format="lora")
    assert (path / "picture.png").read_text() == "mine"
    with pytest.raises(FileExistsError):
        ck.save_delta(held.delta, path / "picture.png", format="lora")


def test_a_folder_that_lost_a_file_is_refused(held, tmp_path):
    path = ck.save_delta(held.delta, tmp_path / "out", format="lora", modifier_tokens=held.tokens)
    (path / "<new2>.safetensors").unlink()
    for source in (path, path / "pytorch_lora_weights.safetensors"):
        with pytest.raises(ck.DeltaFileError, match="lacks the files that it was saved with, first .*<new2>"):
            ck.load_delta(source)
    with pytest.raises(ck.DeltaFileError, match="<new1>.safetensors is not the file that .* was saved with"):
        ck.save_delta(held.delta, tmp_path / "out2", format="lora", modifier_tokens=held.tokens)
        (tmp_path / "out2" / "<new2>.safetensors").replace(tmp_path / "out2" / "<new1>.safetensors")
        ck.load_delta(tmp_path / "out2")
    with pytest.raises(ck.DeltaFileError, match="holds 0 files of weights"):
        (path / "pytorch_lora_weights.safetensors").unlink()
        ck.load_delta(path)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The path of a small pipeline of random weights."""
    pytest.importorskip("diffusers")
    import tiny_pipeline

    return tiny_pipeline.build(tmp_path_factory.mktemp("tiny") / "pipeline")


def ours(pipeline):
    """(pipe, its stack, a change of ranks 1 to 3, two words)."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    stack = ck.KVStack.from_unet(pipe.unet)
    factors = {
        name: (torch.randn(w.shape[0], 1 + i % 3), torch.randn(1 + i % 3, w.shape[1]))
        for i, (name, w) in enumerate(stack.items())
    }
    return pipe, stack, ck.LowRankDelta(stack.segments, factors), {word: torch.randn(32) for word in WORDS}


@pytest.mark.parametrize("format", ["lora", "kohya"])
def test_diffusers_loads_the_lora(format, pipeline, tmp_path):
    """``load_lora_weights`` gives W0 + u v whatever the ranks, and ``load_textual_inversion`` the words."""
    pytest.importorskip("peft")
    pipe, stack, delta, tokens = ours(pipeline)
    path = ck.save_delta(delta, tmp_path / "dog", format=format, modifier_tokens=tokens)
    pipe.load_lora_weights(str(path / "dog.safetensors") if format == "kohya" else str(path))
    pipe.fuse_lora()
    wanted = ck.reconstruct(stack, delta)
    for name in stack:
        layer = pipe.unet.get_submodule(name.removesuffix(".weight")).base_layer
        torch.testing.assert_close(layer.weight, wanted[name], rtol=1e-5, atol=1e-5)
    for word, row in tokens.items():
        folder = path / "embeddings" if format == "kohya" else path
        pipe.load_textual_inversion(str(folder / f"{word}.safetensors"), token=word)
        found = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids(word)]
        assert torch.equal(found, row)


def test_diffusers_loads_its_own_layout(pipeline, tmp_path):
    """``load_attn_procs`` installs every weight, and reads as ours what it then saves."""
    pipe, stack, delta, tokens = ours(pipeline)
    path = ck.save_delta(delta, tmp_path / "d", format="diffusers", base=stack, modifier_tokens=tokens)
    name = "pytorch_custom_diffusion_weights.safetensors"
    pipe.unet.load_attn_procs(str(path), weight_name=name, _pipeline=pipe)  # without it, it installs nothing
    wanted = ck.reconstruct(stack, delta)
    for layer, processor in pipe.unet.attn_processors.items():
        if layer.endswith("attn2.processor"):
            for part in "kv":
                weight = getattr(processor, f"to_{part}_custom_diffusion").weight
                ours_of = layer.replace("processor", f"to_{part}.weight")
                torch.testing.assert_close(weight, wanted[ours_of], rtol=0, atol=1e-6)
        else:
            assert not processor.state_dict()
    for safe in (True, False):
        pipe.unet.save_attn_procs(str(tmp_path / f"again{safe}"), safe_serialization=safe)
        assert same(ck.load_delta(tmp_path / f"again{safe}").weights, ck.load_delta(path).weights)
    for word, row in tokens.items():
        pipe.load_textual_inversion(str(path / f"{word}.safetensors"))
        found = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids(word)]
        assert torch.equal(found, row)
