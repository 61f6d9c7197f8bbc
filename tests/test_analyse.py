"""Analyses: their figures against numpy in float64, resumed ones, the files and the plots, bad input."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from PIL import Image  # noqa: E402

import customdiff_kernels as ck  # noqa: E402
import tinysd  # noqa: E402
from customdiff import base, cli, metrics, sampler  # noqa: E402
from customdiff.analysis.attention import WordMaps, attention_maps, overlaps  # noqa: E402
from customdiff.analysis.compression import quality_by_compression  # noqa: E402
from customdiff.analysis.series import Comparison  # noqa: E402
from customdiff.analysis.spectrum import spectra  # noqa: E402
from customdiff.analysis.steps import alignment_by_step, concepts_by_step  # noqa: E402
from customdiff.analysis.weights import TYPES, layer_changes, layer_type, weight_changes  # noqa: E402
from customdiff.concept import Concept, base_metadata  # noqa: E402
from customdiff.evaluation import Sampling, evaluate  # noqa: E402
from tinysd import world  # noqa: E402

PROMPTS = ["photo of a {} on the grass", "a {} in the snow"]
FEW = Sampling(samples=1, steps=1, guidance_scale=1, batch_size=2, seed=3)


@pytest.fixture(scope="module")
def pipe():
    return base.load_base(None, "cpu")


@pytest.fixture(scope="module")
def clip():
    return metrics.Clip(tinysd.clip_path())


@pytest.fixture(scope="module")
def root(tmp_path_factory, pipe):
    """Pictures of a dog, prompts, and runs/ with one concept as it was after 50, 100 and 150 steps."""
    root = tmp_path_factory.mktemp("analyse")
    (root / "dog").mkdir()
    for i, (picture, _) in enumerate(world.concept_pictures("navy_dog", 2, 0)):
        picture.save(root / "dog" / f"{i}.png")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "runs").mkdir()
    stack, g = ck.KVStack.from_unet(pipe.unet), torch.Generator().manual_seed(0)
    decay = 0.7 ** torch.arange(128)
    delta = {n: 0.1 * torch.randn(w.shape, generator=g) * decay[: w.shape[1]] for n, w in stack.items()}
    row = torch.randn(128, generator=g)
    for step in (50, 100, 150):
        part = {name: step / 150 * change for name, change in delta.items()}
        about = {"step": step} if step < 150 else {"training": {"steps": step}}
        Concept(part, {"<new1>": row}, {**base_metadata(stack), **about}).save(
            root / "runs" / f"dog-{step:06d}.safetensors"
        )
    torch.save({"<new1>": row}, root / "tokens.bin")
    return root


@pytest.fixture
def dog(root):
    return Concept.load(root / "runs" / "dog-000150.safetensors")


@pytest.fixture
def comparison(root, pipe, clip, tmp_path):
    return Comparison(
        PROMPTS, root / "dog", tmp_path / "out", pipe, clip, FEW, categories=["dog"], progress=False
    )


@pytest.fixture
def drawn(monkeypatch):
    """The prompts that the sampler was asked for."""
    prompts, sample = [], sampler.sample

    def watched(pipe, texts, *args, **options):
        prompts.extend(texts)
        return sample(pipe, texts, *args, **options)

    monkeypatch.setattr(sampler, "sample", watched)
    return prompts


@pytest.fixture
def run(root, pipe, capsys, monkeypatch):
    """Runs a command line in which {root} stands for the folder; returns (status, stdout, stderr)."""
    monkeypatch.setattr(base, "load_base", lambda folder, device: pipe)

    def call(line):
        return cli.main(line.format(root=root).split()), *capsys.readouterr()

    return call


# weights


def norm(*tensors):
    return np.sqrt(sum((tensor.detach().double().numpy() ** 2).sum() for tensor in tensors))


def test_weight_changes_of_a_unet_whose_every_layer_changed(pipe):
    parameters = dict(pipe.unet.named_parameters())
    share = dict(zip(TYPES, (0.3, 0.1, 0.02), strict=True))
    names = {"cross-attention": ".attn2.", "self-attention": ".attn1."}
    kind = {n: next((k for k, part in names.items() if part in n), "other") for n in parameters}
    found = layer_changes(parameters, {n: share[kind[n]] * p for n, p in parameters.items()})
    assert all(row["rate"] == pytest.approx(share[row["type"]], rel=1e-6) for row in found["layers"])
    assert [row["type"] for row in found["types"]] == list(TYPES)
    total = sum(p.numel() for p in parameters.values())
    for row in found["types"]:
        held = [n for n in parameters if kind[n] == row["type"]]
        assert row["mean_rate"] == pytest.approx(share[row["type"]], rel=1e-6)
        assert row["parameters"] == sum(parameters[n].numel() for n in held)
        assert row["share"] == pytest.approx(row["parameters"] / total)
        assert row["layers"] == row["changed"] == len({n.rpartition(".")[0] for n in held})


def test_rates_are_of_weight_and_bias_together(pipe):
    parameters = dict(pipe.unet.named_parameters())
    changes = {name: torch.randn_like(p) for name, p in parameters.items() if ".attn" in name}
    found = layer_changes(parameters, changes)
    rates = {kind: [] for kind in TYPES}
    for row in found["layers"]:
        of = [name for name in parameters if name.rpartition(".")[0] == row["layer"]]
        wanted = norm(*(changes[n] for n in of if n in changes)) / norm(*(parameters[n] for n in of))
        assert row["rate"] == pytest.approx(wanted, rel=1e-10)
        rates[row["type"]].append(wanted)
    for row in found["types"]:
        assert row["mean_rate"] == pytest.approx(np.mean(rates[row["type"]]), rel=1e-10, abs=0)
    assert found["types"][2]["changed"] == 0 < found["types"][0]["mean_rate"]


def test_a_layer_without_weights_is_in_no_mean():
    parameters = {"a.weight": torch.zeros(3), "b.weight": torch.tensor([3.0, 4.0])}
    found = layer_changes(parameters, {"a.weight": torch.ones(3), "b.weight": torch.tensor([1.0, 0.0])})
    assert [row["rate"] for row in found["layers"]] == [None, 0.2]
    assert [row["mean_rate"] for row in found["types"]] == [None, None, 0.2]
    with pytest.raises(ValueError, match="'c.weight', which is no parameter"):
        layer_changes(parameters, {"c.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'b.weight'\] is \(3,\), the UNet's \(2,\)"):
        layer_changes(parameters, {"b.weight": torch.zeros(3)})


def test_layer_types_by_diffusers_names():
    block = "down_blocks.0.attentions.1.transformer_blocks.0"
    assert layer_type(f"{block}.attn2.to_out.0") == "cross-attention"
    assert layer_type(f"{block}.attn1.to_q") == layer_type("mid_block.attentions.0.to_out.0") == TYPES[1]
    for other in (f"{block}.norm2", f"{block}.ff.net.2", "conv_in", "down_blocks.0.attentions.1.proj_in"):
        assert layer_type(other) == "other"


def test_weight_changes_of_concepts(pipe, dog):
    for concept in (dog, Concept(ck.compress(dog.delta, rank=3), {}, dog.metadata)):
        found = {row["layer"]: row for row in weight_changes(pipe.unet, concept)["layers"]}
        delta = dog.delta if concept is dog else concept.delta.dense()
        weights = dict(pipe.unet.named_parameters())
        for name, change in delta.items():
            row = found.pop(name.removesuffix(".weight"))
            assert row["rate"] == pytest.approx(norm(change) / norm(weights[name]), rel=1e-6)
        assert {row["change"] for row in found.values()} == {0.0}
    parameters = dict(pipe.unet.named_parameters())
    others = {n: torch.randn_like(p) for n, p in parameters.items() if n not in dog.delta}
    wanted = layer_changes(parameters, {**others, **dog.delta})
    assert weight_changes(pipe.unet, Concept(dog.delta, {}, dog.metadata, others=others)) == wanted
    assert all(row["changed"] == row["layers"] for row in wanted["types"])
    with pytest.raises(ck.BaseMismatchError):
        weight_changes(pipe.unet, Concept(dog.delta, {}, {"base_hash": "0" * 64}))


# spectrum


def with_values(values, rows, width):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in (rows, width))
    return torch.tensor(u[:, : len(values)] * values @ v[: len(values)])


def test_spectra_of_known_singular_values():
    flat = with_values([2.0] * 5, 7, 5)
    delta = {"a": with_values([4.0, 3.0, 2.0, 1.0], 6, 5), "b": flat, "c": torch.zeros(4, 5).double()}
    found = spectra(delta)
    a, b, c = found["segments"]
    assert a["singular_values"] == pytest.approx([4, 3, 2, 1, 0], abs=1e-6)
    assert a["cumulative_share"] == pytest.approx([0.4, 0.7, 0.9, 1, 1], abs=1e-6)
    assert a["ranks"] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 4]
    assert b["ranks"] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and c["ranks"] == [0] * 10
    for energy, *ranks in zip(found["energies"], a["ranks"], b["ranks"], strict=True):
        small = ck.compress(delta, energy=energy)
        assert [small.rank("a"), small.rank("b")] == ranks
    low = spectra(ck.compress({"a": delta["a"]}, rank=2), energies=[0.5, 1])["segments"][0]
    assert low["singular_values"] == pytest.approx([4, 3]) and low["ranks"] == [1, 2]
    with pytest.raises(ValueError, match=r"energies must be in \(0, 1\], got 60"):
        spectra(delta, energies=[60])


# compression


def test_compression_against_numpy_and_evaluate(root, pipe, clip, dog, comparison, drawn):
    data = quality_by_compression(dog, comparison)
    rows = {row["kept"]: row for row in data["rows"]}
    assert list(rows) == ["100%", "60%", "40%", "10%", "rank 1", "rank 0"] and len(drawn) == 12
    dense = {name: change.double().numpy() for name, change in dog.delta.items()}
    parts = {name: np.linalg.svd(change, full_matrices=False) for name, change in dense.items()}
    whole = sum((change**2).sum() for change in dense.values())
    for kept, row in rows.items():
        share = None if "rank" in kept else float(kept[:-1]) / 100
        folder = f"rank-{kept[5:]}" if share is None else f"energy-{share:g}"
        file = comparison.output / folder / "concept.safetensors"
        assert row["bytes"] == file.stat().st_size
        stored, ranks, lost = Concept.load(file), [], 0.0
        assert stored.modifier_tokens["<new1>"].equal(dog.modifier_tokens["<new1>"])
        delta = stored.delta.dense() if isinstance(stored.delta, ck.LowRankDelta) else stored.delta
        for name, (u, s, v) in parts.items():
            if share is None:
                ranks.append(int(kept[5:]))
            else:
                reached = np.cumsum(s) >= share * s.sum() * (1 - 1e-9)
                ranks.append(len(s) if share == 1 else int(reached.argmax()) + 1)
            wanted = u[:, : ranks[-1]] * s[: ranks[-1]] @ v[: ranks[-1]]
            assert np.abs(delta[name].double().numpy() - wanted).max() < 1e-5
            lost += ((dense[name] - wanted) ** 2).sum()
        assert row["mean_rank"] == pytest.approx(np.mean(ranks))
        assert row["error"] == pytest.approx(np.sqrt(lost / whole), abs=1e-5)
    for column, sign in (("bytes", -1), ("mean_rank", -1), ("error", 1)):
        assert (np.diff([sign * row[column] for row in rows.values()]) >= 0).all(), column
    small = Concept(ck.compress(dog.delta, energy=0.6), dog.modifier_tokens, dog.metadata)
    wanted = evaluate(
        [prompt.format("<new1> dog") for prompt in PROMPTS],
        root / "dog",
        comparison.output.parent / "alone",
        clip=clip,
        pipe=pipe,
        concepts=[small],
        sampling=FEW,
        progress=False,
    )
    assert wanted.summary == {name: rows["60%"][name] for name in wanted.summary}
    assert data["configuration"]["prompts"][1] == "a <new1> dog in the snow" and data["scales"]

    drawn.clear()
    assert quality_by_compression(dog, comparison) == data and drawn == []
    more = quality_by_compression(dog, comparison, energies=[0.6], ranks=[2])
    assert more["rows"][0] == rows["60%"] and len(drawn) == 2, "only what is not there"


@pytest.mark.parametrize(
    "energies, ranks, message",
    [
        ([], [], "energies and ranks are both empty"),
        ([0.6, 0], [], r"energy must be in \(0, 1\], got 0"),
        ([0.6], [-1], "ranks must be at least 0, got -1"),
    ],
)
def test_compression_refuses_bad_sizes(energies, ranks, message, dog, comparison):
    with pytest.raises(ValueError, match=message):
        quality_by_compression(dog, comparison, energies, ranks)
    with pytest.raises(ValueError, match="modifier tokens alone"):
        quality_by_compression(Concept({}, dog.modifier_tokens), comparison)
    with pytest.raises(ValueError, match=r"beside keys and values \(1, first conv_in.bias\)"):
        quality_by_compression(replace(dog, others={"conv_in.bias": torch.ones(64)}), comparison)
    assert not comparison.output.exists()


# steps


def test_steps_start_with_the_base_and_resume(root, pipe, clip, comparison, drawn, monkeypatch):
    concepts = concepts_by_step([root / "runs"])
    assert list(concepts) == [50, 100, 150]
    with monkeypatch.context() as patch:
        left, sample = [True, True], sampler.sample
        patch.setattr(sampler, "sample", lambda *a, **k: left.pop() and sample(*a, **k))
        with pytest.raises(IndexError):
            alignment_by_step(concepts, comparison)
    assert drawn[:2] == ["photo of a dog on the grass", "a dog in the snow"] and len(drawn) == 4
    times = {path: path.stat().st_mtime_ns for path in comparison.output.rglob("samples/*.png")}
    drawn.clear()
    data = alignment_by_step(concepts, comparison)
    assert drawn == 2 * [prompt.format("<new1> dog") for prompt in PROMPTS]
    assert len(times) == 4 and {path: path.stat().st_mtime_ns for path in times} == times
    assert [row["step"] for row in data["rows"]] == [0, 50, 100, 150]
    alone = evaluate(
        PROMPTS,
        root / "dog",
        comparison.output.parent / "alone",
        clip=clip,
        pipe=pipe,
        concepts=[concepts[100]],
        sampling=FEW,
        categories=["dog"],
        progress=False,
    )
    assert data["rows"][2] == {"step": 100, **alone.summary}
    assert data["configuration"]["prompts"] == alone.configuration["prompts"]


def test_versions_are_all_checked_before_any_is_drawn(root, comparison, drawn, dog):
    concepts = concepts_by_step([root / "runs"])
    stranger = Concept(dog.delta, dog.modifier_tokens, {"base_hash": "0" * 64})
    with pytest.raises(ck.BaseMismatchError):
        alignment_by_step({**concepts, 200: stranger}, comparison)
    (comparison.output / "step-000150").mkdir(parents=True)
    (comparison.output / "step-000150" / "configuration.json").write_text("{}")
    with pytest.raises(ValueError, match="step-000150' holds an evaluation with other"):
        alignment_by_step(concepts, comparison)
    assert not drawn and not list(comparison.output.rglob("*.png"))


def test_concepts_by_step_refuses_what_has_no_place(root, dog, tmp_path):
    Concept(dog.delta, {}, {}).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not say after how many training steps"):
        concepts_by_step([tmp_path])
    first = root / "runs" / "dog-000050.safetensors"
    assert list(concepts_by_step([root / "runs", first])) == [50, 100, 150], "twice the same is once"
    Concept(dog.delta, {}, {"step": 50}).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors' and .* differ and are both of step 50"):
        concepts_by_step([tmp_path, first])
    with pytest.raises(ValueError, match="holds no concept file"):
        concepts_by_step([root / "dog"])


# attention


def test_attention_maps_are_of_the_words(pipe, dog):
    options = {"seeds": [4, 5], "steps": 2, "guidance_scale": 3.0, "progress": False}
    found = attention_maps(pipe, "photo of a <new1> dog and a cat", dog, **options)
    assert found.words == ["photo", "of", "a", "<new1>", "dog", "and", "cat"]
    assert found.maps.shape == (2, 7, 16, 16) and found.maps.min() >= 0
    assert found.maps.sum(dim=1).max() < 1, "the start and the end of the text have the rest"
    want = sampler.sample(pipe, ["photo of a <new1> dog and a cat"] * 2, dog, **options)
    for ours, theirs in zip(found.pictures, want, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1
    chosen = attention_maps(pipe, found.prompt, dog, words=["cat", "a"], **options)
    assert torch.equal(chosen.maps, found.maps[:, [6, 2]])


def test_overlap_is_what_two_maps_have_in_common():
    one, other = np.eye(4), np.flip(np.eye(4), 0)
    maps = np.stack([[one, 3 * one, other, one + other], [one, one, one, one]])
    rows = overlaps(WordMaps("", list("abcd"), [], torch.from_numpy(maps)))
    got = {row["word"] + row["other"]: row["overlap"] for row in rows}
    assert got == {"ab": 1, "ac": 0.5, "ad": 0.75, "bc": 0.5, "bd": 0.75, "cd": 0.75}


# the command


SAMPLES = "--pictures {root}/dog --prompts {root}/prompts.txt --category dog --samples 1 --steps 1 --quiet"
DOG = "{root}/runs/dog-000150.safetensors"
LINES = {
    "weights": f"weights {DOG}",
    "spectrum": f"spectrum {DOG} --quiet",
    "attention": f"attention {DOG} --prompt a_<new1>_dog --count 1 --steps 1 --words dog a --quiet",
    "steps": f"steps {{root}}/runs {SAMPLES}",
    "compression": f"compression {DOG} --energies 0.6 --ranks 1 0 {SAMPLES}",
}


@pytest.mark.parametrize("kind", LINES)
def test_every_kind_writes_a_plot_and_its_data(kind, run, tmp_path):
    line = f"analyse {LINES[kind]} --output {tmp_path}/out"
    status, out, err = run(line)
    assert status == 0, err
    data = json.loads((tmp_path / "out" / f"{kind}.json").read_text())
    table = list(csv.reader((tmp_path / "out" / f"{kind}.csv").open(newline="")))
    if kind == "spectrum":
        rows = [
            {"segment": row["name"], "index": i, "singular_value": value, "cumulative_share": share}
            for row in data["segments"]
            for i, (value, share) in enumerate(
                zip(row["singular_values"], row["cumulative_share"], strict=True), 1
            )
        ]
        assert out.split()[:4] == ["segment", "of", "10%", "20%"] and out.count("\n") == 1 + 20
    else:
        rows = data["layers" if kind == "weights" else "rows"]
        shown = data["types"] if kind == "weights" else rows
        assert out.split()[: len(shown[0])] == list(shown[0]) and out.count("\n") == 1 + len(shown)
    assert table == [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    with Image.open(tmp_path / "out" / f"{kind}.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert not list((tmp_path / "out").rglob("*.partial"))

    status, out, err = run(f"{line} --json")
    if kind in ("weights", "spectrum", "attention"):
        assert status == 2 and "exists; name another folder, or pass --overwrite" in err
        status, out, err = run(f"{line} --json --overwrite")
    assert status == 0 and json.loads(out) == data


@pytest.mark.parametrize(
    "line, message",
    [
        ("weights {root}/none", "none' does not exist"),
        ("weights {root}/prompts.txt", "prompts.txt"),
        (f"weights {DOG} --output {{root}}/prompts.txt/x", "is no folder to write to"),
        ("spectrum {root}/none", "none' does not exist"),
        ("spectrum {root}/tokens.bin", "holds modifier tokens, not a change"),
        (f"attention {DOG} --prompt a_dog", "'a_dog' has no modifier token of its concept"),
        (f"attention {DOG} --prompt <new1> --words dog --quiet", "words: 'dog' is no word of the prompt"),
        (f"steps {{root}}/none {SAMPLES}", "none' holds no concept file"),
        (
            f"steps {{root}}/runs {SAMPLES} --output {{root}}/prompts.txt",
            "prompts.txt' is no folder to write to",
        ),
        (f"steps {{root}}/runs {SAMPLES} --samples 0", "samples must be at least 1"),
        (f"steps {{root}}/runs {SAMPLES} --pictures {{root}}/runs", "no PNG or JPEG"),
        (f"steps {{root}}/runs {SAMPLES} --prompts dog", "names no modifier token"),
        (f"steps {{root}}/runs {SAMPLES} --prompts <new1>", "nothing to compare"),
        (f"compression {{root}}/tokens.bin {SAMPLES}", "modifier tokens alone"),
        (f"compression {DOG} {SAMPLES} --base {{root}}", "--clip is needed with --base"),
        (f"compression {DOG} {SAMPLES} --energies 2", "energy must be in (0, 1], got 2"),
        (f"compression {DOG} {SAMPLES} --clip {{root}}/dog", "holds no saved clip model"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(root, run, line, message):
    status, out, err = run(f"analyse {line}" + " --output {root}/out" * ("--output" not in line))
    assert status == 2 and not out
    assert message in err and err.count("\n") == 1 and err.startswith("customdiff analyse: error: ")
    assert not (root / "out").exists()


def test_without_matplotlib_the_extra_is_named_before_any_work(root, tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.stderr = sys.stdout\n"
        "from customdiff.cli import main\n"
        f"assert main('analyse weights {root}/none --output {tmp_path}/out'.split()) == 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'analyse needs matplotlib: pip install "customdiff_kernels[plot]"' in done.stdout


def test_analyses_can_be_imported_before_the_command_line():
    code = "import customdiff.analysis.compression, sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
