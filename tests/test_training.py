"""A training step: the equation, in every mode; what trains and what does not."""

import dataclasses
import types
from pathlib import Path

import pytest
import tiny_pipeline
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from training_runs import config, folders, keep_gradients, load, several, training_of  # noqa: F401

import customdiff_kernels as ck
import tinysd
from customdiff import augment, base, data, texts, training
from customdiff.concept import Concept, TextFeatures
from customdiff.config import EMBEDDED_LEARNING_RATE, TrainConfig
from customdiff.views import Pictures, read_pixels

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    "prediction, gamma", [("epsilon", None), ("v_prediction", None), ("v_prediction", 5.0)]
)
def test_a_step_is_the_equation(config, prediction, gamma):  # noqa: F811
    """Against plain modules: the token trained in the table, the K/V of the start token detached."""
    pipeline, reference = load(config.base), load(config.base)
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    config = dataclasses.replace(config, prior_weight=0.5, caption_dropout=0.5, min_snr_gamma=gamma)
    with training_of(config, pipeline) as run:
        every_case = False
        while not every_case:
            state = run.generator.get_state()
            batch = run.draw()
            every_case = batch.dropped.sum() == 1 and len(set(batch.prompts)) == 2
        run.generator.set_state(state)
        keep_gradients(run)
        loss = run.step()

    mean, std = (torch.cat(pair) for pair in zip(run.views.latents, run.prior_latents, strict=True))
    which = torch.cat([batch.views, len(run.views.words) + batch.prior])
    latents = (mean[which] + std[which] * batch.posterior) * reference.vae.config.scaling_factor
    alpha = reference.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * batch.noise
    v = alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * latents
    target = batch.noise if prediction == "epsilon" else v

    prompts = [prompt.replace("<new1>", "ktn") for prompt in batch.prompts]
    prompts += ["" if dropped else "photo of a dog" for dropped in batch.dropped]
    ids = reference.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    for name, module in reference.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda _, __, out: torch.cat([out[:, :1].detach(), out[:, 1:]], 1))
    context = reference.text_encoder(ids).last_hidden_state
    error = (reference.unet(noisy, batch.timesteps, context).sample - target).square().flatten(1).mean(1)
    if gamma is not None:
        snr = (alpha / (1 - alpha)).flatten()
        error = error * snr.clamp(max=gamma) / (snr + 1)
    expected = error[:2].mean() + 0.5 * error[2:].mean()
    expected.backward()

    assert loss == pytest.approx(expected.item(), rel=1e-5)
    parameters = dict(reference.unet.named_parameters())
    for name, first, last in run.learned.base.segments:
        torch.testing.assert_close(
            run.learned.weight.grad[first:last], parameters[name].grad, rtol=1e-3, atol=1e-6
        )
    ktn = reference.tokenizer.convert_tokens_to_ids("ktn</w>")
    table = reference.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(run.learned.rows["<new1>"][0].grad, table.grad[ktn], rtol=1e-3, atol=1e-6)


def gradients(config, **options):  # noqa: F811
    with training_of(config, **options) as run:
        keep_gradients(run)
        loss = run.step()
        return loss, [parameter.grad.clone() for parameter in run.learned.parameters()]


@pytest.mark.parametrize("weights", ["kv", "cross-attention", "unet"])
def test_more_passes_give_the_same_gradient(config, weights):  # noqa: F811
    """Uneven ones too, and under gradient checkpointing."""
    config = dataclasses.replace(several(config, 2), batch_size=5, weights=weights)
    whole, expected = gradients(config)
    pipeline = load(config.base)
    pipeline.unet.enable_gradient_checkpointing()
    for change, chosen in ({"accumulation": 3}, None), ({}, pipeline):
        loss, found = gradients(dataclasses.replace(config, **change), pipeline=chosen)
        assert loss == pytest.approx(whole, rel=1e-5)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_parts_of_a_step_are_the_step(config):  # noqa: F811
    with training_of(dataclasses.replace(config, batch_size=5)) as run:
        batch = run.draw()
    parts = [batch.part(index, 3) for index in range(3)]
    assert [len(part.views) for part in parts] == [len(part.prior) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.views for part in parts]), batch.views)
    assert sum((part.prompts for part in parts), []) == batch.prompts
    concepts, prior = zip(*((p.noise[: len(p.views)], p.noise[len(p.views) :]) for p in parts), strict=True)
    assert torch.equal(torch.cat([*concepts, *prior]), batch.noise)


def test_concepts_take_turns(config):  # noqa: F811
    """However many pictures each has; and regularization pictures go with them."""
    three = several(config, 3)
    with training_of(dataclasses.replace(three, batch_size=2)) as run:  # one at least has no picture
        run.step()
        assert (
            sum(
                bool((run.optimizer.state[row]["exp_avg"] != 0).any()) for (row,) in run.learned.rows.values()
            )
            == 2
        )
    with training_of(dataclasses.replace(three, batch_size=4)) as run:
        words = []
        for _ in range(3):
            words += [prompt.split()[3] for prompt in run.draw().prompts]
            run.steps_done += 1
    assert words == ["<new1>", "<new2>", "<new3>"] * 4


def test_regularization_takes_turns_too(config):  # noqa: F811
    """Also where a step has fewer pictures than there are concepts."""
    with training_of(dataclasses.replace(several(config, 3), batch_size=2)) as run:
        seen = []
        for _ in range(3):
            seen += [int(number) // 4 for number in run.draw().prior]  # four pictures each
            run.steps_done += 1
    assert seen == [0, 1, 2] * 2


def test_pictures_too_small_for_a_latent_pixel_are_refused(config):  # noqa: F811
    """Their masks could be empty, and the loss 0 / 0."""
    with pytest.raises(ValueError, match="resize_from=0.05 of 32 pixels .* of 2: give at least 0.094"):
        with training_of(dataclasses.replace(config, resize=1.0, resize_from=0.05)):
            pass
    with training_of(dataclasses.replace(config, resize=1.0, resize_from=0.094, copies=30)) as run:
        assert run.views.masks.flatten(1).any(1).all()


@pytest.mark.parametrize(
    "prompt, message",
    [("a dog", "no modifier token of its concept"), ("<new1> and <new7>", "names the modifier token <new7>")],
)
def test_bad_validation_prompts_are_known_before_training(config, prompt, message):  # noqa: F811
    chosen = dataclasses.replace(config, validation_prompts=("a <new1> cat", prompt))
    with pytest.raises(ValueError, match=message), training_of(chosen):
        pass


def test_resized_views_train_on_the_picture_alone_and_say_their_size(config, monkeypatch):  # noqa: F811
    sized = dataclasses.replace(config, resize=1.0, regularization=None, prompts=("photo of a <new1> dog",))
    sized = dataclasses.replace(sized, size_words="before", batch_size=8)
    pipeline = load(config.base)
    with training_of(sized, pipeline) as run:
        seen = {prompt for _ in range(8) for prompt in run.draw().prompts}
        words = ("", *augment.SMALL_WORDS, *augment.LARGE_WORDS)
        assert seen == {augment.sized("photo of a <new1> dog", word, "before") for word in words}

        batch = run.draw()
        latents, text = run.views.latents.mean[-2:].clone(), TextFeatures(torch.zeros(2, 16, 32), None)
        mask = torch.zeros_like(run.views.masks[-2:])
        mask[..., :4, :4] = 1
        # outside the mask no error counts, once the network cannot spread it
        monkeypatch.setattr(pipeline.unet, "forward", lambda x, *_, **__: types.SimpleNamespace(sample=0 * x))
        losses = []
        for change in (0.0, 5.0):
            latents[..., 4:, 4:] += change
            losses.append(run._losses(latents, text, batch.noise[:2], batch.timesteps[:2], mask))
        assert torch.equal(*losses) and losses[0].isfinite().all()


@pytest.mark.parametrize("size_words", ["after", "before"])
def test_a_captioned_picture_has_its_own_caption(config, tmp_path, size_words):  # noqa: F811
    captions = ["photo of a dog on the grass", "a Dog in the snow", "a <new1> dog"]
    images = tiny_pipeline.pictures(tmp_path / "captioned", 3, seed=0)
    for i, caption in enumerate(captions):
        Path(images, f"{i}.txt").write_text(caption)
    settings = {"images": images, "category": "dog", "captioned": True, "flip": True, "resize": 0.5}
    chosen = dataclasses.replace(config, **settings, size_words=size_words, batch_size=8, shift=0.3)
    expected = ["photo of a <new1> dog on the grass", "a <new1> dog in the snow", "a <new1> dog"]
    with training_of(chosen) as run:
        whole = read_pixels(Pictures.read(chosen)[0].concept, run.resolution, "centre")
        assert run.texts.of_concepts == [expected]
        # each view is of the picture that it says: the unmoved copies come first
        unmoved = run.views.latents.mean[run.views.whole[0].start :][:3]
        either = [data.encode(run.pipeline.vae, x).mean for x in (whole, whole.flip(-1))]
        for i, view in enumerate(unmoved):
            assert run.views.picture[run.views.whole[0].start + i] == i
            assert min(float((view - latents[i]).abs().max()) for latents in either) < 1e-5
        for _ in range(4):
            batch = run.draw()
            for view, prompt in zip(batch.views.tolist(), batch.prompts, strict=True):
                words = run.views.words[view]
                assert prompt == augment.sized(expected[run.views.picture[view]], words, size_words)
            run.step()


def test_a_caption_that_names_nothing_is_refused(config, tmp_path):  # noqa: F811
    images = tiny_pipeline.pictures(tmp_path / "captioned", 2, seed=0, caption="a catdog on the grass")
    chosen = dataclasses.replace(config, images=images, category="cat", captioned=True)
    for word, message in (("<new1>", "write <new1> or cat there"), (None, "write cat there")):
        named = dataclasses.replace(chosen, modifier_token=word, prompts=())
        with pytest.raises(ValueError, match=f"'a catdog on the grass' of .* the subject: {message}"):
            Pictures.read(named)
    bare = tiny_pipeline.pictures(tmp_path / "bare", 2, seed=0)
    with pytest.raises(ValueError, match="has no caption; write it into '.*txt'"):
        Pictures.read(dataclasses.replace(chosen, images=bare))


def test_a_style_has_no_size_words(config):  # noqa: F811
    style = dataclasses.replace(config, resize=1.0, style=True, prompts=("a <new1> dog",))
    with training_of(style) as run:
        assert {prompt for _ in range(6) for prompt in run.draw().prompts} == {"a <new1> dog"}


def test_cutmix_shows_every_concept_beside_every_other(config):  # noqa: F811
    three = dataclasses.replace(several(config, 3), cutmix=0.5, batch_size=24, regularization=None)
    with training_of(three) as run:
        views = run.views
        for concept, numbers in enumerate(views.beside):
            assert {views.other[i] for i in numbers} == {0, 1, 2} - {concept}
            assert len(numbers) == three.copies * len(set(views.picture[i] for i in numbers))
        assert not any(views.other[i] is not None for numbers in views.whole for i in numbers)
        prompts, both = [], 0
        for _ in range(8):
            batch = run.draw()
            both += sum(views.other[i] is not None for i in batch.views)
            for view, prompt in zip(batch.views.tolist(), batch.prompts, strict=True):
                own = next(k for k in range(3) if view in views.whole[k] or view in views.beside[k])
                words = [f"<new{own + 1}>"]
                if views.other[view] is not None:
                    words.append(f"<new{views.other[view] + 1}>")
                assert [word for word in prompt.split() if word.startswith("<new")] == words, "left to right"
            prompts += batch.prompts
            run.steps_done += 1
        assert 0.35 < both / len(prompts) < 0.65
        assert "photo of a <new1> dog and a <new2> dog" in prompts
        run.step()


def test_resize_off_keeps_no_masks(config):  # noqa: F811
    with training_of(config) as run:
        assert run.views.masks is None and not run.views.resized
        assert len(run.views.words) == len(run.views.latents.mean) == 3 * config.copies


def test_min_snr_weights():
    run = object.__new__(training.Training)
    run.device = torch.device("cpu")
    run.scheduler = DDPMScheduler()
    run.config = TrainConfig(images="x", prompts=("<new1>",), min_snr_gamma=5.0)
    t = torch.tensor([0, 300, 999])
    alpha = run.scheduler.alphas_cumprod[t]
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(run._snr_weight(t, v=False), snr.clamp(max=5) / snr)
    torch.testing.assert_close(run._snr_weight(t, v=True), snr.clamp(max=5) / (snr + 1))


def test_a_pipeline_is_the_embedded_base_only_where_it_is(config, folders):  # noqa: F811
    """Whatever ``config.base`` says: by the folder that it was loaded from."""
    config = dataclasses.replace(config, base=None, learning_rate=None, regularization=None)
    parts = StableDiffusionPipeline(**load(folders["base"]).components, requires_safety_checker=False)
    for pipeline, name, rate in (
        (base.load_base(device="cpu"), "tinysd", EMBEDDED_LEARNING_RATE),
        (load(tinysd.path()), "tinysd", EMBEDDED_LEARNING_RATE),
        (load(folders["base"]), "base", 8e-5),
        (parts, "unnamed", 8e-5),
    ):
        with training_of(config, pipeline) as run:
            run.step()
        assert run.concept().metadata["base_name"] == name
        assert run.optimizer.param_groups[0]["lr"] == rate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_nearly_the_same(config, dtype):  # noqa: F811
    """Also where only the UNet is half; what is learned stays float32."""
    found = []
    for modules in ((), ("unet",), ("unet", "vae", "text_encoder")):
        pipeline = load(config.base)
        for name in modules:
            getattr(pipeline, name).to(dtype)
        with training_of(config, pipeline) as run:
            keep_gradients(run)
            run.step()
        assert {parameter.dtype for parameter in run.learned.parameters()} == {torch.float32}
        found.append([parameter.grad for parameter in run.learned.parameters()])
    assert_alike(found)


def test_mixed_precision_learns_nearly_the_same(config):  # noqa: F811
    for weights in ("kv", "unet"):
        chosen = dataclasses.replace(config, weights=weights)
        mixed = dataclasses.replace(chosen, mixed_precision="bf16")
        assert_alike([gradients(chosen)[1][:2], gradients(mixed)[1][:2]])


def assert_alike(found):
    for half in found[1:]:
        for ours, exact in zip(half, found[0], strict=True):
            assert torch.cosine_similarity(ours.flatten(), exact.flatten(), 0) > 0.99
            assert ours.norm() == pytest.approx(float(exact.norm()), rel=0.1)


def test_dropped_captions_are_the_empty_prompt(config):  # noqa: F811
    def loss(share, captions=None):
        chosen = dataclasses.replace(config, caption_dropout=share)
        with training_of(chosen) as run:
            if captions is not None:
                run.texts = texts.Texts(chosen, run.pipeline, run.learned.rows, {}, captions)
            return run.step()

    assert loss(1.0) == loss(0.0, [""] * 4) != loss(0.0)


# --- what trains ---


def changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_exactly_keys_values_and_the_modifier_tokens_change(config, count):  # noqa: F811
    """df#7294: the last of several modifier tokens was never trained, and weight decay moved the others."""
    pipeline = load(config.base)
    parts = {"unet": pipeline.unet, "text": pipeline.text_encoder, "vae": pipeline.vae}
    before = {f"{p}.{n}": t.clone() for p, module in parts.items() for n, t in module.state_dict().items()}
    chosen = dataclasses.replace(several(config, count), steps=3, weight_decay=0.1)
    with training_of(chosen, pipeline) as run:
        initial = {word: rows[0].detach().clone() for word, rows in run.learned.rows.items()}
        parameters = run.learned.parameters()
        for _ in range(3):
            run.step()
        concept = run.concept()
    after = {f"{p}.{n}": t for p, module in parts.items() for n, t in module.state_dict().items()}
    assert not changed(before, after), "the base is not what trains"
    assert len(parameters) == 1 + count
    assert concept.delta.keys() == ck.KVStack.from_unet(pipeline.unet).keys() and not concept.others
    assert all(change.abs().max() > 1e-3 for change in concept.delta.values())
    assert list(concept.modifier_tokens) == [f"<new{i + 1}>" for i in range(count)]
    assert all((row - initial[word]).abs().max() > 1e-3 for word, row in concept.modifier_tokens.items())
    starts = torch.stack(list(initial.values()))
    assert len(starts.unique(dim=0)) == count, "each starts from a rare token of its own"


MODES = {
    "cross-attention": lambda n: ".attn2.to_q." in n or ".attn2.to_out." in n,
    "unet": lambda n: ".attn2.to_k." not in n and ".attn2.to_v." not in n,
    "none": lambda n: False,
}


@pytest.mark.parametrize("weights", MODES)
def test_the_other_modes_train_what_they_say(config, weights):  # noqa: F811
    pipeline = load(config.base)
    before = {name: parameter.clone() for name, parameter in pipeline.unet.named_parameters()}
    flags = [parameter.requires_grad for parameter in pipeline.unet.parameters()]
    with training_of(dataclasses.replace(config, weights=weights), pipeline) as run:
        for _ in range(2):
            run.step()
        live = {name: parameter.clone() for name, parameter in pipeline.unet.named_parameters()}
        concept = run.concept()
    expected = {name for name in before if MODES[weights](name)}
    assert expected == concept.others.keys() == changed(before, live)
    assert bool(concept.delta) == (weights != "none")
    for name, change in concept.others.items():
        assert torch.equal(change, live[name] - before[name]) and change.any()
    assert not changed(before, dict(pipeline.unet.named_parameters())), "and it is given back"
    assert [parameter.requires_grad for parameter in pipeline.unet.parameters()] == flags


def test_the_whole_unet_s_gradient_is_that_of_plain_modules(config):  # noqa: F811
    """DreamBooth's: V* stays, everything else of the UNet learns; against autograd on the UNet as it is."""
    config = dataclasses.replace(config, weights="unet", train_modifier_token=False, regularization=None)
    reference = load(config.base)
    with training_of(config) as run:
        batch = run.draw()
        loss = run.loss(batch, 2, 0)
        loss.backward()
        found = {name: parameter.grad.clone() for name, parameter in run.learned.others.items()}
        assert [rows[0].grad for rows in run.learned.rows.values()] == [None]
    latents = run.views.latents.at(batch.views, batch.posterior) * reference.vae.config.scaling_factor
    noisy = run.scheduler.add_noise(latents, batch.noise, batch.timesteps)
    prompts = [prompt.replace("<new1>", "ktn") for prompt in batch.prompts]
    ids = reference.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    context = reference.text_encoder(ids).last_hidden_state
    output = reference.unet(noisy, batch.timesteps, context).sample
    (output - batch.noise).square().mean().backward()
    parameters = dict(reference.unet.named_parameters())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-3, atol=1e-6)


def test_half_precision_weights_do_not_train_themselves(config):  # noqa: F811
    pipeline = load(config.base)
    pipeline.unet.half()
    with pytest.raises(ValueError, match="weights='unet' trains the UNet's own weights.*float32"):
        with training_of(dataclasses.replace(config, weights="unet"), pipeline):
            pass


def test_a_category_without_a_modifier_token(config):  # noqa: F811
    """The paper's moongate: only keys and values learn, and the text is encoded once."""
    chosen = dataclasses.replace(config, modifier_token="none", prompts=("photo of a red cup",))
    with training_of(chosen) as run:
        run.step()
        concept = run.concept()
        assert run.texts._fixed is not None and len(run.learned.parameters()) == 1
    assert not concept.modifier_tokens and all(change.any() for change in concept.delta.values())


def test_a_modifier_token_that_does_not_train(config):  # noqa: F811
    chosen = dataclasses.replace(config, train_modifier_token=False)
    with training_of(chosen) as run:
        start = run.learned.rows["<new1>"][0].clone()
        run.step()
        concept = run.concept()
    assert torch.equal(concept.modifier_tokens["<new1>"], start)


def test_a_sequence_of_two_concepts(config):  # noqa: F811
    """The second starts from the first's weights, keeps its word, and counts its change from the base."""
    with training_of(dataclasses.replace(config, weights="cross-attention")) as run:
        run.step()
        first = run.concept()
    other = dataclasses.replace(config, modifier_token="<new2>", prompts=("photo of a <new2> cat",))
    with training_of(other, start=first) as run:
        live = dict(run.pipeline.unet.named_parameters())
        base_q = load(config.base).unet.get_parameter(name := next(iter(first.others)))
        torch.testing.assert_close(live[name], base_q + first.others[name])
        for name, start, stop in run.learned.base.segments:
            expected = run.learned.base[name] + first.delta[name]
            torch.testing.assert_close(run.learned.weight[start:stop].detach(), expected)
        table = run.pipeline.text_encoder.get_input_embeddings().weight
        pll = table[run.pipeline.tokenizer.convert_tokens_to_ids("pll</w>")]
        assert torch.equal(run.learned.rows["<new2>"][0], pll), "the first started from ktn"
        run.step()
        second = run.concept()
    assert list(second.modifier_tokens) == ["<new1>", "<new2>"]
    assert torch.equal(second.modifier_tokens["<new1>"], first.modifier_tokens["<new1>"])
    moved = max(float((second.delta[n] - first.delta[n]).abs().max()) for n in first.delta)
    assert 1e-3 < moved < 0.1
    assert second.others.keys() == first.others.keys()
    with pytest.raises(ValueError, match="start_from has the modifier token <new1> already"):
        with training_of(config, start=first):
            pass

    # what stays is not read off a UNet in half precision, and a run that cannot start gives it back
    pipeline = load(config.base)
    pipeline.unet.half()
    with training_of(other, pipeline, start=first) as run:
        third = run.concept()
    assert third.others.keys() == first.others.keys()
    assert all(torch.equal(change, first.others[name]) for name, change in third.others.items())
    before = {name: parameter.clone() for name, parameter in pipeline.unet.named_parameters()}
    with pytest.raises(ValueError, match="no modifier token"):
        bad = dataclasses.replace(other, validation_prompts=("a cat",))
        with training_of(bad, pipeline, start=first):
            pass
    assert not changed(before, dict(pipeline.unet.named_parameters()))

    # the published formats hold whole weights
    unet = load(config.base).unet
    changes = {**first.delta, **first.others}
    whole = {name: unet.get_parameter(name).detach() + change for name, change in changes.items()}
    weights, others = ({n: whole[n] for n in part} for part in (first.delta, first.others))
    published = Concept({}, first.modifier_tokens, weights=weights, others=others)
    with training_of(other, start=published) as run:
        fourth = run.concept()
    for name, change in changes.items():
        torch.testing.assert_close({**fourth.delta, **fourth.others}[name], change, rtol=0, atol=1e-6)


def test_sdxl_trains_a_row_for_each_text_encoder(tmp_path, config):  # noqa: F811
    """Against plain modules: both token tables, all keys and values, the pooled text and the sizes."""
    folder = str(tiny_pipeline.build_xl(tmp_path / "xl"))
    pipeline, reference = base.load_base(folder, "cpu"), base.load_base(folder, "cpu")
    with training_of(dataclasses.replace(config, base=folder, regularization=None), pipeline) as run:
        batch = run.draw()
        run.loss(batch, 2, 0).backward()
        concept = run.concept()
        captioned = texts.Texts(run.config, pipeline, run.learned.rows, {}, ["a dog"])
        empty = captioned.of_captions(torch.tensor([0]), torch.tensor([True]))
        assert not any(part.any() for part in empty), "what it is sampled against"
    latents = run.views.latents.at(batch.views, batch.posterior) * reference.vae.config.scaling_factor
    noisy = run.scheduler.add_noise(latents, batch.noise, batch.timesteps)
    prompts = [prompt.replace("<new1>", "ktn") for prompt in batch.prompts]
    for name, module in reference.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda _, __, out: torch.cat([out[:, :1].detach(), out[:, 1:]], 1))
    context, _, pooled, _ = reference.encode_prompt(
        prompts, do_classifier_free_guidance=False, device=torch.device("cpu")
    )
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    added = {"text_embeds": pooled, "time_ids": sizes}
    output = reference.unet(noisy, batch.timesteps, context, added_cond_kwargs=added).sample
    (output - batch.noise).square().mean().backward()
    parameters = dict(reference.unet.named_parameters())
    for name, first, last in run.learned.base.segments:
        torch.testing.assert_close(
            run.learned.weight.grad[first:last], parameters[name].grad, rtol=1e-3, atol=1e-6
        )
    rows = run.learned.rows["<new1>"]
    assert [tuple(row.shape) for row in rows] == [(32,), (48,)]
    for row, encoder, words in zip(
        rows,
        (reference.text_encoder, reference.text_encoder_2),
        (reference.tokenizer, reference.tokenizer_2),
        strict=True,
    ):
        gradient = encoder.get_input_embeddings().weight.grad[words.convert_tokens_to_ids("ktn</w>")]
        torch.testing.assert_close(row.grad, gradient, rtol=1e-3, atol=1e-6)
    assert isinstance(concept.modifier_tokens["<new1>"], tuple)
