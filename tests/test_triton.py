"""Runs triton_*.py in fresh processes: TRITON_INTERPRET must be set before triton is first imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="triton's interpreter needs numpy")
@pytest.mark.parametrize(
    ("file", "chosen", "least"),
    [
        ("triton_kernels.py", "not slow", 130),
        pytest.param("triton_kernels.py", "slow", 150, marks=pytest.mark.slow),
        ("triton_low_rank.py", "not slow", 10),
    ],
)
def test_kernels_against_the_formula(file, chosen, least):
    """On the GPU where there is one, else under the interpreter on the CPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        file,
        "-q",
        "-x",
        "-m",
        chosen,
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CK_BACKEND"))}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least and "skipped" not in done.stdout, done.stdout[-1000:]
