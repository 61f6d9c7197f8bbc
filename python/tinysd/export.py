"""The folders that ship, and the figures of exactly those weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import tinysd

from . import clip, common, data, detector, detector_training, tokenizer, unet, vae, world

HERE = Path(__file__).resolve().parent
SAMPLES = 120


def _open_as_float32(folder: Path) -> None:
    """Weights are stored in float16; recent transformers would also compute in it unless told otherwise."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def _write_tokenizer(folder: Path) -> None:
    """The files that every version of transformers reads, not the one that recent ones write."""
    (folder / "tokenizer.json").unlink(missing_ok=True)
    tokenizer.write(folder)


def export() -> None:
    """Write pipeline/, clip/ and the detector's weights from the last checkpoints."""
    target = Path(tinysd.path())
    fresh = target.with_name("pipeline.new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe = unet.pipeline()
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.half()
        if hasattr(module, "register_to_config"):
            module.register_to_config(_name_or_path="")
    pipe.save_pretrained(fresh)
    _open_as_float32(fresh / "text_encoder")
    _write_tokenizer(fresh / "tokenizer")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    if common.load("clip.pt") is not None:
        clip.export(tinysd.clip_path())
        _open_as_float32(Path(tinysd.clip_path()))
        _write_tokenizer(Path(tinysd.clip_path()))
    if common.load("detector.pt") is not None:
        detector_training.export()
    if common.LOG.exists():
        lines = common.LOG.read_text().splitlines()
        stride = max(1, len(lines) // 300)
        keep = [
            line for k, line in enumerate(lines) if k % stride == 0 or "psnr" in line or "retrieval" in line
        ]
        (HERE / "training_log.jsonl").write_text("\n".join(keep) + "\n")
    print("wrote", target, f"{sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def _score(found: detector.Detector, images: list, scenes: list[world.Scene]) -> dict[str, float]:
    """Shares of pictures with the right categories (left to right), colour words and background."""
    subjects, places = found.detect(images), found.backgrounds(images)
    right, colours = [], []
    for scene, seen in zip(scenes, subjects, strict=True):
        truth = [p.subject for p in scene.placed]
        right.append([f.category for f in seen] == [s.category for s in truth])
        for k, s in enumerate(truth):
            colours.append(len(seen) == len(truth) and seen[k].colour == world.colour_name(s.primary))
    return {
        "category": float(np.mean(right)),
        "colour_word": float(np.mean(colours)),
        "background": float(np.mean([p == s.background for p, s in zip(places, scenes, strict=True)])),
    }


def _prompted(count: int, n: int, seed: int) -> tuple[list[str], list[world.Scene]]:
    """Prompts that name colour, category and place of one to three subjects, and a scene for each."""
    rng = np.random.default_rng(seed)
    prompts, scenes = [], []
    for _ in range(n):
        names = [str(c) for c in rng.choice(list(world.PALETTE), count, replace=False)]
        categories = [str(c) for c in rng.choice(world.CATEGORIES, count, replace=False)]
        subjects = tuple(
            world.Subject(c, world.PALETTE[k], world.WHITE) for c, k in zip(categories, names, strict=True)
        )
        place = str(rng.choice(world.BACKGROUNDS))
        scenes.append(world.Scene(place, world.place(rng, subjects)))
        named = [world.describe(s, colour=True, texture=False, accessory=False) for s in subjects]
        prompts.append(f"photo of {world.listed(named)} {world.PLACES[place]}")
    return prompts, scenes


def metrics() -> None:
    """Measure what ships; write metrics.json and contact_sheet.png."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer

    pipe = StableDiffusionPipeline.from_pretrained(tinysd.path())
    found = detector.load()
    held = data.load(vae.HELD_OUT, "images", "captions")
    pair = CLIPModel.from_pretrained(tinysd.clip_path())
    ids = CLIPTokenizer.from_pretrained(tinysd.clip_path())
    report: dict = {
        "vae_psnr_db": vae.psnr(pipe.vae, held[0][:200]),
        "clip_retrieval_of_50": clip.retrieval(pair, held[0][:500], held[1][:500], ids),
        "detector_on_held_out_renderings": detector_training.accuracy(found, 500),
    }
    gates = (
        ("one_subject", 1, SAMPLES),
        ("two_subjects", 2, SAMPLES // 2),
        ("three_subjects", 3, SAMPLES // 2),
    )
    for name, count, n in gates:
        seed = 10 + count
        prompts, scenes = _prompted(count, n, seed)
        images = unet.sample(pipe, prompts, seed=1000 * count)
        order = np.random.default_rng(seed).permutation(n)
        report[f"samples_{name}"] = {
            "n": n,
            "samples": _score(found, images, scenes),
            "ceiling_true_renderings": _score(found, [world.render(s)[0] for s in scenes], scenes),
            "floor_shuffled_prompts": _score(found, images, [scenes[k] for k in order]),
        }
    matches = {}
    for name, concept in world.concepts().items():
        category = concept.subject.category
        base = unet.sample(pipe, [f"photo of a {category}"] * 10, seed=5000)
        true = [image for image, _ in world.concept_pictures(name, 10, seed=7)]
        matches[name] = {
            "base_samples": float(found.match(base, concept).mean()),
            "true_pictures": float(found.match(true, concept).mean()),
        }
    report["concept_match"] = matches
    report["sampling"] = "DDIM, 20 steps, guidance 3.0"
    rounded = json.loads(json.dumps(report), parse_float=lambda v: round(float(v), 4))
    (HERE / "metrics.json").write_text(json.dumps(rounded, indent=2) + "\n")
    print(json.dumps(rounded, indent=2))
    pictures: list[Image.Image] = unet.sample(pipe, [*unet.PROMPTS, *unet.MORE_PROMPTS])
    unet.sheet(pictures).save(HERE / "contact_sheet.png")
