"""Layouts: their bias against exact arithmetic, colour maps, files of both kinds, bad input."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import numpy as np  # noqa: E402
import tiny_pipeline  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from customdiff.layout_files import GUIDANCE, load_layout  # noqa: E402
from customdiff.layout_pictures import colour_map, drawn  # noqa: E402
from customdiff.layouts import Layout, parse_box, parse_boxes  # noqa: E402

SIZES = [(4, 4), (8, 8), (16, 16), (5, 7), (3, 8), (1, 1)]
YELLOW, RED, BLUE, WHITE = (255, 192, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)
PROMPT = "a mug and a dog on the beach"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # as in CLIP's vocabulary, a mug is one token
        patch.setattr(tiny_pipeline, "WORDS", [*tiny_pipeline.WORDS, "mug"])
        return tiny_pipeline.tokenizer(tmp_path_factory.mktemp("words"))


# --- the bias --------------------------------------------------------------------------------------------


def shares(region, size):
    """The covered share of every pixel, exactly. `region`: a box of Fractions, or a list of rows of them."""

    def overlap(low, high, i, n):
        return max(Fraction(0), min(high, Fraction(i + 1, n)) - max(low, Fraction(i, n))) * n

    if isinstance(region, tuple):
        cells = [(*region, Fraction(1))]
    else:
        h, w = len(region), len(region[0])
        cells = [
            (Fraction(j, w), Fraction(i, h), Fraction(j + 1, w), Fraction(i + 1, h), region[i][j])
            for i in range(h)
            for j in range(w)
            if region[i][j]
        ]
    return [
        [
            sum(
                value * overlap(y0, y1, i, size[0]) * overlap(x0, x1, j, size[1])
                for x0, y0, x1, y1, value in cells
            )
            for j in range(size[1])
        ]
        for i in range(size[0])
    ]


def reference(regions, tokens, size, n_tokens, strengths, negative, outside):
    """The bias (N, S) in float64, a pixel and a token at a time."""
    inside = {}
    for name, region in regions.items():
        share = shares(region, size)
        least = min(Fraction(1, 2), max(map(max, share)))
        inside[name] = [[value >= least for value in row] for row in share]
    bias = torch.zeros(*size, n_tokens, dtype=torch.float64)
    for i in range(size[0]):
        for j in range(size[1]):
            here = {name for name in regions if inside[name][i][j]}
            for token in {t for positions in tokens.values() for t in positions}:
                owners = [name for name in here if token in tokens[name]]
                if owners:
                    bias[i, j, token] = max(strengths[name] for name in owners)
                else:
                    bias[i, j, token] = negative if here or outside is None else outside
    return bias.flatten(0, 1)


@st.composite
def exact_regions(draw):
    unit = draw(st.integers(1, 32))
    if draw(st.booleans()):
        x0, y0 = draw(st.integers(0, unit - 1)), draw(st.integers(0, unit - 1))
        x1, y1 = draw(st.integers(x0 + 1, unit)), draw(st.integers(y0 + 1, unit))
        return tuple(Fraction(x, unit) for x in (x0, y0, x1, y1))
    h, w = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(0, 8), min_size=h * w, max_size=h * w).filter(any))
    return [[Fraction(value, 8) for value in values[i * w : (i + 1) * w]] for i in range(h)]


def as_given(region):
    if isinstance(region, tuple):
        return tuple(float(x) for x in region)
    return torch.tensor([[float(x) for x in row] for row in region])


@given(
    st.lists(exact_regions(), min_size=1, max_size=3),
    st.sampled_from(SIZES),
    st.sampled_from([None, 0.0]),
    st.lists(st.integers(1, 20), max_size=3),
)
def test_the_bias_is_that_of_exact_arithmetic(exact, size, outside, own):
    names = ["dog", "dog#2", "garden gnome"][: len(exact)]
    regions = dict(zip(names, exact, strict=True))
    tokens = {"dog": (2,), "dog#2": (5,), "garden gnome": (5, 7, 8)}  # 5 is of two
    tokens = {name: tokens[name] for name in names}
    strengths = {name: step / 4 for name, step in zip(names, own, strict=False)}
    layout = Layout({name: as_given(region) for name, region in regions.items()}, strengths)
    bias = layout.bias(tokens, size, 9, 2.5, -1e8, outside)
    expected = reference(regions, tokens, size, 9, dict.fromkeys(names, 2.5) | strengths, -1e8, outside)
    assert torch.equal(bias.dense()[0, 0].double(), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_colour_map_is_the_boxes_that_it_shows(size):
    image = Image.new("RGB", (24, 16), WHITE)
    image.paste(YELLOW, (1, 5, 12, 13))
    image.paste(RED, (12, 5, 22, 16))
    masks = colour_map(image, {YELLOW: "mug", RED: "dog"})
    exact = {"mug": (1, 5, 12, 13), "dog": (12, 5, 22, 16)}
    exact = {n: tuple(Fraction(x, 8 * (3 - i % 2)) for i, x in enumerate(box)) for n, box in exact.items()}
    tokens, strengths = {"mug": [2], "dog": [5]}, {"mug": 2.5, "dog": 2.5}
    bias = Layout(masks).bias(tokens, size, 8, 2.5, -1e8)
    assert torch.equal(bias.dense()[0, 0].double(), reference(exact, tokens, size, 8, strengths, -1e8, None))


# --- colour maps -----------------------------------------------------------------------------------------


def smooth(side=64, factor=8, method=Image.Resampling.BOX):
    """A disc on a bar that meets another bar, anti-aliased; and the exact cover of each, (side, side)."""
    large = Image.new("RGB", (side * factor,) * 2, WHITE)
    draw = ImageDraw.Draw(large)
    draw.rectangle((37, 203, 251, 401), fill=YELLOW)
    draw.rectangle((252, 203, 467, 401), fill=BLUE)
    draw.ellipse((101, 51, 300, 250), fill=RED)
    pixels = np.asarray(large)
    cover = {
        name: torch.tensor((pixels == colour).all(-1).reshape(side, factor, side, factor).mean((1, 3)))
        for name, colour in (("mug", YELLOW), ("cup", BLUE), ("dog", RED))
    }
    return large.resize((side, side), method), cover


LEGEND = {"255,192,0": "mug", "#ff0000": "dog", BLUE: "cup"}


def test_anti_aliased_edges_keep_the_area_of_the_shape():
    image, cover = smooth()
    found = colour_map(image, LEGEND)
    assert list(found) == ["mug", "dog", "cup"] and found["dog"].dtype is torch.float32
    for name, mask in found.items():
        off = (mask - cover[name]).abs()
        assert (off > 0.07).sum() <= 6, (
            name
        )  # but where three colours meet: within what 16 of 255 is of a step
        assert abs(mask.sum() / cover[name].sum() - 1) < 0.01
    assert (sum(found.values()) <= 1 + 1e-6).all()


@pytest.mark.parametrize("kind", ["lanczos", "enlarged", "palette", "transparent", "grey background", "odd"])
def test_colour_maps_of_every_make(kind):
    image, cover = smooth(method=Image.Resampling.LANCZOS if kind == "lanczos" else Image.Resampling.BOX)
    background = None
    if kind == "enlarged":
        image = image.resize((512, 512), Image.Resampling.BICUBIC)
    elif kind == "palette":
        image = image.quantize(255)
    elif kind == "transparent":
        alpha = Image.fromarray(((sum(cover.values()).numpy() > 0) * 255).astype(np.uint8))
        image = image.convert("RGBA")
        image.paste((9, 99, 99, 0), mask=alpha.point(lambda x: 255 - x))
    elif kind == "grey background":
        image = Image.fromarray(np.where(np.asarray(image) == 255, 254, np.asarray(image)).astype(np.uint8))
        grey = Image.new("RGB", (80, 64), (128, 128, 128))
        grey.paste(image, (8, 0))
        image, background = grey, ["128,128,128", "white"]
    elif kind == "odd":
        image = image.resize((61, 97), Image.Resampling.BILINEAR)
    found = colour_map(image, LEGEND, background)
    for name, mask in found.items():
        width = 80 / 64 if kind == "grey background" else 1
        assert abs(mask.mean() * width / cover[name].mean() - 1) < 0.03, name


def test_a_colour_that_is_in_no_legend_is_named_with_its_pixels_and_the_nearest():
    image = Image.new("RGB", (64, 64), WHITE)
    image.paste(RED, (0, 0, 20, 20))
    image.paste((200, 30, 0), (30, 30, 40, 50))
    image.putpixel((60, 3), (0, 255, 0))
    with pytest.raises(ValueError) as raised:
        colour_map(image, {RED: "dog"})
    assert str(raised.value).startswith(
        "the layout has colours that are not in the legend: "
        "200,30,0 (200 pixels; nearest is 255,0,0, of 'dog'), "
        "0,255,0 (1 pixels; nearest is 0,0,0, the background)"
    )
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=", and [0-9]{3,4} more; .*if it was saved as JPEG, save it as PNG"):
        colour_map(noise.resize((64, 64), Image.Resampling.NEAREST), {RED: "dog"})
    found = colour_map(image, {RED: "dog"}, ["white", "200,30,0", "#00ff00"])
    assert found["dog"].sum() == 400


def test_two_shades_of_a_legend_are_told_apart():
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    image.paste((250, 0, 0), (4, 0, 8, 4))
    found = colour_map(image, {"255,0,0": "dog", "250,0,0": "cat"})
    assert found["dog"].equal(1 - found["cat"]) and found["dog"][:, :4].all()


@pytest.mark.parametrize(
    ("legend", "background", "message"),
    [
        (
            {RED: "dog", BLUE: "cat"},
            None,
            "subject 'cat': no pixel .* colour 0,0,255, there are 255,0,0; 255",
        ),
        ({RED: "dog", "red": "cat"}, None, "colour 255,0,0 is of 'dog' and of 'cat'"),
        ({RED: "dog", BLUE: "dog"}, None, "subject 'dog' is in the legend twice; .*'dog#2'"),
        ({RED: "dog"}, "red", "subject 'dog': its colour 255,0,0 is declared as background too"),
        ({RED: "dog"}, 3, "colour 3 must be"),
        ({RED: "dog"}, [[float("inf"), 0, 0]], r"colour \[inf, 0, 0\] must be"),
        ({"256,0,0": "dog"}, None, "colour '256,0,0' must be"),
        ({"1,2": "dog"}, None, "colour '1,2' must be"),
        ({"reddish": "dog"}, None, "colour 'reddish' must be"),
        ({}, None, "the legend is empty"),
    ],
)
def test_bad_legends(legend, background, message):
    image = Image.new("RGB", (8, 4), WHITE)
    image.paste(RED, (4, 0, 8, 4))
    with pytest.raises(ValueError, match=message):
        colour_map(image, legend, background)


# --- layouts against the prompt --------------------------------------------------------------------------


def test_a_layout_finds_its_subjects(tokenizer):
    box = (0, 0, 1, 1)
    found = Layout({"mug": box, "dog": box}).check(PROMPT, tokenizer)
    assert found == {"mug": (2,), "dog": (5,)}
    assert Layout({"dog": box, "dog#2": box}).check("a dog and a dog", tokenizer) == {
        "dog": (2,),
        "dog#2": (5,),
    }
    with pytest.raises(ValueError, match="subject 'cat' is not in the prompt"):
        Layout({"dog": box, "cat": box}).check(PROMPT, tokenizer)
    with pytest.raises(ValueError, match="subjects 'dog' and 'Dog' are the same word .*'Dog#2'"):
        Layout({"dog": box, "Dog": box}).check("a dog and a dog", tokenizer)


MASK = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((0.5, 0, 1.2, 1), "reaches outside the picture; give fractions"),
        ((-0.1, 0, 1, 1), "reaches outside the picture"),
        ((float("nan"), 0, 1, 1), "reaches outside the picture"),
        ((0.5, 0, 0.5, 1), "is empty: left must be less than right"),
        ((0, 0.9, 1, 0.1), "is empty: top must be less than bottom"),
        ((0, 0, 1), "must be four numbers"),
        ("0,0,1,1", "must be four numbers"),
        (("a", 0, 1, 1), "must be of type float, got 'a'"),
        (None, "must be four numbers"),
        (MASK[None], r"must be \(height, width\), got \(1, 4, 4\)"),
        (MASK[:0], r"must be \(height, width\), got \(0, 4\)"),
        ((MASK * 255).byte(), "must be bool or 0..1, got uint8 of 255 to 255; divide bytes by 255"),
        (-MASK, "must be bool or 0..1, got float32 of -1.0"),
        (MASK * float("nan"), "must be bool or 0..1, got float32 of nan"),
        (MASK * 1j, "must be bool or 0..1, got complex64"),
        (MASK * 0, "is empty, 0 everywhere"),
        (MASK < 0, "is empty, 0 everywhere"),
    ],
    ids=str,
)
def test_bad_regions_name_the_subject(region, message):
    with pytest.raises(ValueError, match="subject 'dog': .*" + message):
        Layout({"mug": (0, 0, 1, 1), "dog": region})


def test_other_bad_layouts():
    box = {"dog": (0, 0, 1, 1)}
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="subject 'dog': its strength must be finite"):
            Layout(box, {"dog": strength})
    with pytest.raises(TypeError, match="subject 'dog': its strength must be a number, got str"):
        Layout(box, {"dog": "2"})
    with pytest.raises(ValueError, match="subject 'dgo' has a strength but no region.* did you mean 'dog'"):
        Layout(box, {"dgo": 2.5})
    with pytest.raises(ValueError, match="regions is empty"):
        Layout({})
    with pytest.raises(TypeError, match="regions must map each subject to its own, got list"):
        Layout([(0, 0, 1, 1)])
    with pytest.raises(ValueError, match="subject '#2' must be a word"):
        Layout({"#2": (0, 0, 1, 1)})


def test_boxes_of_the_command_line():
    assert parse_box("garden gnome=0.05,0.4,0.45,0.95") == ("garden gnome", (0.05, 0.4, 0.45, 0.95))
    assert parse_boxes(["dog = 0,0,.5,1", "dog#2=.5,0,1,1"]).regions["dog#2"] == (0.5, 0.0, 1.0, 1.0)
    for text, message in {
        "dog": "box 'dog' must be subject=left,top",
        "dog=0,0,1": "subject 'dog': box .* must be four numbers",
        "dog=0,0,1,x": "subject 'dog': box .*must be of type float, got 'x'",
        "dog=0,0,1,2": "subject 'dog': box .* outside the picture",
        "=0,0,1,1": "subject '' must be a word",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_box(text)
    with pytest.raises(ValueError, match="subject 'dog' has two boxes"):
        parse_boxes(["dog=0,0,1,1", "dog=0,0,.5,1"])


# --- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with a colour map, a mask and residuals (of which only the names matter)."""
    image = Image.new("RGBA", (96, 96), WHITE)
    image.paste(YELLOW, (11, 44, 47, 87))
    image.paste(RED, (49, 44, 86, 87))
    for x in (10, 47):  # as in the published example: a column of mixed colours beside the region
        image.paste((255, 221, 121), (x, 44, x + 1, 87))
    (tmp_path / "layouts").mkdir()
    image.save(tmp_path / "layouts/map.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "empty.png")
    mask = Image.new("RGBA", (8, 8))
    mask.paste(WHITE, (4, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    for name in ("mug.pt", "dog.pt", "teal.safetensors"):
        (tmp_path / name).touch()
    return tmp_path


# the keys and values of guidance_config_example.json of ali-vilab/Cones-V2
PUBLISHED = {
    "prompt": PROMPT,
    "residual_dict": {"dog": "dog.pt", "mug": "mug.pt", "flower": "residuals/flower.pt"},
    "color_context": {"255,192,0": ["mug", 2.5], "255,0,0": ["dog", 3.0]},
    "guidance_steps": 50,
    "guidance_weight": 0.08,
    "weight_negative": -1e8,
    "layout": "layouts/map.png",
    "subject_list": [["mug", 2], ["dog", 5]],
}


def load(folder, content, name="layout.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return load_layout(folder / name)


def test_the_published_file_loads_as_it_is(folder, tokenizer):
    (scene,) = load(folder, [PUBLISHED])
    scene.check(tokenizer)
    assert scene.prompt == PROMPT and scene.positions == {"mug": 2, "dog": 5}
    assert scene.guidance == {"steps": 50, "weight": 0.08, "negative": -1e8}
    assert scene.residuals == {"mug": folder / "mug.pt", "dog": folder / "dog.pt"}  # of those in use
    assert scene.layout.strengths == {"mug": 2.5, "dog": 3.0}
    dog = torch.zeros(96, 96)
    dog[44:87, 49:86] = 1
    assert scene.layout.regions["dog"].equal(dog)
    assert (scene.layout.regions["mug"][44:87, 11:47] == 1).all()
    assert scene.layout.regions["mug"][50, 10] == pytest.approx(134 / 255, abs=0.02)


def test_published_positions_are_those_of_the_prompt(folder, tokenizer):
    (scene,) = load(folder, [{**PUBLISHED, "subject_list": [["mug", 2], ["dog", 4]]}])
    with pytest.raises(ValueError, match="subject 'dog': subject_list puts it at token 4; .* is at 5"):
        scene.check(tokenizer)
    twice = {"prompt": "a dog and a dog", "subject_list": [["dog", 5], ["dog", 2]]}
    colours = {"255,192,0": ["dog", 2.5], "255,0,0": ["dog#2", 3.0]}
    (scene,) = load(folder, [{**PUBLISHED, **twice, "color_context": colours}])
    scene.check(tokenizer)
    assert scene.positions == {"dog": 2, "dog#2": 5} and set(scene.residuals.values()) == {folder / "dog.pt"}


YAML = """
- prompt: a dog and a dog
  subjects:
    dog: {box: [0.05, 4e-1, 0.45, 0.95], residual: teal.safetensors, strength: 3}
    dog#2: {mask: mask.png}
  guidance: {weight: 8e-2, negative: -1e8, schedule: constant, recurrence: false, steps: null}
- prompt: a mug and a dog
  layout: layouts/map.png
  legend: {"255,192,0": mug, "red": [dog, 2]}
  background: white
  subjects: {dog: {residual: teal.safetensors}}
- {prompt: a dog, subjects: {dog: {residual: teal.safetensors}}}
"""


def test_our_files_in_yaml_and_json(folder, tokenizer):
    import yaml

    for scenes in (load(folder, YAML, "layout.yaml"), load(folder, yaml.safe_load(YAML))):
        first, second, third = scenes
        assert first.layout.regions["dog"] == (0.05, 0.4, 0.45, 0.95) and first.layout.strengths == {
            "dog": 3.0
        }
        assert first.layout.regions["dog#2"].tolist() == [[0.0] * 4 + [1.0] * 4] * 8
        assert first.residuals == {"dog": folder / "teal.safetensors"}
        assert first.guidance == {
            "weight": 0.08,
            "negative": -1e8,
            "schedule": "constant",
            "recurrence": False,
            "steps": None,
        }
        assert list(second.layout.regions) == ["mug", "dog"] and second.layout.strengths == {"dog": 2.0}
        assert second.residuals == first.residuals
        assert third.layout is None and third.residuals == first.residuals
        for scene in scenes:
            scene.check(tokenizer)
    assert len(load(folder, yaml.safe_load(YAML)[0])) == 1  # a scene by itself


def test_the_file_in_the_documentation_loads(folder, tokenizer):
    page = (Path(__file__).parent.parent / "docs" / "layouts.md").read_text(encoding="utf-8")
    text = page.split("```yaml\n")[1].split("```")[0]
    image = Image.new("P", (8, 8))
    image.putpalette([*WHITE, *YELLOW])
    image.paste(1, (0, 0, 4, 4))
    image.save(folder / "map.png")
    (folder / "mask.png").rename(folder / "second.png")
    for name in ("teal_dog.safetensors", "mug.safetensors"):
        (folder / name).touch()
    (scene,) = load(folder, text, "layout.yaml")
    scene.check(tokenizer)
    assert set(scene.layout.regions) == {"dog", "dog#2", "mug"} and len(scene.residuals) == 2
    assert scene.layout.regions["mug"].sum() == 16 and scene.guidance.keys() == GUIDANCE.keys()


def dog(**fields):
    return {"prompt": "a dog", "subjects": {"dog": fields}}


BOX = [0, 0, 1, 1]
MAP = {"prompt": "a mug and a dog", "layout": "layouts/map.png", "legend": {"255,192,0": "mug", "red": "dog"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "is an empty list"),
        ("3", "a scene must be an object of named fields, got 3"),
        ({}, "prompt must be a text that names the subjects, got None"),
        ({"prompt": "a dog"}, "names no subject"),
        ({**dog(box=BOX), "subject": {}}, "unknown key 'subject'; did you mean 'subjects'"),
        (dog(bxo=BOX), "subject 'dog' has an unknown key 'bxo'; did you mean 'box'"),
        (dog(), "subject 'dog' has neither place nor residual"),
        (dog(strength=2), "subject 'dog' has neither place nor residual"),
        (dog(residual="teal.safetensors", strength=2), "subject 'dog' has a strength but no box or mask"),
        (dog(box=BOX, mask="mask.png"), "subject 'dog' is placed twice, by box and mask"),
        (dog(box=[0, 0, 64, 64]), "subject 'dog': box .* reaches outside the picture"),
        (dog(box=BOX, strength="strong"), "strength of subject 'dog' must be of type float, got 'strong'"),
        (dog(box=BOX, strength=float("nan")), "subject 'dog': its strength must be finite"),
        (dog(mask="none.png"), "mask of subject 'dog': there is no file 'none.png'"),
        (dog(mask=3), "mask of subject 'dog' must be the name of a file, got 3"),
        (dog(mask="mug.pt"), "'mug.pt' in .* is not a readable picture"),
        (dog(mask="empty.png"), "subject 'dog': its mask is empty"),
        (dog(box=BOX, residual="none.pt"), "residual of subject 'dog': there is no file 'none.pt'"),
        ({"prompt": "a dog", "subjects": ["dog"]}, "subjects must be an object of named fields"),
        (
            '{"prompt": "a dog", "subjects": {"dog": {"box": [0,0,1,1]}, "dog": {"mask": "mask.png"}}}',
            "has 'dog' twice in one place",
        ),
        ({**dog(box=BOX), "guidance": {"weigth": 1}}, "unknown key 'weigth'; did you mean 'weight'"),
        ({**dog(box=BOX), "guidance": {"weight": "x"}}, "guidance weight must be of type float"),
        ({**dog(box=BOX), "guidance": {"weight": float("inf")}}, "weight must be finite"),
        ({**dog(box=BOX), "guidance": {"schedule": "linear"}}, "schedule must be 'published', 'constant'"),
        ({**dog(box=BOX), "guidance": {"steps": -1}}, "steps must be a whole number of at least 0"),
        ({**dog(box=BOX), "guidance": {"steps": 2.5}}, "guidance steps must be of type int"),
        (
            {**MAP, "legend": {"255,192,0": "mug"}},
            "not in the legend: 255,0,0 .1591 pixels; nearest is 255,192",
        ),
        ({**MAP, "legend": {**MAP["legend"], "blue": "cup"}}, "subject 'cup': no pixel .* colour 0,0,255"),
        ({**MAP, "legend": {**MAP["legend"], "blue": 3}}, "legend 'blue' must be"),
        ({**MAP, "layout": "none.png"}, "layout picture: there is no file 'none.png'"),
        ({**MAP, "layout": "mug.pt"}, "'mug.pt' in .* is not a readable picture"),
        ({**MAP, "subjects": {"dog": {"box": BOX}}}, "subject 'dog' is placed twice, by box and a colour"),
        ({"prompt": "a dog", "layout": "layouts/map.png"}, "go together; add 'legend'"),
        ({"prompt": "a dog", "legend": {"red": "dog"}}, "go together; add 'layout'"),
        ({**PUBLISHED, "colour_context": {}}, "unknown key 'colour_context'; did you mean 'color_context'"),
        ({**PUBLISHED, "subjects": {}}, "a published scene has an unknown key 'subjects'"),
        ({**PUBLISHED, "residual_dict": {"dog": "dog.pt", "mugg": "mug.pt"}}, "'mug' .* did you mean 'mugg'"),
        (
            {**PUBLISHED, "residual_dict": {"dog": "no.pt", "mug": "mug.pt"}},
            "residual of subject 'dog': there",
        ),
        ({**PUBLISHED, "subject_list": [["mug"]]}, "subject_list must hold pairs"),
        ({**PUBLISHED, "subject_list": [["mug", "x"]]}, "position of subject 'mug' must be of type int"),
        ({**PUBLISHED, "subject_list": 3}, "subject_list must hold pairs"),
        (
            {**PUBLISHED, "color_context": {"255,192,0": ["dog", 2.5], "255,0,0": ["dog", 2.5]}},
            "subject 'dog' is in the legend twice",
        ),
    ],
)
def test_bad_files_are_named(folder, content, message):
    with pytest.raises(ValueError, match="layout .*layout.json'.*" + message):
        load(folder, content)


def test_files_that_are_missing_or_no_yaml(folder):
    with pytest.raises(ValueError, match="layout .*none.json' cannot be read: No such file"):
        load_layout(folder / "none.json")
    for name, content in (
        ("a.yaml", "a: ["),
        ("b.yaml", "!!python/object:os.system {}"),
        ("c.yaml", "!!timestamp x"),
        ("d.yaml", "!!map [a]"),
    ):
        with pytest.raises(ValueError, match=f"layout .*{name}' is not YAML"):
            load(folder, content, name)
    with pytest.raises(ValueError, match="layout .*map.png' is not YAML"):
        load_layout(folder / "layouts/map.png")
    with pytest.raises(ValueError, match="layout .*c.yaml' has 'dog' twice"):
        load(
            folder,
            "prompt: a dog\nsubjects:\n  dog: {box: [0, 0, 1, 1]}\n  dog: {mask: mask.png}\n",
            "c.yaml",
        )
    with pytest.raises(ValueError, match="layout .*layout.json', number 2: subject 'dog'"):
        load(folder, [dog(box=BOX), dog(box=3)])


def test_a_file_that_repeats_itself_without_end_is_refused_at_once(folder):
    levels = ["&l0 [0, 0]", *(f"&l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30))]
    text = f"prompt: a dog\nsubjects: {{dog: {{box: [{', '.join(levels)}]}}}}\n"
    with pytest.raises(ValueError, match="subject 'dog': box .* must be four numbers"):
        load(folder, text, "layout.yaml")


# --- drawing ---------------------------------------------------------------------------------------------


def test_regions_are_drawn_over_a_small_picture():
    picture = Image.new("RGB", (64, 48), (40, 40, 40))
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[10:30, 36:60] = True
    found = drawn(picture, Layout({"dog": (0.25, 0.25, 0.5, 0.75), "dog#2": mask}))
    assert found.size == (704, 528) and picture.getextrema() == ((40, 40),) * 3  # 11 times, for legible names
    pixels = np.asarray(found)
    changed = (pixels != 40).any(-1)
    orange, sky = (230, 159, 0), (86, 180, 233)
    for colour, (x0, y0, x1, y1) in ((orange, (176, 132, 352, 396)), (sky, (396, 110, 660, 330))):
        own = (pixels == colour).all(-1)
        ys, xs = own.nonzero()
        assert (xs.min(), ys.min()) == (x0, y0) and xs.max() in (x1 - 1, x1) and ys.max() in (y1 - 1, y1)
        assert own[y0:y1, x0].all() and own[y1 - 1, x0:x1].all() and own[y0:y1, x1 - 1].all()
        assert not changed[y1 - 60 : y1 - 10, x0 + 10 : x1 - 10].any()  # nothing is painted within
        text = (pixels[y0 : y0 + 40, x0 : x0 + 120] < 30).all(-1)
        assert text.sum() > 60  # the name, black on a plate of its colour


def test_a_region_smaller_than_a_pixel_of_the_picture_is_drawn():
    mask = torch.zeros(2000, 2000)
    mask[1001, 501] = 1
    pixels = np.asarray(drawn(Image.new("RGB", (512, 512)), Layout({"dog": mask})))
    assert pixels[256, 128].tolist() == [230, 159, 0]


def test_names_in_one_corner_do_not_cover_each_other():
    regions = {name: (0, 0.96, 0.3, 1) for name in ("dog", "cat", "cup", "car")}
    pixels = np.asarray(drawn(Image.new("RGB", (600, 600), (40, 40, 40)), Layout(regions)))
    for colour in ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)):
        assert (pixels == colour).all(-1).sum() > 300
