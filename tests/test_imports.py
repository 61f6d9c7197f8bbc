"""Who may import whom, read from the source; and that torch alone is enough, proven in a fresh process."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from customdiff_kernels import _native

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "customdiff_kernels"
MODULES = sorted(PACKAGE.rglob("*.py"))
OPTIONAL = (
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "PIL",
    "scipy",
    "huggingface_hub",
)


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything that a file imports, wherever in it; relative imports resolved."""
    found = set()
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[:-1]  # of a module; __init__ counts as one, its own folder being the package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
            )
            base = base if node.level else node.module or ""
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def users(*prefixes: str) -> set[str]:
    """Files of the package that import a module of one of these names."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if any(name == p or name.startswith(p + ".") for name in imports(path) for p in prefixes)
    }


def fresh(code: str) -> str:
    """Run ``code`` in a new process in which the optional packages are as if not installed; its output."""
    hide = f"""
import sys
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Hide, sys.meta_path)
"""
    done = subprocess.run(
        [sys.executable, "-c", hide + code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_checker_resolves_relative_imports():
    assert "customdiff_kernels._checks" in imports(PACKAGE / "cross_attention" / "ops.py")
    assert "customdiff_kernels.cross_attention.api.cross_attention" in imports(
        PACKAGE / "cross_attention/__init__.py"
    )
    assert "customdiff_kernels._native" in imports(PACKAGE / "_backends.py")


def test_torch_alone_is_enough():
    out = fresh(
        f"""
import torch, customdiff_kernels as ck
assert not [m for m in sys.modules if m.split(".")[0] in {OPTIONAL!r}]
q = torch.randn(1, 2, 5, 8, requires_grad=True)
ck.cross_attention(q, q, q).sum().backward()
kv = ck.kv_project(torch.randn(1, 4, 6), torch.randn(16, 6))
print(q.grad.shape, kv.shape, ck.build_info()["triton"], ck.explain(q), sep="; ")
print(ck.explain("cuda"))
"""
    )
    first, second = out.splitlines()
    assert first == "torch.Size([1, 2, 5, 8]); torch.Size([1, 4, 16]); None; cpu: cpu tensors, float32"
    if _native.build_info()["cuda"]:
        assert second == "cuda: cuda tensors, float32"
    else:
        assert second.endswith("triton 3.3 or later is not installed; pip install -U triton")


def test_optional_names_are_looked_up_on_use_and_unknown_ones_fail():
    code = """
import customdiff_kernels as ck
assert "customdiff_kernels.diffusers" not in sys.modules
assert "patch_unet" in dir(ck) and callable(ck.patch_unet)
try:
    ck.patch_everything
except AttributeError as error:
    print(error)
"""
    assert fresh(code) == "module 'customdiff_kernels' has no attribute 'patch_everything'"


def test_every_public_name_is_there():
    import customdiff_kernels as ck

    design = """cross_attention kv_cross_attention kv_project score_std LayoutBias KVStack LowRankDelta
    compress reconstruct MergeSolver patch_unet unpatch_unet load_delta save_delta build_info explain"""
    assert set(design.split()) <= set(ck.__all__)
    for name in ck.__all__:
        assert getattr(ck, name).__doc__, name


def test_version_is_the_distribution_s():
    import customdiff_kernels as ck

    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared and ck.__version__ == declared[1]


@pytest.mark.parametrize(
    ("what", "allowed"),
    [
        (("customdiff_kernels._C",), {"_native.py"}),
        (
            ("triton",),
            {"cross_attention/triton.py", "cross_attention/triton_kernels.py", "low_rank/triton.py"},
        ),
        (("customdiff_kernels.cross_attention.triton",), {"_backends.py"}),
        (
            ("customdiff_kernels._native",),
            {
                "_backends.py",
                "cross_attention/cpu.py",
                "cross_attention/cuda.py",
                "low_rank/cpu.py",
                "low_rank/cuda.py",
                "low_rank/eigen.py",
                "merge/cpu.py",
            },
        ),
        (("diffusers",), {"diffusers.py"}),
        (("safetensors",), {"_safetensors.py"}),
        (("customdiff", "tinysd", "transformers", "PIL"), set()),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, tuple) else "",
)
def test_who_imports_what(what, allowed):
    assert users(*what) <= allowed


def test_backends_import_neither_one_another_nor_the_reference():
    names = tuple(f"customdiff_kernels.{op}" for op in ("cross_attention", "low_rank", "merge"))
    own = {"configs", "triton_kernels", "factors"}  # parts of the GPU's backends
    backends = [
        *(path for name in ("cpu", "cuda", "triton*") for path in sorted(PACKAGE.rglob(f"{name}.py"))),
        *sorted(PACKAGE.rglob("reference.py")),
    ]
    for path in backends:
        bad = {n for n in imports(path) if n.startswith(names) and not own & set(n.split("."))}
        if path.name == "reference.py":  # a specification may be built on another specification
            bad = {n for n in bad if ".reference." not in n}
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}"


def test_kernels_are_reached_through_the_operators():
    for folder in sorted(p.parent for p in PACKAGE.rglob("api.py")):
        names = {n.rsplit(".", 1)[-1] for n in imports(folder / "api.py")}
        assert "ops" in names, f"{folder.name}/api.py does not go through ops.py"
        picked = names & {"_native", "cpu", "cuda", "triton", "_backends"}
        assert not picked, f"{folder.name}/api.py picks a backend itself: {picked}"


def test_the_trainer_uses_the_public_face_only():
    files = sorted((ROOT / "python" / "customdiff").rglob("*.py"))
    assert files
    for path in files:
        source = ast.parse(path.read_text())
        for node in ast.walk(source):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                inner = name.startswith("customdiff_kernels.") and name != "customdiff_kernels.diffusers"
                assert not inner, f"{path.relative_to(ROOT)} imports {name}"
