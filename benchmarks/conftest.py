"""``pytest benchmarks/ --benchmark`` measures, prints a table an operation and writes JSON and plots.

Without the flag each case runs once, as a smoke test.
"""

import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Harness, table, write  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("customdiff_kernels")
    group.addoption("--benchmark", action="store_true", help="measure (default: run each case once)")
    group.addoption("--rounds", type=int, default=15, help="most rounds a comparison (default 15)")
    group.addoption("--out", type=Path, default=Path("out/benchmarks"), help="folder for JSON and plots")


def pytest_configure(config):
    config.harness = Harness(smoke=not config.getoption("--benchmark"), rounds=config.getoption("--rounds"))


@pytest.fixture
def smoke(request) -> bool:
    """True when each case runs once only: the place to shrink a shape."""
    return request.config.harness.smoke


@pytest.fixture
def compare(request):
    """``compare(case, {label: call}, baseline=label, flops=, bytes=, cold=)`` -> {label: median seconds}."""
    op = request.module.__name__.removeprefix("bench_")
    return partial(request.config.harness.compare, op)


def pytest_terminal_summary(terminalreporter, config):
    harness = config.harness
    if not harness.rows:
        return
    for op in dict.fromkeys(row.op for row in harness.rows):
        terminalreporter.section(op)
        terminalreporter.write_line(table([row for row in harness.rows if row.op == op]))
    for path in write(harness, config.getoption("--out")):
        terminalreporter.write_line(f"wrote {path}")
