"""The demonstration: its parts on true pictures, and all of it with a few steps of everything."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tinysd  # noqa: E402
from customdiff import demo, embedded_world  # noqa: E402
from customdiff.data import read_captioned, read_pictures  # noqa: E402
from customdiff.metrics import Clip, without_words  # noqa: E402
from tinysd import world  # noqa: E402


def true_pictures(name, count, seed):
    return [picture for picture, _ in world.concept_pictures(name, count, seed)]


def test_clip_tells_concepts_and_captions_apart():
    clip = Clip(tinysd.clip_path())
    dogs, cats = true_pictures("navy_dog", 4, seed=0), true_pictures("mint_cat", 4, seed=0)
    again = true_pictures("navy_dog", 4, seed=3)
    assert clip.image_alignment(again, dogs) > clip.image_alignment(again, cats) + 0.05
    right, wrong = ["photo of a <new1> dog"] * 4, ["photo of a <new1> cup"] * 4
    assert clip.text_alignment(dogs, right, ["<new1>"]) > clip.text_alignment(dogs, wrong, ["<new1>"]) + 0.05
    assert (
        without_words("photo of a <new1> dog and a <new2> cat", ["<new1>", "<new2>"])
        == "photo of a dog and a cat"
    )
    assert without_words("photo of a <new1>, a dog", ["<new1>"]) == "photo of a , a dog"
    assert without_words("a sks dog asks", ["sks"]) == "a dog asks"
    with pytest.raises(ValueError, match="one a sample: got 1 for 4"):
        clip.text_alignment(dogs, right[:1])
    with pytest.raises(ValueError, match="empty"):
        clip.image_alignment([], dogs)


def test_the_gap_runs_from_the_base_to_true_pictures():
    rows = [
        demo.Row("base", [0.5, 0.4], [0.2, 0.2], [0.0, 0.0], 0.0, None, None),
        demo.Row("trained", [0.6, 0.7], [0.2, 0.2], [1.0, 0.5], None, 60.0, 12345),
        demo.Row("true", [0.7, 0.8], [0.2, 0.2], [1.0, 1.0], None, None, None),
    ]
    names, header, base, trained, true = demo.table(rows).splitlines()
    assert all(name in names for name in demo.CONCEPTS.values()) and header.split()[-3:] == [
        "both",
        "seconds",
        "bytes",
    ]
    assert base.split()[1:5] == ["0.500", "0%", "0.200", "0%"]
    assert trained.split()[1:] == [
        "0.600",
        "50%",
        "0.200",
        "100%",
        "0.700",
        "75%",
        "0.200",
        "50%",
        "60.0",
        "12,345",
    ]
    assert true.split()[2] == "100%" and len({len(line) for line in (header, base, trained, true)}) == 1


def test_a_smaller_run_into_the_same_folder_leaves_no_pictures_of_the_larger(tmp_path):
    for count in (4, 2):
        folder = embedded_world.write_concept(tmp_path / "teal_dog", "teal_dog", count, seed=0)
        assert len(read_pictures(folder)) == count
        pictures, captions = read_captioned(
            embedded_world.write_regularization(tmp_path / "regularization", count, seed=0)
        )
        assert len(pictures) == len(captions) == count
    (tmp_path / "mine.png").write_bytes(b"")
    embedded_world.without_pictures(tmp_path)
    assert (tmp_path / "mine.png").exists(), "only what a run numbered is its own to remove"


def test_quick_run_end_to_end(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "customdiff.demo", "--quick", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "contact_sheet.png",
        "demo.json",
        "both.merged.safetensors",
        "regularization",
        *demo.CONCEPTS.values(),
    } <= names
    assert len(list((tmp_path / "out" / "teal_dog").glob("*.png"))) == 6
    rows = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [row["name"] for row in rows][-1] == "true pictures" and len(rows) == 5
    assert all(name in done.stdout for name in (row["name"] for row in rows))
    full, small = rows[1]["bytes"], rows[2]["bytes"]
    assert small <= 0.21 * full, "compressed to 20% of the bytes"
    true = rows[-1]
    assert min(true["seen"]) == true["both"] == 1
    assert all(t > b for t, b in zip(true["image"], rows[0]["image"], strict=True))
