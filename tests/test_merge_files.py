"""The merge solver on disk: the same bits again, or a clear error."""

from __future__ import annotations

import pytest
import torch

import customdiff_kernels as ck
from customdiff_kernels import _safetensors
from customdiff_kernels.merge import storage

KEY = {"text encoder": "clip", "captions": "laion"}
E = 12


@pytest.fixture
def solver() -> ck.MergeSolver:
    return ck.MergeSolver(torch.randn(30, E), ridge=1e-3)


def test_a_loaded_solver_gives_the_same_bits(solver, tmp_path):
    path = solver.save(tmp_path / "factor", key=KEY)
    loaded = ck.MergeSolver.load(path, key=KEY)
    assert torch.equal(loaded.factor, solver.factor)
    assert (loaded.ridge, loaded.rows) == (solver.ridge, 30)
    base = ck.KVStack(torch.randn(20, E), [("a", 0, 8), ("b", 8, 20)])
    tuned = ck.KVStack(base.weight + 0.1 * torch.randn(20, E), base.segments)
    concepts = [(tuned, torch.randn(3, E))]
    assert torch.equal(loaded.apply(base, concepts).weight, solver.apply(base, concepts).weight)
    assert loaded.report(base, concepts).ridge == solver.ridge
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_that_differs_is_named(solver, tmp_path):
    path = solver.save(tmp_path / "factor", key=KEY)
    ck.MergeSolver.load(path)
    ck.MergeSolver.load(path, key={"captions": "laion"})
    with pytest.raises(ck.MergeFactorFileError, match="of another captions: 'laion', and 'mine' is wanted"):
        ck.MergeSolver.load(path, key=KEY | {"captions": "mine"})
    with pytest.raises(ck.MergeFactorFileError, match="of another ridge: None"):
        ck.MergeSolver.load(path, key={"ridge": "0"})
    for call in (lambda: solver.save(path, key={"n": 1}), lambda: ck.MergeSolver.load(path, key="laion")):
        with pytest.raises(TypeError, match="key must map strings to strings"):
            call()
    with pytest.raises(FileNotFoundError, match="there is no factor file at"):
        ck.MergeSolver.load(tmp_path)


def test_every_damaged_file_is_an_error(solver, tmp_path):
    whole = solver.save(tmp_path / "factor", key=KEY).read_bytes()
    path, generator = tmp_path / "damaged", torch.Generator().manual_seed(0)
    cuts = [whole[:n] for n in (*range(0, 64, 7), *range(64, len(whole), 53))]
    for bit in torch.randint(8 * len(whole), (300,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        cuts.append(bytes(flipped))
    for damaged in (*cuts, whole + b"0"):
        path.write_bytes(damaged)
        with pytest.raises(ck.MergeFactorFileError, match="is not a merge factor that can be read"):
            ck.MergeSolver.load(path, key=KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "customdiff"}, "does not say format"),
        ({"ridge": "-1.0"}, "ridge -1.0"),
        ({"ridge": "NaN"}, "ridge nan"),
        ({"rows": "true"}, "rows True"),
        ({"key": "[]"}, "key must map strings"),
        ({"more": "1"}, "says"),
        ({"factor": torch.eye(3)}, "float64"),
        ({"factor": torch.ones(3, 2).double()}, r"\(3, 2\)"),
        ({"factor": -torch.eye(3).double()}, "positive diagonal"),
        ({"factor": torch.full((3, 3), float("nan")).double()}, "finite"),
    ],
)
def test_what_a_file_says_is_checked_also_where_its_checksum_fits(solver, tmp_path, change, message):
    tensors, text = _safetensors.read(solver.save(tmp_path / "factor", key=KEY))
    tensors |= {name: value for name, value in change.items() if name == "factor"}
    text |= {name: value for name, value in change.items() if name != "factor"}
    text["content_sha256"] = storage._content_hash(tensors["factor"], text)
    _safetensors.write(tmp_path / "factor", tensors, text)
    with pytest.raises(ck.MergeFactorFileError, match=message):
        ck.MergeSolver.load(tmp_path / "factor")


def test_a_failed_save_leaves_the_old_file(solver, tmp_path, monkeypatch):
    path = solver.save(tmp_path / "factor", key=KEY)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        solver.save(path, key={})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
