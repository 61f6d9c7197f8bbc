"""Fixtures of the trainer's tests: a tiny base, pictures, a configuration; import them by name."""

import dataclasses
from contextlib import contextmanager

import pytest
import tiny_pipeline
from diffusers import StableDiffusionPipeline

from customdiff import attention, training
from customdiff.config import ConceptConfig, TrainConfig
from customdiff.residual_training import ResidualTraining
from customdiff.views import Pictures


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("trainer")
    return {
        "base": str(tiny_pipeline.build(root / "base")),
        "images": tiny_pipeline.pictures(root / "concept", 3, seed=0),
        "regularization": tiny_pipeline.pictures(root / "dogs", 4, seed=1, caption="photo of a dog"),
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


def several(config: TrainConfig, count: int) -> TrainConfig:
    """`config` for so many concepts, all of the same pictures."""
    one = ConceptConfig(images=config.images, category="dog", regularization=config.regularization)
    words = [f"<new{number}>" for number in range(1, count + 1)]
    concepts = tuple(dataclasses.replace(one, modifier_token=word, prompts=()) for word in words)
    fields = {field.name for field in dataclasses.fields(ConceptConfig)}
    rest = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in fields}
    return TrainConfig(**{**rest, "concepts": concepts})


def load(folder: str):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@contextmanager
def training_of(config: TrainConfig, pipeline=None, **options):
    """The config's kind of ``Training`` on a patched and frozen base, given back after."""
    kind = ResidualTraining if config.residual else training.Training
    pipeline = load(config.base) if pipeline is None else pipeline
    with attention.patched(pipeline.unet), training.frozen(pipeline):
        run = kind(config, pipeline, Pictures.read(config), **options)
        try:
            yield run
        finally:
            run.release()


def keep_gradients(run: training.Training) -> None:
    """A step then leaves its gradients and moves nothing."""
    run.optimizer.step = lambda: None
    run.optimizer.zero_grad = lambda **_: None
