"""Samples of one call, its peak memory, and the limits of the machine.

On a GPU a sample is one call between two events, its inputs in memory rather than in the cache, and queued
while the device is still busy: what the host takes to launch is a figure of its own and not in the time.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLUSH_BYTES = 256 << 20  # larger than any last-level cache met so far
SPIN_HZ = 2e9  # at least the clock of the GPU: how long it is kept busy while the host queues a call


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def host_sample(call: Callable[[], object], repeats: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def queue_seconds(call: Callable[[], object]) -> float:
    """What the host takes to queue one call."""
    synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def device_sample(call: Callable[[], object], queue_seconds: float) -> float:
    """Seconds between two events around one call that was queued while the device spun."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(min(2 * queue_seconds + 5e-5, 0.1) * SPIN_HZ))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that one call holds of torch's memory beside what stood before it, its results included."""
    if not CUDA:
        return _peak_cpu_bytes(call)
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu_bytes(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    held = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@cache
def _flush() -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device=DEVICE)


def evict() -> None:
    """Leave nothing of the inputs in the caches, and no line that would be written back during a sample."""
    _flush().sum()


def measure_limit(kind: str, dtype: torch.dtype = torch.float32) -> float:
    """``gemm``: GFLOP/s of a matrix product in ``dtype``, 2048 wide (GPU: 8192).

    ``copy``: GB/s read and written, 256 MB (GPU: 1 GB).
    """
    if kind == "gemm":
        n = 8192 if CUDA else 2048
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        out, work = torch.empty_like(a), 2 * n**3
        call = lambda: torch.mm(a, b, out=out)  # noqa: E731
    elif kind == "copy":
        a = torch.ones(256 << 20 if CUDA else 64 << 20, device=DEVICE)
        out, work = torch.empty_like(a), 2 * a.nbytes
        call = lambda: out.copy_(a)  # noqa: E731
    else:
        raise ValueError(f"kind is 'gemm' or 'copy', not {kind!r}")
    call()
    times = [device_sample(call, 1e-4) if CUDA else host_sample(call, 1) for _ in range(9)]
    return work / statistics.median(times) / 1e9
