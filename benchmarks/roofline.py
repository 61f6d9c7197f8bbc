"""The least time that an attention or a K/V-only block can take: FLOPs and bytes over what a machine can do.

``python benchmarks/roofline.py`` prints, as Markdown, what that is by the datasheets of an A100 and an H200.
The benchmarks take the same counts over the rates that they measure.
"""

from __future__ import annotations

from typing import NamedTuple

TOKENS = 77  # of the text
LEVELS = {  # name: heads, image tokens, head dimension; the width is heads · head dimension
    "sd1 64x64": (8, 4096, 40),
    "sd1 32x32": (8, 1024, 80),
    "sd1 16x16": (8, 256, 160),
    "sd1 8x8": (8, 64, 160),
    "sd2 96x96": (5, 9216, 64),
    "sd2 48x48": (10, 2304, 64),
    "sd2 24x24": (20, 576, 64),
    "sd2 12x12": (20, 144, 64),
    "sdxl 64x64": (10, 4096, 64),
    "sdxl 32x32": (20, 1024, 64),
}


class Work(NamedTuple):
    """What one call must do and move: every input read once, every result written once."""

    flops: float
    bytes: float

    def plus(self, flops: float = 0, bytes: float = 0) -> Work:
        return Work(self.flops + flops, self.bytes + bytes)


class Shape(NamedTuple):
    batch: int
    heads: int
    tokens: int  # of the image
    keys: int
    dim: int
    size: int  # bytes of an element
    tile: int = 1  # keys are computed with in multiples of this, but moved as they are

    @property
    def width(self) -> int:
        return self.heads * self.dim

    @property
    def image_bytes(self) -> int:
        """One (B,N,width) tensor: hidden, query, result, or the gradient of one."""
        return self.batch * self.tokens * self.width * self.size

    @property
    def weight_bytes(self) -> int:
        """One (width, width) projection."""
        return self.width**2 * self.size

    @property
    def text_bytes(self) -> int:
        """Keys and values together."""
        return 2 * self.batch * self.keys * self.width * self.size

    @property
    def product(self) -> int:
        """FLOPs of one of the attention's matrix products."""
        keys = -(-self.keys // self.tile) * self.tile
        return 2 * self.batch * self.tokens * keys * self.width

    @property
    def projection(self) -> int:
        """FLOPs of one (width, width) projection of the image tokens."""
        return 2 * self.batch * self.tokens * self.width**2


def attention_forward(shape: Shape) -> Work:
    return Work(2 * shape.product, 2 * shape.image_bytes + shape.text_bytes)


def attention_backward(shape: Shape, recomputed: bool = False) -> Work:
    """``recomputed``: count the scores, computed again, beside the four products of the gradients."""
    return Work((5 if recomputed else 4) * shape.product, 3 * shape.image_bytes + 2 * shape.text_bytes)


def block_forward(shape: Shape) -> Work:
    """hidden read and the result written, both projections inside."""
    return attention_forward(shape).plus(2 * shape.projection, 2 * shape.weight_bytes)


def block_backward(shape: Shape, recomputed: bool = False) -> Work:
    """hidden and the result's gradient read, hidden's gradient written; W_q and W_out get none."""
    projections = (3 if recomputed else 2) * shape.projection
    return attention_backward(shape, recomputed).plus(projections, 2 * shape.weight_bytes)


def linear(shape: Shape) -> Work:
    """One projection of the image tokens as a kernel of its own."""
    return Work(shape.projection, 2 * shape.image_bytes + shape.weight_bytes)


class Machine(NamedTuple):
    name: str
    gbytes: float  # GB/s
    tflops: float  # TFLOP/s, dense bfloat16
    source: str

    def microseconds(self, kernels: list[Work]) -> float:
        """Of kernels one after the other, each as long as the slower of its bytes and its FLOPs."""
        return sum(max(w.bytes / self.gbytes / 1e3, w.flops / self.tflops / 1e6) for w in kernels)


MACHINES = (
    Machine("A100", 1555, 312, "NVIDIA A100 datasheet, SXM, 40 GB"),
    Machine("H200", 4800, 989, "NVIDIA H200 datasheet, SXM"),
)
BATCH, SIZE, TILE = 16, 2, 16  # bfloat16; 80 keys are computed for 77


def table() -> str:
    """The predictions as Markdown."""
    columns = " | ".join(["GFLOP", "MB", *(machine.name for machine in MACHINES)])
    sources = "; ".join(f"{m.name} {m.gbytes:,} GB/s, {m.tflops} TFLOP/s ({m.source})" for m in MACHINES)
    return "\n".join(
        [
            f"Microseconds at batch {BATCH} in bfloat16 by the datasheets: the slower of the bytes (every "
            f"input read and every result written once) and of the FLOPs (in tiles of {TILE} keys, of "
            f"{TOKENS}; the backward pass computes the scores again), *in italics* where these are. "
            f"Peaks: {sources}.",
            "",
            f"| attention | heads × tokens × dim | forward {columns} | backward {columns} |",
            "|---" * (2 + 2 * (2 + len(MACHINES))) + "|",
            *map(_attention_line, LEVELS),
            "",
            f"| K/V-only block of width 320 | kernels | {columns} |",
            "|---" * (4 + len(MACHINES)) + "|",
            *(line for level in LEVELS if _shape(level).width == 320 for line in _block_lines(level)),
        ]
    )


def _shape(level: str) -> Shape:
    heads, tokens, dim = LEVELS[level]
    return Shape(BATCH, heads, tokens, TOKENS, dim, SIZE, TILE)


def _attention_line(level: str) -> str:
    shape = _shape(level)
    forward, backward = attention_forward(shape), attention_backward(shape, recomputed=True)
    size = f"{shape.heads} × {shape.tokens} × {shape.dim}"
    return f"| {' | '.join([level, size, *_cells([forward]), *_cells([backward])])} |"


def _block_lines(level: str) -> list[str]:
    """The block as one kernel that projects inside, and with the projections as kernels of their own."""
    shape = _shape(level)
    variants = {
        "forward | query, attention, out": [linear(shape), attention_forward(shape), linear(shape)],
        "forward | one": [block_forward(shape)],
        "backward | query, out, attention, query": [
            *[linear(shape)] * 3,
            attention_backward(shape, recomputed=True),
        ],
        "backward | one": [block_backward(shape, recomputed=True)],
    }
    return [f"| {level} {what} | {' | '.join(_cells(kernels))} |" for what, kernels in variants.items()]


def _cells(kernels: list[Work]) -> list[str]:
    """GFLOP, MB, and each machine's microseconds."""
    flops, moved = sum(w.flops for w in kernels), sum(w.bytes for w in kernels)
    times = []
    for machine in MACHINES:
        time = machine.microseconds(kernels)
        by_bytes = moved / machine.gbytes / 1e3
        times.append(f"*{time:.1f}*" if time > 1.001 * by_bytes else f"{time:.1f}")
    return [f"{flops / 1e9:.1f}", f"{moved / 1e6:.0f}", *times]


if __name__ == "__main__":
    print(table())
