"""``pytest benchmarks/ --benchmark`` measures, prints a table an operation and writes JSON and plots.

Without the flag each case runs once, as a smoke test.
"""

import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Harness, table, write, write_record  # noqa: E402
from timing import DEVICE  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("customdiff_kernels")
    group.addoption("--benchmark", action="store_true", help="measure (default: run each case once)")
    group.addoption("--rounds", type=int, help="most rounds a comparison (default 15, on a GPU 50)")
    group.addoption("--out", type=Path, default=Path("out/benchmarks"), help="folder for JSON and plots")


def pytest_configure(config):
    config.addinivalue_line("markers", "on(device): measured on a cpu or on cuda only; smoke runs take all")
    config.harness = Harness(smoke=not config.getoption("--benchmark"), rounds=config.getoption("--rounds"))


def pytest_collection_modifyitems(config, items):
    if config.harness.smoke:
        return
    here = [i for i in items if all(DEVICE in mark.args for mark in i.iter_markers("on"))]
    config.hook.pytest_deselected(items=[i for i in items if i not in here])
    items[:] = here


@pytest.fixture
def smoke(request) -> bool:
    """True when each case runs once only: the place to shrink a shape."""
    return request.config.harness.smoke


@pytest.fixture
def compare(request):
    """``compare(case, {label: call}, ...)`` -> {label: median seconds}: ``Harness.compare``."""
    harness = request.config.harness
    yield partial(harness.compare, request.module.__name__.removeprefix("bench_"))
    if harness.rows:  # what is measured stays, whatever the next case does
        write_record(harness, request.config.getoption("--out"))


def pytest_terminal_summary(terminalreporter, config):
    harness = config.harness
    if not harness.rows:
        return
    for op in dict.fromkeys(row.op for row in harness.rows):
        terminalreporter.section(op)
        terminalreporter.write_line(table([row for row in harness.rows if row.op == op]))
    refused = {(x["op"], x["label"], x["reason"]) for x in harness.left_out}
    for op, label, reason in sorted(refused):
        terminalreporter.write_line(f"left out of {op}: {label}: {reason}")
    for path in write(harness, config.getoption("--out")):
        terminalreporter.write_line(f"wrote {path}")
