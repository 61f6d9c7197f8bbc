"""The trainer's configuration: command line, YAML, concept list, presets, and what is refused."""

import argparse
import dataclasses
import json

import pytest
import tiny_pipeline
from training_runs import config, folders  # noqa: F401

from customdiff import modifier, options
from customdiff.config import ConceptConfig, TrainConfig
from customdiff.data import read_captioned
from customdiff.presets import PRESETS


def parsed(*arguments: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return options.from_arguments(parser.parse_args(arguments))


ONE = ("--images", "dogs", "--category", "dog")


def test_every_field_is_an_option():
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    given = {action.dest for action in parser._actions}
    assert {field.name for field in dataclasses.fields(TrainConfig)} < given
    chosen = parsed(*ONE, "--steps", "7", "--no-train-modifier-token", "--weights", "unet", "--resize", "0.5")
    assert chosen == TrainConfig(
        images="dogs", category="dog", steps=7, train_modifier_token=False, weights="unet", resize=0.5
    )
    assert parsed(*ONE) == TrainConfig(images="dogs", category="dog")


def test_the_command_line_overrides_the_file_and_that_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: paper\nimages: cats\ncategory: cat\nlearning-rate: 8e-6\nsteps: 40\nprompts: a <new1> cat\n"
    )
    chosen = parsed("--config", str(file), "--steps", "9")
    assert (chosen.images, chosen.steps, chosen.learning_rate, chosen.batch_size) == ("cats", 9, 8e-6, 8)
    assert chosen.prompts == ("a <new1> cat",) and chosen.resize == 1.0
    assert parsed("--config", str(file), "--preset", "compvis").size_words == "before"


@pytest.mark.parametrize(
    ("name", "method", "fitting"),
    [("paper", "cones2", "cones2-paper"), ("cones2-code", "custom-diffusion", "compvis, diffusers")],
)
def test_a_preset_of_the_other_method_is_named(name, method, fitting):
    with pytest.raises(ValueError, match=f"preset '{name}' is of method .* its presets are .*{fitting}"):
        parsed(*ONE, "--preset", name, "--method", method)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configurations(name):
    about, settings, steps = PRESETS[name]
    one = options.configuration({"images": "dogs", "category": "dog"}, preset_name=name)
    listed = [{"images": "a", "prompts": "a <new1> dog", "category": "dog"}]
    listed += [{"images": "b", "prompts": "a <new2> cat", "category": "cat"}]
    if one.residual:
        with pytest.raises(ValueError, match="'cones2' has no use for concepts"):
            options.configuration({"concepts": listed}, preset_name=name)
        two = one
    else:
        two = options.configuration({"concepts": listed}, preset_name=name)
        assert len(two.subjects) == 2
    assert (one.steps, two.steps) == steps and about
    for concept in (one, *two.subjects):
        for key, value in settings.items():
            assert getattr(concept if hasattr(concept, key) else two, key) == value


def test_the_published_concept_list(tmp_path):
    for folder, caption in (("dog", None), ("cat", None), ("dogs", "photo of a dog")):
        tiny_pipeline.pictures(tmp_path / folder, 2, seed=0, caption=caption)
    images = tiny_pipeline.pictures(tmp_path / "cats" / "images", 2, seed=0)
    (tmp_path / "cats" / "images.txt").write_text("./cats/images/1.png\n./cats/images/0.jpg\n")
    (tmp_path / "cats" / "caption.txt").write_text("a red cat\na cat\n")
    file = tmp_path / "concept_list.json"
    entries = [
        {
            "instance_prompt": "photo of a <new1> dog",
            "class_prompt": "dog",
            "instance_data_dir": str(tmp_path / "dog"),
            "class_data_dir": str(tmp_path / "dogs"),
        },
        {
            "instance_prompt": "photo of a <new2> cat",
            "class_prompt": str(tmp_path / "cats" / "caption.txt"),
            "instance_data_dir": str(tmp_path / "cat"),
            "class_data_dir": str(tmp_path / "cats" / "images.txt"),
        },
        {"instance_prompt": "photo of a moongate", "instance_data_dir": str(tmp_path / "cat")},
    ]
    file.write_text(json.dumps(entries))
    chosen = parsed("--concepts", str(file), "--style")
    assert [concept.modifier_token for concept in chosen.subjects] == ["<new1>", "<new2>", None]
    assert chosen.steps == 500 and all(concept.style for concept in chosen.subjects)
    dog, cat, _ = chosen.subjects
    assert dog.regularization_prompt == "dog" and dog.prompts == ("photo of a <new1> dog",)
    paths, captions = read_captioned(cat.regularization, cat.regularization_prompt)
    assert [path.name for path in paths] == ["1.png", "0.jpg"] and captions == ["a red cat", "a cat"]
    assert str(paths[0].parent) == images
    (tmp_path / "cats" / "caption.txt").write_text("a red cat\n")
    with pytest.raises(ValueError, match="2 lines in images.txt and 1 in caption.txt"):
        read_captioned(cat.regularization)


def test_pictures_without_captions_have_the_prompt_of_their_kind(tmp_path):
    folder = tiny_pipeline.pictures(tmp_path / "r", 2, seed=0)
    assert read_captioned(folder, "photo of a dog")[1] == ["photo of a dog"] * 2
    (tmp_path / "r" / "1.txt").write_text("a red dog")
    with pytest.raises(ValueError, match="'0.jpg' .* has no caption"):
        read_captioned(folder, "photo of a dog")


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepz: 3", "unknown field 'stepz'; did you mean 'steps'"),
        ("steps: many", "steps of .* must be of type int, got 'many'"),
        ("steps: 2.5", "steps of .* must be of type int, got 2.5"),
        ("batch_size:", "batch_size of .* must be of type int, got None"),
        ("steps: true", "steps of .* must be of type int, got True"),
        ("weights: kq", "weights of .* must be one of kv, cross-attention, unet, none, got 'kq'"),
        ("- 3", "must hold fields"),
        ("steps: [", "is not YAML"),
        ("preset: papr", "preset must be one of paper, .*, got 'papr'"),
        ("concepts: {a: 1}", "concepts of .* must be a list of concepts"),
        ("concepts: [{imagez: x}]", "number 1 has an unknown key 'imagez'; did you mean 'images'"),
        ("concepts: [{images: 3}]", "images of .*number 1 must be of type str, got 3"),
        ("concepts: [{images: x, category: dog}]\nimages: y", "concepts is given, and images"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parsed("--config", str(tmp_path / "run.yaml"))


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="config '.*none.yaml' cannot be read: No such file"):
        parsed("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match="concepts '.*none.json' cannot be read: No such file"):
        parsed("--concepts", str(tmp_path / "none.json"))
    (tmp_path / "list.json").write_text("[{]")
    with pytest.raises(ValueError, match="concepts '.*list.json' is not JSON"):
        parsed("--concepts", str(tmp_path / "list.json"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": ("photo of a dog",)}, "no modifier token '<new1>'"),
        ({"prompts": ()}, "prompts is empty, and so is category"),
        ({"prompts": ("a <new1> dog", " ")}, "prompts has an empty one"),
        ({"images": None}, "images is missing"),
        ({"modifier_token": ""}, "modifier_token must be one word, .* got ''"),
        ({"modifier_token": "my dog"}, "modifier_token must be one word, .* got 'my dog'"),
        ({"modifier_token": "<rare>"}, "has a meaning as initializer_token"),
        ({"modifier_token": "sks", "prompts": ("photo of asks dog",)}, "no modifier token 'sks'"),
        ({"initializer_token": "<category>"}, "initializer_token '<category>' needs a category"),
        ({"weights": "none", "train_modifier_token": False}, "nothing would learn"),
        ({"weights": "none", "modifier_token": None}, "nothing would learn"),
        ({"weights": "qkv"}, "weights must be one of kv, cross-attention, unet, none, got 'qkv'"),
        ({"crop": "center"}, "crop must be one of centre, squash, got 'center'"),
        ({"log_with": "mlflow"}, "log_with must be one of tensorboard, wandb, got 'mlflow'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"accumulation": 3}, "accumulation must be at most batch_size, got 3 for 2"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"prior_weight": -1.0}, "prior_weight"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"shift": 0.7}, "shift"),
        ({"resize": 1.5}, "resize must be a share, 0 to 1, got 1.5"),
        ({"resize_from": 0.0}, "resize_from"),
        ({"cutmix": 0.5}, "cutmix shows two concepts side by side; give several concepts"),
        ({"cooldown": 1.5}, "cooldown"),
    ],
)
def test_bad_configurations_are_named(config, change, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_concepts_share_no_modifier_token():
    concept = ConceptConfig(images="x", category="dog")
    with pytest.raises(ValueError, match="modifier tokens of their own, got <new1>, <new1>"):
        TrainConfig(concepts=(concept, concept))
    styles = tuple(
        ConceptConfig(images="x", category="ink", modifier_token=f"<{k}>", style=True) for k in range(2)
    )
    with pytest.raises(ValueError, match="cutmix names both concepts: give each a category"):
        TrainConfig(concepts=styles, cutmix=0.5)
    with pytest.raises(ValueError, match="concepts is given, and regularization too; put all into concepts"):
        TrainConfig(concepts=(concept,), regularization="generated")


def test_the_rates_cool_down(config):  # noqa: F811
    constant = dataclasses.replace(config, steps=10)
    assert [constant.rates(step, False) for step in range(10)] == [(1e-2, 1e-2)] * 10
    cooled = dataclasses.replace(config, steps=10, cooldown=0.4, embedding_learning_rate=1e-1)
    expected = [1e-2] * 7 + [0.75e-2, 0.5e-2, 0.25e-2]
    weight, row = zip(*(cooled.rates(step, False) for step in range(10)), strict=True)
    assert weight == pytest.approx(expected)
    assert row == pytest.approx([10 * rate for rate in expected])


def test_default_rates(config):  # noqa: F811
    default = dataclasses.replace(config, learning_rate=None)
    assert default.rates(0, False) == (8e-5, 8e-5)
    assert all(ours > 8e-5 for ours in default.rates(0, True))
    whole = dataclasses.replace(default, weights="unet")
    assert whole.rates(0, False) == pytest.approx((8e-6, 8e-5))


# --- what V* starts from ---


def starts(config, **change):  # noqa: F811
    from training_runs import load

    pipeline = load(config.base)
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    rows = modifier.initial_rows(dataclasses.replace(config, **change), pipeline)
    return pipeline.tokenizer, table, rows["<new1>"][0]


def test_what_a_modifier_token_starts_from(config):  # noqa: F811
    for change, word in (
        ({}, "ktn"),
        ({"initializer_token": "cat"}, "cat"),
        ({"initializer_token": "<category>", "category": "red dog"}, "dog"),
    ):
        tokenizer, table, row = starts(config, **change)
        assert (row == table[tokenizer.convert_tokens_to_ids(word + "</w>")]).all()
    _, table, row = starts(config, initializer_token="<normal>")
    again = starts(config, initializer_token="<normal>")[2]
    assert (row == again).all() and not (row == starts(config, initializer_token="<normal>", seed=1)[2]).any()
    score = (row - table.mean(0)) / table.std(0)
    assert abs(float(score.mean())) < 0.6 and 0.6 < float(score.std()) < 1.5


def test_rare_tokens_by_the_paper_s_rule(tmp_path):
    """Appendix D: 5 to 10 occurrences in 200,000 captions, letters alone, no part of another token."""
    words = tiny_pipeline.tokenizer(tmp_path)
    assert modifier.rare_tokens(words, 3) == ["ktn", "pll", "ucd"]
    # of 20,000 captions 0.5 to 1: what occurs once is rare, what never does is rarer, what often does is not
    captions = ["photo of a red dog on the grass and beach"] * 19_998 + ["a blue cup", "two cat with hat car"]
    found = modifier.rare_tokens(words, 6, captions)
    assert set(found) <= {"blue", "cup", "two", "cat", "with", "hat", "car"}
    assert "cat" in found or "hat" in found
    with pytest.raises(ValueError, match="rare words of the 300 wanted"):
        modifier.rare_tokens(words, 300)


def test_a_modifier_token_of_the_vocabulary_is_refused(config):  # noqa: F811
    with pytest.raises(ValueError, match="modifier_token 'dog' is in the base's vocabulary already"):
        starts(config, modifier_token="dog", prompts=("a dog",))
    with pytest.raises(ValueError, match="initializer_token 'zebra' is 5 tokens"):
        starts(config, initializer_token="zebra")
