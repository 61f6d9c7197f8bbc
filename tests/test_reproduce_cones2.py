"""``make cones2``: its plan, scenes and detector, its claims on made-up figures, and a few steps of it."""

import dataclasses
import functools
import json

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")
from customdiff.reproduce import __main__ as command  # noqa: E402
from customdiff.reproduce.cones2 import claims, plan, report, scenes  # noqa: E402
from customdiff.reproduce.cones2.figures import Figures, Row  # noqa: E402
from customdiff.reproduce.files import write_result  # noqa: E402
from tinysd import world  # noqa: E402
from tinysd.presence import Presence  # noqa: E402

SIZES = (1, 2, 3, 4, 6)


def test_every_job_comes_after_those_that_it_needs_and_has_a_name_of_its_own():
    jobs = plan.jobs(plan.Effort())
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == len({job.key for job in jobs})
    for i, job in enumerate(jobs):
        assert {other.name for other in job.needs} <= set(names[:i]), job.name
    for n in (2, 3):  # the bar's hundred pictures, of every method
        scored = [j for j in jobs if j.kind == "compose" and len(j.settings["subjects"]) == n]
        for method in plan.METHODS:
            counts = [j.settings["samples"] * 5 for j in scored if j.settings["method"] == method]
            assert sum(counts) >= 100, (method, n)


@pytest.mark.filterwarnings("error:prompt .* is cut")
@pytest.mark.parametrize("count", SIZES)
def test_prompts_fit_with_modifier_tokens_and_name_every_subject(count):
    from transformers import CLIPTokenizer

    import tinysd
    from customdiff.concept import tokenize
    from customdiff.subjects import find_subject

    tokenizer = CLIPTokenizer.from_pretrained(tinysd.path(), subfolder="tokenizer")
    nouns = plan.categories("+".join(plan.SUBJECTS[:count]))
    plain = scenes.prompt(nouns, "street")
    places = [find_subject(tokenizer, plain, name) for name in scenes.subject_names(nouns)]
    assert places == sorted(set(places)), "from left to right, each its own"
    words = list(plan.WORDS)[:count]
    named = scenes.prompt([f"{word} {noun}" for word, noun in zip(words, nouns, strict=True)], "street")
    assert [word for _, _, word in tokenize(tokenizer, [named], [words]).places] == words


@pytest.mark.parametrize("names", [names for names in plan.Effort().combinations if len(names) <= 3])
def test_up_to_three_subjects_are_asked_for_as_the_base_was_taught(names):
    """Else it draws two of three."""
    rng, shown = np.random.default_rng(0), tuple(world.concepts()[name].subject for name in names)
    scene = world.Scene("street", world.place(rng, shown))
    taught = {world.caption(scene, rng) for _ in range(300)}
    assert scenes.prompt([subject.category for subject in shown], "street") in taught


@functools.cache
def presence(name):
    photos = [picture for picture, _ in world.concept_pictures(name, 8, 7)]
    return Presence(world.concepts()[name].subject, photos)


@pytest.mark.parametrize("count", SIZES)
def test_the_detector_finds_every_subject_of_a_true_picture_in_its_region(count):
    """The ceiling of what is measured; and not in another's region."""
    names, rng = plan.SUBJECTS[:count], np.random.default_rng(1)
    subjects = [world.concepts()[name].subject for name in names]
    pictures = [scenes.true_picture(subjects, place, rng) for place in world.BACKGROUNDS]
    boxes = scenes.boxes(count)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
    for name, box in list(zip(names, boxes, strict=True))[:4]:
        seen = presence(name)
        assert seen([scenes.cut(picture, box) for picture in pictures]).mean() >= 0.8
        category = world.concepts()[name].subject.category
        for other, noun in zip(boxes, plan.categories("+".join(names)), strict=True):
            if noun != category and count < scenes.BARE:  # six are small, and cut at the edges
                assert seen([scenes.cut(picture, other) for picture in pictures]).mean() <= 0.2


@pytest.mark.parametrize("count", [2, 3, 4])
def test_backwards_the_first_named_goes_where_the_last_does(count):
    forwards, backwards = scenes.boxes(count), scenes.boxes(count, backwards=True)
    assert backwards[0] == forwards[-1] and backwards[-1] == forwards[0] and set(backwards) == set(forwards)


def test_likeness_tells_whose_colours_a_subject_has():
    one, other = (
        Presence(c.subject, [p for p, _ in world.concept_pictures(c.name, 4, 0)], limit=1.0)
        for c in (world.concepts()["lime_car"], world.concepts()["maroon_cup"])
    )
    own = np.concatenate(one.colours([p for p, _ in world.concept_pictures("lime_car", 4, 5)]))
    assert one.likeness(own).shape == (800,)
    assert (other.likeness(own) > one.likeness(own)).mean() < 0.1 < (one.likeness(own) > 0.1).mean()


def made_up(**rows):
    """Figures: {method_number: (in region, leakage)}."""
    figures = Figures()
    for key, (seen, leakage) in rows.items():
        method, n = key.rsplit("_", 1)
        mean = {"all_in_region": seen, "in_region": seen, "leakage": leakage, "text": seen, "image": seen}
        figures.rows[method, int(n)] = Row(method, int(n), 100, 2, mean, seen)
    return figures


def held(figures, said):
    (found,) = [claim["held"] for claim in claims.evaluate(figures) if claim["claim"] == said]
    return found


def test_claims_hold_by_what_was_measured():
    figures = made_up(ours_2=(0.92, 0.1), residuals_2=(0.71, 0.2), joint_2=(0.3, 0.3), merged_2=(0.4, 0.05))
    assert held(figures, "two subjects with layout: all in their regions in at least 90% of the pictures")
    assert held(figures, "two subjects: at least 20 points above the same without layout")
    assert held(figures, "two subjects: less leakage than joint Custom Diffusion")
    assert held(figures, "two subjects: less leakage than merged Custom Diffusion") is False
    assert held(figures, "two subjects: higher text alignment than joint Custom Diffusion")
    assert held(figures, "three subjects: less leakage than joint Custom Diffusion") is None
    few = dataclasses.replace(figures.rows["ours", 2], pictures=99)
    figures.rows["ours", 2] = few
    said = "two subjects with layout: all in their regions in at least 90% of the pictures"
    assert held(figures, said) is None, "of too few pictures nothing is said"


def test_the_report_has_what_was_measured_and_no_more(tmp_path):
    from PIL import Image

    from customdiff.reproduce.files import path_of

    jobs = plan.jobs(plan.Effort())
    common = {"count": 50, "text": 0.5, "image": 0.5, "categories_in_region": 1.0, "job_seconds": 1.0}
    (tmp_path / "jobs").mkdir()
    for job in jobs:
        if job.kind == "residual":
            write_result(job, tmp_path, {"seconds": 10.0, "bytes": 2000, "job_seconds": 1.0})
        if job.kind == "compose" and job.settings["method"] == "ours" and len(job.settings["subjects"]) == 3:
            seen = [1.0, 0.9, 0.5] if "lime_car" in job.settings["subjects"] else [1.0, 0.8, 0.9]
            more = {"in_region": seen, "all_in_region": 0.4, "leakage": float("nan")}
            write_result(job, tmp_path, {**common, **more})
            path_of(job, tmp_path).parent.mkdir(exist_ok=True)
            Image.new("RGB", (64 * 50, 64)).save(path_of(job, tmp_path))
    report.write(jobs, tmp_path, tmp_path / "report", plan.Effort(), "test")
    found = json.loads((tmp_path / "report" / "cones2.json").read_text())
    (row,) = found["rows"]
    assert (row["method"], row["subjects"], row["pictures"], row["least"]) == ("ours", 3, 100, 0.5)
    assert row["mean"]["in_region"] == pytest.approx(0.85) and row["mean"]["bytes"] == 6000
    assert row["mean"]["seconds"] == 30 and "leakage" not in row["mean"]
    assert all({"claim", "source", "held", "figure"} <= claim.keys() for claim in found["claims"])
    page = (tmp_path / "report" / "cones2.md").read_text()
    assert f"**{len(jobs) - 8} jobs had not ended" in page
    assert "## Three subjects" in page and "## Two subjects" not in page
    assert "| residuals, layout (Cones 2) | 100 | 0.500 | 0.500 | 100% | 85% | 40% | 30 | 6.0 |" in page


@pytest.mark.slow
def test_a_few_steps_of_everything(tmp_path):
    arguments = ["cones2", "--quick", "--out", str(tmp_path), "--workers", "2"]
    assert command.main(arguments) == 0
    found = json.loads((tmp_path / "report" / "cones2.json").read_text())
    methods = {(row["method"], row["subjects"]) for row in found["rows"]}
    one = {(name, 1) for name, how in plan.METHODS.items() if name != "merged" and not how.backwards}
    assert methods == one | {(method, 2) for method in plan.METHODS}
    for row in found["rows"]:
        shares = ("in_region", "all_in_region", "categories_in_region")
        assert all(0 <= row["mean"][metric] <= 1 for metric in shares)
