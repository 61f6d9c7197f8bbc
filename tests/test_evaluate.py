"""Evaluation: every metric against a direct computation, resumed runs bit for bit, prompts, bad input."""

import csv
import json
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from PIL import Image  # noqa: E402

import customdiff_kernels as ck  # noqa: E402
import tinysd  # noqa: E402
from customdiff import base, cli, evaluation, metrics, sampler, scoring  # noqa: E402
from customdiff.concept import Concept, base_metadata  # noqa: E402
from customdiff.data import read_pictures  # noqa: E402
from customdiff.evaluation import Sampling, evaluate  # noqa: E402
from customdiff.prompts import existing, fill, read_prompts  # noqa: E402
from tinysd import world  # noqa: E402

PROMPTS = ["photo of a <new1> dog on the grass", "a <new1> dog in the snow", "photo of a <new1> dog"]
FEW = Sampling(samples=3, steps=1, guidance_scale=1, batch_size=2, seed=7)


@pytest.fixture(scope="module")
def pipe():
    return base.load_base(None, "cpu")


@pytest.fixture(scope="module")
def clip():
    return metrics.Clip(tinysd.clip_path())


@pytest.fixture(scope="module")
def root(tmp_path_factory, pipe):
    """Pictures of a dog, of a cat, and of both as samples of PROMPTS; concepts dog, other, cat and more,
    which is dog with another weight changed.
    """
    root = tmp_path_factory.mktemp("evaluate")
    for name, subject, count in (("dog", "navy_dog", 3), ("cat", "mint_cat", 5)):
        (root / name).mkdir()
        for i, (picture, _) in enumerate(world.concept_pictures(subject, count, 0)):
            picture.save(root / name / f"{i}.png")
    (root / "made").mkdir()
    for i, (picture, _) in enumerate(world.concept_pictures("navy_dog", 7, 1)):
        picture.save(root / "made" / f"prompt{i % 3}_seed{i}.png")
    stack = ck.KVStack.from_unet(pipe.unet)
    for seed, (name, word) in enumerate((("dog", "<new1>"), ("other", "<new1>"), ("cat", "<new2>"))):
        g = torch.Generator().manual_seed(seed)
        delta = {n: 0.02 * torch.randn(w.shape, generator=g) for n, w in stack.items()}
        row = torch.randn(pipe.text_encoder.config.hidden_size, generator=g)
        Concept(delta, {word: row}, base_metadata(stack)).save(root / f"{name}.safetensors")
    dog = Concept.load(root / "dog.safetensors")
    others = {"conv_out.bias": torch.full_like(pipe.unet.conv_out.bias, 0.1)}
    Concept(dog.delta, dog.modifier_tokens, dog.metadata, others=others).save(root / "more.safetensors")
    (root / "prompts.txt").write_text("photo of a {} on the grass\n\na {} in the snow\n")
    (root / "empty.txt").write_text("\n")
    return root


@pytest.fixture
def run(root, pipe, capsys, monkeypatch):
    """Runs a command line in which {root} stands for the folder; returns (status, stdout, stderr)."""
    monkeypatch.setattr(base, "load_base", lambda folder, device: pipe)

    def call(line, *more):
        status = cli.main(line.format(root=root).split() + list(more))
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def drawn(monkeypatch):
    """The seeds that the sampler was asked for."""
    seeds, sample = [], sampler.sample

    def watched(*args, **options):
        seeds.extend(options["seeds"])
        return sample(*args, **options)

    monkeypatch.setattr(sampler, "sample", watched)
    return seeds


def draw(root, pipe, clip, output, sampling=FEW, concept="dog", prompts=PROMPTS, **options):
    concepts = [Concept.load(root / f"{concept}.safetensors")]
    return evaluate(
        prompts,
        [root / "dog"],
        output,
        clip=clip,
        pipe=pipe,
        concepts=concepts,
        sampling=sampling,
        progress=False,
        **options,
    )


def score_made(root, clip, output, real=("dog",), prompts=PROMPTS, **options):
    folders = [root / name for name in real]
    return evaluate(prompts, folders, output, clip=clip, samples_from=root / "made", **options)


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


# metrics


def mmd(x, y):
    """The unbiased squared MMD with the kernel (x·y/d + 1)³, sum by sum in float64."""
    x, y = x.double().numpy(), y.double().numpy()

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    within = [
        np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)
    ]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kid_is_the_unbiased_polynomial_mmd():
    pytest.importorskip("torchmetrics")
    x, y = torch.randn(12, 5), torch.randn(12, 5) + 0.5
    value, deviation = metrics.kid(x, y)
    assert value == pytest.approx(mmd(x, y), rel=1e-10) and deviation == 0
    state = torch.get_rng_state()
    value, deviation = metrics.kid(x, torch.cat([y, y + 0.1, y - 0.1]))
    assert (value, deviation) == metrics.kid(x, torch.cat([y, y + 0.1, y - 0.1])) and deviation > 0
    assert value == pytest.approx(mmd(x, torch.cat([y, y + 0.1, y - 0.1])), abs=4 * deviation)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are its own"
    with pytest.raises(ValueError, match="two pictures on each side, got 1 and 12"):
        metrics.kid(x[:1], y)


def test_fid_is_the_frechet_distance_of_gaussians():
    pytest.importorskip("torchmetrics")
    x, y = torch.randn(40, 5), torch.randn(60, 5) @ torch.randn(5, 5) + 0.5
    (mean, cov), (mean2, cov2) = ((s.double().mean(0).numpy(), np.cov(s.double().numpy().T)) for s in (x, y))
    values, vectors = np.linalg.eigh(cov)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root)).sum()
    wanted = ((mean - mean2) ** 2).sum() + np.trace(cov) + np.trace(cov2) - 2 * cross
    assert metrics.fid(x, y) == pytest.approx(wanted, rel=1e-9)
    with pytest.warns(UserWarning, match="FID of 5 pictures in 5 dimensions says little"):
        metrics.fid(x[:5], y)


@pytest.fixture(scope="module")
def direct():
    """Unit vectors by transformers' CLIP alone, one at a time in float64, and its embeddings."""
    folder = tinysd.clip_path()
    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)

    @torch.no_grad()
    def embed(item):
        if isinstance(item, str):
            ids = tokenizer(item, return_tensors="pt", padding="max_length")
            return model.text_projection(model.text_model(**ids).pooler_output)[0].numpy()
        pixels = processor(images=item, return_tensors="pt")["pixel_values"].double()
        return model.visual_projection(model.vision_model(pixels).pooler_output)[0].numpy()

    return embed, lambda item: embed(item) / np.linalg.norm(embed(item))


def test_scores_are_those_of_a_direct_computation(root, clip, direct, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "BATCH", 4)
    embed, unit = direct
    found = score_made(root, clip, tmp_path / "out")
    real = [unit(picture) for picture in read_pictures(root / "dog")]
    texts = ["photo of a dog on the grass", "a dog in the snow", "photo of a dog"]
    everything = {"text_alignment": [], "clip_score": [], "image_alignment": []}
    for i, row in enumerate(found.rows):
        samples = [unit(Image.open(p)) for p in sorted((root / "made").glob(f"prompt{i}_*"))]
        each = {
            "text_alignment": [float(s @ unit(texts[i])) for s in samples],
            "clip_score": [2.5 * max(0.0, float(s @ unit(texts[i]))) for s in samples],
            "image_alignment": [float(np.mean([s @ r for r in real])) for s in samples],
        }
        assert (row.prompt, row.text, row.samples) == (PROMPTS[i], texts[i], len(samples))
        assert row.scores == pytest.approx({name: np.mean(v) for name, v in each.items()}, abs=1e-6)
        for name, values in each.items():
            everything[name] += values
    assert [row.samples for row in found.rows] == [3, 2, 2]
    assert found.summary == pytest.approx({name: np.mean(v) for name, v in everything.items()}, abs=1e-6)


def test_kid_and_fid_are_over_the_embeddings_of_the_clip(root, clip, direct, tmp_path):
    pytest.importorskip("torchmetrics")
    embed, _ = direct
    with pytest.warns(UserWarning, match="says little"):
        found = score_made(root, clip, tmp_path / "out", reference=root / "made")
    made = torch.tensor(np.stack([embed(picture) for picture in read_pictures(root / "made")]))
    assert found.summary["kid"] == pytest.approx(mmd(made, made), rel=1e-4)
    assert abs(found.summary["fid"]) < 1e-3 * float(made.var(0).sum())
    assert "image embeddings of tinysd/clip, not of Inception" in found.scales["kid"]
    assert found.versions["torchmetrics"] and found.configuration["reference"] == str(root / "made")


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_dino_alignment_is_of_class_tokens(kind, root, clip, tmp_path):
    torch.manual_seed(0)
    config, build = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}Model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    model = build(config(**sizes, image_size=28, patch_size=14)).eval()
    model.save_pretrained(tmp_path / "dino")
    crop = {"crop_size": {"height": 28, "width": 28}} if kind == "Dinov2" else {}
    processor = {"Dinov2": transformers.BitImageProcessor, "ViT": transformers.ViTImageProcessor}[kind]
    processor = processor(size={"height": 28, "width": 28}, **crop)
    processor.save_pretrained(tmp_path / "dino")
    found = score_made(root, clip, tmp_path / "out", dino=metrics.Dino(str(tmp_path / "dino")))

    @torch.no_grad()
    def unit(picture):
        token = model(**processor(images=picture, return_tensors="pt")).last_hidden_state[0, 0].double()
        return token / token.norm()

    real = [unit(picture) for picture in read_pictures(root / "dog")]
    wanted = [float(unit(s) @ r) for s in read_pictures(root / "made") for r in real]
    assert found.summary["dino_alignment"] == pytest.approx(np.mean(wanted), abs=1e-5)
    assert found.scales["dino_alignment"].endswith("/dino")


def test_each_folder_is_compared_with_the_samples_that_name_its_token(root, clip, tmp_path):
    prompts = ["a <new1> dog", "a <new2> cat", "a <new1> dog and a <new2> cat"]
    found = score_made(root, clip, tmp_path / "both", ("dog", "cat"), prompts)
    alone = score_made(root, clip, tmp_path / "dog", ("dog",), prompts)
    dog, cat = (
        [row.scores[f"image_alignment {word}"] for row in found.rows] for word in ("<new1>", "<new2>")
    )
    whole = [row.scores["image_alignment"] for row in alone.rows]
    assert dog == [whole[0], None, whole[2]] and cat[0] is None and None not in cat[1:]
    assert cat[2] < dog[2], "true dogs are more like the dog"
    counts = [row.samples for row in found.rows]
    mean = (counts[0] * dog[0] + counts[2] * dog[2]) / (counts[0] + counts[2])
    assert found.summary["image_alignment <new1>"] == pytest.approx(mean, rel=1e-6)
    assert [row.text for row in found.rows][2] == "a dog and a cat"


# prompts


def test_prompts_are_read_and_filled(root):
    prompts = read_prompts([f"{root}/prompts.txt", " a {} "])
    assert prompts == ["photo of a {} on the grass", "a {} in the snow", "a {}"]
    assert fill(prompts, ["<new1>"], ["dog"])[1:] == ["a <new1> dog in the snow", "a <new1> dog"]
    assert fill(["a {1} on a {0}", "{} and {}"], ["<a>", "<b>"], ["dog", "sofa"]) == [
        "a <b> sofa on a <a> dog",
        "<a> dog and <b> sofa",
    ]
    assert fill(["a {} {x} {0.real}"], [], ["dog"]) == ["a dog {x} {0.real}"], "the base model's; no more"
    assert fill(["a <new1> cup"], ["<new1>"], []) == ["a <new1> cup"]
    with pytest.raises(ValueError, match=r"'a \{\}' has the placeholder \{\}, and category names 0"):
        fill(["a {}"], ["<new1>"], [])
    with pytest.raises(ValueError, match="category: got dog, cat for the modifier tokens <new1>"):
        fill(["a {}"], ["<new1>"], ["dog", "cat"])
    with pytest.raises(ValueError, match="blank"):
        read_prompts([" "])


def test_modifier_tokens_without_brackets_are_named(root, clip, tmp_path):
    prompts = ["photo of a sks dog"] * 3
    plain = score_made(root, clip, tmp_path / "a", prompts=prompts)
    named = score_made(root, clip, tmp_path / "b", prompts=prompts, modifier_tokens=["sks"])
    assert plain.rows[0].text == "photo of a sks dog" and named.rows[0].text == "photo of a dog"
    assert plain.summary["text_alignment"] != named.summary["text_alignment"]


# samples


def test_samples_are_the_samplers_and_each_has_its_own_seed(root, pipe, clip, tmp_path):
    found = draw(root, pipe, clip, tmp_path / "out")
    wanted = sampler.sample(
        pipe,
        [PROMPTS[0], PROMPTS[0]],
        Concept.load(root / "dog.safetensors"),
        steps=1,
        guidance_scale=1,
        seeds=[7, 8],
        progress=False,
    )
    for picture, seed in zip(wanted, (7, 8), strict=True):
        with Image.open(tmp_path / "out" / "samples" / f"prompt0_seed{seed}.png") as kept:
            assert kept.tobytes() == picture.tobytes()
    names = {f"prompt{i}_seed{7 + 3 * i + k}.png" for i in range(3) for k in range(3)}
    assert files(tmp_path / "out").keys() == names and len(set(files(tmp_path / "out").values())) == 9
    assert found.configuration["seed"] == 7 and len(found.configuration["concepts"]) == 1


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(root, pipe, clip, tmp_path, drawn, monkeypatch):
    whole = draw(root, pipe, clip, tmp_path / "whole")
    assert drawn == list(range(7, 16))
    drawn.clear()

    write, left = scoring.write, 1 + 3  # the configuration, three pictures of the nine

    def dies(path, content):
        nonlocal left
        if left == 0:
            path.with_name(path.name + ".partial").write_bytes(b"torn")
            raise KeyboardInterrupt
        left -= 1
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            draw(root, pipe, clip, tmp_path / "killed")
    assert len([name for name in files(tmp_path / "killed") if name.endswith(".png")]) == 3
    assert not (tmp_path / "killed" / "results.json").exists()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "samples").glob("*.png")}
    drawn.clear()

    resumed = draw(root, pipe, clip, tmp_path / "killed")
    assert drawn == list(range(9, 16)), "the batches that lack a picture"
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in times} == times, "what was there is left alone"
    assert resumed == whole
    for name in ("results.json", "results.csv", "results.md", "sheet.png", "configuration.json"):
        one, other = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name
    drawn.clear()
    assert draw(root, pipe, clip, tmp_path / "killed") == whole and drawn == []


@pytest.mark.parametrize(
    "change, named",
    [
        ({"sampling": Sampling(samples=3, steps=2, guidance_scale=1, batch_size=2, seed=7)}, "steps"),
        ({"concept": "other"}, "concepts"),
        ({"concept": "more"}, "concepts"),
        ({"prompts": [*PROMPTS[:2], "a <new1> dog"]}, "prompts"),
    ],
)
def test_another_configuration_is_refused_and_overwritten_when_asked(
    change, named, root, pipe, clip, tmp_path, drawn
):
    draw(root, pipe, clip, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=f"holds an evaluation with other {named}: name another folder"):
        draw(root, pipe, clip, tmp_path / "out", **change)
    assert files(tmp_path / "out") == before
    drawn.clear()
    draw(root, pipe, clip, tmp_path / "out", overwrite=True, **change)
    assert len(drawn) == 9 and files(tmp_path / "out") != before
    draw(root, pipe, clip, tmp_path / "fresh", **change)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_samples_of_an_unknown_configuration_are_refused(root, pipe, clip, tmp_path):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "prompt0_seed7.png")
    with pytest.raises(ValueError, match="samples of an unknown configuration"):
        draw(root, pipe, clip, tmp_path)
    (tmp_path / "configuration.json").write_text("{")
    with pytest.raises(ValueError, match="configuration.json' is damaged"):
        draw(root, pipe, clip, tmp_path)


def test_drawn_samples_score_the_same_when_they_exist(root, pipe, clip, tmp_path):
    found = draw(root, pipe, clip, tmp_path / "out")
    before = files(tmp_path / "out")
    for output in (tmp_path / "again", tmp_path / "out"):
        again = evaluate(
            PROMPTS,
            root / "dog",
            output,
            clip=clip,
            samples_from=tmp_path / "out" / "samples",
            overwrite=True,
        )
    assert files(tmp_path / "out") == before, "what is to be scored is not removed"
    assert again.summary == pytest.approx(found.summary, abs=1e-6)
    assert [row.samples for row in again.rows] == [3, 3, 3]


def test_captions_are_the_prompts_of_pictures_without_any(root, clip, tmp_path):
    (tmp_path / "made").mkdir()
    lines = ["file,caption"]
    for i, picture in enumerate(read_pictures(root / "made")):
        picture.save(tmp_path / "made" / f"{i}.png")
        lines.append(f"{i}.png,{PROMPTS[i // 3]}")
    (tmp_path / "made" / "captions.csv").write_text("\n".join(lines))
    prompts, samples = existing(tmp_path / "made", [])
    assert prompts == PROMPTS and [index for _, index in samples] == [0, 0, 0, 1, 1, 1, 2]
    found = evaluate([], [root / "dog"], tmp_path / "out", clip=clip, samples_from=tmp_path / "made")
    assert [row.samples for row in found.rows] == [3, 3, 1]
    with pytest.raises(ValueError, match="'0.png' in .* is of none of the 1 prompts"):
        existing(tmp_path / "made", PROMPTS[:1])
    with pytest.raises(ValueError, match="'prompt1_seed1.png' in .* is of none of the 1 prompts"):
        existing(root / "made", PROMPTS[:1])
    with pytest.raises(ValueError, match="prompt 'more' has no picture"):
        existing(root / "made", [*PROMPTS, "more"])


# the command


def test_the_command_writes_json_csv_and_markdown_that_agree(root, run, tmp_path):
    status, out, err = run(
        f"evaluate --concept {{root}}/dog.safetensors --pictures {{root}}/dog --prompts {{root}}/prompts.txt "
        f"--category dog --output {tmp_path}/out --samples 2 --steps 1 --seed 3 --quiet"
    )
    assert status == 0, err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = list(csv.reader((tmp_path / "out" / "results.csv").open(newline="")))
    text = (tmp_path / "out" / "results.md").read_text()
    assert out == text + "\n"
    table = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == table[0] == ["prompt", "samples", "text_alignment", "clip_score", "image_alignment"]
    assert [row["prompt"] for row in found["rows"]] == [
        "photo of a <new1> dog on the grass",
        "a <new1> dog in the snow",
    ]
    lines = [*found["rows"], {"prompt": "all prompts", "samples": 4, **found["summary"]}]
    for line, row, cells in zip(lines, rows[1:], table[1:], strict=True):
        assert row == [str(line[name]) for name in rows[0]]
        assert cells == [f"{v:.4g}" if isinstance(v := line[name], float) else str(v) for name in rows[0]]
    kept = found["configuration"]
    assert (kept["samples"], kept["steps"], kept["guidance_scale"], kept["seed"]) == (2, 1, 3.0, 3)
    assert found["versions"]["torch"] == torch.__version__ and "cosine" in found["scales"]["text_alignment"]
    assert all(f"- {name}: {scale}" in text for name, scale in found["scales"].items())
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.height > 3 * 128, "the real pictures and two prompts"


OPTIONS = "--pictures {root}/dog --output {root}/out --quiet --steps 1"
DOG = f"evaluate {OPTIONS} --concept {{root}}/dog.safetensors"


@pytest.mark.parametrize(
    "line, message",
    [
        (f"{DOG} --prompts {{root}}/empty.txt", "holds no caption"),
        (f"{DOG} --prompts {{root}}/none.txt", "none.txt' is neither a file nor a folder"),
        (f"{DOG} --prompts {{root}}/prompts.txt", "has the placeholder {}, and category names 0"),
        (DOG, "prompts is empty"),
        (f"{DOG} --prompts dog", "'dog' names no modifier token of the concepts (<new1>)"),
        (f"{DOG} --prompts <new1>", "has nothing to compare beside its modifier token"),
        (f"{DOG} --prompts <new1><new7>", "names the modifier token <new7>, and its concept has <new1>"),
        (f"evaluate {OPTIONS} --prompts <new1>", "it has no concept"),
        (f"{DOG} {{root}}/cat.safetensors --prompts a<new1>", "concept <new2> serves no prompt"),
        (f"{DOG} {{root}}/cat.safetensors --prompts <new1><new2>", "merge them"),
        (f"{DOG} --prompts a<new1> --samples 0", "samples must be at least 1, got 0"),
        (f"{DOG} --prompts a<new1> --eta 2", "eta must be from 0"),
        (f"{DOG} --prompts a<new1> --guidance nan", "guidance_scale must be finite"),
        (f"{DOG} --prompts a<new1> --pictures {{root}}", "holds no PNG or JPEG picture"),
        (f"{DOG} --prompts a<new1> --pictures {{root}}/dog {{root}}/cat", "got 2 folders for the modifier"),
        (f"{DOG} --prompts a<new1> --output {{root}}/empty.txt", "is a file; name a folder"),
        (f"{DOG} --prompts a<new1> --clip {{root}}/dog", "holds no saved clip model"),
        (f"{DOG} --prompts a<new1> --dino {tinysd.clip_path()}", "its config.json says 'clip'"),
        (f"{DOG} --prompts a<new1> --base {{root}}", "--clip is needed with --base"),
        (f"{DOG} --prompts a<new1> --reference {{root}}/none", "none' is not a folder"),
        (f"{DOG} --prompts a<new1> --reference {{root}}/cat --samples 1", "two pictures on each side"),
        (f"evaluate {OPTIONS} --prompts a --samples-from {{root}}/dog", "is of none of the 1 prompts"),
        (f"evaluate {OPTIONS} --samples-from {{root}}/dog", "has no caption"),
        (f"evaluate {OPTIONS} --prompts a --concept {{root}}/none", "none"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(root, run, line, message):
    if "--reference" in line:
        pytest.importorskip("torchmetrics")
    status, out, err = run(line)
    assert status == 2 and not out
    assert message in err and err.count("\n") == 1 and err.startswith("customdiff evaluate: error: ")
    assert not (root / "out").exists()


def test_a_missing_package_is_one_line_before_any_work(root, run, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    status, _, err = run(f"{DOG} --prompts a<new1> --reference {{root}}/cat")
    assert status == 2 and not (root / "out").exists()
    assert err == (
        "customdiff evaluate: error: evaluate needs torchmetrics: "
        'pip install "customdiff_kernels[evaluation]"\n'
    )
