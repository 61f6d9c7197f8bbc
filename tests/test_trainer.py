"""A run: what moves and what does not, the same bits twice, what it writes, and how it stops."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import tiny_pipeline
import torch
from PIL import Image
from training_runs import config, folders, load, several  # noqa: F401

import customdiff_kernels as ck
from customdiff import Concept, trainer, training
from customdiff.views import Pictures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def state_of(pipeline):
    modules = {"unet": pipeline.unet, "text": pipeline.text_encoder, "vae": pipeline.vae}
    return {f"{m}.{k}": v.clone() for m, module in modules.items() for k, v in module.state_dict().items()}


def flags_of(pipeline):
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    modes = [part.training for module in modules for part in module.modules()]
    return modes, [weight.requires_grad for module in modules for weight in module.parameters()]


def test_learns_one_matrix_and_one_row_and_leaves_the_base_alone(config):  # noqa: F811
    pipeline = load(config.base)
    pipeline.text_encoder.train()
    pipeline.vae.decoder.requires_grad_(False)
    before, processors, flags = state_of(pipeline), dict(pipeline.unet.attn_processors), flags_of(pipeline)
    result = trainer.train(config, pipeline, progress=False)
    after = state_of(pipeline)
    assert flags_of(pipeline) == flags
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert pipeline.unet.attn_processors == processors

    concept = Concept.load(result.output)
    assert concept.delta.keys() == ck.KVStack.from_unet(pipeline.unet).keys()
    assert all(change.abs().max() > 1e-3 for change in concept.delta.values())
    initial = pipeline.text_encoder.get_input_embeddings().weight[
        pipeline.tokenizer.convert_tokens_to_ids("ktn</w>")
    ]
    assert list(concept.modifier_tokens) == ["<new1>"]
    assert (concept.modifier_tokens["<new1>"] - initial).abs().max() > 1e-3
    concept.check_base(ck.KVStack.from_unet(pipeline.unet))
    assert concept.metadata["prompt"] == "photo of a <new1> dog"
    assert concept.metadata["resolution"] == 32
    assert concept.metadata["training"]["learning_rate"] == 1e-2
    assert len(result.losses) == 4 and all(np.isfinite(result.losses))


def test_two_runs_give_the_same_bits(config, tmp_path):  # noqa: F811
    first = trainer.train(config, progress=False)
    second = trainer.train(
        dataclasses.replace(config, output=str(tmp_path / "again.safetensors")), progress=False
    )
    other = trainer.train(
        dataclasses.replace(config, output=str(tmp_path / "s.safetensors"), seed=1), progress=False
    )
    assert first.losses == second.losses != other.losses
    for name, change in first.concept.delta.items():
        assert torch.equal(change, second.concept.delta[name])
    assert torch.equal(first.concept.modifier_tokens["<new1>"], second.concept.modifier_tokens["<new1>"])


def test_resumes_with_the_same_bits(config, tmp_path, monkeypatch):  # noqa: F811
    whole = trainer.train(config, progress=False)
    broken = dataclasses.replace(config, output=str(tmp_path / "broken.safetensors"), checkpoint_every=3)
    step, taken = training.Training.step, []

    def stop_after_three(self):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(step(self))
        return taken[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Training, "step", stop_after_three)
        trainer.train(broken, progress=False)
    assert not (tmp_path / "broken.safetensors").exists()
    with pytest.raises(ValueError, match="other values of seed"):
        trainer.train(dataclasses.replace(broken, resume=True, seed=7), progress=False)
    (checkpoint,) = tmp_path.glob("broken*")
    assert_refuses_other_pictures_and_files(broken, checkpoint)
    resumed = trainer.train(dataclasses.replace(broken, resume=True), progress=False)
    assert tuple(taken) + resumed.losses == whole.losses
    assert all(
        torch.equal(change, resumed.concept.delta[name]) for name, change in whole.concept.delta.items()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.safetensors", "concept.safetensors"]
    with pytest.warns(UserWarning, match="no checkpoint .* starting anew"):
        anew = trainer.train(dataclasses.replace(broken, resume=True, overwrite=True), progress=False)
    assert anew.losses == whole.losses


def assert_refuses_other_pictures_and_files(config, checkpoint):  # noqa: F811
    """A damaged checkpoint, one of another format, one of other pictures or captions; all are put back."""
    picture, caption = Path(config.images, "1.png"), Path(config.regularization, "1.txt")
    whole, old, grey = checkpoint.read_bytes(), io.BytesIO(), io.BytesIO()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save(torch.load(checkpoint) | {"format": 0}, old)
    Image.new("RGB", (40, 40)).save(grey, "png")
    for path, content, message in (
        (checkpoint, whole[:-100], f"{checkpoint.name}' is damaged .*start without resume"),
        (checkpoint, b"", "is damaged"),
        (checkpoint, flipped, "is damaged .*checksum"),
        (checkpoint, old.getvalue(), "is of format 0, and this version reads 2"),
        (picture, grey.getvalue(), "was made with other pictures or captions"),
        (caption, b"photo of a red dog", "was made with other pictures or captions"),
    ):
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            trainer.train(dataclasses.replace(config, resume=True), progress=False)
        path.write_bytes(kept)


def test_a_finished_run_is_not_overwritten(config):  # noqa: F811
    first = trainer.train(config, progress=False).output.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        trainer.train(dataclasses.replace(config, seed=1), progress=False)
    assert Path(config.output).read_bytes() == first
    trainer.train(dataclasses.replace(config, seed=1, overwrite=True), progress=False)
    assert Path(config.output).read_bytes() != first


def test_an_output_that_cannot_be_written_fails_before_the_base_is_loaded(config, tmp_path):  # noqa: F811
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    config = dataclasses.replace(config, base=str(tmp_path / "no base"), overwrite=True)
    for output, message in (
        ("folder", "output '.*folder' is a folder"),
        ("file/x/c.safetensors", "output '.*c.safetensors' cannot be written .*Not a directory"),
        ("link/c.safetensors", "output '.*c.safetensors' cannot be written"),
        ("new/c.safetensors", "base '.*no base' is no pipeline"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.train(dataclasses.replace(config, output=str(tmp_path / output)), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert not list((tmp_path / "folder").iterdir())


def test_the_output_s_folder_is_made(config, tmp_path):  # noqa: F811
    output = tmp_path / "new" / "folder" / "c.safetensors"
    assert trainer.train(
        dataclasses.replace(config, steps=1, output=str(output)), progress=False
    ).output.is_file()


def test_regularization_captions_must_not_name_the_concept(config, tmp_path):  # noqa: F811
    folder = tiny_pipeline.pictures(tmp_path / "r", 1, seed=0, caption="photo of a <new1> dog")
    with pytest.raises(ValueError, match="holds the modifier token"):
        trainer.train(dataclasses.replace(config, regularization=folder), progress=False)
    (tmp_path / "r" / "0.txt").write_text("photo of asks dog")
    sks = dataclasses.replace(config, modifier_token="sks", prompts=("a sks dog",), regularization=folder)
    assert Pictures.read(sks)[0].captions == ["photo of asks dog"]
