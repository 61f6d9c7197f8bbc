"""``customdiff convert``, and the other commands on files of other formats."""

import json
import re

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402
from PIL import Image, ImageChops  # noqa: E402

import customdiff_kernels as ck  # noqa: E402
from customdiff import Concept, cli  # noqa: E402
from customdiff.concept import base_metadata  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, a full concept of it as our file and as a published delta.bin, and its compressed form."""
    root = tmp_path_factory.mktemp("convert")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline.build(root / "base"))
    stack = ck.KVStack.from_unet(pipe.unet)
    concept = tiny_pipeline.concept(pipe, 0)
    concept.metadata["prompt"] = "photo of a <new1> dog"
    concept.save(root / "full.safetensors")
    weights = {name: weight + concept.delta[name] for name, weight in stack.items()}
    torch.save({"unet": weights, "modifier_token": concept.modifier_tokens}, root / "delta.bin")
    Concept(ck.compress(concept.delta, rank=2), concept.modifier_tokens, base_metadata(stack)).save(
        root / "small.safetensors"
    )
    return root


@pytest.fixture
def run(root, tmp_path, capsys):
    """Runs a command line in which {root} and {out} are folders; returns (status, stdout, stderr)."""

    def call(line, *more):
        status = cli.main(line.format(root=root, out=tmp_path).split() + list(more))
        return status, *capsys.readouterr()

    return call


def matrices(loaded):
    dense = loaded.delta.dense() if isinstance(loaded.delta, ck.LowRankDelta) else loaded.delta
    return {**dense, **loaded.weights}


def close(first, second):
    a, b = matrices(first), matrices(second)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)
    assert first.modifier_tokens.keys() == second.modifier_tokens.keys()
    assert all(
        torch.equal(first.modifier_tokens[w], second.modifier_tokens[w]) for w in first.modifier_tokens
    )


def test_there_and_back(root, run, tmp_path):
    """delta.bin to ours to every other format and home again."""
    status, out, err = run("convert {root}/delta.bin --to customdiff --base {root}/base --output {out}/ours")
    assert status == 0 and "8 segments from delta.bin, <new1>" in out and "reading" in err
    ours = ck.load_delta(tmp_path / "ours")
    close(ours, ck.load_delta(root / "full.safetensors"))
    assert ours.metadata["base_name"] == "base"
    assert (
        ours.metadata["base_hash_bfloat16"]
        == ck.load_delta(root / "full.safetensors").metadata["base_hash_bfloat16"]
    )
    for format in ("delta.bin", "diffusers"):
        assert (
            run(f"convert {{out}}/ours --to {format} --base {{root}}/base --output {{out}}/{format}")[0] == 0
        )
        close(ck.load_delta(tmp_path / format), ck.load_delta(root / "delta.bin"))
        line = (
            f"convert {{out}}/{format} --to customdiff --base {{root}}/base --overwrite --output {{out}}/ours"
        )
        assert run(line)[0] == 0
        close(ck.load_delta(tmp_path / "ours"), ours)
    for format in ("lora", "kohya", "delta.bin"):
        line = f"convert {{root}}/small.safetensors --to {format} --output {{out}}/small_{format} --json"
        status, out, err = run(line)
        done = json.loads(out)
        assert (status, err, done["written"], done["held"]) == (0, "", format, "delta")
        assert done["segments"] == 8 and done["bytes"] > 1000 and done["modifier_tokens"] == ["<new1>"]
        assert (
            run(f"convert {{out}}/small_{format} --to customdiff --overwrite --output {{out}}/ours")[0] == 0
        )
        close(ck.load_delta(tmp_path / "ours"), ck.load_delta(root / "small.safetensors"))


def test_a_concept_of_the_embedded_base_needs_no_base(run, tmp_path):
    from diffusers import UNet2DConditionModel

    import tinysd

    unet = UNet2DConditionModel.from_pretrained(tinysd.path(), subfolder="unet")
    stack = ck.KVStack.from_unet(unet)
    Concept({name: torch.ones_like(w) for name, w in stack.items()}, {}, base_metadata(stack)).save(
        tmp_path / "a"
    )
    assert run("convert {out}/a --to diffusers --output {out}/b")[0] == 0
    found = ck.load_delta(tmp_path / "b").weights
    assert all(torch.equal(found[name], weight + 1) for name, weight in stack.items())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{root}/nothing --to lora --output {out}/x", "concept file .* does not exist"),
        ("{root}/base/model_index.json --to lora --output {out}/x", "not a whole safetensors file"),
        ("{root}/base --to lora --output {out}/x", "holds none"),
        ("{root}/full.safetensors --to lora --output {out}/x", "compress it first .*customdiff compress"),
        (
            "{root}/full.safetensors --to delta.bin --output {out}/x",
            "give --base, the pipeline folder of the model",
        ),
        ("{root}/full.safetensors --to webui --output {out}/x", "checkpoint must be the base model's file"),
        ("{root}/full.safetensors --to delta.bin --base {root} --output {out}/x", "no unet/config.json"),
        ("{root}/delta.bin --to compvis --output {out}/x", "UNets of two layers a level"),
        (
            "{root}/delta.bin --to customdiff --output {root}/delta.bin",
            "exists; name another, or pass --overwrite",
        ),
        (
            "{root}/delta.bin --to diffusers --overwrite --output {root}/base",
            "not a folder of one saved concept alone",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(line, message, run, tmp_path):
    status, out, err = run("convert --quiet " + line)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert re.match(f"customdiff convert: error: .*{message}", err), err
    assert not list(tmp_path.iterdir())


def test_the_other_base_is_refused(root, run, tmp_path):
    other = ck.load_delta(root / "full.safetensors")
    other.metadata["base_hash"] = "0" * 64
    ck.save_delta(other, tmp_path / "other")
    status, _, err = run("convert {out}/other --to delta.bin --base {root}/base --output {out}/x")
    assert status == 2 and "was made for" in err and not (tmp_path / "x").exists()


def test_other_commands_read_other_formats(root, run, tmp_path):
    pictures = []
    for i, file in enumerate(("full.safetensors", "delta.bin")):
        line = f"sample --base {{root}}/base --concept {{root}}/{file} --output {{out}}/{i}.png"
        assert run(line + " --steps 2 --count 1 --quiet", "--prompt", "photo of a <new1> dog")[0] == 0
        pictures.append(Image.open(tmp_path / f"{i}.png"))
    extremes = ImageChops.difference(*pictures).getextrema()
    assert max(high for _, high in extremes) <= 1  # W0 + (W - W0) is W but for rounding
    status, out, _ = run("inspect {root}/delta.bin --json")
    found = json.loads(out)
    assert status == 0 and found["delta"] == "whole weights" and len(found["segments"]) == 8
    status, _, err = run("compress {root}/delta.bin --rank 2 --output {out}/x")
    assert status == 2 and "make it one first, with customdiff convert" in err
    run("convert {root}/delta.bin --to diffusers --output {out}/folder")
    status, out, _ = run("inspect {out}/folder")
    assert status == 0 and "<new1>" in out
    pipe = StableDiffusionPipeline.from_pretrained(root / "base")
    written = Concept.load(tmp_path / "folder").load_into(pipe)
    assert "<new1>" in written and len(written) == 9
    wanted = ck.load_delta(root / "delta.bin").weights
    assert all(torch.equal(weight, wanted[name]) for name, weight in ck.KVStack.from_unet(pipe.unet).items())
