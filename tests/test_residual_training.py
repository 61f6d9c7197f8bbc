"""Residual training (Cones 2): its equations, what moves and what does not, captions, and what is refused."""

import copy
import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from test_trainer import flags_of, state_of
from training_runs import folders, load, training_of  # noqa: F401

import customdiff_kernels as ck
import tinysd
from customdiff import captions, cli, trainer, training
from customdiff.config import TrainConfig
from customdiff.presets import PRESETS
from customdiff.residual import Residual, add_residuals
from customdiff.residual_training import Marked, ResidualTraining, preservation
from customdiff.sampler import sample
from customdiff.sheet import contact_sheet
from customdiff.subjects import find_subject, occurrences
from customdiff.validation import Validation

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def config(folders, tmp_path):  # noqa: F811
    return TrainConfig(
        method="cones2",
        images=folders["images"],
        base=folders["base"],
        category="dog",
        caption_count=40,
        caption_batch=3,
        output=str(tmp_path / "dog.safetensors"),
        steps=4,
        batch_size=2,
        learning_rate=1e-3,
        preservation_weight=0.5,
        device="cpu",
    )


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(tinysd.path(), subfolder="tokenizer")


# --- the equations, against loops in float64 ---


def features(encoder, tokenizer, text):  # noqa: F811
    """(S,E) by another way than the trainer's."""
    ids = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    return encoder(ids).last_hidden_state[0].detach()


def both(run, base):
    """E' and E in float64, of their own copies."""
    return copy.deepcopy(run.learned.encoder).double(), load(base).text_encoder.double()


def test_equations_3_to_5_in_float64(config):
    with training_of(config) as run:
        assert run.concept().shift.abs().max() == 0
        for _ in range(3):
            run.step()
        batch = run.draw()
        loss, plain = run.loss(batch, 2, 0), training.Training.loss(run, batch, 2, 0)
        found = run.concept()
        learned, base = both(run, config.base)
    words = run.pipeline.tokenizer
    assert len(batch.captions) == 3 and len(run.texts.captions) == 40
    terms = []
    for caption in (run.texts.captions[i] for i in batch.captions):
        (s,) = find_subject(words, caption, "dog")
        moved = features(learned, words, caption) - features(base, words, caption)
        assert moved.shape == (16, 32), "padding counts"
        terms.append(sum(moved[p].square().sum() for p in range(16) if p != s))
    torch.testing.assert_close((loss - plain).double(), 0.5 * sum(terms) / 3, rtol=1e-4, atol=1e-6)
    mean = torch.zeros(1, 32, dtype=torch.float64)
    for caption in run.texts.captions:
        at = list(find_subject(words, caption, "dog"))
        mean += (features(learned, words, caption) - features(base, words, caption))[at] / 40
    assert mean.abs().max() > 1e-3
    torch.testing.assert_close(found.shift.double(), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("refined", [False, True])
def test_equation_2_is_of_the_trained_encoder_and_then_of_the_residual(config, refined):
    """The loss of the pictures, by diffusers' own modules in float64."""
    with training_of(dataclasses.replace(config, refine_steps=3 * refined)) as run:
        run.step()
        mean = run.concept().shift
        if refined:
            run.step()
            shift = run.concept().shift
            assert shift.shape == (1, 32) and (shift - mean).abs().min() > 0.01
        batch = run.draw()
        found = training.Training.loss(run, batch, 2, 0)
        learned, base = both(run, config.base)
        latents = run.views.latents.at(batch.views, batch.posterior).double()
    reference = load(config.base)
    e, c = (features(encoder, reference.tokenizer, "a photo of a dog") for encoder in (base, learned))
    latents = latents * reference.vae.config.scaling_factor
    noise = batch.noise.double()
    noisy = run.scheduler.add_noise(latents, noise, batch.timesteps)
    if refined:  # "a photo of a dog" after the start token
        c = e.clone()
        c[5] += shift[0]
    context = c.expand(2, -1, -1)
    output = reference.unet.double()(noisy, batch.timesteps, context).sample
    torch.testing.assert_close(found.double(), (output - noise).square().mean(), rtol=1e-5, atol=0)


def test_the_published_preservation_in_float64(config):
    chosen = dataclasses.replace(config, preservation="prompt", captions="templates", prompts="dog")
    with training_of(chosen) as run:
        assert len(run.texts.captions) == len(set(run.texts.captions)) == 27
        run.step()
        batch = run.draw()
        loss, plain = run.loss(batch, 2, 0), training.Training.loss(run, batch, 2, 0)
        learned, base = both(run, config.base)
    moved = features(learned, run.pipeline.tokenizer, "dog") - features(base, run.pipeline.tokenizer, "dog")
    expected = moved[:1].norm() + 0.1 * moved[2:].norm()
    torch.testing.assert_close((loss - plain).double(), 0.5 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["captions", "prompt"])
def test_preservation_leaves_the_subject_free_and_has_a_gradient_from_the_start(form):
    moved = torch.zeros(2, 5, 3, requires_grad=True)
    subject = torch.zeros(2, 5, dtype=torch.bool)
    subject[:, 2:4] = True
    preservation(moved, subject, form).sum().backward()
    assert moved.grad.abs().max() == 0, "E' starts as E: no gradient, and no NaN of a norm at zero"
    moved = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    preservation(moved, subject, form).sum().backward()
    assert (moved.grad.abs().amax(2) > 0).equal(~subject)


def test_a_word_that_comes_twice_is_the_subject_twice(config):
    words = load(config.base).tokenizer
    marked = Marked.of(words, ["a dog", "a dog and a red dog"], "dog")
    assert marked.subject().nonzero().tolist() == [[0, 2], [1, 2], [1, 6]]


# --- a run ---


def test_only_a_copy_of_the_text_encoder_moves(config, monkeypatch):
    pipeline = load(config.base)
    pipeline.text_encoder.train()
    before, flags = state_of(pipeline), flags_of(pipeline)
    with training_of(config, pipeline) as run:
        initial = run.learned.state()
        initial = {name: tensor.clone() for name, tensor in initial.items()}
        run.step()
        moved = {name for name, new in run.learned.state().items() if (new - initial[name]).abs().max() > 0}
        assert moved == initial.keys() - {"shift"}
    with training_of(dataclasses.replace(config, refine_steps=4), pipeline) as run:
        run.step()
        moved = {name for name, new in run.learned.state().items() if not torch.equal(new, initial[name])}
        assert moved == {"shift"}
    trainer.train(config, pipeline, progress=False)

    def fail(self):
        raise RuntimeError("midway")

    monkeypatch.setattr(ResidualTraining, "concept", fail)
    with pytest.raises(RuntimeError, match="midway"):
        trainer.train(dataclasses.replace(config, overwrite=True), pipeline, progress=False)
    after = state_of(pipeline)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert flags_of(pipeline) == flags


def test_refining_starts_at_equation_5_with_adams_first_step_and_decays(config):
    with training_of(dataclasses.replace(config, refine_steps=1, weight_decay=0.5)) as run:
        for _ in range(3):
            run.step()
        mean, rate = run.texts.shift(), 0.05
        run.step()
        moved = run.concept().shift - mean * (1 - rate * 0.5)
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, rate), rtol=1e-2, atol=0)


def test_writes_a_residual(config):
    result = trainer.train(config, progress=False)
    found, pipeline = Residual.load(result.output), load(config.base)
    assert found.word == "dog" and found.shift.shape == (1, 32)
    assert torch.equal(found.shift, result.concept.shift)
    found.check_base(ck.KVStack.from_unet(pipeline.unet))
    other = load(config.base).unet
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "attn2.to_k" in n).add_(1)
    with pytest.raises(ck.BaseMismatchError):
        found.check_base(ck.KVStack.from_unet(other))
    about = found.metadata
    assert (about["base_name"], about["resolution"], about["prompts"]) == ("base", 32, ["a photo of a dog"])
    assert about["training"]["method"] == "cones2" and about["training"]["learning_rate"] == 1e-3
    assert result.output.stat().st_size + 4 * (1024 - 32) <= 8 << 10, "8 KB at E = 1024"


@pytest.mark.parametrize("refine_steps", [0, 1, 3])  # of four, broken after three
def test_resumes_with_the_same_bits(config, tmp_path, monkeypatch, refine_steps):
    config = dataclasses.replace(config, refine_steps=refine_steps)
    whole = trainer.train(config, progress=False)
    broken = dataclasses.replace(config, output=str(tmp_path / "broken.safetensors"), checkpoint_every=3)
    step, taken = ResidualTraining.step, []

    def stop_after_three(self):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(step(self))
        return taken[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResidualTraining, "step", stop_after_three)
        trainer.train(broken, progress=False)
    with pytest.raises(ValueError, match="other values of preservation_weight"):
        trainer.train(dataclasses.replace(broken, resume=True, preservation_weight=1.0), progress=False)
    resumed = trainer.train(dataclasses.replace(broken, resume=True), progress=False)
    assert tuple(taken) + resumed.losses == whole.losses
    assert torch.equal(resumed.concept.shift, whole.concept.shift)


def test_resume_knows_the_content_of_the_captions(config, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a dog\na red dog\n")
    chosen = dataclasses.replace(config, captions=str(file), checkpoint_every=4)
    trainer.train(chosen, progress=False)
    with training_of(chosen) as run:
        first = run.pictures_hash
    file.write_text("a dog\na blue dog\n")
    with training_of(chosen) as run:
        assert run.pictures_hash != first


@pytest.mark.parametrize("word, tokens", [("cup", 1), ("big cup", 4), ("Red Dog", 2)])
def test_a_residual_has_a_row_for_each_token_of_its_word(config, word, tokens):
    chosen = dataclasses.replace(config, category=word, prompts=(), refine_steps=1)
    pipeline = load(config.base)
    found = trainer.train(chosen, pipeline, progress=False).concept
    assert found.shift.shape == (tokens, 32) and (found.shift.abs().amax(1) > 1e-4).all()
    prompt, context = f"a cat and a {word}", torch.zeros(1, 16, 32)
    moved = add_residuals(pipeline, [prompt], context, [{word: found}])
    assert moved.abs().amax(2)[0].nonzero().flatten().tolist() == list(range(5, 5 + tokens))


def test_mixed_precision_learns_nearly_the_same(config):
    shifts = []
    for mixed in ("no", "bf16"):
        with training_of(dataclasses.replace(config, mixed_precision=mixed)) as run:
            run.step()
            shifts.append(run.concept().shift.flatten())
    assert torch.cosine_similarity(*shifts, 0) > 0.9


def test_the_command_writes_what_loads(config, folders, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "run.yaml"
    file.write_text("preset: cones2-code\nsteps: 2\ndevice: cpu\nlearning-rate: 1e-3\nprompts: dog\n")
    output = tmp_path / "new" / "dog.safetensors"
    arguments = ["--config", file, "--images", folders["images"], "--base", folders["base"]]
    arguments += ["--category", "dog", "--output", output, "--quiet"]
    assert cli.main(["train", *map(str, arguments)]) == 0
    assert f"{output}: " in capsys.readouterr().out
    found = Residual.load(output)
    assert found.shift.abs().max() > 0
    assert (
        found.metadata["training"] | PRESETS["cones2-code"][1] | {"learning_rate": 1e-3}
        == (found.metadata["training"])
    )
    assert json.dumps(found.metadata)
    assert cli.main(["train", *map(str, arguments)]) == 2
    assert "exists; name another" in capsys.readouterr().err


def test_validation_draws_with_the_residual_so_far(config, tmp_path):
    plain = trainer.train(
        dataclasses.replace(config, output=str(tmp_path / "plain.safetensors")), progress=False
    )
    prompt = "a dog on the grass"
    chosen = dataclasses.replace(config, validation_prompts=prompt, validation_every=4)
    result = trainer.train(chosen, progress=False)
    assert result.losses == plain.losses
    with Image.open(tmp_path / "dog.validation" / "000004.png") as image:
        drawn = np.asarray(image)
    options = {"steps": 25, "guidance_scale": 6.0, "seeds": config.seed, "progress": False}
    pictures = [
        sample(load(config.base), prompt, residuals=residuals, **options)
        for residuals in ({"dog": result.concept}, None)
    ]
    same = [np.array_equal(drawn, np.asarray(contact_sheet([(prompt, made)]))) for made in pictures]
    assert same == [True, False]


def test_trackers_are_told_the_rates_of_what_learns(config, tmp_path, monkeypatch):
    told = []
    with training_of(dataclasses.replace(config, refine_steps=2)) as run:
        monkeypatch.setattr(run.accelerator, "log", lambda values, step: told.append(values))
        watching = Validation(run, tmp_path / "dog.safetensors")
        watching.config = dataclasses.replace(run.config, log_with="tensorboard")
        for _ in range(4):
            watching.after_step(run.step())
    rates = [(values["learning_rate"], values["embedding_learning_rate"]) for values in told]
    assert rates == [(1e-3, 0), (1e-3, 0), (0, 5e-2), (0, 5e-2)]


def test_room_is_asked_for_residuals_and_for_checkpoints_of_the_encoder(config, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=100_000))
    trainer.train(dataclasses.replace(config, keep_every=1), progress=False)
    with pytest.raises(OSError, match="the run writes up to 1 MiB and the disk has 0 MiB left"):
        trainer.train(dataclasses.replace(config, checkpoint_every=1, overwrite=True), progress=False)


# --- captions ---


@pytest.mark.parametrize("word", ["dog", "cup", "orange cup", "vase"])
def test_a_thousand_captions_that_the_tokenizer_reads_whole(tokenizer, word):  # noqa: F811
    made = captions.generate(tokenizer, word, 1000, seed=3)
    assert len(set(made)) == len(made) == 1000
    assert made == captions.generate(tokenizer, word, 1000, seed=3)
    assert set(made) != set(captions.generate(tokenizer, word, 1000, seed=4))
    one = {i: len(tokenizer(w, add_special_tokens=False).input_ids) for i, w in enumerate(word.split())}
    for caption in made:
        assert caption.count(word) == 1 and find_subject(tokenizer, caption, word)
        ids = tokenizer(caption).input_ids
        assert len(ids) <= 24 and len(ids) == 2 + len(caption.split()) - len(one) + sum(one.values())
        assert " a orange" not in f" {caption}" and " an red" not in f" {caption}"
    places = {find_subject(tokenizer, caption, word)[0] for caption in made}
    assert len(places) > 5, "the subject stands in many places"


def test_a_category_with_a_capital_is_not_named_as_another_too(tokenizer):  # noqa: F811
    made = captions.generate(tokenizer, "Dog", 1000)
    assert all(len(occurrences(tokenizer, caption, "dog")) == 1 for caption in made)


def test_captions_of_a_file(config, tmp_path):
    words = load(config.base).tokenizer
    for name, content in (
        ("a.txt", "a dog\na red dog\n\na dog\n"),
        ("a.csv", 'file,caption\n1.png,a dog\n2.png,"a red dog"\n'),
        ("a.jsonl", '{"caption": "a dog"}\n{"text": "a red dog"}\n'),
    ):
        (tmp_path / name).write_text(content)
        chosen = dataclasses.replace(config, captions=str(tmp_path / name))
        assert captions.captions_for(chosen, words) == ["a dog", "a red dog"]


# --- what is refused ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"category": None}, "needs a category"),
        ({"category": " "}, "needs a category"),
        ({"modifier_token": "<dog>"}, "has no modifier token, got '<dog>'; leave"),
        ({"regularization": "generated"}, "'cones2' has no use for regularization"),
        ({"weights": "unet", "prior_weight": 2.0}, "'cones2' has no use for weights, prior_weight"),
        ({"start_from": "x"}, "'cones2' has no use for start_from"),
        (
            {"method": "custom-diffusion"},
            "'custom-diffusion' has no use for caption_count, caption_batch, pres",
        ),
        ({"method": "cones"}, "method must be one of custom-diffusion, cones2, got 'cones'"),
        ({"preservation_weight": -1.0}, "preservation_weight must be at least 0, got -1"),
        ({"preservation": "all"}, "preservation must be one of captions, prompt"),
        ({"caption_count": 0}, "caption_count must be at least 1"),
        ({"refine_steps": 5}, "refine_steps must be at most steps=4, got 5"),
        ({"embedding_learning_rate": 0.0}, "embedding_learning_rate must be positive"),
    ],
)
def test_bad_configurations(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": "photo of a cat"}, "'photo of a cat' has no 'dog'.*name the category in every prompt"),
        ({"prompts": "a <new1> dog"}, "names the modifier token <new1>"),
        ({"validation_prompts": "a cat"}, "'a cat' has no 'dog'"),
        ({"captions": "a dog\na cat\n"}, "captions '.*': 'a cat' has no 'dog' among"),
        ({"captions": "\n"}, "holds no caption"),
        ({"captions": "hotdogs on the grass\n"}, "has no 'dog'"),
        ({"captions": None, "caption_count": 1000}, "caption_count=1000: .* make [0-9]+ captions of 'dog'"),
    ],
)
@pytest.mark.filterwarnings("ignore:prompt .* is cut")
def test_bad_texts(config, tmp_path, changes, message):
    if changes.get("captions"):
        (tmp_path / "captions.txt").write_text(changes["captions"])
        changes = {"captions": str(tmp_path / "captions.txt")}
    with pytest.raises(ValueError, match=message):
        trainer.train(dataclasses.replace(config, **changes), progress=False)
    assert not list(tmp_path.glob("dog*"))


def test_a_text_encoder_in_half_precision_and_two_of_them(config):
    pipeline = load(config.base)
    pipeline.text_encoder.half()
    with pytest.raises(ValueError, match="text encoder, which is torch.float16; load the base in float32"):
        trainer.train(config, pipeline, progress=False)
    pipeline = load(config.base)
    pipeline.text_encoder_2, pipeline.tokenizer_2 = pipeline.text_encoder, pipeline.tokenizer
    with pytest.raises(ValueError, match="is for one text encoder, and this base"):
        with training_of(config, pipeline):
            pass


def test_the_embedded_base_has_a_rate_of_its_own():
    config = TrainConfig(method="cones2", images="x", category="dog")
    assert config.rates(0, embedded=False)[0] == 1e-6 and config.steps == 3000
    assert config.rates(0, embedded=True)[0] > 1e-6 and config.rates(0, embedded=True)[1] == 5e-2
