"""Matrices of given singular values, for the tests of compress."""

from __future__ import annotations

import torch

LARGE = [(160, 192), (192, 160), (176, 176)]  # float32 is used from 128 on


def with_values(rows: int, width: int, values: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    """A matrix with these singular values (k,)."""
    k = min(rows, width)
    u, v = (torch.linalg.qr(torch.randn(n, k).double())[0] for n in (rows, width))
    return ((u * values) @ v.T).to(dtype)


def decaying(rows: int, width: int, dtype=torch.float64, decay: float = 0.8) -> torch.Tensor:
    """Singular values decay^i, like a trained change's (Custom Diffusion, appendix B)."""
    return with_values(rows, width, decay ** torch.arange(min(rows, width)).double(), dtype)


def paper(rows: int, width: int, dtype=torch.float32) -> torch.Tensor:
    """What fits the paper's sizes at 60, 40 and 10% of the sum: benchmarks/bench_compress.py."""
    return with_values(rows, width, SPECTRA["paper"](min(rows, width)), dtype)


SPECTRA = {
    "paper": lambda k: (1 + 50 * torch.arange(k).double() / k) ** -1.2,
    "flat": lambda k: 1 - 0.5 * torch.arange(k).double() / k,
    "equal": lambda k: torch.ones(k).double(),
    "clusters": lambda k: 0.7 ** (torch.arange(k) // 10).double(),
    "nearly clusters": lambda k: 0.7 ** (torch.arange(k) // 10).double() * (1 - 1e-6 * torch.arange(k) / k),
    "steep": lambda k: 0.9 ** torch.arange(k).double(),
    "rank 20": lambda k: (torch.arange(k) < 20).double(),
    "one": lambda k: (torch.arange(k) < 1).double(),
}
