"""The commands end to end on a random pipeline, and what each says about bad input."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402
from PIL import Image  # noqa: E402

import customdiff_kernels as ck  # noqa: E402
from customdiff import Concept, cli, sheet  # noqa: E402
from customdiff.analysis import KINDS  # noqa: E402
from customdiff.config import TrainConfig  # noqa: E402

CAPTIONS = [
    "photo of a dog",
    "a red cat on the grass",
    "two blue car",
    "a cup and a hat",
    "photo of the beach with a car",
]


def write_pictures(folder, count=3):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, pictures, captions, and two trained concepts: a and b.safetensors, both called <new1>."""
    root = tmp_path_factory.mktemp("cli")
    tiny_pipeline.build(root / "base")
    write_pictures(root / "pictures")
    (root / "captions.txt").write_text("\n".join(CAPTIONS))
    for name, animal in (("a", "dog"), ("b", "cat")):
        status = cli.main(
            f"train --base {root}/base --images {root}/pictures --output {root}/{name}.safetensors --steps 2 "
            "--batch-size 2 --learning-rate 0.01 --quiet --prompts".split()
            + [f"photo of a <new1> {animal}"]
        )
        assert status == 0
    return root


@pytest.fixture
def run(root, capsys, monkeypatch):
    """Runs a command line in which {root} stands for the folder; returns (status, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))

    def call(line, *more):
        status = cli.main(line.format(root=root).split() + list(more))
        return status, *capsys.readouterr()

    return call


def test_help_names_every_command_and_every_option_of_the_trainer():
    done = subprocess.run([sys.executable, "-m", "customdiff", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(
        name in done.stdout
        for name in ("train", "retrieve", "sample", "analyse", "merge", "compress", "inspect", "examples:")
    )
    train = next(a for a in cli.parser()._actions if a.dest == "command").choices["train"].format_help()
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in train


def fresh(code, *hidden):
    """The output of `code` in a new process in which importing the `hidden` packages fails."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\nfrom customdiff.cli import main\n"
    done = subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_needs_no_torch():
    code = """
from customdiff.analysis import KINDS
commands = ["", "train", "sample", "edit", "evaluate", "analyse", "merge", "compress", "convert", "inspect"]
for command in [*commands, *(f"analyse {kind}" for kind in KINDS)]:
    try:
        main([*command.split(), "--help"])
    except SystemExit as done:
        assert done.code == 0
"""
    assert fresh(code, "torch").count("usage: customdiff") == 10 + len(KINDS)


def test_after_a_plain_install_a_command_names_the_extra_that_it_needs(root):
    code = f"""
sys.stderr = sys.stdout
assert main("inspect {root}/a.safetensors".split()) == 0
assert main("train --images {root}/pictures --output {root}/n --prompts <new1>".split()) == 2
assert main("sample --prompt dog".split()) == 2
assert main("merge {root}/a.safetensors {root}/b.safetensors --output {root}/n".split()) == 2
"""
    out = fresh(code, *cli.OPTIONAL)
    for command in ("train", "sample", "merge"):
        assert re.search(rf'{command} needs \w+: pip install "customdiff_kernels\[diffusers\]"\n', out)


def test_train_takes_every_field_from_the_command_line(root, run, tmp_path):
    status, out, err = run(
        f"train --base {{root}}/base --images {{root}}/pictures --output {tmp_path}/c.safetensors "
        "--modifier-token <dog> --initializer-token sks --weight-decay 0 --min-snr-gamma 5 --shift 0 "
        "--seed 3 --steps 1 --batch-size 1 --resolution 32 --learning-rate 1e-3 --device cpu --prompts",
        "photo of a <dog> dog",
        "a <dog> dog",
    )
    assert status == 0, err
    assert "images/s" in out
    kept = Concept.load(tmp_path / "c.safetensors").metadata["training"]
    assert kept["prompts"] == ["photo of a <dog> dog", "a <dog> dog"]
    assert (kept["min_snr_gamma"], kept["seed"], kept["initializer_token"]) == (5.0, 3, "sks")


def test_sample_batches_prompts_with_their_own_concepts(root, run, tmp_path, monkeypatch):
    calls = []
    from customdiff import sampler

    sample = sampler.sample
    monkeypatch.setattr(sampler, "sample", lambda *a, **k: calls.append((a, k)) or sample(*a, **k))
    status, out, err = run(
        f"sample --base {{root}}/base --steps 2 --count 2 --seed 5 --quiet --output {tmp_path}/pictures "
        "--prompt <new1> --concept {root}/a.safetensors --prompt <new1> --concept {root}/b.safetensors "
        "--prompt car"
    )
    assert status == 0, err
    assert "6 pictures" in out
    names = [f"prompt{i}_seed{s}.png" for i in range(3) for s in (5, 6)]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    assert all(Image.open(tmp_path / "pictures" / name).size == (32, 32) for name in names)
    ((_, prompts, concepts), options) = calls[0]
    assert len(calls) == 1 and len(prompts) == 6, "one batch"
    assert concepts[0] is concepts[1] is not concepts[2] and concepts[4] is None
    assert options["seeds"] == [5, 6] * 3 and options["guidance_scale"] == 6.0


def test_sample_gives_shared_concepts_to_the_prompts_that_they_fit(root, run, tmp_path, monkeypatch):
    from customdiff import sampler

    chosen = []

    def sample(pipe, prompts, concepts, **options):
        chosen.extend(concepts)
        return [Image.new("RGB", (8, 8)) for _ in prompts]

    monkeypatch.setattr(sampler, "sample", sample)
    first = Concept.load(root / "a.safetensors")
    Concept(first.delta, {}, {**first.metadata, "style": True}).save(tmp_path / "style.safetensors")
    style = f"--concept {tmp_path}/style.safetensors"
    status, _, err = run(
        f"sample --base {{root}}/base --count 1 --output {tmp_path}/sheet.png {style} {style} "
        "--concept {root}/a.safetensors --prompt <new1> --prompt dog --prompt <new1> "
        "--concept {root}/b.safetensors"
    )
    assert status == 0, err
    assert [concept.metadata.get("prompt") for concept in chosen] == [
        "photo of a <new1> dog",
        "photo of a <new1> dog",
        "photo of a <new1> cat",
    ]
    assert ["style" in concept.metadata for concept in chosen] == [False, True, False]
    status, _, err = run(
        f"sample --base {{root}}/base {style} --prompt <new1> --concept {{root}}/a.safetensors"
    )
    assert status == 2 and "style.safetensors serves no --prompt: each has another concept" in err


def test_sample_draws_a_sheet_with_one_concept_for_all(root, run, tmp_path):
    status, _, err = run(
        f"sample --base {{root}}/base --steps 1 --count 1 --quiet --output {tmp_path}/new/sheet.png "
        "--concept {root}/a.safetensors --prompt <new1> --prompt dog"
    )
    assert status == 0, err
    with Image.open(tmp_path / "new" / "sheet.png") as image:
        assert image.height > 2 * 128


def test_sample_with_residuals_and_layouts(root, run, tmp_path, monkeypatch):
    from customdiff import sampler
    from customdiff.residual import Residual

    calls, sample = [], sampler.sample
    monkeypatch.setattr(sampler, "sample", lambda *a, **k: calls.append((a, k)) or sample(*a, **k))
    Residual("dog", torch.ones(32)).save(tmp_path / "dog.safetensors")
    torch.save(torch.zeros(32), tmp_path / "lr=1.pt")
    options = (
        "--steps 2 --count 1 --quiet --layout-weight 0.2 --layout-steps 1 --draw-layout --save-attention"
    )
    status, out, err = run(
        f"sample --base {{root}}/base {options} --output {tmp_path}/new/sheet.png --layout-negative=-1e6 "
        f"--residual {tmp_path}/dog.safetensors --box cat=0.5,0,1,1 "
        f"--prompt",
        "a dog and a cat",
        *f"--box dog=0,0,0.5,1 --residual cat={tmp_path}/lr=1.pt --prompt <new1>".split(),
        *f"--concept {root}/a.safetensors --prompt".split(),
        "a dog and a dog",
        *f"--box dog#2=0,0,0.5,1 --residual dog#2={tmp_path}/dog.safetensors".split(),
    )
    assert status == 0, err
    assert out.split() == [f"{tmp_path}/new/sheet.png", f"{tmp_path}/new/sheet.attention.png"]
    with Image.open(tmp_path / "new" / "sheet.attention.png") as image:
        assert image.height > image.width / 4
    (_, _, concepts), options = calls[0]
    assert [concept is None for concept in concepts] == [True, False, True]
    assert [sorted(row) for row in options["residuals"]] == [["cat", "dog"], [], ["dog", "dog#2"]]
    regions = [layout and dict(layout.regions) for layout in options["layouts"]]
    assert regions == [{"dog": (0, 0, 0.5, 1), "cat": (0.5, 0, 1, 1)}, None, {"dog#2": (0, 0, 0.5, 1)}]
    guidance = options["layout_guidance"]
    assert (guidance.weight, guidance.steps, guidance.negative, guidance.positive) == (0.2, 1, -1e6, 2.5)


def test_sample_draws_the_scenes_of_a_layout_file(root, run, tmp_path, monkeypatch):
    from customdiff import sampler
    from customdiff.residual import Residual

    calls, sample = [], sampler.sample
    monkeypatch.setattr(sampler, "sample", lambda *a, **k: calls.append((a, k)) or sample(*a, **k))
    Residual("dog", torch.ones(32)).save(tmp_path / "dog.safetensors")
    scene = {
        "prompt": "a dog and a cat",
        "subjects": {"dog": {"box": [0, 0, 0.5, 1], "residual": "dog.safetensors", "strength": 3}},
        "guidance": {"weight": 0.3},
    }
    both = [scene, {"prompt": "a cat", "subjects": {"cat": {"box": [0, 0, 1, 0.5]}}}]
    (tmp_path / "both.json").write_text(json.dumps(both))
    (tmp_path / "one.json").write_text(json.dumps(scene))
    line = f"sample --base {{root}}/base --steps 1 --count 1 --quiet --output {tmp_path}/out"
    status, _, err = run(f"{line}.1 --layout {tmp_path}/both.json --save-attention")
    assert status == 0, err
    assert (tmp_path / "out.1" / "attention.png").exists(), "a folder, whatever follows a dot in its name"
    (_, prompts, _), options = calls.pop()
    assert prompts == ["a dog and a cat", "a cat"] and options["layout_guidance"].weight == 0.3
    assert options["layouts"][0].strengths == {"dog": 3} and list(options["residuals"][0]) == ["dog"]
    status, _, err = run(f"{line} --layout {tmp_path}/one.json --layout-weight 0.4 --prompt", "cat, dog")
    assert status == 0, err
    (_, prompts, _), options = calls.pop()
    assert prompts == ["cat, dog"] and options["layout_guidance"].weight == 0.4
    assert list(options["layouts"][0].regions) == ["dog"]

    both[1]["guidance"] = {"weight": 0.1}
    (tmp_path / "differ.json").write_text(json.dumps(both))
    for more, message in [
        (f"--layout {tmp_path}/differ.json", "the layouts set guidance weight to 0.3 and to others"),
        (f"--layout {tmp_path}/both.json --prompt dog", "has 2 scenes, and a --prompt takes one"),
        (f"--layout {tmp_path}/one.json --prompt dog --box dog=0,0,1,1", "subject 'dog' has a place twice"),
        (f"--layout {tmp_path}/one.json --prompt cat", "subject 'dog' is not in the prompt 'cat'"),
        ("--box bird=0,0,1,1 --prompt dog", "subject 'bird' is in no prompt"),
        ("--prompt dog --box bird=0,0,1,1", "subject 'bird' is not in the prompt 'dog'"),
        ("--prompt dog --box dog=0,0,1,2", "subject 'dog': box"),
        ("--prompt dog --box dog", "must be subject=left,top,right,bottom"),
        ("--prompt dog --box dog=0,0,1,1 --box dog=0,0,1,1", "subject 'dog' has two boxes"),
        (f"--prompt dog --residual {tmp_path}/no.safetensors", "there is no residual file at"),
        (f"--prompt dog --residual dog={tmp_path}/both.json", "it is no residual"),
        (f"--prompt cat --residual {tmp_path}/dog.safetensors", "subject 'dog' is not in the prompt 'cat'"),
        ("--prompt dog --box dog=0,0,1,1 --layout-weight -1", "weight must be at least 0"),
        ("--prompt dog --save-attention", "--save-attention needs a subject"),
        ("--prompt dog --layout-weight 0.1", "--layout-weight needs a layout; give --box or --layout"),
        ("--prompt dog --recurrence", "--recurrence needs a layout"),
        ("--prompt dog --draw-layout", "--draw-layout needs a layout"),
        ("", "--prompt is missing"),
    ]:
        status, _, err = run(f"{line} {more}")
        assert status == 2 and message in err and err.count("\n") == 1, (more, err)


def test_merge_renames_a_shared_token_and_keeps_each_concepts_values(root, run, tmp_path):
    status, out, err = run(
        f"merge {{root}}/a.safetensors {{root}}/b.safetensors --base {{root}}/base "
        f"--captions {{root}}/captions.txt --output {tmp_path}/both.safetensors"
    )
    assert status == 0, err
    assert re.search(r"<new1> of .*b.safetensors is called <new2> in the merge", out)
    both = Concept.load(tmp_path / "both.safetensors")
    assert list(both.modifier_tokens) == ["<new1>", "<new2>"]
    assert both.metadata["prompts"] == ["photo of a <new1> dog", "photo of a <new2> cat"]

    from customdiff.base import load_base
    from customdiff.merging import target_features

    pipeline = load_base(str(root / "base"), "cpu")
    stack = ck.KVStack.from_unet(pipeline.unet)
    merged = ck.reconstruct(stack, both.delta).weight
    for name, word, prompt in (
        ("a", "<new1>", "photo of a <new1> dog"),
        ("b", "<new2>", "photo of a <new2> cat"),
    ):
        alone = Concept.load(root / f"{name}.safetensors")
        features = target_features(pipeline, [prompt], {word: alone.modifier_tokens["<new1>"]})
        wanted, got = features @ ck.reconstruct(stack, alone.delta).weight.T, features @ merged.T
        assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()
        assert (features @ stack.weight.T - wanted).abs().max() > 1e-2 * wanted.abs().max()


def test_edit_writes_the_source_and_its_targets(root, run, tmp_path):
    line = "edit --base {root}/base --steps 2 --count 2 --quiet --source a_dog --concept {root}/a.safetensors"
    targets = ["--target", "a <new1> dog", "--target", "a red cat"]
    options = "--cross-steps 1 --word-steps cat=0.5 --self-side 8 --reweight red=2 dog=-1 --blend dog cat"
    status, out, err = run(line, *targets, *options.split(), "--output", f"{tmp_path}/all", "--seed", "5")
    assert status == 0, err
    assert out == f"{tmp_path}/all: 6 pictures\n"
    names = [f"{name}_seed{seed}.png" for name in ("source", "target0", "target1") for seed in (5, 6)]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == names
    status, out, err = run(line, *targets, "--output", f"{tmp_path}/new/sheet.png")
    assert status == 0 and out == f"{tmp_path}/new/sheet.png\n", err
    line += " --picture {root}/pictures/0.png"
    status, out, err = run(line, *targets, "--output", f"{tmp_path}/real")
    assert status == 0 and out == f"{tmp_path}/real: 3 pictures\n", err


def test_merge_keeps_the_captions_part_and_reports_as_json(root, run, tmp_path, monkeypatch):
    line = (
        "merge {root}/a.safetensors {root}/b.safetensors --base {root}/base --captions {root}/captions.txt "
        f"--json --quiet --overwrite --output {tmp_path}/both --cache {tmp_path}/cache"
    )
    status, out, err = run(line)
    assert status == 0, err
    report = json.loads(out)
    assert report["renamed"] == [{"file": f"{root}/b.safetensors", "old": "<new1>", "new": "<new2>"}]
    assert report["bytes"] == (tmp_path / "both").stat().st_size
    assert max(report["residual"]["<new1>"]) < 1e-3 and report["concept_drift"].keys() == {"<new1>", "<new2>"}
    (kept,) = (tmp_path / "cache").iterdir()
    first = (tmp_path / "both").read_bytes()

    from customdiff import regularization

    with monkeypatch.context() as patch:  # the second merge encodes no caption
        patch.setattr(regularization, "encode", None)
        assert json.loads(run(line)[1]) == report
    assert (tmp_path / "both").read_bytes() == first

    kept.write_bytes(kept.read_bytes()[:-9])
    status, out, err = run(line)
    assert status == 0 and "it is made anew" in err and json.loads(out) == report
    assert run(line.replace(f"--cache {tmp_path}/cache", "--no-cache"))[0] == 0
    assert list((tmp_path / "cache").iterdir()) == [kept]
    (root / "more.txt").write_text("\n".join([*CAPTIONS, "two dog"]))
    assert run(line.replace("captions.txt", "more.txt"))[0] == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2
    status, _, err = run(line.replace(f"{tmp_path}/cache", "{root}/captions.txt/x"))
    assert status == 0 and "the factor of the captions is not kept" in err


def test_merge_takes_prompts_with_both(root, run, tmp_path):
    files = "{root}/a.safetensors {root}/b.safetensors --base {root}/base --captions {root}/captions.txt"
    ranks = []
    for name, more in (("alone", ()), ("together", ("--together", "a <new1> dog and a <new2> cat"))):
        status, _, err = run(f"merge {files} --no-padding --output {tmp_path}/{name}", *more)
        assert status == 0, err
        delta = Concept.load(tmp_path / name).delta
        ranks.append(delta.rank(next(iter(delta.factors))))
    assert ranks == [4, 8], "two words of each, alone and together"
    status, _, err = run(f"merge {files} --output {tmp_path}/x", "--together", "a <new3> dog")
    assert status == 2 and "<new3>" in err and not (tmp_path / "x").exists()


def test_compress_and_inspect(root, run, tmp_path):
    small = tmp_path / "small.safetensors"
    status, out, err = run(f"compress {{root}}/a.safetensors --rank 1 --output {small}")
    assert status == 0, err
    assert "bytes" in out
    assert small.stat().st_size < (root / "a.safetensors").stat().st_size

    status, out, err = run(f"inspect {small} --json")
    found = json.loads(out)
    assert status == 0, err
    assert found["delta"] == "low rank"
    assert all(segment["rank"] == 1 for segment in found["segments"])
    assert found["modifier_tokens"][0]["word"] == "<new1>" and found["file_bytes"] == small.stat().st_size
    assert found["metadata"]["prompt"] == "photo of a <new1> dog"

    full = json.loads(run("inspect {root}/a.safetensors --json")[1])
    assert full["delta"] == "full" and [s["name"] for s in full["segments"]] == [
        s["name"] for s in found["segments"]
    ]
    pairs = zip(found["segments"], full["segments"], strict=True)
    assert all(low["norm"] <= 1.001 * whole["norm"] for low, whole in pairs)
    assert sum(segment["energy"] for segment in full["segments"]) == pytest.approx(1)
    status, out, err = run(f"inspect {small}")
    assert status == 0, err
    assert "modifier token <new1>" in out and "to_k.weight" in out and "base_hash" in out


def test_compress_reports_what_it_kept(root, run, tmp_path):
    small = tmp_path / "small.safetensors"
    line = f"compress {{root}}/a.safetensors --energy 0.6 --dtype float16 --output {small} --overwrite"
    status, out, err = run(f"{line} --json --quiet")
    assert status == 0 and not err, err
    report, source = json.loads(out), Concept.load(root / "a.safetensors").delta
    stored = Concept.load(small).delta
    assert stored.dtype is torch.float16 and report["bytes"] == stored.nbytes
    assert report["file_bytes"] == small.stat().st_size
    for found, (name, change) in zip(report["segments"], source.items(), strict=True):
        assert (found["name"], found["rank"]) == (name, stored.rank(name))
        values = torch.linalg.svdvals(change.double())
        assert found["energy"] == pytest.approx(float(values[: found["rank"]].sum() / values.sum()), abs=1e-5)
        u, v = (factor.double() for factor in stored.factors[name])
        wanted = (change.double() - u @ v).norm() / change.double().norm()
        assert found["error"] == pytest.approx(float(wanted), rel=1e-3)
    status, out, err = run(line)
    assert status == 0 and out.count("\n") == len(source) + 3 and "energy" in out.splitlines()[0]


def test_inspect_plots_the_singular_values(root, run, tmp_path):
    pytest.importorskip("matplotlib")
    small = tmp_path / "small.safetensors"
    assert run(f"compress {{root}}/a.safetensors --rank 1 --output {small}")[0] == 0
    for concept in ("{root}/a.safetensors", str(small)):
        status, _, err = run(f"inspect {concept} --plot {tmp_path}/plots/a.png --quiet")
        assert status == 0, err
        with Image.open(tmp_path / "plots" / "a.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    status, _, err = run(f"inspect {{root}}/a.safetensors --plot {tmp_path}/other/a.txt")
    assert status == 2 and "must end in one of ." in err and not (tmp_path / "other").exists()


def test_inspect_says_how_to_get_matplotlib(root, tmp_path):
    code = f"""
sys.stderr = sys.stdout
assert main("inspect {root}/a.safetensors --plot {tmp_path}/a.png".split()) == 2
"""
    out = fresh(code, "matplotlib")
    assert 'inspect needs matplotlib: pip install "customdiff_kernels[plot]"' in out


@pytest.mark.parametrize(
    "line, message",
    [
        ("train --images {root}/nowhere --output {root}/n.safetensors --prompts <new1>", "is not a folder"),
        ("train --images {root}/base --output {root}/n.safetensors --prompts <new1>", "no PNG or JPEG"),
        ("train --images {root}/pictures --output {root}/n.safetensors --prompts dog", "no modifier token"),
        ("train --images {root}/pictures --output {root}/a.safetensors --prompts <new1>", "exists"),
        (
            "train --images {root}/pictures --output {root}/n.safetensors",
            "prompts is empty, and so is category",
        ),
        ("sample --base {root} --prompt dog", "model_index.json"),
        ("sample --base {root}/base --prompt dog --concept {root}/no.safetensors", "does not exist"),
        (
            "sample --base {root}/base --prompt dog --concept {root}/a.safetensors --quiet",
            "no modifier token",
        ),
        ("sample --base {root}/base --prompt <new7> --quiet", "names the modifier token <new7>"),
        (
            "sample --base {root}/base --concept {root}/a.safetensors --prompt dog --quiet",
            "a.safetensors serves no --prompt: none names its modifier token <new1>",
        ),
        (
            "edit --base {root}/base --concept {root}/a.safetensors --source dog --target cat --quiet",
            "a.safetensors serves no --source or --target: none names its modifier token <new1>",
        ),
        ("edit --source dog --target cat --concept {root}/no --quiet", "does not exist"),
        ("edit --source dog --target cat --picture {root}/captions.txt", "is not a readable picture"),
        (
            "edit --base {root}/base --source dog --target cat --quiet --cross-steps 2",
            "cross_steps must be a share of the steps, from 0 to 1",
        ),
        (
            "edit --base {root}/base --source dog --target cat --quiet --reweight dog=2",
            "none of the targets has the word 'dog'",
        ),
        ("sample --base {root}/base --prompt dog --quiet --eta 2", "eta must be from 0 (DDIM) to 1"),
        ("sample --base {root}/base --prompt dog --guidance nan", "guidance_scale must be finite"),
        ("sample --base {root}/base --prompt dog --device gpu", "device 'gpu' is none that PyTorch can use"),
        pytest.param(
            "sample --base {root}/base --prompt dog --device cuda",
            "device 'cuda' is none that PyTorch can use here; give cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA"),
        ),
        (
            "train --base {root}/base --images {root}/pictures --output {root}/n --device gpu --prompts "
            "<new1>",
            "device 'gpu' is none",
        ),
        ("sample --base {root} --prompt dog --output {root}/captions.txt", "is no folder to write to"),
        ("sample --base {root} --prompt dog --output {root}/captions.txt/a.png", "is no folder to write to"),
        ("merge {root}/a {root}/b --output {root}/base --overwrite", "is a folder; name a file"),
        ("merge {root}/a.safetensors {root}/no --output {root}/new/n", "does not exist"),
        ("compress {root}/no --output {root}/new/n --rank 1", "does not exist"),
        ("compress {root}/a.safetensors --output {root}/new/n --energy 2", "energy must be in"),
        ("compress {root}/a.safetensors --output {root}/captions.txt/n --rank 1", "is no folder to write to"),
        (
            "merge {root}/a.safetensors --output {root}/n --base {root}/base --captions {root}/captions.txt",
            "two or more",
        ),
        (
            "merge {root}/a.safetensors {root}/b.safetensors --output {root}/n --base {root}/base",
            "--captions",
        ),
        ("compress {root}/a.safetensors --output {root}/b.safetensors --rank 1", "exists"),
        ("compress {root}/a.safetensors --output {root}/n --energy 2", "energy must be in"),
        ("inspect {root}/captions.txt", "captions.txt"),
    ],
)
def test_bad_input_is_one_line_and_status_2(root, run, line, message):
    before = sorted(root.iterdir())
    status, out, err = run(line)
    assert status == 2 and not out
    assert (
        message in err and err.count("\n") == 1 and err.startswith(f"customdiff {line.split()[0]}: error: ")
    )
    assert sorted(root.iterdir()) == before, "nothing half-written"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "train --images x --weights all",
        "sample --prompt dog --count 0",
        "sample --prompt dog --concept a --concept b",
        "compress x --output y",
        "compress x --output y --rank 1 --energy 0.5",
    ],
)
def test_wrong_usage_is_status_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2 and "usage: customdiff" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ("sample --prompt dog --count abc", "--count: must be a whole number of at least 1, got 'abc'"),
        ("sample --prompt dog --steps 0", "--steps: must be a whole number of at least 1, got '0'"),
        (
            "edit --source a --target b --reweight snow",
            "--reweight: must be WORD=NUMBER, as snow=2, got 'snow'",
        ),
        ("merge a b --output c --ridge abc", "--ridge: must be a number of at least 0, or auto, got 'abc'"),
        ("merge a b --output c --ridge nan", "--ridge: must be a number of at least 0, or auto, got 'nan'"),
    ],
)
def test_a_number_that_is_none_is_told_in_words(line, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(line.split())
    assert message in capsys.readouterr().err


def test_contact_sheet_places_every_picture():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    made = sheet.contact_sheet([("one", [red, blue]), ("two", [blue])], side=32, title="title")
    colours = dict((colour, count) for count, colour in made.getcolors(1 << 20))
    assert colours[(255, 0, 0)] == 32 * 32 and colours[(0, 0, 255)] == 2 * 32 * 32
    with pytest.raises(ValueError, match="at least one picture"):
        sheet.contact_sheet([("one", [])])
