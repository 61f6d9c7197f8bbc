"""What the tests share: backends, seeds, poisoned memory, and the rule for low precision."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# derandomize: a failure seen once is seen again. Function-scoped fixtures only set the environment here.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BACKENDS = ["reference", "cpu", pytest.param("triton", marks=GPU)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """Runs the test once with each backend forced; ``device`` says where its tensors live."""
    monkeypatch.setenv("CK_BACKEND", request.param)
    return request.param


@pytest.fixture(params=["reference", "cpu"])
def backend64(request, monkeypatch) -> str:
    """The backends that compute in float64."""
    monkeypatch.setenv("CK_BACKEND", request.param)
    return request.param


@pytest.fixture
def device(backend) -> str:
    return "cuda" if backend == "triton" else "cpu"


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

    A unit in the last place of the largest entry is allowed beside it: one rounding more than eager's.
    """

    def check(what: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
        assert ours.dtype == eager.dtype and ours.shape == exact.shape, what
        assert ours.isfinite().all(), f"{what}: not finite"
        if not exact.numel():
            return
        exact = exact.detach().double()
        error, allowed = ((x.detach().double() - exact).abs().max().item() for x in (ours, eager))
        bound = 2 * allowed + torch.finfo(ours.dtype).eps * exact.abs().max().item()
        assert error <= bound, f"{what}: error {error:.3g}, eager {allowed:.3g}, bound {bound:.3g}"

    return check
