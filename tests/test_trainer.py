"""A run: what moves and what does not, the same bits twice, what it writes, and how it stops."""

import dataclasses
import io
import os
import resource
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_pipeline
import torch
from PIL import Image
from training_runs import config, folders, load, several, training_of  # noqa: F401

import customdiff_kernels as ck
from customdiff import Concept, checkpoint, trainer, training
from customdiff.config import Stopped
from customdiff.generated import generate
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
        ("file/x/c.safetensors", "output '.*c.safetensors' cannot be written: '.*file' is no folder"),
        ("link/c.safetensors", "output '.*c.safetensors' cannot be written: '.*link' is no folder"),
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


# --- a run that is left alone ---


def same(first: Concept, second: Concept) -> bool:
    pairs = zip(first.delta.values(), second.delta.values(), strict=True)
    words = zip(first.modifier_tokens.values(), second.modifier_tokens.values(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in (*pairs, *words))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_keeps_a_checkpoint(config, tmp_path, monkeypatch, number):  # noqa: F811
    whole = trainer.train(config, progress=False)
    told = dataclasses.replace(config, output=str(tmp_path / "told.safetensors"))
    step = training.Training.step

    def told_in_the_second(self):
        if self.steps_done == 1:
            os.kill(os.getpid(), number)
        return step(self)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after 2 of 4 steps; .*resume"):
        patch.setattr(training.Training, "step", told_in_the_second)
        trainer.train(told, progress=False)
    assert signal.getsignal(number) is before
    assert not (tmp_path / "told.safetensors").exists()
    resumed = trainer.train(dataclasses.replace(told, resume=True), progress=False)
    assert len(resumed.losses) == 2 and same(resumed.concept, whole.concept)


def test_resume_in_every_mode(config, tmp_path, monkeypatch):  # noqa: F811
    for weights in ("cross-attention", "unet", "none"):
        chosen = dataclasses.replace(several(config, 2), weights=weights, checkpoint_every=2, keep_every=2)
        whole = trainer.train(dataclasses.replace(chosen, output=str(tmp_path / weights)), progress=False)
        broken = dataclasses.replace(chosen, output=str(tmp_path / f"{weights}-again"))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainer.Validation, "after_step", lambda v, _: stop_at(v.training, 3))
            trainer.train(broken, progress=False)
        resumed = trainer.train(dataclasses.replace(broken, resume=True), progress=False)
        assert same(resumed.concept, whole.concept)
        others = zip(resumed.concept.others.values(), whole.concept.others.values(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in others)


def stop_at(run, step):
    if run.steps_done == step:
        raise KeyboardInterrupt


def test_resume_knows_the_concept_that_it_started_from(config, tmp_path, monkeypatch):  # noqa: F811
    first = trainer.train(config, progress=False)
    other = {"modifier_token": "<new2>", "prompts": ("a <new2> cat",), "start_from": config.output}
    second = dataclasses.replace(config, output=str(tmp_path / "second"), checkpoint_every=2, **other)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Validation, "after_step", lambda v, _: stop_at(v.training, 3))
        trainer.train(second, progress=False)
    kept = first.output.read_bytes()
    trainer.train(dataclasses.replace(config, seed=1, overwrite=True), progress=False)
    with pytest.raises(ValueError, match="with other values of the content of start_from"):
        trainer.train(dataclasses.replace(second, resume=True), progress=False)
    first.output.write_bytes(kept)
    assert len(trainer.train(dataclasses.replace(second, resume=True), progress=False).losses) == 2


def test_concepts_kept_on_the_way(config, tmp_path):  # noqa: F811
    result = trainer.train(dataclasses.replace(config, keep_every=2), progress=False)
    kept = [Concept.load(tmp_path / f"concept-{step:06}.safetensors") for step in (2, 4)]
    assert [concept.metadata["step"] for concept in kept] == [2, 4]
    assert same(kept[1], result.concept) and not same(kept[0], result.concept)


def test_pictures_on_the_way_change_nothing(config, tmp_path):  # noqa: F811
    plain = trainer.train(config, progress=False)
    for weights in ("kv", "unet"):
        chosen = {"weights": weights, "output": str(tmp_path / f"{weights}.safetensors")}
        chosen |= {"validation_prompts": ("a <new1> dog", "a <new1> cat"), "validation_every": 2}
        watched = trainer.train(dataclasses.replace(config, **chosen), progress=False)
        assert weights != "kv" or same(watched.concept, plain.concept)
        drawn = sorted((tmp_path / f"{weights}.validation").iterdir())
        assert [path.name for path in drawn] == ["000002.png", "000004.png"]
        first, last = (np.asarray(Image.open(path)) for path in drawn)
        assert first.shape == last.shape and (first != last).any()


def test_trackers_are_told(config, tmp_path, monkeypatch):  # noqa: F811
    """Through accelerate; TensorBoard itself is not among the test's packages."""
    told, finished = [], []

    class Tracker:
        name, main_process_only = "tensorboard", True

        def log(self, values, step=None, **_):
            told.append((step, values))

        def finish(self):
            finished.append(True)

        class writer:
            @staticmethod
            def add_images(tag, images, step, dataformats):
                told.append((step, {tag: (images.shape, dataformats)}))

    def start(accelerator, *_, config):
        assert config["steps"] == 4 and isinstance(config["prompts"], str)
        accelerator.trackers = [Tracker()]

    chosen = {"log_with": "tensorboard", "validation_prompts": ("a <new1> dog",), "validation_every": 4}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="pip install tensorboard"):
        patch.setattr("accelerate.tracking.get_available_trackers", list)
        trainer.train(dataclasses.replace(config, **chosen), progress=False)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", start)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_, **__: [])
    trainer.train(dataclasses.replace(config, **chosen), progress=False)
    losses = [values for _, values in told if "loss" in values]
    assert len(losses) == 4 and losses[0]["learning_rate"] == 1e-2 and finished == [True]
    assert told[-1] == (4, {"validation": ((1, 32, 32, 3), "NHWC")})


def test_generated_regularization(config, tmp_path, monkeypatch):  # noqa: F811
    """As many pictures as asked for, by the base; made once, gone on with where they stopped."""
    chosen = dataclasses.replace(config, regularization="generated", generated_count=3, generated_steps=2)
    result = trainer.train(chosen, progress=False)
    folder = tmp_path / "concept.generated-1"
    made = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert sorted(made) == ["0000.png", "0001.png", "0002.png"] and len(set(made.values())) == 3
    assert (folder / "captions.csv").read_text().splitlines()[1] == "0000.png,photo of a dog"
    (folder / "0001.png").unlink()
    again = trainer.train(dataclasses.replace(chosen, overwrite=True), progress=False)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == made
    assert same(again.concept, result.concept)
    with pytest.raises(ValueError, match="holds other files than pictures generated for 'a cat'"):
        other = {"regularization_prompt": "a cat", "overwrite": True}
        trainer.train(dataclasses.replace(chosen, **other), progress=False)


def test_processes_share_what_is_generated(config, tmp_path):  # noqa: F811
    pipeline, drawn = load(config.base), []
    for folder, shares in (("one", [(0, 1)]), ("two", [(0, 2), (1, 2)])):
        for share in shares:
            generate(pipeline, "a dog", 3, tmp_path / folder, 1, share=share, progress=False)
            drawn.append(len(list((tmp_path / folder).glob("*.png"))))
    assert drawn == [3, 2, 3]
    for name in ("0000.png", "0001.png", "0002.png"):
        one, two = (np.asarray(Image.open(tmp_path / f / name)).astype(int) for f in ("one", "two"))
        assert abs(one - two).max() <= 1
    assert len({(tmp_path / f / "captions.csv").read_text() for f in ("one", "two")}) == 1


def test_out_of_memory_says_what_to_lower(config, monkeypatch):  # noqa: F811
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.Training, "loss", full)
    with pytest.raises(
        MemoryError, match="accumulation=2, gradient_checkpointing=True, mixed_precision='bf16'"
    ):
        trainer.train(config, progress=False)
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="accumulation=2"):
        patch.setattr(training.Training, "loss", lambda *_: torch.empty(1 << 60))  # a plain RuntimeError
        trainer.train(config, progress=False)
    with pytest.raises(MemoryError, match="try a lower resolution"):
        least = {"accumulation": 2, "gradient_checkpointing": True, "mixed_precision": "bf16"}
        trainer.train(dataclasses.replace(config, **least), progress=False)


def test_a_diverged_run_ends_at_once_and_keeps_its_checkpoint(config, tmp_path, monkeypatch):  # noqa: F811
    losses = iter([1.0, 1.0, float("nan")])

    def step(self):
        self.steps_done += 1
        return next(losses)

    monkeypatch.setattr(training.Training, "step", step)
    with pytest.raises(ValueError, match="the loss of step 3 is nan: give a lower learning_rate$"):
        trainer.train(dataclasses.replace(config, checkpoint_every=1), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["concept.safetensors.checkpoint"]
    assert torch.load(tmp_path / "concept.safetensors.checkpoint")["steps_done"] == 2


def test_gradient_checkpointing_computes_again(config):  # noqa: F811
    pipeline, calls = load(config.base), []
    pipeline.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda *_: calls.append(True))
    for checkpointing in (False, True):
        chosen = {"steps": 1, "gradient_checkpointing": checkpointing, "overwrite": True}
        trainer.train(dataclasses.replace(config, **chosen), pipeline, progress=False)
    assert len(calls) == 1 + 2 and not pipeline.unet.is_gradient_checkpointing


def test_another_device_than_that_of_the_run_before(config):  # noqa: F811
    from accelerate.state import PartialState

    training.new_accelerator(config, torch.device("cpu"))
    PartialState().device = torch.device("meta")  # as a run on a GPU leaves it
    assert training.new_accelerator(config, torch.device("cpu")).device.type == "cpu"


def test_a_full_disk_is_known_before_the_first_step(config, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(training.Training, "step", lambda _: pytest.fail("a step was taken"))
    with pytest.raises(OSError, match="the run writes up to 0 MiB and the disk has 0 MiB left"):
        trainer.train(config, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(config, tmp_path):  # noqa: F811
    path = tmp_path / "checkpoint"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with training_of(config) as run, pytest.raises(OSError, match="checkpoint '.*' cannot be written"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            checkpoint.save(run, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


def test_a_disk_that_fills_up_leaves_no_half_file_and_keeps_the_checkpoint(config, tmp_path, monkeypatch):  # noqa: F811
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("customdiff_kernels._safetensors.write", full)
        trainer.train(dataclasses.replace(config, checkpoint_every=2), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["concept.safetensors.checkpoint"]
    resumed = trainer.train(dataclasses.replace(config, checkpoint_every=2, resume=True), progress=False)
    assert resumed.losses == () and resumed.output.is_file()


def test_a_base_without_cross_attention_is_named(config, tmp_path):  # noqa: F811
    from diffusers import UNet2DConditionModel

    pipeline = load(config.base)
    pipeline.unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32,),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    with pytest.raises(ValueError, match="found no text cross-attention"):
        trainer.train(config, pipeline, progress=False)
    for change, message in (
        ({"resolution": 33}, "resolution must be a multiple of 2, got 33"),
        ({"initializer_token": "zebra"}, "initializer_token 'zebra' is 5 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            bad = dataclasses.replace(config, regularization="generated", **change)
            trainer.train(bad, progress=False)
    pipeline = load(config.base)
    pipeline.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="base predicts 'sample'; the trainer knows"):
        trainer.train(config, pipeline, progress=False)
    assert not list(tmp_path.iterdir()), "and no picture was generated"
