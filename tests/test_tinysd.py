"""The embedded base model: its world, its tokenizer, and what ships."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import tinysd  # noqa: E402
from tinysd import detector, vae, world  # noqa: E402
from tinysd.presence import Presence  # noqa: E402

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def scenes(n: int, seed: int = 123) -> list[tuple[world.Scene, str]]:
    rng = np.random.default_rng(seed)
    return [world.sample(rng) for _ in range(n)]


def crowded(n: int) -> list[tuple[world.Scene, str]]:
    """Scenes of three subjects."""
    rng = np.random.default_rng(5)
    made = [world.random_scene(rng, (0, 0, 1)) for _ in range(n)]
    return [(scene, world.caption(scene, rng)) for scene in made]


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tinysd.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_import_needs_no_torch():
    code = "import sys, tinysd; tinysd.path(); sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- the world


def test_renderer_is_determined_by_the_seed():
    first, second, other = scenes(6), scenes(6), scenes(6, seed=124)
    assert first == second and first != other
    for (a, _), (b, _) in zip(first, second, strict=True):
        picture, labels = world.render(a)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and labels.shape == (64, 64)
        again, again_labels = world.render(b)
        assert (picture == again).all() and (labels == again_labels).all()


def test_label_map_covers_every_subject():
    for scene, _ in scenes(40):
        labels = world.render(scene)[1]
        assert set(np.unique(labels)) == set(range(len(scene.placed) + 1))
        categories = world.category_map(scene, labels)
        for k, placed in enumerate(scene.placed):
            assert (categories[labels == k + 1] == 1 + world.CATEGORIES.index(placed.subject.category)).all()


def test_captions_say_only_what_is_true():
    known = set(world.words())
    for scene, caption in [*scenes(600), *crowded(300)]:
        words = caption.split()
        subjects = [p.subject for p in scene.placed]
        assert len(words) <= 22 and set(words) <= known
        named = [w.removesuffix("s") for w in words if w.removesuffix("s") in world.CATEGORIES]
        truth = [s.category for s in subjects]
        assert named == truth or (named == truth[:1] and len(set(truth)) == 1)
        colours = [w for w in words if w in world.PALETTE]
        owned = iter(world.colour_name(s.primary) for s in subjects)
        assert all(c in owned for c in colours)  # in order, from left to right
        assert {w for w in words if w in world.TEXTURES} <= {s.texture for s in subjects}
        assert {w for w in words if w in world.ACCESSORIES} <= {s.accessory for s in subjects}
        assert [w for w in words if w in world.BACKGROUNDS] in ([], [scene.background])
        if scene.scale == "normal":
            assert not {"small", "far", "zoomed", "close"} & set(words)


def test_three_subjects_are_told_one_by_one():
    made = crowded(300)
    assert all(len(scene.placed) == 3 for scene, _ in made)
    captions = [caption for _, caption in made]
    assert any(" three " in f" {caption}" for caption in captions)
    for feature in (*world.TEXTURES, "with a hat", "with a ribbon"):
        assert sum(feature in caption for caption in captions) >= 3, feature


def test_concepts_cannot_be_named():
    concepts = world.concepts()
    assert len(concepts) >= 8 and {c.split for c in concepts.values()} == {"tuning", "figures"}
    for category in world.CATEGORIES:
        assert sum(c.subject.category == category for c in concepts.values()) >= 2
    palette = world.lab(np.array(list(world.PALETTE.values())))
    for concept in concepts.values():
        assert np.linalg.norm(palette - world.lab(concept.subject.primary), axis=1).min() > 20, concept.name
    pictures = world.concept_pictures("teal_dog", 6, seed=3)
    again = world.concept_pictures("teal_dog", 6, seed=3)
    assert all(np.array_equal(a, b) and s == t for (a, s), (b, t) in zip(pictures, again, strict=True))
    assert all(caption.startswith("photo of a dog ") for _, caption in pictures)
    assert len({caption for _, caption in pictures}) >= 5


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="teal_dog"):
        world.concept_pictures("no such thing", 1)
    with pytest.raises(ValueError, match="split"):
        world.concepts("test")
    with pytest.raises(ValueError, match="texture"):
        world.render(
            world.Scene(
                "grass",
                world.place(
                    np.random.default_rng(0), (world.Subject("dog", (0, 0, 0), (1, 1, 1), "checked"),)
                ),
            )
        )
    with pytest.raises(ValueError, match="background"):
        world.render(world.Scene("moon", ()))


# --- what ships


def test_every_word_is_one_token(pipe):
    tokenizer = pipe.tokenizer
    for word in [*world.words(), *world.RARE_WORDS]:
        ids = tokenizer(word).input_ids
        assert len(ids) == 3 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id, word
    assert not set(world.RARE_WORDS) & set(world.words())
    assert tokenizer.model_max_length == 24 == pipe.text_encoder.config.max_position_embeddings
    assert tokenizer.pad_token == tokenizer.eos_token
    assert len(tokenizer("photo of a zebra, naïve!").input_ids) > 8  # anything else is spelled out
    assert max(len(tokenizer(c).input_ids) for _, c in scenes(300)) <= 24


def test_pipeline_opens_and_samples(pipe):
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {
        torch.float32
    }
    prompts = [f"photo of a {c} {world.PLACES[b]}" for c in world.CATEGORIES for b in ("beach", "snow")]
    images = pipe(
        prompts, num_inference_steps=12, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)
    ).images
    assert all(i.size == (64, 64) for i in images)
    places = detector.backgrounds(images)
    wanted = ["beach", "snow"] * 4
    assert np.mean([a == b for a, b in zip(places, wanted, strict=True)]) >= 0.75


def test_cross_attention_at_two_levels(pipe):
    widths = {m.to_q.out_features for n, m in pipe.unet.named_modules() if n.endswith("attn2")}
    assert len(widths) >= 2


def test_autoencoder_reconstructs_held_out_pictures(pipe):
    images = np.stack([world.render(scene)[0] for scene, _ in scenes(24, seed=77)])
    assert vae.psnr(pipe.vae, images) >= 28.0


def test_constructed_encoder_is_the_projection():
    images = np.stack([world.render(scene)[0] for scene, _ in scenes(16, seed=78)])
    mean, components = vae.patch_components(images)
    model = vae.build()
    vae.construct_encoder(model, mean, components)
    with torch.no_grad():
        latents = (
            model.encode(vae.to_model(images)).latent_dist.mode().permute(0, 2, 3, 1).reshape(-1, vae.LATENTS)
        )
    patches = (images / 127.5 - 1).reshape(16, 16, 4, 16, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
    assert np.abs(latents.numpy() - (patches - mean) @ components.T).max() < 0.02


def test_detector_on_held_out_renderings():
    held = scenes(150, seed=31)
    images = [world.render(scene)[0] for scene, _ in held]
    found = detector.load().detect(images)
    right = [
        [f.category for f in seen] == [p.subject.category for p in scene.placed]
        for seen, (scene, _) in zip(found, held, strict=True)
    ]
    assert np.mean(right) >= 0.97
    named = [
        (f.colour, world.colour_name(p.subject.primary))
        for ok, seen, (scene, _) in zip(right, found, held, strict=True)
        if ok
        for f, p in zip(seen, scene.placed, strict=True)
        if world.colour_name(p.subject.primary)
    ]
    assert np.mean([a == b for a, b in named]) >= 0.97
    places = detector.backgrounds(images)
    assert (
        np.mean([place == scene.background for place, (scene, _) in zip(places, held, strict=True)]) >= 0.97
    )


def test_concept_match_tells_concepts_apart():
    concepts = world.concepts("figures")
    for name, concept in concepts.items():
        own = [image for image, _ in world.concept_pictures(name, 5, seed=9)]
        plain = world.Subject(concept.subject.category, world.PALETTE["red"], world.PALETTE["blue"])
        rng = np.random.default_rng(4)
        others = [world.render(world.Scene("grass", world.place(rng, (plain,))))[0] for _ in range(3)]
        model = detector.load()
        assert model.match(own, concept).min() > 0.4 > 0.2 > model.match(others, concept).max(), name


def test_clip_prefers_the_true_caption():
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tinysd.clip_path()
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    captions = [f"photo of a {c} {p}" for c in world.CATEGORIES for p in world.PLACES.values()]
    rng = np.random.default_rng(5)
    images = [
        world.render(
            world.Scene(b, world.place(rng, (world.Subject(c, world.PALETTE["blue"], world.WHITE),)))
        )[0]
        for c in world.CATEGORIES
        for b in world.BACKGROUNDS
    ]
    with torch.no_grad():
        out = model(
            **tokenizer(captions, padding=True, return_tensors="pt"),
            pixel_values=processor(images, return_tensors="pt").pixel_values,
        )
    assert (out.logits_per_image.argmax(1) == torch.arange(len(captions))).float().mean() >= 0.9


def test_sizes():
    root = Path(tinysd.path())
    size = sum(
        f.stat().st_size
        for folder in (root, Path(tinysd.clip_path()))
        for f in folder.rglob("*")
        if f.is_file()
    )
    assert size + detector.WEIGHTS.stat().st_size <= 40e6
    assert not list(root.rglob("*.bin"))


@pytest.mark.parametrize(
    "pair", [("teal_dog", "lilac_cat"), ("lime_car", "maroon_cup"), ("navy_dog", "mint_cat")]
)
def test_presence_knows_a_concept_alone_and_in_a_pair_from_others_of_its_category(pipe, pair):
    """Also through the autoencoder, which is what samples come out of."""

    def decoded(pictures: list[Image.Image]) -> list[Image.Image]:
        with torch.no_grad():
            latents = pipe.vae.encode(vae.to_model(np.stack(pictures))).latent_dist.mode()
            return pipe.image_processor.postprocess(pipe.vae.decode(latents).sample)

    subjects = tuple(world.concepts()[name].subject for name in pair)
    pairs = [picture for picture, _ in world.pictures(subjects, 5, np.random.default_rng(1))]
    rng = np.random.default_rng(2)
    for name, subject in zip(pair, subjects, strict=True):
        true, held = ([p for p, _ in world.concept_pictures(name, 6, seed)] for seed in (0, 1))
        shows = Presence(subject, true)
        for pictures in (held, pairs, decoded(pairs)):
            assert shows(pictures).all()
        others = [
            world.pictures((world.random_subject(rng, subject.category),), 1, rng)[0][0] for _ in range(100)
        ]
        assert shows(others).mean() <= 0.06
        category = next(c for c in world.CATEGORIES if c not in {s.category for s in subjects})
        absent = world.pictures((dataclasses.replace(subject, category=category),), 3, rng)
        assert not shows([picture for picture, _ in absent]).any(), "in its colours, and another thing"


def test_presence_needs_pictures_of_the_subject():
    dogs = [picture for picture, _ in world.concept_pictures("teal_dog", 2)]
    with pytest.raises(ValueError, match="true_pictures: the detector finds no cat in any of them"):
        Presence(world.concepts()["lilac_cat"].subject, dogs)


def test_what_ships_can_be_trained_further(pipe, monkeypatch, tmp_path):
    """Adopted, it is the last checkpoint, and the next steps begin from it."""
    from tinysd import common, data, unet

    for module in (data, common):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(common, "LOG", tmp_path / "training_log.jsonl")
    monkeypatch.setattr(data, "CHUNK", 4)
    unet.adopt()
    shipped = {**pipe.unet.state_dict(prefix="unet."), **pipe.text_encoder.state_dict(prefix="text.")}
    adopted = common.load("unet.pt")
    assert all(torch.equal(adopted["model"][name], tensor) for name, tensor in shipped.items())
    unet.encode(range(data.CROWDED.start, data.CROWDED.start + 1))
    monkeypatch.setattr(common.Schedule, "progress", property(lambda self: next(clock)))
    clock = iter([0.0, 0.5, 1.0])
    unet.train("00:00", batch=2, rate=1e-4)
    trained = common.load("unet.pt")
    assert trained["step"] == adopted["step"] + 2 and trained["samples"] == adopted["samples"] + 4
    moved = [(trained["model"][name] - tensor).abs().max() for name, tensor in shipped.items()]
    assert 0 < max(moved) < 1e-3, "a warm start, from the weights that ship"
    assert unet.pipeline().vae.config.scaling_factor == pipe.vae.config.scaling_factor
