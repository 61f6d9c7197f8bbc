"""What the CUDA kernels became by compilation: registers, stack, tensor-core instructions; no GPU is needed.

Read from the module that was built (CUSTOMDIFF_CUDA=ON make test), every kernel of every architecture in it.
Bounds: no stack, hence no spilled register; registers and shared memory that leave a multiprocessor room for
a block; tensor-core instructions in every kernel that multiplies. The table goes to pytest's temporary
folder, and with ``CK_WRITE_TABLES=1`` to docs/cuda_resources.md.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from customdiff_kernels import _native

BUILT = _native.build_info()["cuda"]
pytestmark = pytest.mark.skipif(
    not BUILT, reason="the CUDA kernels were not built; where nvcc is: CUSTOMDIFF_CUDA=ON make test"
)
DOCS = Path(__file__).parent.parent / "docs" / "cuda_resources.md"
SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes of a multiprocessor, 1 KiB of it taken by each block
SIZES = {"bf16": 2, "fp16": 2, "float": 4}


class Kernel(NamedTuple):
    """One kernel of one architecture. ``arguments``: those of its template, the element type first."""

    arch: int
    name: str
    arguments: tuple[str, ...]
    registers: int
    stack: int
    products: int  # tensor-core instructions
    local: int  # loads and stores of spilled registers or of arrays indexed at run time

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(self.arguments)}>"

    @property
    def threads(self) -> int:
        size, *rest = self._numbers()
        return {
            "attention_fwd_kernel": lambda: 64 if size * rest[0] > 640 else 128,
            "attention_bwd_kernel": lambda: 32 * rest[2],
            "rows_kernel": lambda: 64 if size * rest[0] > 640 else 128,
            "bias_gradient_kernel": lambda: 64 if size * rest[0] > 640 else 128,
            "gram_kernel": lambda: 2 * rest[0],
            "sum_kernel": lambda: 256,
            "low_rank_kernel": lambda: 128,
        }[self.name]()

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory, less what a layout asks for on top (its table, its gradient)."""
        size, *rest = self._numbers()

        def row(columns):  # of a tile: an odd number of 16 bytes
            return (-(-columns * size // 16) | 1) * 16

        queries = self.threads // 2
        if self.name == "attention_fwd_kernel":
            dim, keys, one_tile, _ = rest
            return 2 * (queries + (1 if one_tile else 2) * keys) * row(dim)
        if self.name == "attention_bwd_kernel":
            dim, _, warps, stages, *_ = rest
            return (2 * stages + 2) * 16 * warps * row(dim) + 2 * 16 * warps * row(16 * warps)
        if self.name in ("rows_kernel", "bias_gradient_kernel"):
            dim, keys = rest
            return 2 * (queries + keys) * row(dim)
        if self.name == "low_rank_kernel":
            (weight,) = rest
            return (-(-64 * weight // 16) | 1) * 16 * 64 + 64 * row(32) + 32 * row(64)
        return 64 * row(rest[0]) if self.name == "gram_kernel" else 0

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds at once: a quarter of its registers serves every fourth warp."""
        warps = self.threads // 32
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 4 * ((65536 // 4) // per_warp) // warps
        return min(by_registers, SHARED[self.arch] // (self.shared + 1024), 2048 // self.threads)

    def _numbers(self) -> list[int]:
        words = {"false": 0, "true": 1, **SIZES}
        return [words[x] if x in words else int(x) for x in self.arguments]


def tool() -> str:
    """cuobjdump, from the CUDA toolkit or from triton."""
    places = [shutil.which("cuobjdump")]
    if spec := importlib.util.find_spec("triton"):
        places.append(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    found = [place for place in places if place and Path(place).exists()]
    if not found:
        pytest.skip("cuobjdump is neither on the PATH nor in triton")
    return found[0]


def dump(*options: str) -> str:
    command = [tool(), *options, _native.module().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def kernels() -> list[Kernel]:
    """Every kernel in the compiled module."""
    instructions: dict[tuple[int, str], Counter[str]] = {}
    arch, current = 0, Counter[str]()
    for line in dump("-sass").splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function : (\S+)", line):
            current = instructions.setdefault((arch, match[1]), Counter())
        elif match := re.search(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", line):
            current[match[1]] += 1

    usage = re.findall(r"arch = sm_(\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    demangle = shutil.which("c++filt") or pytest.skip("c++filt (binutils) is not on the PATH")
    plain = subprocess.run([demangle], input="\n".join(u[1] for u in usage), capture_output=True, text=True)
    found = []
    for (new_arch, mangled, registers, stack), text in zip(usage, plain.stdout.split("\n"), strict=False):
        if new_arch:
            arch = int(new_arch)
            continue
        match = re.search(r"(\w+_kernel)<(.*)>\(", text)
        assert match, text
        for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16")):
            text = text.replace(long, short)
        arguments = re.search(r"_kernel<(.*)>\(", text)[1].split(", ")
        counts = instructions[arch, mangled]
        found.append(
            Kernel(arch, match[1], tuple(a.removeprefix("(int)").removeprefix("(bool)") for a in arguments),
                   int(registers), int(stack), counts["HMMA"], counts["LDL"] + counts["STL"])
        )  # fmt: skip
    return sorted(found)


HEAD = """# CUDA kernels: resources by compilation

Written by `CK_WRITE_TABLES=1 pytest tests/test_cuda_compile.py` on a build with the CUDA kernels. No GPU took
part and no time was measured.

- **kernel**: element type; then of the forward: head dimension, keys of a tile, whether one tile holds all
  keys, biased; of the backward: head dimension, columns of the results that a block owns, warps, stages, one
  tile, biased; of the low-rank sum: the weight's type.
- **stack**: bytes a thread; 0 means that no register is spilled.
- **products**: tensor-core instructions (HMMA).
- **shared**: bytes a block; **resident**: blocks that a multiprocessor holds at once by registers, shared
  memory and threads.

| arch | kernel | registers | stack | products | threads | shared | resident |
|---|---|---|---|---|---|---|---|
"""


@pytest.fixture(scope="module", autouse=True)
def table(tmp_path_factory):
    yield
    rows = [
        f"| sm_{k.arch} | {k} | {k.registers} | {k.stack} | {k.products} | {k.threads} | {k.shared} "
        f"| {k.resident} |\n"
        for k in kernels()
    ]
    (tmp_path_factory.getbasetemp() / "cuda_resources.md").write_text(HEAD + "".join(rows))
    if os.environ.get("CK_WRITE_TABLES") == "1":
        DOCS.write_text(HEAD + "".join(rows))


def test_every_architecture_has_every_kernel():
    named = {arch: {str(k) for k in kernels() if k.arch == arch} for arch in map(int, BUILT["architectures"])}
    first, *others = named.values()
    assert len(first) > 80 and all(other == first for other in others)


def test_no_register_is_spilled():
    assert [
        f"sm_{k.arch} {k}: {k.stack} bytes, {k.local} local" for k in kernels() if k.stack or k.local
    ] == []


def test_a_multiprocessor_holds_a_block():
    bad = [k for k in kernels() if k.registers > 255 or k.shared + 1024 > SHARED[k.arch] or k.resident < 1]
    assert not bad


def test_products_run_on_tensor_cores():
    assert [str(k) for k in kernels() if k.name != "sum_kernel" and not k.products] == []


def test_tiles_are_exact():
    """Multiply-adds issued for 77 keys cost those of 80, and head dimension 40 costs no more than 40."""
    for k in kernels():
        if k.name == "attention_fwd_kernel" and k.arguments[:4] == ("bf16", "40", "80", "true"):
            # q kᵀ: 10 columns of 8 keys, 40 = 16 + 16 + 8 deep; P v: 5 columns of 8, 80 = 5 · 16 deep
            assert k.products == 10 * 3 + 5 * 5, k


@pytest.mark.parametrize("dim", ["40", "64", "80"])
def test_two_blocks_of_the_backward_share_a_multiprocessor(dim):
    """Few warps a block: a second one hides the first one's waiting, where shared memory allows (sm_90)."""
    found = [
        k for k in kernels()
        if k.arch == 90 and k.name == "attention_bwd_kernel"
        and k.arguments[:2] == ("bf16", dim) and k.arguments[-2:] == ("true", "false")
    ]  # fmt: skip
    assert all(k.resident >= 2 for k in found), found
