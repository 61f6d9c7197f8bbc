"""Layout-guided sampling against the equations of Cones 2, written out plainly in diffusers' pipeline."""

import math
from unittest import mock

import pytest
import torch

import customdiff_kernels as ck

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402
from test_sampler import FAST, assert_close  # noqa: E402

from customdiff.attention import Recorder, level_size, steered  # noqa: E402
from customdiff.concept import encode_prompts  # noqa: E402
from customdiff.guidance import MAX_SIGMA, LayoutGuidance, noise_levels  # noqa: E402
from customdiff.layouts import Layout  # noqa: E402
from customdiff.residual import Residual  # noqa: E402
from customdiff.sampler import sample  # noqa: E402

PROMPT = "a dog and a red cat on the grass"
LEFT, RIGHT = (0.0, 0.2, 0.5, 1.0), (0.5, 0.0, 1.0, 0.8)
LAYOUT = Layout({"dog": LEFT, "red cat": RIGHT})
AT = {"dog": (2,), "red cat": (5, 6)}
STRONG = LayoutGuidance(weight=0.5)
SCHEDULERS = ["DDIM", "LMSDiscrete", "DPMSolverMultistep", "EulerDiscrete"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipe(folder):
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


class Plain:
    """Equation 7 as it is written: the dense layout, the scores, and their standard deviation.

    The last row of the batch is the conditional one.
    """

    def __init__(self, layout, at, strength):
        self.layout, self.at, self.strength = layout, at, strength

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        q, k, v = (
            f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for f, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        scores = q @ k.mT
        if cross:
            n = scores.shape[2]
            m = self.layout.bias(self.at, level_size(n, (16, 16)), scores.shape[3], 2.5, -1e8).dense()[0]
            scores[-1] += self.strength() * scores[-1].std() * m
        out = (scores * attn.scale).softmax(-1) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def plain_latents(pipe, scheduler, sigmas, weight):
    """By diffusers' pipeline, with equation 7 in the place of its attention."""
    step = [0]
    pipe.scheduler = scheduler
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Plain(LAYOUT, AT, lambda: weight * math.log(1 + sigmas[step[0]] ** 2)))

    def count(pipe, i, t, found):
        step[0] = min(i + 1, len(sigmas) - 1)
        return found

    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    try:
        return pipe([PROMPT], latents=noise, callback_on_step_end=count, **options).images
    finally:
        pipe.unet.set_attn_processor(before)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guided_latents_are_those_of_the_equations(pipe, name):
    config = {**pipe.scheduler.config, "beta_schedule": "scaled_linear", "beta_end": 0.012}
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config({**config, "beta_start": 0.00085})
    scheduler.set_timesteps(3)
    kept = torch.as_tensor(scheduler.alphas_cumprod).double()
    sigmas = [float(torch.lerp(s[0], s[1], t % 1)) for t, s in _neighbours(scheduler.timesteps, kept)]
    assert sigmas == pytest.approx(noise_levels(scheduler)[:-1], rel=1e-4) and sigmas[0] < MAX_SIGMA
    want = plain_latents(pipe, scheduler, sigmas, 0.5)
    options = {"guidance_scale": 4.0, "scheduler": scheduler, **FAST}
    got = sample(pipe, PROMPT, layouts=LAYOUT, layout_guidance=STRONG, **options)
    assert_close(got, want)
    assert (sample(pipe, PROMPT, **options) - got).abs().max() > 0.1


def _neighbours(times, kept):
    sigmas = ((1 - kept) / kept).sqrt()
    for t in times.double():
        yield t, (sigmas[int(t)], sigmas[min(int(t) + 1, len(sigmas) - 1)])


@torch.no_grad()
@pytest.mark.parametrize("patched", [False, True])
def test_the_scale_and_the_probabilities_in_float64(pipe, patched):
    """One call of the UNet with its own queries and keys: what `steered` shows is the guided softmax."""
    exact, shown, stds = {}, {}, []

    class Watch:
        def wants(self, layer):
            return layer.cross

        def __call__(self, probabilities, layer):
            shown[layer.name] = probabilities[-1]
            return probabilities

    def hook(module, args, out, name):
        exact[name] = out[-1].double().unflatten(-1, (module.heads, -1)).transpose(0, 1)

    handles = []
    for name, attn in pipe.unet.named_modules():
        if name.endswith("attn2"):
            attn.to_q.heads = attn.heads
            handles.append(attn.to_q.register_forward_hook(lambda m, a, o, n=name: hook(m, a, o, n)))
    if patched:
        ck.patch_unet(pipe.unet)
    std = ck.score_std
    with mock.patch.object(ck, "score_std", lambda q, k: stds.append((std(q, k), q, k)) or stds[-1][0]):
        with steered(pipe.unet, Watch()):
            sample(pipe, PROMPT, layouts=LAYOUT, layout_guidance=STRONG, **{**FAST, "steps": 1})
    for handle in handles:
        handle.remove()
    modules = dict(pipe.unet.named_modules())
    assert len(stds) == len(exact) == len(shown) > 1
    with torch.no_grad():
        context = encode_prompts(pipe, [PROMPT], {}).context[0].double()
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(1)
    a = float(scheduler.alphas_cumprod[scheduler.timesteps[0]])
    sigma = min(math.sqrt((1 - a) / a), MAX_SIGMA)
    for (found, *_), (name, q) in zip(stds, exact.items(), strict=True):
        attn = modules[name]
        k = (context @ attn.to_k.weight.double().T).unflatten(-1, (attn.heads, -1)).transpose(0, 1)
        scores = q @ k.mT
        assert abs(float(found) / float(scores.std()) - 1) < 1e-5
        strength = 0.5 * math.log(1 + sigma**2) * scores.std()
        m = LAYOUT.bias(AT, level_size(q.shape[1], (16, 16)), 16, 2.5, -1e8).dense()[0].double()
        want = ((scores + strength * m) * q.shape[-1] ** -0.5).softmax(-1)
        assert (shown[name] - want).abs().max() < 1e-5


def test_nothing_to_guide_is_bit_for_bit_the_plain_sampler(pipe):
    want = sample(pipe, PROMPT, **FAST)
    for guidance in (
        LayoutGuidance(weight=0),
        LayoutGuidance(positive=0, negative=0),
        LayoutGuidance(positive=0, negative=0, outside=0, recurrence=True),
        LayoutGuidance(steps=0, recurrence=True),
        LayoutGuidance(schedule=lambda sigma, progress: 0),
    ):
        got = sample(pipe, PROMPT, layouts=LAYOUT, layout_guidance=guidance, **FAST)
        assert torch.equal(got, want), guidance
    assert torch.equal(sample(pipe, [PROMPT], layouts=[None], residuals=[None], **FAST), want)


@pytest.mark.parametrize(("recurrence", "eta"), [(False, 0.0), (True, 0.0), (True, 1.0)])
def test_a_row_does_not_depend_on_the_others(pipe, recurrence, eta):
    prompts = [PROMPT, "a dog and a dog", PROMPT, "photo of a <new1> dog", "a cup"]
    layouts = [
        LAYOUT,
        Layout({"dog": RIGHT, "dog#2": LEFT}, {"dog#2": 1.0}),
        None,
        Layout({"dog": torch.eye(7), "<new1>": LEFT}),
        None,
    ]
    residual = Residual("dog", torch.randn(32))
    residuals = [{}, {"dog#2": residual}, {"red cat": Residual("red cat", torch.randn(2, 32))}, {}, None]
    concepts = [None, None, None, tiny_pipeline.concept(pipe, 0, low_rank=True), None]
    guidance = LayoutGuidance(weight=0.5, recurrence=recurrence, steps=2)
    options = {"layout_guidance": guidance, "eta": eta, **FAST}
    with mock.patch.object(pipe.unet, "forward", wraps=pipe.unet.forward) as unet:
        with mock.patch.object(ck, "kv_project", wraps=ck.kv_project) as projection:
            batch = sample(pipe, prompts, concepts, residuals=residuals, layouts=layouts, seeds=7, **options)
    assert unet.call_count == 3 + 2 * recurrence and projection.call_count == 1
    assert all(call.args[0].shape[0] == 2 * len(prompts) for call in unet.call_args_list)
    for i, prompt in enumerate(prompts):
        given = {"residuals": residuals[i], "layouts": layouts[i], "seeds": 7 + i}
        assert_close(batch[i : i + 1], sample(pipe, prompt, concepts[i], **given, **options))


def test_unconditional_rows_are_not_guided(pipe):
    options = {"guidance_scale": 0.0, **FAST}
    with mock.patch.object(ck.LayoutBias, "stack", wraps=ck.LayoutBias.stack) as stack:
        got = sample(pipe, PROMPT, layouts=LAYOUT, layout_guidance=STRONG, **options)
    assert stack.call_count and all(c.args[0][0] is None and c.args[0][1] for c in stack.call_args_list)
    assert_close(got, sample(pipe, "a cup", **options))


def test_subjects_are_attended_to_in_their_regions_alone(pipe):
    recorder = Recorder(1)
    with steered(pipe.unet, recorder):
        sample(pipe, PROMPT, layouts=LAYOUT, layout_guidance=STRONG, **FAST)
    maps = recorder.maps((16, 16), pixels=256)[0]
    inside = LAYOUT.bias(AT, (16, 16), 16, 1.0, 0.0).dense()[0, 0].T.reshape(16, 16, 16) > 0
    for position in (2, 5, 6):
        assert maps[position][inside[position]].min() > 0 and maps[position][~inside[position]].max() < 1e-6


def test_sdxl_is_guided_too(tmp_path):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_pipeline.build_xl(tmp_path / "xl"))
    recorder = Recorder(1)
    with steered(pipe.unet, recorder):
        sample(pipe, "a dog", layouts=Layout({"dog": LEFT}), layout_guidance=STRONG, **FAST)
    (pixels,) = recorder.sums
    maps = recorder.maps((16, 16), pixels=pixels)[0, 2]
    assert maps[6:, :6].min() > 0 and maps[:, 9:].max() < 1e-6


def test_residuals_and_a_concept_meet_in_one_prompt(pipe):
    prompt = "a <new1> dog and a cat"
    concept = tiny_pipeline.concept(pipe, 0)
    dog, cat = (Residual(word, torch.randn(32)) for word in ("dog", "cat"))
    got = sample(pipe, prompt, concept, residuals={"dog": dog, "cat": cat}, guidance_scale=4.0, **FAST)
    concept.load_into(pipe)
    embeds = pipe.encode_prompt(prompt, "cpu", 1, True)
    embeds[0][0, 3] += dog.shift[0]
    embeds[0][0, 6] += cat.shift[0]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "latents": noise}
    want = pipe(**given, guidance_scale=4.0, num_inference_steps=3, output_type="latent").images
    assert_close(got, want)


def test_a_schedule_without_terminal_signal_stays_finite(pipe):
    scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(3)
    assert noise_levels(scheduler)[0] == math.inf
    seen = []

    def record(sigma, progress):
        seen.append((sigma, progress))
        return 1.0

    for guidance in (LayoutGuidance(weight=0.5, recurrence=True), LayoutGuidance(schedule=record)):
        got = sample(pipe, PROMPT, layouts=LAYOUT, layout_guidance=guidance, scheduler=scheduler, **FAST)
        assert got.isfinite().all()
    assert [progress for _, progress in seen] == [0, 1 / 3, 2 / 3]
    assert seen[0][0] == MAX_SIGMA > seen[1][0] > seen[2][0]


def test_strengths():
    sigmas = [10.0, 1.0, 0.1, 0.01]
    for schedule, want in [
        ("published", [math.log(1 + s * s) for s in sigmas]),
        ("constant", [1.0] * 4),
        ("cosine", [math.cos(math.pi / 8 * i) for i in range(4)]),
        (lambda sigma, progress: sigma + progress, [10, 1.25, 0.6, 0.76]),
    ]:
        found = LayoutGuidance(weight=0.5, schedule=schedule).strengths(sigmas)
        assert found == pytest.approx([0.5 * w for w in want])
    assert LayoutGuidance(weight=2, schedule="cosine", steps=2).strengths(sigmas) == pytest.approx(
        [2, math.sqrt(2), 0, 0]
    )
    assert LayoutGuidance(steps=9).strengths(sigmas) == LayoutGuidance().strengths(sigmas)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_recurrence_goes_back_to_the_same_noise(pipe, name):
    """With a UNet that knows the one picture there is, every step must end at that picture's noise level."""
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    steps, seen = 4, []
    picture = torch.randn(4, 16, 16)
    times = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    times.set_timesteps(steps)
    sigmas = dict(zip(times.timesteps.tolist(), noise_levels(times), strict=False))

    class Knowing(torch.nn.Module):
        def forward(self, x, t, **_):
            sigma = sigmas[float(t)]
            noise = (x * math.sqrt(1 + sigma**2) - picture) / sigma  # of x = √ᾱ·picture + √(1−ᾱ)·noise
            seen.append((float(t), noise))
            return mock.Mock(sample=noise)

    with mock.patch.object(pipe.unet, "forward", Knowing().forward):
        got = sample(
            pipe,
            "a dog",
            layouts=Layout({"dog": LEFT}),
            layout_guidance=LayoutGuidance(steps=2, recurrence=True),
            scheduler=scheduler,
            guidance_scale=1.0,
            **{**FAST, "steps": steps},
        )
    want = times.timesteps.tolist()
    assert [t for t, _ in seen] == [want[0], want[0], want[1], want[1], *want[2:]]
    for _, noise in seen:
        assert abs(float(noise.std()) - 1) < 0.1 and abs(float(noise.mean())) < 0.1
    first, second = seen[0][1].flatten(), seen[1][1].flatten()
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.95
    if name != "DDIM":
        assert_close(got, picture[None].expand_as(got), rtol=0.05)


def test_processors_are_left_as_they_were(pipe):
    processors = dict(pipe.unet.attn_processors)
    sample(pipe, PROMPT, layouts=LAYOUT, **FAST)
    assert all(pipe.unet.attn_processors[k] is v for k, v in processors.items())
    ck.patch_unet(pipe.unet)
    with mock.patch.object(ck.LayoutBias, "stack", side_effect=RuntimeError("stopped")):
        with pytest.raises(RuntimeError, match="stopped"):
            sample(pipe, PROMPT, layouts=LAYOUT, **FAST)
    cross = [p for name, p in pipe.unet.attn_processors.items() if "attn2" in name]
    assert cross and all(processor.attention is None for processor in cross)


def test_bad_guidance(pipe):
    for options, message in [
        ({"weight": -1.0}, "weight must be at least 0, got -1.0"),
        ({"weight": math.inf}, "weight must be finite"),
        ({"positive": math.nan}, "positive must be finite"),
        (
            {"schedule": "linear"},
            "schedule must be 'published', 'constant', 'cosine' or a function .* 'linear'",
        ),
        ({"steps": -1}, "steps must be a whole number of at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LayoutGuidance(**options)
    with pytest.raises(TypeError, match="negative must be a number, got '-1e8'"):
        LayoutGuidance(negative="-1e8")
    LayoutGuidance(negative=-math.inf)
    with pytest.raises(ValueError, match="schedule gives nan for step 0 .sigma"):
        guidance = LayoutGuidance(schedule=lambda sigma, progress: math.nan)
        sample(pipe, PROMPT, layouts=LAYOUT, layout_guidance=guidance, **FAST)


def test_bad_arguments(pipe):
    for options, message in [
        ({"layouts": [LAYOUT, LAYOUT]}, "layouts has 2 entries for 1 prompts"),
        ({"residuals": []}, "residuals has 0 entries for 1 prompts"),
        ({"layouts": Layout({"bird": LEFT})}, "subject 'bird' is not in the prompt 'a dog and a red cat on"),
        ({"residuals": {"bird": Residual("bird", torch.ones(32))}}, "subject 'bird' is not in the prompt"),
        (
            {"residuals": {"dog": Residual("dog", torch.ones(32), {"base_hash": "0" * 64})}},
            "residual 'dog' is of the base model",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(pipe, PROMPT, **options, **FAST)
    for options, message in [
        ({"layouts": {"dog": LEFT}}, "layouts has an entry of type str"),
        ({"residuals": {"dog": torch.ones(32)}}, "residuals.'dog'. must be a Residual, got Tensor"),
        ({"layout_guidance": 0.1}, "layout_guidance must be a LayoutGuidance, got float"),
    ]:
        with pytest.raises(TypeError, match=message):
            sample(pipe, PROMPT, **options, **FAST)
