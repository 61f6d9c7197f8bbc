"""Diffusers' own training script on the embedded base: as it is, and with one line of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
import diffusers_script  # noqa: E402

import customdiff_kernels as ck  # noqa: E402
import tinysd  # noqa: E402
from customdiff import Concept, base, cli, sample, trainer  # noqa: E402
from customdiff.config import TrainConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS, LAYERS = 4, 10
PROMPT = "photo of a <new1> dog on the grass"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("script")
    diffusers_script.write_pictures(root)
    return root


@pytest.fixture(scope="module")
def trained(root):
    """{name: (what it printed, its folder)} of the script as it is, and with our line, which saves .bin."""
    plain = diffusers_script.find(root)
    if plain is None:
        pytest.skip(diffusers_script.MISSING)
    patched = diffusers_script.with_our_line(plain, root / "patched.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    packages = [Path(module.__file__).parents[1] for module in (ck, tinysd)]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, packages))
    running = {}
    for name, script, more in (("plain", plain, []), ("patched", patched, ["--no_safe_serialization"])):
        options = diffusers_script.options(root, root / name)
        options += [f"--max_train_steps={STEPS}", "--learning_rate=1e-3", *more]
        command = [sys.executable, diffusers_script.__file__, str(script), *options]
        running[name] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    texts = {name: process.communicate(timeout=300)[0] for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0, texts[name][-3000:]
    return {name: (text, root / name) for name, text in texts.items()}


@pytest.fixture
def pipeline():
    return base.load_base(device="cpu")


def losses(text):
    found = dict(re.findall(rf"(\d+)/{STEPS} .*?loss=([\d.]+)", text))
    assert len(found) == STEPS
    return [float(found[step]) for step in sorted(found)]


def in_diffusers(pipeline, folder, kind):
    """The picture of diffusers' pipeline, into which it loaded a folder of its own layout."""
    weights = f"pytorch_custom_diffusion_weights.{kind}"
    # without _pipeline, which the script does not give, diffusers installs nothing
    pipeline.unet.load_attn_procs(folder, weight_name=weights, _pipeline=pipeline)
    pipeline.load_textual_inversion(folder, weight_name=f"<new1>.{kind}")
    config = pipeline.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = pipeline(PROMPT, num_inference_steps=4, guidance_scale=6.0, latents=noise, output_type="pt")
    return made.images


def by_ours(pipeline, concept):
    return sample(pipeline, PROMPT, concept, steps=4, guidance_scale=6.0, output="tensor", progress=False)


def test_the_script_trains_the_same_with_our_line(trained, pipeline):
    (plain, as_it_is), (patched, with_ours) = trained["plain"], trained["patched"]
    assert f"patched {LAYERS}\n" in patched and "patched" not in plain
    assert losses(patched) == pytest.approx(losses(plain), rel=0.002)  # three digits are printed
    want, got = ck.load_delta(as_it_is), ck.load_delta(with_ours)
    assert got.weights.keys() == want.weights.keys() and len(want.weights) == 2 * LAYERS
    before = ck.KVStack.from_unet(pipeline.unet)
    for name, weight in want.weights.items():
        moved, error = (weight - before[name]).norm(), (got.weights[name] - weight).norm()
        assert 0 < moved and error <= 5e-3 * moved, f"{name}: moved {moved:.3g}, error {error:.3g}"
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    first = table[pipeline.tokenizer("ktn", add_special_tokens=False).input_ids[0]]
    row = want.modifier_tokens["<new1>"]
    assert (got.modifier_tokens["<new1>"] - row).norm() <= 5e-3 * (row - first).norm()


def assert_same_picture(pipeline, concept, folder, kind):
    """Ours with `concept` is diffusers' with `folder`, and not that of the new word alone."""
    got = by_ours(pipeline, concept)
    word_alone = by_ours(pipeline, Concept({}, concept.modifier_tokens))
    assert (got - word_alone).abs().max() > 0.05
    torch.testing.assert_close(got, in_diffusers(pipeline, folder, kind), rtol=0, atol=1e-3)


def test_what_the_script_wrote_loads_here(trained, pipeline):
    _, folder = trained["patched"]
    assert_same_picture(pipeline, Concept.load(folder), folder, "bin")


def test_what_we_train_loads_in_diffusers(root, pipeline):
    config = TrainConfig(
        images=str(root / "concept"),
        prompts=("photo of a <new1> dog",),
        regularization=str(root / "captioned"),
        steps=STEPS,
        batch_size=2,
        learning_rate=1e-2,
        output=str(root / "ours.safetensors"),
    )
    concept = trainer.train(config, pipeline, progress=False).concept
    folder = root / "ours"
    assert cli.main(["convert", config.output, "--to", "diffusers", "--output", str(folder)]) == 0
    assert_same_picture(pipeline, concept, folder, "safetensors")
