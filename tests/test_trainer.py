"""The trainer: what moves and what does not, the same bits twice, and what it says about bad input."""

import dataclasses
import io
import types
import weakref

import numpy as np
import pytest
import tiny_pipeline
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import customdiff_kernels as ck
import tinysd
from customdiff import Concept, base, data, trainer
from customdiff.config import EMBEDDED_LEARNING_RATE, TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def pictures(folder, count, seed, caption=None, size=(40, 52)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        image.save(folder / f"{i}.{'jpg' if i == 0 else 'png'}")
        if caption:
            (folder / f"{i}.txt").write_text(caption)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("trainer")
    return {
        "base": str(tiny_pipeline.build(root / "base")),
        "images": pictures(root / "concept", 3, seed=0),
        "regularization": pictures(root / "dogs", 4, seed=1, caption="photo of a dog"),
    }


@pytest.fixture
def config(folders, tmp_path):
    return TrainConfig(
        **folders,
        prompts=("photo of a <new1> dog", "a <new1> dog on the grass"),
        output=str(tmp_path / "concept.safetensors"),
        steps=4,
        batch_size=2,
        learning_rate=1e-2,
        device="cpu",
    )


def state_of(pipeline):
    modules = {"unet": pipeline.unet, "text": pipeline.text_encoder, "vae": pipeline.vae}
    return {f"{m}.{k}": v.clone() for m, module in modules.items() for k, v in module.state_dict().items()}


def flags_of(pipeline):
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    modes = [part.training for module in modules for part in module.modules()]
    return modes, [weight.requires_grad for module in modules for weight in module.parameters()]


def load(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def test_learns_one_matrix_and_one_row_and_leaves_the_base_alone(config):
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


def test_two_runs_give_the_same_bits(config, tmp_path):
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


def test_resumes_with_the_same_bits(config, tmp_path, monkeypatch):
    whole = trainer.train(config, progress=False)
    broken = dataclasses.replace(config, output=str(tmp_path / "broken.safetensors"), checkpoint_every=3)
    step, taken = trainer.Training.step, []

    def stop_after_three(self):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(step(self))
        return taken[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Training, "step", stop_after_three)
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
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer.train(dataclasses.replace(broken, resume=True, overwrite=True), progress=False)


def assert_refuses_other_pictures_and_files(config, checkpoint):
    """A damaged checkpoint, one of another format, one of other pictures or captions; all are put back."""
    picture, caption = trainer.Path(config.images, "1.png"), trainer.Path(config.regularization, "1.txt")
    whole, old, grey = checkpoint.read_bytes(), io.BytesIO(), io.BytesIO()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save(torch.load(checkpoint) | {"format": 0}, old)
    Image.new("RGB", (40, 40)).save(grey, "png")
    for path, content, message in (
        (checkpoint, whole[:-100], f"{checkpoint.name}' is damaged .*start without resume"),
        (checkpoint, b"", "is damaged"),
        (checkpoint, flipped, "is damaged .*checksum"),
        (checkpoint, old.getvalue(), "is of format 0, and this version reads 1"),
        (picture, grey.getvalue(), "was made with other pictures or captions"),
        (caption, b"photo of a red dog", "was made with other pictures or captions"),
    ):
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            trainer.train(dataclasses.replace(config, resume=True), progress=False)
        path.write_bytes(kept)


def test_a_finished_run_is_not_overwritten(config):
    first = trainer.train(config, progress=False).output.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        trainer.train(dataclasses.replace(config, seed=1), progress=False)
    assert trainer.Path(config.output).read_bytes() == first
    trainer.train(dataclasses.replace(config, seed=1, overwrite=True), progress=False)
    assert trainer.Path(config.output).read_bytes() != first


@pytest.mark.parametrize(
    "prediction, gamma", [("epsilon", None), ("v_prediction", None), ("v_prediction", 5.0)]
)
def test_a_step_is_the_equation(config, prediction, gamma):
    """Against plain modules: the token trained in the table, the K/V of the start token detached."""
    pipeline, reference = load(config.base), load(config.base)
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    config = dataclasses.replace(
        config,
        prompts=("photo of a <new1> dog",),
        prior_weight=0.5,
        shift=0.0,
        caption_dropout=0.0,
        min_snr_gamma=gamma,
    )
    with ck.patched(pipeline.unet), trainer.frozen(pipeline):
        training = trainer.Training(config, pipeline, trainer.Pictures.read(config))
        start = training.generator.get_state()
        training.optimizer.step = lambda: None
        loss = training.step()

    generator = torch.Generator()
    generator.set_state(start)
    latents = training.latents.draw(torch.randint(3, (2,), generator=generator), generator)
    torch.randint(1, (2,), generator=generator)  # which prompt
    prior = torch.randint(4, (2,), generator=generator)
    latents = torch.cat([latents, training.prior_latents.draw(prior, generator)])
    torch.rand(2, generator=generator)  # which captions to drop: none
    latents = latents * reference.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.randint(1000, (4,), generator=generator)
    alpha = reference.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    v = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    target = noise if prediction == "epsilon" else v

    prompts = ["photo of a ktn dog"] * 2 + ["photo of a dog"] * 2
    ids = reference.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    for name, module in reference.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda _, __, out: torch.cat([out[:, :1].detach(), out[:, 1:]], 1))
    context = reference.text_encoder(ids).last_hidden_state
    error = (reference.unet(noisy, t, context).sample - target).square().flatten(1).mean(1)
    if gamma is not None:
        snr = (alpha / (1 - alpha)).flatten()
        error = error * snr.clamp(max=gamma) / (snr + 1)
    expected = error[:2].mean() + 0.5 * error[2:].mean()
    expected.backward()

    assert loss == pytest.approx(expected.item(), rel=1e-5)
    parameters = dict(reference.unet.named_parameters())
    for name, first, last in training.base.segments:
        torch.testing.assert_close(
            training.weight.grad[first:last], parameters[name].grad, rtol=1e-3, atol=1e-6
        )
    ktn = reference.tokenizer.convert_tokens_to_ids("ktn</w>")
    table = reference.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(training.row.grad, table.grad[ktn], rtol=1e-3, atol=1e-6)


def test_resized_views_train_on_the_picture_alone_and_say_their_size(config, monkeypatch):
    pipeline = load(config.base)
    sized = dataclasses.replace(config, resize=1.0, regularization=None, prompts=("photo of a <new1> dog",))
    with ck.patched(pipeline.unet), trainer.frozen(pipeline):
        training = trainer.Training(sized, pipeline, trainer.Pictures.read(sized))
        seen = []
        encode = trainer.encode_prompts
        monkeypatch.setattr(
            trainer, "encode_prompts", lambda p, texts, rows: seen.extend(texts) or encode(p, texts, rows)
        )
        for _ in range(12):
            training.step()
        words = {text.removesuffix(sized.prompts[0]) for text in seen}
        assert words == {"", *data.SMALL_WORDS, *data.LARGE_WORDS}

        latents, context = training.latents.mean[-2:].clone(), training.prior_context.new_zeros(2, 16, 32)
        mask = torch.zeros_like(training.masks[-2:])
        mask[..., :4, :4] = 1
        losses = []
        for change in (0.0, 5.0):  # outside the mask no error counts, once the network cannot spread it
            monkeypatch.setattr(
                pipeline.unet, "forward", lambda x, *_, **__: types.SimpleNamespace(sample=0 * x)
            )
            latents[..., 4:, 4:] += change
            training.generator.manual_seed(3)
            losses.append(training._losses(latents, context, mask))
        assert torch.equal(*losses) and losses[0].isfinite().all()


def test_resize_off_draws_what_it_always_drew(config):
    pipeline = load(config.base)
    training = trainer.Training(config, pipeline, trainer.Pictures.read(config))
    assert training.masks is None and len(training.sizes) == len(training.latents.mean) == training.whole


def test_min_snr_weights():
    from diffusers import DDPMScheduler

    training = object.__new__(trainer.Training)
    training.device = torch.device("cpu")
    training.scheduler = DDPMScheduler()
    training.config = TrainConfig(images="x", prompts=("<new1>",), min_snr_gamma=5.0)
    t = torch.tensor([0, 300, 999])
    alpha = training.scheduler.alphas_cumprod[t]
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(training._snr_weight(t, v=False), snr.clamp(max=5) / snr)
    torch.testing.assert_close(training._snr_weight(t, v=True), snr.clamp(max=5) / (snr + 1))


def test_the_rates_cool_down(config):
    constant = dataclasses.replace(config, steps=10)
    assert [constant.rates(step, False) for step in range(10)] == [(1e-2, 1e-2)] * 10
    cooled = dataclasses.replace(config, steps=10, cooldown=0.4, embedding_learning_rate=1e-1)
    expected = [1e-2] * 7 + [0.75e-2, 0.5e-2, 0.25e-2]
    weight, row = zip(*(cooled.rates(step, False) for step in range(10)), strict=True)
    assert weight == pytest.approx(expected)
    assert row == pytest.approx([10 * rate for rate in expected])


def test_the_embedded_base_learns_faster_than_the_papers(config):
    papers = dataclasses.replace(config, learning_rate=None).rates(0, False)
    assert papers == (8e-5, 8e-5)
    embedded = dataclasses.replace(config, learning_rate=None).rates(0, True)
    assert all(ours > theirs for ours, theirs in zip(embedded, papers, strict=True))


def test_a_pipeline_is_the_embedded_base_only_where_it_is(config, folders):
    """Whatever ``config.base`` says: by the folder that it was loaded from."""
    config = dataclasses.replace(config, base=None, learning_rate=None, regularization=None)
    other, parts = load(folders["base"]), load(folders["base"])
    parts = StableDiffusionPipeline(**parts.components, requires_safety_checker=False)
    for pipeline, name, rate in (
        (base.load_base(device="cpu"), "tinysd", EMBEDDED_LEARNING_RATE),
        (load(tinysd.path()), "tinysd", EMBEDDED_LEARNING_RATE),
        (other, "base", 8e-5),
        (parts, "unnamed", 8e-5),
    ):
        with ck.patched(pipeline.unet), trainer.frozen(pipeline):
            training = trainer.Training(config, pipeline, trainer.Pictures.read(config))
            training.step()
        assert training.concept().metadata["base_name"] == name
        assert training.optimizer.param_groups[0]["lr"] == rate


def test_each_parameter_moves_at_its_own_rate(config):
    """Adam's first step is the rate itself, wherever there is a gradient."""
    pipeline = load(config.base)
    rates = {"learning_rate": 1e-4, "embedding_learning_rate": 1e-2, "weight_decay": 0.0}
    learned = trainer.train(dataclasses.replace(config, steps=1, **rates), pipeline, progress=False).concept
    token = pipeline.tokenizer.convert_tokens_to_ids("ktn</w>")
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    row = learned.modifier_tokens["<new1>"] - table[token]
    assert float(row.abs().max()) == pytest.approx(1e-2, rel=1e-2)
    furthest = max(float(change.abs().max()) for change in learned.delta.values())
    assert furthest == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_nearly_the_same(config, dtype):
    """Also where only the UNet is half; what is learned stays float32."""
    gradients = []
    for modules in ((), ("unet",), ("unet", "vae", "text_encoder")):
        pipeline = load(config.base)
        for name in modules:
            getattr(pipeline, name).to(dtype)
        with ck.patched(pipeline.unet), trainer.frozen(pipeline):
            training = trainer.Training(config, pipeline, trainer.Pictures.read(config))
            training.step()
        assert training.weight.dtype == training.row.dtype == torch.float32
        gradients.append((training.weight.grad, training.row.grad))
    for half in gradients[1:]:
        for ours, exact in zip(half, gradients[0], strict=True):
            assert torch.cosine_similarity(ours.flatten(), exact.flatten(), 0) > 0.99
            assert ours.norm() == pytest.approx(float(exact.norm()), rel=0.1)


def test_dropped_captions_are_the_empty_prompt(config):
    def loss(share, captions=None):
        pictures = trainer.Pictures.read(config)
        if captions is not None:
            pictures = dataclasses.replace(pictures, captions=captions)
        pipeline = load(config.base)
        with ck.patched(pipeline.unet), trainer.frozen(pipeline):
            return trainer.Training(
                dataclasses.replace(config, caption_dropout=share), pipeline, pictures
            ).step()

    assert loss(1.0) == loss(0.0, [""] * 4) != loss(0.0)


def test_training_lowers_the_loss(config):
    losses = trainer.train(
        dataclasses.replace(config, steps=60, learning_rate=3e-3, batch_size=4), progress=False
    ).losses
    assert sum(losses[-15:]) < 0.97 * sum(losses[:15])


# --- configuration ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": ("photo of a dog",)}, "no modifier token '<new1>'"),
        ({"prompts": ()}, "prompts is empty"),
        ({"modifier_token": ""}, "modifier_token must be one word, .* got ''"),
        ({"modifier_token": "my dog"}, "modifier_token must be one word, .* got 'my dog'"),
        ({"modifier_token": "sks", "prompts": ("photo of asks dog",)}, "no modifier token 'sks'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"prior_weight": -1.0}, "prior_weight"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"shift": 0.7}, "shift"),
        ({"resize": 1.5}, "resize must be a share, 0 to 1, got 1.5"),
        ({"cooldown": 1.5}, "cooldown"),
    ],
)
def test_bad_configurations_are_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_a_wrong_initializer_or_base_is_named(config, tmp_path):
    with pytest.raises(ValueError, match="initializer_token 'zebra' is 5 tokens"):
        trainer.train(dataclasses.replace(config, initializer_token="zebra"), progress=False)
    with pytest.raises(ValueError, match="model_index.json"):
        trainer.train(dataclasses.replace(config, base=str(tmp_path)), progress=False)
    with pytest.raises(ValueError, match="resolution must be a multiple of 2, got 33"):
        trainer.train(dataclasses.replace(config, resolution=33), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_text_that_cannot_be_read_fails_before_the_pictures_are_encoded(config, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the pictures were encoded")

    monkeypatch.setattr(data, "encode", never)
    prompts = ("photo of a <new1> dog", "a <new1> dog with <new2>")
    with pytest.raises(ValueError, match="names the modifier token <new2>"):
        trainer.train(dataclasses.replace(config, prompts=prompts), progress=False)
    long = "a dog " * 8 + "<new1>"
    with pytest.raises(ValueError, match="<new1> comes after the 14 tokens"):
        trainer.train(dataclasses.replace(config, prompts=(prompts[0], long)), progress=False)
    folder = pictures(tmp_path / "r", 1, seed=0, caption="photo of a <new3> dog")
    with pytest.raises(ValueError, match="names the modifier token <new3>"):
        trainer.train(dataclasses.replace(config, regularization=folder), progress=False)


def test_an_output_that_cannot_be_written_fails_before_the_base_is_loaded(config, tmp_path):
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


def test_the_output_s_folder_is_made(config, tmp_path):
    output = tmp_path / "new" / "folder" / "c.safetensors"
    assert trainer.train(
        dataclasses.replace(config, steps=1, output=str(output)), progress=False
    ).output.is_file()


# --- pictures and captions ---


def test_pictures_of_any_size_and_mode(tmp_path):
    Image.new("L", (30, 50), 128).save(tmp_path / "grey.png")
    Image.new("RGBA", (64, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (16, 16), (0, 255, 0)).save(tmp_path / "small.JPG")
    (tmp_path / "notes.md").write_text("no picture")
    images = data.read_pictures(tmp_path)
    assert [image.mode for image in images] == ["RGB"] * 3
    pixels = data.to_tensor([data.square(image, 32) for image in images])
    assert pixels.shape == (3, 3, 32, 32) and pixels.min() >= -1 and pixels.max() <= 1
    assert torch.all(pixels[0] == 1.0), "transparency is white"


def test_16_bit_grey_is_scaled(tmp_path):
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    (image,) = data.read_pictures(tmp_path)
    assert np.array_equal(np.asarray(image)[..., 0].ravel(), np.arange(256))


def test_pictures_are_cut_to_size_one_by_one(config, tmp_path, monkeypatch):
    """No second picture is opened while the one before is held at its full size."""
    opened, held = data.open_picture, []

    def open_picture(path):
        assert all(reference() is None for reference in held)
        image = opened(path)
        held.append(weakref.ref(image))
        return image

    monkeypatch.setattr(data, "open_picture", open_picture)
    pipeline = load(config.base)
    trainer.Training(config, pipeline, trainer.Pictures.read(config))
    assert len(held) == 7


def test_square_takes_the_centre():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    assert data.square(image, 8).getcolors() == [(64, (0, 0, 255))]


def test_shifted_copies_keep_the_pictures_first():
    pixels = torch.rand(2, 3, 16, 16)
    copies = data.shifted(pixels, 0.125, torch.Generator().manual_seed(0))
    assert copies.shape == (2 * data.SHIFTED_COPIES, 3, 16, 16)
    assert torch.equal(copies[:2], pixels)
    assert data.shifted(pixels, 0.0, torch.Generator()) is pixels
    core = pixels[0, :, 4:12, 4:12]
    windows = copies[2].unfold(1, 8, 1).unfold(2, 8, 1).movedim(0, 2)
    assert (windows == core).flatten(2).all(-1).sum() == 1, "a copy is the picture, moved"


def test_resized_copies_tell_their_size():
    pixels = torch.rand(3, 3, 48, 48) * 0.8 + 0.1
    pictures, masks, words = data.resized(pixels, torch.Generator().manual_seed(0))
    assert len(pictures) == len(masks) == len(words) == data.RESIZED_COPIES * 3
    smaller = 0
    for i, (picture, mask, word) in enumerate(zip(pictures, masks, words, strict=True)):
        share = float(mask.mean()) ** 0.5
        assert not picture[(mask == 0).expand_as(picture)].any(), "nothing but zeros around the picture"
        if share == 1:  # all of it is picture: whole, or a window of an enlarged one
            assert word in data.LARGE_WORDS
            continue
        smaller += 1
        assert 0.3 < share < 1 and (word in data.SMALL_WORDS) == (share < data.SMALL)
        rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
        found = picture[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert abs(float(found.mean() - pixels[i % 3].mean())) < 0.05, "the whole picture, smaller"
    assert 0.4 < smaller / len(words) < 0.9


def test_folders_without_a_usable_picture_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        data.read_pictures(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="'.*empty' holds no PNG or JPEG picture, but nothing at all"):
        data.read_pictures(tmp_path / "empty")
    (tmp_path / "empty" / "film.mov").write_text("x")
    with pytest.raises(ValueError, match="1 other entries, as film.mov"):
        data.read_pictures(tmp_path / "empty")
    (tmp_path / "empty" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="'broken.png' in '.*empty' is not a readable picture"):
        data.read_pictures(tmp_path / "empty")


def test_captions_beside_or_in_a_table(tmp_path):
    folder = tmp_path / "dogs"
    pictures(folder, 2, seed=0, size=(8, 8))
    with pytest.raises(ValueError, match="'0.jpg' in '.*' has no caption"):
        data.read_captioned(folder)
    (folder / "captions.csv").write_text("file,caption\n0.jpg,photo of a dog\n1.png,a red dog\n")
    assert data.read_captioned(folder)[1] == ["photo of a dog", "a red dog"]
    (folder / "1.txt").write_text("a blue dog\n")
    assert data.read_captioned(folder)[1] == ["photo of a dog", "a blue dog"]
    (folder / "captions.csv").unlink()
    (folder / "captions.jsonl").write_text('{"file_name": "0.jpg", "text": "a cat"}\n')
    assert data.read_captioned(folder)[1] == data.read_captions(folder) == ["a cat", "a blue dog"]
    (tmp_path / "list.txt").write_text("a dog\n\na cat\n")
    assert data.read_captions(tmp_path / "list.txt") == ["a dog", "a cat"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no caption"):
        data.read_captions(tmp_path / "empty.txt")
    (tmp_path / "excel.csv").write_bytes("\ufefffile,caption\r\n0.jpg,a dog\r\n".encode())
    assert data.read_captions(tmp_path / "excel.csv") == ["a dog"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "odd.jsonl",
            b'{"words": "a dog"}',
            "line 1 of '.*odd.jsonl' has no text as its \"caption\": {'words'",
        ),
        ("list.jsonl", b'\n["a dog"]', r"line 2 of '.*list.jsonl' has no text .*: \['a dog'\]"),
        ("number.jsonl", b'{"caption": 3}', "line 1 of '.*number.jsonl' has no text"),
        ("broken.jsonl", b'{"caption": "a"}\n{"caption"', "line 2 of '.*broken.jsonl' is not JSON"),
        ("short.csv", b"file,caption\na.png\n", "line 2 of '.*short.csv' has no text"),
        ("latin.txt", b"caf\xe9", "latin.txt' is not UTF-8 text"),
    ],
)
def test_caption_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_captions(tmp_path / name)


def test_regularization_captions_must_not_name_the_concept(config, tmp_path):
    folder = pictures(tmp_path / "r", 1, seed=0, caption="photo of a <new1> dog")
    with pytest.raises(ValueError, match="holds the modifier token"):
        trainer.train(dataclasses.replace(config, regularization=folder), progress=False)
    (tmp_path / "r" / "0.txt").write_text("photo of asks dog")
    sks = dataclasses.replace(config, modifier_token="sks", prompts=("a sks dog",), regularization=folder)
    assert trainer.Pictures.read(sks).captions == ["photo of asks dog"]
