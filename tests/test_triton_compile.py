"""Every Triton kernel compiled for sm_80 and sm_90 as the library would launch it; no GPU is needed.

The launches are recorded on tensors without memory ("meta"), so tiles, strides and alignments are the real
ones. Bounds: no stack (hence no spilled register), at most 255 registers, shared memory within the
architecture's, and tensor-core instructions present. The table of the cases that ran goes to pytest's
temporary folder, and with ``CK_WRITE_TABLES=1`` to docs/triton_resources.md.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from customdiff_kernels import _backends
from customdiff_kernels.cross_attention import ops as cross_attention

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing to compile"
    ),
]

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have
PROCESSORS = {80: 108, 90: 132}  # A100, H100
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES |= {torch.int32: "i32", torch.int64: "i64"}
PRODUCTS = {"fwd_kernel": 2, "bwd_kernel": 5, "stats_kernel": 2, "bias_bwd_kernel": 2}
DOCS = Path(__file__).parent.parent / "docs" / "triton_resources.md"


class Case(NamedTuple):
    """One public call: forward, backward or score moments."""

    what: str
    dim: int
    dtype: torch.dtype = torch.bfloat16
    bias: str = ""  # "", "layout" or the broadcast shape of a dense one
    keys: int = 77

    def __str__(self) -> str:
        return f"{self.what}-{self.dim}-{DTYPES[self.dtype]}-{self.bias or 'plain'}-{self.keys}"


FAST = {
    80: [
        Case("forward", 40),
        Case("forward", 160, bias="layout"),
        Case("backward", 40),
        Case("backward", 64),
        Case("backward", 80),
        Case("backward", 160),
        Case("backward", 40, torch.float32),
        Case("backward", 160, torch.float32),
        Case("bias", 160, bias="layout"),
        Case("moments", 40),
    ],
    90: [Case("forward", 40), Case("forward", 160, bias="BHNS"), Case("backward", 40), Case("backward", 160)],
}
HALF, FULL = torch.bfloat16, torch.float32
SLOW = [
    *(Case(what, dim, HALF, bias) for what in ("forward", "backward") for dim in (40, 64, 80, 160)
      for bias in ("", "layout", "B11S")),
    *(Case(what, dim, FULL, bias) for what in ("forward", "backward") for dim in (40, 64, 80, 160)
      for bias in ("", "layout")),
    *(Case("bias", dim, dtype, bias) for dim in (40, 160) for dtype in (HALF, FULL)
      for bias in ("layout", "B11S")),
    *(Case("moments", dim, dtype) for dim in (40, 160) for dtype in (HALF, FULL)),
    Case("backward", 160, torch.float16),
    *(Case("forward", dim, keys=keys) for keys, dim in [(128, 160), (154, 64), (77, 256)]),
    *(Case("backward", dim, keys=keys)
      for keys, dim in [(7, 40), (128, 40), (128, 64), (128, 80), (128, 160), (154, 64), (77, 24), (77, 128),
                        (77, 256)]),
]  # fmt: skip
CASES = [pytest.param(arch, case, id=f"sm_{arch}-{case}") for arch in FAST for case in FAST[arch]] + [
    pytest.param(arch, case, id=f"sm_{arch}-{case}", marks=pytest.mark.slow)
    for arch in FAST
    for case in SLOW
    if case not in FAST[arch]
]


class Launch(NamedTuple):
    kernel: object
    arguments: dict[str, object]
    options: dict[str, object]


class Recorder:
    """Stands where a kernel stood and writes down its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            names = {"num_warps", "num_stages", "enable_fp_fusion"}
            options = {name: named.pop(name) for name in names & named.keys()}
            given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
            self.launches.append(Launch(self.kernel, given, options))

        return launch


class Operators:
    """The operators' own implementations, offered as a backend offers its functions."""

    @staticmethod
    def attention_forward(*arguments):
        cross_attention._forward(*arguments[:-1])

    @staticmethod
    def attention_backward(*arguments):
        *inputs, dq, dk, dv, dbias, dtable = arguments
        cross_attention._backward(*inputs, [x is not None for x in (dq, dk, dv, dbias, dtable)])

    score_moments = staticmethod(cross_attention._std)


def call(case: Case, kernels) -> None:
    """The shapes of Stable Diffusion's largest level: batch 4, 8 heads, 4096 tokens, (B,N,H,D) memory."""

    def empty(n):
        return torch.empty(4, n, 8, case.dim, dtype=case.dtype, device="meta").transpose(1, 2)

    query, key, value, grad_out = empty(4096), empty(case.keys), empty(case.keys), empty(4096)
    if case.what == "moments":
        kernels.score_moments(query, key)
        return
    bias = labels = table = None
    if case.bias == "layout":
        labels = torch.empty(1, 4096, dtype=torch.int32, device="meta")
        table = torch.empty(4, 5, case.keys, device="meta")
    elif case.bias:
        sizes = {"B": 4, "H": 8, "N": 4096, "S": case.keys, "1": 1}
        bias = torch.empty([sizes[c] for c in case.bias], device="meta")
    inputs = (query, key, value, bias, labels, table, 0.1)
    if case.what == "forward":
        kernels.attention_forward(*inputs, query)
    elif case.what == "backward":
        kernels.attention_backward(grad_out, *inputs, query, key, value, None, None)
    else:
        kernels.attention_backward(grad_out, *inputs, None, None, None, bias, table)


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """``launches(arch, case)``: the kernels that the call launches, with their arguments."""
    cache = os.environ.get("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", cache)
    from customdiff_kernels.cross_attention import triton as kernels

    def record(arch: int, case: Case, target=kernels) -> list[Launch]:
        found: list[Launch] = []
        for name in [n for n in vars(kernels) if n.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), found))
        monkeypatch.setattr(kernels, "_processors", lambda x: PROCESSORS[arch])
        monkeypatch.setattr(_backends, "for_tensors", lambda **tensors: kernels)
        call(case, target)
        monkeypatch.undo()
        monkeypatch.setenv("TRITON_CACHE_DIR", cache)
        return list({launch.kernel: launch for launch in found}.values())

    return record


def compiled(launch: Launch, arch: int):
    """The kernel specialised as Triton's launcher would: 1 and None constant, multiples of 16 known."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def resources(cubin: Path) -> dict[str, int]:
    """Registers and stack bytes a thread of the compiled kernel, as cuobjdump reads them."""
    import triton

    shipped = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is neither in triton nor on the PATH")
    text = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {
        name: int(re.search(rf"{key}:(\d+)", text)[1])
        for name, key in (("registers", "REG"), ("stack", "STACK"))
    }


def issued(ptx: str, num_warps: int) -> int:
    """Multiply-adds of the tensor-core instructions that a program issues if each line runs once."""
    warp = re.findall(r"\bmma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    group = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    return sum(int(m) * int(n) * int(k) for m, n, k in warp) * num_warps + sum(
        int(m) * int(n) * int(k) for m, n, k in group
    ) * (num_warps // 4)


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """Rows of the table, written when the chosen cases have run."""
    rows: dict[str, str] = {}
    yield rows
    text = HEAD + "".join(rows[key] + "\n" for key in sorted(rows))
    (tmp_path_factory.getbasetemp() / "triton_resources.md").write_text(text)
    if os.environ.get("CK_WRITE_TABLES") == "1":
        DOCS.write_text(text)


HEAD = """# Triton kernels: resources by compilation

Written by `CK_WRITE_TABLES=1 pytest tests/test_triton_compile.py`; with `-m "slow or not slow"` it has every
case. Shapes: batch 4, 8 heads, 4096 queries in (B,N,H,D) memory. No GPU took part and no time was measured.

- **stack**: bytes a thread; 0 means that no register is spilled.
- **tiles**: multiply-adds of the tiles over the useful ones (77 keys cost 80, head dimension 40 costs 48).
- **issued**: multiply-adds that the tensor-core instructions do over the useful ones: tiles, and what warps
  repeat because a tile is too small to share out. float32 multiplies three times ("tf32x3"); the figure
  leaves that out.

| case | kernel | keys × dims × queries | warps | registers | stack | shared | mma | wgmma | tiles | issued |
|---|---|---|---|---|---|---|---|---|---|---|
"""


@pytest.mark.parametrize("arch, case", CASES)
def test_resources(arch, case, launches, table, tmp_path):
    found, faults = launches(arch, case), []
    assert found
    for launch in found:
        name = launch.kernel.__name__
        binary = compiled(launch, arch)
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        used, shared, ptx = resources(cubin), binary.metadata.shared, binary.asm["ptx"]
        mma, wgmma = len(re.findall(r"\bmma\.sync", ptx)), len(re.findall(r"wgmma\.mma_async", ptx))

        shape, tiles, waste = launch.arguments, "", ""
        if name in PRODUCTS:
            keys, dims, block = shape["KEYS"], shape["DIMS"], shape["BLOCK"]
            tiles = f"{'+'.join(map(str, keys))} × {'+'.join(map(str, dims))} × {block}"
            n_tiles = -(-case.keys // sum(keys))
            useful = PRODUCTS[name] * block * case.keys * case.dim
            padded = sum(keys) * n_tiles * sum(dims) / (case.keys * case.dim)
            times = 3 if case.dtype is torch.float32 else 1
            paid = issued(ptx, launch.options["num_warps"]) * n_tiles / useful / times
            waste = f"{padded:.2f} | {paid:.2f}"
        table[f"sm_{arch}-{case} {name}"] = (
            f"| sm_{arch} {case} | {name} | {tiles} | {launch.options['num_warps']} "
            f"| {used['registers']} | {used['stack']} | {shared} | {mma} | {wgmma} | {waste or ' | '} |"
        )
        if used["stack"]:
            faults.append(f"{name}: {used['stack']} bytes of stack")
        if used["registers"] > 255 or shared > SHARED[arch]:
            faults.append(f"{name}: {used['registers']} registers, {shared} bytes of shared memory")
        if name != "sum_kernel" and not mma + wgmma:
            faults.append(f"{name}: no tensor-core instruction")
    assert not faults, faults


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("factor, weight", [(HALF, HALF), (HALF, FULL), (FULL, FULL)], ids=str)
def test_resources_of_low_rank_sums(arch, factor, weight, table, monkeypatch, tmp_path):
    """The weights of SD 1.x and two concepts of rank 24."""
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path)))
    from customdiff_kernels.low_rank import triton as kernels

    found: list[Launch] = []
    monkeypatch.setattr(kernels, "low_rank_kernel", Recorder(kernels.low_rank_kernel, found))
    base = torch.empty(24960, 768, dtype=weight, device="meta")
    u, v = (torch.empty(size, dtype=factor, device="meta") for size in ((320, 24), (24, 768)))
    kernels.low_rank_sum(base, base, [u, u], [v, v], [0, 0], [1.0, 0.5])
    (launch,) = found
    binary = compiled(launch, arch)
    cubin = tmp_path / "low_rank.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    used, shared, ptx = resources(cubin), binary.metadata.shared, binary.asm["ptx"]
    mma, wgmma = len(re.findall(r"\bmma\.sync", ptx)), len(re.findall(r"wgmma\.mma_async", ptx))
    case = f"sm_{arch} low_rank-{DTYPES[factor]}-{DTYPES[weight]}"
    table[f"sm_{arch}-low_rank-{factor}-{weight}"] = (
        f"| {case} | low_rank_kernel | | {launch.options['num_warps']} "
        f"| {used['registers']} | {used['stack']} | {shared} | {mma} | {wgmma} | | |"
    )
    most = 176 if factor is FULL else 128
    assert not used["stack"] and used["registers"] <= most and shared <= SHARED[arch] // 2
    assert mma + wgmma


@pytest.mark.parametrize("dim", [40, 80])
def test_16_byte_loads(dim, launches):
    """A head of 40 in (B,N,H,D) memory starts at multiples of 80 bytes: still moved 16 bytes at a time."""
    (launch,) = launches(80, Case("forward", dim))
    ptx = compiled(launch, 80).asm["ptx"]
    sizes = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(r"(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", ptx)
    ]
    assert sum(size for size in sizes if size == 16) >= 0.8 * sum(sizes), sizes


@pytest.mark.parametrize(
    "case",
    [Case(what, 40, bias=bias) for what in ("forward", "backward", "bias") for bias in ("layout", "B11S")]
    + [Case("moments", 40)],
    ids=str,
)
def test_operators_read_nothing_back_from_the_gpu(case, launches):
    """A tensor without memory has nothing to read: what runs on it waits for no GPU and can be captured."""
    assert launches(80, case, Operators)


def test_launches_fill_the_gpu(launches):
    """Few heads are split over the queries: 64 tokens of one picture and 8 heads still give 16 programs."""
    from customdiff_kernels.cross_attention import configs

    assert configs.split_queries(4096, 32, 8, 108) == 4096 // 26 // 32 * 32 + 32
    assert configs.split_queries(64, 32, 8, 108) == 32
    assert configs.split_queries(4096, 32, 10_000, 108) == 4096
