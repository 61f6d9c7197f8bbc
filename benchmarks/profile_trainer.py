"""Where the time of a trainer's step on the embedded base goes, by kind of operation.

python benchmarks/profile_trainer.py [--batch 16] [--precision no|bf16] [--steps 5] [--threads 2]
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import diffusers_script  # noqa: E402
from bench_trainer import DTYPES, ours  # noqa: E402

KINDS = {
    "convolutions": ("aten::mkldnn_convolution", "aten::_slow_conv2d", "aten::convolution_backward"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("customdiff::kv_cross_attention", "aten::_scaled_dot_product"),
    "GELU": ("aten::gelu",),
    "normalisations": ("aten::native_group_norm", "aten::native_layer_norm"),
    "copies": ("aten::copy_", "aten::cat"),
}


def kind(name: str) -> str:
    return next((of for of, starts in KINDS.items() if name.startswith(starts)), "the rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=DTYPES, default="no")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        diffusers_script.write_pictures(Path(folder), regularization=4 * options.batch)
        with ours(Path(folder), options.batch, options.precision) as run:
            run.step()
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                for _ in range(options.steps):
                    run.step()
    spent: Counter[str] = Counter()
    for event in profiled.key_averages():
        spent[kind(event.key)] += event.self_cpu_time_total
    whole = spent.total()
    print(f"{whole / options.steps / 1000:.0f} ms a step")
    for name, time in spent.most_common():
        print(f"{time / whole:5.0%} {name}")


if __name__ == "__main__":
    main()
