"""Retrieval: what is found, in which order, what is left out, and what is kept for the next time."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPModel, CLIPTokenizer  # noqa: E402

import tinysd  # noqa: E402
from customdiff import cli, data, retrieval  # noqa: E402
from customdiff.base import load_text_encoder  # noqa: E402
from customdiff.collection import Collection  # noqa: E402
from customdiff.config import TrainConfig  # noqa: E402
from customdiff.retrieval import TextSpace, retrieve, similarities  # noqa: E402
from customdiff.views import Pictures  # noqa: E402
from tinysd import world  # noqa: E402

PROMPT = "photo of a <new1> dog"


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    pairs = [world.sample(rng) for _ in range(150)]
    return [(Image.fromarray(world.render(scene)[0]), caption) for scene, caption in pairs]


@pytest.fixture(scope="module")
def images(scenes, tmp_path_factory):
    """A collection in shards: .txt files beside the pictures, and in the second a captions.csv."""
    root = tmp_path_factory.mktemp("collection")
    for i, (picture, caption) in enumerate(scenes):
        folder = root / f"shard{i % 2}"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{i:03}.png")
        if i % 2 == 0:
            (folder / f"{i:03}.txt").write_text(caption)
    rows = [f'{i:03}.png,"{scenes[i][1]}"' for i in range(1, len(scenes), 2)]
    (root / "shard1" / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    return root


@pytest.fixture(scope="module")
def space():
    return TextSpace(*load_text_encoder())


def exact(texts):
    """Unit text features of the embedded CLIP pair, straight from the whole model, in float64."""
    folder = tinysd.clip_path()
    model = CLIPModel.from_pretrained(folder).double().eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model.text_model(tokens.input_ids).pooler_output @ model.text_projection.weight.T
    return torch.nn.functional.normalize(out, dim=-1)


def dogs(folder, captions, seed=0):
    """A flat collection of noise pictures with these captions."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i, caption in enumerate(captions):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def test_ranks_as_float64_cosines_do_and_train_reads_the_folder(images, scenes, tmp_path):
    threshold, output = 0.7, tmp_path / "dogs"
    report = retrieve(images, [PROMPT], output, threshold=threshold)
    cosine = (exact([caption for _, caption in scenes]) @ exact(["photo of a dog"]).T)[:, 0]
    expected = {i for i in range(len(scenes)) if cosine[i] >= threshold}
    found = [int(Path(picture["source"]).stem) for picture in report["pictures"]]
    assert len(expected) > 5 and set(found) == expected and report["reached"] == len(expected)
    similarity = np.array([picture["similarity"] for picture in report["pictures"]])
    np.testing.assert_allclose(similarity, cosine[found], atol=2e-6)
    assert (np.diff(similarity) <= 0).all()
    assert json.loads((output / "retrieval.json").read_text()) == report
    assert report["prompts"] == ["photo of a dog"] and report["text_encoder"]["space"] == "projected"

    (read,) = Pictures.read(TrainConfig(images=str(output), prompts=(PROMPT,), regularization=str(output)))
    assert read.captions == [scenes[i][1] for i in found]
    for path, i in zip(read.regularization, found, strict=True):
        assert data.open_picture(path).tobytes() == scenes[i][0].tobytes()


def test_count_threshold_and_several_prompts(images, tmp_path):
    every = retrieve(images, ["a dog", "a cat"], tmp_path / "all", threshold=0.6)["pictures"]
    few = retrieve(images, ["a dog", "a cat"], tmp_path / "few", threshold=0.6, count=3)["pictures"]
    assert len(every) > 3 and few == every[:3]
    assert {picture["prompt"] for picture in every} == {"a dog", "a cat"}
    single = retrieve(images, "a cat", tmp_path / "cat", threshold=0.6)["pictures"]
    assert {p["source"] for p in single} <= {p["source"] for p in every}
    least = every[-1]["similarity"]
    assert retrieve(images, ["a dog", "a cat"], tmp_path / "same", threshold=least)["pictures"] == every


def test_duplicates(scenes, tmp_path):
    """The same pixels under any caption, or a picture that looks alike under the same caption."""
    folder = dogs(tmp_path / "in", ["a cat"])
    (first, _), (second, _) = scenes[:2]
    files = {
        "a.png": (first, "a dog"),
        "b.bmp": (first, "photo of a dog"),  # as a.png
        "c.jpg": (first, " A  Dog "),  # as a.png, but for JPEG's loss
        "d.jpg": (first, "photo of a dog"),  # another picture to the rule, since its caption is another
        "e.png": (second, "a dog"),
        "f.png": (second.resize((48, 48), Image.Resampling.BICUBIC), "a dog"),  # as e.png
    }
    for name, (picture, caption) in files.items():
        picture.save(folder / name, quality=60)
        (folder / name).with_suffix(".txt").write_text(caption)
    report = retrieve(folder, "a dog", tmp_path / "out", threshold=0.9)
    assert [picture["source"] for picture in report["pictures"]] == ["a.png", "e.png", "d.jpg"]
    assert report["duplicates"] == 3 and report["reached"] == 6


def test_what_cannot_be_read_or_has_no_caption_is_left_out_and_counted(tmp_path):
    folder = dogs(tmp_path / "in", ["a dog"] * 4)
    (folder / "0.png").write_bytes(b"no picture")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.txt").unlink()
    Image.open(folder / "3.png").save(folder / "3.tiff")
    report = retrieve(folder, "a dog", tmp_path / "out")
    assert [picture["source"] for picture in report["pictures"]] == ["3.png"]
    assert (report["unreadable"], report["without_caption"]) == (2, 1)


def test_features_are_encoded_once_for_an_encoder_and_its_captions(space, tmp_path, monkeypatch):
    captions, cache = ["a dog", "a cat", "a red car"], tmp_path / "cache"
    fresh = similarities(space, captions, ["a dog"])
    encoded, encode = [], TextSpace.encode
    monkeypatch.setattr(TextSpace, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))

    def again(texts=captions, where=space):
        encoded.clear()
        found = similarities(where, texts, ["a dog"], cache=cache)
        return found, encoded[1:]  # after the prompt

    for expected in (captions, []):
        found, work = again()
        assert work == expected and np.array_equal(found, fresh)
    assert again([*captions, "a cup"])[1] == [*captions, "a cup"]
    other = TextSpace(*load_text_encoder())
    with torch.no_grad():
        other.encoder.text_projection.weight[0] += 1
    other = TextSpace(other.tokenizer, other.encoder)
    found, work = again(where=other)
    assert work == captions and not np.array_equal(found, fresh)
    assert len(list(cache.iterdir())) == 3

    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="made anew"):
        found, work = again()
    assert work == captions and np.array_equal(found, fresh) and again()[1] == []

    cache = tmp_path / "file"
    cache.write_text("in the way")
    with pytest.warns(UserWarning, match="not kept"):
        assert np.array_equal(again()[0], fresh)


def test_a_scan_in_chunks_equals_one(space, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    captions = sorted({world.sample(rng)[1] for _ in range(100)})
    whole = similarities(space, captions, ["a dog", "a car"], cache=tmp_path)
    monkeypatch.setattr(retrieval, "SCAN_ROWS", 7)
    assert np.array_equal(similarities(space, captions, ["a dog", "a car"], cache=tmp_path), whole)
    direct = exact(captions) @ exact(["a dog", "a car"]).T
    np.testing.assert_allclose(whole, direct, atol=2e-6)


def test_the_space_of_a_pipeline_is_its_own_text_encoder(tmp_path):
    base = tiny_pipeline.build(tmp_path / "base")
    tokenizer, encoder = load_text_encoder(str(base))
    space = TextSpace(tokenizer, encoder)
    ids = tokenizer(["photo of a dog"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = encoder(ids).pooler_output
    np.testing.assert_allclose(
        space.encode(["photo of a dog"]), torch.nn.functional.normalize(pooled), atol=1e-6
    )
    assert space.name == "pooled"
    folder = dogs(tmp_path / "in", ["photo of a dog", "a red cat on the grass"])
    report = retrieve(folder, PROMPT, tmp_path / "out", base=str(base), threshold=1)
    assert [picture["caption"] for picture in report["pictures"]] == ["photo of a dog"]
    report = retrieve(folder, PROMPT, tmp_path / "clip", base=str(base), clip=tinysd.clip_path())
    assert report["text_encoder"]["space"] == "projected"


def parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize("form", ["bytes", "struct", "paths"])
def test_parquet_as_data_sets_have_it(form, tmp_path):
    captions = ["a cat", "a dog", None, "photo of a dog", "a dog"]
    folder = dogs(tmp_path / "in", [caption or "" for caption in captions])
    names = [f"{i}.png" for i in range(5)]
    stored = [(folder / name).read_bytes() for name in names]
    path = tmp_path / "set" / "train.parquet"
    if form == "bytes":
        parquet(path, jpg=stored, TEXT=captions)
    elif form == "struct":  # of the datasets library: the bytes, or where they are
        rows = [
            {"bytes": None if i == 1 else b, "path": f"../in/{n}"}
            for i, (n, b) in enumerate(zip(names, stored, strict=True))
        ]
        parquet(path, image=rows, text=captions)
    else:
        parquet(path, file_name=[f"../in/{name}" for name in names], caption=captions)
    for root in (path, path.parent):
        collection = Collection(root)
        assert [entry.caption for entry in collection.entries] == [c for c in captions if c]
        assert collection.without_caption == 1
        assert [collection.read(entry) for entry in collection.entries] == [stored[i] for i in (0, 1, 3, 4)]
    report = retrieve(path, "a dog", tmp_path / "out", threshold=0.9)
    assert [picture["caption"] for picture in report["pictures"]] == ["a dog", "a dog", "photo of a dog"]
    assert [(tmp_path / "out" / p["file"]).read_bytes() for p in report["pictures"]] == [
        stored[i] for i in (1, 4, 3)
    ]


def test_parquet_that_is_none_or_has_other_columns(tmp_path):
    wrong = parquet(tmp_path / "set" / "wrong.parquet", url=["http://"], caption=["a dog"])
    with pytest.raises(ValueError, match="has the columns url, caption; wanted are"):
        Collection(wrong)
    dogs(tmp_path / "set" / "00000", ["a dog"])  # img2dataset: such a table beside the pictures
    assert len(Collection(wrong.parent).entries) == 1
    wrong.write_bytes(b"no table")
    with pytest.raises(ValueError, match="no Parquet file that can be read"):
        Collection(wrong.parent)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="needs pyarrow: pip install pyarrow"):
        Collection(tmp_path / "a.parquet")


def test_bad_input(images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"threshold 0.99 is reached by none of 150 .* has 0\.\d+, .*; try 0\."
    ):
        retrieve(images, "two blue birds", out, threshold=0.99)
    for prompts, why in (([], "prompts is empty"), ("", "no word"), (["a dog", "<new1> <new2>"], "no word")):
        with pytest.raises(ValueError, match=why):
            retrieve(images, prompts, out)
    with pytest.raises(ValueError, match="no word"):
        retrieve(images, "sks", out, modifier_tokens=["sks"])
    with pytest.raises(TypeError, match="prompts must be strings, got int"):
        retrieve(images, [1], out)
    for bad in ({"threshold": 2}, {"threshold": float("nan")}, {"count": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            retrieve(images, PROMPT, out, **bad)
    (tmp_path / "bare").mkdir()
    (tmp_path / "silent").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "silent" / "a.png")
    for name, why in (
        ("bare", "no picture"),
        ("silent", "1 pictures, none"),
        ("missing", "neither a folder"),
    ):
        with pytest.raises(ValueError, match=why):
            retrieve(tmp_path / name, PROMPT, out)
    broken = dogs(tmp_path / "broken", ["a dog"])
    (broken / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 pictures .* can be read; last '0.png'"):
        retrieve(broken, PROMPT, out)
    with pytest.raises(ValueError, match="no config.json"):
        retrieve(images, PROMPT, out, clip=str(broken))
    with pytest.raises(ValueError, match="no pipeline folder"):
        retrieve(images, PROMPT, out, base=str(broken))
    with pytest.raises(ValueError, match="lie in one another"):
        retrieve(images, PROMPT, images / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bare", "silent", "broken"}


def test_only_an_earlier_result_is_replaced(tmp_path):
    folder, out = dogs(tmp_path / "in", ["a dog", "a cat"]), tmp_path / "out"
    retrieve(folder, "a cat", out)
    with pytest.raises(ValueError, match="exists; name another, or pass --overwrite"):
        retrieve(folder, "a dog", out)
    with pytest.raises(ValueError, match="is reached by none"):
        retrieve(folder, "the beach", out, overwrite=True)
    assert data.read_captioned(out)[1] == ["a cat"]
    retrieve(folder, "a dog", out, overwrite=True)
    assert data.read_captioned(out)[1] == ["a dog"]
    other = dogs(tmp_path / "mine", ["a dog"])
    with pytest.raises(ValueError, match="no earlier result"):
        retrieve(folder, "a dog", other, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "mine"}


def test_command(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    line = f"retrieve --images {images} --output {tmp_path / 'dogs'} --threshold 0.7".split()
    assert cli.main([*line, "--json", "--quiet", "--prompts", PROMPT]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report == json.loads((tmp_path / "dogs" / "retrieval.json").read_text()) and not err
    assert len(list((tmp_path / "cache" / "customdiff").iterdir())) == 1
    assert cli.main([*line, "--prompts", PROMPT]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert cli.main([*line, "--overwrite", "--count", "2", "--no-cache", "--prompts", PROMPT]) == 0
    out, err = capsys.readouterr()
    assert f"2 of {report['reached']} pictures that reach 0.7, similarity 0." in out and "captions" in err
    assert cli.main([*line, "--overwrite", "--prompts", "<new1>"]) == 2
    assert "no word but modifier tokens" in capsys.readouterr().err
