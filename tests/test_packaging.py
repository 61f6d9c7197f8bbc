"""What is shipped: an sdist that builds elsewhere, and a wheel that needs no torch to build."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "CUSTOMDIFF_CUDA": "OFF", **environment},  # minutes, and built once already
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution of a copy of the tracked files, so that nothing is written to the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
        files = [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]
    else:
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    for file in files:
        target = folder / "source" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / file)
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", code, folder, cwd=folder / "source")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py", "PKG-INFO"):
        assert needed in names
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert source <= names
    for package in ("customdiff_kernels", "python/customdiff", "python/tinysd"):
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert modules and modules <= names
    assert not {name for name in names if name.endswith(".so") or "__pycache__" in name}


def test_wheel_builds_without_torch_and_holds_the_packages(sdist, tmp_path):
    """Built from the unpacked sdist with the build requirements at hand and torch out of sight."""
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 before .4 has none
        archive.extractall(tmp_path)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('torch', 'numpy', 'safetensors'): sys.modules[name] = None\n"
    )
    code = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    run(
        sys.executable,
        "-c",
        code,
        tmp_path,
        cwd=source,
        PYTHONPATH=str(tmp_path),
        CMAKE_BUILD_PARALLEL_LEVEL="2",
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert [name for name in names if name.startswith("customdiff_kernels/_C.") and name.endswith(".so")]
    for module in ("customdiff_kernels/_native.py", "customdiff/cli.py", "tinysd/world.py"):
        assert module in names
    data = {".json", ".txt", ".safetensors", ".png"}
    for package, root in (("customdiff_kernels", ROOT), ("tinysd", ROOT / "python")):
        wanted = {
            str(path.relative_to(root))
            for path in (root / package).rglob("*")
            if path.is_file() and (path.suffix in data or path.name == "MATH.md")
        }
        assert wanted <= names, wanted - names
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra" not in line
    ]
    assert sorted(line.split()[1].split(">")[0] for line in required) == ["safetensors", "torch"]
    assert "customdiff = customdiff.cli:main" in scripts

    # Installed elsewhere, it is the installed copy that computes.
    site = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        wheel,
        cwd=tmp_path,
    )
    code = (
        "from customdiff_kernels.cross_attention import cpu as n; import torch; q = torch.ones(1, 1, 2, 3);"
        "print(n.__file__, n.score_moments(q, q)[0])"
    )
    file, total = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert Path(file).is_relative_to(site) and float(total) == 12


@pytest.mark.slow
def test_pip_builds_in_isolation_where_there_is_no_torch(tmp_path):
    """What a stranger does: pip's own isolated build, in an empty environment (needs a package index)."""
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT, cwd=tmp_path)
    assert list(tmp_path.glob("customdiff_kernels-*.whl"))


def test_importing_the_library_needs_torch_alone():
    code = (
        "import sys, customdiff_kernels;"
        "print(*{'triton', 'diffusers', 'transformers', 'accelerate', 'PIL'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == []


def test_no_code_of_one_instruction_set_can_be_linked_into_another(tmp_path):
    """kernels.cpp defines nothing that the linker may merge across instruction sets (weak symbols)."""
    compiler = os.environ.get("CXX", "c++")
    compiled = tmp_path / "kernels.o"
    run(compiler, "-std=c++17", "-O1", "-fPIC", "-DCK_ISA=portable", f"-I{ROOT / 'csrc'}", "-Wno-psabi", "-c",
        ROOT / "csrc" / "cpu" / "kernels.cpp", "-o", compiled, cwd=tmp_path)  # fmt: skip
    symbols = [line.split() for line in run("nm", "-C", compiled, cwd=tmp_path).splitlines()]
    weak = [" ".join(symbol[2:]) for symbol in symbols if len(symbol) > 2 and symbol[1] in "wWvVu"]
    assert weak == []
