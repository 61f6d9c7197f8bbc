"""What the tests share: backends, seeds, poisoned memory, and the rule for low precision."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest
import torch

from customdiff_kernels import _backends

# derandomize: a failure seen once is seen again. Function-scoped fixtures only set the environment here.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

# What torch.use_deterministic_algorithms (`poison`) asks for on a GPU, before cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NVCC = pytest.mark.skipif(not _backends.has_cuda(), reason="built without the CUDA kernels")
# "cuda-shim": the CUDA kernels' own source, run on the CPU
BACKENDS = [
    "reference",
    "cpu",
    "cuda-shim",
    pytest.param("cuda", marks=[*GPU, NVCC]),
    pytest.param("triton", marks=GPU),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """Runs the test once with each backend forced; ``device`` says where its tensors live."""
    if request.param == "cuda-shim":
        request.getfixturevalue("cuda_on_cpu")
        choice = _backends.Choice("cuda", "its kernels run on the CPU")
        monkeypatch.setattr(_backends, "choose", lambda device, dtype: choice)
    else:
        monkeypatch.setenv("CK_BACKEND", request.param)
    return request.param


@pytest.fixture(scope="session")
def cuda_shim():
    """The compiled module of the CUDA kernels for the CPU (``native/cuda_shim``)."""
    file = Path(__file__).resolve().parent / "native" / "cuda_shim" / "build.py"
    spec = importlib.util.spec_from_file_location("cuda_shim_build", file)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    if build.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return build.load()


@pytest.fixture
def shim(cuda_shim):
    """The same, and afterwards nothing is left out and threads run in the first order again."""
    yield cuda_shim
    cuda_shim.set_seed(0)
    for sync in (cuda_shim.Sync.barrier, cuda_shim.Sync.warp_barrier, cuda_shim.Sync.copy_wait):
        cuda_shim.set_dropped(sync, -1)


@pytest.fixture
def cuda_on_cpu(shim, monkeypatch):
    """The ``cuda`` backend's functions, on tensors of the CPU."""
    from customdiff_kernels.cross_attention import cuda

    monkeypatch.setattr(cuda, "module", lambda: shim)
    return cuda


@pytest.fixture(params=["reference", "cpu"])
def backend64(request, monkeypatch) -> str:
    """The backends that compute in float64."""
    monkeypatch.setenv("CK_BACKEND", request.param)
    return request.param


@pytest.fixture
def device(backend) -> str:
    return "cuda" if backend in ("cuda", "triton") else "cpu"


@pytest.fixture
def poison():
    """Fresh memory is NaN, so an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def no_worse():
    """``no_worse(what, ours, eager, exact)``: our error is at most twice eager PyTorch's in the same dtype.

    Held for the largest error and for the root mean square. Beside it one unit in the last place of the
    largest entry is allowed (four in a small tensor) for the last rounding. ``slack``: so many units for the
    largest error and a tenth for the mean, eight times as many below 100 numbers: for random shapes, in which
    eager's error may be small by luck.
    """

    def check(what, ours, eager, exact, slack: float = 0) -> None:
        assert ours.dtype == eager.dtype and ours.shape == exact.shape, what
        assert ours.isfinite().all(), f"{what}: not finite"
        if not exact.numel():
            return
        exact = exact.detach().double()
        error, allowed = (x.detach().double() - exact for x in (ours, eager))
        unit = torch.finfo(ours.dtype).eps * exact.abs().max().item()
        ulps = 1 if exact.numel() > 1000 else 4
        slack = slack if exact.numel() > 100 else 8 * slack
        for norm, units in ((torch.inf, max(ulps, slack)), (2, max(ulps, slack / 10))):
            size = 1 if norm == torch.inf else exact.numel() ** 0.5
            e, a = (torch.linalg.vector_norm(x, norm).item() / size for x in (error, allowed))
            assert e <= 2 * a + units * unit, f"{what}: {norm}-norm of the error {e:.3g}, eager {a:.3g}"

    return check
