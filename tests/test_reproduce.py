"""``make reproduce``: its plan, its claims on made-up figures, its jobs when one fails or the run is killed,
and all of it with a few steps of everything.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")
from customdiff.reproduce import claims, plan, pool, tables  # noqa: E402
from customdiff.reproduce.figures import Figures  # noqa: E402
from customdiff.reproduce.files import result_of  # noqa: E402
from customdiff.reproduce.plan import Job  # noqa: E402

COMMAND = [sys.executable, "-m", "customdiff.reproduce"]


# the plan


def test_every_job_comes_after_those_that_it_needs_and_has_a_name_of_its_own():
    jobs = plan.jobs(plan.Effort())
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == len({job.key for job in jobs})
    for i, job in enumerate(jobs):
        assert {other.name for other in job.needs} <= set(names[:i]), job.name
    concepts = {job.settings["concept"] for job in jobs if job.kind == "pictures"}
    assert len(concepts) >= 4 and len({c for name in concepts for c in plan.categories(name)}) >= 3
    # ours is trained once a concept and seed, for all tables
    assert sum(name.startswith("train-ours-") for name in names) == 4 * 2


def test_nothing_is_evaluated_on_the_concepts_that_rates_are_chosen_on():
    from tinysd import world

    used = {job.settings["concept"] for job in plan.jobs(plan.Effort()) if job.kind == "pictures"}
    assert used == set(world.concepts("figures"))


def test_the_key_follows_the_settings_and_those_of_what_is_needed():
    need = Job("a", "pictures", {"seed": 0})
    job = Job("b", "train", {"steps": 1}, (need,))
    assert job.key == Job("other name", "train", {"steps": 1}, (need,)).key
    assert job.key != Job("b", "train", {"steps": 2}, (need,)).key
    assert job.key != Job("b", "train", {"steps": 1}, (Job("a", "pictures", {"seed": 1}),)).key


def test_the_key_follows_the_base(monkeypatch, tmp_path):
    import tinysd

    def key(weights):
        (tmp_path / "unet.safetensors").write_bytes(weights)
        monkeypatch.setattr(tinysd, "path", lambda: str(tmp_path))
        plan.base_digest.cache_clear()
        return Job("a", "pictures", {}).key

    try:
        assert key(b"now") != key(b"then")
    finally:
        plan.base_digest.cache_clear()


def test_a_pattern_selects_jobs_and_what_they_need():
    jobs = plan.jobs(plan.QUICK)
    names = [job.name for job in plan.selected(jobs, "compress-rank-1-teal_dog-*")]
    assert names == [
        "regularization",
        "pictures-teal_dog-0",
        "train-ours-teal_dog-0",
        "compress-rank-1-teal_dog-0",
    ]
    with pytest.raises(ValueError, match="'nothing' matches no job"):
        plan.selected(jobs, "nothing")


# figures and claims


def made_up(**methods):
    """Figures of single concepts in four cells: {method: {metric: four values}}."""
    figures = Figures()
    for method, metrics in methods.items():
        for metric, values in metrics.items():
            for cell, value in zip(("a-0", "b-0", "a-1", "b-1"), values, strict=True):
                figures.put("single", method.replace("_", "-"), metric, cell, value)
    return figures


def test_a_claim_holds_by_its_direction_and_tells_its_noise():
    figures = made_up(ours={"image": [0.5, 0.6, 0.5, 0.6]}, dreambooth={"image": [0.4, 0.5, 0.4, 0.5]})
    held, figure, clear = claims.higher("image", "ours", "dreambooth")(figures)
    assert held and clear and figure.startswith("+0.100 ± 0.000 (0.550 against 0.450)")
    assert claims._number(-1234.5, 0) == "−1,234"
    held, figure, _ = claims.higher("image", "dreambooth", "ours")(figures)
    assert not held and figure.startswith("−0.100")
    assert claims.lower("image", "dreambooth", "ours")(figures)[0]
    assert not claims.lower("image", "ours", "dreambooth")(figures)[0]
    figures = made_up(ours={"image": [0.5, 0.6, 0.5, 0.6]}, dreambooth={"image": [0.3, 0.7, 0.5, 0.6]})
    held, _, clear = claims.higher("image", "ours", "dreambooth")(figures)
    assert held and not clear, "a mean of 0.025 with an error of 0.06"


def test_bars_hold_at_the_bar_and_not_beyond():
    figures = made_up(ours={"image": [0.97] * 4, "gap": [0.4, 0.6, 0.4, 0.6]}, base={"image": [1.0] * 4})
    assert claims.not_below("image", "ours", "base", 0.031)(figures)[0]
    assert not claims.not_below("image", "ours", "base", 0.029)(figures)[0]
    assert claims.not_below("image", "base", "ours", 0.0)(figures)[0], "more is not worse"
    assert claims.alike("image", "ours", "base", 0.031)(figures)[0]
    assert not claims.alike("image", "base", "ours", 0.029)(figures)[0], "but it is not alike"
    assert claims.at_least("gap", "ours", 0.5)(figures)[:2] == (True, "50%")
    assert not claims.at_least("gap", "ours", 0.51)(figures)[0]
    assert claims.times("image", "base", "ours", 1.03)(figures)[0]
    assert not claims.times("image", "base", "ours", 1.04)(figures)[0]


def test_nearer_compares_distances_on_either_side():
    figures = made_up(ours={"kid": [0.9] * 4}, dreambooth={"kid": [1.2] * 4}, base={"kid": [1.0] * 4})
    assert claims.nearer("kid", "ours", "dreambooth", "base")(figures)[0]
    assert not claims.nearer("kid", "dreambooth", "ours", "base")(figures)[0]


def test_what_was_not_measured_is_neither_held_nor_not():
    found = claims.evaluate(made_up(ours={"text": [0.5] * 4}, base={"text": [0.51] * 4}))
    assert all(claim.keys() == {"claim", "source", "held", "figure", "clear"} for claim in found)
    measured = [claim for claim in found if claim["held"] is not None]
    assert [claim["claim"] for claim in measured] == ["Ours keeps the base's text alignment (to 5%)"]
    assert measured[0]["held"] is True
    assert len({claim["claim"] for claim in found}) == len(found) == len(claims.CLAIMS)


def test_the_gap_runs_from_the_base_to_true_pictures_by_seed():
    figures = made_up(
        base={"image": [0.2, 0.4, 0.2, 0.4]},
        ours={"image": [0.4, 0.6, 0.6, 0.5]},
        true={"image": [0.6, 0.8, 0.6, 0.5]},
    )
    figures._add_gaps()
    assert figures.of("single", "ours", "gap") == pytest.approx({"all-0": 0.5, "all-1": 1.0})
    assert figures.mean("single", "true", "gap") == pytest.approx(1)
    row = next(row for row in tables.rows(figures) if row["method"] == "ours")
    assert row["seeds"]["image"] == pytest.approx({"0": 0.5, "1": 0.55})
    assert row["mean"]["image"] == pytest.approx(0.525)


# the jobs


def test_a_failing_job_is_named_and_the_others_go_on(tmp_path):
    good = Job("good", "pictures", {"concept": "teal_dog", "count": 2, "seed": 0})
    bad = Job("bad", "pictures", {"concept": "nobody", "count": 2, "seed": 0})
    after = Job("after", "train", {}, (bad,))
    last = Job("last", "pictures", {"concept": "lilac_cat", "count": 2, "seed": 0}, (good,))
    lines = []
    failures = pool.run_all([good, bad, after, last], tmp_path, workers=2, say=lines.append)
    assert failures.keys() == {"bad", "after"} and failures["after"] == "needs bad"
    assert "ValueError" in failures["bad"] and "nobody" in failures["bad"]
    assert any(line.startswith("FAILED bad: ValueError") and "logs" in line for line in lines)
    assert "Traceback" in (tmp_path / "logs" / "bad.txt").read_text()
    for job in (good, last):
        assert result_of(job, tmp_path)["peak_memory"] > 0
    assert len(list((tmp_path / "pictures" / "last").glob("*.png"))) == 2

    lines.clear()
    mended = Job("bad", "pictures", {"concept": "navy_dog", "count": 2, "seed": 0})
    assert pool.run_all([good, mended, last], tmp_path, workers=1, say=lines.append) == {}
    assert lines[0] == "2 of 3 jobs are done already"
    assert len(lines) == 2 and "[3/3] bad: " in lines[1], "and the others are not run again"


def test_a_job_that_takes_times_runs_alone():
    timing, other = Job("t", "timing", {}), Job("o", "pictures", {})
    assert pool._next([timing, other], [other], {"t", "o"}, workers=2) is None
    assert pool._next([timing, other], [], {"t", "o"}, workers=2) is timing
    assert pool._next([other], [timing], {"t", "o"}, workers=2) is None
    needs = Job("n", "train", {}, (other,))
    assert pool._next([needs, timing], [], {"n", "t"}, workers=1) is needs
    assert pool._next([needs], [], {"n", "o"}, workers=1) is None


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    command = [*COMMAND, "--quick", "--out", str(tmp_path), "--workers", "1"]
    command += ["--only", "compress-rank-1-teal_dog-0"]
    done = tmp_path / "jobs"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while len(list(done.glob("*.json"))) < 2 and run.poll() is None:
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in done.glob("*.json")}
    assert 2 <= len(before) < 4, "killed in the middle"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{len(before)} of 4 jobs are done already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was done is left alone"
    assert len(list(done.glob("*.json"))) == 4


# all of it


def test_the_list_names_jobs_and_a_bad_pattern_is_told():
    listed = subprocess.run([*COMMAND, "--quick", "--list"], capture_output=True, text=True)
    assert listed.returncode == 0 and "train-joint-teal_dog+maroon_cup-0" in listed.stdout
    wrong = subprocess.run([*COMMAND, "--only", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "matches no job" in wrong.stderr


def test_quick_run_end_to_end(tmp_path):
    done = subprocess.run(
        [*COMMAND, "--quick", "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = tmp_path / "out" / "report"
    found = json.loads((report / "custom-diffusion.json").read_text())
    assert all(claim["held"] in (True, False) and claim["figure"] for claim in found["claims"])
    in_tables = {(row["table"], row["method"]) for row in found["rows"]}
    for table in tables.TABLES:
        assert {(table.title, tables.TITLES[method]) for method in table.methods} <= in_tables
    ours, true = (
        next(row["mean"] for row in found["rows"] if row["method"] == name)
        for name in ("ours", "true pictures")
    )
    assert true["seen"] == 1 and true["gap"] == 1 and ours["bytes"] > 1e6 and ours["peak_memory"] > 1e8
    page = (report / "custom-diffusion.md").read_text()
    for table in tables.TABLES:
        assert f"## {table.title}" in page
        if table.sheet:
            assert (report / f"custom-diffusion-{table.sheet}.png").stat().st_size > 1000
    assert all(claim["claim"].replace("*", "\\*") in page for claim in found["claims"])
